"""Operators are counted as what they are, and a step of fp32 states launches no more than its mathematics."""

from __future__ import annotations

import torch
from host_time import bare, measure, operators


def test_operators_are_told_apart() -> None:
    a, b = torch.ones(4, 3), torch.ones(3, 2)
    assert operators(lambda: a @ b) == {"launch": 1}
    assert operators(lambda: (a.mT, a[1:], a.view(-1))) == {"view": 3}
    assert operators(lambda: torch.empty(3).zero_()) == {"view": 1, "launch": 1}
    assert operators(lambda: torch._foreach_add_([a, a], 1.0)) == {"launch": 1}
    assert operators(lambda: float(a.sum())) == {"launch": 1, "read": 1}


def test_the_bare_step_launches_nine_a_matrix() -> None:
    assert operators(bare([(24, 10), (10, 24)], 4, "cpu")) == {"launch": 18}


def test_a_row() -> None:
    row = measure("two", [(24, 10), (10, 24)], 4, 3, "cpu")
    assert row["matrices"] == 2
    assert row["bare_launches"] == 18
    assert row["launches"] <= 18
    assert row["step_ms"] / row["bare_ms"] == row["ratio"]
