"""What a step costs in Python where rows move."""

from __future__ import annotations

from trace_step import BOUNDS, Figures, faults, measure


def test_calls_where_columns_become_rows(pools) -> None:
    root = measure("fsdp2 wide", pools)
    assert not faults({"fsdp2 wide": Figures.of(root)}, BOUNDS), "\n".join(root.lines())
