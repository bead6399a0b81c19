"""Bytes of optimizer state on one rank: ours, AdamW's, 8-bit AdamW's, and GaLore's as galore-torch lays it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_lowrank.full_rank import moment_dtype
from ds_lowrank.planner.formats import adamw8bit_bytes, rows_bytes
from ds_lowrank.planner.places import Places, padded_share, partition_size
from ds_lowrank.planner.setup import Setup
from ds_lowrank.states.runs import runs_of

OPTIMIZERS = ("AdamW", "8-bit AdamW", "GaLore unsharded", "ds_lowrank")


@dataclass(frozen=True)
class States:
    """Bytes on one rank.

    Attributes:
        moments: of all parameters.
        bases: of projected matrices.
        temporaries: in a step, where the optimizer is not ours (whose temporaries differ by call).
    """

    moments: int
    bases: int = 0
    temporaries: int = 0


def held_tensors(places: Places, setup: Setup, rank: int) -> list[int]:
    """Elements of each tensor that a rank's optimizer is given: flat buffers, shards or whole parameters."""
    if setup.kind in ("zero1", "zero2"):
        return [partition_size(group, setup.ranks) for group in places.groups]
    if setup.kind == "zero3":
        shapes = {name: shape for group in places.groups for name, shape in group.items()}
        return [sum(padded_share(shapes[n], setup) for n in names) for names in places.units().values()]
    return [_held(places, setup, rank, name) for group in places.groups for name in group]


def states_of(optimizer: str, places: Places, setup: Setup, rank: int) -> States:
    """What one of ``OPTIMIZERS`` keeps on ``rank``."""
    if optimizer == "AdamW":
        return States(2 * setup.master_width * sum(held_tensors(places, setup, rank)))
    if optimizer == "8-bit AdamW":
        return States(sum(map(adamw8bit_bytes, held_tensors(places, setup, rank))))
    if optimizer == "GaLore unsharded":
        return _galore(places, setup, rank)
    moments = bases = 0
    for plan in places.plans:
        share = plan.shares[rank]
        if share is not None:
            moments += 2 * rows_bytes(share.rows, plan.rank, setup.state_dtype)
            bases += rows_bytes(plan.kept(rank), plan.rank, setup.basis_dtype)
    if setup.state_dtype == "int8":
        return States(moments + _codes(places, rank), bases)
    weights = torch.bfloat16 if setup.master == "bf16" else torch.float32
    width = moment_dtype(setup.state_dtype, weights).itemsize
    return States(moments + _full_rank(places, setup, rank, width), bases)


def _codes(places: Places, rank: int) -> int:
    """Moments of what is not projected in codes, without padding, and scales."""
    shapes = {n: s for g in places.groups for n, s in g.items() if n not in places.projected}
    pieces = ((piece, shapes[n]) for n, piece in places.pieces[rank].items() if n in shapes)
    every = (runs_of(p.start, p.stop, p.dim, shape) for p, shape in pieces)
    return sum(2 * (runs.numel + 4 * runs.count * runs.slots) for runs in every)


def _full_rank(places: Places, setup: Setup, rank: int, width: int) -> int:
    """AdamW's moments, of ``width`` bytes a number, of what is not projected."""
    if setup.kind in ("zero1", "zero2"):
        rest = [g for g in places.groups if not places.projected.intersection(g)]
        return sum(2 * width * partition_size(group, setup.ranks) for group in rest)
    shapes = {n: s for g in places.groups for n, s in g.items() if n not in places.projected}
    if setup.kind == "zero3":
        return sum(2 * width * padded_share(shape, setup) for shape in shapes.values())
    return sum(2 * width * _held(places, setup, rank, name) for name in shapes)


def _held(places: Places, setup: Setup, rank: int, name: str) -> int:
    piece = places.pieces[rank].get(name)
    return 0 if piece is None else piece.stop - piece.start


def _galore(places: Places, setup: Setup, rank: int) -> States:
    """galore-torch 1.0 as it runs on FSDP2: moments of tall matrices are sharded, those of wide ones (r × n) and all
    projectors are whole on every rank. An fp32 projector is a view, which keeps all singular vectors of its side alive.
    """
    moments = bases = largest = 0
    width = setup.master_width
    for plan in places.plans:
        m, n = plan.shape
        tall = m >= n
        rows = -(-plan.long // setup.ranks) if tall and setup.kind not in ("ddp", "one") else plan.long
        moments += 2 * rows * plan.rank * width
        # Narrow gradients are decomposed in fp32 and their projector is copied back, so that nothing else stays.
        bases += min(m, n) * (min(m, n) if width == 4 else plan.rank) * width
        # The gathered gradient and both sides of its decomposition.
        largest = max(largest, 4 * (m * n + m * min(m, n) + min(m, n) * n))
    return States(moments + _full_rank(places, setup, rank, width), bases, largest)
