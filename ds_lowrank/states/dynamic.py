"""Blockwise dynamic quantisation of moments to 8 bits (Dettmers et al., arXiv 2110.02861; the map: 1511.04561).

A number is divided by the largest of its block and becomes the nearest of 256 values. They are dense near zero and near
one: seven decades, each the larger its number, the finer it is cut.

    signed (M)      of the decade [0.1, 1] · 10⁻ᵏ, k = 0 … 6, the middles of 2⁶⁻ᵏ equal parts and their negatives
    unsigned (V)    the middles of 2⁷⁻ᵏ equal parts
    both            0 and 1
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_lowrank.states.blocks import BLOCK, count, cut, parts

_DECADES = 7


def zero_code(signed: bool) -> int:
    """The code of zero: the map is ascending, and 127 of the signed one's values are negative."""
    return 127 if signed else 0


@functools.cache
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values in ascending order, float32."""
    values = [0.0, 1.0]
    for k in range(_DECADES):
        parts = 2 ** (_DECADES - 1 - k) * (1 if signed else 2)
        middles = [(0.1 + 0.9 * (i + 0.5) / parts) * 10.0**-k for i in range(parts)]
        values += middles + [-x for x in middles] * signed
    return torch.tensor(sorted(values), dtype=torch.float64).float().to(device)


@functools.cache
def midpoints(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 255 middles between neighbours of the map, float32: a number up to the k-th has a code of at most k."""
    values = dynamic_map(signed).double()
    return ((values[1:] + values[:-1]) / 2).float().to(device)


@functools.cache
def _steps(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """A table in the place of a search: codes of all float32 numbers by their upper 16 bits: 65536, int32.

    Numbers with the same upper half, a cell, are so close that at most one midpoint is among them: the lower half
    decides. For the bits b of a number and its cell's entry t the code is |(t − b) >> 16|: t − b counts down from a
    multiple of 2¹⁶, and has as far to go to the next as there is from the number to the midpoint. (The cell of -inf has
    NaNs in it, which no division gives.)
    """
    first = (torch.arange(1 << 16) << 16).to(torch.int32)

    def codes(bits: Tensor) -> Tensor:
        x = bits.view(torch.float32)
        found = torch.bucketize(x, midpoints(signed), out_int32=True)
        return found if signed else torch.where((x > 0) & (found == 0), 1, found)

    code, last = codes(first), codes(first | 0xFFFF)
    middles = midpoints(signed).view(torch.int32)
    below = torch.full_like(first, 0xFFFF)
    # Where the number rises with its bits the midpoint has the code before, where it falls the one after.
    below[(middles >> 16) & 0xFFFF] = (middles & 0xFFFF) - (middles < 0).int()
    below[code == last] = 0xFFFF
    count_down = torch.where(first < 0, code, -code)
    if not signed:  # zero, and what is just above it
        below[0] = 0
    return ((count_down << 16) + below + first).to(device)


class Passes:
    """Makes and reads codes of parts of a matrix, one part after the other in the same memory.

    Some twenty passes over a part that fits a cache: fresh memory for each, or new views of it, would cost as much.

    Args:
        like: rows × r, of the part's shape and on its device.
        block: numbers a block.
        within: of a part that is not shorter, whose memory is used again.
    """

    def __init__(self, like: Tensor, block: int = BLOCK, within: Passes | None = None):
        (rows, r), n, device = like.shape, like.numel(), like.device
        self.rows, self._block = rows, block
        self._memory: list[Tensor] = (
            [torch.empty(n, dtype=d, device=device) for d in (torch.float32, torch.int32, torch.int64)]
            if within is None
            else within._memory
        )
        unit, self._upper, index = (memory[:n] for memory in self._memory)
        self._unit = unit.view(rows, r)
        self._tops = torch.empty(rows, count(r, block), device=device)
        self._blocks = list(cut(self._unit, self._tops, block))
        self._bits = unit.view(torch.int32)
        # Of one row torch looks up all with one thread.
        self._lines = math.gcd(n, 64)
        self._index, self._codes = index.view(self._lines, -1), index.view(rows, r)
        self._found = self._upper.view(self._lines, -1)
        self._half, self._mask = (torch.tensor(k, dtype=torch.int32, device=device) for k in (16, 0xFFFF))
        self._one = torch.ones((), device=device)

    def encode_(self, x: Tensor, codes: Tensor, scales: Tensor, signed: bool, given: bool = False) -> None:
        """Write codes and scales of ``x``.

        Args:
            x: rows × r, float32.
            codes: rows × r, uint8.
            scales: rows × ⌈r / block⌉, float32; read if ``given``.
            signed: which map.
            given: whether the scales are.
        """
        unit, tops = self._unit, self._tops
        if given:
            tops.copy_(scales)
        else:
            torch.abs(x, out=unit)
            for blocks, top in self._blocks:
                torch.amax(blocks, -1, keepdim=True, out=top)
            scales.copy_(tops)
        torch.where(tops > 0, tops, self._one, out=tops)
        for (blocks, top), (out, _) in zip(cut(x, tops, self._block), self._blocks):
            torch.div(blocks, top, out=out)
        # Over a scale of at most 1 no number becomes zero.
        if not (signed or (x.device.type == "cpu" and float(tops.amax()) <= 1)):
            unit.masked_fill_((x > 0) & (unit == 0), torch.finfo(torch.float32).tiny)
        torch.bitwise_right_shift(self._bits, self._half, out=self._upper)
        self._index.copy_(self._found.bitwise_and_(self._mask))
        torch.gather(_steps(signed, x.device).expand(self._lines, -1), 1, self._index, out=self._found)
        codes.copy_(self._upper.sub_(self._bits).bitwise_right_shift_(self._half).abs_().view(codes.shape))

    def decode_(self, codes: Tensor, scales: Tensor, values: Tensor, signed: bool) -> None:
        """Write what codes and scales say into ``values``, rows × r, float32, contiguous."""
        self._codes.copy_(codes)
        table = dynamic_map(signed, codes.device).expand(self._lines, -1)
        torch.gather(table, 1, self._index, out=values.view(self._lines, -1))
        for blocks, scale in cut(values, scales, self._block):
            blocks.mul_(scale)


def passes(x: Tensor, block: int = BLOCK) -> Iterator[tuple[slice, Passes]]:
    """Parts of the rows of a matrix, and what makes and reads their codes."""
    work = None
    for part in parts(x):
        if work is None or work.rows != part.stop - part.start:
            work = Passes(x[part], block, work)
        yield part, work


def quantise(x: Tensor, signed: bool, block: int = BLOCK, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, block by block within its rows.

    Rounds to the nearest value of the map (to the lower one in the middle). Zero stays zero, and of V nothing else
    becomes zero: what is nearer to it gets the smallest value. Otherwise Adam would divide by ε alone where V is 4e-4²
    of its block's largest, and M, whose range is wider, is not zero.

    Args:
        x: rows × r, float32; not negative unless ``signed``. A NaN or an infinity makes its whole block NaN or
            infinite when it is read again: nothing that went wrong is hidden.
        signed: which map.
        block: numbers a block.
        scales: of blocks of which ``x`` is a part only; ``None``: the largest absolute values.

    Returns:
        codes (rows × r, uint8) and scales (rows × ⌈r / block⌉, float32).
    """
    rows, r = x.shape
    codes = x.new_empty(rows, r, dtype=torch.uint8)
    found = x.new_empty(rows, count(r, block), dtype=torch.float32) if scales is None else scales
    for part, work in passes(x, block):
        work.encode_(x[part], codes[part], found[part], signed, given=scales is not None)
    return codes, found


def dequantise(codes: Tensor, scales: Tensor, signed: bool, block: int = BLOCK) -> Tensor:
    """Inverse of :func:`quantise`: rows × r, float32."""
    values = codes.new_empty(codes.shape, dtype=torch.float32)
    for part, work in passes(codes, block):
        work.decode_(codes[part], scales[part], values[part], signed)
    return values
