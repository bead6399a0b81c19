"""Methods at the edges of the engine: without slots, with states from elsewhere, with options of no use."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_lowrank import LowRankAdamW, LowRankConfig
from ds_lowrank.engine.evidence import Evidence
from ds_lowrank.engine.step import LowRankStep
from ds_lowrank.methods import make_method
from ds_lowrank.rules import Hyper, Stack, Update, register
from ds_lowrank.rules.adamw import AdamW
from ds_lowrank.rules.base import Rule
from ds_lowrank.states.layout import Slot


@register
class Signs(Rule):
    """Keeps nothing."""

    name = "edge_signs"

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Update:
        return Update(r.sign())


def _counted(formats: Any, kept: MutableMapping[str, Any], r: Tensor, hyper: Hyper) -> Update:
    kept["edge_count"] += 1
    return Update(r)


@register
class Counted(Rule):
    """Steps what is kept at once, and keeps a number a matrix."""

    name = "edge_counted"
    slots = (Slot("edge_count", axis="matrix", width=1, format="exact"),)
    kept_step = staticmethod(_counted)


@register
class OtherAdamW(AdamW):
    """Made of a rule that steps what is kept at once."""

    name = "edge_other"

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Update:
        return Update(torch.zeros_like(r))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [arg for arg in args if isinstance(arg, Tensor)]
        for tensor in found if isinstance(found, tuple) else (found,):
            if isinstance(tensor, Tensor) and not any(tensor.data_ptr() == arg.data_ptr() for arg in given):
                self.numel = max(self.numel, tensor.numel())
        if func is torch.ops.aten.aminmax.default and not args[0].is_contiguous():
            self.numel = max(self.numel, args[0].numel())  # it makes a copy that is contiguous, out of sight
        return found


def optimizer_of(weights: list[nn.Parameter], **options: Any) -> LowRankAdamW:
    named = [(f"w{k}", weight) for k, weight in enumerate(weights)]
    return LowRankAdamW([{"params": named, "rank": 3}], lr=0.1, **options)


def weights_of(number: int = 3) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(9, 6, generator=generator)) for _ in range(number)]


def take(optimizer: LowRankAdamW, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_a_rule_that_keeps_nothing_steps_a_batch_as_each_matrix_alone():
    together, alone = weights_of(), weights_of()
    take(optimizer_of(together, rule="edge_signs", selection="dominant"), together, range(3))
    optimizer = optimizer_of(alone, rule="edge_signs", selection="dominant")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(weight.shape, generator=generator) for weight in alone]
        for weight, gradient in zip(alone, gradients):
            weight.grad = gradient
            optimizer.step()
            weight.grad = None
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("number", [1, 3])
def test_what_is_one_a_matrix_is_kept_where_all_is_stepped_at_once(number):
    weights = weights_of(number)
    optimizer = optimizer_of(weights, rule="edge_counted")
    take(optimizer, weights, range(2))
    assert [float(state["edge_count"]) for state in optimizer.state["lowrank"].values()] == [2.0] * number


def test_a_rule_made_of_another_one_steps_by_its_own_step():
    weights = weights_of()
    before = [weight.detach().clone() for weight in weights]
    take(optimizer_of(weights, rule="edge_other"), weights, range(2))
    assert all(map(torch.equal, weights, before))


def test_a_basis_that_a_key_draws_has_directions_of_no_gradient_after_another_selection():
    weights = weights_of()
    optimizer = optimizer_of(weights, selection="dominant", update_proj_gap=2, stagger=False)
    take(optimizer, weights, range(2))
    assert all(int(state["indices"][0]) == 0 for state in optimizer.state["lowrank"].values())
    other = optimizer_of(weights, selection="random", update_proj_gap=2, stagger=False)
    other.load_state_dict(optimizer.state_dict())
    take(other, weights, range(2, 4))
    assert all(bool((state["indices"] == -1).all()) for state in other.state["lowrank"].values())


def test_what_a_rule_has_yielded_is_not_overwritten_by_the_sum():
    def doubling(tensor: Tensor, purpose: str) -> Any:
        return SimpleNamespace(wait=lambda: tensor.mul_(2))

    def steps(mine: Tensor) -> Any:
        total = yield mine
        return mine.clone(), total

    engine = SimpleNamespace(_comm=SimpleNamespace(all_reduce=doubling), _device=torch.device("cpu"))
    mine, total = LowRankStep._drive(engine, steps(torch.ones(2)), True)
    assert mine.tolist() == [1.0, 1.0]
    assert total.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("bad", "alive"), [(1e-30, True), (0.0, False), (float("nan"), False), (-float("inf"), False)])
def test_which_gradients_are_zero_or_not_finite_is_seen_in_rows_of_any_strides(dtype, bad, alive):
    gradient = torch.zeros(8, 5, dtype=dtype)
    gradient[6, 1] = bad
    plan = SimpleNamespace(name="w", shared=False)
    ranks = SimpleNamespace(rank=0, device=torch.device("cpu"))
    evidence = Evidence(SimpleNamespace(ranks=ranks), torch.float64)  # type: ignore[arg-type]
    for rows in ([gradient], [gradient.mT], [gradient[:0], gradient[:6], gradient[6:]]):
        with Largest() as made:
            assert evidence.alive([plan], {"w": rows}) == ({"w"} if alive else set())  # type: ignore[list-item]
        assert made.numel == 1  # no copy of a gradient


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr_factor", -1.0), ("penalty", float("nan")), ("beta1", 1.0), ("beta2", 1.0), ("eps", float("inf"))],
)
def test_options_of_online_pca_are_in_their_range(option, value):
    with pytest.raises(ValueError, match=rf"selection_options\['{option}'\] must be at least 0"):
        make_method(LowRankConfig(rank=4, selection="online_pca", selection_options={option: value}))


def test_zeros_in_the_place_of_a_missing_gradient_go_with_the_step(monkeypatch):
    weights = weights_of()
    optimizer = optimizer_of(weights)
    take(optimizer, weights, range(1))
    stepper: Any = optimizer._stepper
    made = []
    monkeypatch.setattr(stepper, "_step_batches", lambda plans, *_: made.extend(map(stepper._held.missing_rows, plans)))
    take(optimizer, weights, range(1, 2))
    assert len(made) == 3
    assert stepper._held._missing == {}


def test_a_batch_steps_the_moments_that_are_there_now():
    """Not those in whose place someone has put others, one matrix at a time."""
    changed, replaced = weights_of(), weights_of()
    for weights in (changed, replaced):
        optimizer = optimizer_of(weights)
        take(optimizer, weights, range(2))
        state = optimizer.state["lowrank"]["w1"]
        if weights is changed:
            state["exp_avg"].zero_()
        else:
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])
        take(optimizer, weights, range(2, 4))
    assert all(map(torch.equal, changed, replaced))


def test_states_that_a_load_has_replaced_are_let_go():
    weights = weights_of()
    optimizer = optimizer_of(weights)
    take(optimizer, weights, range(2))
    before = weakref.ref(optimizer.state["lowrank"]["w1"]["exp_avg"]._base)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert before() is None


def test_which_directions_were_drawn_is_asked_again_after_a_refresh():
    weights = weights_of(1)
    optimizer = optimizer_of(weights, selection="dominant", update_proj_gap=1)
    generator = torch.Generator().manual_seed(0)
    for directions in (6, 1):
        left, right = (torch.randn(shape, generator=generator) for shape in ((9, directions), (directions, 6)))
        weights[0].grad = left @ right
        optimizer.step()
    stepper: Any = optimizer._stepper
    assert stepper._drawn("w0", optimizer.state["lowrank"]["w0"]).tolist() == [False, True, True]


def test_what_was_accumulated_is_used_up_by_the_step():
    """Between two steps a group may be added, before ``zero_grad()`` too: within a backward pass it is refused."""
    weights = weights_of()
    optimizer = optimizer_of(weights, layerwise=True, accumulation_steps=2)
    optimizer.ensure_state()
    for step in range(2):  # the first is due: gradients themselves are accumulated
        for _ in range(2):
            torch.stack([weight.square().sum() for weight in weights]).sum().backward()
        if step:
            with pytest.raises(ValueError, match="add a parameter group before the first backward pass"):
                optimizer.add_param_group({"params": [("late", weights_of(1)[0])], "rank": 3})
        optimizer.step()
    optimizer.add_param_group({"params": [("late", weights_of(1)[0])], "rank": 3})
