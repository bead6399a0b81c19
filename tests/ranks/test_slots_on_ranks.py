"""States with slots of every axis on several ranks: whole in entries by parameter, and back where they are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_methods import FORMATS, SELECTIONS, make_optimizer, model_of

from ds_lowrank.state_dict.pieces import STATE_KEY

FIRST = {"rows": "row", "basis": "basis_row"}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "hsdp"])
def test_what_ranks_keep_is_one_entry(pools, layout, selection):
    formats = "int8" if layout == "fsdp2" else "fp32"
    results = pools(4 if layout == "hsdp" else 3).run(_there_and_back, layout, selection, formats)
    # Nothing is left out, and what there is one a matrix is on more than one rank.
    assert sum(copies for copies, _ in results) > 5
    assert all(same for _, same in results)


def _there_and_back(layout: str, selection: str, formats: str) -> tuple[int, bool]:
    """How many states of one a matrix this rank keeps, and whether all is what it was."""
    optimizer = _optimizer(layout, selection, formats, seed=0)
    states: dict[str, Any] = optimizer.state[STATE_KEY]
    kept = optimizer.method.states
    true: dict[str, dict[str, Tensor]] = {}
    for plan in optimizer.plans:
        generator = torch.Generator().manual_seed(len(true))
        for key, tensor in kept.tensors(plan.r, plan.dtype).items():
            size = (kept.length(key, plan.r, plan.dtype, plan.long, plan.short), tensor.width)
            numbers = torch.randint(1, 100, size, generator=generator).to(tensor.dtype)
            true.setdefault(plan.name, {})[key] = numbers
    for name, state in states.items():
        state.update(step=3, refreshes=1)
        if "row" in state:
            _each(kept, state, true[name], lambda here, part: here.copy_(part))
            state["indices"].copy_(torch.arange(3))
    if layout == "ddp":
        optimizer.consolidate_state_dict(None)
    packed = optimizer.state_dict()
    same = True
    for index, parameter in enumerate(["tall.weight", "wide.weight", "experts"]):
        entry = packed["state"][packed["param_groups"][0]["params"][index]]
        assert packed["param_groups"][0]["param_names"][index] in (parameter, "experts", "tall.weight", "wide.weight")
        parameter = packed["param_groups"][0]["param_names"][index]
        names = [f"experts[{k}]" for k in range(3)] if parameter == "experts" else [parameter]
        for key in true[names[0]]:
            parts = [true[name][key] for name in names]
            same &= torch.equal(whole(entry[key]), torch.stack(parts) if len(parts) > 1 else parts[0])
    other = _optimizer(layout, selection, formats, seed=1)
    other.load_state_dict(packed)
    other.ensure_state()
    loaded: dict[str, Any] = other.state[STATE_KEY]
    copies = 0
    checks: list[bool] = []
    for name, state in loaded.items():
        if "row" in state:
            copies += "toy_norm" in state
            _each(kept, state, true[name], lambda here, part: checks.append(torch.equal(here, part)))
    return copies, same and all(checks) and loaded.keys() == states.keys()


def _each(kept: Any, state: dict[str, Any], true: dict[str, Tensor], do: Any) -> None:
    for key, tensor in kept.tensors(3, torch.float32).items():
        first = state[FIRST[tensor.axis]] if tensor.axis in FIRST else 0
        do(state[key], true[key][first : first + len(state[key])])


def _optimizer(layout: str, selection: str, formats: str, seed: int) -> Any:
    model: Any = model_of(seed)
    size = torch.distributed.get_world_size()
    if layout == "ddp":
        DistributedDataParallel(model)
    else:
        names = ("shard",) if layout == "fsdp2" else ("replicate", "shard")
        mesh = init_device_mesh("cpu", (size,) if layout == "fsdp2" else (2, size // 2), mesh_dim_names=names)
        fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model, selection, **FORMATS[formats])
    optimizer.ensure_state()
    return optimizer
