"""Fixtures of the tests that start launch/pretrain.py: a run costs about 15 s, so several tests share one."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from launching import EIGHT_STEPS, config, flags, launch


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with a small corpus: ten modules of the standard library, a paragraph a document."""
    folder = tmp_path_factory.mktemp("pretrain")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:10]
    (folder / "corpus.txt").write_text("\n\n".join(p.read_text(encoding="utf-8") for p in sources), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def zero2_run(workplace) -> tuple[Path, str]:
    """Eight steps under ZeRO-2, a checkpoint after every two: the output folder and what was printed."""
    options = {**EIGHT_STEPS, "save_every": 2}
    printed = launch(workplace, "deepspeed", *config("zero2"), *flags(workplace, "zero2", **options))
    return workplace / "zero2", printed
