"""Starting launch/pretrain.py on two CPU ranks, by every launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from rank_pool import free_port

ROOT = Path(__file__).resolve().parents[2]
RANK = 8
PRETRAIN = ROOT / "launch" / "pretrain.py"
FSDP_ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")
# Settings of the runs that are compared: refreshes, accumulation, clipping and decay all take part.
EIGHT_STEPS = {
    "max_steps": 8,
    "update_proj_gap": 2,
    "gradient_accumulation": 2,
    "lr": 0.01,
    "batch_size": 2,
    "weight_decay": 0.1,
}


def flags(folder: Path, output: str = "model", **options) -> list[str]:
    """A command line with a small model and corpus."""
    defaults = {
        "train_file": folder / "corpus.txt",
        "cache_dir": folder / "cache",
        "output_dir": folder / output,
        "vocab_size": 512,
        "max_length": 64,
        "batch_size": 4,
        "eval_sequences": 16,
        "rank": RANK,
        "logging_steps": 1,
        "seed": 7,
    }
    return [f"--{name}={value}" for name, value in {**defaults, **options}.items()]


def config(name: str) -> list[str]:
    """The flags for one of ``configs/``."""
    flag = "--fsdp_config" if name.startswith("fsdp") else "--deepspeed"
    return [flag, str(ROOT / "configs" / f"{name}.json")]


def start(folder: Path, launcher: str, *argv: str, script: Path = PRETRAIN) -> subprocess.CompletedProcess:
    """Run a script on two ranks, by a launcher or by a file of ``accelerate launch``.

    It runs from another folder than the repository's, but for those files, whose paths count from there.
    """
    file = ROOT / "configs" / launcher
    if file.suffix == ".yaml":
        launcher, folder = "accelerate", ROOT
    assert shutil.which(launcher), f"the tests need the {launcher} launcher on PATH"
    port = str(free_port())
    ranks = {
        "deepspeed": ["--num_accelerators", "2", "--master_port", port],
        "torchrun": ["--nproc-per-node", "2", "--master-port", port],
        # Without --multi_gpu it starts one process on a machine without GPUs.
        "accelerate": ["launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port],
    }
    if file.suffix == ".yaml":
        ranks["accelerate"] = ["launch", "--config_file", str(file), "--main_process_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [launcher, *ranks[launcher], str(script), *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def launch(folder: Path, launcher: str, *argv: str, script: Path = PRETRAIN) -> str:
    """What a run prints that has to succeed."""
    done = start(folder, launcher, *argv, script=script)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
