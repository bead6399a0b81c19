"""Every layout on 1-4 ranks: the applied update against the one-process reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thread_cases import MOMENTS, RULES, SELECTIONS, Case, Result, Run, run_case
from thread_layouts import LAYOUTS
from thread_ranks import RankError, run_ranks

PLACES = [("one", 1), *((layout, ranks) for layout in LAYOUTS for ranks in (1, 2, 3, 4))]
ON_TWO = [(layout, 2) for layout in LAYOUTS if layout != "hsdp"]
ON_THREE = [("ddp", 3), ("zero2", 3), ("zero3", 3), ("fsdp2", 3), ("hsdp", 4)]
FEW = [("one", 1), *ON_THREE]


def check(case: Case, tolerance: float = 1e-5) -> Result:
    result = run_case(case)
    assert result.counters == []
    assert result.deviation < tolerance
    assert result.basis_deviation < 1e-4
    assert result.replicas_equal
    return result


SETTINGS: dict[str, dict[str, Any]] = {
    "importance-keep": {},
    "dominant-project": {"selection": "dominant", "moments": "project", "dtype": "bf16"},
    "fewer-rows-than-ranks": {"shapes": "thin", "r": 2, "groups": 2},
    "stacked-experts": {"shapes": "experts", "r": 3, "moments": "project", "groups": 3},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("layout", "ranks"), PLACES)
@pytest.mark.parametrize("settings", list(SETTINGS.values()), ids=list(SETTINGS))
def test_the_update_is_the_references(layout, ranks, rule, settings):
    result = check(Case(layout, ranks, rule=rule, **settings))
    assert result.refreshes >= 3
    if ranks > 1 and settings.get("shapes") != "experts":
        assert result.shared > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("layout", "ranks"), FEW)
def test_every_selection_and_every_carry(layout, ranks, selection, moments, rule):
    # A random basis leaves more entries of R near zero, where Adam's quotient amplifies the rounding of fp32.
    tolerance = 2e-5 if selection == "random" else 1e-5
    check(Case(layout, ranks, selection=selection, moments=moments, rule=rule, groups=2), tolerance)


VARIANTS: dict[str, dict[str, Any]] = {
    "all-at-once": {"stagger": False},
    "waves-of-one": {"wave_size": 1, "gap": 4, "steps": 9},
    "every-step": {"gap": 1, "moments": "project"},
    "no-decay": {"weight_decay": 0.0},
    "whole-bases": {"shard_projection": False, "moments": "project"},
    "reverse-side": {"proj_type": "reverse_std", "selection": "uniform"},
    "left": {"proj_type": "left", "moments": "project"},
    "right": {"proj_type": "right", "shapes": "thin", "r": 2},
    "kernels": {"shapes": "kernels"},
    "rank-of-one": {"r": 1, "selection": "dominant"},
    "clamped": {"shapes": "thin", "r": 3},
    "unborn-then-born": {"silent": 3, "steps": 10},
    "no-gradient-on-some-ranks": {"dropped": 2},
    "frozen-in-between": {"frozen": (2, 3), "steps": 9},
    "frozen-at-first": {"frozen": (0, 1, 2)},
    "few-directions": {"directions": 2},
    "few-directions-bf16": {"directions": 2, "dtype": "bf16"},
    "few-directions-experts": {"directions": 2, "shapes": "experts", "r": 3},
    "one-direction-reverse-side": {"directions": 1, "proj_type": "reverse_std"},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("layout", "ranks"), FEW)
@pytest.mark.parametrize("settings", list(VARIANTS.values()), ids=list(VARIANTS))
def test_variants(layout, ranks, rule, settings):
    check(Case(layout, ranks, rule=rule, **settings))


@pytest.mark.parametrize("shapes", ["small", "experts"])
@pytest.mark.parametrize(("layout", "ranks"), [*FEW, *ON_TWO])
def test_fp64_agrees_to_1e_9(layout, ranks, shapes):
    check(Case(layout, ranks, dtype="fp64", shapes=shapes, r=3), tolerance=1e-9)


@pytest.mark.parametrize(("layout", "ranks"), [*ON_TWO, ("ddp", 3), ("zero3", 3), ("fsdp2", 3), ("hsdp", 4)])
def test_llama_sized_matrices(layout, ranks):
    """1376×512 and 512×1376: boundary rows move for the tall, columns become rows for the wide one."""
    check(Case(layout, ranks, shapes="real", layers=1, r=32, steps=4))


@pytest.mark.parametrize(("layout", "ranks"), [("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4), ("hsdp", 2), ("hsdp", 4)])
def test_wide_matrices_sharded_by_columns_move_nothing(layout, ranks):
    assert check(Case(layout, ranks, shapes="columns", columns=True)).moved == 0
    by_rows = check(Case(layout, ranks, shapes="columns"))
    assert by_rows.moved > 0 or (layout, ranks) == ("hsdp", 2)  # there a copy of the model is on one rank
    check(Case(layout, ranks, shapes="columns", columns=True, proj_type="reverse_std", moments="project"))


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 3), ("hsdp", 4)])
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_a_group_that_is_added_goes_the_way_of_the_reference(layout, ranks, state_dtype):
    case = Case(layout, ranks, added=2, steps=9, layers=4, frozen=(4, 5), state_dtype=state_dtype)
    check(case, 1e-5 if state_dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_no_group_is_added_to_flat_buffers(layout):
    with pytest.raises(RankError, match=r"ValueError: parameter groups cannot be added after deepspeed\.initialize"):
        run_case(Case(layout, 2, added=2))


@pytest.mark.parametrize(("layout", "ranks"), ON_THREE)
def test_the_same_run_twice_is_bitwise_the_same(layout, ranks):
    case = Case(layout, ranks, groups=2)
    first, second = run_case(case).weights, run_case(case).weights
    assert all(torch.equal(first[n], w) for n, w in second.items())


@pytest.mark.parametrize(("layout", "ranks"), FEW)
def test_a_nan_gradient_at_the_first_step_changes_no_matrix(layout, ranks):
    def rank():
        run = Run(Case(layout, ranks))
        before = run.pieces()
        run.layout.fill_gradients({n: torch.full(s, float("nan")) for n, s in run.case.matrices.items()})
        run.step_as_filled()
        equal = [torch.equal(before[n][1], w) for n, (_, w) in run.pieces().items() if n in run.case.matrices]
        return all(equal), [s["refreshes"] for s in run.states().values()]

    for equal, refreshes in run_ranks(ranks, rank):
        assert equal
        assert not any(refreshes)
