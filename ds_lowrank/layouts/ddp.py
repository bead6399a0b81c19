"""Whole parameters on every rank: one process, or DistributedDataParallel.

The ranks keep equal weights because whoever averages the gradients (DDP, or a loop of one's own) gives every rank the
same ones. Both are checked once: the weights when the layout is found, the gradients at the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.layouts.base import LayoutError, Member, Piece, Ranks, Tensors, same_device


class ReplicatedLayout:
    """Parameters as the model has them, equal on all ranks."""

    def __init__(self, members: Sequence[Member]):
        self._members = {m.name: m for m in members}
        self._tensors = Tensors()
        for m in members:
            if not m.parameter.is_contiguous():
                raise LayoutError(f"{m.name} {m.shape} is not contiguous: call .contiguous() on it before training")
            self._tensors.add(m.parameter, m.name)
        device = same_device({m.name: m.parameter for m in members})
        self.ranks = Ranks(device=device)
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            self.ranks = Ranks(None, dist.get_rank(), dist.get_world_size(), device)
        self.dealt = self.ranks.size > 1
        self.kind = "DDP" if self.dealt else "one process"
        self.pieces = {m.name: Piece(0, m.parameter.numel()) for m in members}

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return self._members[name].parameter.data.view(-1)

    def grad(self, name: str) -> Tensor | None:  # noqa: D102
        grad = self._members[name].parameter.grad
        return None if grad is None else grad.reshape(-1)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._members[name].parameter.dtype

    def unit(self, name: str) -> int:  # noqa: D102
        return 0

    def names_in(self, tensor: Tensor) -> list[str]:  # noqa: D102
        return self._tensors.names_in(tensor)

    def mismatch(self) -> str | None:  # noqa: D102
        return None

    def checksums(self, what: str) -> Any:  # noqa: D102
        if not self.dealt:
            return None
        values = {n: m.parameter.data if what == "weights" else m.parameter.grad for n, m in self._members.items()}
        return {
            n: None if t is None else (float(t.double().sum()), float(t.double().norm())) for n, t in values.items()
        }


def _checksum(tensor: Tensor) -> tuple[float, float]:
    wide = tensor.double()
    return float(wide.sum()), float(wide.norm())
