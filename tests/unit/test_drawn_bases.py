"""Bases that are not stored: on a CPU drawn once a refresh, planned as they are held, and none of a checkpoint's."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank import LowRankAdamW
from ds_lowrank.planner import plan_memory
from ds_lowrank.selections.gaussian import Gaussian
from ds_lowrank.subspace.project import row_squares

SHAPE, RANK, GAP = (12, 30), 4, 3
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


@pytest.fixture
def drawn(monkeypatch):
    """Numbers of the refreshes that drew."""
    found = []
    draw = Gaussian.draw

    def counted(self, key, *args, **kwargs):
        found.append(key.refresh)
        return draw(self, key, *args, **kwargs)

    monkeypatch.setattr(Gaussian, "draw", counted)
    return found


def optimizer_of(weight: torch.nn.Parameter) -> LowRankAdamW:
    group = {"params": [("w", weight)], "rank": RANK, "update_proj_gap": GAP}
    return LowRankAdamW([group], lr=0.01, rule="apollo", selection="gaussian", stagger=False)


def train(optimizer: LowRankAdamW, weight: torch.nn.Parameter, steps: range) -> None:
    for step in steps:
        weight.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def test_a_basis_is_drawn_once_a_refresh(drawn):
    weight = torch.nn.Parameter(torch.ones(SHAPE))
    train(optimizer_of(weight), weight, range(2 * GAP + 1))
    assert drawn == [0, 1, 2]


def test_an_earlier_state_gets_its_own_basis_again(drawn):
    weight = torch.nn.Parameter(torch.ones(SHAPE))
    optimizer = optimizer_of(weight)
    train(optimizer, weight, range(GAP))
    saved, at = optimizer.state_dict(), weight.detach().clone()
    assert not any("basis" in str(key) for key in _keys(saved))
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
    train(optimizer, weight, range(GAP - 1, GAP + 2))
    with torch.no_grad():
        weight.copy_(at)
    optimizer.load_state_dict(saved)
    train(optimizer, weight, range(GAP, 2 * GAP + 1))
    other = torch.nn.Parameter(torch.ones(SHAPE))
    train(optimizer_of(other), other, range(2 * GAP + 1))
    assert torch.equal(weight, other)


def _keys(tree):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _keys(value)


def test_what_a_cpu_keeps_is_planned():
    options = {"rule": "apollo", "selection": "gaussian"}
    plans = {d: plan_memory(LLAMA, 1, rank=8, lowrank=options, device=d) for d in ("cpu", "cuda")}
    found = {d: plan.ours.moments for d, plan in plans.items()}
    bases = 2 * 7 * 64 * 8 * 4
    assert found["cpu"]["resident"]["bases"] == bases
    assert found["cuda"]["resident"]["bases"] == 0
    # Where they are drawn in every step, those of one batch are there at once.
    assert found["cuda"]["step"]["temporaries"] - found["cpu"]["step"]["temporaries"] == bases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(30, 12), (1, 12), (3000, 130), (0, 12)])
def test_squares_of_rows_that_lie_as_columns(shape, dtype):
    lying = torch.randn(shape[::-1]).to(dtype)
    found = row_squares(lying.mT, torch.float32)
    expected = lying.double().square().sum(dim=0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, row_squares(lying.mT.contiguous(), torch.float32), rtol=1e-6, atol=0)
