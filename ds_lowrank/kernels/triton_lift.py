"""A ← keep · A − step_size · N Bᵀ in one pass over the weights: twin of :func:`ds_lowrank.subspace.project.lift_`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_lowrank.states.rounding import Place

TILE = 64
DEPTH = 32


@triton.jit
def mix(x):
    """See ``_mix`` in :mod:`ds_lowrank.states.rounding`; uint32 wraps by itself."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(index, low, high):
    """See :func:`ds_lowrank.states.rounding.random_bits`; ``low`` and ``high`` are int64."""
    key_low = low.to(tl.uint32)
    key_high = high.to(tl.uint32)
    lower = (index & 0xFFFFFFFF).to(tl.uint32)
    upper = (index >> 32).to(tl.uint32)
    return mix(mix(lower ^ key_low) + upper * 0x9E3779B9 + key_high)


@triton.jit
def round_stochastic(x, bits):
    """float32 that bf16 has exactly, see :func:`ds_lowrank.states.rounding.round_stochastic`."""
    raw = x.to(tl.uint32, bitcast=True)
    moved = (raw + (bits & 0xFFFF)) & 0xFFFF0000
    return tl.where(x != x, x, moved.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["low", "high", "first"])
def lift_kernel(
    a_ptr,
    n_ptr,
    b_ptr,
    rows,
    short,
    r,
    a_row,
    a_column,
    step_size,
    keep,
    low,
    high,
    first,
    index_row,
    index_column,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of A. N (rows × r) and B (short × r) are contiguous float32, A has any strides."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, r, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        n = tl.load(
            n_ptr + row[:, None] * r + inner[None, :], mask=(row < rows)[:, None] & (inner < r)[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + column[None, :] * r + inner[:, None],
            mask=(column < short)[None, :] & (inner < r)[:, None],
            other=0.0,
        )
        total = tl.dot(n, b, total, input_precision="ieee")
    inside = (row < rows)[:, None] & (column < short)[None, :]
    at = row[:, None] * a_row + column[None, :] * a_column
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # With nothing to keep, what lies there is not looked at.
    a = tl.where(keep == 0.0, 0.0, keep * a) - step_size * total
    if STOCHASTIC:
        index = first + row[:, None] * index_row + column[None, :] * index_column
        a = round_stochastic(a, random_bits(index, low, high))
    tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=inside)


def lift_(
    a: Tensor,
    direction: Tensor,
    basis: Tensor,
    step_size: float,
    keep: float,
    place: Place | None = None,
) -> None:
    """See :func:`ds_lowrank.subspace.project.lift_`."""
    rows, short = a.shape
    if not rows or not short:
        return
    assert place is None or a.dtype == torch.bfloat16
    lift_kernel[(triton.cdiv(rows, TILE), triton.cdiv(short, TILE))](
        a,
        direction.contiguous(),
        basis.contiguous(),
        rows,
        short,
        direction.shape[1],
        a.stride(0),
        a.stride(1),
        step_size,
        keep,
        place.key.low if place else 0,
        place.key.high if place else 0,
        place.first if place else 0,
        *(place.strides if place else (0, 0)),
        place is not None,
        TILE,
        DEPTH,
    )
