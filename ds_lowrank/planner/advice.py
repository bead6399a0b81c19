"""Which change makes a plan fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ds_lowrank.config import LowRankConfig
from ds_lowrank.planner.arrangement import Arrangement, arrange
from ds_lowrank.planner.memory import MemoryPlan, check_gpu_memory, plan_setup
from ds_lowrank.planner.model import Model
from ds_lowrank.planner.setup import Setup

_MOST_RANKS = 64
_SHORTEST = 512
_SMALL_BUCKET = 50_000_000


@dataclass(frozen=True)
class Advice:
    """A change, or several one after the other, and the plan with it.

    Attributes:
        changes: what is changed.
        plan: of the changed run.
    """

    changes: list[str]
    plan: MemoryPlan


def advise(model: Model, config: LowRankConfig, setup: Setup, gpu_memory: float, margin: float = 0.0) -> list[Advice]:
    """Changes that make ds_lowrank fit: each that does by itself, or where none does, as many together as it takes.

    Args:
        model, config, setup: a run.
        gpu_memory, margin: GiB of a GPU, and what is to stay free of it.

    Returns:
        Empty where the run fits as it is, or where nothing known here makes it fit.

    Raises:
        ValueError: see :func:`ds_lowrank.planner.memory.check_gpu_memory`.
    """
    check_gpu_memory(gpu_memory, margin)
    arrangements: dict[tuple[object, ...], Arrangement] = {}

    @functools.cache  # changes are tried one by one, and then together
    def planned(run: Setup) -> MemoryPlan:
        cut = (run.kind, run.ranks, run.copies, run.master, run.dtype, run.gradients, run.sub_group)
        if cut not in arrangements:
            arrangements[cut] = arrange(model, config, run)
        return plan_setup(model, config, run, arrangements[cut])

    if planned(setup).fits(gpu_memory, margin=margin):
        return []
    alone = []
    for label, change in _changes():
        changed = change(setup)
        if changed is not None and planned(changed).fits(gpu_memory, margin=margin):
            alone.append(Advice([label], planned(changed)))
    if alone:
        return alone
    together: list[str] = []
    for label, change in _changes():
        changed = change(setup)
        if changed is not None and planned(changed).ours.peak < planned(setup).ours.peak:
            setup = changed
            together.append(label)
            if planned(setup).fits(gpu_memory, margin=margin):
                return [Advice(together, planned(setup))]
    return []


def _changes() -> Iterator[tuple[str, Callable[[Setup], Setup | None]]]:
    """What can be changed, the cheapest first; ``None`` where it makes no difference."""
    yield "activation checkpointing", lambda s: None if s.checkpointing else s.replace(checkpointing=True)
    yield f"reduce_bucket_size {_SMALL_BUCKET:,}", _smaller_buckets
    yield "int8 states and bf16 bases", _narrow
    yield "gradients projected, added up in bf16", _projected
    yield "sync_each_batch", lambda s: s.replace(no_sync=False) if s.kind == "fsdp2" and s.local_passes else None
    yield "ZeRO-3", lambda s: s.replace(kind="zero3", overlap=True) if s.kind in ("zero1", "zero2") else None
    yield "FSDP2", lambda s: s.replace(kind="fsdp2") if s.kind == "ddp" else None
    yield "offload_optimizer to the CPU", _offload
    yield "half the sequence", lambda s: s.replace(seq=s.seq // 2) if s.seq // 2 >= _SHORTEST else None
    ranks = 2
    while ranks <= _MOST_RANKS:
        yield f"{ranks} ranks", _more_ranks(ranks)
        ranks *= 2


def _smaller_buckets(setup: Setup) -> Setup | None:
    if not setup.kind.startswith("zero") or setup.reduce_bucket <= _SMALL_BUCKET:
        return None
    return setup.replace(reduce_bucket=_SMALL_BUCKET)


def _narrow(setup: Setup) -> Setup | None:
    if setup.state_dtype == "int8":
        return None
    try:
        return setup.replace(
            state_dtype="int8", basis_dtype="bf16" if setup.basis_dtype == "fp32" else setup.basis_dtype
        )
    except ValueError:
        return None  # a selection whose bases have to be precise


def _projected(setup: Setup) -> Setup | None:
    if setup.projected:
        return None
    try:
        return setup.replace(gradients="projected", accumulator_dtype="bf16", layerwise=False)
    except ValueError:
        return None  # a rule that reads gradients, or offload


def _offload(setup: Setup) -> Setup | None:
    if setup.offload or not setup.kind.startswith("zero") or setup.master == "bf16":
        return None
    return setup.replace(offload=True)


def _more_ranks(ranks: int) -> Callable[[Setup], Setup | None]:
    def change(setup: Setup) -> Setup | None:
        return setup.replace(ranks=ranks) if ranks > setup.ranks and setup.kind != "one" else None

    return change
