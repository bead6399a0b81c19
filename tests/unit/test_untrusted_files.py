"""Checkpoints that were made to harm: nothing in their files runs, nothing of other folders is read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from resuming import resolve_resume
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

import ds_lowrank
from ds_lowrank import cli, manifest
from ds_lowrank.checkpoint.opening import check_checkpoint
from ds_lowrank.checkpoint.safe_load import HoldsObjects, load_file
from ds_lowrank.layouts.dcp_files import DistributedFiles

TAG = "global_step1"
ZERO = {
    "optimizer_state_dict": {
        "zero_stage": 2,
        "partition_count": 1,
        "single_partition_of_fp32_groups": [],
        "base_optimizer_state": {"state": {}},
    }
}


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def saved(value, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def sharded(folder, content, **changes):
    """A distributed checkpoint of one process; ``changes`` are made in its metadata."""
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save(content, checkpoint_id=folder)
    if changes:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        vars(metadata).update(changes)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def weights(folder):
    save_file({"w": torch.zeros(3, 3)}, folder / "model.safetensors")


def metadata_alone(folder, runs):
    weights(folder)
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(runs))


def optimizers_metadata(folder, runs):
    weights(folder)
    sharded(folder / "optimizer_0", {"optimizer": {"state": {"w": {"step": torch.ones(3)}}}}, planner_data=[runs])


def models_metadata(folder, runs):
    sharded(folder / "pytorch_model_fsdp_0", {"model": {"w": torch.ones(3, 3)}}, storage_meta=runs)


def object_between_tensors(folder, runs):
    weights(folder)
    groups = {"rank": runs, "params": ["w"]}
    sharded(folder / "optimizer_0", {"optimizer": {"state": {"w": {"step": torch.ones(3)}}, "param_groups": [groups]}})


def zeros_optimizer(folder, runs):
    (folder / "latest").write_text(TAG)
    saved({**ZERO, "x": runs}, folder / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def zeros_model(folder, runs):
    (folder / "latest").write_text(TAG)
    saved(ZERO, folder / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    saved({"module": {}, "client_state": runs}, folder / TAG / "mp_rank_00_model_states.pt")


def zeros_model_alone(folder, runs):
    (folder / "latest").write_text(TAG)
    saved({"module": {}, "client_state": runs}, folder / TAG / "mp_rank_00_model_states.pt")


def whole_optimizer(folder, runs):
    weights(folder)
    saved({"state": {}, "param_groups": [], "x": runs}, folder / "optimizer.pt")


def whole_model(folder, runs):
    saved({"w": torch.ones(3), "x": runs}, folder / "pytorch_model.bin")


PLACES = [
    metadata_alone,
    optimizers_metadata,
    models_metadata,
    object_between_tensors,
    zeros_optimizer,
    zeros_model,
    zeros_model_alone,
    whole_optimizer,
    whole_model,
]


@pytest.mark.parametrize("place", PLACES)
def test_nothing_in_a_checkpoint_runs_when_it_is_opened(tmp_path, place):
    folder, ran = tmp_path / "checkpoint-1", tmp_path / "ran"
    folder.mkdir()
    place(folder, Runs(ran))
    with pytest.raises(ValueError, match=r"holds os\.mkdir, which a checkpoint has no need of"):
        ds_lowrank.open_checkpoint(folder)
    assert not ran.exists()


# The Trainer reads optimizer.pt and pytorch_model.bin with weights_only; the rest is unpickled freely by frameworks.
@pytest.mark.parametrize("place", PLACES[:-2])
def test_nothing_runs_when_a_run_is_resumed(tmp_path, place):
    folder, ran = tmp_path / "checkpoint-1", tmp_path / "ran"
    folder.mkdir()
    place(folder, Runs(ran))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    manifest.mark(folder, {})
    args = SimpleNamespace(resume=True, resume_from_checkpoint=None, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"--resume: .* holds os\.mkdir"):
        resolve_resume(args)

    class Resuming(ds_lowrank.ResumeAnywhere, Trainer):
        pass

    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], max_steps=1)
    trainer = Resuming(torch.nn.Linear(2, 2), arguments, train_dataset=[{"x": 1}])
    with pytest.raises(ValueError, match=r"holds os\.mkdir"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not ran.exists()


class ByName:
    def __init__(self, *path):
        self.path = path

    def __reduce__(self):
        return getattr, self.path


def test_metadata_is_read_as_older_pythons_write_it_and_nothing_else(tmp_path):
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorProperties

    class Older(TensorProperties):
        def __reduce__(self):
            state = (torch.float32, torch.strided, False, ByName(_MEM_FORMAT_ENCODING, self.member), False)
            return TensorProperties, (), state

    for member, kind, fits in (("TORCH_CONTIGUOUS_FORMAT", None, True), ("mro", Metadata, False)):
        folder = tmp_path / member
        sharded(folder, {"w": torch.ones(3)})
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        properties = Older(torch.float32)
        properties.member = member
        metadata.state_dict_metadata["w"].properties = properties
        if kind is not None:
            metadata = Metadata({}, planner_data=ByName(kind, member), storage_data={})
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        if fits:
            assert torch.equal(DistributedFiles(folder).tensors["w"].read(), torch.ones(3))
        else:
            with pytest.raises(ValueError, match="holds getattr of"):
                DistributedFiles(folder)


def test_what_torch_writes_is_read(tmp_path):
    content = {"a": torch.arange(6.0).view(2, 3), "b": {"c": torch.tensor(4), "d": torch.ones(0, 3).bfloat16()}}
    sharded(tmp_path / "here", {**content, "options": [0.9, {"eps": 1e-8}], "name": "x"})
    files = DistributedFiles(tmp_path / "here")
    files.check_objects()
    assert {name: stored.shape for name, stored in files.tensors.items()} == {"a": (2, 3), "b.c": (), "b.d": (0, 3)}
    assert torch.equal(files.tensors["a"].read(), content["a"])
    assert int(files.tensors["b.c"].read()) == 4
    assert files.tensors["b.d"].read().dtype == torch.bfloat16
    assert files.objects["name"].load() == "x"


class Own:
    """Of somebody's own program."""


def test_numbers_of_numpy_are_read_and_objects_of_ones_own_once_they_are_let_in(tmp_path):
    """A schedule that computes with NumPy leaves its numbers in ``lr``, a loop its random state in ``client_state``."""
    path = tmp_path / "x.pt"
    state = np.random.RandomState(0).get_state()
    torch.save({"lr": np.float64(0.25), "step": np.int64(3), "rng": state}, path)
    found = load_file(path)
    assert (found["lr"], found["step"]) == (0.25, 3)
    assert np.array_equal(found["rng"][1], state[1])

    torch.save({"x": np.array([Runs(tmp_path / "ran")], dtype=object)}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_file(path)
    assert not (tmp_path / "ran").exists()

    torch.save({"x": Own()}, path)
    with pytest.raises(HoldsObjects, match=r"add_safe_globals\(\[.*Own\]\), called before, has it read"):
        load_file(path)
    with torch.serialization.safe_globals([Own]):
        assert isinstance(load_file(path)["x"], Own)


@pytest.mark.parametrize("what", [eval, os.system])
def test_nobody_is_told_to_let_in_what_acts(tmp_path, what):
    class Calls:
        def __reduce__(self):
            return what, ("0",)

    torch.save(Calls(), tmp_path / "x.pt")
    with pytest.raises(HoldsObjects, match="with a tool that trusts it") as raised:
        load_file(tmp_path / "x.pt")
    assert raised.value.acts


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ".", "", 3, "a\0b"])
@pytest.mark.parametrize("place", ["index", "latest", "marker", "metadata"])
def test_nothing_outside_of_the_folder_is_named(tmp_path, place, name):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    saved({}, tmp_path / "secret")
    if place == "metadata":
        sharded(folder / "pytorch_model_fsdp_0", {"model": {"w": torch.ones(3)}})
        path = folder / "pytorch_model_fsdp_0" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = name
        path.write_bytes(pickle.dumps(metadata))
    elif place == "index":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    elif place == "latest":
        (folder / "latest").write_text(str(name) if name != 3 else "../3")
    else:
        weights(folder)
        files = {name: {"size": 1, "sha256": ""}}
        (folder / manifest.MARKER).write_text(json.dumps({"format": 1, "facts": {}, "files": files}))
    if place == "marker" and name == 3:
        pytest.skip("a key of JSON is a text")
    with pytest.raises(ValueError, match=r"not inside|the name of a file belongs"):
        manifest.verify(folder) if place == "marker" else ds_lowrank.open_checkpoint(folder)


def test_links_lead_out_of_weights_alone_and_never_out_of_a_runs_checkpoint(tmp_path):
    elsewhere, folder = tmp_path / "blobs", tmp_path / "checkpoint-1"
    elsewhere.mkdir()
    folder.mkdir()
    weights(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    assert ds_lowrank.open_checkpoint(folder).parameters() == {"w": (3, 3)}  # as in a hub's cache
    manifest.mark(folder, {})
    for look in (ds_lowrank.open_checkpoint, manifest.verify, check_checkpoint):
        with pytest.raises(ValueError, match=r"model\.safetensors is a link to .*blobs"):
            look(folder)
    (folder / "model.safetensors").unlink()
    weights(folder)
    (folder / "again.safetensors").symlink_to("model.safetensors")
    (tmp_path / "here").symlink_to(folder)  # to the checkpoint itself it may
    manifest.mark(tmp_path / "here", {})
    manifest.verify(tmp_path / "here")
    ds_lowrank.open_checkpoint(tmp_path / "here")


JSON = [b"", b"{", b"[1, 2]", b"{}", b"3", b"\xff\xfe\x00", b'{"global_step": "x", "weight_map": []}', b"[" * 100_000]


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", JSON, ids=range(len(JSON)))
def test_inspect_says_in_a_sentence_what_is_wrong_with_a_json(tmp_path, capsys, name, content):
    if name == "trainer_state.json":
        weights(tmp_path)
    (tmp_path / name).write_bytes(content)
    _refused_in_a_line(tmp_path, tmp_path / name, capsys)


PICKLES = [
    [1],
    {},
    None,
    torch.ones(3),
    {"state": {}},
    {"state": [], "param_groups": []},
    {"state": {0: [1]}, "param_groups": [{"params": [0]}]},
    {"state": {}, "param_groups": [3]},
    {"state": {}, "param_groups": [{"params": 3}]},
    {"state": {0: {"overlaps": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
    {"optimizer_state_dict": [1]},
    {"optimizer_state_dict": {"single_partition_of_fp32_groups": 3, "base_optimizer_state": {}}},
    {
        "optimizer_state_dict": {
            "single_partition_of_fp32_groups": [],
            "base_optimizer_state": {"ds_lowrank": [1], "state": {}},
        }
    },
    b"",
    b"\x80\x04garbage",
    b"PK\x03\x04" + bytes(100),
]


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("content", PICKLES, ids=range(len(PICKLES)))
def test_inspect_says_in_a_sentence_what_is_wrong_with_a_pickle(tmp_path, capsys, name, content):
    if name == "optimizer.pt":
        weights(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    _refused_in_a_line(tmp_path, tmp_path / name, capsys)


METADATA = [b"", b"\x80\x04", b"text", pickle.dumps([1]), pickle.dumps(None), pickle.dumps({"state_dict_metadata": {}})]


@pytest.mark.parametrize("content", METADATA, ids=range(len(METADATA)))
def test_inspect_says_in_a_sentence_what_is_wrong_with_metadata(tmp_path, capsys, content):
    path = tmp_path / "pytorch_model_fsdp_0" / ".metadata"
    path.parent.mkdir()
    path.write_bytes(content)
    _refused_in_a_line(tmp_path, path, capsys)


@pytest.mark.parametrize("content", ["", "global_step77", "\0", "."])
def test_inspect_says_in_a_sentence_what_is_wrong_with_latest(tmp_path, capsys, content):
    (tmp_path / "latest").write_text(content)
    _refused_in_a_line(tmp_path, tmp_path / "latest", capsys)


def _refused_in_a_line(folder: Path, path: Path, capsys) -> None:
    assert cli.main(["inspect", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert str(path) in line
    assert "Traceback" not in line
