"""A copied, pickled or saved optimizer, and the model beside it, go on as the originals do."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import ds_lowrank
from ds_lowrank.optimizer import STATE_KEY

VARIANTS = {
    "fp32": {},
    "int8": {"state_dtype": "int8", "basis_dtype": "int8"},
    "layerwise": {"layerwise": True},
    "accumulating": {"layerwise": True, "accumulation_steps": 2},
    "bf16": {"state_dtype": "bf16", "stochastic_rounding": True},
}


def copied(pair):
    return copy.deepcopy(pair)


def unpickled(pair):
    return pickle.loads(pickle.dumps(pair))


def saved(pair):
    stored = io.BytesIO()
    torch.save(pair, stored)
    stored.seek(0)
    # A whole model is code; it was written a line above.
    return torch.load(stored, weights_only=False)


def pair_of(options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 6), nn.LayerNorm(6))
    model.to(torch.bfloat16 if options.get("stochastic_rounding") else torch.float32)
    return model, ds_lowrank.build_optimizer(model, {"rank": 3, "update_proj_gap": 3, "lr": 0.05, **options})


def train(pair, *steps):
    model, optimizer = pair
    optimizer.ensure_state()
    for step in steps:
        for micro in range(optimizer.config.accumulation_steps):
            x = torch.randn(8, 10, generator=torch.Generator().manual_seed(10 * step + micro))
            model(x.to(model[0].weight.dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, other):
    return all(map(torch.equal, one[0].parameters(), other[0].parameters()))


@pytest.mark.parametrize("take", [copied, unpickled, saved])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_goes_on_bit_by_bit_and_apart(variant, take):
    original = pair_of(VARIANTS[variant])
    train(original, 0, 1)
    other = take(original)
    assert other[1].state_dict().keys() == original[1].state_dict().keys()
    train(original, *range(2, 9))
    assert not same(original, other)
    train(other, *range(2, 9))
    assert same(original, other)
    held = {id(p) for p in other[0].parameters()}
    assert all(id(p) in held for group in other[1].param_groups for p in group["params"])
    refreshes = [state["refreshes"] for state in other[1].state[STATE_KEY].values()]
    assert refreshes == [state["refreshes"] for state in original[1].state[STATE_KEY].values()]
    assert min(refreshes) > 2


def test_what_was_loaded_and_not_used_yet_is_copied_too():
    original = pair_of({})
    train(original, 0, 1)
    model, _ = copy.deepcopy(original)
    fresh = ds_lowrank.build_optimizer(model, {"rank": 3, "update_proj_gap": 3, "lr": 0.05})
    fresh.load_state_dict(original[1].state_dict())
    other = copy.deepcopy((model, fresh))
    train(original, *range(2, 7))
    train(other, *range(2, 7))
    assert same(original, other)


def test_a_new_optimizer_is_copied_before_its_first_step():
    original = pair_of({})
    other = copy.deepcopy(original)
    other[1].zero_grad()
    train(original, 0, 1)
    train(other, 0, 1)
    assert same(original, other)


def test_a_copy_takes_groups_and_loads_states():
    original = pair_of({})
    train(original, 0)
    model, optimizer = copy.deepcopy(original)
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(4, 4)))], "rank": 2})
    train((model, optimizer), 1)
    _, again = copy.deepcopy((model, optimizer))
    again.load_state_dict(optimizer.state_dict())
    again.ensure_state()
    assert set(again.state[STATE_KEY]) == {"0.weight", "2.weight", "more"}


def test_only_the_newest_layerwise_optimizer_of_a_model_steps_it_and_none_that_is_gone():
    model, first = pair_of({"layerwise": True})
    first.ensure_state()
    second = ds_lowrank.build_optimizer(model, {"rank": 3, "lr": 0.05, "layerwise": True})
    second.ensure_state()
    train((model, second), 0)
    assert {state["step"] for state in first.state[STATE_KEY].values()} == {0}
    assert {state["step"] for state in second.state[STATE_KEY].values()} == {1}
    del first, second
    gc.collect()
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 10)).sum().backward()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_of_a_layerwise_optimizer_is_saved_as_any_other(tmp_path):
    model, optimizer = pair_of({"layerwise": True})
    optimizer.ensure_state()
    torch.save(dict(model.named_parameters()), tmp_path / "weights.pt")
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(found["0.weight"], model[0].weight)


def test_states_made_in_inference_mode_are_ordinary_ones():
    for options in ({}, {"state_dtype": "int8", "basis_dtype": "int4"}):
        pair = pair_of(options)
        with torch.inference_mode():
            pair[1].ensure_state()
        other = pair_of(options)
        train(pair, *range(5))
        train(other, *range(5))
        assert same(pair, other)


def test_a_step_in_inference_mode_is_one():
    pair, other = pair_of({}), pair_of({})
    for (model, optimizer), inside in ((pair, True), (other, False)):
        model(torch.ones(4, 10)).sum().backward()
        with torch.inference_mode(inside):
            optimizer.step()
        optimizer.zero_grad()
    train(pair, *range(5))
    train(other, *range(5))
    assert same(pair, other)
