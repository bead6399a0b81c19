"""DeepSpeed on gloo ranks: what is particular to it, beside the layouts that test_layouts.py compares."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, brief, build_model, run_case
from equivalence import BF16_OPTIMIZER, OVERLAP, PLAIN_COMM
from harness import deepspeed_config, start
from rank_pool import RankError
from tiers import slow_except

import ds_lowrank
from ds_lowrank.optimizer import STATE_KEY

RELEASE = tuple(int(part) for part in version("deepspeed").split(".")[:2])
SHARDED_THERE = pytest.mark.skipif(RELEASE in ((0, 17), (0, 18)), reason="refused: DeepSpeed does not shard there")


def check(pools, ranks: int, tolerance: float = 1e-5, **settings: Any) -> dict:
    results = pools(ranks).run(run_case, brief(ranks, **settings), with_free=False)
    assert results[0]["deviation"] < tolerance
    assert all(r["ranks_equal"] and r["model_equal"] for r in results)
    return results[0]


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "settings",
    slow_except(
        ["bf16-optimizer", "zero2-offload", "scattered-gradients", "overlap", "unborn-then-born"],
        [
            pytest.param(
                {"layout": "zero1", "dtype": "bf16", **BF16_OPTIMIZER}, id="bf16-optimizer", marks=SHARDED_THERE
            ),
            pytest.param({"dtype": "bf16", "offload": True}, id="zero2-offload"),
            pytest.param({"layout": "zero1", "offload": True}, id="zero1-offload"),
            pytest.param({"dtype": "bf16", **PLAIN_COMM}, id="scattered-gradients"),
            pytest.param({"dtype": "bf16", **OVERLAP}, id="overlap"),
            pytest.param({"shard_projection": False, "moments": "project"}, id="whole-bases"),
            pytest.param({"selection": "random", "moments": "project"}, id="random"),
            pytest.param({"selection": "uniform", "proj_type": "reverse_std"}, id="reverse-side"),
            pytest.param({"accumulation": 1, "clip": 0.0, "weight_decay": 0.0}, id="no-accumulation-clip-decay"),
            # Layer 0 has no gradient in the first steps: unborn on every rank alike, also where it is cut.
            pytest.param({"silent": 3, "steps": 10}, id="unborn-then-born"),
        ],
    ),
)
def test_variants(pools, ranks, settings):
    # A random basis leaves more entries of R near zero, where Adam's quotient amplifies the rounding of fp32.
    result = check(pools, ranks, tolerance=2e-5 if settings.get("selection") == "random" else 1e-5, **settings)
    assert result["shared"] > 0


@pytest.mark.slow
def test_nothing_is_cut_or_sent_when_layers_divide_by_ranks(pools):
    for ranks, layers in ((2, 4), (3, 3), (4, 4)):
        result = check(pools, ranks, shapes="even", layers=layers)
        assert result["shared"] == 0
        assert sum(result["sent"].values()) == 0


@pytest.mark.slow
def test_the_same_run_twice_is_bitwise_the_same(pools):
    case = brief(3)
    first, second = pools(3).run(_fingerprint, case), pools(3).run(_fingerprint, case)
    assert first == second


def _fingerprint(case: Case) -> str:
    engine, optimizer = _engine(case)
    _train(engine, case, range(6))
    digest = hashlib.sha256()
    for name in sorted(optimizer.layout.pieces):
        digest.update(optimizer.layout.weight(name).detach().numpy().tobytes())
    engine.destroy()
    return digest.hexdigest()


@pytest.mark.parametrize(
    "settings",
    slow_except(
        ["bf16-optimizer", "zero2-offload"],  # the others are resumed by test_resume.py, too
        [
            pytest.param({"layout": "zero1"}, id="zero1"),
            pytest.param({"layout": "zero2"}, id="zero2"),
            pytest.param({"layout": "zero1", **BF16_OPTIMIZER}, id="bf16-optimizer", marks=SHARDED_THERE),
            pytest.param({"offload": True}, id="zero2-offload"),
            pytest.param({"layout": "zero3"}, id="zero3"),
        ],
    ),
)
def test_deepspeeds_own_checkpoint_resumes_bitwise(pools, settings):
    """On the same number of ranks: state under a string key is neither cast nor lost."""
    with tempfile.TemporaryDirectory() as folder:
        results = pools(3).run(_save_and_resume, brief(3, dtype="bf16", **settings), folder)
    assert all(resumed == straight for straight, resumed in results)


def _save_and_resume(case: Case, folder: str) -> tuple[str, str]:
    digests = []
    for resume in (False, True):
        engine, optimizer = _engine(case)
        if resume:
            engine.load_checkpoint(folder)
        else:
            _train(engine, case, range(4))
            engine.save_checkpoint(folder)
        _train(engine, case, range(4, 7))
        digest = hashlib.sha256()
        for name in sorted(optimizer.layout.pieces):
            digest.update(optimizer.layout.weight(name).detach().numpy().tobytes())
        for state in optimizer.state[STATE_KEY].values():
            digest.update(repr((state["step"], state["refreshes"])).encode())
        digests.append(digest.hexdigest())
        engine.destroy()
    return digests[0], digests[1]


def test_round_robin_gradients_are_found_out_on_every_rank(pools):
    """They link fragments to the wrong elements; the layout compares each with the model's weights first."""
    answers = pools(3).run(_layout_error, Case(zero={"round_robin_gradients": True}), None)
    for text in answers:
        assert "does not hold its weights" in text
        assert "round_robin_gradients" in text


@pytest.mark.parametrize("option", [{"rank": 3}, {"scale": 0.5}, {"gram_dtype": "float32"}, {"moments": "project"}])
def test_ranks_that_disagree_are_refused_on_every_rank(pools, option):
    for text in pools(2).run(_layout_error, Case(), {"on_rank_1": option}):
        assert "ranks [1] project other matrices, or with other options, than rank 0" in text


def test_an_expert_parameter_on_one_rank_is_refused_by_name_on_all(pools):
    for text in pools(2).run(_layout_error, Case(), {"expert": "layers.0.1.weight"}):
        assert "layers.0.1.weight" in text
        assert "MoE" in text


def _layout_error(case: Case, trouble: dict | None) -> str:
    """Text of the error that the first use of the layout raises, from a configuration that is not checked."""
    trouble = trouble or {}
    import deepspeed

    from ds_lowrank.integrations.deepspeed import build_optimizer

    rank = torch.distributed.get_rank()
    options = {"rank": 4, **(trouble.get("on_rank_1", {}) if rank == 1 else {})}
    model = build_model(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = build_optimizer(model, ds_lowrank.LowRankConfig(**options), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case))
    if "expert" in trouble and rank == 1:
        dict(model.named_parameters())[trouble["expert"]].allreduce = False
    try:
        optimizer.ensure_state()
    except ds_lowrank.LayoutError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def test_a_rank_that_raises_is_reported_with_its_traceback(pools):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*ValueError: on purpose"):
        pools(2).run(_raise_on_rank_1)
    assert pools(2).run(torch.distributed.get_rank) == [0, 1]  # a new pool serves the next test


def _raise_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("on purpose")


def _engine(case: Case):
    run = start(case, build_model(case))
    return run.engine, run.optimizer


def _train(engine, case: Case, steps: range) -> None:
    rank = torch.distributed.get_rank()
    for step in steps:
        for micro in range(case.accumulation):
            engine.backward(engine((step * 64 + micro) * 16 + rank))
            engine.step()


def test_metrics_are_the_same_on_every_rank(pools):
    answers = pools(3).run(_metrics, replace(Case(), gap=2, wave_size=100))
    assert answers[0] == {**answers[1], "lowrank/refresh_seconds": answers[0]["lowrank/refresh_seconds"]}
    assert answers[0]["lowrank/refreshes"] == 25 * 2  # 5 layers of 5 matrices, at steps 0 and 2
    assert 0 < answers[0]["lowrank/overlap"] <= 1
    assert 0 < answers[0]["lowrank/captured_energy"] <= 1


def _metrics(case: Case) -> dict[str, float]:
    engine, optimizer = _engine(case)
    _train(engine, case, range(3))
    found = ds_lowrank.metrics(engine.optimizer)
    assert ds_lowrank.metrics(optimizer) == {}
    engine.destroy()
    return found


def test_rank_files_are_loadable_safely(pools, tmp_path):
    """torch.load(weights_only=True) takes every optimizer state that is written."""
    pools(2).run(_save_state, Case(), str(tmp_path))
    for rank in range(2):
        loaded = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(loaded["state"][STATE_KEY]["layers.0.0.weight" if rank == 0 else "layers.1.4.weight"]) >= {"step"}


def _save_state(case: Case, folder: str) -> None:
    engine, optimizer = _engine(case)
    _train(engine, case, range(1))
    torch.save(optimizer.state_dict(), Path(folder) / f"{torch.distributed.get_rank()}.pt")
    engine.destroy()
