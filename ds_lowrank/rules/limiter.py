"""The norm-growth limiter of Fira (arXiv 2410.01623), which APOLLO (2412.05270) has too, and what both take to scale.

Both move a matrix by S = φ ⊙ X with φ = |N| / |R| of moments **before bias correction**; the correction multiplies the
update afterwards. ‖S‖ may not be more than γ times what it was a step ago: where it is, all of S is scaled down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping

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


def limit(state: MutableMapping[str, Tensor], norms: Tensor, growth: float) -> Tensor:
    """What S is multiplied by, at most 1; the limited norm is remembered.

    A norm of zero is not remembered: after it nothing above γ · 1e-8 would pass, and that bound grows by γ a step.

    Args:
        state: with :data:`LIMITER_NORM`, matrices × 1; changed in place.
        norms: ‖S‖, (matrices,).
        growth: γ; infinity limits nothing.

    Returns:
        (matrices,).
    """
    last = state[LIMITER_NORM.name].squeeze(1)
    factor = (growth * (last + TINY) / norms).clamp(max=1.0).where((last > 0) & (norms > 0), 1.0)
    limited = factor * norms
    last.copy_(limited.where((limited > 0) & limited.isfinite(), last))
    return factor


def check_limiter(options: Mapping[str, float]) -> None:
    """Refuse a growth that would shrink every step.

    Raises:
        ValueError: γ < 1.
    """
    if not options["limiter"] >= 1.0:
        raise ValueError(f"lowrank.rule_options['limiter'] must be at least 1, got {options['limiter']!r}")
