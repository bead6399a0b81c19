"""Sums of projected gradients on one process: what narrow ones are in the mean."""

from __future__ import annotations

import pytest
import torch

import ds_lowrank


@pytest.mark.parametrize(("dtype", "far"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_numbers_below_half_a_unit_are_not_lost(dtype, far):
    """300 micro-batches of a thousandth each, on a one: rounded to nearest in bf16 the sum would stay one."""
    weight = torch.nn.Parameter(torch.zeros(256, 8))
    group = {"params": [("w", weight)], "rank": 8}
    optimizer = ds_lowrank.LowRankAdamW([group], gradients="projected", accumulator_dtype=dtype, selection="random")
    optimizer.ensure_state()
    (weight.sum()).backward()
    for _ in range(300):
        (weight.sum() * 1e-3).backward()
    norm = float(optimizer.clip_grad_norm_(1e9))  # with r = short the projection has the gradient's length
    assert abs(norm / (1.3 * weight.numel() ** 0.5) - 1) < far
    kept = optimizer._projected.sums._rows["w"]
    assert kept.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
