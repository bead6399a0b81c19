"""The collectives that the optimizer uses, counted. Knows ranks and bytes, no mathematics.

Four of them move everything that has to move. An all-to-all of 1-D pieces, in which most pairs exchange nothing,
carries rows of cut matrices and bases on their way to their keepers; an all-gather joins the slices of a basis and
hands new weights round; a reduction adds Grams on their owner; a sum of small matrices serves the overlap of two bases.
A fifth, a maximum, is of a few numbers: the scales of 8-bit blocks that a boundary cuts.
No process group is made beside the framework's. All are asynchronous, so that they run while something is computed, and
are started in the same order on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lowrank.comm.gloo import await_gloo_at_exit
from ds_lowrank.layouts.base import Ranks

T = TypeVar("T")


class Pending(Generic[T]):
    """A collective that has been started.

    Args:
        wait: waits for it and returns what it brought.
    """

    def __init__(self, wait: Callable[[], T]):
        self._wait: Callable[[], T] | None = wait
        self._value: T

    def wait(self) -> T:
        """What the collective brought; waits for it at the first call."""
        if self._wait is not None:
            self._value, self._wait = self._wait(), None
        return self._value


def done(value: T) -> Pending[T]:
    """Something for which nothing has to be awaited."""
    return Pending(lambda: value)


class Comm:
    """Collectives over the data-parallel ranks.

    Attributes:
        ranks: who takes part.
        sent_bytes: bytes this rank has sent to other ranks, by purpose, since the last :meth:`reset`. Of an all-gather
            these are its own part, padded to the longest, once for every receiver; of a reduction its own addend
            (nothing on the destination); of a sum what a ring sends.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.sent_bytes: Counter[str] = Counter()
        if ranks.size > 1:
            await_gloo_at_exit()

    def reset(self) -> None:
        """Forget the bytes counted so far."""
        self.sent_bytes.clear()

    def exchange(
        self, send: Sequence[Sequence[Tensor]], receive: Sequence[int], dtype: torch.dtype, purpose: str
    ) -> Pending[list[Tensor]]:
        """Send pieces to every rank and receive pieces from every rank. Collective over all ranks.

        Args:
            send: for each rank, the tensors it gets, any shapes; they arrive flattened and joined in this order.
            receive: for each rank, how many numbers come from it.
            dtype: of the numbers on the wire.
            purpose: name under which the bytes are counted, and which an error carries.

        Returns:
            For each rank, what comes from it: 1-D, ``dtype``, on the ranks' device. What a rank sends itself is moved
            without traffic.
        """
        device = self.ranks.device
        sizes = [sum(t.numel() for t in tensors) for tensors in send]
        outgoing = torch.empty(sum(sizes), dtype=dtype, device=device)
        at = 0
        for tensor in (t for tensors in send for t in tensors):
            outgoing[at : at + tensor.numel()].view(tensor.shape).copy_(tensor)
            at += tensor.numel()
        if self.ranks.size == 1:
            return done([outgoing])
        incoming = torch.empty(sum(receive), dtype=dtype, device=device)
        self.sent_bytes[purpose] += (sum(sizes) - sizes[self.ranks.rank]) * dtype.itemsize
        return self._start(
            "all-to-all",
            purpose,
            partial(dist.all_to_all_single, incoming, outgoing, list(receive), sizes, self.ranks.process_group, True),
            lambda: list(incoming.split(list(receive))),
            outgoing,
        )

    def all_gather(self, mine: Tensor, sizes: Sequence[int], purpose: str) -> Pending[list[Tensor]]:
        """Join the parts of the ranks that share this rank's copy of the model. Collective over them.

        Args:
            mine: this rank's part, 1-D and contiguous.
            sizes: numbers in each of these ranks' parts.
            purpose: see :meth:`exchange`.

        Returns:
            Every rank's part, 1-D.
        """
        if len(sizes) == 1:
            return done([mine])
        most = max(sizes)
        if mine.numel() < most:  # gloo cannot gather parts of unequal size
            mine = torch.cat([mine, mine.new_zeros(most - mine.numel())])
        whole = mine.new_empty(most * len(sizes))
        self.sent_bytes[purpose] += (len(sizes) - 1) * most * mine.element_size()
        return self._start(
            "all-gather",
            purpose,
            partial(_all_gather, whole, mine, self.ranks.copy_group, True),
            lambda: [part[:size] for part, size in zip(whole.split(most), sizes)],
            mine,
        )

    def reduce(self, tensor: Tensor, owner: int, purpose: str) -> Pending[Tensor]:
        """Add up a tensor over the ranks of one copy of the model. Collective over them.

        Args:
            tensor: contiguous; afterwards it holds the sum on ``owner`` and nothing of use elsewhere.
            owner: a rank of this copy.
            purpose: see :meth:`exchange`.

        Returns:
            ``tensor``.
        """
        if len(self.ranks.shard_group) == 1:
            return done(tensor)
        group = self.ranks.copy_group
        destination = dist.get_global_rank(group, self.ranks.shard_group.index(owner)) if group is not None else owner
        if owner != self.ranks.rank:
            self.sent_bytes[purpose] += tensor.numel() * tensor.element_size()
        return self._start(
            "reduction", purpose, lambda: dist.reduce(tensor, destination, group=group, async_op=True), lambda: tensor
        )

    def all_reduce(self, tensor: Tensor, purpose: str) -> Pending[Tensor]:
        """Add up a tensor over the ranks of one copy of the model, for all of them. Collective over them."""
        shard_group = len(self.ranks.shard_group)
        if shard_group == 1:
            return done(tensor)
        self.sent_bytes[purpose] += 2 * (shard_group - 1) * tensor.numel() * tensor.element_size() // shard_group
        return self._start(
            "sum", purpose, lambda: dist.all_reduce(tensor, group=self.ranks.copy_group, async_op=True), lambda: tensor
        )

    def add_replicas(self, tensor: Tensor, dtype: torch.dtype, purpose: str) -> Tensor:
        """The sum over the ranks that hold the same part of every copy of the model. Collective over them.

        Args:
            tensor: contiguous; what this rank adds.
            dtype: of the numbers on the wire; they are added up in that of ``tensor``, in the same order on all ranks.
            purpose: see :meth:`exchange`.
        """
        copies = len(set(self.ranks.copy))
        if copies == 1:
            return tensor
        mine = tensor.to(dtype).view(-1)
        everyone = mine.new_empty(copies * mine.numel())
        self.sent_bytes[purpose] += (copies - 1) * mine.numel() * mine.element_size()
        gathering = self._start(
            "all-gather",
            purpose,
            partial(_all_gather, everyone, mine, self.ranks.replica_group, True),
            lambda: everyone,
            mine,
        )
        return gathering.wait().view(copies, *tensor.shape).sum(0, dtype=tensor.dtype)

    def maximum(self, tensor: Tensor, purpose: str) -> Pending[Tensor]:
        """The largest of each number over the ranks of one copy of the model, for all. Collective over them.

        Args:
            tensor: whole numbers (of floating ones gloo may lose a NaN); overwritten.
            purpose: see :meth:`exchange`.

        Returns:
            ``tensor``.
        """
        shard_group = len(self.ranks.shard_group)
        if shard_group == 1:
            return done(tensor)
        self.sent_bytes[purpose] += 2 * (shard_group - 1) * tensor.numel() * tensor.element_size() // shard_group
        return self._start(
            "maximum",
            purpose,
            lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.ranks.copy_group, async_op=True),
            lambda: tensor,
        )

    def gather_objects(self, value: Any, purpose: str = "plans") -> list[Any]:
        """Every rank's ``value``, in rank order. Collective over all ranks; for set-up only."""
        if self.ranks.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.ranks.size
        # torch takes the current device for objects, which need not be this rank's.
        on_device = torch.cuda.device(self.ranks.device) if self.ranks.device.type == "cuda" else nullcontext()
        try:
            with on_device:
                dist.all_gather_object(gathered, value, group=self.ranks.process_group)
        except RuntimeError as error:
            raise self._failed("all-gather", purpose, error) from error
        return gathered

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of a few numbers over the ranks. Collective over all ranks; in float64."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.ranks.device)
        if self.ranks.size > 1:
            try:
                dist.all_reduce(total, group=self.ranks.process_group)
            except RuntimeError as error:
                raise self._failed("sum", "figures", error) from error
        return total.tolist()

    def _start(
        self, collective: str, purpose: str, start: Callable[[], Any], result: Callable[[], T], *alive: Tensor
    ) -> Pending[T]:
        """Start a collective; ``alive`` is what must not be freed before it has ended."""
        try:
            work = start()
        except RuntimeError as error:
            raise self._failed(collective, purpose, error) from error
        held = list(alive)

        def wait() -> T:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failed(collective, purpose, error) from error
            held.clear()
            return result()

        return Pending(wait)

    def _failed(self, collective: str, purpose: str, error: RuntimeError) -> RuntimeError:
        """An error that says which collective it was: a rank that died or hangs shows up on all others here."""
        return RuntimeError(f"{collective} of {purpose} failed on rank {self.ranks.rank}: {error}")


# torch 2.13 has renamed it; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
