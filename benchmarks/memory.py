"""How many bytes of optimizer state does each rank hold, measured?

    python benchmarks/memory.py --json out.json

LLaMA-60M under ZeRO-2 on 1, 2 and 4 gloo ranks, after a step: ``share`` is the rank's part of the total over ranks.
Then one LLaMA-130M layer on one process beside its peers: ``ratio_to_adamw``. Every figure counts unique storages, so
that a view counts as all that it keeps alive.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rank_pool import RankPool
from step import LAYERS, _adamw, _galore, _ours
from storage import state_bytes
from table import Row, json_argument, show

MODEL = Path(__file__).parent.parent / "configs" / "llama_60m.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", type=int, default=128, help="r of LLaMA-60M")
    json_argument(parser)
    args = parser.parse_args()
    rows = layer_rows()
    for ranks in args.ranks:
        pool = RankPool(ranks, timeout=600)
        rows += zero_rows(pool, args.rank)
        pool.close()
        print(f"{ranks} ranks: done", flush=True)
    show(rows, "Optimizer state, bytes measured after a step", args.json)


def zero_rows(pool: RankPool, rank: int) -> list[Row]:
    """Rows of LLaMA-60M under ZeRO-2, a rank each and a kind of state each."""
    measured = pool.run(measure_zero2, rank)
    rows = []
    for what in measured[0]:
        total = sum(m[what] for m in measured)
        adamw = sum(m["AdamW, same sharding"] for m in measured)
        for k, m in enumerate(measured):
            share = m[what] / total if total else None
            rows.append(_row("zero2", pool.size, k, what, m[what], share, total / adamw))
    return rows


def measure_zero2(rank: int) -> dict[str, int]:
    """One step of LLaMA-60M on all ranks; bytes by kind on this one. Collective."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    import ds_lowrank
    from ds_lowrank.optimizer import STATE_KEY

    settings = json.loads(MODEL.read_text())
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000},
        "lowrank": {"rank": rank, "lr": 1e-3, "gram_dtype": "float32"},
    }
    optimizer = ds_lowrank.deepspeed_optimizer(model, ds_config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    tokens = torch.randint(0, config.vocab_size, (1, 64))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    low = optimizer.state[STATE_KEY]  # type: ignore[index]
    full = {k: v for k, v in optimizer.state.items() if k != STATE_KEY}
    flats = [p.numel() for g in optimizer.param_groups for p in g["params"]]
    result = {
        "low-rank moments": state_bytes({n: {k: s[k] for k in s if "exp_avg" in k} for n, s in low.items()}),
        "bases": state_bytes({n: s["basis"] for n, s in low.items() if "basis" in s}),
        "full-rank moments": state_bytes(full),
        "total": state_bytes(dict(optimizer.state)),
        "AdamW, same sharding": 8 * sum(flats),
    }
    engine.destroy()
    return result


def layer_rows() -> list[Row]:
    """One LLaMA-130M layer at r = h/4 in fp32, beside AdamW and galore-torch."""
    hidden, inner, rank = LAYERS["130m"]
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    held = {}
    for what, (optimizer, _) in {
        "AdamW": _adamw(shapes, "cpu"),
        "galore-torch": _galore(shapes, rank, "cpu"),
        "ours": _ours(shapes, rank, "cpu", "float32"),
    }.items():
        optimizer.step()
        held[what] = state_bytes(optimizer.state)
    return [_row("llama-130m layer", 1, 0, what, n, 1.0, n / held["AdamW"]) for what, n in held.items()]


def _row(layout: str, ranks: int, rank: int, what: str, count: int, share: float | None, ratio: float) -> Row:
    row: dict[str, Any] = {"layout": layout, "ranks": ranks, "rank": rank, "what": what, "bytes": count}
    return {**row, "share": share, "ratio_to_adamw": ratio}


if __name__ == "__main__":
    main()
