"""FSDP2 and real models: tied embeddings, frozen parameters, experts, meta initialisation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ds_lowrank

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OPTIONS: dict[str, Any] = {"rank": 4, "update_proj_gap": 3, "wave_size": 4, "lr": 0.01, "gram_dtype": "float64"}


def model_of(kind: str, **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}))
    # The grouped kernel of experts has no float64.
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return model.double()  # free-running trajectories are compared: in fp32 rounding would grow along the way


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, ranks: int, steps: int = 7) -> None:
    """Every rank its own batch; one process all of them."""
    for step in range(steps):
        batches = [_tokens(step, k) for k in range(ranks)] if rank < 0 else [_tokens(step, rank)]
        for tokens in batches:
            (model(input_ids=tokens, labels=tokens).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _tokens(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(100 * step + rank))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "changes", "frozen"),
    [
        pytest.param("llama", {"tie_word_embeddings": True}, "", id="tied-embeddings"),
        pytest.param("llama", {}, "layers.1", id="a-frozen-layer"),
        pytest.param("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}, "", id="experts"),
    ],
)
def test_a_transformer_trains_as_on_one_process(pools, ranks, kind, changes, frozen):
    alone = _freeze(model_of(kind, **changes), frozen)
    begin = {n: p.detach().clone() for n, p in alone.named_parameters()}
    train(alone, _optimizer(alone), -1, ranks)
    together = pools(ranks).run(_train_sharded, kind, changes, frozen)[0]
    moved = 0
    for name, parameter in alone.named_parameters():
        distance = (parameter.detach() - begin[name]).norm()
        assert (together[name] - parameter.detach()).norm() <= 1e-9 * distance, name
        moved += bool(distance > 0)
    assert moved == sum(p.requires_grad for p in alone.parameters())


def _freeze(model: nn.Module, pattern: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if pattern and pattern in name:
            parameter.requires_grad_(False)
    return model


def _optimizer(model: nn.Module) -> ds_lowrank.LowRankAdamW:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*clamped to.*")
        return ds_lowrank.build_optimizer(model, OPTIONS)


def _shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _train_sharded(kind: str, changes: dict[str, Any], frozen: str) -> dict[str, torch.Tensor]:
    model = _shard(_freeze(model_of(kind, **changes), frozen))
    train(model, _optimizer(model), torch.distributed.get_rank(), torch.distributed.get_world_size())
    return {n: _whole(p) for n, p in model.named_parameters()}


def _whole(parameter: Any) -> torch.Tensor:
    return parameter.detach().full_tensor()


def test_a_model_made_on_the_meta_device(pools):
    for text, same in pools(2).run(_train_from_meta):
        assert "on the meta device: materialise them first" in text
        assert same


def _train_from_meta() -> tuple[str, bool]:
    plain = model_of("llama")
    with torch.device("meta"):
        empty = model_of("llama")
    sharded = _shard(empty)
    early = _optimizer(sharded)
    try:
        early.ensure_state()
        text = "no error"
    except ds_lowrank.LayoutError as error:
        text = str(error)
    sharded.to_empty(device="cpu")
    for buffer, other in zip(sharded.buffers(), plain.buffers()):
        buffer.copy_(other)
    for parameter, other in zip(sharded.parameters(), plain.parameters()):
        local = torch.distributed.tensor.distribute_tensor(other.detach(), parameter.device_mesh, parameter.placements)
        parameter.data.copy_(local)
    train(sharded, _optimizer(sharded), torch.distributed.get_rank(), 2)
    direct = _shard(plain)
    train(direct, _optimizer(direct), torch.distributed.get_rank(), 2)
    ours, theirs = ([_whole(p) for p in model.parameters()] for model in (sharded, direct))
    return text, all(map(torch.equal, ours, theirs))


def test_parameters_that_nobody_sharded_are_refused_by_name(pools):
    for text in pools(2).run(_forgotten):
        assert "model.embed_tokens.weight" in text
        assert "Apply fully_shard to the root module too" in text


def _forgotten() -> str:
    model: Any = model_of("llama")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    try:
        _optimizer(model).ensure_state()
    except ds_lowrank.LayoutError as error:
        return str(error)
    return "no error"


def test_a_placement_that_suits_every_matrix():
    place = ds_lowrank.long_side_placement(4, min_numel=0)
    empty = {
        shape: nn.Parameter(torch.empty(shape))
        for shape in ((8, 6), (6, 8), (6, 9), (4, 6, 8), (3, 8, 6), (3, 6, 8), (5,))
    }
    found = {shape: str(place(parameter)) for shape, parameter in empty.items()}
    assert found == {
        (8, 6): "None",  # rows are whole already
        (6, 8): "S(1)",
        (6, 9): "None",  # FSDP2 splits other dimensions than the first evenly only
        (4, 6, 8): "None",  # whole experts
        (3, 8, 6): "S(1)",
        (3, 6, 8): "S(2)",
        (5,): "None",
    }
    assert ds_lowrank.long_side_placement(4)(empty[(6, 8)]) is None  # too small to matter
