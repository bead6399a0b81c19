"""Checkpoints: the same ranks go on bit by bit, other ranks and layouts with exactly the same state."""

from __future__ import annotations

from typing import Any

import pytest
from rank_pool import RankPool
from resume import Move, try_move

SMALL, THIN, EXPERTS = ("small", 2, 4), ("thin", 1, 2), ("experts", 1, 3)
HERE = [
    Move(("one", 1), ("one", 1)),
    Move(("ddp", 3), ("ddp", 3)),
    Move(("zero1", 2), ("zero1", 2), "bf16"),
    Move(("zero2", 3), ("zero2", 3), "bf16"),
    Move(("zero3", 3), ("zero3", 3), "bf16"),
    Move(("zero3", 2), ("zero3", 2), settings=(("offload", True),)),
    Move(("fsdp2", 3), ("fsdp2", 3), "bf16"),
    Move(("fsdp2", 3), ("fsdp2", 3), "fp32", "full"),
    Move(("hsdp", 4), ("hsdp", 4)),
]
ELSEWHERE = [
    Move(("fsdp2", 3), ("fsdp2", 2)),
    Move(("fsdp2", 2), ("fsdp2", 3), "fp32", "full"),
    Move(("zero2", 4), ("fsdp2", 2), "fp32", "any"),
    Move(("zero2", 4), ("zero3", 3), "fp32", "any"),
    Move(("zero2", 4), ("one", 1), "fp32", "any"),
    Move(("zero3", 3), ("zero2", 2), "fp32", "any"),
    Move(("fsdp2", 3), ("zero1", 2), "fp32", "any"),
    Move(("ddp", 3), ("zero3", 2), "fp32", "any"),
    Move(("one", 1), ("hsdp", 4), "fp32", "any"),
]


@pytest.fixture
def all_pools(pools) -> dict[int, RankPool]:
    return {ranks: pools(ranks) for ranks in (1, 2, 3, 4)}


def _with_shapes(moves: list[Move]) -> list[Any]:
    """Every move with the small shapes; the others where ranks hold nothing, or whole experts."""
    sharded = ("zero3", "fsdp2", "hsdp", "ddp")
    return [
        pytest.param(move, shapes, id="-".join([*map(str, move.before), *map(str, move.after), move.how, shapes[0]]))
        for move in moves
        for shapes in ((SMALL, THIN, EXPERTS) if move.before[0] in sharded and move.dtype == "fp32" else (SMALL,))
    ]


@pytest.mark.parametrize(("move", "shapes"), _with_shapes(HERE))
def test_the_same_ranks_go_on_bit_by_bit(all_pools, move, shapes):
    result = try_move(all_pools, move, shapes)
    assert result["state_equal"]
    assert result["deviation"] == 0.0


@pytest.mark.parametrize(("move", "shapes"), _with_shapes(ELSEWHERE))
def test_other_ranks_and_layouts_go_on_with_the_same_state(all_pools, move, shapes):
    result = try_move(all_pools, move, shapes)
    assert result["state_equal"]
    assert 0.0 < result["deviation"] <= 1e-5


def test_bf16_masters_and_moments_survive_a_change_of_layout(all_pools):
    assert try_move(all_pools, Move(("zero2", 2), ("zero3", 3), "bf16", "any"), SMALL)["state_equal"]


def test_sharded_and_whole_bases_are_the_same_state(all_pools):
    sharded = Move(("zero3", 2), ("zero3", 3), "fp32", "any")
    assert try_move(all_pools, sharded, SMALL)["state_equal"]
    whole = Move(("fsdp2", 2), ("fsdp2", 2), settings=(("shard_projection", False),))
    assert try_move(all_pools, whole, THIN)["deviation"] == 0.0
