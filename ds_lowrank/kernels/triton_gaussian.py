"""Gaussian numbers of a key: twin of :func:`ds_lowrank.kernels.gaussian.torch_fill_`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_lowrank.kernels.triton_lift import mix

PAIRS = 512


@triton.jit
def uniform(x):
    """In (0, 1], of 24 bits."""
    return ((x >> 8).to(tl.float32) + 1.0) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["first", "low", "high", "higher"])
def gaussian_kernel(out_ptr, numel, first, low, high, higher, factor, PAIRS: tl.constexpr):
    """``PAIRS`` pairs a program; ``first`` and the words of the key are int64."""
    pair = first // 2 + tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    place = mix((pair & 0xFFFFFFFF).to(tl.uint32) ^ low.to(tl.uint32))
    # A fast logarithm may be above zero just below one.
    radius = tl.sqrt(tl.maximum(tl.log(uniform(mix(place + high.to(tl.uint32)))) * factor, 0.0))
    angle = uniform(mix(place + higher.to(tl.uint32))) * 6.283185307179586
    at = 2 * pair - first
    tl.store(out_ptr + at, radius * tl.cos(angle), mask=(at >= 0) & (at < numel))
    tl.store(out_ptr + at + 1, radius * tl.sin(angle), mask=at + 1 < numel)


def fill_(out: Tensor, first: int, key: tuple[int, int, int], deviation: float) -> None:
    """See :func:`ds_lowrank.kernels.gaussian.torch_fill_`; ``out``: contiguous."""
    if out.numel():
        pairs = (first + out.numel() + 1) // 2 - first // 2
        gaussian_kernel[(triton.cdiv(pairs, PAIRS),)](out, out.numel(), first, *key, -2 * deviation**2, PAIRS)
