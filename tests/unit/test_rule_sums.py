"""Squares of gradients that rules ask for, found once a step, and the limiter in numbers and in tensors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_lowrank import LowRankAdamW
from ds_lowrank.engine.evidence import Evidence
from ds_lowrank.rules import Stack
from ds_lowrank.rules.limiter import _limit_numbers, _limit_tensors
from ds_lowrank.subspace.project import energy, row_squares

SHAPES = ((30, 12), (12, 30), (20, 20))
RULES = [("apollo", "gaussian"), ("apollo_mini", "gaussian"), ("fira", "random"), ("fira", "dominant")]


def evidence() -> Evidence:
    ranks = SimpleNamespace(rank=0, device=torch.device("cpu"))
    return Evidence(SimpleNamespace(ranks=ranks), torch.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.0, 1e-30, 1e30, 0.0, math.nan, -math.inf])
def test_a_gradient_is_judged_alike_where_its_squares_are_wanted(value):
    gradient = torch.zeros(8, 5)
    gradient[6, 1] = value
    plan: Any = SimpleNamespace(name="w", shared=False, dtype=torch.float32)
    for rows in ([gradient], [gradient.mT], [gradient[:0], gradient[:6], gradient[6:]]):
        squares: dict[str, list[Tensor]] = {}
        found = evidence().alive([plan], {"w": rows}, squares)
        assert found == evidence().alive([plan], {"w": rows}) == ({"w"} if value and math.isfinite(value) else set())
        assert squares.keys() == found
        for of, block in zip(squares.get("w", ()), rows):
            assert torch.equal(of, row_squares(block, torch.float32))


def test_a_stack_gives_known_squares_away_once():
    blocks = [[torch.randn(4, 6), torch.randn(2, 6)], [torch.randn(3, 6)]]
    known = {0: [row_squares(block, torch.float32) for block in blocks[0]]}
    expected = torch.cat([block.square().sum(dim=1) for of in blocks for block in of])
    stack = Stack([6, 3], blocks, squares=known)
    totals = torch.stack([expected[:6].sum(), expected[6:].sum()])
    torch.testing.assert_close(stack.gradient_totals(torch.float32), totals)
    for _ in range(2):  # what a rule does to them is its own
        torch.testing.assert_close(stack.gradient_squares(torch.float32).mul_(2), 2 * expected)
    torch.testing.assert_close(stack.gradient_totals(torch.float32), totals)


def train(rule: str, selection: str, forgetful: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    named = [(f"w{k}", weight) for k, weight in enumerate(weights)]
    group = {"params": named, "rank": 4, "update_proj_gap": 3}
    optimizer = LowRankAdamW([group], lr=0.05, rule=rule, selection=selection, wave_size=2)
    optimizer.ensure_state()
    if forgetful:
        optimizer._stepper._squares = None  # type: ignore[union-attr]
    for step in range(8):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator) * (1 + step % 3)
        optimizer.step()
    assert forgetful or optimizer._stepper._squares == {}  # type: ignore[union-attr]
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize(("rule", "selection"), RULES)
def test_squares_that_are_found_ahead_are_those_of_this_step(rule, selection):
    for found, expected in zip(train(rule, selection, False), train(rule, selection, True)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limiter_in_numbers_is_the_limiter_in_tensors(dtype):
    special = [0.0, 1e-12, 0.5, 1.0, 1.005, 1.1, 40.0, math.nan, math.inf]
    kept = torch.tensor(special[:-2], dtype=dtype)  # what is remembered is finite
    norms = torch.tensor(special, dtype=dtype).repeat(len(kept))
    last = kept.repeat_interleave(len(special))
    for count in (len(last), 1):
        for at in range(0, len(last), count):
            part = slice(at, at + count)
            remembered = [last[part].clone() for _ in range(2)]
            expected = _limit_tensors(remembered[0], norms[part].clone(), 0.7, 1.01, 3.0)
            found = _limit_numbers(remembered[1], norms[part].clone(), 0.7, 1.01, 3.0)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(remembered[1], remembered[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_square_of_a_whole_matrix_is_not_lost_in_long_sums(dtype):
    a = torch.randn(768, 2048, generator=torch.Generator().manual_seed(0)).to(dtype)
    for lying in (a, a.mT, a[:, :2000], a[:0]):
        found = energy(lying, torch.float32)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), lying.double().square().sum(), rtol=1e-6, atol=0)
