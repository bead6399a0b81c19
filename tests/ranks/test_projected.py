"""Projected gradients under real frameworks, beside the reference that is given every rank's own gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, brief, build_model, held
from harness import start
from projected_cases import local_arguments, run_projected
from tiers import slow_except

import ds_lowrank

PLACES = [("one", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)]
PLACES += [("zero1", 2), ("zero2", 3), ("zero3", 2)]


def check(pools, layout: str, ranks: int, tolerance: float = 1e-5, **settings: Any) -> dict[str, Any]:
    case = brief(ranks, layout=layout, gradients="projected", **settings)
    results = pools(ranks).run(run_projected, case)
    assert results[0]["deviation"] < tolerance
    assert results[0]["norm_deviation"] < 1e-5
    assert results[0]["clipped"] == (case.steps if case.clip else 0)
    for name in ("ranks_equal", "replicas_equal", "model_equal"):
        assert all(r[name] for r in results), name
    return results[0]


@pytest.mark.parametrize(
    ("layout", "ranks", "accumulation", "clip"),
    slow_except(
        [("one", 1, 3, 0.3), ("ddp", 3, 3, 0.3), ("fsdp2", 4, 3, 0.3), ("hsdp", 4, 1, 0.0)],
        [(*place, accumulation, clip) for place in PLACES for accumulation in (1, 3) for clip in (0.0, 0.3)],
    ),
)
def test_the_trajectory_is_the_references(pools, layout, ranks, accumulation, clip):
    result = check(pools, layout, ranks, accumulation=accumulation, clip=clip)
    assert result["refreshes"] >= 3


SETTINGS: dict[str, dict[str, Any]] = {
    "fewer-rows-than-ranks": {"shapes": "thin", "rank": 2},
    "stacked-experts": {"shapes": "experts", "rank": 3},
    "whole-bases": {"shard_projection": False},
    "int8": {"state_dtype": "int8", "basis_dtype": "int8", "tolerance": 2e-3},
    "random": {"selection": "random"},
    "gaussian": {"selection": "gaussian"},
    "project": {"selection": "dominant", "moments": "project"},
    "silent": {"silent": 2},
    "a-rank-without": {"dropped": "layers.1.1.weight"},
}


@pytest.mark.parametrize(
    ("settings", "layout", "ranks"),
    slow_except(
        [("fewer-rows-than-ranks", "fsdp2", 4), ("a-rank-without", "fsdp2", 2), ("a-rank-without", "ddp", 2)],
        [(name, *place) for name in SETTINGS for place in PLACES[1:6]],
    ),
)
def test_what_else_there_is_to_choose(pools, settings, layout, ranks):
    check(pools, layout, ranks, **SETTINGS[settings])


@pytest.mark.parametrize(
    ("layout", "ranks"), slow_except([("ddp", 2), ("fsdp2", 2)], [place for place in PLACES if "zero" not in place[0]])
)
def test_in_float64(pools, layout, ranks):
    check(pools, layout, ranks, 1e-10, dtype="fp64")


@pytest.mark.parametrize(("layout", "ranks"), slow_except([("fsdp2", 2)], [("ddp", 2), ("fsdp2", 2), ("hsdp", 4)]))
def test_gradients_in_bf16(pools, layout, ranks):
    """Mixed precision, whose gradients travel in fp32."""
    check(pools, layout, ranks, 1e-4, dtype="bf16")


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_without_accumulation_and_clip_it_is_what_whole_gradients_give(pools, layout):
    case = brief(2, layout=layout, gradients="projected", accumulation=1, clip=0.0)
    result = pools(2).run(run_projected, case, with_full=True)[0]
    assert result["to_full"] < 1e-5


def test_wide_matrices_in_columns(pools):
    check(pools, "fsdp2", 2, shapes="columns", wide_on_columns=True)


def test_ddp_has_to_leave_the_projected_gradients_alone(pools):
    for text in pools(2).run(_without_exclusion, Case(layout="ddp", gradients="projected", clip=0.0)):
        assert "call ds_lowrank.exclude_from_ddp(model, optimizer)" in text
        assert "layers.0.0.weight (24, 10)" in text


def _without_exclusion(case: Case) -> str:
    model = build_model(case)
    optimizer = ds_lowrank.build_optimizer(model, case.options)
    torch.nn.parallel.DistributedDataParallel(model)
    try:
        optimizer.ensure_state()
    except ds_lowrank.LayoutError as error:
        return str(error)
    return "no error"


def test_offloaded_weights_are_refused(pools):
    for text in pools(2).run(_offloaded, replace(Case(layout="fsdp2", gradients="projected", clip=0.0), offload=True)):
        assert "does not go with CPUOffloadPolicy" in text


def _offloaded(case: Case) -> str:
    try:
        start(case, build_model(case))
    except ds_lowrank.LayoutError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("fsdp2", 2)])
def test_a_run_goes_on_bit_by_bit_by_the_frameworks_own_means(pools, layout, ranks, tmp_path):
    """torch's loader for FSDP2 makes a step of zeros first."""
    case = replace(Case(layout=layout, gradients="projected", layers=2, gap=3), steps=6)
    for whole, resumed in pools(ranks).run(_resumed, case, str(tmp_path)):
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(w, resumed[n]) for n, w in whole.items())


def _resumed(case: Case, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    found = []
    for resumes in (False, True):
        run = start(case, build_model(case))
        if resumes:
            run.load(Path(folder) / "saved")
        for step in range(3 if resumes else 0, case.steps):
            if step == 3 and not resumes:
                run.save(Path(folder) / "saved")
            run.step(local_arguments(case, step, torch.distributed.get_rank()))
        found.append({n: w.clone() for n, (_, w) in held(run.optimizer).items()})
        run.close()
    return found[0], found[1]
