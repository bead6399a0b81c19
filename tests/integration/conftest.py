"""Fixtures of the tests that start launch/pretrain.py: a run costs about 15 s, so several tests share one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from launching import EIGHT_STEPS, config, flags, launch


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with a small corpus.

    The same everywhere, which the standard library's text is not: of a run's hundreds of draws and bases one may be up
    to rounding, and what tests compare must not depend on the Python that runs them.
    """
    folder = tmp_path_factory.mktemp("pretrain")
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdfgklmnprst", k=draw.randint(2, 8))) for _ in range(2000)]
    rarer = [1 / (place + 1) for place in range(len(words))]
    documents = (" ".join(draw.choices(words, rarer, k=draw.randint(20, 200))) for _ in range(800))
    (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def zero2_run(workplace) -> tuple[Path, str]:
    """Eight steps under ZeRO-2, a checkpoint after every two: the output folder and what was printed."""
    options = {**EIGHT_STEPS, "save_every": 2}
    printed = launch(workplace, "deepspeed", *config("zero2"), *flags(workplace, "zero2", **options))
    return workplace / "zero2", printed
