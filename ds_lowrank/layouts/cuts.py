"""How frameworks cut parameters into pieces: numbers alone, for layouts and for plans without a process group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ds_lowrank.layouts.base import Piece

Shape = tuple[int, ...]
# DeepSpeed's ``nccl_start_alignment_factor``: a group's flat buffer is padded to this many elements a rank.
_ALIGNMENT = 2


def flat_size(numel: int, ranks: int) -> int:
    """Elements of a ZeRO-1/2 group's flat buffer: ``numel`` rounded up so that all ranks get as many."""
    unit = _ALIGNMENT * ranks
    return -(-numel // unit) * unit


def flat_pieces(shapes: Mapping[str, Shape], ranks: int) -> list[dict[str, Piece]]:
    """ZeRO-1/2: for each rank, the pieces of a group's parameters that lie in its slice of the flat buffer."""
    partition = flat_size(sum(math.prod(s) for s in shapes.values()), ranks) // ranks
    found: list[dict[str, Piece]] = [{} for _ in range(ranks)]
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape)
        for rank in range(offset // partition, -(-end // partition) if partition else 0):
            start, stop = max(offset, rank * partition), min(end, (rank + 1) * partition)
            if start < stop:
                found[rank][name] = Piece(start - offset, stop - offset)
        offset = end
    return found


def slice_piece(numel: int, share: int, rank: int) -> Piece:
    """ZeRO-3: elements [rank · share, (rank + 1) · share) of a parameter; may be empty."""
    start = min(rank * share, numel)
    return Piece(start, min(start + share, numel))


def chunk_piece(shape: Shape, dim: int, ranks: int, rank: int) -> Piece:
    """FSDP2: torch.chunk along ``dim``, the last ranks short or empty."""
    size = shape[dim]
    chunk = -(-size // ranks)
    start, stop = min(rank * chunk, size), min((rank + 1) * chunk, size)
    if dim:
        return Piece(start, stop, dim)
    row = math.prod(shape[1:]) if size else 0
    return Piece(start * row, stop * row)


def sub_groups(shares: Sequence[int], size: int) -> list[int]:
    """ZeRO-3: number, from 0, of the sub-group of each parameter of a group.

    Args:
        shares: elements of each parameter that one rank holds, padding included.
        size: ``sub_group_size``.
    """
    if size >= sum(shares):
        return [0] * len(shares)
    numbers, number, held = [], 0, 0
    for share in shares:
        numbers.append(number)
        held += share
        if held >= size:
            number, held = number + 1, 0
    return numbers
