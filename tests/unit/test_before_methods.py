"""Checkpoints that were written before methods declared what they keep: read as ever, and trained on to the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ds_lowrank
from ds_lowrank.checkpoint.contents import describe_checkpoint
from ds_lowrank.checkpoint.opening import check_checkpoint
from ds_lowrank.states import layout as states_layout

DATA = Path(__file__).resolve().parents[1] / "data" / "before_methods"


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    """The script that wrote them: model, groups and gradients are its."""
    spec = importlib.util.spec_from_file_location("before_methods_write", DATA / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("formats", ["fp32", "int8"])
@pytest.mark.parametrize("how", ["one, as torch loads", "one", "zero2"])
def test_the_next_step_is_what_it_was(writer, how, formats):
    folder = DATA / f"{how.partition(',')[0]}-{formats}"
    model = writer.Model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    params, options = writer.groups(model, formats)
    optimizer = ds_lowrank.LowRankAdamW(params, **options)
    if how.endswith("loads"):
        model.load_state_dict(read(folder / "pytorch_model.bin"))
        optimizer.load_state_dict(read(folder / "optimizer.pt"))
    else:
        loaded = ds_lowrank.load_checkpoint(folder, model, optimizer)
        assert (loaded.matrices, loaded.fresh) == (5, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(writer.STEPS).backward()
    optimizer.step()
    expected = read(folder / "next.pt")
    for name, p in model.named_parameters():
        moved = (expected[name] - before[name]).norm()
        assert moved > 1e-2
        # Not bit by bit: processors and libraries differ in how they round a product.
        assert (p - expected[name]).norm() <= 1e-6 * moved, name


@pytest.mark.parametrize("formats", ["fp32", "int8"])
@pytest.mark.parametrize("layout", ["one", "zero2"])
def test_what_is_in_them_is_told(layout, formats):
    facts = describe_checkpoint(DATA / f"{layout}-{formats}")
    names = ["tall.weight", "wide.weight", *(f"tall_experts[{k}]" for k in range(3))]
    assert [m["name"] for m in facts["matrices"]] == names
    assert {(m["step"], m["refreshes"]) for m in facts["matrices"]} == {(5, 2)}
    assert (facts["state_dtype"], facts["basis_dtype"]) == (("fp32", "fp32") if formats == "fp32" else ("int8", "int4"))
    rows, basis = (32, 16) if formats == "fp32" else (2 * (4 + 4), 2 + 4)
    assert [m["bytes"] for m in facts["matrices"]] == [
        long * rows + short * basis for long, short in ((24, 10), (24, 9), (12, 8), (12, 8), (12, 8))
    ]


@pytest.mark.parametrize("layout", ["one", "zero2"])
def test_where_no_rule_keeps_what_they_have_it_is_said(monkeypatch, layout):
    known = {name: slot for name, slot in states_layout._known.items() if name != "exp_avg_sq"}
    check_checkpoint(DATA / f"{layout}-int8")
    monkeypatch.setattr(states_layout, "_known", known)
    text = r"\.pt: the state of .* keeps exp_avg_sq_codes, exp_avg_sq_scale, which no registered rule or selection does"
    for read in (check_checkpoint, describe_checkpoint):
        with pytest.raises(ValueError, match=text):
            read(DATA / f"{layout}-int8")
