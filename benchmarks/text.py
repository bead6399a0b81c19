"""Real text without a download and without a tokenizer: the bytes of Python's standard library."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SIZE = 4_000_000


@cache
def source_bytes() -> Tensor:
    """The first ``SIZE`` bytes of the standard library's sources, in the order of their paths, uint8."""
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(root.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= SIZE:
            break
    return torch.frombuffer(text[:SIZE], dtype=torch.uint8)


def batch(step: int, rank: int, ranks: int, rows: int, length: int) -> Tensor:
    """Tokens (rows × length, int64, below 256) of one rank's micro-batch: rows of the text, drawn by step and rank."""
    return _rows(1 + step * ranks + rank, rows, length, part=slice(0, -SIZE // 20))


def held_out(rows: int, length: int) -> Tensor:
    """Rows of the last twentieth, which :func:`batch` never draws."""
    return _rows(0, rows, length, part=slice(-SIZE // 20, None))


def _rows(seed: int, rows: int, length: int, part: slice) -> Tensor:
    text = source_bytes()[part]
    starts = torch.randint(0, len(text) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + length] for start in starts.tolist()]).long()
