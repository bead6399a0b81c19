"""Checkpoints of one process: what is in them, what is refused, what another optimizer has left."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ds_lowrank
from ds_lowrank import cli
from ds_lowrank.checkpoint.safe_load import load_file

OPTIONS = {"rank": 3, "update_proj_gap": 2, "lr": 0.05}


def model_of(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 6), nn.LayerNorm(6))


def train(model, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(folder: Path, optimizer_type=None, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A folder as the Trainer writes it on one process."""
    model = model_of()
    if optimizer_type is None:
        optimizer = ds_lowrank.build_optimizer(model, OPTIONS)
    else:
        optimizer = optimizer_type(model.parameters(), lr=0.05)
    train(model, optimizer, steps)
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return model, optimizer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_state_has_the_documented_keys_shapes_and_types(tmp_path):
    _, optimizer = saved(tmp_path)
    state = load_file(tmp_path / "optimizer.pt")["state"]
    names = optimizer.state_dict()["param_groups"]
    by_name = dict(zip([n for g in names for n in g["param_names"]], [i for g in names for i in g["params"]]))
    entry = state[by_name["0.weight"]]  # 14 x 10: A is W
    assert {key: (tuple(t.shape), t.dtype) for key, t in entry.items()} == {
        "exp_avg": ((14, 3), torch.float32),
        "exp_avg_sq": ((14, 3), torch.float32),
        "basis": ((10, 3), torch.float32),
        "indices": ((3,), torch.int32),
        "overlaps": ((16,), torch.float32),
        "step": ((), torch.int64),
        "refreshes": ((), torch.int64),
        "left": ((), torch.int64),
    }
    assert (int(entry["step"]), int(entry["refreshes"]), int(entry["left"])) == (3, 2, 0)
    assert (entry["overlaps"] >= 0).sum() == 1, "one refresh had another before it"
    assert 0 < entry["overlaps"][-1] <= 1
    wide = state[by_name["1.weight"]]  # 6 x 14: A is its transpose
    assert (tuple(wide["exp_avg"].shape), tuple(wide["basis"].shape), int(wide["left"])) == ((14, 3), (6, 3), 1)


def test_torchs_own_way_and_ours_go_on_bit_by_bit(tmp_path):
    whole, optimizer = saved(tmp_path)
    train(whole, optimizer, 4, first=3)
    for own in (True, False):
        model = model_of(1)
        again = ds_lowrank.build_optimizer(model, OPTIONS)
        if own:
            loaded = ds_lowrank.load_checkpoint(tmp_path, model, again)
            assert (loaded.matrices, loaded.fresh) == (2, 0)
        else:
            from safetensors.torch import load_file as tensors

            model.load_state_dict(tensors(tmp_path / "model.safetensors"))
            again.load_state_dict(load_file(tmp_path / "optimizer.pt"))
        train(model, again, 4, first=3)
        assert same(model, whole)


def test_moments_of_bf16_weights_keep_their_precision(tmp_path):
    """torch's loader casts state to the dtype of the parameter."""
    model = model_of().bfloat16()
    optimizer = ds_lowrank.build_optimizer(model, OPTIONS)
    for step in range(3):
        model(torch.randn(8, 10, generator=torch.Generator().manual_seed(step)).bfloat16()).square().sum().backward()
        optimizer.step()
    again = ds_lowrank.build_optimizer(model, OPTIONS)
    again.load_state_dict(optimizer.state_dict())
    before, after = (o.state_dict()["state"] for o in (optimizer, again))
    assert before[0]["exp_avg"].dtype == torch.float32
    for index, entry in before.items():
        for key, value in entry.items():
            assert torch.equal(value, after[index][key])
            assert value.dtype == after[index][key].dtype


@pytest.mark.parametrize("changes", [{"rank": 4}, {"proj_type": "reverse_std"}, {"optim_target_modules": ["1"]}])
def test_other_options_are_refused_with_what_to_change(tmp_path, changes):
    saved(tmp_path)
    model = model_of()
    optimizer = ds_lowrank.build_optimizer(model, {**OPTIONS, **changes})
    with pytest.raises(ValueError, match=f"use the same .*{next(iter(changes))}"):
        ds_lowrank.load_checkpoint(tmp_path, model, optimizer)


def test_codes_are_not_taken_for_numbers_where_no_matrix_tells(tmp_path):
    model = model_of()
    optimizer = ds_lowrank.build_optimizer(model, {**OPTIONS, "state_dtype": "int8"})
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    state["state"] = {key: entry for key, entry in state["state"].items() if "indices" not in entry}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"bias has 8-bit moments there: use state_dtype 'int8'"):
        ds_lowrank.load_checkpoint(tmp_path, model, ds_lowrank.build_optimizer(model, OPTIONS))


def test_another_model_is_refused_by_the_parameters_name(tmp_path):
    saved(tmp_path)
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 6), nn.LayerNorm(6))
    with pytest.raises(ValueError, match=r"0\.weight is \(14, 10\) in it and \(12, 10\) in this model"):
        ds_lowrank.load_checkpoint(tmp_path, model, ds_lowrank.build_optimizer(model, OPTIONS))
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        ds_lowrank.open_checkpoint(tmp_path / "none")


def test_plain_adamw_leaves_weights_and_fresh_states(tmp_path, caplog):
    before, _ = saved(tmp_path, torch.optim.AdamW)
    model = model_of(1)
    optimizer = ds_lowrank.build_optimizer(model, OPTIONS)
    with caplog.at_level(logging.WARNING):
        loaded = ds_lowrank.load_checkpoint(tmp_path, model, optimizer)
    assert (loaded.matrices, loaded.fresh) == (0, 2)
    assert "start anew from its weights" in caplog.text
    assert same(model, before)
    train(model, optimizer, 2)
    assert not same(model, before)


def test_galore_torchs_objects_are_left_alone(tmp_path, caplog):
    """Its projectors are objects, which weights_only refuses."""
    before, optimizer = saved(tmp_path, torch.optim.AdamW)
    content = optimizer.state_dict()
    content["state"][0]["projector"] = Projector()
    torch.save(content, tmp_path / "optimizer.pt")
    model = model_of(1)
    with caplog.at_level(logging.WARNING):
        loaded = ds_lowrank.load_checkpoint(tmp_path, model, ds_lowrank.build_optimizer(model, OPTIONS))
    assert loaded.fresh == 2
    assert "its weights are used, its optimizer is not" in caplog.text
    assert same(model, before)


class ByName:
    """Pickled as Python 3.11.2 pickles a member of an enumeration."""

    def __init__(self, *path):
        self.path = path

    def __reduce__(self):
        return getattr, self.path


def test_deepspeeds_stage_is_read_as_older_pythons_write_it_and_nothing_else(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"zero_stage": ByName(ZeroStageEnum, "gradients")}, tmp_path / "file.pt")
    assert load_file(tmp_path / "file.pt") == {"zero_stage": ZeroStageEnum.gradients}
    torch.save({"zero_stage": ByName(LossScaler, "__init__")}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"file\.pt cannot be read"):
        load_file(tmp_path / "file.pt")


class Projector:
    """As galore_torch's: an object in the state."""


def test_a_truncated_file_is_named(tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    model = model_of()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        ds_lowrank.load_checkpoint(tmp_path, model, ds_lowrank.build_optimizer(model, OPTIONS))


def test_frozen_weights_and_buffers_come_too_and_are_missed(tmp_path):
    def build(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(10, 14), nn.BatchNorm1d(14), nn.Linear(14, 6))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(seed)
        model[2].bias.requires_grad_(False)
        return model

    model = build(0)
    train(model, ds_lowrank.build_optimizer(model, OPTIONS), 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(1)
    ds_lowrank.load_checkpoint(tmp_path, other, ds_lowrank.build_optimizer(other, OPTIONS))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    weights = {n: t for n, t in model.state_dict().items() if n != "1.running_mean"}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"it has no 1\.running_mean, which is frozen, or a buffer"):
        ds_lowrank.load_checkpoint(tmp_path, other, ds_lowrank.build_optimizer(other, OPTIONS))


def test_a_truncated_optimizer_is_not_taken_for_another_one(tmp_path):
    saved(tmp_path)
    path = tmp_path / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-200])
    model = model_of()
    with pytest.raises(ValueError, match=r"optimizer\.pt cannot be read"):
        ds_lowrank.load_checkpoint(tmp_path, model, ds_lowrank.build_optimizer(model, OPTIONS))


def test_torchs_own_way_refuses_another_side_order_and_flattened_states(tmp_path):
    def square(**options):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        return model, ds_lowrank.build_optimizer(model, {"rank": 3, "lr": 0.1, **options})

    model, optimizer = square()
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    content = optimizer.state_dict()
    _, other = square(proj_type="reverse_std")
    other.load_state_dict(content)
    with pytest.raises(ValueError, match=r"0\.weight \(8, 8\) was projected on its other side"):
        other.ensure_state()

    _, same_options = square()
    turned = {**content, "param_groups": [dict(g) for g in content["param_groups"]]}
    turned["param_groups"][0]["param_names"] = ["1.weight", "0.weight"]
    with pytest.raises(ValueError, match=r"has 1\.weight where this optimizer has 0\.weight"):
        same_options.load_state_dict(turned)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict=True cannot hold"):
        same_options.load_state_dict({**content, "state": {**content["state"], 0: {}}})


def test_a_state_that_was_saved_before_the_first_step_loads(tmp_path):
    """``ensure_state`` is called early with layerwise; nothing has moved yet, and every parameter has a state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = model_of()
    optimizer = ds_lowrank.build_optimizer(model, OPTIONS)
    optimizer.ensure_state()
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    other = ds_lowrank.build_optimizer(model_of(1), OPTIONS)
    set_optimizer_state_dict(model, optimizer, state)
    other.load_state_dict(optimizer.state_dict())
    other.ensure_state()


def test_a_fake_step_of_zero_gradients_moves_nothing():
    """torch's distributed checkpoint makes one to create the state, with a learning rate of zero.

    Matrices are not born by it; AdamW's counters of the others, as with torch's own AdamW, go to one.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, other = model_of(), model_of()
    optimizer, plain = (ds_lowrank.build_optimizer(m, {**OPTIONS, "weight_decay": 0.1}) for m in (model, other))
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert int(state["0.weight"]["refreshes"]) == 0
    assert same(model, other)
    train(model, optimizer, 1)
    train(other, plain, 1)
    moved = [torch.equal(model[k].weight, other[k].weight) for k in (0, 1)]
    assert moved == [True, True]


def test_inspect_says_what_is_in_it(tmp_path, capsys):
    saved(tmp_path, steps=5)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["step"], facts["complete"]) == ("DDP or one process", 5, False)
    assert facts["weights"] == 14 * 10 + 14 + 6 * 14 + 6 + 6 + 6
    first, second = facts["matrices"]
    assert (first["name"], first["shape"], first["rank"], first["refreshes"]) == ("0.weight", [14, 10], 3, 3)
    assert (second["name"], second["shape"], second["bytes"]) == ("1.weight", [6, 14], 4 * 3 * (2 * 14 + 6))
    assert len(first["overlaps"]) == 2
    assert {p["name"] for p in facts["full_rank"]} == {"0.bias", "1.bias", "2.weight", "2.bias"}
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "0.weight" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "there is no checkpoint folder" in capsys.readouterr().err
