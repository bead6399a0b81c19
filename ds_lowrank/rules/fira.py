"""Fira (arXiv 2410.01623): what the basis does not see of a gradient moves the weights too, scaled row by row."""

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
class Fira(Rule):
    """α N Bᵀ + S with N of AdamW, S = c l φ ⊙ (∇A − α R Bᵀ), φ = |N| / (c |R|) a row, c bias correction, l the limiter.

    With s = c l φ that is α (N − s ⊙ R) Bᵀ + s ⊙ ∇A, and ‖S‖² follows from |∇A|², |R|² and |R Bᵀ|² of every row, so
    the residual is never formed.
    """

    name = "fira"
    slots = (*MOMENTS, LIMITER_NORM)
    options: ClassVar[Mapping[str, float]] = {"limiter": 1.01}
    reads_gradient = True
    needs_orthonormal = True
    copies = 1

    def check(self, options: Mapping[str, float]) -> None:  # noqa: D102
        check_limiter(options)

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Steps:  # noqa: D102
        alpha = hyper.scale
        sizes = torch.linalg.vector_norm(r, dim=1)
        # ∇A · R Bᵀ is |R|², as R = ∇A B. Rounding may leave less than nothing of a gradient that the basis sees whole.
        residual = stack.gradient_squares(r.dtype).addcmul_(sizes, sizes, value=-2 * alpha)
        residual = residual.add_(stack.lifted_squares(r), alpha=alpha**2).clamp_(min=0)
        n = adamw_direction_(r.clone(), state["exp_avg"], state["exp_avg_sq"], hyper.step, hyper.betas, hyper.eps)
        phi = torch.linalg.vector_norm(n, dim=1).div_(sizes.add_(TINY))  # times c
        total = yield stack.totals(phi.square().mul_(residual))
        row_scale = phi.mul_(stack.each_row(limit(state, total.sqrt(), correction(hyper), hyper.options["limiter"])))
        return Update(n.addcmul_(r, row_scale[:, None], value=-1), row_scale)
