"""Steps in the backward pass: the same trajectory, without the gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, arguments, assemble, brief, build_model, held
from harness import start
from tiers import slow_except

import ds_lowrank

PLAIN = Case(clip=0.0, accumulation=1)
PLACES = [("one", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)]
ORDINARY = [("one", 1, "small", 3), ("ddp", 2, "small", 3), ("fsdp2", 2, "small", 3), ("fsdp2", 2, "experts", 1)]
ORDINARY += [("hsdp", 4, "small", 3)]


@pytest.mark.parametrize(
    ("layout", "ranks", "shapes", "accumulation"),
    slow_except(ORDINARY, [(*place, shapes, k) for place in PLACES for shapes in ("small", "experts") for k in (1, 3)]),
)
def test_the_trajectory_is_that_of_ordinary_steps(pools, layout, ranks, accumulation, shapes):
    case = brief(ranks, clip=0.0, layout=layout, accumulation=accumulation, shapes=shapes, rank=3)
    plain = pools(ranks).run(_train, case)[0]
    layerwise = pools(ranks).run(_train, replace(case, layerwise=True))[0]
    begin = {n: p.detach() for n, p in build_model(case).named_parameters()}
    # Without accumulation the arithmetic is the same to the last bit, but for DDP, which divides before it adds.
    tolerance = 0.0 if accumulation == 1 and layout != "ddp" else 1e-5
    for name, weights in plain["weights"].items():
        moved = (weights - begin[name]).norm()
        assert moved > 0
        assert (layerwise["weights"][name] - weights).norm() <= tolerance * moved


def _train(case: Case) -> dict:
    run = start(case, build_model(case))
    rank = torch.distributed.get_rank()
    for step in range(case.steps):
        run.step([arguments(case, step, micro, rank) for micro in range(case.accumulation)])
    weights, equal = assemble(run.optimizer, held(run.optimizer))
    assert equal
    run.close()
    return {"weights": weights}


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 2)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_freed_as_soon_as_they_are_used(pools, layout, ranks, accumulation):
    case = replace(PLAIN, layout=layout, layerwise=True, accumulation=accumulation, gap=100, wave_size=1)
    for first, later in pools(ranks).run(_gradients_left, case):
        # Of 25 matrices: at the first step all are due; with waves of one they step as soon as they are there, but an
        # accumulated gradient is kept until step(). Later nothing is due. Full-rank ones are kept by DDP only.
        assert first == (25 if accumulation > 1 else 0)
        assert later == 0


def _gradients_left(case: Case) -> tuple[int, int]:
    run = start(case, build_model(case))
    rank = torch.distributed.get_rank()
    left = []
    inner = run.optimizer.step

    def step(closure=None):
        left.append(sum(p.grad is not None for n, p in run.model.named_parameters() if n != "gain"))
        return inner(closure)

    run.optimizer.step = step  # type: ignore[method-assign]
    for index in range(2):
        run.step([arguments(case, index, micro, rank) for micro in range(case.accumulation)])
    run.close()
    return left[0], left[1]


def test_a_second_gradient_before_the_step_is_refused():
    weight = torch.nn.Parameter(torch.randn(6, 4))
    group = {"params": [("w", weight)], "rank": 2}
    optimizer = ds_lowrank.LowRankAdamW([group], lr=0.1, layerwise=True)
    optimizer.ensure_state()
    weight.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"w has a second gradient before step.*accumulation_steps"):
        weight.square().sum().backward()


def test_ddp_has_to_leave_the_projected_gradients_alone(pools):
    for text in pools(2).run(_without_exclusion, replace(PLAIN, layout="ddp", layerwise=True)):
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


def _weights_and_loss(**options):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = ds_lowrank.LowRankAdamW([{"params": [("w", weight)], "rank": 2}], lr=0.1, layerwise=True, **options)
    optimizer.ensure_state()
    return weight, optimizer, lambda: (weight * torch.randn(6, 4)).sum().backward()


def test_zero_grad_drops_what_was_accumulated():
    found = []
    for thrown_away in (False, True):
        weight, optimizer, backward = _weights_and_loss(accumulation_steps=2, update_proj_gap=100)
        for _ in range(2):
            backward()
        optimizer.step()
        optimizer.zero_grad()
        if thrown_away:
            (weight * 100.0).sum().backward()
            optimizer.zero_grad()
        backward()
        optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_only_the_newest_optimizer_of_a_parameter_steps_it():
    weight, old, backward = _weights_and_loss()
    new = ds_lowrank.LowRankAdamW([{"params": [("w", weight)], "rank": 2}], lr=0.0, layerwise=True)
    new.ensure_state()
    before = weight.detach().clone()
    backward()
    assert torch.equal(weight, before)
    assert new.state["lowrank"]["w"]["step"] == 1
    assert old.state["lowrank"]["w"]["step"] == 0


def test_a_state_loaded_before_a_backward_pass_is_taken_over_there():
    _, optimizer, backward = _weights_and_loss()
    backward()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    backward()
    assert optimizer.state["lowrank"]["w"]["step"] == 2
