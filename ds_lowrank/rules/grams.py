"""Grams (arXiv 2412.17107): how far from Adam's moments, which way from the gradient of now."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from ds_lowrank.kernels.moments import adamw_direction_, kept_direction_
from ds_lowrank.rules import Hyper, Rule, Stack, Update, register
from ds_lowrank.rules.adamw import MOMENTS
from ds_lowrank.states.formats import Formats


def _kept_step(formats: Formats, kept: MutableMapping[str, Any], r: Tensor, hyper: Hyper) -> Update:
    signs = r.sign()  # R is overwritten
    return Update(kept_direction_(formats, kept, r, hyper.step, hyper.betas, hyper.eps).abs_().mul_(signs))


@register
class Grams(Rule):
    """N = |M̂ / (√V̂ + ε)| ∘ sign(R); where R is zero, nothing moves."""

    name = "grams"
    slots = MOMENTS
    copies = 1
    kept_step = staticmethod(_kept_step)

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Update:  # noqa: D102
        signs = r.sign()
        m, v = state["exp_avg"], state["exp_avg_sq"]
        return Update(adamw_direction_(r, m, v, hyper.step, hyper.betas, hyper.eps).abs_().mul_(signs))
