"""How much longer than an ordinary step does a step with refreshes take, and does a wave get faster with the ranks?

    python benchmarks/waves.py --json out.json

LLaMA-60M under FSDP2, a refresh of every matrix each 50 steps: in waves of 8 or of 2 matrices, all at once, and
galore-torch on the same sharded model. A step's time is the slowest rank's, and the shortest of several identical runs
at the same step index, so that what the machine did besides falls out; ``longest`` is the longest of all steps but
step 0, in which everything refreshes, and ``median`` that of the same steps. Three things are timed:

    optimizer, matrices alone   ``optimizer.step()`` of the 56 projected matrices, gradients random and fixed: nothing
                                else dilutes a refresh
    optimizer, whole model      ``optimizer.step()`` while the model trains, embedding and head in plain AdamW
    training step               forward, backward and that

Then a wave of 8 by itself, on 1, 2 and 4 ranks: ``median`` is its wall time, exchanges included, and
``decompositions`` what its decompositions took added up over the ranks. It can fall only as far as there are cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from harness import shard
from llama import LAYER, LAYERS, Llama, Matrices, Setting
from rank_pool import RankPool
from table import Row, json_argument, show
from torch import nn

import ds_lowrank

RANK, GAP = 128, 50
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
REFRESHES: dict[str, dict[str, Any]] = {
    "waves of 8": {"wave_size": 8},
    "waves of 2": {"wave_size": 2},
    "all at once": {"stagger": False},
}
GALORE = "galore-torch"
MATRICES, OPTIMIZER, TRAINING, WAVE = (
    "optimizer, matrices alone",
    "optimizer, whole model",
    "training step",
    "one wave",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="+", choices=["matrices", "training", "wave"], default=["matrices", "wave"])
    parser.add_argument("--refreshes", nargs="+", choices=[*REFRESHES, GALORE], default=[*REFRESHES, GALORE])
    parser.add_argument("--gram", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--wave-ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="a rank and a training step")
    json_argument(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    pool = RankPool(args.ranks, timeout=600)
    for what in [w for w in args.measure if w != "wave"]:
        for refreshes in args.refreshes:
            for gram in args.gram if refreshes != GALORE else [None]:
                tokens = args.tokens if what == "training" else None
                runs = [pool.run(time_steps, refreshes, gram, args.steps, tokens) for _ in range(args.runs)]
                for measured in runs[0][0]:
                    spent = [[[step * 1e3 for step in rank[measured]] for rank in run] for run in runs]
                    rows.append(step_row(measured, refreshes, gram, spent))
                    print(*rows[-1].values(), flush=True)
    pool.close()
    if "wave" in args.measure:
        for ranks in args.wave_ranks:
            pool = RankPool(ranks, timeout=600)
            for gram in args.gram:
                rows.append(wave_row(gram, [pool.run(time_waves, gram) for _ in range(args.runs)]))
                print(*rows[-1].values(), flush=True)
            pool.close()
    title = f"A step of LLaMA-60M with r = {RANK}, refreshes every {GAP} steps, {os.cpu_count()} cores: milliseconds"
    show(rows, title, args.json)


def step_row(measured: str, refreshes: str, gram: str | None, spent: list[list[list[float]]]) -> Row:
    """One row from milliseconds by run, rank and step."""
    runs = [[max(ranks) for ranks in zip(*run)] for run in spent]
    first, *rest = [min(steps) for steps in zip(*runs)]
    row = _row(measured, refreshes, gram, len(spent[0]))
    longest, median = max(rest), statistics.median(rest)
    return {**row, "first": first, "median": median, "longest": longest, "longest_over_median": longest / median}


def wave_row(gram: str, runs: list[list[list[tuple[float, float]]]]) -> Row:
    """One row from (seconds, of which decomposing) by run, rank and wave."""
    shortest = []
    for wave in zip(*(zip(*run) for run in runs)):  # the same wave of every run, rank by rank
        walls = [max(seconds for seconds, _ in ranks) for ranks in wave]
        best = min(range(len(walls)), key=walls.__getitem__)
        shortest.append((walls[best], sum(decomposing for _, decomposing in wave[best])))
    wall, work = (1e3 * statistics.median(values) for values in zip(*shortest))
    row = _row(WAVE, "waves of 8", gram, len(runs[0]))
    return {**row, "median": wall, "decompositions": work, "wall_over_decompositions": wall / work}


def _row(measured: str, refreshes: str, gram: str | None, ranks: int) -> Row:
    row: Row = {"measured": measured, "refreshes": refreshes, "gram": gram or "-", "ranks": ranks}
    empty = ("first", "median", "longest", "longest_over_median", "decompositions", "wall_over_decompositions")
    return {**row, **dict.fromkeys(empty)}


def time_steps(refreshes: str, gram: str | None, steps: int, tokens: int | None) -> dict[str, list[float]]:
    """Seconds of every step on this rank. Collective.

    Args:
        refreshes: key of ``REFRESHES``, or galore-torch.
        gram: dtype of the Gram.
        steps: how many.
        tokens: of a sequence that the model trains on; ``None``: the matrices alone.
    """
    model = Llama() if tokens else Matrices([LAYER] * LAYERS)
    shard(Setting("fsdp2", {}), model)
    optimizer = _galore(model) if refreshes == GALORE else _ours(model, {**REFRESHES[refreshes], "gram_dtype": gram})
    generator = torch.Generator().manual_seed(dist.get_rank())
    if tokens is None:
        model(0).backward()
    whole, alone = [], []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        if tokens:
            model(torch.randint(0, 32000, (1, tokens), generator=generator)).backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        whole.append(end - start)
        alone.append(end - middle)
        if tokens:
            optimizer.zero_grad()
    return {TRAINING: whole, OPTIMIZER: alone} if tokens else {MATRICES: alone}


def time_waves(gram: str, periods: int = 2) -> list[tuple[float, float]]:
    """Seconds that each refresh of a wave took on this rank, and its own decompositions of them. Collective."""
    waves = -(-len(LAYER) * LAYERS // 8)
    model = Matrices([LAYER] * LAYERS)
    shard(Setting("fsdp2", {}), model)
    optimizer = _ours(model, {"wave_size": 8, "gram_dtype": gram, "update_proj_gap": waves})  # every step has its wave
    model(0).backward()
    optimizer.step()
    optimizer.take_stats()
    found = []
    for _ in range(periods * waves):
        dist.barrier()
        optimizer.step()
        stats = optimizer.take_stats()
        found.append((stats.seconds, stats.decomposing))
    return found


def _ours(model: nn.Module, options: dict[str, Any]) -> ds_lowrank.LowRankAdamW:
    return ds_lowrank.build_optimizer(model, {"rank": RANK, "update_proj_gap": GAP, **ADAMW, **options})


def _galore(model: nn.Module) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    projected = ds_lowrank.projected_names(model, ds_lowrank.LowRankConfig(rank=RANK))
    named = dict(model.named_parameters())
    group = {"params": [named[n] for n in projected], "rank": RANK, "update_proj_gap": GAP, "scale": 0.25}
    groups: list[dict[str, Any]] = [{**group, "proj_type": "std"}]
    rest = [p for n, p in named.items() if n not in projected]
    return GaLoreAdamW(groups + ([{"params": rest}] if rest else []), no_deprecation_warning=True, **ADAMW)


if __name__ == "__main__":
    main()
