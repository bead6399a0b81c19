"""A disk that is full while the Trainer saves: said in the last line, with the path, the rank and what is whole."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from ds_lowrank import CheckpointCallback, manifest
from ds_lowrank.integrations.full_disk import full_disk

FULL = os.strerror(errno.ENOSPC)
ZIP = "[enforce fail at inline_container.cc:672] . unexpected pos 361536 vs 361424"
RUST = "Error while serializing: I/O error: No space left on device (os error 28)"


def caused(error, cause):
    try:
        raise error from cause
    except type(error) as raised:
        return raised


@pytest.fixture
def output(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 6:
            manifest.mark(tmp_path / f"checkpoint-{step}", {})
    return tmp_path


@pytest.mark.parametrize(
    ("error", "path", "rank"),
    [
        (OSError(errno.ENOSPC, FULL, "/data/x.pt"), "/data/x.pt", 3),
        (OSError(errno.ENOSPC, FULL), "{output}/checkpoint-6", 3),
        (caused(RuntimeError(ZIP), OSError(errno.ENOSPC, FULL, "/data/x.pt")), "/data/x.pt", 3),
        (RuntimeError(RUST), "{output}/checkpoint-6", 3),
        (RuntimeError(f"completing x failed on rank 1: OSError: [Errno 28] {FULL}"), "{output}/checkpoint-6", 1),
        (RuntimeError(f"CheckpointException ranks:[2]\n (RANK 2)\nOSError: {FULL}"), "{output}/checkpoint-6", 2),
    ],
)
def test_the_error_of_every_writer_is_known(output, error, path, rank):
    text = full_disk(error, output, step=6, rank=3)
    expected = path.format(output=output)
    assert text == f"No space left on device: {expected} (rank {rank}); the checkpoint of step 4 is whole"


def test_a_quota_is_a_full_disk_too(output):
    text = full_disk(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/x"), output, step=8, rank=0)
    assert text == "Disk quota exceeded: /x (rank 0); the checkpoint of step 4 is whole"


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (ZIP, "rank 1"),
        ("basic_ios::clear: iostream error", "rank 1"),
        ("gloo: Connection closed by peer [127.0.0.1]:5029", "a rank that rank 1 was waiting for"),
    ],
)
def test_where_an_error_does_not_say_why_the_disk_does(output, monkeypatch, error, who):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    text = full_disk(RuntimeError(error), output, step=6, rank=1)
    assert text == f"No space left on device: {output}/checkpoint-6 ({who}); the checkpoint of step 4 is whole"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    assert full_disk(RuntimeError(error), output, step=6, rank=1) is None


def test_other_errors_are_none_of_it(tmp_path):
    for error in (
        ValueError("x"),
        OSError(errno.EACCES, "Permission denied", "/x"),
        RuntimeError("CUDA out of memory"),
    ):
        assert full_disk(error, tmp_path, step=2, rank=0) is None
    text = full_disk(OSError(errno.ENOSPC, FULL), tmp_path, step=2, rank=0)
    assert text == f"No space left on device: {tmp_path} (rank 0); no checkpoint is whole"


class Line(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, 300))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x.mean()).square().sum()}


def trainer(output, size=4, **options):
    data = Dataset.from_dict({"x": torch.ones(12, 2).tolist(), "labels": [0] * 12}).with_format("torch")
    settings = {"use_cpu": True, "max_steps": 6, "save_steps": 2, "report_to": [], "logging_strategy": "no", **options}
    args = TrainingArguments(str(output), per_device_train_batch_size=1, **settings)
    return Trainer(Line(size), args, train_dataset=data, callbacks=[CheckpointCallback()])


def test_the_last_line_of_a_training_that_a_full_disk_ends(tmp_path, monkeypatch, capsys):
    original = torch.save
    monkeypatch.setattr(sys, "excepthook", lambda *about: print("a traceback", file=sys.stderr))
    ordinary = sys.excepthook

    def save(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, FULL, str(path))
        original(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    training = trainer(tmp_path)
    with pytest.raises(OSError, match=FULL) as caught:
        training.train()
    sys.excepthook(caught.type, caught.value, None)  # as Python does where nobody has caught it
    lines = capsys.readouterr().err.strip().splitlines()
    assert any("a traceback" in line for line in lines)
    assert lines[-1].startswith(f"No space left on device: {tmp_path}/checkpoint-4/")
    assert lines[-1].endswith("(rank 0); the checkpoint of step 2 is whole")
    monkeypatch.setattr(torch, "save", original)
    monkeypatch.setattr(sys, "excepthook", ordinary)
    trainer(tmp_path / "again").train()
    assert sys.excepthook is ordinary, "a training that ends leaves the hook as it was"


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount"), reason="no mount")
def test_a_disk_that_is_really_full(small_disk):
    """The optimizer's zip file does not fit, whose writer does not say why."""
    code = f"import test_full_disk as here; here.trainer({str(small_disk / 'out')!r}, 300).train()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    folder = small_disk / "out" / "checkpoint-4"
    assert line == f"No space left on device: {folder} (rank 0); the checkpoint of step 2 is whole"
