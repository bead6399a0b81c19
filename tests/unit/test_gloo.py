"""What makes a process wait for gloo's threads at its end; tests/ranks/test_gloo_exit.py tests the waiting."""

from __future__ import annotations

import atexit

import pytest
import torch

import ds_lowrank
from ds_lowrank.comm import gloo
from ds_lowrank.comm.collectives import Comm
from ds_lowrank.layouts.base import Ranks


@pytest.fixture
def registered(monkeypatch):
    found: list[object] = []
    monkeypatch.setattr(atexit, "register", found.append)
    gloo.await_gloo_at_exit.cache_clear()
    yield found
    gloo.await_gloo_at_exit.cache_clear()


def test_an_optimizer_on_several_ranks_sees_to_it_once(registered):
    Comm(Ranks())
    assert not registered
    Comm(Ranks(size=2))
    Comm(Ranks(size=2))
    assert registered == [gloo.await_gloo]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="prepare_cpu() does nothing here")
def test_prepare_cpu_sees_to_it(registered):
    ds_lowrank.prepare_cpu()
    assert gloo.await_gloo in registered


def test_a_process_without_gloo_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(gloo, "_TASKS", tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "comm").write_text("python\n")
    monkeypatch.setattr(gloo.time, "sleep", None)  # would raise
    gloo.await_gloo()


def test_a_busy_thread_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(gloo, "_TASKS", tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "comm").write_text("pt_gloo_runloop\n")
    seen = []

    def sleep(_seconds: float) -> None:
        seen.append("R" if len(seen) < 5 else "S")
        (tmp_path / "1" / "stat").write_text(f"1 (pt_gloo_runloop) {seen[-1]} 1 1")

    monkeypatch.setattr(gloo.time, "sleep", sleep)
    gloo.await_gloo()
    assert seen == ["R"] * 5 + ["S"] * 3
