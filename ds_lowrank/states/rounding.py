"""Stochastic rounding to bf16 by a counter: the bits depend on which weight it is, and in which step, alone.

A number between two neighbours in bf16 becomes the upper one with a probability equal to its place between them:
updates smaller than half a step are not lost but happen now and then. The 32 random bits of an element are a hash of
(seed, name of the matrix, step) and of its place in the whole matrix: the same on any number of ranks, in any layout,
and after a resume, and nothing has to be kept. The hash is two rounds of the "lowbias32" finaliser (C. Wellons, public
domain), in integers, so that torch and Triton have the same bits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_HIGH = 0x9E3779B9  # spreads the upper half of an index

# Numbers that are rounded at once: indices take eight bytes each.
PART = 1 << 20


@dataclass(frozen=True)
class Key:
    """What the bits of one matrix in one step come from.

    Attributes:
        low, high: 32 bits each.
    """

    low: int
    high: int


@dataclass(frozen=True)
class Place:
    """Where a part of a matrix is in the whole, and what its bits come from.

    Attributes:
        key: of the matrix in this step.
        first: place in the whole matrix, row-major, of the part's first element.
        strides: how far apart in the whole two rows, and two columns, of the part are.
    """

    key: Key
    first: int
    strides: tuple[int, int]

    def below(self, rows: int) -> Place:
        """Place of what is left of the part without its first ``rows``."""
        return replace(self, first=self.first + rows * self.strides[0])


def rounding_key(seed: int, name: str, step: int) -> Key:
    """Key of a matrix in a step."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{step}\0rounding".encode(), digest_size=8).digest()
    return Key(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def random_bits(index: Tensor, key: Key) -> Tensor:
    """32 random bits an element.

    Args:
        index: places in the whole matrix, row-major, int64, any shape.
        key: see :func:`rounding_key`.

    Returns:
        int64 in [0, 2³²), the shape of ``index``.
    """
    x = _mix((index & _MASK) ^ key.low)
    return _mix((x + (index >> 32) * _HIGH + key.high) & _MASK)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32 bits; products wrap in int64, which leaves their lower halves as they are."""
    x = x ^ (x >> 16)
    x = (x * _FIRST) & _MASK
    x = x ^ (x >> 15)
    x = (x * _SECOND) & _MASK
    return x ^ (x >> 16)


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """To bf16, by the lower 16 of an element's random bits.

    Args:
        x: float32. NaN stays NaN and infinities stay; the largest finite numbers may become infinite, as they do when
            they are rounded to nearest.
        bits: of :func:`random_bits`, the shape of ``x``.

    Returns:
        bf16; unbiased: its mean over the bits is ``x``.
    """
    raw = x.contiguous().view(torch.int32)
    moved = (raw + (bits & 0xFFFF).to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), x, moved.view(torch.float32)).to(torch.bfloat16)


def copy_stochastic_(target: Tensor, x: Tensor, place: Place) -> None:
    """Round a part of a matrix into its place.

    Args:
        target: rows × columns, bf16, any strides; written.
        x: rows × columns, float32.
        place: of the part in the whole.
    """
    rows, columns = x.shape
    across = place.first + torch.arange(columns, device=x.device) * place.strides[1]
    step = max(1, PART // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        index = torch.arange(start, stop, device=x.device)[:, None] * place.strides[0] + across
        target[start:stop].copy_(round_stochastic(x[start:stop], random_bits(index, place.key)))
