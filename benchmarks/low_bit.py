"""The one-process reference with moments and bases rounded to their formats where they are kept, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_lowrank.reference import Reference
from ds_lowrank.states.blocks import BLOCK
from ds_lowrank.states.formats import Format, Formats


class LowBitReference(Reference):
    """As the optimizer with ``state_dtype`` and ``basis_dtype``.

    Args:
        formats: of projected matrices; the moments of other parameters are kept in that of moments, int8 in blocks of
            the flattened parameter.
    """

    def __init__(self, *args: Any, formats: Formats, **options: Any):
        super().__init__(*args, **options)
        self.formats = formats

    def adam(self, g: Tensor, state: dict) -> Tensor:
        direction = super().adam(g, state)
        if "basis" in state:
            state["m"] = rounded(self.formats.exp_avg, state["m"])
            state["v"] = rounded(self.formats.exp_avg_sq, state["v"])
        elif self.formats.state_dtype != "fp32":
            state["m"] = rounded_flat(self.formats.exp_avg, state["m"])
            state["v"] = rounded_flat(self.formats.exp_avg_sq, state["v"])
        return direction

    def refine(self, g: Tensor, state: dict) -> None:
        super().refine(g, state)
        state["basis_m"] = rounded(self.formats.exp_avg, state["basis_m"])
        state["basis_v"] = rounded(self.formats.exp_avg_sq, state["basis_v"])

    def refresh(self, name: str, g: Tensor, state: dict) -> None:
        before = dict(state)
        super().refresh(name, g, state)
        if state["refreshes"] == before["refreshes"]:
            return
        if self.selection != "gaussian":  # which is made again, and not kept
            state["basis"] = rounded(self.formats.basis, state["basis"])
        if self.moments == "project" and "m" in before:
            state["m"] = rounded(self.formats.exp_avg, before["m"] @ (before["basis"].T @ state["basis"]))


def rounded(form: Format, x: Tensor) -> Tensor:
    """What is read of ``x`` when it was written."""
    return form.decode(form.encode(x), x.shape[1], x.dtype)


def rounded_flat(form: Format, x: Tensor) -> Tensor:
    """The same of a tensor of any shape, in blocks counted from its first element."""
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK))
    return rounded(form, flat.view(-1, BLOCK)).view(-1)[: x.numel()].view(x.shape)
