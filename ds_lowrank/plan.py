"""From the layout to the plan of every projected matrix: made once, the same on all ranks, checked across ranks."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ds_lowrank.comm import Comm
from ds_lowrank.layouts.base import Layout, LayoutError
from ds_lowrank.rows import MatrixPlan, plan_shares
from ds_lowrank.subspace.schedule import deal_owners, phases
from ds_lowrank.subspace.sides import projected_side


@dataclass(frozen=True)
class MatrixSpec:
    """What the optimizer was asked to do with one matrix, before any sharding.

    Attributes:
        name, shape: parameter name and (m, n).
        group: index of its parameter group.
        rank: r, clamped.
        gap: τ, steps between refreshes.
        proj_type: see :mod:`ds_lowrank.subspace.sides`.
    """

    name: str
    shape: tuple[int, int]
    group: int
    rank: int
    gap: int
    proj_type: str


def make_plan(
    specs: Sequence[MatrixSpec], layout: Layout, comm: Comm, *, stagger: bool, wave_size: int, options: str
) -> dict[str, MatrixPlan]:
    """Plan every projected matrix. Collective.

    Args:
        specs: the matrices in the model's parameter order.
        layout: this rank's pieces.
        comm: the collectives.
        stagger, wave_size: see :func:`ds_lowrank.subspace.schedule.phases`.
        options: every other option that the ranks have to agree on.

    Returns:
        name -> plan, in the order of ``specs``.

    Raises:
        LayoutError: on all ranks alike, when the weights are not where the layout says, the pieces do not cover a
            matrix once, or the ranks disagree about the model or the options.
    """
    mine = {s.name: layout.pieces.get(s.name) for s in specs}
    fingerprint = hashlib.sha256(repr((list(specs), stagger, wave_size, options)).encode()).hexdigest()
    gathered = comm.gather_objects((layout.mismatch(), fingerprint, mine))
    for rank, (mismatch, _, _) in enumerate(gathered):
        if mismatch:
            raise LayoutError(f"rank {rank}: {mismatch}")
    differing = [rank for rank, (_, theirs, _) in enumerate(gathered) if theirs != gathered[0][1]]
    if differing:
        raise LayoutError(
            f"ranks {differing} project other matrices, or with other options, than rank 0: build the model and the "
            "optimizer the same way on every rank"
        )
    plans: list[MatrixPlan] = []
    for spec, phase in zip(specs, _phases_by_gap(specs, stagger, wave_size)):
        side = projected_side(spec.shape, spec.proj_type)
        pieces = tuple(table[spec.name] for _, _, table in gathered)
        shares = plan_shares(spec.shape, side, pieces, spec.name)
        plans.append(MatrixPlan(spec.name, spec.shape, side, spec.rank, phase, spec.gap, spec.group, pieces, shares))
    return {plan.name: plan for plan in _with_owners(plans)}


def _phases_by_gap(specs: Sequence[MatrixSpec], stagger: bool, wave_size: int) -> list[int]:
    """Phases over the whole model; matrices with a period of their own are staggered among themselves."""
    result = [0] * len(specs)
    for gap in {s.gap for s in specs}:
        places = [j for j, s in enumerate(specs) if s.gap == gap]
        for j, phase in zip(places, phases(len(places), gap, wave_size, stagger)):
            result[j] = phase
    return result


def _with_owners(plans: Sequence[MatrixPlan]) -> list[MatrixPlan]:
    """Give every matrix its owner: dealt within a wave (the matrices of one group, gap and phase step together)."""
    waves: dict[tuple[int, int, int], list[int]] = {}
    for j, plan in enumerate(plans):
        waves.setdefault((plan.group, plan.gap, plan.phase), []).append(j)
    owned = list(plans)
    for places in waves.values():
        costs = [float(plans[j].short) ** 3 for j in places]
        for j, owner in zip(places, deal_owners(costs, [plans[j].computing for j in places])):
            owned[j] = dataclasses.replace(plans[j], owner=owner)
    return owned
