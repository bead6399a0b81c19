"""How many bytes of optimizer state does each rank hold, measured?

    python benchmarks/memory.py --json out.json
    python benchmarks/memory.py --planned --json out.json      # the planner beside measured bytes and peaks
    python benchmarks/memory.py --planned --gradients projected layerwise --json out.json

LLaMA-60M under every layout on 1, 2 and 4 gloo ranks, after a step: ``share`` is the rank's part of the total over
ranks, ``of_even_part`` what it holds over an N-th of what one rank alone holds; under 1.05 means that the state is
shared out and nothing of it repeated. Before that one layer of LLaMA-130M and of LLaMA-1B at r = h/4 on one process,
ours in every format beside its peers: ``ratio_to_adamw``. Every figure counts unique storages, so that a view counts
as all that it keeps alive.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import start
from llama import Llama, Setting
from rank_pool import RankPool
from step import ADAMW, LAYERS, Contestant, Shapes, _adamw, _galore, _ours, _weights
from storage import state_bytes
from table import Row, json_argument, show

LAYOUTS = ("zero2", "zero3", "fsdp2", "ddp")
FORMATS = (("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16"), ("int8", "int8"), ("int8", "int4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=("one", "zero1", *LAYOUTS))
    parser.add_argument("--rank", type=int, default=128, help="r of LLaMA-60M")
    parser.add_argument("--planned", action="store_true", help="the planner beside what is measured, see planned.py")
    parser.add_argument(
        "--gradients", nargs="+", choices=("projected", "layerwise"), help="with --planned: in the place of full ones"
    )
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4], help="of these")
    json_argument(parser)
    args = parser.parse_args()
    if args.planned and args.gradients:
        import planned_projected

        layouts = tuple(args.layouts) if args.layouts != LAYOUTS else planned_projected.LAYOUTS
        rows = list(
            planned_projected.planned_rows(args.ranks, layouts, args.gradients, args.accumulation, rank=args.rank)
        )
        show(rows, "Memory of LLaMA-60M in bf16 without a master, planned and measured, in bytes", args.json)
        return
    if args.planned:
        from planned import planned_rows

        rows = list(planned_rows(args.ranks, rank=args.rank))
        show(rows, "Memory of LLaMA-60M in bf16, planned and measured, in bytes", args.json)
        return
    rows = layer_rows()
    alone: dict[str, dict[str, int]] = {}  # by layout
    for ranks in sorted({1, *args.ranks}):
        pool = RankPool(ranks, timeout=600)
        for layout in args.layouts:
            measured = pool.run(measure, layout, args.rank)
            alone.setdefault(layout, measured[0])
            if ranks in args.ranks:
                rows += layout_rows(layout, measured, alone[layout])
            print(f"{layout} on {ranks} ranks: done", flush=True)
        pool.close()
    show(rows, "Optimizer state, bytes measured after a step", args.json)


def layout_rows(layout: str, measured: list[dict[str, int]], alone: dict[str, int]) -> list[Row]:
    """Rows of LLaMA-60M under one layout, a rank each and a kind of state each."""
    rows = []
    adamw = sum(m.pop("AdamW, same sharding") for m in measured)
    for what in measured[0]:
        total = sum(m[what] for m in measured)
        for k, m in enumerate(measured):
            share = m[what] / total if total else None
            even = m[what] * len(measured) / alone[what]
            rows.append(_row(layout, len(measured), k, what, m[what], share, even, total / adamw))
    return rows


def measure(layout: str, rank: int) -> dict[str, int]:
    """One step of LLaMA-60M on all ranks; bytes by kind on this one. Collective."""
    from ds_lowrank.optimizer import STATE_KEY

    run = start(Setting(layout, {"rank": rank, "lr": 1e-3, "gram_dtype": "float32"}), Llama())
    run.step([{"tokens": torch.randint(0, 32000, (1, 64))}])
    optimizer = run.optimizer
    low = optimizer.state[STATE_KEY]  # type: ignore[index]
    full = {k: v for k, v in optimizer.state.items() if k != STATE_KEY}
    moments = {n: {k: s[k] for k in s if k.startswith("exp_avg")} for n, s in low.items()}
    bases = {n: {k: s[k] for k in s if k.split("_")[0] == "basis" and k != "basis_row"} for n, s in low.items()}
    held = [optimizer.layout.weight(name).numel() for name in optimizer.layout.pieces]
    result = {
        "low-rank moments": state_bytes(moments),
        "bases": state_bytes(bases),
        "low-rank state": state_bytes(low),
        "full-rank moments": state_bytes(full),
        "total": state_bytes(dict(optimizer.state)),
        "AdamW, same sharding": 8 * sum(held),
    }
    run.close()
    return result


def layer_rows() -> list[Row]:
    """One layer of LLaMA-130M and of LLaMA-1B at r = h/4, beside AdamW, 8-bit AdamW and galore-torch, all in fp32."""
    rows = []
    for name, (hidden, inner, rank) in LAYERS.items():
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        contestants: dict[str, Callable[[], Contestant]] = {"AdamW": partial(_adamw, shapes, "cpu")}
        if importlib.util.find_spec("bitsandbytes") is not None:
            contestants["bitsandbytes AdamW8bit"] = partial(_adamw_8bit, shapes)
        contestants["galore-torch"] = partial(_galore, shapes, rank, "cpu")
        ours = partial(_ours, shapes, rank, "cpu", "float32")
        for moments, bases in FORMATS:
            key = f"ours, {moments} moments, {bases} bases"
            contestants[key] = partial(ours, state_dtype=moments, basis_dtype=bases)
        held: dict[str, int] = {}
        for what, build in contestants.items():
            optimizer, _ = build()
            optimizer.step()
            held[what] = state_bytes(optimizer.state)
            print(f"llama-{name} layer, {what}: {held[what] / held['AdamW']:.3f}", flush=True)
        rows += [_row(f"llama-{name} layer", 1, 0, what, n, 1.0, None, n / held["AdamW"]) for what, n in held.items()]
    return rows


def _adamw_8bit(shapes: Shapes) -> Contestant:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(_weights(shapes, "cpu"), **ADAMW), None


def _row(
    layout: str, ranks: int, rank: int, what: str, count: int, share: float | None, even: float | None, ratio: float
) -> Row:
    row: dict[str, Any] = {"layout": layout, "ranks": ranks, "rank": rank, "what": what, "bytes": count}
    return {**row, "share": share, "of_even_part": even, "ratio_to_adamw": ratio}


if __name__ == "__main__":
    main()
