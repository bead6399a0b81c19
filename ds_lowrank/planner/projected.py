"""What a rank holds of gradients that are projected where they are made: read off engine/projected.py.

A hook has one local gradient at a time, its projection R and the basis; R is added up in an accumulator, whole (long ×
r) where passes leave gradients local, in the rows of A that a rank computes where they are reduced. Full gradients are
kept of what is due alone, a wave at a time, until their averaged rows have given new bases, which wait for ``step()``.

Of Σ over matrices a tensor here is int64 and has one number a rank, N of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.config import LowRankConfig
from ds_lowrank.engine.batches import batches_of
from ds_lowrank.planner.arrangement import Arrangement
from ds_lowrank.planner.frameworks import Frame, frames
from ds_lowrank.planner.holdings import Holding
from ds_lowrank.planner.model import Model, only
from ds_lowrank.planner.setup import DTYPES, Setup
from ds_lowrank.planner.temporaries import refreshing, temporaries, widened
from ds_lowrank.states.layout import BASIS
from ds_lowrank.states.rounding import PART
from ds_lowrank.subspace.project import widened_rows

# Numbers of projections that travel together.
BUCKET = 1 << 22
# Bytes that rounding a number to bf16 by its place takes meanwhile, of up to PART numbers at once: int64 indices and
# what is hashed of them.
ROUNDING = 48


@dataclass(frozen=True)
class Projection:
    """Bytes of projected gradients on one rank.

    Attributes:
        whole: accumulators of all matrices, long × r each.
        rows: accumulators of the rows that this rank computes.
        hook: the largest local gradient, its projection, and what they are made with.
        wire: buckets on their way.
        wave: full gradients of the matrices that are due together, their averaged rows, and what a refresh takes.
        solver: of that, the workspace of ``eigh``, which is allocated outside torch on a CPU.
        pending: bases that wait for the step.
        step: what a step of the matrices takes beside accumulators.
    """

    whole: int
    rows: int
    hook: int
    wire: int
    wave: int
    solver: int
    pending: int
    step: int


def wire_width(setup: Setup) -> int:
    """Bytes of a number of R and N on their way: what the gradient would have had."""
    return setup.master_width if setup.kind in ("ddp", "one") else DTYPES[setup.communication_dtype]


def gradient_width(setup: Setup) -> int:
    """Bytes of a number of a gradient as the backward pass leaves it."""
    return setup.master_width if setup.kind in ("ddp", "one") else setup.width


def framework(model: Model, arrangement: Arrangement, setup: Setup) -> list[Frame]:
    """What the framework holds on each rank where it neither reduces nor keeps gradients of matrices."""
    rest = only(model, model.shapes.keys() - arrangement.projected)
    matrices = model.numel_of(sorted(arrangement.projected))
    if setup.kind in ("zero1", "zero2"):
        bare = [{n: p for n, p in held.items() if n not in arrangement.projected} for held in arrangement.pieces]
        held = frames(model, dataclasses.replace(arrangement, pieces=bare, plans=[]), setup, rest)
        return [dataclasses.replace(f, weights=f.weights + setup.width * matrices) for f in held]
    return frames(model, arrangement, setup, rest)


def projections(arrangement: Arrangement, setup: Setup, config: LowRankConfig, gram_width: int) -> list[Projection]:
    """Of every rank."""
    held = arrangement.holdings
    if not held:
        return [Projection(0, 0, 0, 0, 0, 0, 0, 0)] * setup.ranks
    nothing = torch.zeros(setup.ranks, dtype=torch.int64)
    one = DTYPES[setup.accumulator_dtype]
    whole = sum(h.plan.long * h.plan.r for h in held) * one
    rows = sum((h.rows * h.plan.r for h in held), start=nothing) * one
    wave, solver, pending = _waves(held, setup, config, gram_width)
    wire = _wire(held, setup)
    hook = max(_hook(h, setup) for h in held)
    columns = (rows, wire, wave, solver, pending, _step(held, setup))
    return [
        Projection(whole, r, hook, w, due, work, kept, step)
        for r, w, due, work, kept, step in zip(*(column.tolist() for column in columns))
    ]


def _hook(h: Holding, setup: Setup) -> int:
    """A local gradient; R, some rows widened, and the basis; R is then added to what is kept."""
    plan, work, g = h.plan, h.plan.dtype.itemsize, gradient_width(setup)
    some = min(widened_rows(plan.short), plan.long) * plan.short * work if g != work else 0
    rounded = ROUNDING * min(PART, plan.long * plan.r) if setup.accumulator_dtype == "bf16" else 0
    making = some + _decoded(h, setup)
    return g * plan.long * plan.short + work * plan.long * plan.r + max(making, rounded)


def _decoded(h: Holding, setup: Setup) -> int:
    """A whole basis beside what is kept of it, and on its way there where it lies in slices."""
    plan = h.plan
    numbers = plan.short * plan.r * plan.dtype.itemsize
    if not setup.method.selection.stored:
        return 0 if setup.method.keeps_drawn(setup.device) else numbers
    stored = setup.method.states.format(BASIS.name)
    if sliced(h):
        return numbers + stored.bytes(plan.short, plan.r, plan.dtype)
    return numbers if stored.name != "fp32" else 0


def sliced(h: Holding) -> bool:
    """Whether no rank keeps all of a basis."""
    return h.plan.basis_sharded or any(share is None for share in h.plan.shares)


def _wire(held: Sequence[Holding], setup: Setup) -> Tensor:
    """A bucket that leaves, what arrives for it and the sum of that; another one is filled meanwhile."""
    nothing = torch.zeros(setup.ranks, dtype=torch.int64)
    if setup.ranks == 1:
        return nothing
    numbers = min(BUCKET, sum(h.plan.long * h.plan.r for h in held))
    largest = max(h.plan.long * h.plan.r for h in held)
    numbers = max(numbers, largest)
    return nothing + 3 * numbers * wire_width(setup) + -(-numbers // setup.shards) * held[0].plan.dtype.itemsize


def due_sets(held: Sequence[Holding], config: LowRankConfig) -> Iterator[list[list[Holding]]]:
    """What is due in one step, in the waves in which its gradients come: all at the first, then what the schedule says.

    Args:
        held: the matrices in the model's order; gradients come the other way round.
        config: of the run.
    """
    size = config.wave_size
    order = list(reversed(held))
    yield [order[k : k + size] for k in range(0, len(order), size)]
    steps: dict[tuple[int, int], list[Holding]] = {}
    for h in order:
        steps.setdefault((h.plan.gap, h.plan.phase), []).append(h)
    for due in steps.values():
        yield [due[k : k + size] for k in range(0, len(due), size)]


def _waves(
    held: Sequence[Holding], setup: Setup, config: LowRankConfig, gram_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The most of a wave on each rank, of it the solver's workspace, and of bases that wait for their step."""
    nothing = torch.zeros(setup.ranks, dtype=torch.int64)
    most, solver, pending = nothing, nothing, nothing
    selection, kept = setup.method.selection, setup.method.states
    first = True
    for waves in due_sets(held, config):
        waiting = nothing
        for wave in waves:
            if selection.stored:
                for h in wave:
                    row = kept.row_bytes(h.plan.r, h.plan.dtype)["basis"]
                    own = h.kept if not sliced(h) or h.plan.basis_sharded else torch.full_like(h.kept, h.plan.short)
                    waiting = waiting + own * row
            due, work = _wave(wave, setup, gram_width)
            higher = due > most
            most, solver = torch.where(higher, due, most), torch.where(higher, work, solver)
        # At the first step there are no others: they are counted where they stay.
        pending = pending if first or not selection.periodic else torch.maximum(pending, waiting)
        first = False
    return most, solver, pending


def _wave(wave: Sequence[Holding], setup: Setup, gram_width: int) -> tuple[Tensor, Tensor]:
    found, solver = refreshing(wave, gram_width, setup.method.selection)
    if setup.method.selection.evidence == "none":
        return found, solver  # bases are drawn ahead of the gradients
    g = gradient_width(setup)
    found = found + sum(h.plan.long * h.plan.short for h in wave) * g
    if setup.ranks > 1:
        # One matrix after the other leaves and arrives; averaged rows stay.
        found = found + 2 * max(h.plan.long * h.plan.short for h in wave) * wire_width(setup)
        for h in wave:
            found = found + h.rows * (h.plan.short * h.plan.dtype.itemsize)
    return found, solver


def _step(held: Sequence[Holding], setup: Setup) -> Tensor:
    """What the matrices' step holds: R is read from accumulators, and replicated weights are moved by everybody's N."""
    nothing = torch.zeros(setup.ranks, dtype=torch.int64)
    method = setup.method
    if setup.ranks == 1 or not setup.replicated:
        # No gradients are brought where rows are computed; that updates are on their way is counted there.
        made = temporaries(held, method=method, gram_width=4, device=setup.device)
        return torch.tensor(made.step, dtype=torch.int64) + _rounded(held, setup)
    by_name = {h.plan.name: h for h in held}
    most, wire = nothing, wire_width(setup)
    for batch in batches_of(h.plan for h in held):
        own = nothing
        given = lift = 0
        for plan in batch:
            h, work = by_name[plan.name], plan.dtype.itemsize
            numbers = plan.r * (1 + method.rule.copies) + widened(method.states, plan.r)
            own = own + h.rows * (numbers * work + plan.r * wire)
            given += plan.long * plan.r * wire
            some = min(widened_rows(plan.short), plan.long) * plan.short * work if plan.weight_dtype.itemsize < 4 else 0
            lift = max(lift, _decoded(h, setup) + some + (plan.long * plan.r * work if wire < work else 0))
        most = torch.maximum(most, own + given + lift)
    return most + _rounded(held, setup)


def _rounded(held: Sequence[Holding], setup: Setup) -> int:
    """Of bf16 weights: on a GPU a kernel of ours rounds as it lifts."""
    if setup.device != "cpu" or setup.weight_dtype != "bf16":
        return 0
    return ROUNDING * max(min(PART, min(widened_rows(h.plan.short), h.plan.long) * h.plan.short) for h in held)
