"""launch/examples/: each runs as its text says, and goes on with what it has saved."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT
from rank_pool import free_port

EXAMPLES = ROOT / "launch" / "examples"
pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def run(*command: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(printed: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+): loss (\S+)$", printed, re.MULTILINE)}


def test_a_loop_under_fsdp2_goes_on_where_it_stopped(tmp_path):
    def loop(ranks: int, steps: int, folder: str) -> str:
        launcher = ["torchrun", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        return run(
            *launcher, str(EXAMPLES / "fsdp2_loop.py"), "--steps", str(steps), "--folder", str(tmp_path / folder)
        )

    whole = losses(loop(2, 5, "whole"))
    assert list(whole) == [1, 2, 3, 4, 5]
    begun = losses(loop(2, 3, "parts"))
    printed = loop(2, 5, "parts")
    assert "layout: FSDP2 on 2 ranks" in printed
    assert {**begun, **losses(printed)} == whole
    assert list(losses(printed)) == [4, 5]
    assert list(losses(loop(1, 6, "parts"))) == [6], "on another number of ranks"


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.parametrize("gradients", ["full", "projected"])
@pytest.mark.parametrize("devices", [1, 2])
def test_lightning_saves_and_restores_the_states_of_all_ranks(tmp_path, devices, gradients):
    def train(steps: int, *more: str) -> dict:
        script = [sys.executable, str(EXAMPLES / "lightning_module.py"), "--devices", str(devices)]
        script += ["--gradients", gradients]
        printed = run(*script, "--steps", str(steps), "--folder", str(tmp_path / str(steps)), *more)
        assert f"step {steps}: loss" in printed
        (path,) = Path(tmp_path, str(steps)).rglob("*.ckpt")
        return torch.load(path, weights_only=True)["optimizer_states"][0]["state"]

    states = [entry for entry in train(3).values() if "indices" in entry]
    assert len(states) == 14
    assert {int(entry["step"]) for entry in states} == {3}
    (path,) = (tmp_path / "3").rglob("*.ckpt")
    resumed = [entry for entry in train(5, "--checkpoint", str(path)).values() if "indices" in entry]
    assert {int(entry["step"]) for entry in resumed} == {5}
    # No refresh has come since: the subspaces are those that were saved.
    assert all(torch.equal(a["basis"], b["basis"]) for a, b in zip(states, resumed))
    assert not any(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(states, resumed))
