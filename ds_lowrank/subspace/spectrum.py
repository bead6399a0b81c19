"""Eigen-decomposition of a Gram matrix with the guards that a training run needs."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def fix_signs(vectors: Tensor) -> Tensor:
    """Give every column the sign that makes its entry of largest magnitude positive.

    An eigenvector's sign is free; left free, moments would flip at a refresh. Args: short × k. Returns: short × k.
    """
    peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return torch.where(peaks < 0, -vectors, vectors)


# Up to which multiple of ε λ_max an eigenvalue of a Gram that should be 0 was seen to come out: 5, in float32 and
# float64, for long sides up to 16384; it grows slowly with the long side.
_GRAM_NOISE = 32
# The same of a matrix whose entries are rounded with unit roundoff u, as a multiple of u ‖G‖_F / √short: 1.4. The rest
# is for gradients that are rounded again when they are added up over ranks and micro-batches.
_ENTRY_NOISE = 4
# Gradients are sums over tokens, of terms that cancel: with those added up in float32 it was 6.
_SUM_NOISE = 16


def independent(sigma: Tensor, gradient_dtype: torch.dtype) -> int:
    """How many singular values of a gradient stand above the rounding of its Gram and that of its own entries.

    What lies below has directions that rounding has made: other sums of the same numbers give others.

    Args:
        sigma: (min(m, n),) singular values, descending, as :func:`spectrum` gives them, in the dtype of the Gram.
        gradient_dtype: in which the gradient was computed.
    """
    gram_floor = math.sqrt(_GRAM_NOISE * torch.finfo(sigma.dtype).eps) * float(sigma[0])
    own_floor = entry_noise(gradient_dtype) * float(sigma.norm()) / math.sqrt(sigma.numel())
    return int((sigma > max(gram_floor, own_floor)).sum())


def entry_noise(gradient_dtype: torch.dtype) -> float:
    """Largest singular value that rounding makes of nothing, as a multiple of ‖G‖_F / √short.

    Narrow types are added up in float32 and rounded once.
    """
    sums = torch.promote_types(gradient_dtype, torch.float32)
    return max(_ENTRY_NOISE * torch.finfo(gradient_dtype).eps, _SUM_NOISE * torch.finfo(sums).eps) / 2


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
