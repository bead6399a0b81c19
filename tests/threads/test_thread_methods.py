"""Every rule with every selection and carry on ranks is what it is on one process; layouts and formats take turns."""

from __future__ import annotations

import itertools

import pytest
from thread_cases import Case, run_case

RULES = ("adamw", "apollo", "apollo_mini", "fira", "grams")
SELECTIONS = ("dominant", "importance", "uniform", "random", "gaussian", "online_pca")
PLACES = [("zero2", 2), ("zero3", 3), ("fsdp2", 3), ("ddp", 2), ("hsdp", 4), ("zero3", 2), ("ddp", 3), ("zero2", 4)]
METHODS = [
    (rule, selection, carry)
    for rule, selection, carry in itertools.product(RULES, SELECTIONS, ("keep", "project"))
    if selection not in ("gaussian", "online_pca") or (carry == "keep" and rule != "fira")
]


@pytest.mark.parametrize(
    ("method", "place", "state_dtype"),
    [
        (method, PLACES[(number + turn) % len(PLACES)], state_dtype)
        for turn, state_dtype in enumerate(("fp32", "int8"))
        for number, method in enumerate(METHODS)
    ],
)
def test_the_update_is_the_references(method, place, state_dtype):
    rule, selection, carry = method
    result = run_case(Case(*place, rule=rule, selection=selection, moments=carry, state_dtype=state_dtype, layers=2))
    assert result.counters == []
    assert result.replicas_equal
    assert result.deviation < (2e-5 if state_dtype == "fp32" else 2e-3)
