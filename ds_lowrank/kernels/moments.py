"""AdamW's arithmetic (Kingma and Ba, arXiv 1412.6980; decoupled decay: 1711.05101) on moments as they are kept: fused
on a CUDA device, by parts of the rows elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.kernels import fused
from ds_lowrank.states.dynamic import passes
from ds_lowrank.states.formats import Dynamic, Formats


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
        step, betas, eps: see :func:`ds_lowrank.kernels.moments.adamw_direction_`.

    Returns:
        N, rows × r.
    """
    if formats.state_dtype == "fp32" and not gradient.is_cuda:
        return adamw_direction_(gradient, state["exp_avg"], state["exp_avg_sq"], step, betas, eps)
    direction = torch_direction_
    if gradient.dtype == torch.float32:
        if fused(gradient):
            direction = fused_direction_
        elif formats.state_dtype == "int8":
            direction = parted_direction_
    return direction(formats, state, gradient, step, betas, eps)


def torch_direction_(
    formats: Formats,
    state: MutableMapping[str, Any],
    gradient: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Read, step, write: the oracle of the two others."""
    r, dtype = gradient.shape[1], gradient.dtype
    exp_avg = formats.exp_avg.read(state, "exp_avg", r, dtype)
    exp_avg_sq = formats.exp_avg_sq.read(state, "exp_avg_sq", r, dtype)
    direction = adamw_direction_(gradient, exp_avg, exp_avg_sq, step, betas, eps)
    formats.exp_avg.write_(state, "exp_avg", exp_avg)
    formats.exp_avg_sq.write_(state, "exp_avg_sq", exp_avg_sq)
    return direction


def parted_direction_(
    formats: Formats,
    state: MutableMapping[str, Any],
    gradient: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """The same for int8, bit by bit, some rows at a time: what is read of a part is in the cache until it is written.

    ``gradient`` is float32. Two moments are never widened whole.
    """
    kept = [
        (form.signed, *(state[key] for key in form.keys(quantity)))
        for form, quantity in ((formats.exp_avg, "exp_avg"), (formats.exp_avg_sq, "exp_avg_sq"))
        if isinstance(form, Dynamic)
    ]
    wide: list[Tensor] = []
    for rows, work in passes(gradient):
        part = gradient[rows]
        wide = wide or [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in kept]
        moments = [moment[: len(part)] for moment in wide]
        for moment, (signed, codes, scales) in zip(moments, kept):
            work.decode_(codes[rows], scales[rows], moment, signed)
        exp_avg, exp_avg_sq = moments
        adamw_direction_(part, exp_avg, exp_avg_sq, step, betas, eps)
        for moment, (signed, codes, scales) in zip(moments, kept):
            work.encode_(moment, codes[rows], scales[rows], signed)
    return gradient


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


def adamw_direction_(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """N = M̂ / (√V̂ + ε), element by element.

    Args:
        gradient: R, rows × r. **Overwritten**: the returned N lies in its memory, so a step allocates nothing more.
        exp_avg: M, rows × r, updated in place: M ← β1 M + (1−β1) R.
        exp_avg_sq: V, rows × r, updated in place: V ← β2 V + (1−β2) R∘R.
        step: number of this step, from 1.
        betas: (β1, β2).
        eps: ε, added to the bias-corrected root as in the paper. (GaLore's code adds it before the correction.)

    Returns:
        N, rows × r.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction1 = 1 - beta1**step
    correction2 = 1 - beta2**step
    # N = M / (√V · c1/√c2 + ε c1): the corrections are numbers, so they ride on passes that are made anyway.
    denominator = torch.sqrt(exp_avg_sq, out=gradient)
    denominator.mul_(correction1 / math.sqrt(correction2)).add_(eps * correction1)
    return torch.div(exp_avg, denominator, out=denominator)


def adamw_moments_(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]) -> None:
    """M ← β1 M + (1−β1) G and V ← β2 V + (1−β2) G∘G, in place, one operation a rounding.

    Fused multiply-adds are rounded once in a vector's body and may be twice in its tail: where a parameter is cut would
    show, and could tip an 8-bit code over.

    Args:
        gradient: G, float32, any shape.
        exp_avg, exp_avg_sq: M and V, float32, the same shape.
        betas: (β1, β2).
    """
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_(gradient * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(gradient.square().mul_(1 - beta2))


def adamw_weights_(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """W ← (1 − ηλ) W − η M̂ / (√V̂ + ε) in place, one operation a rounding as in :func:`adamw_moments_`.

    Args:
        weights: W, float32, any shape.
        exp_avg, exp_avg_sq: M and V after this step, float32, the same shape.
        step: number of this step, from 1.
        lr, betas, eps, weight_decay: η, (β1, β2), ε, λ.
    """
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    direction = torch.div(exp_avg, denominator, out=denominator).mul_(lr / (1 - betas[0] ** step))
    weights.mul_(1 - lr * weight_decay).sub_(direction)
