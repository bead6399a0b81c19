"""A rule and a selection from files outside the package: under every framework, kept in int8, saved and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import REFERENCES, brief, run_case
from low_bit import LowBitReference, rounded
from rank_pool import RankPool
from resume import Move, try_move
from torch import Tensor

from ds_lowrank.registry import import_methods

OUTSIDE = Path(__file__).resolve().parents[1] / "data" / "outside"
FILES = [str(OUTSIDE / "lion.py"), str(OUTSIDE / "axes.py")]
INT8 = {"rule": "lion", "state_dtype": "int8"}


class LionReference(LowBitReference):
    def update(self, g: Tensor, r: Tensor, state: dict) -> Tensor:
        (beta1, beta2), m = self.betas, state.get("m", torch.zeros_like(r))
        n = (beta1 * m + (1 - beta1) * r).sign()
        state["m"] = rounded(self.formats.exp_avg, beta2 * m + (1 - beta2) * r)
        return self.scale * n @ state["basis"].T


class AxesReference(LowBitReference):
    def refresh(self, name: str, g: Tensor, state: dict) -> None:
        columns = g.norm(dim=0).sort(descending=True).indices[: state["r"]].sort().values
        state["basis"] = torch.eye(g.shape[1])[:, columns]
        state["refreshes"] += 1


def known() -> None:
    """On every rank, as a script of one's own imports its file."""
    import_methods(FILES)
    REFERENCES.update(lion=LionReference, axes=AxesReference)


@pytest.fixture
def outside(pools) -> Callable[[int], RankPool]:
    def pool(size: int) -> RankPool:
        pools(size).run(known)
        return pools(size)

    return pool


@pytest.mark.parametrize(
    ("layout", "ranks", "method"),
    [
        ("zero2", 3, {"moments": "project"}),
        ("zero3", 2, {"selection": "dominant"}),
        ("fsdp2", 3, {"moments": "project"}),
    ],
)
def test_a_rule_of_ones_own_is_what_it_is_on_one_process(outside, layout, ranks, method):
    check(outside, ranks, layout, {**INT8, **method})


@pytest.mark.parametrize(("layout", "ranks"), [("zero2", 2), ("zero3", 3), ("fsdp2", 2)])
def test_so_is_a_selection(outside, layout, ranks):
    check(outside, ranks, layout, {"rule": "adamw", "selection": "axes", "moments": "keep"})


def check(outside: Callable[[int], RankPool], ranks: int, layout: str, settings: dict) -> None:
    results = outside(ranks).run(run_case, brief(ranks, layout=layout, **settings), with_free=False)
    assert results[0]["deviation"] < 2e-3
    assert results[0]["refreshes"] >= 3
    assert results[0]["shared"] > 0
    assert all(r["ranks_equal"] and r["replicas_equal"] and r["model_equal"] for r in results)


@pytest.mark.parametrize(
    ("before", "after"),
    [(("zero2", 3), ("zero2", 2)), (("zero3", 2), ("zero3", 3)), (("fsdp2", 3), ("fsdp2", 2))],
)
def test_it_is_saved_and_resumed_on_another_number_of_ranks(outside, before, after):
    pools = {ranks: outside(ranks) for ranks in (2, 3)}
    move = Move(before, after, how="any", settings=tuple(INT8.items()))
    assert try_move(pools, move, ("small", 1, 4), steps=(4, 1))["state_equal"]
