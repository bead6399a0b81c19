"""Symmetric linear quantisation of bases, block by block within rows: value = code · scale.

Entries of an orthonormal basis have one order of magnitude, so equal steps suit them better than a dynamic map (four
bits: Q-GaLore, arXiv 2407.08296).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lowrank.states.blocks import BLOCK, cut, largest


def quantise_linear(x: Tensor, bits: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix.

    Rounds to the nearest code, to the even one in the middle. Zero stays zero. A NaN or an infinity makes its whole
    block NaN when it is read again.

    Args:
        x: rows × r, float32.
        bits: 8 (codes −127 … 127) or 4 (−7 … 7, two a byte).
        block: numbers a block.

    Returns:
        codes (rows × r int8; for 4 bits rows × ⌈r/2⌉ uint8, the even columns in the low halves, 8 standing for zero)
        and scales (rows × ⌈r / block⌉, float32), the largest absolute value over the largest code.
    """
    top = 2 ** (bits - 1) - 1
    scales = largest(x, block) / top
    unit = torch.empty_like(x)
    divisors = torch.where(scales > 0, scales, 1.0)
    for (blocks, divisor), (out, _) in zip(cut(x, divisors, block), cut(unit, divisors, block)):
        torch.div(blocks, divisor, out=out)
    codes = unit.round_().nan_to_num_(0.0).clamp_(-top, top)
    if bits == 8:
        return codes.to(torch.int8), scales
    halves = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).add_(8).to(torch.uint8)
    return halves[:, 0::2] | halves[:, 1::2] << 4, scales


def dequantise_linear(codes: Tensor, scales: Tensor, bits: int, r: int, block: int = BLOCK) -> Tensor:
    """Inverse of :func:`quantise_linear`: rows × r, float32.

    Args:
        codes, scales: see there.
        bits: see there.
        r: numbers a row; two codes a byte do not say whether it is odd.
        block: see there.
    """
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :r].to(torch.int8) - 8
    values = codes.float()
    for blocks, scale in cut(values, scales, block):
        blocks.mul_(scale)
    return values
