"""What a step costs in Python: bounds on its calls, and that the tracer counts what there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trace_step
from trace_step import BOUNDS, Figures, faults, measure, trace

from ds_lowrank.engine.step import is_due


def _no_pool(size: int) -> trace_step.RankPool:
    raise AssertionError("one process needs no ranks")


def test_calls_of_one_process() -> None:
    root = measure("one", _no_pool)
    made = Figures.of(root)
    assert not faults({"one": made}, BOUNDS), "\n".join(root.lines())
    assert [node.name for node in root.below.values()] == ["step"]


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    root = trace(lambda: [is_due(step, 0, 10) for step in range(3)])
    assert Figures.of(root) == (3, 1, 3)
    assert list(root.lines()) == ["engine/step.py:is_due x3"]

    # A comprehension is a frame at most, a generator a call whenever it goes on, a property a call.
    monkeypatch.setattr(trace_step, "_PACKAGE", __file__.rpartition("/")[0] + "/")
    root = trace(lambda: _outer())
    names = {node.name: node.count for node in root.all()}
    assert names["_outer"] == 1
    assert names["_counting"] == 3
    assert Figures.of(root).calls == 4 + names["<lambda>"]
    assert root.below[("test_step_calls.py", "<lambda>")].below


def test_bounds_name_what_exceeds_them() -> None:
    made = Figures(46, 11, 60)
    assert not faults({"one": made}, {"one": (46, 11), "fsdp2 wide": (1, 1)})
    assert faults({"one": made}, {"one": (45, None)}) == ["one: 46 calls in 11 files, allowed are 45"]
    assert faults({"one": made}, {"one": (46, 10)}) == ["one: 46 calls in 11 files, allowed are 46 in 10"]


def _counting() -> Iterator[int]:
    yield 1
    yield 2


def _outer() -> int:
    return sum([2 * number for number in _counting()])
