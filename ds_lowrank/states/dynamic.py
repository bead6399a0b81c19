"""Blockwise dynamic quantisation of moments to 8 bits (Dettmers et al., arXiv 2110.02861; the map: 1511.04561).

A number is divided by the largest of its block and becomes the nearest of 256 values. They are dense near zero and near
one: seven decades, each the larger its number, the finer it is cut.

    signed (M)      of the decade [0.1, 1] · 10⁻ᵏ, k = 0 … 6, the middles of 2⁶⁻ᵏ equal parts and their negatives
    unsigned (V)    the middles of 2⁷⁻ᵏ equal parts
    both            0 and 1
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ds_lowrank.states.blocks import BLOCK, expand, largest

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
    scales = largest(x, block) if scales is None else scales
    unit = x / expand(torch.where(scales > 0, scales, 1.0), x.shape[1], block)
    codes = torch.bucketize(unit, midpoints(signed, x.device), out_int32=True)
    if not signed:
        codes = torch.where((x > 0) & (codes == 0), 1, codes)
    return codes.to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool, block: int = BLOCK) -> Tensor:
    """Inverse of :func:`quantise`: rows × r, float32."""
    values = dynamic_map(signed, codes.device)[codes.int()]
    return values * expand(scales, codes.shape[1], block)
