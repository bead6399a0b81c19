"""Bytes of states in each format: the one place that knows them.

A quantised row keeps a code for each number and an fp32 scale for each block of it. Blocks do not cross rows, so that
rows can go to other ranks as they are.
"""

from __future__ import annotations

import dataclasses

from ds_lowrank.config import LowRankConfig
from ds_lowrank.states.blocks import count

_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
# bitsandbytes: tensors of fewer numbers keep fp32 moments (``min_8bit_size``), others a code a number and an fp32
# ``absmax`` a block of 256.
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256


def rows_bytes(rows: int, rank: int, kind: str) -> int:
    """Bytes of ``rows`` × ``rank`` numbers in a format.

    Raises:
        ValueError: an unknown format.
    """
    if kind not in _BITS:
        raise ValueError(f"format {kind!r} is unknown: use one of {', '.join(_BITS)}")
    codes = -(-rank * _BITS[kind] // 8)
    scales = 4 * count(rank) if kind in ("int8", "int4") else 0
    return rows * (codes + scales)


def adamw8bit_bytes(numel: int) -> int:
    """Bytes of both moments of one tensor in bitsandbytes' AdamW8bit."""
    if numel < _SMALLEST_8BIT:
        return 8 * numel
    return 2 * (numel + 4 * -(-numel // _BLOCK_8BIT))


def planned_only(option: str, value: str) -> bool:
    """Whether a format can be planned but not be configured: :class:`LowRankConfig` has no such option."""
    return value != "fp32" and option not in {f.name for f in dataclasses.fields(LowRankConfig)}
