"""The norm-growth limiter of Fira (arXiv 2410.01623), which APOLLO (2412.05270) has too, and what both take to scale.

Both move a matrix by S = φ ⊙ X with φ = |N| / |R| of moments **before bias correction**; the correction multiplies the
update afterwards. ‖S‖ may not be more than γ times what it was a step ago: where it is, all of S is scaled down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from ds_lowrank.rules.base import Hyper
from ds_lowrank.states.layout import Slot

# ‖S‖ of the last step, as limited; 0: there was none yet.
LIMITER_NORM = Slot("limiter_norm", axis="matrix", width=1, format="exact")

TINY = 1e-8  # is added to norms that are divided by, as in both packages


def correction(hyper: Hyper) -> float:
    """√(1 − β2ᵗ) / (1 − β1ᵗ): what Adam's bias correction makes of M / √V."""
    beta1, beta2 = hyper.betas
    return math.sqrt(1 - beta2**hyper.step) / (1 - beta1**hyper.step)


def limit(
    state: MutableMapping[str, Tensor], norms: Tensor, corrected: float, growth: float, scale: float = 1.0
) -> Tensor:
    """What S is multiplied by, at most 1, times ``scale``; the limited norm is remembered.

    A norm of zero is not remembered: after it nothing above γ · 1e-8 would pass, and that bound grows by γ a step.

    Args:
        state: with :data:`LIMITER_NORM`, matrices × 1; changed in place.
        norms: c ‖S‖, (matrices,); may be overwritten.
        corrected: c.
        growth: γ; infinity limits nothing.
        scale: of what is returned, not of what is remembered.

    Returns:
        (matrices,).
    """
    last = state[LIMITER_NORM.name].squeeze(1)
    # On a CPU numbers are read without waiting, and cost less than a call of torch.
    limited = _limit_numbers if norms.device.type == "cpu" else _limit_tensors
    return limited(last, norms, corrected, growth, scale)


def _limit_tensors(last: Tensor, norms: Tensor, corrected: float, growth: float, scale: float) -> Tensor:
    norms = norms / corrected
    factor = (growth * (last + TINY) / norms).clamp(max=1.0).where((last > 0) & (norms > 0), 1.0)
    limited = factor * norms
    last.copy_(limited.where((limited > 0) & limited.isfinite(), last))
    return factor * scale


def _limit_numbers(last: Tensor, norms: Tensor, corrected: float, growth: float, scale: float) -> Tensor:
    factors, remembered = [], []
    for before, norm in zip(last.tolist(), norms.tolist()):
        norm /= corrected
        factor = min(1.0, growth * (before + TINY) / norm) if before > 0.0 and norm > 0.0 else 1.0
        factors.append(factor * scale)
        remembered.append(factor * norm if 0.0 < factor * norm < math.inf else before)
    _fill_(last, remembered)
    return _fill_(norms if factors else norms[:0], factors)  # a rank without rows may keep no norm


def _fill_(tensor: Tensor, numbers: list[float]) -> Tensor:
    return tensor.fill_(numbers[0]) if len(numbers) == 1 else tensor.copy_(torch.tensor(numbers, dtype=tensor.dtype))


def check_limiter(options: Mapping[str, float]) -> None:
    """Refuse a growth that would shrink every step.

    Raises:
        ValueError: γ < 1.
    """
    if not options["limiter"] >= 1.0:
        raise ValueError(f"lowrank.rule_options['limiter'] must be at least 1, got {options['limiter']!r}")
