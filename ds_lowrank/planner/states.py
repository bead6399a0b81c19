"""Bytes of optimizer state on one rank: ours, AdamW's, 8-bit AdamW's, and GaLore's as galore-torch lays it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_lowrank.full_rank.adamw import moment_dtype
from ds_lowrank.layouts.base import Piece
from ds_lowrank.layouts.cuts import Shape
from ds_lowrank.planner.arrangement import Arrangement, padded_share, partition_size
from ds_lowrank.planner.formats import adamw8bit_bytes
from ds_lowrank.planner.setup import Setup
from ds_lowrank.states.runs import runs_of

OPTIMIZERS = ("AdamW", "8-bit AdamW", "GaLore unsharded", "ds_lowrank")


@dataclass(frozen=True)
class States:
    """Bytes on one rank.

    Attributes:
        moments: of all parameters: what is kept of matrices by rows of A, or once, and AdamW's of the rest.
        bases: what is kept of projected matrices by rows of the basis.
        temporaries: in a step, where the optimizer is not ours (whose temporaries differ by call).
    """

    moments: int
    bases: int = 0
    temporaries: int = 0


def held_tensors(arrangement: Arrangement, setup: Setup) -> list[tuple[int, ...]]:
    """Elements of each tensor that a rank's optimizer is given, by rank: flat buffers, shards or whole parameters."""
    if setup.kind in ("zero1", "zero2"):
        return [tuple(partition_size(group, setup.ranks) for group in arrangement.groups)] * setup.ranks
    if setup.kind == "zero3":
        shapes = {name: shape for group in arrangement.groups for name, shape in group.items()}
        units = (sum(padded_share(shapes[n], setup) for n in names) for names in arrangement.units().values())
        return [tuple(units)] * setup.ranks
    return [tuple(p.stop - p.start for p in pieces.values()) for pieces in arrangement.pieces]


def states_of(optimizer: str, arrangement: Arrangement, setup: Setup) -> list[States]:
    """What one of ``OPTIMIZERS`` keeps on each rank."""
    if optimizer in ("AdamW", "8-bit AdamW"):
        held = held_tensors(arrangement, setup)
        narrow = optimizer == "8-bit AdamW"
        found = {
            numels: States(sum(map(adamw8bit_bytes, numels)) if narrow else 2 * setup.master_width * sum(numels))
            for numels in set(held)
        }
        return [found[numels] for numels in held]
    if optimizer == "GaLore unsharded":
        return _galore(arrangement, setup)
    moments = bases = torch.zeros(setup.ranks, dtype=torch.int64)
    kept, drawn = setup.method.states, setup.method.keeps_drawn(setup.device)
    for h in arrangement.holdings:
        of = kept.row_bytes(h.plan.r, h.plan.dtype)
        moments = moments + h.rows * of["rows"] + h.computes * of["matrix"]
        bases = bases + h.computes * h.kept * of["basis"]
        if drawn:
            bases = bases + h.computes * (h.plan.short * h.plan.r * h.plan.dtype.itemsize)
    if setup.state_dtype == "int8":
        rest = _codes(arrangement)
    else:
        weights = torch.bfloat16 if setup.master == "bf16" else torch.float32
        width = moment_dtype(setup.state_dtype, weights).itemsize
        rest = _full_rank(arrangement, setup, width, arrangement.kept)
    return [States(low + full, basis) for low, full, basis in zip(moments.tolist(), rest, bases.tolist())]


def _codes(arrangement: Arrangement) -> list[int]:
    """Moments of what is not projected in codes, without padding, and scales."""
    shapes = {n: s for g in arrangement.groups for n, s in g.items() if n not in arrangement.projected}
    known: dict[tuple[Piece, Shape], int] = {}

    def size(piece: Piece, shape: Shape) -> int:
        if (piece, shape) not in known:
            runs = runs_of(piece.start, piece.stop, piece.dim, shape)
            known[piece, shape] = 2 * (runs.numel + 4 * runs.count * runs.slots)
        return known[piece, shape]

    return [sum(size(piece, shapes[n]) for n, piece in kept.items()) for kept in arrangement.kept]


def _full_rank(arrangement: Arrangement, setup: Setup, width: int, pieces: Sequence[Mapping[str, Piece]]) -> list[int]:
    """AdamW's moments, of ``width`` bytes a number, of what is not projected: of ``pieces``, by rank."""
    if setup.kind in ("zero1", "zero2"):
        groups = [g for g in arrangement.groups if not arrangement.projected.intersection(g)]
        return [sum(2 * width * partition_size(group, setup.ranks) for group in groups)] * setup.ranks
    rest = {n: s for g in arrangement.groups for n, s in g.items() if n not in arrangement.projected}
    if setup.kind == "zero3":
        return [sum(2 * width * padded_share(shape, setup) for shape in rest.values())] * setup.ranks
    held = ([mine[n] for n in rest if n in mine] for mine in pieces)
    return [2 * width * sum(p.stop - p.start for p in mine) for mine in held]


def _galore(arrangement: Arrangement, setup: Setup) -> list[States]:
    """galore-torch 1.0 as it runs on FSDP2: moments of tall matrices are sharded, those of wide ones (r × n) and all
    projectors are whole on every rank. An fp32 projector is a view, which keeps all singular vectors of its side alive.
    """
    moments = bases = largest = 0
    width = setup.master_width
    for plan in arrangement.plans:
        m, n = plan.shape
        tall = m >= n
        rows = -(-plan.long // setup.ranks) if tall and setup.kind not in ("ddp", "one") else plan.long
        moments += 2 * rows * plan.r * width
        # Narrow gradients are decomposed in fp32 and their projector is copied back, so that nothing else stays.
        bases += min(m, n) * (min(m, n) if width == 4 else plan.r) * width
        # The gathered gradient and both sides of its decomposition.
        largest = max(largest, 4 * (m * n + m * min(m, n) + min(m, n) * n))
    whole = arrangement.pieces
    return [States(moments + full, bases, largest) for full in _full_rank(arrangement, setup, width, whole)]
