"""Blocks of a row: the unit that shares a scale.

A block never leaves its row, so that any cut between rows leaves all blocks whole: what a rank keeps does not depend on
how many ranks there are, and rows move from one to another as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers a block. With fp32 scales a moment takes 1 + 4/64 bytes a number: a LLaMA layer's int8 moments and bf16 bases
# at r = h/4 are 0.103 of fp32 AdamW's state (0.101 with 128: shorter blocks lose less to their largest number).
BLOCK = 64


def count(r: int, block: int = BLOCK) -> int:
    """Blocks in a row of r numbers; the last one may be short."""
    return -(-r // block)


def largest(x: Tensor, block: int = BLOCK) -> Tensor:
    """Largest absolute value of every block.

    Args:
        x: rows × r, floating.
        block: numbers a block.

    Returns:
        rows × ⌈r / block⌉, the dtype of ``x``. NaN where a block holds a NaN.
    """
    rows, r = x.shape
    missing = count(r, block) * block - r
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padded.reshape(rows, -1, block).abs().amax(-1) if rows else x.new_zeros(0, count(r, block))


def expand(scales: Tensor, r: int, block: int = BLOCK) -> Tensor:
    """Every number's scale: rows × ⌈r / block⌉ -> rows × r."""
    return scales.repeat_interleave(block, dim=1)[:, :r]
