"""What lies where, without a process group: the package's own groups, pieces and plans for ranks that do not exist."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch

from ds_lowrank.config import LowRankConfig
from ds_lowrank.full_rank.dealt import deal_members
from ds_lowrank.layouts.base import Piece
from ds_lowrank.layouts.cuts import Shape, chunk_piece, flat_pieces, flat_size, slice_piece, sub_groups
from ds_lowrank.param_groups import param_groups
from ds_lowrank.plan.matrices import MatrixPlan, plan_matrices
from ds_lowrank.plan.specs import make_specs
from ds_lowrank.planner.holdings import Holding, holdings
from ds_lowrank.planner.model import Model
from ds_lowrank.planner.setup import Setup


@dataclass(frozen=True)
class Arrangement:
    """Where everything lies.

    Attributes:
        groups: for each parameter group, name -> shape.
        unit: parameter -> number of the call of ``step()`` in which it steps.
        pieces: for each rank, parameter -> what it holds.
        kept: for each rank, parameter that is not projected -> what it keeps moments of.
        plans: of every projected matrix.
        projected: names of the projected parameters.
    """

    groups: list[dict[str, Shape]]
    unit: dict[str, int]
    pieces: list[dict[str, Piece]]
    kept: list[dict[str, Piece]]
    plans: list[MatrixPlan]
    projected: set[str]

    @cached_property
    def holdings(self) -> list[Holding]:
        """The plans' numbers by rank."""
        return holdings(self.plans)

    def units(self) -> dict[int, list[str]]:
        """Number of a call of ``step()`` -> the parameters that step in it."""
        found: dict[int, list[str]] = {}
        for group in self.groups:
            for name in group:
                found.setdefault(self.unit[name], []).append(name)
        return found


def arrange(model: Model, config: LowRankConfig, setup: Setup) -> Arrangement:
    """Groups, pieces and plans as the optimizer will make them.

    Raises:
        ValueError: see :func:`ds_lowrank.param_groups`.
    """
    ranks = setup.ranks
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*clamped to.*")
        # Only DeepSpeed's groups are split, see param_groups.
        made = param_groups(model.module, config, ranks=ranks if setup.kind.startswith("zero") else None)
        groups = [{name: tuple(p.shape) for name, p in group["params"]} for group in made]
        specs = [
            spec
            for index, (group, shapes) in enumerate(zip(made, groups))
            if group.get("rank") is not None
            for spec in make_specs(index, group, shapes, config)
        ]
    projected = {spec.parameter for spec in specs}
    matrices: list[dict[str, Shape]] = []
    if setup.projected and setup.kind.startswith("zero"):  # DeepSpeed is not given them
        matrices = [{n: s for n, s in group.items() if n in projected} for group in groups]
        groups = [rest for g in groups if (rest := {n: s for n, s in g.items() if n not in projected})]
    unit = {**dict.fromkeys(projected, 0), **_units(groups, setup)}
    pieces = _pieces(groups, setup)
    for of_rank, apart in zip(pieces, _pieces(matrices, setup, setup.replicated)):
        of_rank.update(apart)
    weights = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.weight_dtype, torch.float32)
    plans = plan_matrices(
        specs,
        pieces,
        copy=tuple(rank // setup.shards for rank in range(ranks)),
        replicated=setup.replicated and ranks > 1,
        dtype=lambda name: weights,
        gradient_dtype=lambda name: weights,
        unit=lambda name: unit[name],
        stagger=config.stagger,
        wave_size=config.wave_size,
        shard_projection=config.shard_projection,
        projected=setup.projected,
    )
    projected = {spec.parameter for spec in specs}
    return Arrangement(groups, unit, pieces, _kept(groups, pieces, projected, setup), plans, projected)


def _kept(
    groups: list[dict[str, Shape]], pieces: list[dict[str, Piece]], projected: set[str], setup: Setup
) -> list[dict[str, Piece]]:
    if setup.kind != "ddp":
        return [{n: piece for n, piece in held.items() if n not in projected} for held in pieces]
    dtype = torch.bfloat16 if setup.master == "bf16" else torch.float32
    rest = [(n, shape, i, dtype) for i, group in enumerate(groups) for n, shape in group.items() if n not in projected]
    return deal_members(rest, setup.ranks)


def padded_share(shape: Shape, setup: Setup) -> int:
    """Elements that a rank keeps memory for of one parameter, padding included; not for flat buffers."""
    numel = math.prod(shape)
    if setup.kind == "zero3":
        return -(-numel // setup.ranks)
    if setup.kind == "fsdp2":
        return -(-shape[0] // setup.shards) * math.prod(shape[1:]) if shape else numel
    return numel


def partition_size(group: dict[str, Shape], ranks: int) -> int:
    """Elements of a rank's partition of a ZeRO-1/2 group."""
    return flat_size(sum(map(math.prod, group.values())), ranks) // ranks


def _units(groups: list[dict[str, Shape]], setup: Setup) -> dict[str, int]:
    unit: dict[str, int] = {}
    if setup.kind == "zero3":
        before = 0
        for group in groups:
            numbers = sub_groups([padded_share(s, setup) for s in group.values()], setup.sub_group)
            unit.update({name: before + number for name, number in zip(group, numbers)})
            before += numbers[-1] + 1
        return unit
    by_group = setup.kind in ("zero1", "zero2")
    return {name: index if by_group else 0 for index, group in enumerate(groups) for name in group}


def _pieces(groups: list[dict[str, Shape]], setup: Setup, whole: bool = False) -> list[dict[str, Piece]]:
    ranks = setup.ranks
    if setup.kind in ("zero1", "zero2") and not whole:
        by_group = [flat_pieces(group, ranks) for group in groups]
        return [{n: p for part in by_group for n, p in part[rank].items()} for rank in range(ranks)]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    # Parameters of one shape are cut alike: their pieces are the same objects, which a plan of many ranks relies on.
    cut = {shape: [_piece(shape, setup, rank) for rank in range(ranks)] for shape in set(shapes.values())}
    found: list[dict[str, Piece]] = []
    for rank in range(ranks):
        pieces = {name: cut[shape][rank] for name, shape in shapes.items()}
        found.append({name: piece for name, piece in pieces.items() if piece.start < piece.stop})
    return found


def _piece(shape: Shape, setup: Setup, rank: int) -> Piece:
    if setup.kind == "zero3":
        return slice_piece(math.prod(shape), padded_share(shape, setup), rank)
    if setup.kind == "fsdp2":
        return chunk_piece(shape, 0, setup.shards, rank % setup.shards)
    return Piece(0, math.prod(shape))
