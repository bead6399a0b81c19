"""What a rule of one's own gets wrong is said on all ranks, with its name and a matrix: nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thread_cases import SHAPES, Case, Run, run_case
from thread_ranks import run_ranks

from ds_lowrank.rules import RULES, Rule, Update
from ds_lowrank.rules.fira import Fira
from ds_lowrank.states.layout import Slot


@pytest.fixture
def tried(monkeypatch) -> Callable[..., None]:
    """Make a rule of this step known for one test, and a matrix with fewer rows than ranks."""
    monkeypatch.setitem(SHAPES, "few", ((3, 2),))

    def register(step: Any, **attributes: Any) -> None:
        cls = type("Tried", (attributes.pop("base", Rule),), {"name": "tried", "step": step, **attributes})
        monkeypatch.setitem(RULES._classes, "tried", cls)

    return register


def _said(case: Case) -> list[str]:
    """What a step raises, on every rank."""

    def step(case: Case) -> str:
        run = Run(case)
        try:
            run.step()
        except ValueError as error:
            return str(error)
        return ""

    return run_ranks(case.ranks, step, case)


def early(self, r, state, hyper, stack):
    if not len(r):
        return Update(r)
    yield stack.totals(r[:, 0])
    return Update(r)


def longer(self, r, state, hyper, stack):
    yield r.new_zeros(1 + len(r))
    return Update(r)


def largest(self, r, state, hyper, stack):
    r.max()  # of no row there is none
    yield stack.totals(r[:, 0])
    return Update(r)


def hidden(self, r, state, hyper, stack):
    return (early(self, r, state, hyper, stack),)[0]


def number(self, r, state, hyper, stack):
    yield 1.0
    return Update(r)


def column(self, r, state, hyper, stack):
    return Update(r[:, :1])


def broadcast(self, r, state, hyper, stack):
    state["held"] = r.new_ones(r.shape[1])
    return Update(r)


def pushing(self, r, state, hyper, stack):
    return Update(r, r[:, 0])


def nothing(self, r, state, hyper, stack):
    return None


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (early, "its ranks do not agree, it "),
        (longer, "its ranks do not agree, it yields (2,) float32 on rank 0, "),
        (largest, "it raises RuntimeError: max(): Expected reduction dim"),
        (hidden, "it returns a generator without being one: write return (yield from ...)"),
        (number, "it yields float, not a tensor"),
        (column, "it returns low as ("),
        (broadcast, "it leaves held as (2,) float32, not (1, 2) float32"),
        (pushing, "it returns a row_scale and does not declare reads_gradient = True"),
        (nothing, "it returns NoneType, not an Update"),
    ],
)
@pytest.mark.parametrize("selection", ["dominant", "online_pca"])
def test_every_rank_says_what_a_rule_gets_wrong(tried, selection, step, text):
    tried(step, slots=(Slot("held"),))
    said = _said(Case("fsdp2", 4, rule="tried", shapes="few", layers=1, steps=1, r=2, selection=selection))
    assert len(set(said)) == 1, said
    assert said[0].startswith("rule 'tried', first step of layer0_")
    assert text in said[0]


def test_a_rule_that_hands_over_to_one_with_sums_has_its_sums(tried):
    """Ranks with no row take part, though its own step is no generator."""

    def step(self, r, state, hyper, stack):
        return Fira.step(self, r, state, hyper, stack)

    case = Case("fsdp2", 4, rule="fira", shapes="few", layers=1, steps=3, r=2)
    wanted = run_case(case)
    tried(step, base=Fira)
    run_ranks(4, _three_steps, case.__class__(**{**case.__dict__, "rule": "tried"}), wanted.weights)


def _three_steps(case: Case, wanted: dict[str, torch.Tensor]) -> None:
    run = Run(case)
    for _ in range(case.steps):
        run.step()
    for name, (piece, values) in run.pieces().items():
        end = wanted[name]
        if piece.dim is None:
            part = end.reshape(-1)[piece.start : piece.stop]
        else:
            part = end.narrow(piece.dim, piece.start, piece.stop - piece.start)
        assert torch.equal(values.reshape(-1), part.reshape(-1)), name


@pytest.mark.parametrize("selection", ["dominant", "online_pca"])
def test_a_rule_without_sums_is_not_asked_where_there_is_no_row(tried, selection):
    tried(lambda self, r, state, hyper, stack: Update(r / r.max()))
    assert _said(Case("fsdp2", 4, rule="tried", shapes="few", layers=1, steps=1, r=2, selection=selection)) == [""] * 4


def test_moments_are_projected_of_a_rule_that_keeps_none(tried):
    tried(lambda self, r, state, hyper, stack: Update(r.sign_()))
    case = Case("zero3", 2, rule="tried", layers=1, moments="project", gap=1, steps=3)
    run_ranks(2, lambda case: [run.step() for run in [Run(case)] for _ in range(3)] and None, case)
