"""Adam's direction from moments as they are kept: fused on a CUDA device, in three passes elsewhere."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.kernels import fused
from ds_lowrank.kernels.adam import adamw_direction_
from ds_lowrank.states.formats import Formats


def kept_direction_(
    formats: Formats,
    state: MutableMapping[str, Any],
    gradient: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """N from R and a matrix's state, whose moments are rounded to their formats after it, never before.

    Args:
        formats: how the moments are kept.
        state: with the moments under the keys of their formats; updated in place.
        gradient: R, rows × r, on the device of the moments. **Overwritten** by N.
        step, betas, eps: see :func:`ds_lowrank.kernels.adam.adamw_direction_`.

    Returns:
        N, rows × r.
    """
    direction = fused_direction_ if gradient.dtype == torch.float32 and fused(gradient) else torch_direction_
    return direction(formats, state, gradient, step, betas, eps)


def torch_direction_(
    formats: Formats,
    state: MutableMapping[str, Any],
    gradient: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Read, step, write: the oracle of :func:`fused_direction_`."""
    r, dtype = gradient.shape[1], gradient.dtype
    exp_avg = formats.exp_avg.read(state, "exp_avg", r, dtype)
    exp_avg_sq = formats.exp_avg_sq.read(state, "exp_avg_sq", r, dtype)
    direction = adamw_direction_(gradient, exp_avg, exp_avg_sq, step, betas, eps)
    formats.exp_avg.write_(state, "exp_avg", exp_avg)
    formats.exp_avg_sq.write_(state, "exp_avg_sq", exp_avg_sq)
    return direction


def fused_direction_(
    formats: Formats,
    state: MutableMapping[str, Any],
    gradient: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """The same in one kernel; ``gradient`` is float32."""
    from ds_lowrank.kernels import triton_moments  # not where there is no Triton

    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    weights = (1 - beta1, beta2, 1 - beta2, correction1 / math.sqrt(correction2), eps * correction1)
    gradient = gradient.contiguous()
    m, v = (
        [state[key] for key in form.keys(quantity)]
        for form, quantity in ((formats.exp_avg, "exp_avg"), (formats.exp_avg_sq, "exp_avg_sq"))
    )
    if formats.state_dtype == "int8":
        triton_moments.int8(gradient, (m[0], m[1]), (v[0], v[1]), weights)
    else:
        triton_moments.plain(gradient, m[0], v[0], weights)
    return gradient
