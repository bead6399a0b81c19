"""Adam in the subspace on kept moments: one read and one write of each, R in and N out in the same memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_lowrank.kernels.triton_blocks import ROWS, block_scale, grid, nearest, tile
from ds_lowrank.states.blocks import BLOCK, count
from ds_lowrank.states.dynamic import dynamic_map, midpoints

PART = 1024


@triton.jit
def adam(g, m, v, w1, beta2, w2, root, eps):
    """N, M, V; ``root`` and ``eps`` have the bias corrections in them, as in :mod:`ds_lowrank.kernels.moments`."""
    m = m + w1 * (g - m)
    v = v * beta2 + w2 * g * g
    return tl.div_rn(m, tl.sqrt_rn(v) * root + eps), m, v


@triton.jit
def plain_kernel(g_ptr, m_ptr, v_ptr, numel, w1, beta2, w2, root, eps, PART: tl.constexpr):
    """Moments in float32 or bf16."""
    at = tl.program_id(0).to(tl.int64) * PART + tl.arange(0, PART)
    inside = at < numel
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    n, m, v = adam(g, m, v, w1, beta2, w2, root, eps)
    tl.store(g_ptr + at, n, mask=inside)
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=inside)


@triton.jit
def int8_kernel(
    g_ptr,
    m_ptr,
    m_scale_ptr,
    v_ptr,
    v_scale_ptr,
    signed_map,
    signed_mid,
    unsigned_map,
    unsigned_mid,
    rows,
    r,
    blocks,
    w1,
    beta2,
    w2,
    root,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moments in codes and scales."""
    row, column, inside = tile(rows, r, ROWS, BLOCK)
    there = row < rows
    at = row[:, None] * r + column[None, :]
    scale_at = row * blocks + tl.program_id(1)
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    m_code = tl.load(m_ptr + at, mask=inside, other=0).to(tl.int32)
    v_code = tl.load(v_ptr + at, mask=inside, other=0).to(tl.int32)
    m = tl.load(signed_map + m_code) * tl.load(m_scale_ptr + scale_at, mask=there, other=0.0)[:, None]
    v = tl.load(unsigned_map + v_code) * tl.load(v_scale_ptr + scale_at, mask=there, other=0.0)[:, None]
    n, m, v = adam(g, m, v, w1, beta2, w2, root, eps)
    # What lies beyond the row has no say in its scale.
    m = tl.where(inside, m, 0.0)
    v = tl.where(inside, v, 0.0)
    m_scale = block_scale(m)
    v_scale = block_scale(v)
    tl.store(g_ptr + at, n, mask=inside)
    tl.store(m_ptr + at, nearest(m, m_scale, signed_mid, True).to(tl.uint8), mask=inside)
    tl.store(v_ptr + at, nearest(v, v_scale, unsigned_mid, False).to(tl.uint8), mask=inside)
    tl.store(m_scale_ptr + scale_at, m_scale, mask=there)
    tl.store(v_scale_ptr + scale_at, v_scale, mask=there)


def plain(gradient: Tensor, m: Tensor, v: Tensor, weights: tuple[float, float, float, float, float]) -> None:
    """Step moments of one dtype; all tensors contiguous, ``gradient`` float32 and overwritten by N."""
    numel = gradient.numel()
    if numel:
        plain_kernel[(triton.cdiv(numel, PART),)](gradient, m, v, numel, *weights, PART)


def int8(
    gradient: Tensor,
    m: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    weights: tuple[float, float, float, float, float],
) -> None:
    """Step moments of codes and scales each; ``gradient`` (rows × r, contiguous float32) is overwritten by N."""
    rows, r = gradient.shape
    if not rows:
        return
    tables = [table(signed, gradient.device) for signed in (True, False) for table in (dynamic_map, midpoints)]
    int8_kernel[grid(rows, r)](gradient, *m, *v, *tables, rows, r, count(r), *weights, ROWS, BLOCK)
