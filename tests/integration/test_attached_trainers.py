"""One call serves every Trainer: transformers' and TRL's, on one process and under ZeRO-2 on two ranks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from attached_trainers import KINDS, train
from launching import config, launch

SCRIPT = Path(__file__).with_name("attached_trainers.py")
TRL = ("sft", "dpo", "grpo")
ALL_PROJECTED = {"optimizer": "LowRankAdamW", "matrices": 7, "moved": 7, "checkpoint": "checkpoint-2"}
HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.mark.parametrize("kind", KINDS)
def test_one_process(tmp_path, kind):
    if kind in TRL:
        pytest.importorskip("trl")
    expected = {"trainer": KINDS[kind], "layout": "one process", "ranks": 1, **ALL_PROJECTED}
    assert train(kind, tmp_path) == expected


@pytest.mark.launcher
@pytest.mark.slow
def test_zero2_on_two_ranks(tmp_path):
    kinds = [kind for kind in KINDS if HAS_TRL or kind not in TRL]
    launch(tmp_path, "deepspeed", str(tmp_path), *config("zero2"), "--kinds", *kinds, script=SCRIPT)
    for kind in kinds:
        expected = {"trainer": KINDS[kind], "layout": "ZeRO-1/2", "ranks": 2, **ALL_PROJECTED}
        found = [json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
        assert found == [expected] * 2


@pytest.mark.launcher
@pytest.mark.slow
def test_a_model_that_stage_3_partitions_as_it_is_loaded(tmp_path):
    """Nobody calls deepspeed.init_distributed(): zero.Init would count one rank on a CPU."""
    launch(tmp_path, "deepspeed", str(tmp_path), *config("zero3"), "--kinds", "trainer", script=SCRIPT)
    expected = {"trainer": "Trainer", "layout": "ZeRO-3", "ranks": 2, **ALL_PROJECTED}
    assert [json.loads((tmp_path / f"trainer-{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
