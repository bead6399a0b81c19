"""What is sent is what the formulas of benchmarks/communication.py say, counted over all ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import thread_cases
from communication import REFRESH, STEP, expected_bytes
from thread_cases import Case, Run
from thread_ranks import run_ranks

R = 8
MATRICES = {
    "tall": (96, 24),
    "wide": (24, 96),
    "square": (48, 48),
    "tall-cut": (37, 24),  # 2, 3 and 4 parts of equal size end in the middle of a row
    "wide-cut": (24, 37),
}
LAYOUTS = [*itertools.product(("ddp", "zero2", "zero3", "fsdp2"), (2, 3, 4)), ("hsdp", 2), ("hsdp", 4)]


@pytest.fixture(autouse=True)
def _matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {**{name: (shape,) for name, shape in MATRICES.items()}, "three": tuple(MATRICES.values())[:3]}
    monkeypatch.setattr(thread_cases, "SHAPES", {**thread_cases.SHAPES, **shapes})


def measure(case: Case) -> dict[str, dict[str, int]]:
    """Bytes that this rank sends in an ordinary step and, beside them, in a refresh that is not the first."""
    run = Run(case)
    run.step()
    counted = []
    for _ in range(2):  # ordinary, due
        run.optimizer.comm.reset()
        run.step()
        counted.append(Counter(run.optimizer.comm.sent_bytes))
    ordinary, due = counted
    due.subtract(ordinary)
    return {"step": dict(ordinary), "refresh": dict(due)}


def traffic(layout: str, ranks: int, shapes: str, layers: int = 1, **settings: Any) -> dict[str, dict[str, int]]:
    """Event -> purpose -> bytes of all ranks."""
    options = {"gap": 2, "stagger": False, "gram_dtype": "float32", "r": R, "layers": layers, **settings}
    counted = run_ranks(ranks, measure, Case(layout, ranks, shapes=shapes, **options))
    return {event: {p: sum(c[event].get(p, 0) for c in counted) for p in STEP + REFRESH} for event in counted[0]}


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_every_purpose_sends_what_its_formula_says(layout, ranks):
    """A change that moves more (or less) than the rows, the basis, the Gram and the verdict that it must."""
    for name, shape in MATRICES.items():
        sent, wanted = traffic(layout, ranks, name), expected_bytes(layout, ranks, [[shape]], R)
        for event, purposes in (("step", STEP), ("refresh", REFRESH)):
            assert sent[event] == {p: wanted[p] if p in purposes else 0 for p in sent[event]}, f"{name}, {event}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_whole_matrices_send_nothing(ranks):
    sent = traffic("zero2", ranks, "three", layers=4)
    assert not any(sent["step"].values())
    assert not any(sent["refresh"].values())


@pytest.mark.parametrize("ranks", [2, 4])
def test_wide_matrices_sharded_by_columns_move_no_rows(ranks):
    """The long-side placement is there to save exactly this."""
    for columns in (False, True):
        sent = traffic("fsdp2", ranks, "wide", columns=columns)["step"]
        assert [sent[p] > 0 for p in ("gradient rows", "updates")] == [not columns] * 2


@pytest.mark.parametrize("layout", ["ddp", "zero3", "fsdp2"])
def test_of_a_longer_side_that_is_projected_no_gram_is_made(layout):
    """It would be larger than the gradient, of which the owner gets the rows instead."""
    for name in ("tall", "wide"):
        assert traffic(layout, 2, name)["refresh"]["Gram matrices"] > 0
        assert traffic(layout, 2, name, proj_type="reverse_std")["refresh"]["Gram matrices"] == 0
