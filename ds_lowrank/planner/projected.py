"""What a rank holds of gradients that are projected where they are made, as engine/projected.py and engine/sums.py do.

A hook has one local gradient at a time, its projection R and the basis; where bases lie in slices it waits until those
of a batch are joined. R is added up whole (long × r) where passes leave gradients local, and in the rows of A that a
rank computes where they are reduced, bucket by bucket. Full gradients are kept of what is due alone, a wave at a time,
until their averaged rows have given new bases, which stand beside the old ones until ``step()``.

A tensor here is int64 and has one number a rank, N of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.config import LowRankConfig
from ds_lowrank.engine.batches import STACK_NUMBERS, batches_of
from ds_lowrank.engine.projected import BUCKET_NUMBERS
from ds_lowrank.planner.arrangement import Arrangement
from ds_lowrank.planner.frameworks import Frame, frames
from ds_lowrank.planner.holdings import Holding
from ds_lowrank.planner.model import Model, only
from ds_lowrank.planner.setup import DTYPES, Setup
from ds_lowrank.planner.temporaries import refreshing, temporaries, widened
from ds_lowrank.states.layout import BASIS
from ds_lowrank.states.rounding import PART
from ds_lowrank.subspace.project import widened_rows

# Bytes that rounding a number to bf16 by its place takes meanwhile, of up to PART numbers at once: int64 indices and
# what is hashed of them.
ROUNDING = 52


@dataclass(frozen=True)
class Projection:
    """Bytes of projected gradients on one rank.

    Attributes:
        whole: accumulators of all matrices, long × r each.
        rows: accumulators of the rows that this rank computes.
        hook: the largest local gradients that are projected at once, and what that takes.
        wire: by layers that the last pass has done, buckets on their way and what fills one.
        first: layers that are done when the first wave of a first step is there.
        wave: full gradients of the matrices that are due together, their averaged rows, and what a refresh takes.
        solver: of that, the workspace of ``eigh``, which is allocated outside torch on a CPU.
        pending: bases that wait for the step.
        step: what a step of the matrices takes beside accumulators.
    """

    whole: int
    rows: int
    hook: int
    wire: tuple[int, ...]
    first: int
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


def projections(
    model: Model, arrangement: Arrangement, setup: Setup, config: LowRankConfig, gram_width: int
) -> list[Projection]:
    """Of every rank."""
    held = arrangement.holdings
    if not held:
        return [Projection(0, 0, 0, (0,) * (len(model.layers) + 2), 0, 0, 0, 0, 0)] * setup.ranks
    nothing = torch.zeros(setup.ranks, dtype=torch.int64)
    one = DTYPES[setup.accumulator_dtype]
    whole = sum(h.plan.long * h.plan.r for h in held) * one
    rows = sum((h.rows * h.plan.r for h in held), start=nothing) * one
    wave, solver, pending = _waves(held, setup, config, gram_width)
    hook = max(map(_hook, _joined(held, config.wave_size), itertools.repeat(setup)))
    layer_of = {name: index for index, layer in enumerate(model.layers) for name in layer}
    wire = _wire(held, layer_of, max(len(model.layers), 1), setup)
    # The gradients of a wave are there with the last of them; what needs none has its bases ahead of the pass.
    last = list(reversed(held))[: config.wave_size][-1].plan.parameter
    late = setup.method.selection.evidence != "none" and last in layer_of
    first = len(model.layers) - 1 - layer_of[last] if late else 0
    columns = (rows, wave, solver, pending, _step(held, setup))
    return [
        Projection(whole, r, hook, wire, first, due, work, kept, step)
        for r, due, work, kept, step in zip(*(column.tolist() for column in columns))
    ]


def sliced(h: Holding) -> bool:
    """Whether a basis lies in slices, and is joined ahead of each use."""
    return h.plan.basis_sharded and h.plan.shared


def _joined(held: Sequence[Holding], most: int) -> Iterator[list[Holding]]:
    """What is projected at once: with bases that lie in slices up to ``most`` matrices, else one."""
    batch: list[Holding] = []
    for h in reversed(held):
        if not sliced(h):
            yield [h]
            continue
        batch.append(h)
        if len(batch) == most or sum((of.plan.long + of.plan.short) * of.plan.r for of in batch) > STACK_NUMBERS:
            yield batch
            batch = []
    if batch:
        yield batch


def _hook(batch: Sequence[Holding], setup: Setup) -> int:
    """Local gradients, whole bases, and of one of them R, some rows widened and what rounding takes."""
    g = gradient_width(setup)
    gradients = sum(h.plan.long * h.plan.short for h in batch) * g
    stored = setup.method.states.format(BASIS.name) if setup.method.selection.stored else None
    raw = sum(stored.bytes(h.plan.short, h.plan.r, h.plan.dtype) for h in batch if sliced(h)) if stored else 0
    whole = sum(_whole_basis(h, setup) for h in batch)
    making = max(_product(h, h.plan.long, setup) for h in batch)
    # Parts are put together and decoded; then the next batch's are on their way while products are made.
    return gradients + whole + max(2 * raw, raw + making)


def _product(h: Holding, rows: int, setup: Setup) -> int:
    """R of some rows of A, rows of the gradient widened; then its rounding, into what is added up."""
    plan, work = h.plan, h.plan.dtype.itemsize
    some = min(widened_rows(plan.short), rows) * plan.short * work if gradient_width(setup) != work else 0
    rounded = ROUNDING * min(PART, rows * plan.r) if setup.accumulator_dtype == "bf16" else 0
    return work * rows * plan.r + max(some, rounded)


def _whole_basis(h: Holding, setup: Setup) -> int:
    """A whole basis beside what is kept of it, in what is computed with."""
    plan = h.plan
    numbers = plan.short * plan.r * plan.dtype.itemsize
    if not setup.method.selection.stored:
        return 0 if setup.method.keeps_drawn(setup.device) else numbers
    return numbers if sliced(h) or setup.method.states.format(BASIS.name).name != "fp32" else 0


def _wire(held: Sequence[Holding], layer_of: Mapping[str, int], layers: int, setup: Setup) -> tuple[int, ...]:
    """By layers done, what is on its way in the last pass: a bucket is filled, leaves, and arrives when two have left
    behind it.
    """
    most = [0] * (layers + 1)
    if setup.ranks == 1:
        return tuple(most)
    wire, work = wire_width(setup), held[0].plan.dtype.itemsize
    one = 0 if setup.local_passes else DTYPES[setup.accumulator_dtype]  # else they are among the accumulators
    replicas = (setup.copies + 1) * wire if setup.copies > 1 else 0
    filled = 0
    flying: list[int] = []  # numbers of buckets that have left
    done = 0
    for k, h in enumerate(reversed(held)):
        done = max(done, layers - 1 - layer_of.get(h.plan.parameter, 0))
        filled += h.plan.long * h.plan.r
        now = one * filled + 2 * wire * sum(flying)
        if filled > BUCKET_NUMBERS or k == len(held) - 1:
            arriving = sum(flying[:-1])
            now += max(-(-arriving // setup.shards) * (work + replicas), 2 * wire * filled)
            flying, filled = [*flying[-1:], filled], 0
        most[done] = max(most[done], now)
    most[layers] = 2 * wire * sum(flying)  # it arrives in the step, where the norm is asked for or matrices step
    return tuple(most)


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
    known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    for waves in due_sets(held, config):
        waiting = nothing
        for wave in waves:
            if selection.stored:
                for h in wave:
                    waiting = waiting + h.kept * kept.row_bytes(h.plan.r, h.plan.dtype)["basis"]
            key = tuple(sorted((h.plan.shape, h.plan.r, h.plan.owner) for h in wave))
            if key not in known:
                known[key] = _wave(wave, setup, gram_width)
            due, work = known[key]
            higher = due > most
            most, solver = torch.where(higher, due, most), torch.where(higher, work, solver)
        pending = torch.maximum(pending, waiting)
        if not selection.periodic:
            break  # after the first step nothing is due
    return most, solver, pending


def _wave(wave: Sequence[Holding], setup: Setup, gram_width: int) -> tuple[Tensor, Tensor]:
    """Gradients of matrices that are due, averaged, decomposed and projected."""
    found, solver = refreshing(wave, gram_width, setup.method.selection)
    if setup.method.selection.evidence == "none":
        return found, solver  # bases are drawn ahead of the gradients
    numbers = sum(h.plan.long * h.plan.short for h in wave)
    whole = sum(_whole_basis(h, setup) for h in wave)
    nothing = torch.zeros_like(found)
    if setup.ranks == 1:
        projecting = whole + max(_product(h, h.plan.long, setup) for h in wave)
        gradients = gradient_width(setup) * numbers
        return gradients + torch.maximum(found, nothing + projecting), solver * (found >= projecting)
    wire = wire_width(setup)
    rows = sum((h.rows * (h.plan.short * h.plan.dtype.itemsize) for h in wave), start=nothing)
    # Packed and on their way; then what has arrived is added up.
    leaving: Tensor = numbers * (gradient_width(setup) + wire) + rows.clamp(min=numbers * wire)
    if setup.copies > 1:
        leaving = leaving + (setup.copies + 1) * wire * (rows // wave[0].plan.dtype.itemsize)
    raw = 0
    if setup.method.selection.stored:
        stored = setup.method.states.format(BASIS.name)
        raw = sum(stored.bytes(h.plan.short, h.plan.r, h.plan.dtype) for h in wave if sliced(h))
    product = max(_product(h, -(-h.plan.long // setup.shards), setup) for h in wave)
    after: Tensor = rows + whole + max(2 * raw, product)
    refreshed = rows + found
    most = torch.maximum(torch.maximum(leaving, after), refreshed)
    return most, solver * (most == refreshed)


def _step(held: Sequence[Holding], setup: Setup) -> Tensor:
    """What the matrices' step holds: R is read from accumulators, and replicated weights are moved by everybody's N."""
    method = setup.method
    if setup.ranks == 1 or not setup.replicated:
        made = temporaries(held, method=method, gram_width=4, device=setup.device, projected=True)
        return torch.tensor(made.step, dtype=torch.int64) + _rounded(held, setup)
    nothing = torch.zeros(setup.ranks, dtype=torch.int64)
    by_name = {h.plan.name: h for h in held}
    most, wire = nothing, wire_width(setup)
    left = nothing
    for batch in batches_of(h.plan for h in held):
        own, given, lift, bases = torch.zeros_like(nothing), 0, 0, 0
        for plan in batch:
            h, work = by_name[plan.name], plan.dtype.itemsize
            own = own + h.rows * (plan.r * (1 + method.rule.copies) + widened(method.states, plan.r)) * work
            given += plan.long * plan.r * wire
            bases += _whole_basis(h, setup)
            some = min(widened_rows(plan.short), plan.long) * plan.short * work if plan.weight_dtype.itemsize < 4 else 0
            lift = max(lift, some + (plan.long * plan.r * work if wire < work else 0))
        # Directions of the batch before are lifted when this one's are on their way.
        most = torch.maximum(most, own + bases + left)
        left = nothing + bases + given + -(-given // setup.ranks)
        most = torch.maximum(most, left + given + lift)
    return most + _rounded(held, setup)


def _rounded(held: Sequence[Holding], setup: Setup) -> int:
    """Of bf16 weights: on a GPU a kernel of ours rounds as it lifts."""
    if setup.device != "cpu" or setup.weight_dtype != "bf16":
        return 0
    return ROUNDING * max(min(PART, min(widened_rows(h.plan.short), h.plan.long) * h.plan.short) for h in held)
