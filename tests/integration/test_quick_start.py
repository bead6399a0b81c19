"""docs/quick_start.md, as a newcomer follows it: its commands one after the other, in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT
from rank_pool import free_port
from safetensors.torch import load_file

from ds_lowrank import manifest

PAGE = ROOT / "docs" / "quick_start.md"
pytestmark = [pytest.mark.launcher, pytest.mark.slow]


@pytest.mark.timeout(1200)  # two minutes on two idle cores, which are not always idle
@pytest.mark.skipif(torch.cuda.is_available(), reason="its RANKS are those of a machine without GPUs")
def test_every_step_works_as_written(tmp_path, workplace):
    project = tmp_path / "project"
    keep = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, project, ignore=keep)
    # What is not tried here is the making of the environment, which every run of CI does: make finds this one.
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "deepspeed").symlink_to(Path(sys.prefix) / "bin" / "deepspeed")
    (binaries / ".installed").touch()
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    script = script.replace("\n. .venv/bin/activate\n", "\n")
    assert script.count("launch/pretrain.py") == 3, "the page has other commands than this test knows"
    # The commands are the page's; a corpus that is packed in a second stands in for the standard library.
    small = f"--train_file {workplace}/corpus.txt --cache_dir {workplace}/cache --vocab_size 512 --max_length 64"
    script = script.replace('ARGS="', f'ARGS="{small} ').replace("--run_name on_", f"{small} --run_name on_")
    script = script.replace("--run_name first --max_steps 90", f"{small} --run_name first --max_steps 90")
    script = script.replace("$RANKS", f"$RANKS --master_port {free_port()}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=project,
        env={
            **os.environ,
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(project),
            "VENV": str(binaries.parent),
            "MAKEFLAGS": "",  # of a `make test VENV=...` that runs this: it would win
        },
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    printed = done.stdout
    assert done.returncode == 0, printed[-3000:] + done.stderr[-3000:]
    assert "--resume: going on with runs/first/checkpoint-60, step 60" in printed
    assert len(re.findall(r"^validation perplexity: ", printed, re.MULTILINE)) == 4
    assert [step for step, _ in manifest.checkpoints(project / "runs" / "first")] == [30, 60, 90]
    assert "layout: ZeRO-3 on 2 ranks" in printed
    # Of the runs that began at a checkpoint nothing is told before it.
    told = [int(step) for step in re.findall(r"^step +(\d+) ", printed, re.MULTILINE)]
    assert told == [20, 40, 60, 80, 40, 60, 80, 40, 60, 80]
    assert re.search(r"^srun --nodes=2 .* configs/zero2_7b_8x24gb.json ", printed, re.MULTILINE)
    assert manifest.is_complete(project / "runs" / "trainer" / "checkpoint-20")
    # Both went the same way on from the same checkpoint.
    here, there = (load_file(project / "runs" / name / "model.safetensors") for name in ("on_zero3", "on_one"))
    for name, weight in here.items():
        assert (weight - there[name]).norm() <= 5e-3 * there[name].norm(), name
