"""The products of a step: Gram, project, lift-and-decay (ALGORITHMS of GaLore, arXiv 2403.03507, algorithm 2)."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ds_lowrank.kernels import fused
from ds_lowrank.states.rounding import Place, copy_stochastic_
from ds_lowrank.subspace.spectrum import entry_noise

# No full-size copy is ever made: rows of a matrix that are widened at once.
_WIDENED_ROWS = 2048
_GRAM_BLOCK_COLUMNS = 128


def widened_rows(short: int) -> int:
    """Of how many rows a wider copy is made at a time: no more than a Gram has, but enough for a product to be fast."""
    return min(_WIDENED_ROWS, max(256, short))


def gram(a: Tensor, dtype: torch.dtype) -> Tensor:
    """AᵀA, the sum over the rows of A of their outer products.

    Args:
        a: rows × short, any float dtype and strides.
        dtype: dtype of the product and its accumulation.

    Returns:
        short × short in ``dtype``. Grams of disjoint blocks of rows add up to the Gram of the whole.
    """
    short = a.shape[1]
    out = torch.empty(short, short, dtype=dtype, device=a.device)
    # Symmetric: of blocks of columns only those on and above the diagonal are computed, the rest is their mirror image.
    blocks = max(1, min(4, short // _GRAM_BLOCK_COLUMNS))
    cuts = [short * k // blocks for k in range(blocks + 1)]
    for first, rows in enumerate(a.split(widened_rows(short))):
        wide = rows.to(dtype)
        for left, right in itertools.pairwise(cuts):
            # beta = 0 does not read what lies there.
            out[left:right, left:].addmm_(wide[:, left:right].mT, wide[:, left:], beta=0 if first == 0 else 1)
        del wide  # before the next is made
    if not len(a):
        return out.zero_()
    for left, right in itertools.pairwise(cuts):
        out[right:, left:right].copy_(out[left:right, right:].mT)
    return out


def gram_of_short_rows(a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """AᵀA of a matrix with fewer rows than columns, in the coordinates of its row space.

    Where the longer side is projected (``reverse_std``) AᵀA is the larger of the two Grams, and all but ``rows`` of its
    directions are null. With Aᵀ = Q R it is Q (R Rᵀ) Qᵀ, whose inner matrix costs what the shorter side costs.

    Args:
        a: rows × short, rows ≤ short, any float dtype and strides.
        dtype: of the products.

    Returns:
        R Rᵀ, rows × rows, and the frame Q, short × rows with orthonormal columns, both in ``dtype``.
    """
    frame, triangle = torch.linalg.qr(a.mT.to(dtype))
    return triangle @ triangle.mT, frame


def project(a: Tensor, basis: Tensor, out: Tensor) -> None:
    """R = A B.

    Args:
        a: rows × short, any float dtype.
        basis: short × r; its dtype is the dtype of the product.
        out: rows × r in the basis' dtype, overwritten.
    """
    if a.dtype == basis.dtype:
        torch.mm(a, basis, out=out)
        return
    chunk = widened_rows(a.shape[1])
    for rows, product in zip(a.split(chunk), out.split(chunk)):
        torch.mm(rows.to(basis.dtype), basis, out=product)


# Numbers of sums that are added up at once: they stay in a CPU's cache.
_SUMMED = 1 << 17


def row_squares(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the squares of every row.

    Args:
        a: rows × short, any float dtype and strides.
        dtype: of the sums.

    Returns:
        (rows,) in ``dtype``.
    """
    if a.device.type != "cpu" or a.stride(1) == 1:
        return torch.linalg.vector_norm(a, dim=1, dtype=dtype).square_()
    # Of a wide matrix, whose columns are the rows here, torch's norm takes one number after the other on a CPU: 10 to
    # 20 times as long as these sums.
    columns = a.mT
    count = max(1, _SUMMED // max(1, columns.shape[1]))
    sums = torch.zeros(min(count, len(columns)), columns.shape[1], dtype=dtype)
    for part in columns.split(count):
        wide = part.to(dtype)
        sums[: len(part)].addcmul_(wide, wide)
    return sums.sum(dim=0)


def energy(a: Tensor, dtype: torch.dtype) -> Tensor:
    """‖A‖², line by line as it lies in memory: torch's float32 norm of a million numbers at once is 1e-4 too small.

    Args:
        a: rows × short, any float dtype and strides.
        dtype: of the sums.

    Returns:
        A tensor of one number, in ``dtype``.
    """
    lines = a if a.stride(1) == 1 else a.mT
    return torch.linalg.vector_norm(lines, dim=1, dtype=dtype).square_().sum()


# What a row of a gradient has in a direction orthogonal to it came out as up to 3 u ‖row‖ for the unit roundoff u
# of the product.
_PRODUCT_NOISE = 8


def drop_rounding_(product: Tensor, a: Tensor, drawn: Tensor, gradient_dtype: torch.dtype) -> None:
    """Zero what rounding alone could have made of R = A B in directions that were drawn to be orthogonal to a gradient.

    Adam divides by their own size and would make a full step of them, another one wherever sums are rounded otherwise.

    Args:
        product: R, rows × r; overwritten.
        a: rows × short, any float dtype.
        drawn: (r,) bool, the columns whose directions are none of a gradient's.
        gradient_dtype: in which the gradient was computed.
    """
    product_floor = _PRODUCT_NOISE * torch.finfo(product.dtype).eps / 2
    own_floor = entry_noise(gradient_dtype) / math.sqrt(a.shape[1])
    floor = max(product_floor, own_floor) * row_squares(a, product.dtype).sqrt_()[:, None]
    product.masked_fill_((product.abs() <= floor) & drawn.to(product.device), 0.0)


class Push(NamedTuple):
    """How the gradient itself moves rows: by − row_step ⊙ ∇A.

    Attributes:
        row_step: learning rate times s, (rows,), the dtype that is computed with.
        gradient: rows × short, any float dtype.
    """

    row_step: Tensor
    gradient: Tensor


def lift_(
    a: Tensor,
    direction: Tensor | None,
    basis: Tensor | None,
    step_size: float,
    keep: float,
    place: Place | None = None,
    push: Push | None = None,
) -> None:
    """A ← keep · A − step_size · N Bᵀ − row_step ⊙ ∇A, in place.

    Args:
        a: rows × short, the weights (or an update buffer), any float dtype and strides.
        direction: N, rows × r; ``None``: there is none.
        basis: B, short × r, the dtype of ``direction``.
        step_size: learning rate times scale.
        keep: 1 − learning rate · weight decay; 0 overwrites ``a`` (its old content is not read, NaN included).
        place: where A is in its matrix: bf16 weights are rounded stochastically then.
        push: of rules that move by the gradient itself.

    A dtype narrower than what is computed with is computed in that and rounded once, to nearest without a ``place``.
    """
    work = direction if direction is not None else push.row_step if push is not None else a
    if a.dtype == work.dtype:
        if push is None and direction is not None and basis is not None:
            a.addmm_(direction, basis.mT, beta=keep, alpha=-step_size)
        else:
            _move(a, direction, basis, step_size, keep, push)
    elif push is None and basis is not None and work.dtype == torch.float32 and fused(a, work, basis):
        from ds_lowrank.kernels import triton_lift

        triton_lift.lift_(a, work, basis, step_size, keep, place)
    else:
        chunk = widened_rows(a.shape[1])
        for at in range(0, len(a), chunk):
            rows = a[at : at + chunk]
            part = None if direction is None else direction[at : at + chunk]
            pushing = None if push is None else Push(push.row_step[at : at + chunk], push.gradient[at : at + chunk])
            wide = rows.to(work.dtype)
            _move(wide, part, basis, step_size, keep, pushing)
            round_(rows, wide, place and place.below(at))
            del wide  # before the next is made


def _move(
    a: Tensor, direction: Tensor | None, basis: Tensor | None, step_size: float, keep: float, push: Push | None
) -> None:
    if direction is not None and basis is not None:
        a.addmm_(direction, basis.mT, beta=keep, alpha=-step_size)
    elif keep == 0.0:
        a.zero_()
    elif keep != 1.0:
        a.mul_(keep)
    if push is not None:
        a.addcmul_(push.row_step[:, None], push.gradient.to(a.dtype), value=-1)


def round_(a: Tensor, wide: Tensor, place: Place | None) -> None:
    """Write what was computed for A into it: rounded to nearest, or stochastically where a ``place`` is given."""
    if place is None:
        a.copy_(wide)
    else:
        copy_stochastic_(a, wide, place)
