"""Moments and bases in bf16, int8 and int4, bf16 weights: one trajectory, one state, every weight moves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from storage import state_bytes
from thread_cases import RULES, Case, Run, everything, expected, joined, run_case, start_of
from thread_layouts import LAYOUTS
from thread_ranks import run_ranks

INT8: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int8"}
INT4: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int4"}
BF16: dict[str, Any] = {"state_dtype": "bf16", "basis_dtype": "bf16"}
FEW = [("one", 1), ("ddp", 3), ("zero2", 3), ("zero3", 3), ("fsdp2", 3), ("hsdp", 4)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("layout", "ranks"), [*FEW, *((layout, 2) for layout in LAYOUTS)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**INT8, "moments": "project", "selection": "dominant"}, id="int8-project"),
        pytest.param({**INT4, "shapes": "experts", "r": 3}, id="int4-stacked-experts"),
        pytest.param({**BF16, "shapes": "thin", "r": 2, "shard_projection": False}, id="bf16-thin-whole-bases"),
        pytest.param({**INT8, "basis_dtype": "bf16", "proj_type": "reverse_std", "groups": 2}, id="int8-reverse-side"),
        pytest.param({"state_dtype": "bf16", "basis_dtype": "int4", "r": 5, "directions": 2}, id="few-directions"),
    ],
)
def test_the_update_is_that_of_a_reference_that_rounds_where_we_keep(layout, ranks, rule, settings):
    """To one code: where the reference's last bit tips a number over to the next, a step of one entry differs."""
    result = run_case(Case(layout, ranks, rule=rule, **settings))
    assert result.counters == []
    assert result.deviation < 2e-3
    assert result.replicas_equal


@pytest.mark.parametrize("shapes", ["small", "thin"])
@pytest.mark.parametrize(("layout", "ranks"), [*FEW, ("zero2", 4), ("zero3", 4), ("fsdp2", 2)])
def test_codes_of_what_is_not_projected_do_not_depend_on_the_ranks(layout, ranks, shapes):
    """Vectors of which boundaries cut blocks: bit by bit."""

    def rank(case: Case) -> dict[str, torch.Tensor]:
        run = Run(case)
        for _ in range(case.steps):
            run.step()
        return everything(run)

    case = Case(shapes=shapes, r=2, steps=4, columns=layout == "fsdp2", **INT8)
    alone, there = (run_ranks(c.ranks, rank, c)[0] for c in (case, replace(case, layout=layout, ranks=ranks)))
    assert alone.keys() == there.keys()
    kept = [key for key in alone if key.startswith("rest")]
    assert {key.split()[1] for key in kept} == {"weight", "step", "exp_avg_codes", "exp_avg_sq_codes"}
    assert all(torch.equal(there[key], alone[key]) for key in kept)


ROUNDED: dict[str, Any] = {"dtype": "bf16", "master": False, "stochastic_rounding": True, "state_dtype": "int8"}


def _differing(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], names: Any) -> float:
    assert all(weights[n].dtype == others[n].dtype == torch.bfloat16 for n in names)
    return sum(int((others[n] != weights[n]).sum()) for n in names) / sum(weights[n].numel() for n in names)


@pytest.mark.parametrize("shapes", ["small", "columns", "kernels"])
@pytest.mark.parametrize(("layout", "ranks"), [*FEW[1:], ("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)])
def test_bf16_weights_are_rounded_alike_on_any_ranks(layout, ranks, shapes):
    """Rows that are cut, columns that become rows, and vectors: of other bits nearly half the weights would differ."""
    check_rounded(Case(shapes=shapes, steps=4, columns=shapes == "columns", **ROUNDED), layout, ranks)


@pytest.mark.parametrize(("layout", "ranks"), [("zero3", 2), ("fsdp2", 3)])
def test_bf16_weights_of_many_rows_are_rounded_alike(layout, ranks):
    """Rows are widened some hundreds at a time."""
    check_rounded(Case(shapes="real", layers=1, r=8, steps=2, **ROUNDED), layout, ranks)


def check_rounded(case: Case, layout: str, ranks: int) -> None:
    alone, there = (run_case(c) for c in (case, replace(case, layout=layout, ranks=ranks)))
    other = run_case(replace(case, seed=4, selection="dominant"))
    assert there.replicas_equal
    assert _differing(alone.weights, there.weights, case.rest) == 0
    # Of matrices, what tips an fp32 sum over by its last bit tips few roundings over.
    assert _differing(alone.weights, there.weights, case.matrices) <= 0.005
    assert _differing(alone.weights, other.weights, case.matrices) > 0.05


@pytest.mark.parametrize(("layout", "ranks"), FEW)
def test_bf16_weights_are_kept_in_the_mean_and_lost_without_rounding(layout, ranks):
    """Of a step that is a fraction of half a step of bf16 stochastic rounding makes the whole in the mean."""

    def rank(case: Case) -> Any:
        run = Run(case, {n: torch.ones_like(w) for n, w in start_of(case).items()})
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-4
        for _ in range(3):
            run.step()
        return run.pieces(), run.layout.ranks.copy

    case = Case(layout, ranks, weight_decay=0.0, **ROUNDED)
    moved = {}
    for rounded in (True, False):
        told = run_ranks(ranks, rank, replace(case, stochastic_rounding=rounded))
        weights, equal = joined([pieces for pieces, _ in told], case, told[0][1])
        assert equal
        moved[rounded] = {n: float((1 - w.float()).abs().max()) for n, w in weights.items()}
    assert all(moved[True][n] > 0 for n in ("rest1", "layer0_0", "layer1_1", "layer2_3"))
    assert set(moved[False].values()) == {0.0}


@pytest.mark.parametrize("settings", [INT8, INT4, BF16], ids=["int8", "int4", "bf16"])
@pytest.mark.parametrize(("layout", "ranks"), FEW)
def test_every_weight_of_every_size_moves_in_the_first_step(layout, ranks, settings):
    """An 8-bit GaLore that leaves small matrices where they are has been published."""

    def rank(case: Case) -> Any:
        run = Run(case)
        before = run.pieces()
        run.step()
        return before, run.pieces(), run.layout.ranks.copy

    for shapes, r in (("small", 4), ("thin", 2), ("experts", 3)):
        case = Case(layout, ranks, shapes=shapes, r=r, layers=2, weight_decay=0.0, **settings)
        told = run_ranks(ranks, rank, case)
        before, after = (joined([t[place] for t in told], case, told[0][2])[0] for place in (0, 1))
        still = {n: int((after[n] == before[n]).sum()) for n in case.matrices}
        # Of first steps, which are signs, few whole numbers of four bits may add up to nothing.
        wanted = expected(replace(case, steps=1))
        allowed = {n: int((wanted.weights[n] == wanted.start[n]).sum()) for n in still}
        assert sum(allowed.values()) <= (5 if settings is INT4 else 0)
        assert still == allowed


@pytest.mark.parametrize("settings", [INT8, INT4, BF16, {}], ids=["int8", "int4", "bf16", "fp32"])
@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2), ("hsdp", 4)])
def test_reported_bytes_are_the_bytes_that_are_held(layout, ranks, settings):
    def rank(case: Case) -> tuple[int, int]:
        run = Run(case)
        run.step()
        here, optimizer = run.layout.ranks.rank, run.optimizer
        said = sum(optimizer.method.states.bytes(p.rows_of(here), p.kept(here), p.r) for p in optimizer.plans)
        told = {"step", "refreshes", "indices", "overlaps", "left", "row", "basis_row"}
        return said, state_bytes({n: {k: v for k, v in s.items() if k not in told} for n, s in run.states().items()})

    for said, found in run_ranks(ranks, rank, Case(layout, ranks, layers=2, **settings)):
        assert said == found > 0


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("zero2", 4), ("zero3", 4), ("fsdp2", 4), ("hsdp", 4)])
def test_a_rank_keeps_its_share_of_the_state(layout, ranks):
    """Bases and moments that lie on more ranks than they must, or unevenly on them."""

    def rank(case: Case) -> int:
        run = Run(case)
        run.step()
        keys = ("exp_avg", "exp_avg_sq", "basis")
        return state_bytes({n: {k: s[k] for k in keys if k in s} for n, s in run.states().items()})

    case = Case(shapes="even", layers=4, r=8)
    (alone,) = run_ranks(1, rank, case)
    shards = ranks // 2 if layout == "hsdp" else ranks
    there = replace(case, layout=layout, ranks=ranks)
    assert all(math.isclose(kept, alone / shards, rel_tol=0.05) for kept in run_ranks(ranks, rank, there))
    whole = run_ranks(ranks, rank, replace(there, shard_projection=False))
    assert any(kept > 1.05 * alone / shards for kept in whole) == (layout != "zero2")
