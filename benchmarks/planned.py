"""The planner against runs of LLaMA-60M: what each rank holds between steps and after a backward pass, and the peaks.

Bytes are those of unique storages; peaks are followed operation by operation (``tracker.py``).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from harness import ZERO_STAGE, DeepSpeedRun, deepspeed_config, start
from llama import Llama, Setting
from rank_pool import RankPool
from storage import state_bytes
from table import Row
from tracker import Tracker

from ds_lowrank.planner import MemoryPlan, from_deepspeed, low_rank_config, plan_setup, read_model
from ds_lowrank.planner.setup import Setup
from ds_lowrank.state_dict.pieces import EIGHT_BIT_KEY, PARTS_KEY, STATE_KEY

LAYOUTS = ("zero1", "zero2", "zero3", "fsdp2")
ZERO: dict[str, Any] = {
    "reduce_bucket_size": 5_000_000,
    "allgather_bucket_size": 5_000_000,
    "sub_group_size": 1_000_000_000,
    "overlap_comm": True,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_max_live_parameters": 20_000_000,
    "stage3_max_reuse_distance": 5_000_000,
    "stage3_param_persistence_threshold": 10_000,
}
FORWARD_AND_BACKWARD = ("forward", "loss", "head", "layer", "embedding")


def setting(layout: str, dtype: str, rank: int) -> Setting:
    """How LLaMA-60M is trained here; gradients travel in the model's dtype, as they do by default."""
    config = {"communication_data_type": dtype}
    options: dict[str, Any] = {"rank": rank, "lr": 1e-3, "gram_dtype": "float32"}
    # Everything is due at the first step and at the third.
    options.update(update_proj_gap=2, stagger=False)
    return Setting(layout, options, zero=ZERO, dtype=dtype, config=config)


def plan(layout: str, dtype: str, rank: int, ranks: int, seq: int, model: torch.nn.Module) -> MemoryPlan:
    """The same run, planned."""
    known = read_model(model)
    case = setting(layout, dtype, rank)
    if layout in ZERO_STAGE:
        setup, options = from_deepspeed(deepspeed_config(case), ranks, 512, seq=seq, device="cpu")
    else:
        sharded = Setup("fsdp2", ranks, seq, dtype=dtype, units="layers", device="cpu")
        setup, options = sharded.replace(communication_dtype="fp32"), {}  # the harness' MixedPrecisionPolicy
    return plan_setup(known, low_rank_config({**case.options, **options}, None), setup)


def measure(layout: str, dtype: str, rank: int, seq: int) -> dict[str, int]:
    """Bytes on this rank over three steps. Collective."""
    gc.collect()
    torch.manual_seed(dist.get_rank())
    with Tracker() as tracker:
        model = Llama()
        run = start(setting(layout, dtype, rank), model)
        found: dict[str, int] = {}
        for step in range(3):
            tokens = torch.randint(0, 32000, (1, seq))
            tracker.restart()
            if isinstance(run, DeepSpeedRun):
                loss = run.engine(tokens=tokens)
                run.engine.backward(loss)
            else:
                loss = model(tokens=tokens)
                loss.backward()
            del loss
            passes = tracker.peak
            gradients = _gradients(run)
            tracker.restart()
            if isinstance(run, DeepSpeedRun):
                run.engine.step()
            else:
                run.optimizer.step()
                run.optimizer.zero_grad()
            # At the first step and at the third all are due, at the second none is.
            found["step with refreshes, peak" if step == 2 else "step, peak"] = tracker.peak
            gc.collect()
        found["forward and backward, peak"] = passes
        found["after backward: gradients"] = gradients
        found["between steps, all"] = tracker.alive
        found.update(resident_bytes(run))
        run.close()
    del run, model
    gc.collect()
    return found


def _gradients(run: Any) -> int:
    if not isinstance(run, DeepSpeedRun):
        return state_bytes({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    zero: Any = run.engine.optimizer
    held = {(i, j): g for i, parts in zero.averaged_gradients.items() for j, g in enumerate(parts or [])}
    return state_bytes(held)


def resident_bytes(run: Any) -> dict[str, int]:
    """Bytes of weights, masters, states and bases on this rank, by unique storages."""
    parameters = dict(run.model.named_parameters())
    buffers = dict(run.model.named_buffers())
    parts = {("part", n): p.ds_tensor for n, p in parameters.items() if hasattr(p, "ds_tensor")}
    weights = state_bytes({**{n: p.data for n, p in parameters.items()}, **parts, **buffers})
    master = 0
    if isinstance(run, DeepSpeedRun):
        zero: Any = run.engine.optimizer
        flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat
        master = state_bytes(dict(enumerate(flats)))
    low = run.optimizer.state[STATE_KEY]
    keys = (EIGHT_BIT_KEY, PARTS_KEY)
    rest = {k: s for k, s in run.optimizer.state.items() if k not in (STATE_KEY, *keys)}
    for key in keys:
        rest.update(run.optimizer.state.get(key, {}))
    full = {k: {m: s[m] for m in s if "exp_avg" in m} for k, s in rest.items()}
    moments = {n: {k: s[k] for k in s if "exp_avg" in k} for n, s in low.items()}
    return {
        "between steps: weights": weights,
        "between steps: master": master,
        "between steps: states": state_bytes({"low": moments, "full": full}),
        "between steps: bases": state_bytes({n: s["basis"] for n, s in low.items() if "basis" in s}),
    }


def planned(made: MemoryPlan, layout: str) -> dict[str, int]:
    """The same figures from a plan."""
    ours = made.ours
    at = {moment: sum(terms.values()) for moment, terms in ours.moments.items()}
    rest, after = ours.moments["resident"], ours.moments["norm"]
    found = {f"between steps: {term}": rest[term] for term in ("weights", "master", "states", "bases")}
    return {
        **found,
        "after backward: gradients": after["gradients"],
        "between steps, all": at["resident"],
        "forward and backward, peak": max(at[m] for m in FORWARD_AND_BACKWARD),
        "step, peak": max(at["norm"], at["step"]),
        # What eigh works in is allocated outside torch on a CPU.
        "step with refreshes, peak": max(at["norm"], at["refresh"] - ours.solver),
    }


def planned_rows(
    ranks: list[int], layouts: tuple[str, ...] = LAYOUTS, rank: int = 128, seq: int = 128, dtype: str = "bf16"
) -> Iterator[Row]:
    """Rows of every layout on every number of ranks: the rank that measures most beside the plan."""
    for size in ranks:
        pool = RankPool(size, timeout=600)
        for layout in layouts:
            measured = pool.run(measure, layout, dtype, rank, seq)
            expected = planned(plan(layout, dtype, rank, size, seq, Llama()), layout)
            for what, count in expected.items():
                most = max(m[what] for m in measured)
                yield {
                    "layout": layout,
                    "ranks": size,
                    "what": what,
                    "planned": count,
                    "measured": most,
                    "planned_over_measured": count / most if most else None,
                }
            print(f"{layout} on {size} ranks: done", flush=True)
        pool.close()
