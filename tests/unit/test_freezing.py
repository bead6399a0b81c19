"""What is trained may change between any two steps, and between a save and a load."""

import copy
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ds_lowrank
from ds_lowrank import LowRankAdamW
from ds_lowrank.optimizer import STATE_KEY

SHAPES = {"a": (12, 9), "b": (7, 15), "c": (10, 10), "bias": (13,)}


class Net(nn.Module):
    """Its gradients are the targets that it is given: known, and independent of each other."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for name, shape in SHAPES.items():
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, step):
        generator = torch.Generator().manual_seed(step)
        targets = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        return sum((p * targets[name]).sum() for name, p in self.named_parameters())


def groups_of(net, *names):
    low = [{"params": [(n, net.get_parameter(n))], "rank": 3, "update_proj_gap": 4} for n in names if n != "bias"]
    return low + [{"params": [(n, net.get_parameter(n))]} for n in names if n == "bias"]


def build(net, *names, **options):
    options = {"wave_size": 1, "gram_dtype": "float64", "weight_decay": 0.1, **options}
    return LowRankAdamW(groups_of(net, *(names or SHAPES)), lr=0.05, **options)


def train(net, optimizer, *steps):
    for step in steps:
        net(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "int8"}, {"layerwise": True}], ids=["fp32", "int8", "layerwise"]
)
@pytest.mark.parametrize("name", ["b", "bias"])
def test_what_is_frozen_stands_still_and_goes_on_where_it_was(name, options):
    """Frozen before the first step, set free, frozen again: its own steps are all that it knows of."""
    net, peer = Net(), Net()
    optimizer, undisturbed = build(net, **options), build(peer, **options)
    parameter = net.get_parameter(name)
    parameter.requires_grad_(False)
    for each in (optimizer, undisturbed):
        each.ensure_state()  # layerwise hooks
    before = weights(net)
    train(net, optimizer, 100, 101)
    assert torch.equal(parameter, before[name])
    parameter.requires_grad_(True)
    train(net, optimizer, 0, 1, 2)
    parameter.requires_grad_(False)
    before = weights(net)
    train(net, optimizer, 200, 201)
    after = weights(net)
    assert [n for n in SHAPES if torch.equal(before[n], after[n])] == [name]
    parameter.requires_grad_(True)
    train(net, optimizer, 3, 4, 5, 6)
    train(peer, undisturbed, *range(7))
    assert torch.equal(parameter, peer.get_parameter(name))


def test_a_gradient_left_over_from_before_the_freeze_moves_nothing():
    net = Net()
    optimizer = build(net)
    train(net, optimizer, 0)
    net(1).backward()
    net.requires_grad_(False)
    before = weights(net)
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "int8"}, {"layerwise": True}], ids=["fp32", "int8", "layerwise"]
)
def test_groups_are_added_between_steps(options):
    """States go on as they are, and a run that resumes with all groups from the start takes the same way."""
    net = Net()
    optimizer = build(net, "a", **options)
    optimizer.ensure_state()
    train(net, optimizer, 0, 1)
    before = {key: torch.as_tensor(value).clone() for key, value in optimizer.state[STATE_KEY]["a"].items()}
    for group in groups_of(net, "b", "c", "bias"):
        optimizer.add_param_group(group)
    optimizer.zero_grad()
    optimizer.ensure_state()
    after = optimizer.state[STATE_KEY]["a"]
    assert all(torch.equal(value, torch.as_tensor(after[key])) for key, value in before.items())
    train(net, optimizer, 2, 3, 4)
    again = Net()
    again.load_state_dict(net.state_dict())
    whole = build(again, **options)
    assert [p.phase for p in whole.plans] == [p.phase for p in optimizer.plans] != [0, 0, 0]
    whole.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    whole.ensure_state()
    train(net, optimizer, *range(5, 12))
    train(again, whole, *range(5, 12))
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in net.named_parameters())
    steps = {n: int(s["step"]) for n, s in optimizer.state[STATE_KEY].items()}
    assert steps == {"a": 12, "b": 10, "c": 10}


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    net = Net()
    optimizer = build(net, "a")
    train(net, optimizer, 0)
    for wrong, message in (
        ({"params": [("a", nn.Parameter(torch.ones(2, 2)))]}, "taken already"),
        ({"params": [("bias", net.bias)], "rank": 2}, "is not a matrix"),
        ({"params": [], "param_names": []}, "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(wrong)
    assert len(optimizer.param_groups) == 1
    train(net, optimizer, 1)


def test_a_group_without_names_joins_those_that_have_some():
    """As Lightning's BaseFinetuning adds it."""
    net = Net()
    optimizer = build(net, "a")
    train(net, optimizer, 0)
    optimizer.add_param_group({"params": [net.bias], "lr": 0.01})
    optimizer.add_param_group({"params": net.b, "rank": 2})
    optimizer.add_param_group({"params": ((n, p) for n, p in net.named_parameters() if n == "c")})
    train(net, optimizer, 1)
    assert [m.name for m in optimizer.members] == ["a", "group1.0", "group2.0", "c"]
    assert set(optimizer.state[STATE_KEY]) == {"a", "group2.0"}


def test_with_layerwise_no_group_comes_in_the_middle_of_a_step():
    net = Net()
    optimizer = build(net, "a", layerwise=True)
    optimizer.ensure_state()
    net(0).backward()
    with pytest.raises(ValueError, match="before the first backward pass of a step"):
        optimizer.add_param_group(groups_of(net, "b")[0])
    optimizer.step()
    optimizer.add_param_group(groups_of(net, "b")[0])


def model_of(frozen=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(10, 14), nn.Linear(14, 6)])
        model.register_parameter("experts", nn.Parameter(torch.randn(2, 6, 5)))
    if frozen == "experts":
        model.experts.requires_grad_(False)
    elif frozen is not None:
        model[frozen].requires_grad_(False)
    return model


def lowrank(model):
    config = {"rank": 3, "lr": 0.05, "optim_target_modules": ["experts", "0", "1"]}
    if not model.experts.requires_grad:
        config["optim_target_modules"].remove("experts")
    for k in (0, 1):
        if not model[k].weight.requires_grad:
            config["optim_target_modules"].remove(str(k))
    return ds_lowrank.build_optimizer(model, config)


def step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize(
    ("frozen", "left"), [(0, "1 matrices that are frozen here (0.weight"), ("experts", "2 matrices")]
)
def test_a_resume_with_more_frozen_leaves_their_states_behind(tmp_path, caplog, frozen, left):
    model = model_of()
    optimizer = lowrank(model)
    step(model, optimizer)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = model_of(frozen)
    resumed = lowrank(again)
    with caplog.at_level(logging.WARNING):
        loaded = ds_lowrank.load_checkpoint(tmp_path, again, resumed)
    assert left in caplog.text
    assert loaded.matrices == len(resumed.plans)
    assert loaded.fresh == 0
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"load_checkpoint goes by name"):
        lowrank(model_of(frozen)).load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    trained_elsewhere = model_of()  # the parameter is trained here, and not projected: a mistake
    other = ds_lowrank.build_optimizer(trained_elsewhere, {"rank": 3, "lr": 0.05, "optim_target_modules": ["1"]})
    with pytest.raises(ValueError, match="use the same optim_target_modules"):
        ds_lowrank.load_checkpoint(tmp_path, trained_elsewhere, other)


def test_a_resume_with_less_frozen_starts_its_states_anew(tmp_path, caplog):
    model = model_of(0)
    optimizer = lowrank(model)
    step(model, optimizer)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = model_of()
    resumed = lowrank(again)
    with caplog.at_level(logging.WARNING):
        loaded = ds_lowrank.load_checkpoint(tmp_path, again, resumed)
    assert (loaded.matrices, loaded.fresh) == (3, 1)
    step(again, resumed)
    assert {n: s["step"] for n, s in resumed.state[STATE_KEY].items()} == {
        "0.weight": 1,
        "1.weight": 2,
        "experts[0]": 2,
        "experts[1]": 2,
    }
