"""Gaussian numbers by a counter: each depends on the key and on which it is, so any range of rows is made alone.

A pair of numbers is Box and Muller's (1958), of two hashes of its place: three rounds in all of the finaliser that
:mod:`ds_lowrank.states.rounding` has. Integers are the same everywhere, logarithm and circle but for their last digits:
numbers are bitwise the same on devices of one kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_lowrank.kernels import fused

# Pairs that are made at once: temporaries of a CPU stay in its cache, a GPU has few launches.
PART, PART_ON_DEVICE = 1 << 16, 1 << 22

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # as int32


def gaussian_rows(number: int, rows: tuple[int, int], width: int, device: torch.device | str = "cpu") -> Tensor:
    """Rows of a matrix of independent N(0, 1/width) numbers.

    Args:
        number: key of the matrix, 63 bits.
        rows: the first that is made, and the one after the last.
        width: numbers a row. The matrix has less than 2³² numbers.
        device: where.

    Returns:
        rows × width, float32, contiguous.
    """
    first, last = rows[0] * width, rows[1] * width
    out = torch.empty(last - first, device=device)
    if fused(out):
        from ds_lowrank.kernels import triton_gaussian  # not where there is no Triton

        triton_gaussian.fill_(out, first, words(number), width**-0.5)
    else:
        torch_fill_(out, first, words(number), width**-0.5)
    return out.view(rows[1] - rows[0], width)


def words(number: int) -> tuple[int, int, int]:
    """Three words of 32 bits of a key: for the place, and for each number of a pair."""
    low, high = number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF
    return low, high, (high * 0x9E3779B9 + low + 0x7F4A7C15) & 0xFFFFFFFF


def torch_fill_(out: Tensor, first: int, key: tuple[int, int, int], deviation: float, part: int | None = None) -> None:
    """Numbers ``first`` and following of a key into ``out`` (1-D, float32): the oracle of the Triton kernel.

    Args:
        out: written.
        first: place of its first number.
        key: of :func:`words`.
        deviation: of the numbers.
        part: pairs that are made at once; no number depends on it.
    """
    part = part or (PART if out.device.type == "cpu" else PART_ON_DEVICE)
    low, high, higher = (word - (word >> 31 << 32) for word in key)  # as int32, which wraps as uint32 does
    start, stop = first // 2, (first + out.numel() + 1) // 2
    for begin in range(start, stop, part):
        end = min(begin + part, stop)
        index = torch.arange(begin, end, device=out.device, dtype=torch.int64).to(torch.int32)
        place = _mix_(index.bitwise_xor_(low))
        radius = _uniform(_mix_(place + high)).log_().mul_(-2 * deviation**2).sqrt_()
        angle = _uniform(_mix_(place.add_(higher))).mul_(2 * math.pi)
        pairs = out.new_empty(end - begin, 2)
        torch.mul(angle.cos(), radius, out=pairs[:, 0])
        torch.mul(angle.sin_(), radius, out=pairs[:, 1])
        at = 2 * begin - first
        skipped = max(0, -at)  # a range may begin and end within a pair
        target = out[at + skipped : at + pairs.numel()]
        target.copy_(pairs.view(-1)[skipped : skipped + len(target)])


def _mix_(x: Tensor) -> Tensor:
    """See ``_mix`` in :mod:`ds_lowrank.states.rounding`; int32, in place. Shifts of int32 bring the sign along."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _uniform(x: Tensor) -> Tensor:
    """In (0, 1], of 24 bits, which float32 has exactly."""
    return (x >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).add_(1).mul_(2.0**-24)
