"""Completing checkpoints and agreeing to stop on several ranks: one rank's trouble or signal is everybody's."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ds_lowrank import CheckpointCallback, manifest
from ds_lowrank.integrations import checkpoints
from ds_lowrank.integrations.signals import Vote

RANKS = 3


def write(folder, files=7):
    folder.mkdir(parents=True)
    for k in range(files):
        (folder / f"{k}.pt").write_bytes(bytes(100 * k))
    return folder


def test_ranks_hash_a_share_each_and_the_marker_has_all(pools, tmp_path):
    folder = write(tmp_path / "checkpoint-1")
    shares = pools(RANKS).run(_complete, folder)
    assert sorted(name for share in shares for name in share) == [f"{k}.pt" for k in range(7)]
    assert all(shares)
    assert set(manifest.verify(folder).files) == {f"{k}.pt" for k in range(7)}


def _complete(folder: Path) -> list[str]:
    hashed: list[str] = []
    whole = manifest.digests

    def digests(root, names, sync=False):
        assert sync
        hashed.extend(names)
        return whole(root, names, sync)

    manifest.digests = digests
    try:
        checkpoints.complete(folder, {"step": 1})
    finally:
        manifest.digests = whole
    return hashed


@pytest.mark.parametrize("rank", range(RANKS))
def test_one_rank_that_cannot_read_its_share_is_named_on_all(pools, tmp_path, rank):
    folder = write(tmp_path / "checkpoint-1")
    for text in pools(RANKS).run(_complete_with_trouble, folder, rank):
        assert f"completing {folder} failed on rank {rank}: OSError: this disk is broken" in text
    assert not manifest.is_complete(folder)


def _complete_with_trouble(folder: Path, rank: int) -> str:
    whole = manifest.digests

    def digests(*args, **kwargs):
        if dist.get_rank() == rank:
            raise OSError("this disk is broken")
        return whole(*args, **kwargs)

    manifest.digests = digests
    try:
        checkpoints.complete(folder, {})
    except RuntimeError as error:
        return str(error)
    finally:
        manifest.digests = whole
    return "no error"


def test_one_ranks_vote_is_known_to_all_after_it_was_asked_and_not_before(pools):
    for answers in pools(RANKS).run(_vote):
        assert answers == [0, 0, 15, 0, 12]


def _vote() -> list[int]:
    vote = Vote(torch.device("cpu"))
    rank = dist.get_rank()
    answers = []
    for mine in (0, 15 if rank == 1 else 0, 0, [10, 12, 0][rank]):
        answers.append(vote.answer())
        vote.ask(mine)
    return [*answers, vote.answer()]


@pytest.mark.parametrize("last", [4, 20])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(pools, tmp_path, last):
    """Told in the middle of step 4: all act at the end of step 5, or at once where there is none."""
    stopped = pools(RANKS).run(_train_with_signal, tmp_path, last)
    assert stopped == [(min(5, last), "SIGTERM", True, False)] * RANKS


def _train_with_signal(output: Path, last: int) -> tuple[int, str | None, bool, bool]:
    callback = CheckpointCallback()
    args = SimpleNamespace(
        output_dir=str(output),
        save_total_limit=None,
        save_only_model=False,
        load_best_model_at_end=False,
        device=torch.device("cpu"),
    )
    before = signal.getsignal(signal.SIGTERM)
    step = 0
    state = SimpleNamespace(global_step=0, max_steps=last, is_world_process_zero=dist.get_rank() == 0)
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=True)
    callback.on_train_begin(args, state, control)
    for step in range(1, last + 1):
        if step == 4 and dist.get_rank() == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        state.global_step = step
        callback.on_step_end(args, state, control, optimizer=None)
        assert control.should_save == control.should_training_stop
        if control.should_training_stop:
            break
    callback.on_train_end(args, state, control)
    assert signal.getsignal(signal.SIGTERM) == before
    return step, callback.preempted, control.should_save, control.should_evaluate


def test_ranks_that_start_at_different_steps_are_told(pools, tmp_path):
    for text in pools(RANKS).run(_start_apart, tmp_path):
        assert "the ranks start at different steps (0, 1, 2)" in text


def _start_apart(output: Path) -> str:
    state = SimpleNamespace(global_step=dist.get_rank(), max_steps=9)
    try:
        CheckpointCallback().on_train_begin(SimpleNamespace(output_dir=str(output)), state, None)
    except ValueError as error:
        return str(error)
    return "no error"
