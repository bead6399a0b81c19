"""8-bit moments of parameters that are not projected, cut anywhere: one trajectory, one state, on any ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, arguments, assemble, brief, build_model, held, run_case
from harness import start
from rank_pool import RankPool
from resume import Move, adamw8bit, try_move, whole_state
from tiers import slow_except
from torch.distributed.tensor import DTensor, distribute_tensor

# All but the first layer is trained full-rank: vectors and matrices of 5 to 280 numbers, some on fewer ranks than there
# are, blocks of 64 that a boundary cuts, once or more than once.
INT8: dict[str, Any] = {"state_dtype": "int8", "targets": r"layers\.0\..*"}
PLACES = [("ddp", 2), ("zero1", 2), ("zero2", 3), ("zero2", 4), ("zero3", 2), ("zero3", 4), ("fsdp2", 2), ("fsdp2", 3)]
PLACES += [("hsdp", 4)]


@pytest.fixture
def all_pools(pools) -> dict[int, RankPool]:
    return {ranks: pools(ranks) for ranks in (1, 2, 3, 4)}


def _fed(case: Case, steps: int, silent: str = "") -> dict[str, torch.Tensor]:
    """Weights and states after steps on gradients that are the same on any number of ranks and any layout.

    Args:
        case: what runs.
        steps: how many.
        silent: a parameter whose gradient is zero; odd ranks have none where the model is sharded.
    """
    run = start(case, build_model(case))
    optimizer = run.optimizer
    inner, count = optimizer.step, 0

    def step(closure=None):
        layout = optimizer.layout
        held = {n for group in optimizer.param_groups for p in group["params"] for n in layout.names_in(p)}
        for number, member in enumerate(optimizer.members):
            generator = torch.Generator().manual_seed(1000 * count + number)
            # Over decades, so that the largest of a block is often on one side of a boundary only.
            whole = torch.randn(member.shape, generator=generator) * 10 ** torch.randn(
                member.shape, generator=generator
            )
            whole = whole * (member.name != silent)
            if isinstance(member.parameter, DTensor):
                parameter = member.parameter
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                continue
            if member.name not in held or member.name not in layout.pieces:
                continue
            piece, grad = layout.pieces[member.name], layout.grad(member.name)
            assert grad is not None
            grad.copy_(whole.view(-1)[piece.start : piece.stop])
        if silent and torch.distributed.get_rank() % 2 and layout.kind.startswith(("FSDP2", "HSDP")):
            next(m for m in optimizer.members if m.name == silent).parameter.grad = None
        return inner(closure)

    optimizer.step = step  # type: ignore[method-assign]
    for count in range(steps):
        run.step([arguments(case, count, micro, torch.distributed.get_rank()) for micro in range(case.accumulation)])
    state = whole_state(optimizer)
    adam = adamw8bit(optimizer)
    assert adam is not None
    cut = sum(adam.cut_counts.values())
    run.close()
    return {**state, "cut": torch.tensor(cut)}


def _compare(alone: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> None:
    assert alone.keys() == there.keys()
    projected = {
        key.split()[0].partition("[")[0] for key in alone if "basis" in key
    }  # one of stacked ones has an index
    for key, value in alone.items():
        if key != "cut" and key.split()[0].partition("[")[0] not in projected:
            assert torch.equal(there[key], value), key


SHAPES = ("small", "thin", "experts")


@pytest.mark.parametrize(
    ("layout", "ranks", "shapes"),
    slow_except(
        [("ddp", 2, "small"), ("zero2", 4, "small"), ("zero3", 4, "thin"), ("fsdp2", 3, "experts")],
        [(*place, shapes) for place in PLACES for shapes in SHAPES],
    ),
)
def test_weights_codes_and_scales_do_not_depend_on_the_ranks(pools, layout, ranks, shapes):
    settings = {**INT8, "shapes": shapes, "layers": 3, "rank": 2, "accumulation": 1}
    alone = pools(1).run(_fed, Case("one", **settings), 4)[0]
    there = pools(ranks).run(_fed, Case(layout, **settings), 4)
    for rank in there:
        _compare(alone, rank)
    assert (there[0]["cut"] > 0) == (layout != "ddp")


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_columns_of_a_parameter_are_as_good_as_rows(pools, ranks):
    settings = {**INT8, "shapes": "columns", "layers": 3, "accumulation": 1}
    alone = pools(1).run(_fed, Case("one", **settings), 4)[0]
    there = pools(ranks).run(_fed, Case("fsdp2", wide_on_columns=True, **settings), 4)
    assert there[0]["cut"] > 0
    for rank in there:
        _compare(alone, rank)


@pytest.mark.parametrize(
    ("layout", "ranks"), slow_except([("fsdp2", 3)], [("fsdp2", 3), ("hsdp", 4), ("zero2", 3), ("ddp", 2)])
)
def test_a_gradient_that_some_ranks_miss_is_zero(pools, layout, ranks):
    settings = {**INT8, "layers": 2, "accumulation": 1}
    name = "layers.1.3.weight"
    alone = pools(1).run(_fed, Case("one", **settings), 4, name)[0]
    for rank in pools(ranks).run(_fed, Case(layout, **settings), 4, name):
        _compare(alone, rank)


@pytest.mark.parametrize(
    ("layout", "ranks"),
    slow_except([("zero1", 2), ("fsdp2", 4)], [("one", 1), ("ddp", 3), ("zero1", 2), ("zero3", 3), ("fsdp2", 4)]),
)
def test_it_is_the_reference_with_rounded_moments(pools, layout, ranks):
    results = pools(ranks).run(run_case, brief(ranks, layout=layout, **INT8), with_free=False)
    assert results[0]["deviation"] < 2e-3
    assert all(r["ranks_equal"] and r["replicas_equal"] and r["model_equal"] for r in results)


@pytest.mark.parametrize("accumulation", slow_except([2], [1, 2]))
@pytest.mark.parametrize(("layout", "ranks"), slow_except([("fsdp2", 2)], [("one", 1), ("fsdp2", 2), ("ddp", 2)]))
def test_layerwise_makes_the_same_steps(pools, layout, ranks, accumulation):
    case = Case(layout, accumulation=accumulation, clip=0.0, layers=3, **INT8)
    (start, apart), (_, layerwise) = (
        pools(ranks).run(_weights, replace(case, layerwise=layerwise))[0] for layerwise in (False, True)
    )
    for name, weights in apart.items():
        assert (layerwise[name] - weights).norm() <= 1e-3 * (weights - start[name]).norm(), name


def _weights(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """At the start and after four steps."""
    run = start(case, build_model(case))
    found = [assemble(run.optimizer, held(run.optimizer))[0]]
    for step in range(4):
        run.step([arguments(case, step, micro, torch.distributed.get_rank()) for micro in range(case.accumulation)])
    found.append(assemble(run.optimizer, held(run.optimizer))[0])
    run.close()
    return found[0], found[1]


SMALL, THIN, EXPERTS = ("small", 2, 4), ("thin", 2, 2), ("experts", 2, 3)
ITEMS = tuple(INT8.items())
HERE = [
    (Move(("one", 1), ("one", 1), settings=ITEMS), SMALL),
    (Move(("ddp", 3), ("ddp", 3), settings=ITEMS), SMALL),
    (Move(("zero1", 2), ("zero1", 2), "bf16", settings=ITEMS), SMALL),
    (Move(("zero2", 3), ("zero2", 3), settings=ITEMS), SMALL),
    (Move(("zero2", 2), ("zero2", 2), settings=(*ITEMS, ("offload", True))), SMALL),
    (Move(("zero3", 3), ("zero3", 3), settings=ITEMS), THIN),
    (Move(("zero3", 2), ("zero3", 2), settings=(*ITEMS, ("offload", True))), SMALL),
    (Move(("fsdp2", 3), ("fsdp2", 3), settings=ITEMS), EXPERTS),
    (Move(("fsdp2", 4), ("fsdp2", 4), settings=ITEMS), THIN),
    (Move(("fsdp2", 2), ("fsdp2", 2), "fp32", "full", settings=ITEMS), SMALL),
    (Move(("fsdp2", 2), ("fsdp2", 2), settings=(*ITEMS, ("shapes", "columns"), ("wide_on_columns", True))), SMALL),
    (Move(("hsdp", 4), ("hsdp", 4), settings=ITEMS), SMALL),
]
ELSEWHERE = [
    (Move(("fsdp2", 3), ("fsdp2", 2), settings=ITEMS), SMALL),
    (Move(("fsdp2", 2), ("fsdp2", 3), "fp32", "full", settings=ITEMS), THIN),
    (Move(("zero2", 4), ("fsdp2", 3), "fp32", "any", settings=ITEMS), THIN),
    (Move(("zero2", 2), ("zero2", 3), "fp32", "any", settings=ITEMS), SMALL),
    (Move(("fsdp2", 3), ("zero3", 2), "fp32", "any", settings=ITEMS), EXPERTS),
    (Move(("zero3", 3), ("one", 1), "fp32", "any", settings=ITEMS), SMALL),
    (Move(("ddp", 3), ("zero1", 2), "fp32", "any", settings=ITEMS), SMALL),
    (Move(("one", 1), ("zero3", 4), "fp32", "any", settings=ITEMS), SMALL),
    (Move(("hsdp", 4), ("ddp", 2), "fp32", "any", settings=ITEMS), SMALL),
    (Move(("zero3", 4), ("fsdp2", 2), "fp32", "any", settings=(*ITEMS, ("wide_on_columns", True))), EXPERTS),
]


ORDINARY_HERE = [HERE[1], HERE[3], HERE[5], HERE[7]]  # one a framework
ORDINARY_ELSEWHERE = [ELSEWHERE[2]]


def _id(value: Any) -> str:
    return "-".join(map(str, (*value.before, *value.after, value.how))) if isinstance(value, Move) else value[0]


@pytest.mark.parametrize(("move", "shapes"), slow_except(ORDINARY_HERE, HERE), ids=_id)
def test_the_same_ranks_go_on_bit_by_bit(all_pools, move, shapes):
    result = try_move(all_pools, move, shapes, steps=(4, 3))
    assert result["state_equal"]
    assert result["deviation"] == 0.0


@pytest.mark.parametrize(("move", "shapes"), slow_except(ORDINARY_ELSEWHERE, ELSEWHERE), ids=_id)
def test_other_ranks_and_layouts_have_the_same_codes_and_scales(all_pools, move, shapes):
    assert try_move(all_pools, move, shapes, steps=(4, 1))["state_equal"]
