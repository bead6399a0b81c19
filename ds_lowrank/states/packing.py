"""Rows of several tensors as rows of bytes: what travels together, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ds_lowrank.states.formats import RowTensor


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of as many rows each -> rows × bytes, uint8. One alone is viewed, not copied."""
    raw = [tensor.contiguous().view(torch.uint8) for tensor in tensors]
    return raw[0] if len(raw) == 1 else torch.cat(raw, dim=1)


def unpack(packed: Tensor, rows: Iterable[RowTensor]) -> list[Tensor]:
    """Inverse of :func:`pack`; ``packed`` begins its memory."""
    rows = list(rows)
    raw = packed.split([tensor.bytes for tensor in rows], dim=1)
    return [part.contiguous().view(tensor.dtype) for part, tensor in zip(raw, rows)]
