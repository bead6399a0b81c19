"""Checkpoints: the same ranks go on bit by bit, other ranks and layouts with exactly the same state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_cases import (
    RULES,
    Case,
    Run,
    deviation,
    everything,
    expected,
    joined,
    load_anywhere,
    load_natively,
    save,
    start_of,
)
from thread_ranks import RankError, run_ranks, this_rank

SMALL: dict[str, Any] = {"moments": "project", "groups": 2, "layers": 2}
THIN: dict[str, Any] = {"shapes": "thin", "r": 2, "layers": 2}
EXPERTS: dict[str, Any] = {"shapes": "experts", "r": 3, "layers": 1}
INT8: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int8"}
INT4: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int4"}
BF16: dict[str, Any] = {"state_dtype": "bf16", "basis_dtype": "bf16"}
# bf16 weights without an fp32 master copy, rounded by their place and the step.
ROUNDED: dict[str, Any] = {"dtype": "bf16", "master": False, "stochastic_rounding": True, "state_dtype": "int8"}
KINDS = {
    "small": SMALL,
    "thin": THIN,
    "experts": EXPERTS,
    "int8": {**SMALL, **INT8},
    "int8-thin": {**THIN, **INT8},
    "int4-experts": {**EXPERTS, **INT4},
    "bf16-states": {**SMALL, **BF16},
    "bf16-weights": {**SMALL, **ROUNDED},
    "whole-bases": {**SMALL, "shard_projection": False},
}
BEFORE, AFTER = 4, 3


def uninterrupted(case: Case, folder: Path) -> Any:
    run = Run(case)
    for _ in range(BEFORE):
        run.step()
    save(run, folder)
    state = everything(run)
    for _ in range(AFTER):
        run.step()
    return state, run.pieces(), run.layout.ranks.copy


def resumed(case: Case, folder: Path, load: Any) -> Any:
    run = Run(case, {n: w * 0.5 for n, w in start_of(case).items()}, BEFORE)  # nothing of it may survive
    load(run, folder)
    state = everything(run)
    for _ in range(AFTER):
        run.step()
    return state, run.pieces(), run.layout.ranks.copy


def go_on(before: Case, after: Case, folder: Path, load: Any) -> tuple[Any, ...]:
    """State before and after, weights of the uninterrupted and of the resumed run."""
    there = run_ranks(before.ranks, uninterrupted, before, folder)
    here = run_ranks(after.ranks, resumed, after, folder, load)
    whole = joined([pieces for _, pieces, _ in there], before, there[0][2])[0]
    weights, equal = joined([pieces for _, pieces, _ in here], after, here[0][2])
    assert equal
    return there[0][0], here[0][0], whole, weights


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    other = [k for k, v in wanted.items() if found[k].dtype != v.dtype or not torch.equal(found[k], v)]
    assert other == []


PLACES = [("one", 1), ("ddp", 3), ("zero2", 3), ("zero3", 3), ("fsdp2", 3), ("hsdp", 4)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("layout", "ranks"), PLACES)
@pytest.mark.parametrize(
    ("kind", "load"),
    [
        *((kind, load_natively) for kind in KINDS),
        *((kind, load_anywhere) for kind in ("small", "experts", "int8", "bf16-weights")),
    ],
)
def test_the_same_ranks_go_on_bit_by_bit(tmp_path, layout, ranks, kind, load, rule):
    case = Case(layout, ranks, rule=rule, **KINDS[kind])
    before, after, whole, weights = go_on(case, case, tmp_path, load)
    assert any("basis" in key for key in before)
    assert_equal(after, before)
    assert_equal(weights, whole)


MOVES = [
    (("fsdp2", 3), ("fsdp2", 2)),
    (("fsdp2", 2), ("fsdp2", 4)),
    (("zero2", 4), ("fsdp2", 2)),
    (("zero2", 4), ("zero3", 3)),
    (("zero2", 2), ("zero2", 3)),
    (("zero2", 4), ("one", 1)),
    (("zero3", 3), ("zero2", 2)),
    (("zero3", 3), ("ddp", 2)),
    (("fsdp2", 3), ("zero2", 2)),
    (("ddp", 3), ("zero3", 2)),
    (("hsdp", 4), ("zero3", 2)),
    (("one", 1), ("hsdp", 4)),
    (("one", 1), ("ddp", 2)),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("before", "after"), MOVES)
@pytest.mark.parametrize("kind", ["small", "experts", "int8-thin", "bf16-weights"])
def test_other_ranks_and_layouts_go_on_with_the_same_state(tmp_path, before, after, kind, rule):
    case = Case(*before, rule=rule, **KINDS[kind])
    there = replace(case, layout=after[0], ranks=after[1], groups=1, columns=True)
    first, second, whole, weights = go_on(case, there, tmp_path, load_anywhere)
    assert_equal(second, first)
    if kind == "bf16-weights":  # what tips an fp32 sum over tips a rounding over
        different = sum(int((weights[n] != w).sum()) for n, w in whole.items())
        assert different <= 0.005 * sum(w.numel() for w in whole.values())
        return
    result = deviation(weights, expected(there), there)
    assert result < (1e-5 if case.state_dtype == "fp32" else 2e-3)


def test_sharded_and_whole_bases_are_the_same_state(tmp_path):
    whole, spread = KINDS["whole-bases"], KINDS["small"]
    for number, (before, after) in enumerate(((spread, whole), (whole, spread))):
        there, here = Case("zero3", 2, **before), Case("fsdp2", 3, **after)
        first, second, *_ = go_on(there, here, tmp_path / str(number), load_anywhere)
        assert_equal(second, first)


def test_weights_go_from_fp32_to_bf16_and_back(tmp_path):
    """Rounded to nearest once, and exact on the way back."""
    wide = Case("zero2", 2, dtype="bf16", **SMALL)
    narrow = replace(wide, layout="zero3", ranks=3, master=False, stochastic_rounding=True)

    def reload(case: Case, folder: Path, to: Path) -> Any:
        run = Run(case, steps=BEFORE)
        load_anywhere(run, folder)
        save(run, to)
        return everything(run)

    first = run_ranks(2, uninterrupted, wide, tmp_path / "fp32")[0][0]
    here = run_ranks(3, reload, narrow, tmp_path / "fp32", tmp_path / "bf16")[0]
    back = run_ranks(2, reload, wide, tmp_path / "bf16", tmp_path / "again")[0]
    weights = [key for key in first if key.endswith(" weight")]
    assert all(torch.equal(here[key], first[key].bfloat16()) for key in weights)
    assert all(torch.equal(back[key], here[key].float()) for key in weights)
    rest = {key: value for key, value in first.items() if key not in weights}
    assert_equal({key: back[key] for key in rest}, rest)


def test_a_missing_rank_is_told_on_all_ranks(tmp_path):
    case = Case("zero2", 3, **SMALL)
    run_ranks(3, uninterrupted, case, tmp_path)
    next(tmp_path.glob("*/zero_pp_rank_1_mp_rank_00_optim_states.pt")).unlink()

    def told() -> str:
        with pytest.raises(ValueError, match="has the files of 2 ranks, and 3 wrote it: some are missing") as error:
            load_anywhere(Run(Case("zero3", 2, **SMALL)), tmp_path)
        return str(error.value)

    assert len(set(run_ranks(2, told))) == 1


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero2"])
@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("exp_avg", torch.zeros(3), r"exp_avg of .* is \(3,\)"),
        ("step", float("nan"), "is nan, not a whole number >= 0"),
        ("basis", torch.zeros(1, 1), "basis of .* is "),
    ],
)
def test_a_state_that_does_not_fit_one_rank_is_refused_on_every_rank(layout, key, value, text):
    def told() -> None:
        run = Run(Case(layout, 2, **{**SMALL, "groups": 1}))
        for _ in range(2):
            run.step()
        packed = torch.optim.Optimizer.state_dict(run.optimizer)
        packed = {**packed, "state": {k: dict(v) for k, v in packed["state"].items()}}
        if this_rank() == 1:
            found = packed["state"]
            low = found["lowrank"] = {n: dict(s) for n, s in found["lowrank"].items()}
            name = next(n for n, s in low.items() if key in s and (key != "basis" or s[key].shape != (1, 1)))
            low[name][key] = value
        run.optimizer.load_state_dict(packed)
        with pytest.raises(ValueError, match=r"does not fit this run \(rank 1\): .*" + text):
            run.optimizer.ensure_state()

    run_ranks(2, told)


@pytest.mark.parametrize("trouble", ["rank 0's", "older on rank 1", "missing on rank 1"])
@pytest.mark.parametrize("layout", ["ddp", "zero3", "fsdp2"])
def test_a_state_that_is_not_this_ranks_is_refused_on_every_rank(layout, trouble):
    shared: dict[Any, Any] = {}

    def told() -> str:
        run = Run(Case(layout, 2, shapes="even", layers=2))
        me = this_rank()
        for step in range(3):
            run.step()
            packed = torch.optim.Optimizer.state_dict(run.optimizer)
            states = {
                n: {k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()} for n, s in run.states().items()
            }
            shared[me, step] = {**packed, "state": {**packed["state"], "lowrank": states}}
        run.optimizer.comm.gather_objects(None)
        taken = shared[me, 2]
        if me == 1:
            taken = {"rank 0's": shared[0, 2], "older on rank 1": shared[1, 0]}.get(trouble, taken)
            if trouble == "missing on rank 1":
                taken["state"]["lowrank"].pop("layer0_0")
        run.optimizer.load_state_dict(taken)
        with pytest.raises(ValueError, match="the loaded optimizer state does not fit this run") as error:
            run.optimizer.ensure_state()
        return str(error.value)

    said = set(run_ranks(2, told))
    assert len(said) == 1
    wanted = {"rank 0's": "it is another rank's state", "older on rank 1": "it has made 1 steps, rank 0 3"}
    assert wanted.get(trouble, "of layer0_0 it has made 0 steps, rank 0 3") in said.pop()


def test_a_checkpoint_of_another_rank_of_the_subspace_is_refused(tmp_path):
    run_ranks(2, uninterrupted, Case("fsdp2", 2, **SMALL), tmp_path)
    with pytest.raises(RankError, match="was projected to rank 4 and is to rank 3 here"):
        run_ranks(3, lambda: load_anywhere(Run(Case("zero3", 3, **{**SMALL, "r": 3})), tmp_path))
