"""Moments of a run whose gradients are used in the backward pass: ``gradients: projected``, and ``layerwise``.

The backward pass lets go of activations layer by layer while accumulators fill, so its highest moment is looked for
layer by layer. A moment ``wave`` is added to the others: where matrices are due, with their full gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_lowrank.config import LowRankConfig
from ds_lowrank.planner.activations import Activations
from ds_lowrank.planner.arrangement import Arrangement
from ds_lowrank.planner.frameworks import Frame, frames
from ds_lowrank.planner.holdings import Holding
from ds_lowrank.planner.model import Model, only
from ds_lowrank.planner.projected import (
    ROUNDING,
    Projection,
    due_sets,
    framework,
    projections,
)
from ds_lowrank.planner.setup import DTYPES, Setup
from ds_lowrank.planner.states import States
from ds_lowrank.planner.temporaries import temporaries
from ds_lowrank.states.rounding import PART

Terms = dict[str, int]
# Numbers that a step of what is not projected widens at once.
_PART = 1 << 22


@dataclass(frozen=True)
class Passes:
    """A run whose gradients are used in the backward pass.

    Attributes:
        model, arrangement, setup, config: the run; ``config`` for its schedule.
        gram_width: bytes of a number of a Gram.
        alive: activations; zeros where the model's are not known.
    """

    model: Model
    arrangement: Arrangement
    setup: Setup
    config: LowRankConfig
    gram_width: int
    alive: Activations

    def of_ranks(self, states: Sequence[States]) -> list[tuple[dict[str, Terms], int]]:
        """On each rank: moment -> term -> bytes, and the solver's workspace in the highest of them."""
        if not self.setup.projected:
            return _layerwise(self, states)
        held = framework(self.model, self.arrangement, self.setup)
        made = projections(self.model, self.arrangement, self.setup, self.config, self.gram_width)
        # Many ranks hold the same.
        known: dict[tuple[int, States, Projection], tuple[dict[str, Terms], int]] = {}
        found = []
        for frame, kept, projection in zip(held, states, made):
            key = (id(frame), kept, projection)
            if key not in known:
                known[key] = _projected(self, frame, kept, projection)
            found.append(known[key])
        return found

    @property
    def rest(self) -> Model:
        """What is not projected."""
        return only(self.model, self.model.shapes.keys() - self.arrangement.projected)

    @property
    def first(self) -> int:
        """Numbers of the first module's parameters, whose gradients come last."""
        return self.model.numel_of(self.model.modules[0]) if self.model.modules else 0

    def highest(self, grows: int, frame: Frame, by_depth: Sequence[int] = (), first: int = 0) -> tuple[int, float, int]:
        """Activations, the share of the layers that are done, and what else goes with the layer, where all that
        together is highest.

        Args:
            grows: bytes that fill up in proportion to that share.
            frame: what the framework has by layer.
            by_depth: more bytes, by the layers that are done.
            first: only where so many are done.
        """
        layers = max(len(self.model.layers), 1)
        a = self.alive
        places = (
            (
                a.layer - d * a.each,
                (d + 1) / layers,
                frame.by_layer.get(layers - 1 - d, 0) + (by_depth[d] if by_depth else 0),
            )
            for d in range(min(first, layers - 1), layers)
        )
        return max(places, key=lambda at: at[0] + int(grows * at[1]) + at[2])


def base_terms(frame: Frame, kept: States) -> Terms:
    """Between steps."""
    return {
        "weights": frame.weights,
        "master": frame.master,
        "gradients": frame.gradients if frame.gradients_stay else 0,
        "buckets": frame.buckets_stay,
        "states": kept.moments,
        "bases": kept.bases,
    }


def rest_step(run: Passes) -> int:
    """What a step of parameters that are not projected widens."""
    setup = run.setup
    masters = setup.kind.startswith("zero")
    weights = "fp32" if masters else setup.master
    numels = [math.prod(shape) for shape in run.rest.shapes.values()]
    largest = -(-max(numels, default=0) // (1 if setup.replicated and not masters else setup.shards))
    # Measured: with a part behind another one a part's numbers are alive while the next one's are made.
    parts = largest > _PART
    if weights == "fp32":
        a_number = {"fp32": 0, "bf16": 16 if parts else 8, "int8": 16 if parts else 12}
    else:
        a_number = {"fp32": 6, "bf16": 13, "int8": 17 if parts else 13}
    rounded = ROUNDING * min(PART, largest) if weights == "bf16" else 0
    return a_number[setup.state_dtype] * min(_PART, largest) + rounded


def _projected(run: Passes, frame: Frame, kept: States, made: Projection) -> tuple[dict[str, Terms], int]:
    setup, a = run.setup, run.alive
    base = base_terms(frame, kept)
    several, local = setup.accumulation > 1, setup.local_passes or setup.ranks == 1
    full = made.whole if local else made.rows
    # Where passes are local a step in which all are due has rows of the first beside whole sums of the others.
    before = full + (made.rows if setup.local_passes and setup.ranks > 1 else 0) if several else 0
    rest = max(frame.gradients, frame.local)
    rest_before = rest if several or frame.gradients_stay else 0
    # The embedding's comes at the end; of flat buffers all are there.
    alike = setup.kind.startswith("zero") or several
    coming = rest if alike else rest - min(rest, rest * run.first // max(run.rest.numel, 1))
    at_the_end = frame.gradients if setup.kind == "fsdp2" else coming
    if setup.kind == "fsdp2" and setup.units == "layers" and not several:  # the root's wait for the embedding's
        coming = setup.width * max(run.rest.numel - run.first, 0)
    at_end = made.whole if setup.ranks == 1 else made.rows if several else 0

    # Of the first step, in which everything is due, all bases stand beside the old ones from its first pass on.
    waiting = made.pending if several else 0
    passing = {**base, "gradients": rest_before, "accumulators": before, "bases": kept.bases + waiting}
    reduced = {**base, "gradients": rest, "buckets": frame.buckets, "bases": kept.bases + waiting}

    def in_layer(more: int, first: bool) -> Terms:
        fills = 0 if several and not first else full
        bases = made.pending if first else 0
        act, share, beside = run.highest(fills + bases, frame, () if first else made.wire, made.first if first else 0)
        return {
            **reduced,
            "bases": kept.bases + (int(bases * share) if first else waiting),
            "gradients": coming,
            "activations": act,
            "accumulators": int(fills * share) or before,
            "temporaries": frame.backward + beside + more,
        }

    moments = {
        "resident": base,
        "forward": {**passing, "activations": a.forward, "temporaries": frame.forward},
        "loss": {**passing, "activations": a.loss, "temporaries": frame.loss},
        "head": {**passing, "activations": a.head, "temporaries": frame.head},
        "layer": in_layer(made.hook, first=False),
        "wave": in_layer(made.wave, first=True),
        "embedding": {
            **reduced,
            "gradients": at_the_end,
            "accumulators": at_end,
            "activations": a.embedding,
            "temporaries": frame.embedding + made.wire[-1],
        },
        "norm": {**base, "gradients": frame.gradients, "accumulators": made.rows, "temporaries": frame.norm},
    }
    # What is not projected steps first, while the last buckets are on their way; rows of earlier passes are there.
    copies = [(0, 0), *frame.copies.values()]
    rest_steps = max(rest_step(run) + max(during for _, during in copies), *(start for start, _ in copies))
    after = {**base, "gradients": frame.gradients}
    some = made.rows if several and not setup.local_passes else 0

    def stepping(bases: int, rows: int, flying: int) -> Terms:
        rest_first = rows + flying + rest_steps > made.rows + made.step
        return {
            **after,
            "bases": kept.bases + bases,
            "accumulators": rows if rest_first else made.rows,
            "temporaries": flying + rest_steps if rest_first else made.step,
        }

    alone = setup.ranks == 1
    moments["step"] = stepping(0, made.rows if alone else some, made.wire[-1])
    # Of one pass nothing is on its way where all were due.
    moments["refresh"] = stepping(made.pending, made.rows, made.wire[-1] if several else 0)
    return moments, made.solver


def _layerwise(run: Passes, states: Sequence[States]) -> list[tuple[dict[str, Terms], int]]:
    setup = run.setup
    if setup.kind == "ddp":  # what is not projected stays with DDP
        held = frames(run.model, run.arrangement, setup, run.rest)
    else:
        held = frames(run.model, run.arrangement, setup)
        # FSDP2 reduces a unit's gradients together.
        unit = max((run.model.numel_of(layer) for layer in run.model.layers), default=0) // setup.shards
        unit = setup.master_width * unit if setup.kind == "fsdp2" else 0
        held = [dataclasses.replace(held[0], gradients=unit, buckets=0, buckets_stay=0)] * setup.ranks
    full = list(zip(*_steps(run)))
    known: dict[tuple[int, States, tuple[int, ...]], tuple[dict[str, Terms], int]] = {}
    found = []
    for frame, kept, made in zip(held, states, full):
        key = (id(frame), kept, made)
        if key not in known:
            known[key] = _layerwise_moments(run, frame, kept, made)
        found.append(known[key])
    return found


def _layerwise_moments(run: Passes, frame: Frame, kept: States, made: tuple[int, ...]) -> tuple[dict[str, Terms], int]:
    setup, a = run.setup, run.alive
    alone, together, rows, solver = made
    base = base_terms(frame, kept)
    several, sharded = setup.accumulation > 1, setup.kind == "fsdp2"
    # With accumulation everything is due at the first step, and what is due adds up in full. Under FSDP2 the gradients
    # of norms keep those of their whole unit alive, which are one storage.
    shards = setup.shards if sharded else 1
    summed = setup.master_width * -(-run.model.numel // shards) if several else 0
    usually = (summed if sharded else setup.master_width * run.rest.numel) if several else frame.gradients
    accumulators = rows if several else 0
    most = summed + accumulators if sharded else max(summed, usually + accumulators)
    before = {**base, "gradients": most if several else 0, "buckets": frame.buckets}
    rest = max(run.rest.numel, 1)
    coming = frame.gradients - (frame.gradients * run.first // rest if setup.kind == "ddp" else 0)
    during = {**before, "gradients": most if several else coming}
    top = 0 if several or setup.kind == "ddp" else rest_step(run)
    act, _, beside = run.highest(0, frame)
    logits = 0 if run.model.decoder is None else setup.width * setup.tokens * run.model.decoder.vocabulary
    # The head steps when its gradient has come, and the loss' has gone; under FSDP2 when its unit is reduced.
    head = max(a.head, a.head - logits + (0 if sharded and setup.units == "layers" else top))
    root, copied = 0, 0
    if sharded:
        root = setup.master_width * -(-run.rest.numel // setup.shards)
        gloo = setup.device == "cpu" and setup.ranks > 1
        copied = DTYPES[setup.communication_dtype] * run.rest.numel if gloo else 0
    # The last pass' are added to those that are there.
    end = {**during, "gradients": most + root if several else max(root, coming)}
    moments = {
        "resident": base,
        "forward": {**before, "activations": a.forward, "temporaries": frame.forward},
        "loss": {**before, "activations": a.loss, "temporaries": frame.loss},
        "head": {**before, "activations": head, "temporaries": frame.head},
        "layer": {**during, "activations": act, "temporaries": frame.backward + beside + alone},
        "wave": {**during, "activations": act, "temporaries": frame.backward + beside + together},
        "embedding": {
            **end,
            "activations": a.embedding,
            "temporaries": frame.embedding + max(0, top - copied),
        },
        "norm": {**base, "gradients": most if several else frame.gradients if setup.kind == "ddp" else 0},
    }
    stepping = {**base, "gradients": usually, "accumulators": accumulators}
    if not several:
        # What DDP averages steps when it is asked to; all else has stepped.
        done = {**base, "gradients": frame.gradients} if setup.kind == "ddp" else base
        moments["step"] = moments["refresh"] = {**done, "temporaries": rest_step(run) if setup.kind == "ddp" else 0}
    else:
        moments["step"] = {**stepping, "temporaries": max(rest_step(run), alone)}
        moments["refresh"] = {**base, "gradients": summed, "temporaries": max(rest_step(run), together)}
    return moments, solver


def _steps(run: Passes) -> tuple[list[int], list[int], list[int], list[int]]:
    """With its gradient, the largest step of one matrix; of a wave; sums of R; and the solver's workspace in a wave."""
    setup, config = run.setup, run.config
    g = 0 if setup.accumulation > 1 else setup.master_width  # all gradients are counted where they add up
    alone = together = solver = [0] * setup.ranks
    nothing = torch.zeros(setup.ranks, dtype=torch.int64)
    matrices = run.arrangement.holdings
    rows = sum((h.rows * h.plan.r * h.plan.dtype.itemsize for h in matrices), start=nothing).tolist()

    def made(held: Sequence[Holding]) -> tuple[list[int], list[int], list[int]]:
        of = [dataclasses.replace(h, plan=dataclasses.replace(h.plan, wave=0, gap=1)) for h in held]
        t = temporaries(of, method=setup.method, gram_width=run.gram_width, device=setup.device)
        here = [sum(g * int(h.part[k]) for h in held) for k in range(setup.ranks)]
        return (
            [x + n for x, n in zip(t.step, here)],
            [x + n for x, n in zip(t.refresh, here)],
            t.solver,
        )

    kinds = {(h.plan.shape, h.plan.r): h for h in run.arrangement.holdings}
    for h in kinds.values():
        step, refresh, work = made([h])
        alone = [max(x, y) for x, y in zip(alone, step)]
        if setup.ranks == 1:  # what one rank holds alone does not wait for others
            higher = refresh[0] > together[0]
            together, solver = ([refresh[0]], [work[0]]) if higher else (together, solver)
    if setup.ranks == 1:
        return alone, [max(together[0], alone[0])], rows, solver
    seen = set()
    for waves in due_sets(run.arrangement.holdings, config):
        for wave in waves:
            key = tuple(sorted((h.plan.shape, h.plan.r, h.plan.owner) for h in wave))
            if key not in seen:
                seen.add(key)
                _, refresh, work = made(wave)
                solver = [w if y > x else s for x, y, s, w in zip(together, refresh, solver, work)]
                together = [max(x, y) for x, y in zip(together, refresh)]
    return alone, together, rows, solver
