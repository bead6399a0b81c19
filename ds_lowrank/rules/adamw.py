"""AdamW in the subspace: GaLore's (arXiv 2403.03507) and SARA's (2502.05790) rule."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from ds_lowrank.kernels.moments import adamw_direction_, kept_direction_
from ds_lowrank.rules import Hyper, Rule, Stack, Update, register
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.layout import Slot

MOMENTS = (Slot("exp_avg", turns="linear"), Slot("exp_avg_sq", format="unsigned", turns="square"))


def _kept_step(formats: Formats, kept: MutableMapping[str, Any], r: Tensor, hyper: Hyper) -> Update:
    return Update(kept_direction_(formats, kept, r, hyper.step, hyper.betas, hyper.eps))


@register
class AdamW(Rule):
    """N = M̂ / (√V̂ + ε)."""

    name = "adamw"
    slots = MOMENTS
    kept_step = staticmethod(_kept_step)

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Update:  # noqa: D102
        m, v = state["exp_avg"], state["exp_avg_sq"]
        return Update(adamw_direction_(r, m, v, hyper.step, hyper.betas, hyper.eps))
