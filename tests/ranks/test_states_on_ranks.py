"""States that do not fit one rank, gradients that one rank cannot use, weights that lie otherwise: everywhere alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, arguments, build_model
from harness import start, whole
from torch import nn
from torch.distributed.tensor import DTensor

from ds_lowrank import LowRankAdamW

HALF = r"layers\.0\..*"  # the other layers are trained full-rank


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero2"])
@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("exp_avg", torch.zeros(3), r"exp_avg of .* is (3,) in it, and the parameter is"),
        ("step", float("nan"), "is nan, not a whole number >= 0"),
    ],
)
def test_a_state_that_does_not_fit_one_rank_is_refused_on_every_rank(pools, layout, key, value, text):
    case = Case(layout=layout, accumulation=1, targets=HALF)
    for error in pools(2).run(_load_wrong, case, key, value):
        assert "does not fit this run (rank 1): " in error
        assert all(part in error for part in text.split(" .* "))


def test_replicas_with_other_counters_are_refused_on_every_rank(pools):
    """They would come apart without a word."""
    for error in pools(2).run(_load_wrong, Case(layout="ddp", accumulation=1, targets=HALF), "step", 7):
        assert "(rank 1): of layers.1.0.weight it has 7 steps, and on rank 0 2 steps" in error


def _load_wrong(case: Case, key: str, value: Any) -> str:
    rank = torch.distributed.get_rank()
    run = start(case, build_model(case))
    for step in range(2):
        run.step([arguments(case, step, 0, rank)])
    if case.layout == "ddp":
        run.optimizer.consolidate_state_dict(None)
        state = copy.deepcopy(run.optimizer.state_dict())
    else:
        state = copy.deepcopy(torch.optim.Optimizer.state_dict(run.optimizer))
    if rank == 1:
        flat = next(e for e in state["state"].values() if "exp_avg" in e and "refreshes" not in e)
        flat[key] = value
    run.optimizer.load_state_dict(state)
    try:
        run.optimizer.ensure_state()
    except ValueError as error:
        return str(error)
    finally:
        run.close()
    return "no error"


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_fsdp2_takes_its_shards_of_moments_that_are_whole_on_every_rank(pools, state_dtype):
    case = Case(layout="fsdp2", accumulation=1, targets=HALF, state_dtype=state_dtype)
    assert all(pools(2).run(_load_whole, case))


def _load_whole(case: Case) -> bool:
    rank = torch.distributed.get_rank()
    run = start(case, build_model(case))
    for step in range(2):
        run.step([arguments(case, step, 0, rank)])
    state = copy.deepcopy(run.optimizer.state_dict())
    kept = [p.detach().to_local().clone() for p in run.model.parameters()]  # type: ignore[attr-defined]
    run.step([arguments(case, 2, 0, rank)])
    wanted = [whole(p).clone() for p in run.model.parameters()]
    for entry in state["state"].values():
        entry.update({key: whole(t) for key, t in entry.items() if isinstance(t, DTensor)})
    for p, w in zip(run.model.parameters(), kept):
        p.detach().to_local().copy_(w)  # type: ignore[attr-defined]
    run.optimizer.load_state_dict(state)
    run.step([arguments(case, 2, 0, rank)])
    return all(map(torch.equal, wanted, [whole(p) for p in run.model.parameters()]))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}])
def test_weights_may_lie_in_any_order_on_every_replica(pools, options):
    for row, other in zip(*[pools(2).run(_replicated, memory, options) for memory in (False, True)]):
        assert all(map(torch.equal, row, other))


def _replicated(other: bool, options: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    kernels = [torch.randn(8, 5, 3, 3) for _ in range(2)]
    tensors = [t.to(memory_format=torch.channels_last) if other else t for t in kernels]
    tensors.append(torch.randn(12, 7).mT.contiguous().mT if other else torch.randn(12, 7))
    params = [nn.Parameter(t) for t in tensors]
    groups: list[dict[str, Any]] = [{"params": [("full", params[0])]}]
    groups.append({"params": [("kernel", params[1]), ("matrix", params[2])], "rank": 3, "stacked": [False, None]})
    optimizer = LowRankAdamW(groups, lr=0.1, update_proj_gap=2, weight_decay=0.1, **options)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    assert params[0].is_contiguous() != other
    return [p.detach().contiguous() for p in params]


def test_a_sparse_gradient_on_one_rank_is_refused_on_every_rank(pools):
    for error in pools(2).run(_sparse):
        assert "emb (6, 4) has a sparse gradient: Adam does not support sparse gradients" in error


def _sparse() -> str:
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = LowRankAdamW([("emb", p)])
    p.grad = torch.ones(6, 4)
    if torch.distributed.get_rank() == 1:
        p.grad = p.grad.to_sparse()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error) if torch.equal(p, torch.ones(6, 4)) else "it moved"
    return "no error"
