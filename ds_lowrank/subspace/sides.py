"""Which dimension of a weight is projected.

A weight W (m × n) is seen as A (long × short): W itself or its transpose view. The columns of A are projected onto
a basis B (short × r); its rows stay whole, so a step is independent per row of A. ``proj_type`` has GaLore's names
(arXiv 2403.03507, ``GaLoreProjector``); with the two reverse types the projected dimension may be the longer one.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Side = Literal["right", "left"]

PROJ_TYPES = ("std", "reverse_std", "right", "left")


def projected_side(shape: tuple[int, int], proj_type: str) -> Side:
    """Side on which W (m × n) is multiplied by its basis.

    Args:
        shape: (m, n).
        proj_type: ``std`` projects the shorter dimension (n when they are equal), ``reverse_std`` the longer one,
            ``right`` always n, ``left`` always m.

    Returns:
        ``"right"`` (A = W, the n columns are projected) or ``"left"`` (A = Wᵀ, the m rows are projected).

    Raises:
        ValueError: for an unknown ``proj_type``.
    """
    m, n = shape
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    if proj_type in ("right", "left"):
        return proj_type  # type: ignore[return-value]
    raise ValueError(f"proj_type {proj_type!r} is unknown: use one of {', '.join(PROJ_TYPES)}")


def as_rows(matrix: Tensor, side: Side) -> Tensor:
    """The view of a W-shaped matrix (m × n) in which rows stay whole: itself, or its transpose."""
    return matrix if side == "right" else matrix.mT
