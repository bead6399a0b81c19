"""launch/slurm/ on a real slurm of two nodes: preempted, warned, cancelled, and what would run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from jobs import SCRIPTS, Job, same_weights
from launching import ROOT, flags
from safetensors.torch import load_file

from ds_lowrank import manifest

STEPS = {"max_steps": 14, "update_proj_gap": 3, "lr": 0.01, "batch_size": 2, "report_to": "none", "save_every": 5}
HELD = Path(__file__).with_name("held.py")

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=f"slurm cannot be started here: {missing()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as one:
        yield one


def pretrain(cluster: Cluster, workplace: Path, output: str, script: str = "deepspeed", held="", **options) -> Job:
    """``held``: where both ranks wait for a signal, see :mod:`held`; returns when they do."""
    argv = flags(workplace, output, **{**STEPS, **options})
    if held:
        argv += ["--import", str(HELD)]
    cluster.environment["HELD"] = held
    job = Job(cluster, SCRIPTS[script], *argv)
    if held:
        job.until(lambda: job.printed().count("held until a signal comes") == 2)
    return job


def preempt(cluster: Cluster, job: Job) -> None:
    """Have a job of higher priority take the nodes of one that is held; returns when it has ended."""
    urgent = cluster.run("sbatch", "--parsable", "-p", "high", "-N2", "-o", "/dev/null", "--wrap", "sleep 1", cwd=ROOT)
    job.until(lambda: cluster.job(int(urgent))["JobState"] == "COMPLETED")


@pytest.fixture(scope="module")
def undisturbed(cluster, workplace) -> Path:
    job = pretrain(cluster, workplace, "slurm_undisturbed")
    assert job.wait() == "COMPLETED", job.printed()
    assert "2 ranks" in job.printed()
    return workplace / "slurm_undisturbed"


def test_preempted_by_a_job_of_higher_priority_it_ends_with_the_same_weights(cluster, workplace, undisturbed):
    job = pretrain(cluster, workplace, "slurm_preempted", held="step")
    preempt(cluster, job)
    assert job.wait() == "COMPLETED", job.printed()
    assert job.restarts == 1
    printed = job.printed()
    assert "SIGTERM: writing a checkpoint" in printed
    assert f"job {job.number}: preempted with a checkpoint" in printed
    assert re.search(r"--resume: going on with \S+/checkpoint-8, step 8", printed), printed
    assert same_weights(undisturbed, workplace / "slurm_preempted")


def test_preempted_behind_the_last_step_it_is_queued_again_and_ends_well(cluster, workplace, undisturbed):
    """DeepSpeed's launcher ends with 1 after SIGTERM, whatever its ranks have written."""
    job = pretrain(cluster, workplace, "slurm_late", held="end")
    preempt(cluster, job)
    assert job.wait() == "COMPLETED", job.printed()
    assert job.restarts == 1
    printed = job.printed()
    assert f"job {job.number}: preempted without a new checkpoint" in printed
    assert re.search(r"--resume: going on with \S+/checkpoint-14, step 14", printed), printed
    assert same_weights(undisturbed, workplace / "slurm_late")


@pytest.mark.parametrize("script", ["deepspeed", "fsdp2"])
def test_the_warning_before_the_time_limit_makes_a_checkpoint_and_queues_again(
    cluster, workplace, undisturbed, script, monkeypatch
):
    options = {}
    if script == "fsdp2":
        monkeypatch.setitem(cluster.environment, "SCRIPT", "tests/integration/fsdp_on_cpu.py")
        options = {"fsdp_config": ROOT / "configs" / "fsdp2.json", "resume": True}  # a script gets these flags alone
    job = pretrain(cluster, workplace, f"slurm_warned_{script}", script, held="step", **options)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))  # what --signal=B:USR1@300 does
    assert job.wait() == "COMPLETED", job.printed()
    assert job.restarts == 1
    assert "SIGUSR1: writing a checkpoint" in job.printed()
    assert f"layout: {'FSDP2' if script == 'fsdp2' else 'ZeRO-1/2'} on 2 ranks" in job.printed()
    here = workplace / f"slurm_warned_{script}"
    if script == "deepspeed":
        assert same_weights(undisturbed, here)
    else:  # another layout: the same trajectory up to rounding
        weights, others = (load_file(folder / "model.safetensors") for folder in (here, undisturbed))
        for name, weight in weights.items():
            assert (weight - others[name]).norm() <= 5e-3 * others[name].norm(), name


def test_a_job_that_its_owner_cancels_is_not_queued_again(cluster, workplace):
    job = pretrain(cluster, workplace, "slurm_cancelled", held="step")
    cluster.run("scancel", str(job.number))
    assert job.wait() == "CANCELLED"
    assert job.restarts == 0
    newest = manifest.newest_complete(workplace / "slurm_cancelled")
    assert newest is not None
    assert newest.name == "checkpoint-8"  # KillWait is enough for this model


def test_a_run_that_fails_is_not_queued_again(cluster, workplace):
    job = pretrain(cluster, workplace, "slurm_failed", rank=100_000)
    assert job.wait() == "FAILED"
    assert job.restarts == 0
    assert "error: " in job.printed()


def test_a_sweep_has_a_line_of_flags_for_each_task(cluster, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--lr 0.005 --rank 64\n--lr 0.01 --train_file 'a b/*.jsonl'\n")
    cluster.environment["SWEEP"] = str(sweep)
    try:
        job = Job(cluster, SCRIPTS["deepspeed"], "--dry-run", "--seed", "3", options=("--array=1-3",))
        job.until(lambda: job.printed().count("srun ") == 2 and "has no line 3" in job.printed())
        alone = Job(cluster, SCRIPTS["deepspeed"], "--dry-run")
        alone.until(lambda: "SWEEP needs a job array: sbatch --array=1-2" in alone.printed())
    finally:
        del cluster.environment["SWEEP"]
    lines = sorted(re.findall(r"^srun .*$", job.printed(), re.MULTILINE))
    assert "--run_name pretrain-" in lines[0]
    assert lines[0].endswith(f"{job.number}_1 --resume --seed 3 --lr 0.005 --rank 64 ")
    assert lines[1].endswith(rf"{job.number}_2 --resume --seed 3 --lr 0.01 --train_file a\ b/\*.jsonl ")


@pytest.mark.parametrize(("script", "launcher"), [("deepspeed", "deepspeed"), ("fsdp2", "torchrun")])
def test_it_says_what_it_would_run_without_a_cluster(script, launcher):
    done = subprocess.run(
        ["bash", str(SCRIPTS[script]), "--dry-run", "--max_steps", "5"],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    *environment, command = done.stdout.strip().splitlines()
    assert "GPUS_PER_NODE=8" in environment
    assert re.match(rf"srun --nodes=2 .* bash launch/slurm/node.sh {launcher} launch/pretrain.py ", command)
    assert command.rstrip().endswith("--run_name pretrain-0 --resume --max_steps 5")


def test_the_long_run_starts_by_itself():
    """The README's command, which nobody gives a search path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("long_run.py")
    done = subprocess.run(
        [sys.executable, script, "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "preempted at random moments" in done.stdout
