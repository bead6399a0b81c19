"""Gradients that are projected before they are stored or sent, from every rank its own."""

from __future__ import annotations

import pytest
from thread_cases import Case, run_case

PLACES = [("one", 1), *((layout, ranks) for layout in ("ddp", "fsdp2") for ranks in (1, 2, 3, 4)), ("hsdp", 4)]


@pytest.mark.parametrize(("layout", "ranks"), PLACES)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("shapes", ["small", "thin", "experts"])
@pytest.mark.parametrize(("dtype", "bound"), [("fp64", 1e-11), ("fp32", 5e-5)])
def test_the_trajectory_is_the_references(layout, ranks, micro, clip, shapes, dtype, bound):
    result = run_case(Case(layout, ranks, dtype, shapes=shapes, r=3, gradients="projected", micro=micro, clip=clip))
    assert result.counters == []
    assert result.deviation < bound
    assert result.replicas_equal
