"""Blocks of a row: the unit that shares a scale.

A block never leaves its row, so that any cut between rows leaves all blocks whole: what a rank keeps does not depend on
how many ranks there are, and rows move from one to another as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers a block. With fp32 scales a moment takes 1 + 4/64 bytes a number: a LLaMA layer's int8 moments and bf16 bases
# at r = h/4 are 0.103 of fp32 AdamW's state (0.101 with 128: shorter blocks lose less to their largest number).
BLOCK = 64


def count(r: int, block: int = BLOCK) -> int:
    """Blocks in a row of r numbers; the last one may be short."""
    return -(-r // block)


def cut(x: Tensor, scales: Tensor, block: int = BLOCK) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks and their scales, such that the one is multiplied or divided by the other: views.

    Args:
        x: rows × r.
        scales: rows × ⌈r / block⌉.
        block: numbers a block.

    Yields:
        All whole blocks: rows × n × block and rows × n × 1. Then the rows' short ones, where they have one: rows × 1 ×
        what is left of r, and rows × 1 × 1.
    """
    r = x.shape[1]
    whole = r // block
    if whole:
        yield x[:, : whole * block].unflatten(1, (whole, block)), scales[:, :whole, None]
    if r % block:
        yield x[:, None, whole * block :], scales[:, whole:, None]


def largest(x: Tensor, block: int = BLOCK) -> Tensor:
    """Largest absolute value of every block.

    Args:
        x: rows × r, floating.
        block: numbers a block.

    Returns:
        rows × ⌈r / block⌉, the dtype of ``x``. NaN where a block holds a NaN.
    """
    scales = x.new_empty(x.shape[0], count(x.shape[1], block))
    for blocks, tops in cut(x, scales, block):
        torch.amax(blocks.abs(), -1, keepdim=True, out=tops)
    return scales


# Numbers that are worked on at once on a CPU, a thread: what one pass leaves is in a cache for the next, and a pass is
# long beside what it takes to call it. Elsewhere only what is held for a moment is bounded.
PART = 1 << 16
_PART_ELSEWHERE = 1 << 22


def parts(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix that are worked on one after the other; none is longer than the first."""
    rows, r = x.shape
    most = PART * torch.get_num_threads() if x.device.type == "cpu" else _PART_ELSEWHERE
    number = max(1, -(-rows // max(1, most // max(1, r))))
    step = max(1, -(-rows // number))
    return (slice(at, min(rows, at + step)) for at in range(0, rows, step))
