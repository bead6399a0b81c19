"""One process: every rank-0 piece is a whole parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds_lowrank.layouts.base import Group, LayoutError, Member, Piece, Ranks


class LocalLayout:
    """Parameters as the model has them, on one process."""

    kind = "one process"

    def __init__(self, members: Sequence[Member], groups: Sequence[Group]):
        self._members = {m.name: m for m in members}
        self._groups = groups
        for m in members:
            if not m.parameter.is_contiguous():
                raise LayoutError(f"{m.name} {m.shape} is not contiguous: call .contiguous() on it before training")
        devices = {m.parameter.device for m in members}
        if len(devices) != 1:
            raise LayoutError(f"the parameters lie on several devices ({', '.join(map(str, devices))}): use one device")
        self.ranks = Ranks(device=devices.pop())
        self.pieces = {m.name: Piece(0, m.parameter.numel()) for m in members}

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return self._members[name].parameter.data.view(-1)

    def grad(self, name: str) -> Tensor | None:  # noqa: D102
        grad = self._members[name].parameter.grad
        return None if grad is None else grad.reshape(-1)

    def flat_params(self, group: int) -> list[Tensor]:  # noqa: D102
        return self._groups[group]["params"]

    def mismatch(self) -> str | None:  # noqa: D102
        return None
