"""Does a run that was stopped and resumed end where one ends that was not?

    python benchmarks/resume.py --json out.json

Twelve steps on gloo ranks against five, a checkpoint and seven more in new engines, across refreshes, over tall, wide,
square and stacked matrices, fewer rows than ranks, uneven and cut mid-row. The same twelve micro-batches make a step on
any number of ranks; where ranks and layout stay, two on each.

    format        what reads the checkpoint: ``native``, the framework; ``full``, FSDP2 whole tensors; ``any``,
                  ``ds_lowrank.load_checkpoint``
    state_equal   weights, AdamW's moments, low-rank moments, bases, indices, counters equal bit by bit after loading
    bitwise       so are the weights at the end, where ranks and layout stay the same
    deviation     ‖W − W'‖ / ‖W' − W_0‖ at the end, W' of the uninterrupted run where the checkpoint was written, the
                  largest over all parameters; ``_real``: of 1376 × 512 and 512 × 1376 matrices
    drift         the same between two uninterrupted runs, one on each side: what rounding in another order makes of
                  the trajectory by itself. In bf16 a difference in the last bit of a weight becomes one of 1/256
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, assemble, build_model, held
from harness import Run, start
from rank_pool import RankPool
from table import Row, json_argument, show
from torch import Tensor

import ds_lowrank
from ds_lowrank.full_rank.adamw8bit import AdamW8bit
from ds_lowrank.full_rank.adamw8bit_states import EightBitFullRank
from ds_lowrank.layouts import local_tensors
from ds_lowrank.optimizer import STATE_KEY, LowRankAdamW
from ds_lowrank.state_dict.pieces import EIGHT_BIT_KEY, PARTS_KEY
from ds_lowrank.states.blocks import BLOCK

STEPS, MICRO_BATCHES = (5, 7), 12
SHAPES = (("small", 3, 4), ("thin", 2, 2), ("experts", 1, 3))
REAL = ("real", 1, 32)


@dataclass(frozen=True)
class Move:
    """A checkpoint and its continuation.

    Attributes:
        before, after: layout and number of ranks that write it, and that go on with it.
        dtype: see :class:`cases.Case`.
        how: ``native``, ``full`` or ``any``.
        settings: of the case: offload, whole bases, ...
        after_settings: of the continuation; ``None``: the same.
    """

    before: tuple[str, int]
    after: tuple[str, int]
    dtype: str = "fp32"
    how: str = "native"
    settings: tuple[tuple[str, Any], ...] = ()
    after_settings: tuple[tuple[str, Any], ...] | None = None

    def case(self, place: tuple[str, int], shapes: tuple[str, int, int]) -> Case:
        """The case on one of the two sides."""
        layout, ranks = place
        name, layers, rank = shapes
        # Gradients of bf16 weights added up in fp32: a step does not depend on who adds which micro-batches.
        config: dict[str, Any] = {}
        if layout.startswith("zero") and self.dtype == "bf16":
            config = {"data_types": {"grad_accum_dtype": "fp32"}}
        case = Case(
            layout,
            self.dtype,
            shapes=name,
            layers=layers,
            rank=rank,
            gap=3,
            accumulation=2 if self.before == self.after else MICRO_BATCHES // ranks,
            config=config,
        )
        settings = {k: v for k, v in self.settings if k != "offload" or layout.startswith("zero")}
        return replace(case, moments="project" if rank == 4 else "keep", **settings)


def moves() -> Iterator[Move]:
    """The rows of the table."""
    places = [("one", 1), ("ddp", 2), ("ddp", 3), ("zero1", 2), ("zero2", 2), ("zero2", 4), ("zero3", 2), ("zero3", 3)]
    places += [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)]
    for dtype in ("fp32", "bf16"):
        for place in places:
            yield Move(place, place, dtype)
            if place[0] in ("fsdp2", "hsdp"):
                yield Move(place, place, dtype, "full")
        for stage in ("zero1", "zero2", "zero3"):
            yield Move((stage, 2), (stage, 2), dtype, settings=(("offload", True),))
        yield Move(("zero3", 2), ("zero3", 2), dtype, settings=(("shard_projection", False),))
        # DTensors fit another number of ranks by themselves.
        yield Move(("fsdp2", 2), ("fsdp2", 3), dtype)
        yield Move(("fsdp2", 3), ("fsdp2", 1), dtype, "full")
        for before, after in (
            (("zero2", 4), ("fsdp2", 2)),
            (("zero2", 4), ("zero3", 3)),
            (("zero2", 4), ("one", 1)),
            (("zero2", 2), ("zero2", 3)),
            (("zero1", 2), ("zero2", 4)),
            (("zero3", 3), ("zero3", 2)),
            (("zero3", 2), ("ddp", 3)),
            (("fsdp2", 3), ("zero2", 2)),
            (("hsdp", 4), ("zero3", 2)),
            (("fsdp2", 2), ("ddp", 2)),
            (("ddp", 3), ("fsdp2", 2)),
            (("one", 1), ("zero3", 4)),
        ):
            yield Move(before, after, dtype, "any")
    yield from low_bit_moves()


def low_bit_moves() -> Iterator[Move]:
    """Moments and bases in 8 bits; bf16 weights without a master copy, rounded stochastically."""
    int8 = (("state_dtype", "int8"), ("basis_dtype", "int8"))
    rounded = (("master", False), ("stochastic_rounding", True), ("state_dtype", "int8"), ("basis_dtype", "bf16"))
    for place in (("one", 1), ("ddp", 2), ("zero1", 2), ("zero2", 4), ("zero3", 3), ("fsdp2", 3), ("hsdp", 4)):
        yield Move(place, place, settings=int8)
    yield Move(("fsdp2", 2), ("fsdp2", 3), settings=int8)
    for before, after in (
        (("zero2", 4), ("fsdp2", 2)),
        (("zero1", 2), ("zero3", 3)),
        (("zero3", 3), ("ddp", 2)),
        (("fsdp2", 3), ("zero2", 2)),
        (("one", 1), ("zero3", 4)),
    ):
        yield Move(before, after, how="any", settings=int8)
    for place in (("one", 1), ("ddp", 2), ("zero2", 3), ("zero3", 3), ("fsdp2", 3), ("hsdp", 4)):
        yield Move(place, place, "bf16", settings=rounded)
    yield Move(("fsdp2", 3), ("fsdp2", 2), "bf16", settings=rounded)
    for before, after in (
        (("zero2", 2), ("zero3", 3)),
        (("zero3", 3), ("fsdp2", 2)),
        (("fsdp2", 2), ("ddp", 3)),
    ):
        yield Move(before, after, "bf16", "any", settings=rounded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", help="only rows in which one of these layouts takes part")
    parser.add_argument("--no-real", action="store_true", help="leave the 1376 x 512 matrices out")
    parser.add_argument("--low-bit", action="store_true", help="only the rows of narrow states and weights")
    json_argument(parser)
    args = parser.parse_args()
    pools = {ranks: RankPool(ranks, timeout=300) for ranks in (1, 2, 3, 4)}
    rows = []
    for move in low_bit_moves() if args.low_bit else moves():
        if args.layouts and not {move.before[0], move.after[0]} & set(args.layouts):
            continue
        rows.append(row(pools, move, not args.no_real))
        print(*rows[-1].values(), flush=True)
    show(rows, "Resumed against uninterrupted", args.json)


def row(pools: dict[int, RankPool], move: Move, with_real: bool = True) -> Row:
    """One row: the worst of all shapes; large matrices apart, where rounding alone drifts."""
    results = [try_move(pools, move, shapes, with_drift=True) for shapes in (*SHAPES, *[REAL] * with_real)]
    small = results[: len(SHAPES)]
    same = move.before == move.after
    return {
        "layout": move.before[0],
        "ranks_before": move.before[1],
        "ranks_after": move.after[1],
        "layout_after": move.after[0],
        "dtype": move.dtype,
        "format": move.how,
        "settings": " ".join(f"{k}={v}" for k, v in move.settings),
        "state_equal": all(r["state_equal"] for r in results),
        "bitwise": all(r["deviation"] == 0.0 for r in results) if same else None,
        "deviation": max(r["deviation"] for r in small),
        "drift": max(r["drift"] for r in small),
        "deviation_real": results[-1]["deviation"] if with_real else None,
        "drift_real": results[-1]["drift"] if with_real else None,
    }


def try_move(
    pools: dict[int, RankPool],
    move: Move,
    shapes: tuple[str, int, int],
    steps: tuple[int, int] = STEPS,
    with_drift: bool = False,
) -> dict[str, Any]:
    """Train, stop, move and go on, for ``steps`` before and after; ``with_drift`` costs another uninterrupted run."""
    before = move.case(move.before, shapes)
    settings = move.settings if move.after_settings is None else move.after_settings
    there = replace(move, settings=settings).case(move.after, shapes)
    source, target = pools[move.before[1]], pools[move.after[1]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = source.run(uninterrupted, before, steps, folder, move.how == "full")[0]
        drift = 0.0
        if with_drift and move.before != move.after:
            drift = _deviation(target.run(uninterrupted, there, steps)[0]["weights"], whole)
        resumed = target.run(resume, there, steps, folder, move.how)[0]
    equal = _equal(whole["state"], resumed["state"])
    return {"state_equal": equal, "deviation": _deviation(resumed["weights"], whole), "drift": drift}


def uninterrupted(case: Case, steps: tuple[int, int], folder: Path | None = None, full: bool = False) -> dict[str, Any]:
    """All steps; a checkpoint is written on the way, and the state then is returned with the final weights."""
    run = start(case, build_model(case))
    first = assemble(run.optimizer, held(run.optimizer))[0]
    _train(run, case, 0, steps[0])
    state = None
    if folder is not None:
        run.save(folder, full)
        state = whole_state(run.optimizer)
    _train(run, case, steps[0], sum(steps))
    weights = assemble(run.optimizer, held(run.optimizer))[0]
    run.close()
    return {"first": first, "state": state, "weights": weights}


def resume(case: Case, steps: tuple[int, int], folder: Path, how: str) -> dict[str, Any]:
    """A new model and engine, the checkpoint, and the rest of the steps."""
    model = build_model(case)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)  # nothing of it may survive
    run = start(case, model)
    if how == "any":
        ds_lowrank.load_checkpoint(folder, run.model, run.optimizer)
    else:
        run.load(folder, how == "full")
        run.optimizer.ensure_state()
    state = whole_state(run.optimizer)
    _train(run, case, steps[0], sum(steps))
    weights = assemble(run.optimizer, held(run.optimizer))[0]
    run.close()
    return {"state": state, "weights": weights}


def _train(run: Run, case: Case, start: int, stop: int) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(start, stop):
        places = [micro * ranks + rank for micro in range(case.accumulation)]
        run.step([{"seed": step * 64 + place} for place in places])


def whole_state(optimizer: LowRankAdamW) -> dict[str, Any]:
    """Everything that has to survive, by name, put together from all ranks. Collective."""
    layout = optimizer.layout
    found: dict[str, Any] = {f"{n} weight": w for n, w in assemble(optimizer, held(optimizer))[0].items()}
    projected = {plan.parameter for plan in optimizer.plans}
    eight = adamw8bit(optimizer)
    parts = getattr(optimizer.full_rank, "parts", layout)
    dealt: dict[str, Any] = optimizer.state.get(PARTS_KEY, {})  # type: ignore[call-overload]
    found.update(_eight_bit(optimizer))
    for key in ("exp_avg", "exp_avg_sq") if eight is None else ():
        pieces = {}
        for member in optimizer.members:
            if member.name in projected or member.name not in layout.pieces:
                continue
            if PARTS_KEY in optimizer.state:
                if member.name in parts.pieces:
                    pieces[member.name] = (parts.pieces[member.name], dealt[member.name][key])
                continue
            tensor, offset = layout.place(member.name)
            flat = local_tensors([optimizer.state[tensor][key]])[0].reshape(-1)
            piece = layout.pieces[member.name]
            pieces[member.name] = (piece, flat[offset : offset + layout.weight(member.name).numel()].clone())
        for rank in optimizer.comm.gather_objects(pieces):
            for name, (piece, values) in rank.items():
                target = found.setdefault(f"{name} {key}", torch.full((_numel(optimizer, name),), float("nan")))
                target[piece.start : piece.stop] = values
    counters = {}
    for member in optimizer.members:
        if eight is None and member.name not in projected and member.name in layout.pieces:
            state = dealt.get(member.name) or optimizer.state[layout.place(member.name)[0]]
            counters[member.name] = float(state["step"])
    for rank in optimizer.comm.gather_objects(counters):
        found.update({f"{name} step": torch.tensor(value) for name, value in rank.items()})
    states: dict[str, Any] = optimizer.state[STATE_KEY]  # type: ignore[index]
    plans = {p.name: p for p in optimizer.plans}
    covered: dict[str, Tensor] = {}
    for rank in optimizer.comm.gather_objects(states):
        for name, state in rank.items():
            plan = plans[name]
            for key, rows in optimizer.method.states.tensors(plan.r, plan.dtype).items():
                if key in state:
                    size = optimizer.method.states.length(key, plan.r, plan.dtype, plan.long, plan.short)
                    first = 0 if rows.axis == "matrix" else state["basis_row" if rows.axis == "basis" else "row"]
                    target = found.setdefault(f"{name} {key}", torch.zeros(size, rows.width, dtype=rows.dtype))
                    start, stop = first, first + state[key].shape[0]
                    target[start:stop] = state[key]
                    covered.setdefault(f"{name} {key}", torch.zeros(size, dtype=torch.bool))[start:stop] = True
            for key in ("step", "refreshes", "indices", "overlaps"):
                if key in state:
                    found[f"{name} {key}"] = torch.as_tensor(state[key]).clone()
    assert all(rows.all() for rows in covered.values()), "rows of a state are on no rank"
    return found


def adamw8bit(optimizer: LowRankAdamW) -> AdamW8bit | None:
    """What steps the parameters that are not projected where their moments are int8."""
    full_rank = getattr(optimizer.full_rank, "inner", optimizer.full_rank)
    return full_rank.adam if isinstance(full_rank, EightBitFullRank) else None


def _eight_bit(optimizer: LowRankAdamW) -> dict[str, Tensor]:
    """Codes and scales of parameters that are not projected, whole; ranks that keep the same must agree. Collective."""
    adam = adamw8bit(optimizer)
    if adam is None:
        return {}
    states: dict[str, Any] = optimizer.state[EIGHT_BIT_KEY]  # type: ignore[index]
    mine = {n: (adam.runs[n], adam.layout.pieces[n], states[n]) for n in adam.shapes if adam.runs[n].numel}
    found: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def put(key: str, size: int, index: Tensor, values: Tensor) -> None:
        target = found.setdefault(key, torch.zeros(size, dtype=values.dtype))
        before = seen.setdefault(key, torch.zeros(size, dtype=torch.bool))
        assert torch.equal(target[index][before[index]], values[before[index]]), f"ranks keep different {key}"
        target[index], before[index] = values, True

    for table in optimizer.comm.gather_objects(mine):
        for name, (runs, piece, state) in table.items():
            shape = adam.shapes[name]
            places = torch.arange(_numel(optimizer, name)).view(shape)
            slots, blocks = runs.used()
            if piece.dim is None:
                held = places.view(-1)[piece.start : piece.stop]
            else:
                held = places.narrow(piece.dim, piece.start, piece.stop - piece.start).reshape(-1)
            for moment in ("exp_avg", "exp_avg_sq"):
                put(f"{name} {moment}_codes", places.numel(), held, state[f"{moment}_codes"])
                put(f"{name} {moment}_scale", -(-places.numel() // BLOCK), blocks, state[f"{moment}_scale"][slots])
            found[f"{name} step"] = torch.tensor(state["step"])
    assert all(rows.all() for rows in seen.values()), "codes are on no rank"
    return found


def _numel(optimizer: LowRankAdamW, name: str) -> int:
    return next(torch.Size(m.shape).numel() for m in optimizer.members if m.name == name)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(v.dtype == b[k].dtype and torch.equal(v, b[k]) for k, v in a.items())


def _deviation(weights: dict[str, Tensor], whole: dict[str, Any]) -> float:
    ends, first = whole["weights"], whole["first"]
    return max(float((weights[n] - w).norm() / (w - first[n]).norm()) for n, w in ends.items())


if __name__ == "__main__":
    main()
