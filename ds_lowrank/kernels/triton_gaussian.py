"""Gaussian numbers of a key: twin of :func:`ds_lowrank.kernels.gaussian.torch_fill_`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_lowrank.kernels.gaussian import WIDTH


@triton.jit(do_not_specialize=["first", "low", "high"])
def gaussian_kernel(out_ptr, numel, first, low, high, factor, WIDTH: tl.constexpr):
    """A block of ``WIDTH`` pairs a program; ``first`` and the words of the key are int64."""
    block = first // (2 * WIDTH) + tl.program_id(0).to(tl.int64)
    pair = block * WIDTH + tl.arange(0, WIDTH)
    word = (pair & 0xFFFFFFFF).to(tl.uint32) * 0xED5AD4BB + low.to(tl.uint32)
    word = (word ^ (word >> 11)) * 0xAC4C1B51 + high.to(tl.uint32)
    word = (word ^ (word >> 15)) * 0x31848BAB
    turn = (word ^ (word >> 14)) * 0x846CA68B
    uniform = word.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 0.500000059604644775
    # A fast logarithm may be above zero just below one.
    radius = tl.sqrt(tl.maximum(tl.log(uniform) * factor, 0.0))
    angle = turn.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    at = 2 * WIDTH * block + tl.arange(0, WIDTH) - first
    tl.store(out_ptr + at, radius * tl.cos(angle), mask=(at >= 0) & (at < numel))
    at += WIDTH
    tl.store(out_ptr + at, radius * tl.cos(angle - 1.5707963267948966), mask=(at >= 0) & (at < numel))


def fill_(out: Tensor, first: int, key: tuple[int, int], deviation: float) -> None:
    """See :func:`ds_lowrank.kernels.gaussian.torch_fill_`; ``out``: contiguous."""
    if out.numel():
        blocks = triton.cdiv(first + out.numel(), 2 * WIDTH) - first // (2 * WIDTH)
        gaussian_kernel[(blocks,)](out, out.numel(), first, *key, -2 * deviation**2, WIDTH)
