"""Fixtures: one persistent pool of gloo ranks a world size, started when a test first asks for it."""

from __future__ import annotations

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
            started[size] = RankPool(size, timeout=120)
        return started[size]

    yield pool
    for one in started.values():
        one.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
