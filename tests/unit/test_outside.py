"""Groups that a framework's engine is not given: what they follow, and what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ds_lowrank
from ds_lowrank.integrations.deepspeed import keep_from_deepspeed
from ds_lowrank.layouts import LayoutError, OutsideEngine
from ds_lowrank.outside import OutsideGroups


def group(lr: Any = 0.1, **own: Any) -> dict[str, Any]:
    return {"params": [], "lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, **own}


def test_what_was_equal_stays_equal():
    groups = [group(weight_decay=0.1), group(weight_decay=0.1), group()]
    outside = OutsideGroups(groups, {0})
    staying = outside.among([groups[1], groups[2]])[1:]
    staying[0].update(lr=0.03, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.2)
    staying[1].update(lr=0.5)
    outside.follow(staying)
    assert groups[0] == {**staying[0]}


def test_a_learning_rate_of_its_own_keeps_its_ratio():
    groups = [group(0.4, weight_decay=0.1), group(0.1)]
    outside = OutsideGroups(groups, {0})
    groups[1].update(lr=0.05, weight_decay=0.3)
    outside.follow([groups[1]])
    assert groups[0]["lr"] == pytest.approx(0.2)
    assert groups[0]["weight_decay"] == 0.1


def test_it_follows_the_group_with_its_learning_rate():
    groups = [group(0.1), group(0.4, weight_decay=0.0), group(0.1, weight_decay=0.1)]
    outside = OutsideGroups(groups, {0})
    groups[2]["lr"] = 0.01
    outside.follow(groups[1:])
    assert groups[0]["lr"] == 0.01


def test_a_tensor_stays_the_tensor_that_is_changed_in_place():
    rate = torch.tensor(0.1)
    groups = [group(rate), group(rate)]
    outside = OutsideGroups(groups, {0})
    rate.fill_(0.02)
    outside.follow([groups[1]])
    assert groups[0]["lr"] is rate


def test_groups_come_back_in_their_order():
    groups = [group(name=str(k)) for k in range(5)]
    outside = OutsideGroups(groups, {0, 3})
    assert [g["name"] for g in outside.among([groups[1], groups[2], groups[4]])] == list("01234")


def test_what_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"has a learning rate of 0\.1, and those that DeepSpeed steps"):
        OutsideGroups([group(0.1), group(0.0)], {0})
    with pytest.raises(ValueError, match="every parameter is projected"):
        OutsideGroups([group(), group()], {0, 1})


def optimizer(**options: Any) -> ds_lowrank.LowRankAdamW:
    model = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16))
    made = ds_lowrank.build_optimizer(model, {"rank": 4, "gradients": "projected", **options}, lr=0.1)
    keep_from_deepspeed(made)
    return made


def test_deepspeed_and_schedulers_see_the_rest():
    made = optimizer(optim_target_modules=["0", "2"])
    assert {p.ndim for g in made.param_groups for p in g["params"]} == {1}
    assert set(made.outside_parameters()) == {"0.weight", "2.weight"}
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5)
    assert len(schedule.base_lrs) == len(made.param_groups)


def test_without_an_engine_nobody_would_step_them():
    made = optimizer(optim_target_modules=["0", "2"])
    with pytest.raises(LayoutError, match=r"no engine has it: call deepspeed\.initialize"):
        made.step()
    with pytest.raises(LayoutError, match="no engine has it"):
        copy.deepcopy(made).step()


def test_a_model_of_matrices_alone_is_refused():
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False))
    made = ds_lowrank.build_optimizer(
        model, {"rank": 4, "gradients": "projected", "optim_target_modules": ["0", "1"]}, lr=0.1
    )
    with pytest.raises(ValueError, match="every parameter is projected"):
        keep_from_deepspeed(made)


class DeepSpeedZeroOptimizer(SimpleNamespace):
    """Of the name that DeepSpeed's has."""


class BF16_Optimizer(SimpleNamespace):
    """The same."""


class DeepSpeedEngine(SimpleNamespace):
    """The same."""


def engine(zero: Any) -> DeepSpeedEngine:
    names = ("_common_checkpoint_state", "load_module_state_dict", "_get_param_shape_func")
    return DeepSpeedEngine(
        optimizer=zero, param_names={}, inside_no_sync_ctxt=False, **dict.fromkeys(names, lambda *args: {})
    )


def zero(kind: type = DeepSpeedZeroOptimizer, **own: Any) -> Any:
    return kind(
        **{
            "scaled_global_norm": lambda: 1.0,
            "step": lambda: None,
            "overflow": False,
            "clip_grad": 1.0,
            "communication_data_type": torch.float32,
            "_global_grad_norm": 0.0,
            "dtype": torch.float32,
            **own,
        }
    )


class Nothing:
    def outside_parameters(self) -> dict[str, nn.Parameter]:
        return {}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (zero(BF16_Optimizer), "makes a BF16_Optimizer"),
        (zero(dtype=torch.float16), "does not go with fp16"),
        (zero(cpu_offload=True), "does not go with offload"),
        (zero(compute_grad_norm=False), "remove compute_grad_norm"),
        (zero(scaled_global_norm=None), r"needs DeepSpeedZeroOptimizer.scaled_global_norm, which DeepSpeed 0\.\d+"),
    ],
)
def test_what_an_engine_has_that_does_not_go_is_refused(found, text):
    with pytest.raises(LayoutError, match=text):
        OutsideEngine(engine(found), Nothing())  # type: ignore[arg-type]
    assert OutsideEngine(engine(zero()), Nothing()).names == frozenset()  # type: ignore[arg-type]


def test_an_engine_without_what_is_put_in_place_of_is_refused():
    without = engine(zero())
    del without._common_checkpoint_state
    with pytest.raises(LayoutError, match=r"needs DeepSpeedEngine\._common_checkpoint_state, which DeepSpeed 0\.\d+"):
        OutsideEngine(without, Nothing())  # type: ignore[arg-type]
