"""APOLLO (arXiv 2412.05270): the gradient itself moves the weights, by step sizes that a small Adam has found.

α is the group's ``scale``. The paper's code multiplies by the root of what it calls scale: its settings are
``scale=1`` with APOLLO and ``scale=11.3137`` (√128) with APOLLO-Mini, whose rank is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import ClassVar

import torch
from torch import Tensor

from ds_lowrank.kernels.moments import adamw_direction_
from ds_lowrank.rules import Hyper, Rule, Stack, Steps, register
from ds_lowrank.rules.adamw import MOMENTS
from ds_lowrank.rules.base import Update
from ds_lowrank.rules.limiter import LIMITER_NORM, TINY, check_limiter, correction, limit


@register
class Apollo(Rule):
    """s = α c l φ, φ = |N| / (c |R|) a row, with N of AdamW, c the bias correction and l the limiter of ‖φ ⊙ ∇A‖."""

    name = "apollo"
    slots = (*MOMENTS, LIMITER_NORM)
    options: ClassVar[Mapping[str, float]] = {"limiter": 1.01}
    reads_gradient = True
    lifts = False

    def check(self, options: Mapping[str, float]) -> None:  # noqa: D102
        check_limiter(options)

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Steps:  # noqa: D102
        sizes, lengths = _sizes(r, state, hyper)
        phi = lengths.div_(sizes.add_(TINY))  # times c
        total = yield stack.totals(phi.square().mul_(stack.gradient_squares(r.dtype)))
        factor = limit(state, total.sqrt(), correction(hyper), hyper.options["limiter"], hyper.scale)
        return Update(None, phi.mul_(stack.each_row(factor)))


@register
class ApolloMini(Apollo):
    """The same with one φ a matrix: ‖N‖ / (c ‖R‖)."""

    name = "apollo_mini"

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Steps:  # noqa: D102
        squares = [stack.totals(size.square_()) for size in _sizes(r, state, hyper)]
        total = yield torch.cat([*squares, stack.gradient_totals(r.dtype)])
        size, length, gradient = total.sqrt().chunk(3)
        phi = length / size.add_(TINY)  # times c
        factor = limit(state, phi * gradient, correction(hyper), hyper.options["limiter"], hyper.scale)
        return Update(None, stack.each_row(factor.mul_(phi)))


def _sizes(r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper) -> tuple[Tensor, Tensor]:
    """|R| and, after the moments' step, |N| of every row; R is overwritten."""
    sizes = torch.linalg.vector_norm(r, dim=1)
    n = adamw_direction_(r, state["exp_avg"], state["exp_avg_sq"], hyper.step, hyper.betas, hyper.eps)
    return sizes, torch.linalg.vector_norm(n, dim=1)
