"""A loaded state that does not fit is refused before the first step, by the parameter's name; one that does goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ds_lowrank
from ds_lowrank import LowRankAdamW
from ds_lowrank.optimizer import STATE_KEY


def build(rows: int = 6, named: bool = True, state_dtype: str = "fp32"):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(12, 9)), nn.Parameter(torch.randn(rows, 4)), nn.Parameter(torch.randn(5))]
    given: list[Any] = list(zip(("w", "emb", "bias"), params)) if named else params
    groups = [{"params": given[:1], "rank": 3}, {"params": given[1:]}]
    return LowRankAdamW(groups, lr=0.01, state_dtype=state_dtype), params


def train(optimizer, params, steps) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def saved(**options: Any) -> dict[str, Any]:
    optimizer, params = build(**options)
    train(optimizer, params, range(3))
    return copy.deepcopy(optimizer.state_dict())


def refused(state: dict[str, Any], text: str, **options: Any) -> None:
    """Refused at the first step, and at the second as well, with every weight where it was."""
    optimizer, params = build(**options)
    before = [p.detach().clone() for p in params]
    optimizer.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            train(optimizer, params, range(1))
    assert all(torch.equal(p, b) for p, b in zip(params, before))


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("there", "here"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("named", [True, False])
def test_moments_of_another_shape_are_refused_by_name_with_both_shapes(there, here, named, state_dtype):
    """As after a vocabulary was resized: torch's kernel steps them without a look, past the end of their memory."""
    name = "emb" if named else r"group1\.0"
    state = saved(rows=there, named=named, state_dtype=state_dtype)
    refused(
        state,
        rf"{name}.*\({there}, 4\).*\({here}, 4\)|{name}.*\({here}, 4\).*\({there}, 4\)",
        rows=here,
        named=named,
        state_dtype=state_dtype,
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda emb: emb.pop("exp_avg"), r"emb \(6, 4\) has no exp_avg, only"),
        (lambda emb: emb.pop("step"), r"emb \(6, 4\) has no step"),
        (lambda emb: emb.update(exp_avg=[0.0]), r"exp_avg of emb \(6, 4\) is of type list, not a tensor"),
        (lambda emb: emb.update(exp_avg=torch.zeros(24)), r"exp_avg of emb is \(24,\) in it, .* is \(6, 4\) here"),
        (lambda emb: emb.update(exp_avg_sq=torch.zeros(1, 4)), r"exp_avg_sq of emb is \(1, 4\) in it"),
        (lambda emb: emb.update(exp_avg=torch.zeros(6, 4, dtype=torch.int64)), r"exp_avg of emb .* is torch.int64"),
        (
            lambda emb: emb.update(exp_avg=torch.zeros(6, 4, dtype=torch.complex64)),
            r"exp_avg of emb .* is torch.complex64",
        ),
        (lambda emb: emb.update(step=float("nan")), r"step of emb \(6, 4\) is nan, not a whole number >= 0"),
        (lambda emb: emb.update(step=torch.tensor(float("inf"))), r"step of emb .*inf.*, not a whole number"),
        (lambda emb: emb.update(step=-1), r"step of emb \(6, 4\) is -1"),
        (lambda emb: emb.update(step=2.5), r"step of emb \(6, 4\) is 2.5"),
        (lambda emb: emb.update(step=torch.zeros(3)), r"step of emb .* not a whole number"),
        (lambda emb: emb.update(step=None), r"step of emb \(6, 4\) is None"),
        (
            lambda emb: (emb.clear(), emb.update(step=1, momentum_buffer=torch.zeros(6, 4))),
            r"emb \(6, 4\) has no exp_avg, only \['momentum_buffer', 'step'\]",
        ),
    ],
)
def test_a_full_rank_state_that_does_not_fit_is_refused(change, text):
    state = saved()
    change(state["state"][1])
    refused(state, text)


@pytest.mark.parametrize("named", [True, False])
def test_a_projected_state_of_what_is_not_projected_here_is_refused(named):
    state = saved(named=named)
    state["state"][1].update(indices=torch.zeros(3), refreshes=torch.tensor(1))
    if not named:  # there are no names to look for, and the first step finds it
        refused(
            state, r"group1\.0 \(6, 4\) was projected when it was saved, and is trained full-rank here", named=False
        )
        return
    optimizer, _ = build()
    with pytest.raises(ValueError, match=r"low-rank state of emb, which is not projected here: .*optim_target_modules"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.update(step=torch.tensor(-1)), r"step of w \(12, 9\) is .*-1"),
        (lambda w: w.update(step=torch.tensor(float("nan"))), r"step of w \(12, 9\) is .*nan"),
        (lambda w: w.update(refreshes=torch.tensor(9)), r"w \(12, 9\) has made 3 steps with 9 refreshes"),
        (lambda w: w.update(refreshes=torch.tensor(0)), r"w \(12, 9\) has made 3 steps with 0 refreshes"),
        (lambda w: w.update(step=torch.tensor([1, 2])), r"step of w \(12, 9\) is of shape \(2,\), not \(\)"),
        (lambda w: w.update(indices=torch.zeros(4)), r"indices of w \(12, 9\) is of shape \(4,\), not \(3,\)"),
        (lambda w: w.update(overlaps=torch.zeros(1)), r"overlaps of w \(12, 9\) is of shape \(1,\), not \(16,\)"),
        (lambda w: w.update(basis=None), r"w \(12, 9\) has no basis"),
    ],
)
def test_a_low_rank_entry_that_does_not_fit_is_refused(change, text):
    state = saved()
    change(state["state"][0])
    refused(state, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.update(step=-3), r"step of w \(12, 9\) is -3"),
        (lambda w: w.update(step=float("nan")), r"step of w \(12, 9\) is nan"),
        (lambda w: w.update(step="3"), r"step of w \(12, 9\) is '3'"),
        (lambda w: w.update(refreshes=4), r"w \(12, 9\) has made 3 steps with 4 refreshes"),
        (lambda w: w.update(row=torch.zeros(2)), r"w \(12, 9\) holds row tensor"),
    ],
)
def test_a_low_rank_state_of_a_rank_that_does_not_fit_is_refused(change, text):
    """As under DeepSpeed, where a rank's states hang on a key of their own."""
    optimizer, params = build()
    train(optimizer, params, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"].pop(0)
    state["state"][STATE_KEY] = {"w": dict(optimizer.state[STATE_KEY]["w"])}  # type: ignore[index]
    change(state["state"][STATE_KEY]["w"])
    refused(state, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda emb: emb.update(step=float("nan")), r"step of emb \(6, 4\) is nan"),
        (lambda emb: emb.update(step=-1), r"step of emb \(6, 4\) is -1"),
        (lambda emb: emb.pop("step"), r"emb \(6, 4\) has no step"),
        (lambda emb: emb.update(exp_avg_codes=3), r"exp_avg_codes of emb \(6, 4\) is 3, not \(6, 4\) torch.uint8"),
    ],
)
def test_an_8_bit_state_that_does_not_fit_is_refused(change, text):
    state = saved(state_dtype="int8")
    change(state["state"][1])
    refused(state, text, state_dtype="int8")


def test_an_entry_that_is_no_mapping_is_refused_by_name():
    state = saved()
    for index, text in (
        (0, "the loaded state of w is of type int, not a mapping"),
        (1, r"the state of emb \(6, 4\) is of type int, not a mapping"),
    ):
        optimizer, params = build()
        with pytest.raises(ValueError, match=text):
            _load_and_train(optimizer, params, {**state, "state": {**state["state"], index: 7}})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda emb: emb.update({key: torch.zeros(9, 4) for key in ("exp_avg", "exp_avg_sq")}),
            r"optimizer.pt is damaged: exp_avg of emb is \(9, 4\) in it, not \(6, 4\)",
        ),
        (lambda emb: emb.update(step=torch.tensor(float("nan"))), r"optimizer.pt is damaged: step of emb is .*nan"),
    ],
)
def test_a_checkpoint_with_moments_that_do_not_fit_is_refused(change, text, tmp_path):
    state = saved()
    change(state["state"][1])
    optimizer, params = build()
    torch.save(state, tmp_path / "optimizer.pt")
    model = nn.ParameterDict(dict(zip(("w", "emb", "bias"), params)))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=text):
        ds_lowrank.load_checkpoint(tmp_path, model, optimizer)


def _load_and_train(optimizer, params, state) -> None:
    optimizer.load_state_dict(state)
    train(optimizer, params, range(1))


def _numbers(state: dict[str, Any]) -> None:
    for index in (1, 2):
        state["state"][index]["step"] = float(state["state"][index]["step"])


def _strides(state: dict[str, Any]) -> None:
    """Moments that do not lie as their parameter does: torch's kernel goes by their memory."""
    for key in ("exp_avg", "exp_avg_sq"):
        state["state"][1][key] = state["state"][1][key].t().contiguous().t()


def _amsgrad(state: dict[str, Any]) -> None:
    state["state"][1]["max_exp_avg_sq"] = torch.zeros(6, 4)


@pytest.mark.parametrize("change", [_numbers, _strides, _amsgrad])
def test_what_torch_takes_goes_on_bitwise(change):
    """Steps as numbers are of torch before 1.12; an unused quantity is passed over."""
    optimizer, params = build()
    train(optimizer, params, range(3))
    state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    change(state)
    train(optimizer, params, range(3, 6))
    again, others = build()
    for p, w in zip(others, weights):
        p.data.copy_(w)
    again.load_state_dict(state)
    train(again, others, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, others))


def test_moments_that_share_their_memory_get_their_own():
    """Tools that fill in what they do not know make every element the same number in memory."""
    state = saved()
    for key in ("exp_avg", "exp_avg_sq"):
        state["state"][1][key] = torch.zeros(1, 1).expand(6, 4)
    optimizer, params = build()
    optimizer.load_state_dict(state)
    train(optimizer, params, range(1))
    assert torch.allclose(optimizer.state[params[1]]["exp_avg"], params[1].grad * 0.1)


def test_adamws_state_is_taken_for_what_is_not_projected():
    _, params = build()
    peer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.01)
    train(peer, params, range(3))
    optimizer, ours = build()
    optimizer.load_state_dict(peer.state_dict())
    train(optimizer, ours, range(1))
    assert float(optimizer.state[ours[1]]["step"]) == 4.0
    assert float(optimizer.state[STATE_KEY]["w"]["step"]) == 1.0  # type: ignore[index]
