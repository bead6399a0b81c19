"""Fixtures: one persistent pool of gloo ranks a world size, started when a test first asks for it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from rank_pool import RankPool

# Before anything imports Triton: it is read where a kernel is decorated, those of Triton itself included.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], RankPool]]:
    started: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        if size not in started or not started[size].alive:
            started[size] = RankPool(size, timeout=300)  # on a machine that others use, too
        return started[size]

    yield pool
    for one in started.values():
        one.close()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What TrainingArguments tell accelerate by variables of the process (FSDP, in transformers 4) ends with a test."""

    def told() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}

    before = told()
    yield
    for name in told():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process uses one: the Trainer would copy models to all, which launch/pretrain.py refuses."""
    if torch.cuda.device_count() > 1:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What is imported by now is not looked through again by every collection of garbage; a Trainer makes several."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what is left at the end is reported as a leak


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.is_available()
    # torch 2.6: its FSDP2 calls what only streams of a GPU have there.
    fsdp = gpus or hasattr(torch.cpu.Stream(), "record_event")
    for item in items:
        if item.get_closest_marker("gpu") and not gpus:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if not fsdp and "tests/unit/" not in item.nodeid and ("fsdp" in item.nodeid or "hsdp" in item.nodeid):
            item.add_marker(pytest.mark.skip(reason="FSDP2 of this torch does not run on a CPU"))
