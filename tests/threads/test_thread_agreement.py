"""What one rank has otherwise than the others is refused on every rank before anything moves; what stands still."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from thread_cases import Case, Run, current, start_of
from thread_layouts import CutLayout, WholeLayout, ranks_of
from thread_ranks import run_ranks, this_rank
from torch import nn

import ds_lowrank
from ds_lowrank import LayoutError, LowRankAdamW


def told_by_all(ranks: int, function: Any, kind: type[Exception] = LayoutError) -> str:
    """The text of the error that every rank raises."""

    def rank() -> str:
        with pytest.raises(kind) as error:
            function()
        return str(error.value)

    (text,) = set(run_ranks(ranks, rank))
    return text


@pytest.mark.parametrize(("layout", "ranks", "other"), [("ddp", 3, 2), ("hsdp", 4, 1)])
def test_weights_that_differ(layout, ranks, other):
    """Nobody broadcasts the weights of a model that a loop of one's own has built on every rank."""
    case = Case(layout, ranks)

    def start() -> None:
        weights = dict(start_of(case))
        if this_rank() in (other, other + 2):
            weights["layer0_0"] = weights["layer0_0"] + 1e-6
        Run(case, weights)

    assert f"the weights of layer0_0 differ between rank 0 and rank {other}" in told_by_all(ranks, start)


def test_gradients_that_nobody_averages():
    def step() -> None:
        run = Run(Case("ddp", 3))
        run.layout.fill_gradients({n: torch.full(s, 1.0 + (this_rank() == 2)) for n, s in run.case.matrices.items()})
        run.step_as_filled()

    text = told_by_all(3, step)
    assert "the gradients of layer0_0 differ between rank 0 and rank 2" in text
    assert "DistributedDataParallel" in text


def test_a_sparse_gradient_on_one_rank():
    def step() -> None:
        run = Run(Case("ddp", 2))
        run.layout.fill_gradients({n: torch.ones(s) for n, s in run.case.rest.items()})
        if this_rank():
            run.model.rest2.grad = torch.ones(9, 8).to_sparse()
        run.step_as_filled()

    text = told_by_all(2, step, RuntimeError)
    assert "rest2 (9, 8) has a sparse gradient: Adam does not support sparse gradients" in text


@pytest.mark.parametrize(
    "option", [{"r": 3}, {"gram_dtype": "float32"}, {"moments": "project"}, {"seed": 4}, {"gap": 5}, {"wave_size": 3}]
)
@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3", "fsdp2"])
def test_options_that_differ(layout, option):
    case = Case(layout, 2, layers=2)
    text = told_by_all(2, lambda: Run(replace(case, **(option if this_rank() else {}))))
    assert "ranks [1] project other matrices, or with other options, than rank 0" in text


@pytest.mark.parametrize("layout", ["ddp", "zero3", "fsdp2"])
def test_weights_that_are_not_bf16_cannot_be_rounded_stochastically(layout):
    case = Case(layout, 2, stochastic_rounding=True)
    assert "stochastic_rounding is for bf16" in told_by_all(2, lambda: Run(case))


def test_a_flat_buffer_that_does_not_hold_the_weights():
    def start() -> None:
        case = Case("zero2", 3)
        run = Run(case)
        if this_rank() == 1:
            run.layout.weight(next(n for n in run.layout.pieces if n in case.matrices)).add_(1.0)
        run.optimizer._layout = None
        with current(run.layout):
            run.optimizer.ensure_state()

    assert "rank 1: layer" in told_by_all(3, start)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_has_no_gradient_any_more_stands_still(ranks):
    """The same on one process and under DDP: a parameter that was frozen later, or left out of the graph."""

    def rank() -> bool:
        run = Run(Case("ddp", ranks))
        run.step()
        before = [run.model.layer0_0.detach().clone(), run.model.rest1.detach().clone()]
        for _ in range(3):
            gradients = {n: run._gradient(n) for n in run.layout._members}
            run.layout.fill_gradients({**gradients, "layer0_0": None, "rest1": None})
            run.step_as_filled()
        return torch.equal(before[0], run.model.layer0_0) and torch.equal(before[1], run.model.rest1)

    assert all(run_ranks(ranks, rank))


def test_matrices_of_several_dtypes_step_in_the_same_order_on_all_ranks():
    """Rank 0 alone holds an fp64 expert; an fp32 and an fp64 matrix are shared: nobody may wait for another's dtype."""

    def rank() -> bool:
        shapes = {"a": ((1, 6, 4), torch.float64), "b": ((6, 4), torch.float32), "c": ((6, 4), torch.float64)}
        drawn = torch.Generator().manual_seed(0)
        model = nn.ParameterDict({n: torch.randn(s, dtype=d, generator=drawn) for n, (s, d) in shapes.items()})
        named = list(model.items())
        groups = [{"params": [named[0]], "rank": 2, "stacked": True}, {"params": named[1:], "rank": 2}]
        optimizer = LowRankAdamW(groups, lr=0.1, update_proj_gap=2)
        layout = CutLayout("fsdp2", optimizer.members, optimizer.param_groups, ranks_of("fsdp2", 2))
        before = {n: layout.weight(n).clone() for n in layout.pieces}
        for _ in range(4):
            layout.fill_gradients({n: torch.ones(s, dtype=d) for n, (s, d) in shapes.items()})
            with current(layout):
                optimizer.step()
        return not any(torch.equal(w, layout.weight(n)) for n, w in before.items())

    assert all(run_ranks(2, rank))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}])
def test_weights_may_lie_in_any_order_on_every_replica(options):
    def rank(other: bool) -> list[torch.Tensor]:
        drawn = torch.Generator().manual_seed(0)
        kernels = [torch.randn(8, 5, 3, 3, generator=drawn) for _ in range(2)]
        tensors = [t.to(memory_format=torch.channels_last) if other else t for t in kernels]
        matrix = torch.randn(12, 7, generator=drawn)
        params = [nn.Parameter(t) for t in (*tensors, matrix.mT.contiguous().mT if other else matrix)]
        groups: list[dict[str, Any]] = [{"params": [("full", params[0])]}]
        groups.append({"params": [("kernel", params[1]), ("matrix", params[2])], "rank": 3, "stacked": [False, None]})
        optimizer = LowRankAdamW(groups, lr=0.1, update_proj_gap=2, weight_decay=0.1, **options)
        with current(WholeLayout(optimizer.members, ranks_of("ddp", 2))):
            for _ in range(4):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=drawn)
                optimizer.step()
        assert params[0].is_contiguous() != other
        return [p.detach().contiguous() for p in params]

    plain, moved = run_ranks(2, rank, False), run_ranks(2, rank, True)
    for row in (plain[1], *moved):
        assert all(map(torch.equal, plain[0], row))


def test_metrics_are_the_same_on_every_rank():
    def rank() -> dict[str, float]:
        run = Run(Case("zero2", 3, gap=2, stagger=False))
        for _ in range(3):
            run.step()
        found = ds_lowrank.metrics(run.optimizer)
        assert ds_lowrank.metrics(run.optimizer) == {}
        return found

    answers = [{k: v for k, v in a.items() if k != "lowrank/refresh_seconds"} for a in run_ranks(3, rank)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["lowrank/refreshes"] == 15 * 2  # at steps 0 and 2
    assert 0 < answers[0]["lowrank/overlap"] <= 1
    assert 0 < answers[0]["lowrank/captured_energy"] <= 1


def test_gradients_of_what_is_set_free_are_compared_again():
    """DistributedDataParallel averages what was trainable when it wrapped: replicas would drift apart unseen."""

    def steps() -> None:
        run = Run(Case("ddp", 2, frozen=(0, 1)))
        run.step()
        run.step()
        run.layout.fill_gradients({n: torch.full(s, 1.0) for n, s in run.case.matrices.items()})
        run.model.layer1_0.grad.add_(this_rank())
        for parameter in run.model.parameters():
            parameter.requires_grad_(True)
        run.step_as_filled()

    text = told_by_all(2, steps)
    assert "the gradients of layer1_0 differ" in text
    assert "anew where a parameter was frozen when it was wrapped" in text


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2)])
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_a_copy_goes_the_same_way(layout, ranks, state_dtype):
    def rank() -> bool:
        run = Run(Case(layout, ranks, state_dtype=state_dtype, frozen=(1, 4)))
        for _ in range(3):
            run.step()
        other = copy.copy(run)
        other.model, other.optimizer = copy.deepcopy((run.model, run.optimizer))
        other.layout = run.layout.renewed(other.optimizer.members, other.optimizer.param_groups)
        for one in (run, other):
            for _ in range(4):
                one.step()
        pairs = zip(run.model.parameters(), other.model.parameters())
        return all(a is not b and torch.equal(a, b) for a, b in pairs)

    assert all(run_ranks(ranks, rank))


def test_the_first_step_says_once_and_on_rank_0_that_saves_need_a_call(caplog):
    def rank(knows: bool) -> None:
        run = Run(Case("ddp", 2))
        if knows:
            run.optimizer.consolidate_state_dict()
        run.step()
        run.step()

    run_ranks(2, rank, True)
    assert "consolidate_state_dict" not in caplog.text
    run_ranks(2, rank, False)
    assert caplog.text.count("call optimizer.consolidate_state_dict() on all ranks") == 1
