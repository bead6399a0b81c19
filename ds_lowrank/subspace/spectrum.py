"""Eigen-decomposition of a Gram matrix with the guards that a training run needs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def fix_signs(vectors: Tensor) -> Tensor:
    """Give every column the sign that makes its entry of largest magnitude positive.

    An eigenvector's sign is free; left free, moments would flip at a refresh. Args: short × k. Returns: short × k.
    """
    peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return torch.where(peaks < 0, -vectors, vectors)


def spectrum(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """Singular values and right singular vectors of A from its Gram AᵀA.

    Args:
        gram: short × short, float32 or float64, symmetric up to rounding.

    Returns:
        (sigma, vectors): sigma (short,) descending, exactly 0 where it cannot be told from rounding; vectors
        short × short orthonormal, column i belonging to sigma[i], signs not fixed. ``None`` when nothing can be
        decomposed: the Gram is zero, not finite, or the decomposition fails in float64 too.
    """
    # One number decides both guards: the trace is ‖A‖², zero exactly when A is, not finite as soon as A is not.
    energy = gram.diagonal().sum()
    if not bool(torch.isfinite(energy)) or float(energy) <= 0.0:
        return None
    for dtype in (gram.dtype, torch.float64):
        decomposed = _eigh(gram.to(dtype))
        if decomposed is not None:
            values, vectors = decomposed
            values, vectors = values.flip(0), vectors.flip(1)
            floor = 8 * torch.finfo(gram.dtype).eps * values[0]
            sigma = torch.where(values > floor, values, values.new_zeros(())).sqrt()
            return sigma.to(gram.dtype), vectors.to(gram.dtype)
    return None


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        values, vectors = torch.linalg.eigh(gram)
    except RuntimeError as error:  # LinAlgError, or a GPU's solver: the owner's verdict must reach the other ranks
        if isinstance(error, torch.OutOfMemoryError):
            logger.warning("out of memory in the decomposition of a %d x %d Gram matrix", *gram.shape)
        return None
    finite = bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all())
    return (values, vectors) if finite else None
