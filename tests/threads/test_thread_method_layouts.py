"""Every rule and selection beside AdamW's: layouts, formats, missing gradients, the backward pass, and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_thread_resume import assert_equal, go_on
from test_thread_update import FEW, PLACES, check
from thread_cases import METHODS, Case, deviation, expected, load_anywhere, load_natively, run_case

INT8: dict[str, Any] = {"state_dtype": "int8", "basis_dtype": "int4", "shapes": "experts", "r": 3}


def low_bit(method: str) -> dict[str, Any]:
    """In int8 and int4; ``online_pca`` keeps its basis as it is computed."""
    return {**INT8, "basis_dtype": "fp32"} if method == "online_pca" else INT8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layout", "ranks"), PLACES)
def test_the_update_is_the_references(layout, ranks, method):
    result = check(Case(layout, ranks, groups=2, **METHODS[method]))
    assert result.refreshes >= (1 if method == "online_pca" else 3)
    assert ranks == 1 or result.shared > 0


VARIANTS: dict[str, dict[str, Any]] = {
    "fewer-rows-than-ranks": {"shapes": "thin", "r": 2},
    "stacked-experts": {"shapes": "experts", "r": 3},
    "unborn-then-born": {"silent": 3, "steps": 8, "layers": 2},
    "no-gradient-on-some-ranks": {"dropped": 2, "layers": 2},
    "bf16-gradients": {"dtype": "bf16", "layers": 2, "stagger": False},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 3), ("zero3", 3), ("fsdp2", 3)])
@pytest.mark.parametrize("settings", list(VARIANTS.values()), ids=list(VARIANTS))
def test_variants(layout, ranks, method, settings):
    check(Case(layout, ranks, **settings, **METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layout", "ranks"), [("fsdp2", 3), ("hsdp", 4)])
def test_wide_matrices_sharded_by_columns(layout, ranks, method):
    assert check(Case(layout, ranks, shapes="columns", columns=True, **METHODS[method])).moved == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layout", "ranks"), FEW)
def test_narrow_states_are_the_references_that_rounds_where_we_keep(layout, ranks, method):
    result = run_case(Case(layout, ranks, **low_bit(method), **METHODS[method]))
    assert result.counters == []
    assert result.deviation < 2e-3
    assert result.replicas_equal


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 3)])
def test_in_the_backward_pass(layout, ranks, method):
    """Accumulated projections are for what does not read the gradient itself."""
    micro = 2 if method in ("grams", "adamw-gaussian") else 1
    check(Case(layout, ranks, micro=micro, r=3, layers=2, **METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layout", "ranks"), FEW)
def test_the_same_ranks_go_on_bit_by_bit(tmp_path, layout, ranks, method):
    narrow = layout in ("ddp", "zero3", "hsdp")
    settings = low_bit(method) if narrow else {"groups": 2}
    case = Case(layout, ranks, **{**settings, "layers": 1}, **METHODS[method])
    before, after, whole, weights = go_on(case, case, tmp_path, load_anywhere if narrow else load_natively)
    assert any("exp_avg_sq" in key for key in before)
    assert_equal(after, before)
    assert_equal(weights, whole)


MOVES = [
    (("zero2", 4), ("zero3", 3)),
    (("zero3", 3), ("ddp", 2)),
    (("ddp", 3), ("fsdp2", 2)),
    (("fsdp2", 3), ("hsdp", 4)),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("before", "after"), MOVES)
def test_other_ranks_and_layouts_go_on_with_the_same_state(tmp_path, before, after, method):
    case = Case(*before, **{**low_bit(method), "layers": 1}, **METHODS[method])
    there = replace(case, layout=after[0], ranks=after[1], columns=True)
    first, second, _, weights = go_on(case, there, tmp_path, load_anywhere)
    assert_equal(second, first)
    assert deviation(weights, expected(there), there) < 2e-3
