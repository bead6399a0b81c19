"""Bytes that a rank sends in a step, by purpose, and the products of a step: ours, and AdamW's under the same layout.

Bytes are the mean over the ranks, as bandwidth-optimal collectives send them: of X bytes a rank sends X (S - 1) / S in
an all-gather, a reduce-scatter or an all-to-all among S ranks, and twice that in an all-reduce. What happens every
``update_proj_gap`` steps is divided by that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_lowrank.config import LowRankConfig
from ds_lowrank.plan.geometry import Box
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.planner.arrangement import Arrangement
from ds_lowrank.planner.model import Model
from ds_lowrank.planner.projected import wire_width
from ds_lowrank.planner.setup import DTYPES, Setup
from ds_lowrank.states.layout import BASIS

GRADIENTS, WEIGHTS, ROWS, R, N, BASES, REFRESHES, COPIES = PURPOSES = (
    "gradients",
    "weights",
    "rows of gradients and updates",
    "R, reduced",
    "N, gathered",
    "bases, joined",
    "refreshes",
    "between copies",
)


@dataclass(frozen=True)
class Traffic:
    """What a step costs beside the model's own products.

    Attributes:
        sent: one of ``PURPOSES`` -> bytes that a rank sends in a step, the mean over ranks; what is not sent is left
            out.
        flops: of projecting and lifting, on a rank in a step; refreshes are not in them.
    """

    sent: Mapping[str, float]
    flops: float

    @property
    def bytes(self) -> float:
        """All together."""
        return sum(self.sent.values())

    def seconds(self, gigabits: float) -> float:
        """To send it at so many Gb/s a rank, if nothing else went on meanwhile."""
        return self.bytes * 8 / (gigabits * 1e9)

    def computing(self, tflops: float) -> float:
        """Seconds of the products at so many TFLOP/s."""
        return self.flops / (tflops * 1e12)


def adamw_traffic(model: Model, setup: Setup) -> Traffic:
    """AdamW's and 8-bit AdamW's."""
    return Traffic(_kept(_framework(setup, model.numel, model.numel)), 0.0)


def our_traffic(model: Model, arrangement: Arrangement, setup: Setup, config: LowRankConfig) -> Traffic:
    """Of ds_lowrank, with ``setup.gradients`` full or projected.

    Args:
        model, setup, config: the run.
        arrangement: what lies where in it.
    """
    sent: dict[str, float] = dict.fromkeys(PURPOSES, 0.0)
    flops = 0.0
    rest = model.numel - model.numel_of(sorted(arrangement.projected))

    def add(found: Mapping[str, float]) -> None:
        for purpose, count in found.items():
            sent[purpose] += count

    add(_framework(setup, rest if setup.projected else model.numel, model.numel))
    known: dict[tuple[int, int], int] = {}
    for plan in arrangement.plans:
        if (cut := (id(plan.shares), id(plan.parts))) not in known:
            known[cut] = _moving(plan)
        moving = known[cut] / setup.ranks
        product = 2.0 * plan.long * plan.short * plan.r
        here = setup.shards if plan.shared else setup.ranks
        if setup.projected:
            add(_projected(plan, setup, config, moving))
            flops += product * (setup.accumulation + (1 if setup.replicated else 1 / here))
        elif plan.shared:
            add(_full(plan, setup, moving))
            flops += 2 * product / here
        else:
            flops += 2 * product / here
        if plan.shared:
            sent[REFRESHES] += _refresh(plan, setup) / plan.gap if setup.method.selection.periodic else 0
    return Traffic(_kept(sent), flops)


def _kept(sent: Mapping[str, float]) -> dict[str, float]:
    return {purpose: sent[purpose] for purpose in PURPOSES if sent.get(purpose)}


def _framework(setup: Setup, reduced: int, weights: int) -> dict[str, float]:
    """Gradients of ``reduced`` parameters, and ``weights`` that are gathered where they are used."""
    share = (setup.shards - 1) / setup.shards
    if setup.kind == "one" or setup.ranks == 1:
        return {}
    if setup.kind == "ddp":
        return {GRADIENTS: 2 * setup.master_width * reduced * share}
    wire = DTYPES[setup.communication_dtype]
    passes = setup.accumulation
    if setup.kind in ("zero1", "zero2"):
        # Buckets with parts of several ranks are all-reduced (``use_multi_rank_bucket_allreduce``), stage 1's once.
        passes = 1 if setup.kind == "zero1" else passes
        return {GRADIENTS: 2 * wire * reduced * share * passes, WEIGHTS: setup.width * reduced * share}
    # ZeRO-3 and FSDP2 gather weights in the forward pass and, freed since, in the backward pass.
    gathers = 1 if setup.kind == "fsdp2" and not setup.reshard else 2
    synced = 1 if setup.local_passes else passes
    return {
        WEIGHTS: gathers * setup.width * weights * share * passes,
        GRADIENTS: wire * reduced * share * synced,
        COPIES: 2 * wire * reduced / setup.shards * (setup.copies - 1) / setup.copies * synced,
    }


def _full(plan: MatrixPlan, setup: Setup, moving: float) -> dict[str, float]:
    """A step of a shared matrix whose gradients were reduced whole."""
    share, work = (setup.shards - 1) / setup.shards, plan.dtype.itemsize
    found = {ROWS: 2 * moving * work}
    if plan.replicated:
        found[WEIGHTS] = plan.weight_dtype.itemsize * plan.long * plan.short * share
    if plan.basis_sharded and setup.method.selection.stored:
        found[BASES] = _basis_bytes(plan, setup) * share
    return found


def _projected(plan: MatrixPlan, setup: Setup, config: LowRankConfig, moving: float) -> dict[str, float]:
    if setup.ranks == 1:
        return {}
    share, wire = (setup.shards - 1) / setup.shards, wire_width(setup)
    selection = setup.method.selection
    passes = 1 if setup.local_passes else setup.accumulation
    # In the pass that gives a basis, averaged rows of the gradient go in the place of R.
    due = 1 / plan.gap if selection.periodic and selection.evidence != "none" else 0.0
    with_r = passes - due if passes == setup.accumulation else passes
    low, whole = wire * plan.long * plan.r, wire * plan.long * plan.short
    found = {R: low * share * with_r, REFRESHES: whole * share * due}
    found[COPIES] = 2 / setup.shards * (setup.copies - 1) / setup.copies * (low * with_r + whole * due)
    if setup.replicated:
        found[N] = low * share
    else:
        found[ROWS] = moving * plan.dtype.itemsize  # of updates
    if selection.stored and plan.basis_sharded:
        found[BASES] = _basis_bytes(plan, setup) * share * (setup.accumulation + 1)  # in every pass, and in the step
    return found


def _basis_bytes(plan: MatrixPlan, setup: Setup) -> int:
    return setup.method.states.format(BASIS.name).bytes(plan.short, plan.r, plan.dtype)


def _refresh(plan: MatrixPlan, setup: Setup) -> float:
    """Bytes a rank of evidence, the new basis and its overlap with the old one."""
    selection, work = setup.method.selection, plan.dtype.itemsize
    if selection.evidence == "sketch":
        return 0.0
    s, shards = plan.side_to_decompose, len(plan.contributors)
    total = 0.0
    if selection.evidence == "gram":
        whole = plan.long * plan.short if plan.gathers else s * s * shards
        total += whole * (shards - 1) / shards * work
    if selection.stored:
        keepers = len(plan.computing) / shards if plan.basis_sharded else len(plan.computing)
        total += plan.r * plan.short * max(keepers - 1 / shards, 0) * work
        total += plan.r**2 * (shards - 1) * work if plan.basis_sharded else 0
    return total / setup.ranks


def _moving(plan: MatrixPlan) -> int:
    """Elements over all ranks that are computed elsewhere than they lie."""
    found = 0
    for part, share in zip(plan.parts, plan.shares):
        if share is not None and share.buffer is not None:
            found += share.buffer.numel - _common(() if part is None else part.boxes, share.buffer)
    return found


def _common(boxes: Sequence[Box], frame: Box) -> int:
    return sum(math.prod(met.shape) for box in boxes if (met := box.meet(frame)) is not None)
