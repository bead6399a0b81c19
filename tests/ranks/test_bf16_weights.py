"""bf16 weights without a master copy: rounded by the same bits wherever they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, assemble, build_model, held
from harness import shard
from torch.distributed.tensor import DTensor, distribute_tensor

import ds_lowrank

OPTIONS: dict[str, Any] = {"rank": 4, "update_proj_gap": 2, "lr": 1e-3, "gram_dtype": "float64", "seed": 3}
OPTIONS |= {"stochastic_rounding": True, "state_dtype": "int8", "weight_decay": 0.1}


def _train(case: Case, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights after four steps on gradients that are the same on any number of ranks."""
    model = build_model(case).bfloat16()
    if case.layout == "fsdp2":
        shard(case, model)
    if case.layout == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model).module
    optimizer = ds_lowrank.build_optimizer(model, {**OPTIONS, **changes})
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole
        optimizer.step()
    return assemble(optimizer, held(optimizer))[0]


@pytest.mark.parametrize(
    ("layout", "ranks", "columns"), [("ddp", 2, 0), ("ddp", 3, 0), ("fsdp2", 3, 0), ("fsdp2", 2, 1)]
)
def test_the_weights_do_not_depend_on_the_ranks(pools, layout, ranks, columns):
    """Rows that are cut, columns that become rows, and vectors: of other bits nearly half the weights would differ."""
    shapes = "columns" if columns else "small"
    alone = pools(1).run(_train, Case("one", shapes=shapes, layers=2), {})[0]
    there = pools(ranks).run(_train, Case(layout, shapes=shapes, layers=2, wide_on_columns=bool(columns)), {})
    other = pools(1).run(_train, Case("one", shapes=shapes, layers=2), {"seed": 4, "selection": "dominant"})[0]
    assert all(torch.equal(there[0][n], w) for weights in there for n, w in weights.items())
    differing = sum(int((there[0][n] != w).sum()) for n, w in alone.items())
    total = sum(w.numel() for w in alone.values())
    # What tips an fp32 sum over by its last bit tips few roundings over.
    assert differing <= 0.005 * total
    assert sum(int((other[n] != w).sum()) for n, w in alone.items()) > 0.05 * total


def test_without_bf16_weights_it_is_refused_on_every_rank(pools):
    assert all("stochastic_rounding is for bf16" in text for text in pools(2).run(_refused))


def _refused() -> str:
    assert dist.is_initialized()
    optimizer = ds_lowrank.build_optimizer(build_model(Case("ddp")), OPTIONS)
    try:
        optimizer.ensure_state()
    except ds_lowrank.LayoutError as error:
        return str(error)
    return "no error"
