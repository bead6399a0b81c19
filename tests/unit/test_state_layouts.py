"""A rule and selections of one's own, with slots of every axis and width: saved, loaded, planned, listed, reported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from toy_methods import FORMATS, SELECTIONS, make_optimizer, model_of, take

import ds_lowrank
from ds_lowrank.checkpoint.contents import describe_checkpoint, print_checkpoint
from ds_lowrank.checkpoint.opening import check_checkpoint
from ds_lowrank.checkpoint.sources import ZeroSource
from ds_lowrank.planner import plan_memory
from ds_lowrank.planner.setup import Setup
from ds_lowrank.report import make_report, print_report
from ds_lowrank.state_dict.pieces import DESCRIPTION_KEY, STATE_KEY
from ds_lowrank.states import layout

SELECTED = pytest.mark.parametrize("selection", SELECTIONS)
FORMATTED = pytest.mark.parametrize("formats", FORMATS)
# long, short of the matrices of the model
SIZES = {"tall.weight": (14, 10), "wide.weight": (14, 6), **{f"experts[{k}]": (12, 8) for k in range(3)}}


def bytes_by_hand(long: int, short: int, selection: str, formats: str, r: int = 3) -> dict[str, int]:
    """Of every slot; int8: a code a number and a scale a row, int4: two codes a byte."""
    number, scale = (4, 0) if formats == "fp32" else (1, 4)
    found = {
        "toy_m": long * (r * number + scale),
        "toy_v": long * (number + scale),
        "toy_norm": 4,
        "toy_mean": r * number + scale,
    }
    if selection == "toy_kept":
        found["basis"] = short * (4 * r if formats == "fp32" else 2 + 4)
        found["toy_slope"] = short * (r * number + scale)
    return found


def saved(folder: Path, selection: str, formats: str = "fp32") -> tuple[nn.Module, Any]:
    model = model_of()
    optimizer = make_optimizer(model, selection, **FORMATS[formats])
    take(model, optimizer, range(3))
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model, optimizer


@SELECTED
@FORMATTED
@pytest.mark.parametrize("own", [True, False])
def test_a_run_goes_on_bit_by_bit(tmp_path, selection, formats, own):
    whole, optimizer = saved(tmp_path, selection, formats)
    norms = [state["toy_norm"] for state in optimizer.state[STATE_KEY].values()]
    assert all(norm.shape == (1, 1) and norm > 0 for norm in norms)
    again = model_of(1)
    other = make_optimizer(again, selection, **FORMATS[formats])
    if own:
        assert ds_lowrank.load_checkpoint(tmp_path, again, other).matrices == len(SIZES)
    else:
        again.load_state_dict(whole.state_dict())
        other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for run in ((whole, optimizer), (again, other)):
        take(*run, range(3, 6))
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


@SELECTED
@FORMATTED
def test_entries_have_every_slot_whole(tmp_path, selection, formats):
    _, optimizer = saved(tmp_path, selection, formats)
    entry = next(e for e in optimizer.state_dict()["state"].values() if e.get("step", torch.zeros(())).shape == (3,))
    assert ("basis" in entry or "basis_codes" in entry) == (selection == "toy_kept")
    sizes = {key: tuple(value.shape) for key, value in entry.items() if key.startswith("toy")}
    if formats == "fp32":
        assert sizes.pop("toy_slope", (3, 8, 3)) == (3, 8, 3)
        assert sizes == {"toy_m": (3, 12, 3), "toy_v": (3, 12, 1), "toy_norm": (3, 1, 1), "toy_mean": (3, 1, 3)}
    else:
        assert sizes["toy_norm"] == (3, 1, 1)
        assert (sizes["toy_mean_codes"], sizes["toy_mean_scale"]) == ((3, 1, 3), (3, 1, 1))


@SELECTED
@FORMATTED
def test_inspect_lists_the_slots(tmp_path, selection, formats):
    saved(tmp_path, selection, formats)
    facts = describe_checkpoint(tmp_path)
    by_hand = {name: bytes_by_hand(*sizes, selection, formats) for name, sizes in SIZES.items()}
    assert {m["name"]: m["bytes"] for m in facts["matrices"]} == {n: sum(b.values()) for n, b in by_hand.items()}
    assert {m["name"]: m["shape"] for m in facts["matrices"]}["wide.weight"] == [6, 14]
    found = {slot["name"]: slot for slot in facts["slots"]}
    assert {name: slot["bytes"] for name, slot in found.items()} == {
        slot: sum(b[slot] for b in by_hand.values()) for slot in by_hand["tall.weight"]
    }
    assert (found["toy_norm"]["axis"], found["toy_norm"]["width"], found["toy_norm"]["format"]) == ("matrix", 1, "fp32")
    assert found["toy_m"]["format"] == formats
    assert facts["state_dtype"] == formats
    basis = {"fp32": "fp32", "int8": "int4"}[formats]
    assert facts["basis_dtype"] == (basis if selection == "toy_kept" else None)
    console = Console(record=True, width=200)
    print_checkpoint(facts, console)
    assert f"toy_v: 1 number a row of A, {formats}" in console.export_text()


@SELECTED
@FORMATTED
def test_the_report_and_the_plan_say_what_is_held(tmp_path, selection, formats):
    _, optimizer = saved(tmp_path, selection, formats)
    states = optimizer.state[STATE_KEY].values()
    slots = [{key: t for key, t in s.items() if isinstance(t, torch.Tensor)} for s in states]
    held = sum(t.nbytes for s in slots for key, t in s.items() if key not in ("indices", "overlaps"))
    assert held == sum(sum(bytes_by_hand(*sizes, selection, formats).values()) for sizes in SIZES.values())
    report = make_report(optimizer)
    rest = {"fp32": 8, "int8": 2 * 1}[formats] * 5 + (0 if formats == "fp32" else 2 * 4)
    assert report.state_bytes == [held + rest]
    console = Console(record=True, width=200)
    print_report(report, console)
    assert f"rule toy; kept of every matrix: toy_m ({formats}), toy_v ({formats}), toy_norm (fp32)" in (
        console.export_text()
    )
    options = {"rule": "toy", "selection": selection, "stagger": False, **FORMATS[formats]}
    planned = plan_memory(nn.Sequential(nn.Linear(10, 14, bias=False)), 1, rank=3, lowrank=options, dtype="fp32")
    by_hand = bytes_by_hand(14, 10, selection, formats)
    bases = sum(by_hand.get(slot, 0) for slot in ("basis", "toy_slope"))
    terms = planned.ours.moments["resident"]
    assert (terms["states"], terms["bases"]) == (sum(by_hand.values()) - bases, bases)
    assert planned.to_dict()["setup"]["rule"] == "toy"
    # Drawn from the key alone: nothing is decomposed.
    assert (planned.ours.solver > 0) == (selection == "toy_kept")


def test_a_setup_refuses_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"lowrank\.rule must be one of adamw"):
        Setup("one", 1, rule="toy_of_nobody")
    with pytest.raises(ValueError, match="'toy' has no option 'speed'"):
        Setup("one", 1, rule="toy", rule_options={"speed": 2.0})


def other_method(folder: Path, selection: str, rule: str) -> str:
    """What is said where a checkpoint of the toy rule is to be continued with another method."""
    model = model_of()
    optimizer = make_optimizer(model, selection, rule=rule)
    with pytest.raises(ValueError, match="cannot be continued") as caught:
        ds_lowrank.load_checkpoint(folder, model, optimizer)
    return str(caught.value)


def test_a_checkpoint_of_other_slots_is_refused_by_name(tmp_path):
    saved(tmp_path, "toy_kept")
    text = other_method(tmp_path, "dominant", "adamw")
    assert "was saved with toy_m, toy_v, toy_norm, toy_mean, basis, toy_slope, and the rule and selection" in text
    assert "keep exp_avg, exp_avg_sq, basis: use the rule and selection that it was saved with" in text
    assert "was saved with toy_m" in other_method(tmp_path, "toy_keyless", "toy")
    model = model_of()
    optimizer = make_optimizer(model, "toy_keyless")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with pytest.raises(ValueError, match="use the rule and selection that it was saved with"):
        take(model, optimizer, range(1))


def test_a_run_that_keeps_more_says_what_is_missing(tmp_path):
    saved(tmp_path, "toy_keyless")
    assert "has no basis, toy_slope: it was saved with toy_m, toy_v" in other_method(tmp_path, "toy_kept", "toy")


@pytest.mark.parametrize("key", ["toy_m", "toy_norm", "toy_slope"])
@pytest.mark.parametrize("formats", FORMATS)
def test_a_slot_that_one_matrix_lacks_is_damage(tmp_path, key, formats):
    saved(tmp_path, "toy_kept", formats)
    content = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    entry = content["state"][0]
    dropped = key if key in entry else f"{key}_scale"
    del entry[dropped]
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=f"optimizer.pt lacks {dropped} of .*: it is damaged"):
        describe_checkpoint(tmp_path)


def test_a_method_that_is_not_registered_is_named_wherever_it_is_read(tmp_path, monkeypatch):
    saved(tmp_path, "toy_kept")
    known = {name: slot for name, slot in layout._known.items() if name != "toy_norm"}
    monkeypatch.setattr(layout, "_known", known)
    text = r"optimizer.pt: the state of .* keeps toy_norm, which no registered rule or selection does: import what"
    for read in (describe_checkpoint, check_checkpoint):
        with pytest.raises(ValueError, match=text):
            read(tmp_path)
    assert "keeps toy_norm, which no registered rule or selection does" in other_method(tmp_path, "dominant", "adamw")
    model = model_of()
    optimizer = make_optimizer(model, "dominant", rule="adamw")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with pytest.raises(ValueError, match="keeps toy_norm, which no registered rule"):
        take(model, optimizer, range(1))


# ---- files of ranks, as DeepSpeed's engine would write them ----

CUT = 5  # rows of A on the first of two ranks


def rank_files(folder: Path, selection: str, formats: str) -> tuple[list[Any], dict[str, Any], nn.Module]:
    """What two ranks keep of the first matrix, from what one process has, and that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 14, bias=False))
    optimizer = make_optimizer(model, selection, **FORMATS[formats])
    take(model, optimizer, range(3))
    state = optimizer.state[STATE_KEY]["0.weight"]
    tensors = optimizer.method.states.tensors(3, torch.float32)
    weight = next(model.parameters()).detach().reshape(-1)
    files = []
    for rank, (rows, basis) in enumerate((((0, CUT), (0, 4)), ((CUT, 14), (4, 10)))):
        spans = {"rows": slice(*rows), "basis": slice(*basis), "matrix": slice(0, 1)}
        own = {key: state[key][spans[kept.axis]].clone() for key, kept in tensors.items()}
        own.update(step=3, refreshes=state["refreshes"], indices=state["indices"], left=0)
        own.update(row=rows[0], basis_row=basis[0], **({"overlaps": state["overlaps"]} if rank else {}))
        start, stop = 10 * rows[0], 10 * rows[1]
        piece = {"shape": [14, 10], "start": start, "stop": stop, "unit": 0, "state": -1, "offset": 0}
        matrix = {"parameter": "0.weight", "index": -1, "shape": [14, 10], "rank": 3, "left": 0}
        about = {"format": 1, "layout": "zero2", "ranks": 2, "rank": rank}
        about |= {"parameters": {"0.weight": piece}, "matrices": {"0.weight": matrix}}
        packed = {"state": {STATE_KEY: {"0.weight": own}}, DESCRIPTION_KEY: about}
        files.append((folder / f"rank{rank}.pt", [weight[start:stop].clone()], packed))
    return files, state, model


@SELECTED
@FORMATTED
def test_rank_files_are_one_state(tmp_path, selection, formats):
    files, state, model = rank_files(tmp_path, selection, formats)
    source = ZeroSource(tmp_path, files, {})
    matrix = source.matrices["0.weight"]
    assert (matrix.long, matrix.short, matrix.bytes) == (
        14,
        10,
        sum(bytes_by_hand(14, 10, selection, formats).values()),
    )
    again = nn.Sequential(nn.Linear(10, 14, bias=False))
    optimizer = make_optimizer(again, selection, **FORMATS[formats])
    assert ds_lowrank.load_checkpoint(source, again, optimizer).matrices == 1
    found = optimizer.state[STATE_KEY]["0.weight"]
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def entry_of(files: list[Any], rank: int) -> dict[str, Any]:
    return files[rank][2]["state"][STATE_KEY]["0.weight"]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda e: e.pop("toy_v"), "rank1.pt lacks toy_v of 0.weight"),
        (lambda e: e.pop("toy_norm"), "rank1.pt lacks toy_norm of 0.weight"),
        (lambda e: e.update(toy_norm=torch.ones(2, 1)), "rows of toy_norm of 0.weight beyond 1"),
        (lambda e: e.update(toy_norm=torch.ones(1, 2)), "rows of 1 torch.float32"),
        (lambda e: e.update(toy_m=e["toy_m"][1:]), "lacks rows of toy_m of 0.weight"),
        (lambda e: e.update(toy_slope=e["toy_slope"][1:]), "lacks rows of toy_slope of 0.weight"),
        (lambda e: e.update(of_nobody=torch.ones(1)), "rank1.pt: the state of 0.weight keeps of_nobody, which no"),
    ],
)
def test_a_damaged_rank_file_is_named(tmp_path, damage, text):
    files, _, _ = rank_files(tmp_path, "toy_kept", "fp32")
    ZeroSource(tmp_path, copy.deepcopy(files), {})
    damage(entry_of(files, 1))
    with pytest.raises(ValueError, match=text):
        ZeroSource(tmp_path, files, {})
