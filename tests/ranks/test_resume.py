"""Checkpoints: the same ranks go on bit by bit, other ranks and layouts with exactly the same state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, build_model
from harness import start
from rank_pool import RankPool
from resume import Move, resume, try_move, uninterrupted, whole_state
from tiers import slow_except

import ds_lowrank

# bf16 weights without an fp32 master copy, rounded by their place and the step.
ROUNDED = (("master", False), ("stochastic_rounding", True))
# With fp32 accumulation stage 1 keeps a master copy all the same.
PLAIN = (("config", {}),)
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
    Move(("zero1", 2), ("zero1", 2), "bf16", settings=(*ROUNDED, *PLAIN)),
    Move(("zero2", 3), ("zero2", 3), "bf16", settings=ROUNDED),
    Move(("zero3", 3), ("zero3", 3), "bf16", settings=ROUNDED),
    Move(("fsdp2", 3), ("fsdp2", 3), "bf16", settings=ROUNDED),
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


class _Pools(dict[int, RankPool]):
    """Started when they are first asked for."""

    def __init__(self, start):
        super().__init__()
        self._start = start

    def __missing__(self, ranks: int) -> RankPool:
        return self._start(ranks)


@pytest.fixture
def all_pools(pools) -> dict[int, RankPool]:
    return _Pools(pools)


# Every native format of every framework; the moves that a framework's own loader makes, and one into each layout.
ORDINARY_HERE = [
    "one-1-one-1-native-small",
    "ddp-3-ddp-3-native-small",
    "zero1-2-zero1-2-native-small",
    "zero2-3-zero2-3-native-small",
    "zero3-3-zero3-3-native-small",
    "zero3-2-zero3-2-native-small-offload",
    "fsdp2-3-fsdp2-3-native-small",
    "fsdp2-3-fsdp2-3-full-small",
    "hsdp-4-hsdp-4-native-small",
    "zero2-3-zero2-3-native-small-master-stochastic_rounding",
]
ORDINARY_ELSEWHERE = [
    "fsdp2-3-fsdp2-2-native-small",
    "fsdp2-2-fsdp2-3-full-small",
    "zero2-4-fsdp2-2-any-small",
    "zero3-3-zero2-2-any-small",
    "fsdp2-3-zero1-2-any-small",
    "ddp-3-zero3-2-any-small",
]


def _with_shapes(moves: list[Move], ordinary: list[str]) -> list[Any]:
    """Every move with the small shapes; sharded ones also where ranks hold nothing, or whole experts."""
    sharded = ("zero3", "fsdp2", "hsdp", "ddp")
    rows = [
        pytest.param(move, shapes, id="-".join([*map(str, move.before + move.after), move.how, shapes[0], *settings]))
        for move in moves
        for settings in [[key for key, _ in move.settings]]
        for shapes in ((SMALL, THIN, EXPERTS) if move.before[0] in sharded and move.dtype == "fp32" else (SMALL,))
    ]
    assert len({row.id for row in rows}) == len(rows)
    return slow_except(ordinary, rows)


@pytest.mark.parametrize(("move", "shapes"), _with_shapes(HERE, ORDINARY_HERE))
def test_the_same_ranks_go_on_bit_by_bit(all_pools, move, shapes):
    result = try_move(all_pools, move, shapes, steps=(4, 3))
    assert result["state_equal"]
    assert result["deviation"] == 0.0


@pytest.mark.parametrize(("move", "shapes"), _with_shapes(ELSEWHERE, ORDINARY_ELSEWHERE))
def test_other_ranks_and_layouts_go_on_with_the_same_state(all_pools, move, shapes):
    result = try_move(all_pools, move, shapes, steps=(4, 3))
    assert result["state_equal"]
    assert 0.0 < result["deviation"] <= 1e-5


def test_bf16_masters_and_moments_survive_a_change_of_layout(all_pools):
    assert try_move(all_pools, Move(("zero2", 2), ("zero3", 3), "bf16", "any"), SMALL, steps=(4, 1))["state_equal"]


@pytest.mark.parametrize(
    ("before", "after"),
    slow_except(
        [(("zero3", 3), ("zero2", 2)), (("zero2", 3), ("fsdp2", 2))],
        [
            (("zero2", 2), ("zero3", 3)),
            (("zero3", 3), ("zero2", 2)),
            (("zero2", 3), ("fsdp2", 2)),
            (("fsdp2", 2), ("zero2", 3)),
        ],
    ),
)
def test_bf16_weights_without_a_master_survive_a_change_of_layout(all_pools, before, after):
    assert try_move(all_pools, Move(before, after, "bf16", "any", ROUNDED), SMALL, steps=(4, 1))["state_equal"]


def test_weights_go_from_an_fp32_master_to_bf16_and_back(all_pools, tmp_path):
    """Rounded to nearest once, and exact on the way back."""
    there = Move(("zero2", 2), ("zero3", 3), "bf16", "any", (), ROUNDED)
    whole = all_pools[2].run(uninterrupted, there.case(("zero2", 2), SMALL), (4, 0), tmp_path / "fp32")[0]["state"]
    narrow = Move(("zero3", 3), ("zero3", 3), "bf16", "any", ROUNDED).case(("zero3", 3), SMALL)
    here = all_pools[3].run(_reload, narrow, tmp_path / "fp32", tmp_path / "bf16")[0]
    wide = there.case(("zero2", 2), SMALL)
    back = all_pools[2].run(_reload, wide, tmp_path / "bf16")[0]
    weights = [key for key in whole if key.endswith(" weight")]
    assert all(torch.equal(here[key], whole[key].bfloat16()) and here[key].dtype == torch.bfloat16 for key in weights)
    assert all(torch.equal(back[key], here[key].float()) and back[key].dtype == torch.float32 for key in weights)
    assert all(torch.equal(back[key], value) for key, value in whole.items() if key not in weights)


def _reload(case: Case, folder: Path, to: Path | None = None) -> dict[str, torch.Tensor]:
    """The state of a run that goes on with a checkpoint and writes another before any step."""
    run = start(case, build_model(case))
    ds_lowrank.load_checkpoint(folder, run.model, run.optimizer)
    state = whole_state(run.optimizer)
    if to is not None:
        run.save(to)
    run.close()
    return state


@pytest.mark.slow
def test_sharded_and_whole_bases_are_the_same_state(all_pools):
    whole_bases = (("shard_projection", False),)
    for before, after in (((), whole_bases), (whole_bases, ())):
        move = Move(("zero3", 2), ("fsdp2", 3), "fp32", "any", before, after)
        assert try_move(all_pools, move, SMALL, steps=(4, 1))["state_equal"]
    whole = Move(("fsdp2", 2), ("fsdp2", 2), settings=(("shard_projection", False),))
    assert try_move(all_pools, whole, THIN, steps=(4, 3))["deviation"] == 0.0


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_deepspeeds_own_tool_makes_weights_of_a_checkpoint(pools, tmp_path, layout):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    case = Move((layout, 2), (layout, 2), "bf16").case((layout, 2), SMALL)
    state = pools(2).run(uninterrupted, case, (4, 0), tmp_path)[0]["state"]
    weights = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert {f"{name} weight" for name in weights} == {key for key in state if key.endswith(" weight")}
    assert all(torch.equal(weight, state[f"{name} weight"]) for name, weight in weights.items())


def test_a_missing_rank_is_told_on_all_ranks(pools, tmp_path):
    before = Move(("zero2", 3), ("zero2", 3)).case(("zero2", 3), SMALL)
    pools(3).run(uninterrupted, before, (4, 0), tmp_path)
    next(tmp_path.glob("*/*zero_pp_rank_1_mp_rank_00_optim_states.pt")).unlink()
    after = Move(("zero3", 2), ("zero3", 2)).case(("zero3", 2), SMALL)
    pool = RankPool(2, timeout=60, patience=300)
    answers = pool.run_to_the_end(resume, after, (4, 1), tmp_path, "any")
    assert all("has the files of 2 ranks, and 3 wrote it: some are missing" in str(a) for a in answers)
