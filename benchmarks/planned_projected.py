"""The planner against runs of LLaMA-60M whose gradients are used in the backward pass, bf16 without an fp32 master.

Bytes are those of unique storages; peaks are followed operation by operation (``tracker.py``): of the first step, in
which everything is due, of one in which nothing is, and of one in which everything is due again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from harness import ZERO_STAGE, DeepSpeedRun, deepspeed_config, start
from llama import Llama, Setting
from planned import ZERO, resident_bytes
from rank_pool import RankPool
from storage import state_bytes
from table import Row
from tracker import Tracker

from ds_lowrank.planner import MemoryPlan, from_deepspeed, low_rank_config, plan_setup, read_model
from ds_lowrank.planner.setup import Setup
from ds_lowrank.state_dict.pieces import STATE_KEY

LAYOUTS = ("one", "ddp", "zero1", "zero2", "zero3", "fsdp2")
WAYS: dict[str, dict[str, Any]] = {
    "projected": {"gradients": "projected", "accumulator_dtype": "bf16"},
    "layerwise": {"layerwise": True},
}
PASSES = ("forward", "loss", "head", "layer", "wave", "embedding")
STEPS = 4


def options(way: str, rank: int, accumulation: int) -> dict[str, Any]:
    """Of the optimizer: everything is due at the first step and at the third."""
    found = {"rank": rank, "lr": 1e-3, "gram_dtype": "float32", "update_proj_gap": 2, "stagger": False}
    found.update(state_dtype="int8", basis_dtype="int8", **WAYS[way])
    if way == "layerwise":
        found["accumulation_steps"] = accumulation
    return found


def setting(layout: str, way: str, rank: int, accumulation: int) -> Setting:
    """How LLaMA-60M is trained here."""
    chosen = options(way, rank, accumulation)
    if layout not in ZERO_STAGE:
        chosen["stochastic_rounding"] = True
    return Setting(
        layout,
        chosen,
        zero=ZERO,
        dtype="bf16" if layout in ZERO_STAGE else "fp32",  # the weights themselves are bf16
        accumulation=accumulation,
        layerwise=way == "layerwise",
        config={"communication_data_type": "bf16"},
    )


def plan(layout: str, way: str, rank: int, ranks: int, seq: int, accumulation: int) -> MemoryPlan:
    """The same run, planned."""
    known = read_model(Llama())
    chosen = options(way, rank, accumulation)
    config = low_rank_config(chosen, None)
    if layout in ZERO_STAGE:
        case = setting(layout, way, rank, accumulation)
        setup, _ = from_deepspeed(deepspeed_config(case), ranks, 512, seq=seq, device="cpu")
    else:
        kind = layout if ranks > 1 or layout == "fsdp2" else "one"
        setup = Setup(
            kind,
            ranks,
            seq,
            accumulation=accumulation,
            master="bf16",
            units="layers",
            device="cpu",
            no_sync=way == "projected",
        )
    return plan_setup(known, config, setup.of(config))


def measure(layout: str, way: str, rank: int, seq: int, accumulation: int) -> dict[str, int]:
    """Bytes on this rank over the steps. Collective."""
    gc.collect()
    torch.manual_seed(dist.get_rank())
    with Tracker() as tracker:
        model = Llama()
        if layout not in ZERO_STAGE:
            model.llama.to(torch.bfloat16)
        run = start(setting(layout, way, rank, accumulation), model)
        found: dict[str, int] = {}
        for step in range(STEPS):
            tracker.restart()
            batches = [{"tokens": torch.randint(0, 32000, (1, seq))} for _ in range(accumulation)]
            passes, stepped = _step(run, batches, tracker)
            when = ("first", "usual", "due", "usual")[step]
            found["passes, peak"] = max(passes, found.get("passes, peak", 0))
            found[f"{when} step: passes, peak"] = passes
            found[f"{when} step: step, peak"] = stepped
            gc.collect()
            found["between steps, all"] = tracker.alive
        found.update(resident_bytes(run))
        low: Any = run.optimizer.state[STATE_KEY]  # type: ignore[index]
        bases = {n: {k: s[k] for k in s if k in ("basis", "basis_codes", "basis_scale")} for n, s in low.items()}
        found["between steps: bases"] = state_bytes(bases)
        run.close()
    del run, model
    gc.collect()
    return found


def _step(run: Any, batches: list[dict[str, Any]], tracker: Tracker) -> tuple[int, int]:
    """Peaks of all backward passes of a step, and of ``step()``."""
    if isinstance(run, DeepSpeedRun):
        passes = stepped = 0
        for batch in batches:
            loss = run.engine(**batch)
            run.engine.backward(loss)
            del loss
            passes = max(passes, tracker.peak)
            tracker.restart()
            run.engine.step()
            stepped = tracker.peak
            tracker.restart()
        return passes, stepped
    for micro, batch in enumerate(batches):
        with run._synchronised(micro + 1 == len(batches)):
            loss = run._wrapped(**batch) / len(batches)
            loss.backward()
            del loss
    passes = tracker.peak
    tracker.restart()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return passes, tracker.peak


def planned(made: MemoryPlan) -> dict[str, int]:
    """The same figures from a plan."""
    ours = made.ours
    at = {moment: sum(terms.values()) for moment, terms in ours.moments.items()}
    rest = ours.moments["resident"]
    highest = max(at[m] - (ours.solver if m == "wave" else 0) for m in PASSES)
    due = max(at["norm"], at["refresh"])
    return {
        **{f"between steps: {term}": rest[term] for term in ("weights", "master", "states", "bases")},
        "between steps, all": at["resident"],
        "passes, peak": highest,
        "first step: step, peak": due,
        "due step: step, peak": due,
        "usual step: step, peak": max(at["norm"], at["step"]),
    }


def planned_rows(
    ranks: list[int], layouts: tuple[str, ...], ways: list[str], accumulations: list[int], rank: int, seq: int = 128
) -> Iterator[Row]:
    """A row a figure: the rank that measures most beside the plan."""
    for size in ranks:
        pool = RankPool(size, timeout=900)
        for layout in layouts:
            if (layout == "one" and size > 1) or (layout == "ddp" and size == 1):
                continue
            for way in ways:
                if way == "layerwise" and layout in ZERO_STAGE:
                    continue
                for accumulation in accumulations:
                    measured = pool.run(measure, layout, way, rank, seq, accumulation)
                    expected = planned(plan(layout, way, rank, size, seq, accumulation))
                    for what, count in expected.items():
                        most = max(m[what] for m in measured)
                        yield {
                            "layout": layout,
                            "ranks": size,
                            "gradients": way,
                            "accumulation": accumulation,
                            "what": what,
                            "planned": count,
                            "measured": most,
                            "planned_over_measured": count / most if most else None,
                        }
                    print(f"{layout} on {size} ranks, {way}, accumulation {accumulation}: done", flush=True)
        pool.close()
