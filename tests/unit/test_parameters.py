"""Parameters of every kind that torch's AdamW trains: wherever their elements lie, complex, empty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ds_lowrank
from ds_lowrank import LayoutError, LowRankAdamW

ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MEMORY = {
    "row by row": lambda t: t.clone(memory_format=torch.contiguous_format),
    "transposed": lambda t: t.mT.contiguous().mT,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


def train(optimizer, params, steps: int, gradient=lambda g: g) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            wide = torch.promote_types(p.dtype, torch.float32)
            p.grad = gradient(torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype))
        optimizer.step()


@pytest.mark.parametrize("gradient", MEMORY)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_full_rank_parameters_move_as_with_torchs_adamw_wherever_their_elements_lie(memory, gradient, dtype):
    values = torch.randn(4, 3, 5, 2, dtype=dtype)
    ours, theirs = nn.Parameter(MEMORY[memory](values)), nn.Parameter(values.clone())
    train(LowRankAdamW([ours], **ADAMW), [ours], 4, MEMORY[gradient])
    train(torch.optim.AdamW([theirs], **ADAMW, foreach=False), [theirs], 4)
    assert not torch.equal(theirs, values)
    assert (ours - theirs).abs().max() < 1e-6
    assert ours.stride() == MEMORY[memory](values).stride()


@pytest.mark.parametrize("memory", [kind for kind in MEMORY if kind != "row by row"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_dtype": "bf16"}),
        (torch.float32, {"state_dtype": "int8"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": "int8"}),
    ],
)
@pytest.mark.parametrize(
    "group", [{}, {"rank": 3, "stacked": False, "update_proj_gap": 2}, {"rank": 1, "stacked": True}]
)
def test_every_format_steps_them_bitwise_as_it_steps_those_that_lie_row_by_row(memory, dtype, options, group):
    values = torch.randn(4, 3, 5, 2).to(dtype) if not group.get("stacked") else torch.randn(1, 4, 3, 5).to(dtype)[0]
    if values.ndim == 3 and memory == "channels last":
        pytest.skip("of four dimensions")
    ends = []
    for kind in ("row by row", memory):
        p, v = nn.Parameter(MEMORY[kind](values)), nn.Parameter(torch.ones(3))
        optimizer = LowRankAdamW([{"params": [("p", p)], **group}, {"params": [("v", v)]}], **ADAMW, **options)
        train(optimizer, [p, v], 5, lambda g: g if g.ndim == 1 else MEMORY["row by row"](g))
        ends.append((p.detach().clone(), optimizer.state_dict()["state"]))
    (row, state), (other, states) = ends
    assert not torch.equal(row, values)
    assert torch.equal(row, other)
    assert all(torch.equal(state[0][key], states[0][key]) for key in state[0])


def test_a_load_brings_moments_to_where_the_parameter_has_its_elements():
    """Saved by one process with channels_last, gone on with by one without, and the other way round."""
    for there, here in (("channels last", "row by row"), ("row by row", "channels last")):
        values = torch.randn(4, 3, 5, 2)
        p, q = nn.Parameter(MEMORY[there](values)), nn.Parameter(MEMORY[here](values))
        first, second = LowRankAdamW([p], **ADAMW), LowRankAdamW([q], **ADAMW)
        train(first, [p], 3)
        q.data.copy_(p.data)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(first, [p], 3)
        train(second, [q], 3)
        assert torch.equal(p, q)


def test_a_convnet_with_channels_last_trains_and_reads_a_checkpoint(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 16))
        model = model.to(memory_format=torch.channels_last)
        return model, ds_lowrank.build_optimizer(model, {"rank": 4}, lr=0.01)

    def run(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)).sum().backward()
            optimizer.step()

    model, optimizer = build()
    run(model, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again, other = build()
    ds_lowrank.load_checkpoint(tmp_path, again, other)
    run(model, optimizer, range(3, 6))
    run(again, other, range(3, 6))
    assert not model[0].weight.is_contiguous()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_an_expanded_parameter_is_refused_by_name():
    optimizer = LowRankAdamW([("p", nn.Parameter(torch.ones(1, 4).expand(3, 4)))])
    with pytest.raises(LayoutError, match=r"p \(3, 4\) is an expanded tensor"):
        optimizer.ensure_state()


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_a_sparse_gradient_is_refused_by_name_before_anything_moves(projected, layerwise):
    embedding, linear = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4)
    groups: list[dict[str, Any]] = [{"params": [("bias", linear.bias), ("linear", linear.weight)]}]
    groups.append({"params": [("emb", embedding.weight)], **({"rank": 2} if projected else {})})
    optimizer = LowRankAdamW(groups, lr=0.1, layerwise=layerwise)
    optimizer.ensure_state()
    before = [p.detach().clone() for p in (embedding.weight, linear.bias)]
    with pytest.raises(
        RuntimeError, match=r"emb \(10, 4\) has a sparse gradient: Adam does not support sparse gradients"
    ):
        _backward_and_step(embedding, linear, optimizer)
    if not layerwise:  # what comes before it in the backward pass has stepped there
        assert all(torch.equal(p, b) for p, b in zip((embedding.weight, linear.bias), before))


def test_a_gradient_that_becomes_sparse_later_is_refused_too():
    embedding, linear = nn.Embedding(10, 4), nn.Linear(4, 4)
    optimizer = LowRankAdamW([("emb", embedding.weight), *linear.named_parameters()], lr=0.1)
    _backward_and_step(embedding, linear, optimizer)
    embedding.sparse = True
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"emb \(10, 4\) has a sparse gradient"):
        _backward_and_step(embedding, linear, optimizer)


def _backward_and_step(embedding, linear, optimizer) -> None:
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()


def test_complex_matrices_are_refused_where_they_are_to_be_projected_and_trained_elsewhere():
    with pytest.raises(ValueError, match=r"group 0: w \(6, 5\) is torch.complex64 and cannot be projected"):
        LowRankAdamW([{"params": [("w", nn.Parameter(torch.randn(6, 5, dtype=torch.complex64)))], "rank": 2}])
    model = nn.ModuleDict({"real": nn.Linear(8, 8), "other": nn.Linear(8, 8, dtype=torch.complex64)})
    assert ds_lowrank.projected_names(model, ds_lowrank.LowRankConfig(rank=2)) == ["real.weight"]
    with pytest.raises(ValueError, match=r"'other' matches other \(8, 8\), which is torch.complex64"):
        ds_lowrank.projected_names(model, ds_lowrank.LowRankConfig(rank=2, optim_target_modules=["other"]))
    optimizer = LowRankAdamW([("c", nn.Parameter(torch.randn(3, dtype=torch.complex64)))], state_dtype="int8")
    with pytest.raises(LayoutError, match=r"c \(3,\) is torch.complex64, of which state_dtype 'int8' has no codes"):
        optimizer.ensure_state()


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("rank", [None, 2, [2, 3]])
def test_what_has_no_elements_does_nothing(rank, state_dtype):
    """As with torch's optimizers: no error, before and after a load."""
    empty, full = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.randn(6, 5))
    group = {"params": [("empty", empty), ("full", full)], **({"rank": rank} if rank else {})}
    optimizer = LowRankAdamW([group], lr=0.1, state_dtype=state_dtype)
    before = full.detach().clone()
    train(optimizer, [empty, full], 2)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, [empty, full], 1)
    assert [spec.name for spec in optimizer.matrix_specs] == (["full"] if rank else [])
    assert not torch.equal(full, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("targets", ["all-linear", ["first", "none"]])
def test_a_layer_without_outputs_is_not_projected(targets):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "none": nn.Linear(8, 0)})
    config = {"rank": 2, "optim_target_modules": targets}
    if targets != "all-linear":
        with pytest.raises(ValueError, match="'none' matches no trainable linear layer"):
            ds_lowrank.build_optimizer(model, config)
        return
    optimizer = ds_lowrank.build_optimizer(model, config, lr=0.1)
    assert [spec.name for spec in optimizer.matrix_specs] == ["first.weight"]
    train(optimizer, list(model.parameters()), 2)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_a_learning_rate_may_be_a_tensor_that_is_changed_in_place(state_dtype):
    ends = []
    for lr in (0.5, torch.tensor(0.5)):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5))]
        groups = [{"params": [("w", params[0])], "rank": 2}, {"params": [("v", params[1])]}]
        optimizer = LowRankAdamW(groups, lr=lr, state_dtype=state_dtype, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for _ in range(3):
            train(optimizer, params, 1)
            schedule.step()
        ends.append([p.detach().clone() for p in params])
        if isinstance(lr, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is lr or isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
        assert float(optimizer.param_groups[1]["lr"]) == 0.0625
    assert all(torch.equal(p, q) for p, q in zip(*ends))


@pytest.mark.parametrize("lr", [torch.tensor([0.1, 0.2]), torch.tensor(-0.1), torch.tensor(float("nan"))])
def test_a_tensor_that_is_no_learning_rate_is_refused(lr):
    with pytest.raises(ValueError, match=r"lr must be a number >= 0, got tensor"):
        LowRankAdamW([nn.Parameter(torch.ones(3))], lr=lr)
