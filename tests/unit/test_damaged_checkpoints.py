"""Checkpoints that lack something or were cut short: refused by the file's name before anything has changed."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import ds_lowrank

OPTIONS = {"rank": 3, "update_proj_gap": 2, "lr": 0.05}


def model_of(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 6), nn.LayerNorm(6))


def trained(options=OPTIONS):
    model = model_of()
    optimizer = ds_lowrank.build_optimizer(model, options)
    for _ in range(3):
        model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def refused(folder, options=OPTIONS):
    """The error's text; nothing of the model has changed."""
    model = model_of(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = ds_lowrank.build_optimizer(model, options)
    with pytest.raises(ValueError, match="the checkpoint cannot be continued") as caught:
        ds_lowrank.load_checkpoint(folder, model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


def whole(folder, change=lambda state: None, options=OPTIONS):
    """A checkpoint of one process, whose optimizer's state was changed."""
    model, optimizer = trained(options)
    content = optimizer.state_dict()
    change(content["state"])
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(content, folder / "optimizer.pt")
    return model


KEYS = ["exp_avg", "exp_avg_sq", "basis", "step", "refreshes", "left", "indices", "overlaps"]
CODES = ["exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "basis_codes", "basis_scale"]
INT8 = {**OPTIONS, "state_dtype": "int8", "basis_dtype": "int8"}


@pytest.mark.parametrize(
    ("name", "index", "key", "options"),
    [
        *(("0.weight", 0, key, OPTIONS) for key in KEYS),
        *(("0.weight", 0, key, INT8) for key in CODES),
        *(("0.bias", 2, key, OPTIONS) for key in ("exp_avg", "exp_avg_sq", "step")),
        *(("0.bias", 2, key, INT8) for key in ("exp_avg_codes", "exp_avg_scale", "step")),
    ],
)
def test_a_dropped_tensor_is_not_taken_for_a_fresh_one(tmp_path, name, index, key, options):
    def drop(state):
        del state[index][key]

    whole(tmp_path, drop, options)
    text = refused(tmp_path, options)
    assert "optimizer.pt lacks" in text
    assert key.partition("_codes")[0] in text
    assert f" of {name}" in text


def test_a_dropped_state_is_not_taken_for_a_fresh_one(tmp_path):
    whole(tmp_path, lambda state: state.pop(0))
    assert "optimizer.pt lacks the state of 0.weight" in refused(tmp_path)


@pytest.mark.parametrize(
    ("index", "key", "value"),
    [
        (0, "exp_avg", torch.zeros(13, 3)),
        (0, "exp_avg_sq", torch.zeros(14, 2)),
        (0, "basis", torch.zeros(9, 3)),
        (0, "basis", torch.zeros(10, 3).half()),
        (0, "indices", torch.zeros((), dtype=torch.int32)),
        (0, "indices", torch.zeros(2, 2, 3, dtype=torch.int32)),
        (0, "step", torch.tensor(-1)),
        (0, "refreshes", torch.zeros(2)),
        (2, "exp_avg", torch.zeros(15)),
        (2, "step", torch.tensor(float("nan"))),
    ],
)
def test_a_state_that_does_not_fit_together_is_refused(tmp_path, index, key, value):
    whole(tmp_path, lambda state: state[index].update({key: value}))
    text = refused(tmp_path)
    assert "optimizer.pt" in text
    assert ("0.weight", "1.weight", "0.bias")[index] in text


@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Adagrad])
def test_another_optimizers_states_stay_what_they_were_fresh(tmp_path, optimizer_type):
    before = model_of()
    other = optimizer_type(before.named_parameters())
    before(torch.randn(8, 10)).square().sum().backward()
    other.step()
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    torch.save(other.state_dict(), tmp_path / "optimizer.pt")
    model = model_of(1)
    optimizer = ds_lowrank.build_optimizer(model, OPTIONS)
    assert ds_lowrank.load_checkpoint(tmp_path, model, optimizer).fresh == 2
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters()))


def test_frozen_weights_of_another_shape_are_refused(tmp_path):
    whole(tmp_path)
    model = model_of(1)
    model.register_buffer("table", torch.ones(4))
    optimizer = ds_lowrank.build_optimizer(model, OPTIONS)
    save_file({**model_of().state_dict(), "table": torch.ones(5)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"table is \(5,\) in it and \(4,\) in this model"):
        ds_lowrank.load_checkpoint(tmp_path, model, optimizer)


# ---- torch's distributed checkpoints ----


def sharded(folder):
    model, optimizer = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "optimizer_0")
    return model


def test_a_distributed_checkpoint_is_continued(tmp_path):
    before = sharded(tmp_path)
    model = model_of(1)
    loaded = ds_lowrank.load_checkpoint(tmp_path, model, ds_lowrank.build_optimizer(model, OPTIONS))
    assert (loaded.layout, loaded.matrices, loaded.fresh) == ("FSDP2", 2, 0)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters()))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def scrambled(path):
    """Long enough, and no zip file at any place."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("how", [truncated, emptied, missing, scrambled])
@pytest.mark.parametrize("part", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_a_file_of_a_distributed_checkpoint_is_named(tmp_path, part, how):
    sharded(tmp_path)
    (path,) = (tmp_path / part).glob("*.distcp")
    how(path)
    assert str(path) in refused(tmp_path)


@pytest.mark.parametrize("key", ["exp_avg", "basis", "refreshes", ""])
def test_a_tensor_dropped_from_a_distributed_checkpoint_is_named(tmp_path, key):
    sharded(tmp_path)
    path = tmp_path / "optimizer_0" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    table = metadata.state_dict_metadata
    for name in [n for n in table if n.startswith(f"optimizer.state.0.weight.{key}") and (not key or n.endswith(key))]:
        del table[name]
    path.write_bytes(pickle.dumps(metadata))
    text = refused(tmp_path)
    assert f"optimizer_0 lacks {key or 'the state'}" in text
    assert "of 0.weight" in text


@pytest.mark.parametrize("change", ["chunk", "place", "size", "dtype"])
def test_metadata_that_does_not_fit_the_files_is_named(tmp_path, change):
    sharded(tmp_path)
    path = tmp_path / "pytorch_model_fsdp_0" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    about = metadata.state_dict_metadata["model.0.weight"]
    if change == "chunk":
        about.chunks = []
    elif change == "place":
        metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "model.0.weight"}
    elif change == "size":
        about.chunks[0].sizes = torch.Size((99, 10))
    else:
        about.properties.dtype = torch.float64
    path.write_bytes(pickle.dumps(metadata))
    text = refused(tmp_path)
    assert "pytorch_model_fsdp_0" in text
    assert "model.0.weight" in text
