"""Moments and bases in bf16, int8 and int4 under every layout: one trajectory, one state, every weight moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, arguments, assemble, brief, build_model, held, run_case
from harness import start
from rank_pool import RankPool
from resume import Move, try_move
from storage import state_bytes
from tiers import slow_except

from ds_lowrank.optimizer import STATE_KEY

INT8: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int8"}
INT4: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int4"}
BF16: dict[str, Any] = {"state_dtype": "bf16", "basis_dtype": "bf16"}
SMALL, THIN, EXPERTS = ("small", 2, 4), ("thin", 1, 2), ("experts", 1, 3)
MANY_RANKS = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")


@pytest.fixture
def all_pools(pools) -> dict[int, RankPool]:
    return {ranks: pools(ranks) for ranks in (1, 2, 3, 4)}


SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "1-int8": (1, INT8),
    "3-int8-project": (3, {**INT8, "moments": "project", "selection": "dominant"}),
    "2-int4-stacked-experts": (2, {**INT4, "shapes": "experts", "rank": 3}),
    "3-bf16-thin-whole-bases": (3, {**BF16, "shapes": "thin", "rank": 2, "shard_projection": False}),
}
ORDINARY = [f"3-int8-project-{layout}" for layout in ("ddp", "zero3", "fsdp2")]


@pytest.mark.parametrize(
    ("ranks", "settings", "layout"),
    slow_except(
        ORDINARY,
        [pytest.param(*row, layout, id=f"{name}-{layout}") for name, row in SETTINGS.items() for layout in MANY_RANKS],
    ),
)
def test_the_update_is_that_of_a_reference_that_rounds_where_we_keep(pools, ranks, layout, settings):
    """To one code: where the reference's last bit tips a number over to the next, a step of one entry differs."""
    results = pools(ranks).run(run_case, brief(ranks, layout=layout, **settings), with_free=False)
    assert results[0]["deviation"] < 2e-3
    assert all(r["ranks_equal"] and r["replicas_equal"] and r["model_equal"] for r in results)


HERE = [
    (Move(("one", 1), ("one", 1), settings=tuple(INT8.items())), (SMALL,)),
    (Move(("ddp", 3), ("ddp", 3), settings=tuple(INT4.items())), (SMALL,)),
    (Move(("zero2", 3), ("zero2", 3), "bf16", settings=tuple(INT8.items())), (SMALL,)),
    (Move(("zero3", 3), ("zero3", 3), settings=tuple(INT4.items())), (SMALL, THIN, EXPERTS)),
    (Move(("fsdp2", 3), ("fsdp2", 3), settings=tuple(INT8.items())), (SMALL, THIN, EXPERTS)),
    (Move(("fsdp2", 2), ("fsdp2", 2), "fp32", "full", settings=tuple(BF16.items())), (SMALL,)),
    (Move(("hsdp", 4), ("hsdp", 4), settings=tuple(INT8.items())), (SMALL,)),
]
ELSEWHERE = [
    (Move(("fsdp2", 3), ("fsdp2", 2), settings=tuple(INT8.items())), (SMALL, EXPERTS)),
    (Move(("zero2", 4), ("fsdp2", 2), "fp32", "any", settings=tuple(INT8.items())), (SMALL, THIN)),
    (Move(("fsdp2", 3), ("zero3", 2), "fp32", "any", settings=tuple(INT4.items())), (SMALL, EXPERTS)),
    (Move(("zero3", 3), ("one", 1), "fp32", "any", settings=tuple(INT8.items())), (SMALL,)),
    (Move(("ddp", 3), ("zero2", 2), "fp32", "any", settings=tuple(BF16.items())), (SMALL,)),
]


# Native saves of one format a framework, and one move to another framework.
ORDINARY_HERE = ["ddp-3-ddp-3-int8-int4-small", "zero3-3-zero3-3-int8-int4-small", "fsdp2-3-fsdp2-3-int8-int8-small"]
ORDINARY_ELSEWHERE = ["fsdp2-3-zero3-2-int8-int4-small"]


def _rows(moves, ordinary: list[str]) -> list[Any]:
    rows = [
        pytest.param(
            move,
            shapes,
            id="-".join([*map(str, move.before), *map(str, move.after), *dict(move.settings).values(), shapes[0]]),
        )
        for move, many in moves
        for shapes in many
    ]
    return slow_except(ordinary, rows)


@pytest.mark.parametrize(("move", "shapes"), _rows(HERE, ORDINARY_HERE))
def test_the_same_ranks_go_on_bit_by_bit(all_pools, move, shapes):
    result = try_move(all_pools, move, shapes, steps=(4, 3))
    assert result["state_equal"]
    assert result["deviation"] == 0.0


@pytest.mark.parametrize(("move", "shapes"), _rows(ELSEWHERE, ORDINARY_ELSEWHERE))
def test_other_ranks_and_layouts_have_the_same_codes_and_scales(all_pools, move, shapes):
    assert try_move(all_pools, move, shapes, steps=(4, 1))["state_equal"]


PLACES = [("one", 1), ("ddp", 2), ("zero2", 3), ("zero3", 2), ("fsdp2", 3)]


@pytest.mark.parametrize("settings", [INT8, INT4, BF16], ids=["int8", "int4", "bf16"])
@pytest.mark.parametrize(("layout", "ranks"), slow_except([("one", 1)], PLACES))
def test_every_weight_of_every_size_moves_in_the_first_step(pools, layout, ranks, settings):
    """An 8-bit GaLore that leaves small matrices where they are has been published."""
    for shapes, rank in (("small", 4), ("thin", 2), ("experts", 3)):
        case = Case(layout=layout, shapes=shapes, rank=rank, layers=2, weight_decay=0.0, **settings)
        still = pools(ranks).run(_stand_still, case)[0]
        assert still == {}


def _stand_still(case: Case) -> dict[str, int]:
    """Name of a projected parameter -> weights that one step leaves where they were."""
    run = start(case, build_model(case))
    before, _ = assemble(run.optimizer, held(run.optimizer))
    rank = torch.distributed.get_rank()
    run.step([arguments(case, 0, micro, rank) for micro in range(case.accumulation)])
    after, _ = assemble(run.optimizer, held(run.optimizer))
    projected = {plan.parameter for plan in run.optimizer.plans}
    run.close()
    return {n: count for n in projected if (count := int((after[n] == before[n]).sum()))}


@pytest.mark.parametrize("layout", slow_except(["zero2", "fsdp2"], ["ddp", "zero2", "zero3", "fsdp2"]))
def test_reported_bytes_are_the_bytes_that_are_held(pools, layout):
    for settings in (INT8, INT4, BF16):
        for reported, found in pools(2).run(_bytes, Case(layout=layout, shapes="small", layers=2, **settings)):
            assert reported == found


def _bytes(case: Case) -> tuple[int, int]:
    """What the formats say of the low-rank tensors of this rank, and what lies in memory."""
    run = start(case, build_model(case))
    run.step([arguments(case, 0, micro, torch.distributed.get_rank()) for micro in range(case.accumulation)])
    optimizer = run.optimizer
    rank = optimizer.layout.ranks.rank
    said = 0
    for plan in optimizer.plans:
        share = plan.shares[rank]
        if share is not None:
            said += optimizer.method.states.bytes(share.rows, plan.kept(rank), plan.r)
    keys = optimizer.method.states.tensors(1, torch.float32)
    states: dict[str, Any] = optimizer.state[STATE_KEY]  # type: ignore[index]
    found = state_bytes({n: {k: s[k] for k in keys if k in s} for n, s in states.items()})
    run.close()
    return said, found
