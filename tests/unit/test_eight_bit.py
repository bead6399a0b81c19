"""8-bit moments of parameters that are not projected: blocks that are cut, one process's steps, loads."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from ds_lowrank import LayoutError, LowRankAdamW
from ds_lowrank.state_dict.pieces import EIGHT_BIT_KEY
from ds_lowrank.states.blocks import BLOCK
from ds_lowrank.states.dynamic import dequantise, quantise
from ds_lowrank.states.runs import Cut, cut_blocks, runs_of


def random_pieces(shape: tuple[int, ...], dim: int | None, ranks: int) -> list[tuple[int, int]]:
    size = torch.Size(shape).numel() if dim is None else shape[dim]
    at = [0, *sorted(random.randint(0, size) for _ in range(ranks - 1)), size]
    return [(at[k], at[k + 1]) for k in range(ranks)]


def test_any_pieces_have_the_codes_and_scales_of_the_whole():
    """Runs and slices of any dimension, empty and shorter than a block, several in one block."""
    random.seed(0)
    for _ in range(60):
        shape = tuple(random.choice([1, 3, 5, 32, 70]) for _ in range(random.choice([1, 2, 3])))
        dim = random.choice([None, *range(1, len(shape))])
        pieces = random_pieces(shape, dim, random.choice([1, 2, 3, 5]))
        x = torch.randn(torch.Size(shape).numel())
        codes, scales = quantise(nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK), signed=True)
        places = torch.arange(len(x)).view(shape)
        runs = [runs_of(start, stop, dim, shape) for start, stop in pieces]
        cut = cut_blocks(runs)
        held = [places.view(-1)[a:b] if dim is None else places.narrow(dim, a, b - a).reshape(-1) for a, b in pieces]
        top = torch.zeros(len(cut))
        for one, at in zip(runs, held):
            part = Cut.of(one, cut)
            assert one.numel == len(at)
            top.scatter_reduce_(0, part.numbers, part.blocks(x[at]).abs().amax(1), "amax")
        for one, at in zip(runs, held):
            if not one.numel:
                continue
            mine, kept = torch.empty(len(at), dtype=torch.uint8), torch.empty(one.count * one.slots)
            for element, slot, some in one.parts(random.choice([64, 128, 640])):
                found, largest = quantise(some.to_blocks(x[at][element : element + some.numel]), signed=True)
                mine[element : element + some.numel] = some.from_blocks(found)
                kept[slot : slot + len(largest)] = largest[:, 0]
            part = Cut.of(one, cut)
            part.write(mine, quantise(part.blocks(x[at]), True, scales=top[part.numbers, None])[0])
            kept[part.slots] = top[part.numbers]
            slots, blocks = one.used()
            assert torch.equal(mine, codes.view(-1)[at])
            assert torch.equal(kept[slots], scales.view(-1)[blocks])


def test_a_scale_that_is_no_number_is_the_largest():
    """Scales of cut blocks are compared by their bits: a maximum of floating numbers may lose a NaN."""
    bits = torch.tensor([0.0, 1e-30, 1.0, float("inf"), float("nan")]).view(torch.int32)
    assert (bits.diff() > 0).all()


def build(state_dtype: str, shapes=((3, 50), (130,)), dtype=torch.float32, **options: Any):
    torch.manual_seed(0)
    projected = nn.Parameter(torch.randn(12, 9, dtype=dtype))
    others = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    groups = [{"params": [("w", projected)], "rank": 4}]
    groups.append({"params": [(f"p{k}", p) for k, p in enumerate(others)]})
    settings = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": state_dtype, **options}
    return LowRankAdamW(groups, **settings), [projected, *others]


def train(optimizer: LowRankAdamW, parameters, steps) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=generator) + 0.3).to(p.dtype)
        optimizer.step()


def test_every_weight_moves_and_stays_near_fp32():
    moved = {}
    for state_dtype in ("fp32", "int8"):
        optimizer, parameters = build(state_dtype)
        before = [p.detach().clone() for p in parameters]
        train(optimizer, parameters, range(1))
        assert all(bool((p != b).all()) for p, b in zip(parameters, before))
        train(optimizer, parameters, range(1, 30))
        moved[state_dtype] = [p.detach() - b for p, b in zip(parameters, before)][1:]
    far = [float((a - b).norm() / a.norm()) for a, b in zip(moved["fp32"], moved["int8"])]
    assert 0 < max(far) < 0.03


def test_moments_are_those_of_fp32_within_half_a_code():
    """One step from zero: nothing but one rounding lies between."""
    (wide, p), (narrow, q) = build("fp32"), build("int8")
    train(wide, p, range(1))
    train(narrow, q, range(1))
    state = narrow.state[EIGHT_BIT_KEY]["p1"]  # type: ignore[index]
    for key, signed, half in (("exp_avg", True, 0.45 / 64), ("exp_avg_sq", False, 0.45 / 128)):
        blocks = nn.functional.pad(state[f"{key}_codes"], (0, -130 % BLOCK)).view(-1, BLOCK)
        read = dequantise(blocks, state[f"{key}_scale"][:, None], signed).view(-1)[:130]
        assert (read - wide.state[p[2]][key]).abs().max() <= state[f"{key}_scale"].max() * half * 1.01
    assert state["exp_avg_codes"].dtype == torch.uint8


def test_the_peers_steps_are_near():
    """bitsandbytes: the same map in blocks of 256; it widens its unsigned map's zero as we do not."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    ends = {}
    for name in ("ours", "theirs", "fp32"):
        w, p = nn.Parameter(torch.randn(8, 8)), nn.Parameter(start.clone())
        groups = [{"params": [("w", w)], "rank": 2}, {"params": [("p", p)]}]
        if name == "theirs":
            optimizer: Any = bnb.optim.AdamW8bit([p], lr=0.01, eps=1e-6, weight_decay=0.0)
        else:
            optimizer = LowRankAdamW(groups, lr=0.01, state_dtype="int8" if name == "ours" else "fp32")
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator) + 0.3
            w.grad = torch.zeros_like(w)
            optimizer.step()
        ends[name] = p.detach() - start
    ours, theirs = (float((ends[n] - ends["fp32"]).norm() / ends["fp32"].norm()) for n in ("ours", "theirs"))
    assert ours < 1.2 * theirs


def test_a_missing_gradient_is_no_step_and_a_frozen_parameter_stands_still():
    optimizer, (w, a, b) = build("int8")
    train(optimizer, [w, a, b], range(2))
    before = copy.deepcopy(optimizer.state[EIGHT_BIT_KEY])  # type: ignore[index]
    kept = a.detach().clone(), b.detach().clone()
    a.grad = None
    b.requires_grad_(False)
    train(optimizer, [w], range(2, 3))
    assert b.grad is not None
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
    after = optimizer.state[EIGHT_BIT_KEY]  # type: ignore[index]
    assert all(before[name]["step"] == after[name]["step"] == 2 for name in ("p0", "p1"))


def test_bf16_weights_and_a_load_go_on_bitwise():
    optimizer, parameters = build("int8", dtype=torch.bfloat16, stochastic_rounding=True)
    train(optimizer, parameters, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    train(optimizer, parameters, range(3, 6))
    again, others = build("int8", dtype=torch.bfloat16, stochastic_rounding=True)
    for p, w in zip(others, weights):
        p.data.copy_(w)
    again.load_state_dict(saved)
    train(again, others, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(parameters, others))


def test_numbers_become_codes_and_codes_are_refused_where_none_are_kept():
    wide, parameters = build("bf16")
    train(wide, parameters, range(3))
    state = wide.state_dict()
    state["state"].pop(0)  # projected ones are refused in another format
    narrow, others = build("int8")
    narrow.load_state_dict(state)
    narrow.ensure_state()
    found = narrow.state[EIGHT_BIT_KEY]["p1"]  # type: ignore[index]
    blocks = nn.functional.pad(found["exp_avg_codes"], (0, -130 % BLOCK)).view(-1, BLOCK)
    read = dequantise(blocks, found["exp_avg_scale"][:, None], signed=True).view(-1)[:130]
    exact = wide.state[parameters[2]]["exp_avg"].float()
    assert found["step"] == 3
    assert (read - exact).abs().max() <= exact.abs().max() * 0.45 / 64 * 1.01
    train(narrow, others, range(3))
    with pytest.raises(ValueError, match="the loaded optimizer state has 8-bit moments, and this run has none"):
        build("fp32")[0].load_state_dict(narrow.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[1].pop("exp_avg_scale"), r"p0 \(3, 50\) has no exp_avg_scale"),
        (lambda s: s[1].update(exp_avg_scale=torch.zeros(2)), r"exp_avg_scale of p0 \(3, 50\) is \(2,\) torch.float32"),
        (lambda s: s[2].update(exp_avg_codes=torch.zeros(130)), r"exp_avg_codes of p1 \(130,\) is .* torch.float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    optimizer, parameters = build("int8")
    train(optimizer, parameters, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"])
    again, _ = build("int8")
    again.load_state_dict(saved)
    with pytest.raises(ValueError, match=message):
        again.ensure_state()


def test_float64_parameters_are_refused():
    w, p = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5, dtype=torch.float64))
    groups = [{"params": [("w", w)], "rank": 2}, {"params": [("p", p)]}]
    with pytest.raises(LayoutError, match=r"p \(5,\) is float64"):
        LowRankAdamW(groups, state_dtype="int8").ensure_state()
