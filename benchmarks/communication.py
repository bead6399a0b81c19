"""How many bytes does a step send, and a refresh, beside the closed formula of each purpose?

    python benchmarks/communication.py --json out.json
    python benchmarks/communication.py --wire --json out.json      # projected gradients beside full ones, see wire.py

Every layout on 2 and 4 gloo ranks, one row a purpose: what ``optimizer.comm`` counted over all ranks, and what a
formula says that is made from shapes and the layout's rule of sharding, not from the optimizer's plan. ``step`` is an
ordinary step, ``refresh`` what a step in which every matrix refreshes sends beside that; ``most`` is the largest
amount of one rank. The script fails where a count is not its formula.

N ranks, C copies of the model (2 under HSDP, else 1) of S = N / C ranks; W is m × n, its shorter side s, the longer l.
Numbers over all ranks, 4 bytes each but for verdicts (8):

    gradient rows     wide and sharded by rows: C·mn(S-1)/S, that is mn(S-1)/S² a rank; tall: of rows that a boundary
                      cuts what lies behind it; nothing for whole rows (FSDP2) and for whole matrices (ZeRO-1/2 models)
    updates           the same on the way back
    weights           DDP: l·s(N-1), every rank hands its rows to all others
    bases joined      C·s·r(S-1): every rank sends its s/S rows of the basis to the S-1 others
    Gram matrices     s²(S-1), to the owner, in one copy of the model only
    bases             r(C·s - s/S): from the owner to the keepers of each slice
    overlaps          r²(S-1): what the slices of two bases overlap, to the owner, in one copy of the model only
    refresh verdicts  (N-1)(1+r): the indices drawn, to every rank

An all-gather on gloo pads parts of unequal size: the formulas have s/S rounded up where it joins bases, l/N where it
joins weights.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence

from harness import start
from llama import LAYER, LAYERS, SQUARE, TALL, WIDE, Matrices, Setting
from rank_pool import RankPool
from table import Row, json_argument, show

LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "fsdp2 long side", "hsdp")
STEP = ("gradient rows", "updates", "weights", "bases joined")
REFRESH = ("Gram matrices", "bases", "overlaps", "refresh verdicts")
CUT = (1375, 512)  # 2 and 4 ranks' equal parts end in the middle of a row
MATRICES = {f"{m} x {n}": (m, n) for m, n in (TALL, CUT, SQUARE, WIDE)}
WHOLE_MODEL = f"{LAYERS} layers"
FLOAT, VERDICT = 4, 8

Shape = tuple[int, int]
Model = Sequence[Sequence[Shape]]
Bytes = dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=[2, 4])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--matrices", nargs="+", default=[*MATRICES, WHOLE_MODEL], choices=[*MATRICES, WHOLE_MODEL])
    parser.add_argument("--rank", type=int, default=128, help="r")
    parser.add_argument("--wire", action="store_true", help="training runs, as the kernel counts, see wire.py")
    wire = parser.add_argument_group("with --wire, where --rank is LLaMA-60M's r, and 130M's is 3/2 of it")
    wire.add_argument("--models", nargs="+", default=["llama_60m"], help="of configs/")
    wire.add_argument("--update_proj_gap", type=int, default=20)
    wire.add_argument("--steps", type=int, default=40)
    wire.add_argument("--gradients", nargs="+", help="rows that are wanted; default: all")
    json_argument(parser)
    args = parser.parse_args()
    if args.wire:
        measure_wire(args)
        return
    models: dict[str, Model] = {name: [[shape]] for name, shape in MATRICES.items()}
    models[WHOLE_MODEL] = [LAYER] * LAYERS
    rows: list[Row] = []
    for ranks in args.ranks:
        pool = RankPool(ranks, timeout=300)
        for layout in args.layouts:
            for name in args.matrices:
                counted = pool.run(measure, layout, models[name], args.rank)
                rows += traffic_rows(layout, name, counted, models[name], args.rank)
            print(f"{layout} on {ranks} ranks: done", flush=True)
        pool.close()
    show(rows, f"Bytes sent, all ranks together, r = {args.rank}", args.json)
    wrong = [row for row in rows if row["bytes"] != row["formula"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} counts are not their formulas: {wrong[0]}")


def measure_wire(args: argparse.Namespace) -> None:
    """The rows of wire.py."""
    from wire import CONTENDERS, beyond, cases, wire_rows

    layouts = [layout for layout in args.layouts if layout in CONTENDERS]
    models = {model: [args.rank * 3 // 2 if model == "llama_130m" else args.rank] for model in args.models}
    wanted = cases(layouts, models, args.update_proj_gap, args.steps, args.gradients)
    rows = [row for ranks in args.ranks for row in wire_rows(wanted, ranks)]
    show(rows, f"Bytes on the wire, update_proj_gap {args.update_proj_gap}, {args.steps} steps", args.json)
    if more := beyond(rows):
        raise SystemExit(f"{len(more)} of {len(rows)} rows send more than required: {more[0]}")


def traffic_rows(layout: str, name: str, counted: Sequence[dict[str, Bytes]], model: Model, rank: int) -> list[Row]:
    """A row for every purpose that sends something or should; one of zeros for an event in which none does."""
    expected = expected_bytes(layout, len(counted), model, rank)
    rows = []
    for event, purposes in (("step", STEP), ("refresh", REFRESH)):
        kinds = {p for c in counted for p, n in c[event].items() if n} | {p for p in purposes if expected[p]}
        for purpose in sorted(kinds) or ["nothing"]:
            sent = [c[event].get(purpose, 0) for c in counted]
            row = {"layout": layout, "ranks": len(counted), "matrix": name, "event": event, "purpose": purpose}
            formula = expected.get(purpose, 0) if purpose in purposes else 0
            rows.append({**row, "bytes": sum(sent), "formula": formula, "most": max(sent)})
    return rows


def measure(layout: str, model: Model, rank: int) -> dict[str, Bytes]:
    """Bytes that this rank sends in an ordinary step and, beside them, in a refresh that is not the first. Collective.

    Args:
        layout: one of ``LAYOUTS``.
        model: (m, n) of the matrices of each layer.
        rank: r.
    """
    options = {"rank": rank, "update_proj_gap": 2, "stagger": False, "gram_dtype": "float32", "lr": 1e-3}
    run = start(Setting(layout.split()[0], options, layout.endswith("long side")), Matrices(model))
    run.step([{"seed": 0}])
    counted = []
    for seed in (1, 2):  # ordinary, due
        run.optimizer.comm.reset()
        run.step([{"seed": seed}])
        counted.append(Counter(run.optimizer.comm.sent_bytes))
    run.close()
    ordinary, due = counted
    due.subtract(ordinary)
    return {"step": dict(ordinary), "refresh": dict(due)}


def expected_bytes(layout: str, ranks: int, model: Model, rank: int) -> Bytes:
    """The formulas: bytes over all ranks by purpose.

    A model of one matrix or of layers that divide by the ranks (of which ZeRO-1/2 cut none).
    """
    total: Counter[str] = Counter(dict.fromkeys(STEP + REFRESH, 0))
    if layout in ("zero1", "zero2") and len(model) % ranks == 0:
        return dict(total)
    for shape in (shape for layer in model for shape in layer):
        total.update(_expected_of_one(layout, ranks, shape, rank))
    return dict(total)


def _expected_of_one(layout: str, ranks: int, shape: Shape, rank: int) -> Bytes:
    short, long = sorted(shape)
    copies = 2 if layout == "hsdp" else 1
    shards = ranks // copies
    part = -(-short // shards)  # rows of the basis in a slice
    moving = copies * moving_numbers(layout, shards, shape)
    return {
        "gradient rows": moving * FLOAT,
        "updates": moving * FLOAT,
        "weights": ranks * (ranks - 1) * -(-long // ranks) * short * FLOAT if layout == "ddp" else 0,
        "bases joined": copies * shards * (shards - 1) * part * rank * FLOAT,
        "Gram matrices": (shards - 1) * short**2 * FLOAT,
        "bases": (copies * short - part) * rank * FLOAT,
        "overlaps": (shards - 1) * rank**2 * FLOAT,
        "refresh verdicts": (ranks - 1) * (1 + rank) * VERDICT,
    }


def moving_numbers(layout: str, shards: int, shape: Shape) -> int:
    """Gradient elements of one copy of a matrix that are computed elsewhere than they lie."""
    m, n = shape
    wide = m < n
    if layout == "ddp" or (layout == "fsdp2 long side" and wide and n % shards == 0):
        return 0
    if layout in ("zero1", "zero2"):  # one flat buffer, padded to a multiple of 2 N
        held = 2 * -(-m * n // (2 * shards))
    elif layout == "zero3":
        held = -(-m * n // shards)
    else:  # whole rows
        held = -(-m // shards) * n
    cuts = [min(k * held, m * n) for k in range(shards + 1)]
    if wide:  # rank k computes the columns from n · cut / mn on
        columns = [n * cut // (m * n) for cut in cuts]
        own = [
            _before(cuts[k + 1], n, columns[k], columns[k + 1]) - _before(cuts[k], n, columns[k], columns[k + 1])
            for k in range(shards)
        ]
        return m * n - sum(own)
    # A row is computed where it begins: what a rank holds before its first beginning of a row moves.
    return sum(min(-(-a // n) * n, b) - a for a, b in itertools.pairwise(cuts))


def _before(stop: int, n: int, left: int, right: int) -> int:
    """How many of the first ``stop`` elements of a matrix lie in the columns [left, right) of n."""
    rows, rest = divmod(stop, n)
    return rows * (right - left) + min(max(rest - left, 0), right - left)


if __name__ == "__main__":
    main()
