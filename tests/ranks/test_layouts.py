"""Every layout on 1-4 gloo ranks: the applied update against the one-process reference."""

from __future__ import annotations

import hashlib

import pytest
import torch
from cases import Case, arguments, build_model, run_case
from harness import LAYOUTS, start

MANY_RANKS = [layout for layout in LAYOUTS if layout != "one"]
PERSISTENT = {"zero": {"stage3_param_persistence_threshold": 10_000}}
COLUMNS = {"layout": "fsdp2", "wide_on_columns": True, "shapes": "columns"}


def check(pools, ranks: int, case: Case, tolerance: float = 1e-5) -> dict:
    results = pools(ranks).run(run_case, case, with_free=False)
    assert results[0]["deviation"] < tolerance
    assert results[0]["basis_deviation"] < 1e-4
    assert all(r["ranks_equal"] for r in results)
    assert all(r["replicas_equal"] for r in results)
    assert all(r["model_equal"] for r in results)
    return results[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", MANY_RANKS)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"dtype": "fp32", "selection": "dominant", "moments": "project"}, id="fp32-dominant-project"),
        pytest.param({"dtype": "bf16"}, id="bf16-importance-keep"),
        pytest.param({"shapes": "thin", "rank": 2}, id="fewer-rows-than-ranks"),
        pytest.param({"shapes": "experts", "rank": 3, "moments": "project"}, id="stacked-experts"),
    ],
)
def test_the_update_is_the_references(pools, ranks, layout, settings):
    result = check(pools, ranks, Case(layout=layout, **settings))
    assert result["refreshes"] is None or result["refreshes"] >= 3
    if ranks > 1 and settings.get("shapes") != "experts":
        assert result["shared"] > 0


@pytest.mark.parametrize("layout", ["one", "ddp", "fsdp2", "hsdp"])
def test_fp64_agrees_to_1e_9(pools, layout):
    ranks = 1 if layout == "one" else 4
    check(pools, ranks, Case(layout=layout, dtype="fp64"), tolerance=1e-9)
    check(pools, ranks, Case(layout=layout, dtype="fp64", shapes="experts", rank=3), tolerance=1e-9)


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3", "fsdp2", "hsdp"])
def test_llama_sized_matrices(pools, layout):
    """1376×512 and 512×1376: boundary rows move for the tall, columns become rows for the wide one."""
    for ranks in (2, 3):
        case = Case(layout=layout, shapes="real", layers=1, rank=32, steps=5, accumulation=1)
        check(pools, ranks, case)


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_wide_matrices_sharded_by_columns_move_nothing(pools, layout, ranks):
    result = check(pools, ranks, Case(layout=layout, shapes="columns", wide_on_columns=True))
    assert result["moved"] == 0
    by_rows = check(pools, ranks, Case(layout=layout, shapes="columns"))
    assert by_rows["moved"] > 0 or (layout, ranks) == ("hsdp", 2)  # there a copy of the model is on one rank


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**COLUMNS, "proj_type": "reverse_std"}, id="fsdp2-columns-of-tall"),
        pytest.param({"layout": "fsdp2", "offload": True}, id="fsdp2-offload"),
        pytest.param({"layout": "zero3", "dtype": "bf16", "offload": True}, id="zero3-offload"),
        pytest.param({"layout": "zero3", **PERSISTENT}, id="zero3-persistent-parameters"),
        pytest.param({"layout": "zero3", "shard_projection": False, "moments": "project"}, id="zero3-whole-bases"),
        pytest.param({"layout": "hsdp", "shard_projection": False}, id="hsdp-whole-bases"),
        pytest.param({"layout": "hsdp", "moments": "project", "selection": "dominant"}, id="hsdp-project"),
        pytest.param({"layout": "ddp", "shard_projection": False, "clip": 0.0}, id="ddp-whole-bases"),
        pytest.param({"layout": "fsdp2", "selection": "uniform", "proj_type": "reverse_std"}, id="fsdp2-reverse-side"),
        pytest.param({"layout": "fsdp2", "selection": "random", "moments": "project"}, id="fsdp2-random"),
        pytest.param({"layout": "ddp", "selection": "random"}, id="ddp-random"),
        # Odd ranks have no gradient of a parameter: it counts as zero there, and nobody waits for anybody.
        pytest.param({"layout": "fsdp2", "dropped": "layers.1.0.weight"}, id="fsdp2-none-on-some-ranks"),
        # Layer 0 has no gradient in the first steps: unborn on every rank alike.
        pytest.param({"layout": "fsdp2", "silent": 3, "steps": 14}, id="fsdp2-unborn-then-born"),
        pytest.param({"layout": "zero3", "silent": 3, "steps": 14}, id="zero3-unborn-then-born"),
    ],
)
def test_variants(pools, ranks, settings):
    # A random basis leaves more entries of R near zero, where Adam's quotient amplifies the rounding of fp32.
    check(pools, ranks, Case(**settings), tolerance=2e-5 if settings.get("selection") == "random" else 1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_free_running_trajectory_is_the_same_everywhere(pools, ranks):
    """References with gradients of their own: the same run under every framework, whatever delivered the gradient."""
    for layout in MANY_RANKS:
        result = pools(ranks).run(run_case, Case(layout=layout), with_free=True)[0]
        assert result["free_deviation"] < 1e-5, layout
    for layout in ("ddp", "fsdp2", "hsdp"):
        result = pools(ranks).run(run_case, Case(layout=layout, dtype="fp64"), with_free=True)[0]
        assert result["free_deviation"] < 1e-12, layout


@pytest.mark.parametrize("layout", ["ddp", "zero3", "fsdp2", "hsdp"])
def test_the_same_run_twice_is_bitwise_the_same(pools, layout):
    first, second = (pools(4).run(_weights, Case(layout=layout, steps=6)) for _ in range(2))
    assert first == second


def _weights(case: Case) -> str:
    run = start(case, build_model(case))
    rank = torch.distributed.get_rank()
    for step in range(case.steps):
        run.step([arguments(case, step, micro, rank) for micro in range(case.accumulation)])
    digest = hashlib.sha256()
    for name in sorted(run.optimizer.layout.pieces):
        digest.update(run.optimizer.layout.weight(name).detach().numpy().tobytes())
    run.close()
    return digest.hexdigest()
