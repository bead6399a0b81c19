"""What a step holds for a moment beside weights, gradients and states: never something of a matrix's size."""

from __future__ import annotations

import gc

import pytest
import torch
from tracker import Tracker

import ds_lowrank
from ds_lowrank.rules import RULES
from ds_lowrank.states import blocks

SHAPES = {"tall": (6000, 128), "wide": (128, 6000), "square": (300, 300)}
SMALL = 16384  # counters, indices, random numbers of a draw


def peak(
    shape: tuple[int, int], rank: int, gap: int, dtype: torch.dtype, gram_dtype: str = "float32", **method: str
) -> int:
    """Most bytes alive during the third step beyond what there is before it."""
    with Tracker() as tracker:
        weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
        group = {"params": [("w", weight)], "rank": rank, "update_proj_gap": gap}
        optimizer = ds_lowrank.LowRankAdamW([group], gram_dtype=gram_dtype, **method)
        for _ in range(3):
            weight.grad = torch.randn(shape).to(dtype)
            gc.collect()
            before = tracker.alive
            tracker.restart()
            optimizer.step()
    return tracker.peak - before


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_ordinary_step_holds_one_projection(shape, dtype):
    long, short = max(SHAPES[shape]), min(SHAPES[shape])
    projection = 4 * long * 32
    widened = 0 if dtype == torch.float32 else 4 * max(256, short) * short  # of gradients, then of weights
    assert projection <= peak(SHAPES[shape], 32, 100, dtype) <= projection + widened + SMALL


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gram_dtype", ["float32", "float64"])
def test_a_refresh_holds_four_grams(shape, gram_dtype):
    """While eigenvectors are computed two of the four are ``syevd``'s workspace, which is not allocated by torch."""
    square = min(SHAPES[shape]) ** 2 * (4 if gram_dtype == "float32" else 8)
    found = peak(SHAPES[shape], 8, 1, torch.float32, gram_dtype)
    assert 2 * square <= found <= 4 * square + SMALL


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_moments_are_widened_some_rows_at_a_time(shape, monkeypatch):
    """Two of them, a quotient, an index of 8 bytes and what is found there."""
    monkeypatch.setattr(blocks, "PART", 1 << 11)
    part = (1 << 11) * torch.get_num_threads() * (2 * 4 + 4 + 8 + 4)
    projection = 4 * max(SHAPES[shape]) * 64
    found = peak(SHAPES[shape], 64, 100, torch.float32, state_dtype="int8")
    assert projection < found <= projection + part + SMALL


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_basis_that_is_refined_takes_no_copy_of_the_gradient(shape, dtype):
    long, short = max(SHAPES[shape]), min(SHAPES[shape])
    widened = 0 if dtype == torch.float32 else 4 * max(256, short) * short
    found = peak(SHAPES[shape], 32, 100, dtype, selection="online_pca")
    squares = 8 * 4 * 32 * 32  # RᵀR, BᵀB and what is made of them
    assert found <= 4 * (long + 3 * short) * 32 + widened + squares + 2 * SMALL


@pytest.mark.parametrize("rule", ["adamw", "grams", "apollo", "apollo_mini", "fira"])
def test_a_rule_holds_the_copies_that_it_says(rule):
    projection, rows = 4 * 6000 * 32, 4 * 6000
    copies = RULES.make(rule).copies
    found = peak(SHAPES["tall"], 32, 100, torch.float32, rule=rule, selection="dominant")
    assert (1 + copies) * projection <= found <= (1 + copies) * projection + 8 * rows + SMALL
