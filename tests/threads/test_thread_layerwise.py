"""Steps in the backward pass, by hooks on gradients that come one after the other."""

from __future__ import annotations

import pytest
from thread_cases import RULES, Case, Run, run_case
from thread_ranks import run_ranks

PLACES = [("one", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("layout", "ranks"), PLACES)
@pytest.mark.parametrize("shapes", ["small", "experts"])
@pytest.mark.parametrize("micro", [1, 3])
def test_the_trajectory_is_the_references(layout, ranks, micro, shapes, rule):
    result = run_case(Case(layout, ranks, micro=micro, shapes=shapes, r=3, rule=rule))
    assert result.counters == []
    assert result.deviation < 1e-5
    assert result.replicas_equal


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 3)])
@pytest.mark.parametrize("micro", [1, 2])
def test_with_int8_moments_it_is_the_references(layout, ranks, micro):
    result = run_case(Case(layout, ranks, micro=micro, state_dtype="int8", basis_dtype="int8"))
    assert result.counters == []
    assert result.deviation < 2e-3


@pytest.mark.parametrize(("layout", "ranks"), PLACES)
@pytest.mark.parametrize("micro", [1, 2])
def test_gradients_are_freed_as_soon_as_they_are_used(layout, ranks, micro):
    """At the first step all are due: accumulated gradients of those wait for step(). Later nothing is due."""

    def rank() -> list[int]:
        run = Run(Case(layout, ranks, micro=micro, gap=100, wave_size=1))
        left = []
        for _ in range(2):
            run.backward({n: run._gradient(n) for n in run.layout._members})
            left.append(sum(p.grad is not None for n, p in run.model.named_parameters() if n in run.case.matrices))
            run.step_as_filled()
        return left

    assert run_ranks(ranks, rank) == [[15 if micro > 1 else 0, 0]] * ranks
