"""Gaussian numbers by a counter: each depends on the key and on which it is, so any range of rows is made alone.

A pair of numbers is Box and Muller's (1958), of two words of 32 bits that a hash makes of its place: the rounds and
constants of "triple32" (C. Wellons, public domain), between whose rounds both halves of the key are added. Each word
is a permutation of the places. Integers are the same everywhere, logarithm and circle but for their last digits:
numbers are bitwise the same on devices of one kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_lowrank.kernels import fused

# Numbers come in blocks: those with the cosine of ``WIDTH`` pairs, then those with the sine.
WIDTH = 256
# Blocks that are made at once: temporaries of a CPU stay in its cache, a GPU has few launches.
PART, PART_ON_DEVICE = 1 << 7, 1 << 14

# Of the hash: a round is a product and a shift.
STEP = 0xED5AD4BB
ROUNDS = ((11, 0xAC4C1B51), (15, 0x31848BAB), (14, 0x846CA68B))
# Of u in (0, 1] from a signed word: the least is 2^-24.
SCALE, MIDDLE = 2.0**-32, 0.5 + 2.0**-24
TURN = 2 * math.pi * SCALE


def _word(value: int) -> Tensor:
    """As int32, which wraps as uint32 does."""
    return torch.tensor(_signed(value), dtype=torch.int32, device="cpu")


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (value >> 31 << 32)


# As tensors: torch makes one of a number in every call, which takes longer than to use it on a small matrix.
_STEP = _word(STEP)
_ROUNDS = [(_word(shift), _word((1 << 32 - shift) - 1), _word(factor)) for shift, factor in ROUNDS]
_MIDDLE = torch.tensor(MIDDLE, device="cpu")
_BEGINNINGS = torch.tensor([[0.0], [-math.pi / 2]], device="cpu")


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


def words(number: int) -> tuple[int, int]:
    """Two words of 32 bits of a key."""
    return number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF


def torch_fill_(out: Tensor, first: int, key: tuple[int, int], deviation: float, part: int | None = None) -> None:
    """Numbers ``first`` and following of a key into ``out`` (1-D, float32): the oracle of the Triton kernel.

    Args:
        out: written.
        first: place of its first number.
        key: of :func:`words`.
        deviation: of the numbers.
        part: blocks that are made at once; no number depends on it.
    """
    part = part or (PART if out.device.type == "cpu" else PART_ON_DEVICE)
    low, high = (_signed(word) for word in key)
    start, stop = first // (2 * WIDTH), -(-(first + out.numel()) // (2 * WIDTH))
    part = -(-(stop - start) // -(-(stop - start) // part)) if stop > start else part  # as many in each
    made = 0
    for begin in range(start, stop, part):
        count = min(part, stop - begin)
        if count != made:  # at first, and for the last
            made = count
            steps = torch.arange(count * WIDTH, dtype=torch.int32, device=out.device).view(count, 1, WIDTH).mul_(_STEP)
            words, shifted = torch.empty_like(steps), torch.empty_like(steps)
            radius, turns = (torch.empty(steps.shape, device=out.device) for _ in range(2))
        torch.add(steps, _signed(begin * WIDTH * STEP + low), out=words)
        _round(words, shifted, 0, words).add_(high)
        _round(words, shifted, 1, words)
        torch.add(_MIDDLE, radius.copy_(words), alpha=SCALE, out=radius).log_().mul_(-2 * deviation**2).sqrt_()
        turns.copy_(_round(words, shifted, 2, shifted))
        at, size = 2 * WIDTH * begin - first, 2 * WIDTH * count
        whole = at >= 0 and at + size <= len(out)
        numbers = (out[at : at + size] if whole else torch.empty(size, device=out.device)).view(count, 2, WIDTH)
        torch.add(_BEGINNINGS.to(out.device), turns, alpha=TURN, out=numbers).cos_().mul_(radius)
        if not whole:  # a range may begin and end within a block
            skipped = max(0, -at)
            target = out[at + skipped : at + size]
            target.copy_(numbers.view(-1)[skipped : skipped + len(target)])


def _round(words: Tensor, shifted: Tensor, number: int, out: Tensor) -> Tensor:
    """(w ^ (w >> shift)) · factor of a round; shifts of int32 bring the sign along."""
    shift, mask, factor = _ROUNDS[number]
    torch.bitwise_right_shift(words, shift, out=shifted).bitwise_and_(mask)
    return torch.bitwise_xor(words, shifted, out=out).mul_(factor)
