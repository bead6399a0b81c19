"""The collectives that the optimizer uses, counted. Knows ranks and bytes, no mathematics.

One primitive moves everything that has to move: an all-to-all of 1-D pieces of one dtype, in which most pairs exchange
nothing. Rows of cut matrices, Grams on their way to an owner and bases on their way to their holders are such pieces.
It needs no process group beside the one the framework made, and its result does not depend on the backend's order of
summation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lowrank.layouts.base import Ranks


class Comm:
    """Collectives over the data-parallel ranks.

    Attributes:
        ranks: who takes part.
        sent_bytes: bytes this rank has sent to other ranks, by purpose, since the last :meth:`reset`.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.sent_bytes: Counter[str] = Counter()

    def reset(self) -> None:
        """Forget the bytes counted so far."""
        self.sent_bytes.clear()

    def exchange(
        self, send: Sequence[Sequence[Tensor]], receive: Sequence[int], dtype: torch.dtype, purpose: str
    ) -> list[Tensor]:
        """Send pieces to every rank and receive pieces from every rank. Collective.

        Args:
            send: for each rank, the tensors it gets, any shapes; they arrive flattened and joined in this order.
            receive: for each rank, how many numbers come from it.
            dtype: of the numbers on the wire.
            purpose: name under which the bytes are counted, and which an error carries.

        Returns:
            For each rank, what came from it: 1-D, ``dtype``, on the ranks' device. What a rank sends itself is moved
            without traffic.
        """
        device = self.ranks.device
        parts = [t.reshape(-1).to(device=device, dtype=dtype) for tensors in send for t in tensors]
        send_sizes = [sum(t.numel() for t in tensors) for tensors in send]
        outgoing = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        incoming = torch.empty(sum(receive), dtype=dtype, device=device)
        if self.ranks.size == 1:
            incoming.copy_(outgoing)
        else:
            try:
                dist.all_to_all_single(incoming, outgoing, list(receive), send_sizes, group=self.ranks.process_group)
            except RuntimeError as error:
                raise RuntimeError(f"all-to-all of {purpose} failed on rank {self.ranks.rank}: {error}") from error
            away = sum(send_sizes) - send_sizes[self.ranks.rank]
            self.sent_bytes[purpose] += away * incoming.element_size()
        return list(incoming.split(list(receive)))

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order. Collective; for set-up only."""
        if self.ranks.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(gathered, value, group=self.ranks.process_group)
        return gathered

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of a few numbers over the ranks. Collective; in float64."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.ranks.device)
        if self.ranks.size > 1:
            dist.all_reduce(total, group=self.ranks.process_group)
        return total.tolist()
