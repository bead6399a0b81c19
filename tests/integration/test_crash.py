"""launch/pretrain.py killed and preempted on two ranks, and started again by the same command; bad checkpoints refused.

The ranks are started without a launcher, as srun does. One run is preempted, killed inside a save and killed while it
trains, one after the other, and then gets to its end; benchmarks/kill.py does the same many times.
"""

from __future__ import annotations

import os
import shutil
import signal
import time

import pretrain
import pytest
import torch
from attempts import Attempt, newest_step, unfinished
from launching import config, flags
from safetensors.torch import load_file

from ds_lowrank import PREEMPTED_EXIT_CODE, manifest

PATIENCE = 240.0
STEPS = {"max_steps": 14, "update_proj_gap": 3, "lr": 0.01, "batch_size": 2, "report_to": "none"}


class Run:
    """A run in a folder of its own, by the same command each time."""

    def __init__(self, workplace, output):
        self.folder = workplace / f"ranks_{output}"
        self.folder.mkdir()
        self.output = workplace / output
        options = {**STEPS, "save_every": 3, "save_total_limit": 2}
        self.argv = [*config("zero2"), *flags(workplace, output, **options), "--resume"]

    def start(self):
        return Attempt(self.folder, self.argv, ranks=2)


def until(attempt, condition):
    deadline = time.monotonic() + PATIENCE
    while attempt.running and not condition():
        assert time.monotonic() < deadline, attempt.printed()
        time.sleep(0.002)
    assert attempt.running, attempt.printed()


@pytest.fixture(scope="module")
def preempted(workplace):
    """SIGTERM to rank 1 alone, after the first steps."""
    run = Run(workplace, "disturbed")
    attempt = run.start()
    until(attempt, lambda: attempt.last_step() >= 1)
    attempt.kill(1, signal.SIGTERM)
    return run, attempt.wait(PATIENCE), attempt.printed()


@pytest.mark.launcher
@pytest.mark.slow
def test_sigterm_to_one_rank_ends_all_with_a_checkpoint_and_a_code(preempted):
    run, codes, printed = preempted
    assert codes == [PREEMPTED_EXIT_CODE] * 2, printed
    step = newest_step(run.output)
    assert 2 <= step < STEPS["max_steps"]
    folder = run.output / f"checkpoint-{step}"
    facts = manifest.verify(folder).facts
    assert (facts["step"], facts["world_size"], facts["layout"]) == (step, 2, "ZeRO-1/2")
    assert f"SIGTERM: writing a checkpoint at step {step} and stopping" in printed
    assert f"preempted by SIGTERM: saved {folder}; the same command with --resume goes on with it" in printed
    assert f"no complete checkpoint in {run.output}: from scratch" in printed
    assert "validation perplexity" not in printed
    assert not (run.output / "model.safetensors").exists()


@pytest.mark.launcher
@pytest.mark.slow
def test_killed_in_a_save_and_in_a_step_it_ends_where_an_undisturbed_run_ends(preempted, workplace):
    run, _, _ = preempted
    begin = newest_step(run.output)

    attempt = run.start()
    until(attempt, lambda: unfinished(run.output))  # a folder has appeared and has no marker
    attempt.kill(0)
    attempt.end()
    (ruin,) = unfinished(run.output)
    assert ruin > newest_step(run.output) >= begin

    attempt = run.start()
    until(attempt, lambda: attempt.last_step() > ruin)
    attempt.kill(1)
    attempt.end()
    assert f"going on with {run.output}/checkpoint-{begin}, step {begin}" in attempt.printed()
    assert f"checkpoint-{ruin} passed over" in attempt.printed()

    attempt = run.start()
    assert attempt.wait(PATIENCE) == [0, 0], attempt.printed()
    assert "from scratch" not in attempt.printed()
    kept = manifest.checkpoints(run.output)
    assert len(kept) == 2
    for _, folder in kept:
        manifest.verify(folder)

    other = Run(workplace, "undisturbed")
    attempt = other.start()
    assert attempt.wait(PATIENCE) == [0, 0], attempt.printed()
    here, there = (load_file(output / "model.safetensors") for output in (run.output, other.output))
    assert set(here) == set(there)
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())


# What is refused before anything is started, in this process.


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model" / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    (folder / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"state" * 100)
    manifest.mark(folder, {"step": 4})
    return folder


def refused(workplace, checkpoint, capfd, **options):
    assert pretrain.main(flags(workplace, output_dir=checkpoint.parent, max_steps=8, **options)) == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("how", ["truncated", "corrupted", "missing"])
@pytest.mark.parametrize("flag", ["resume", "resume_from_checkpoint", "true"])
def test_a_damaged_checkpoint_is_refused_by_its_files_name(workplace, checkpoint, capfd, how, flag):
    path = next(checkpoint.rglob("*optim_states.pt"))
    if how == "truncated":
        os.truncate(path, 10)
    elif how == "corrupted":
        path.write_bytes(b"stata" + path.read_bytes()[5:])
    else:
        path.unlink()
    wanted = {"resume": {"resume": True}, "true": {"resume_from_checkpoint": "true"}}
    last = refused(workplace, checkpoint, capfd, **wanted.get(flag, {"resume_from_checkpoint": checkpoint}))
    assert f"{checkpoint} is damaged: global_step4/{path.name} is {how}" in last
    assert "Delete the folder, or resume from another checkpoint" in last


def test_an_incomplete_checkpoint_is_refused_where_it_is_named(workplace, checkpoint, capfd):
    (checkpoint / manifest.MARKER).unlink()
    last = refused(workplace, checkpoint, capfd, resume_from_checkpoint=checkpoint)
    assert "checkpoint-4 has no complete.json" in last
    with pytest.warns(UserWarning, match="checkpoint-4 passed over"):
        last = refused(workplace, checkpoint, capfd, resume_from_checkpoint="true")
    assert f"there is no checkpoint in {checkpoint.parent} that is complete" in last


def test_a_start_from_scratch_beside_complete_checkpoints_is_refused(workplace, checkpoint, capfd):
    last = refused(workplace, checkpoint, capfd)
    assert "starts at step 0" in last
    assert "(checkpoint-4): resume from the newest" in last


def test_what_resume_cannot_go_on_with(workplace, checkpoint, capfd):
    shutil.copytree(checkpoint, other := checkpoint.parent.parent / "other" / "checkpoint-4")
    manifest.mark(other, {"model_only": True})
    assert "has no optimizer to go on with" in refused(workplace, other, capfd, resume=True)
    (other / "trainer_state.json").unlink()
    manifest.mark(other, {})
    assert "no trainer_state.json" in refused(workplace, other, capfd, resume=True)
