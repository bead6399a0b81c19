"""Blockwise quantisation: twins of :mod:`ds_lowrank.states.dynamic` and of reading :mod:`ds_lowrank.states.linear`.

A program has ``ROWS`` rows of one block: its scale is a maximum over what the program has in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_lowrank.states.blocks import BLOCK, count
from ds_lowrank.states.dynamic import dynamic_map, midpoints

ROWS = 16


@triton.jit
def tile(rows, r, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns of this program's block, and which of its numbers are in the matrix."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row, column, (row < rows)[:, None] & (column < r)[None, :]


@triton.jit
def block_scale(x):
    """Largest absolute value of every row. ``tl.max`` passes over NaN, which must not be hidden."""
    largest = tl.max(tl.abs(x), axis=1)
    wrong = tl.max((x != x).to(tl.int32), axis=1)
    return tl.where(wrong > 0, float("nan"), largest)


@triton.jit
def nearest(x, scale, mid_ptr, SIGNED: tl.constexpr):
    """Codes of a block: how many of the 255 midpoints lie below, found by bisection."""
    unit = tl.div_rn(x, tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros_like(x))
    code = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        middle = tl.load(mid_ptr + code + ((128 >> bit) - 1))
        code = tl.where(unit > middle, code + (128 >> bit), code)
    if not SIGNED:
        code = tl.where((x > 0) & (code == 0), 1, code)
    return code


@triton.jit
def quantise_kernel(
    x_ptr, code_ptr, scale_ptr, mid_ptr, rows, r, blocks, SIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """x -> codes and scales, see :func:`ds_lowrank.states.dynamic.quantise`."""
    row, column, inside = tile(rows, r, ROWS, BLOCK)
    at = row[:, None] * r + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = block_scale(x)
    code = nearest(x, scale, mid_ptr, SIGNED)
    tl.store(code_ptr + at, code.to(tl.uint8), mask=inside)
    tl.store(scale_ptr + row * blocks + tl.program_id(1), scale, mask=row < rows)


@triton.jit
def dequantise_kernel(code_ptr, scale_ptr, map_ptr, out_ptr, rows, r, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Codes and scales -> x, see :func:`ds_lowrank.states.dynamic.dequantise`."""
    row, column, inside = tile(rows, r, ROWS, BLOCK)
    at = row[:, None] * r + column[None, :]
    code = tl.load(code_ptr + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + row * blocks + tl.program_id(1), mask=row < rows, other=0.0)
    tl.store(out_ptr + at, tl.load(map_ptr + code) * scale[:, None], mask=inside)


@triton.jit
def linear_kernel(
    code_ptr, scale_ptr, out_ptr, rows, r, width, blocks, HALVES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Codes of equal steps and scales -> x; ``HALVES``: two codes a byte."""
    row, column, inside = tile(rows, r, ROWS, BLOCK)
    if HALVES:
        pair = tl.load(code_ptr + row[:, None] * width + (column // 2)[None, :], mask=inside, other=0).to(tl.int32)
        code = ((pair >> (column % 2 * 4)[None, :]) & 15) - 8
    else:
        code = tl.load(code_ptr + row[:, None] * width + column[None, :], mask=inside, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + row * blocks + tl.program_id(1), mask=row < rows, other=0.0)
    tl.store(out_ptr + row[:, None] * r + column[None, :], code.to(tl.float32) * scale[:, None], mask=inside)


def grid(rows: int, r: int) -> tuple[int, int]:
    """Programs for rows × r numbers."""
    return triton.cdiv(rows, ROWS), count(r)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """See :func:`ds_lowrank.states.dynamic.quantise`; ``x``: contiguous, float32 or bf16."""
    rows, r = x.shape
    codes = torch.empty(rows, r, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, count(r), dtype=torch.float32, device=x.device)
    if rows:
        quantise_kernel[grid(rows, r)](
            x.contiguous(), codes, scales, midpoints(signed, x.device), rows, r, count(r), signed, ROWS, BLOCK
        )
    return codes, scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """See :func:`ds_lowrank.states.dynamic.dequantise`."""
    rows, r = codes.shape
    out = torch.empty(rows, r, dtype=torch.float32, device=codes.device)
    if rows:
        dequantise_kernel[grid(rows, r)](
            codes, scales, dynamic_map(signed, codes.device), out, rows, r, count(r), ROWS, BLOCK
        )
    return out


def dequantise_linear(codes: Tensor, scales: Tensor, bits: int, r: int) -> Tensor:
    """See :func:`ds_lowrank.states.linear.dequantise_linear`."""
    rows, width = codes.shape
    out = torch.empty(rows, r, dtype=torch.float32, device=codes.device)
    if rows:
        linear_kernel[grid(rows, r)](codes, scales, out, rows, r, width, count(r), bits == 4, ROWS, BLOCK)
    return out
