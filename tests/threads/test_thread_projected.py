"""Gradients that are projected before they are stored or sent, from every rank its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from thread_cases import METHODS, Case, Run, current, run_case
from thread_ranks import run_ranks
from tiers import slow_except

from ds_lowrank import LowRankAdamW

PLACES = [("one", 1), *((layout, ranks) for layout in ("ddp", "fsdp2") for ranks in (2, 3, 4)), ("hsdp", 4)]
PROJECTED = Case(r=3, gradients="projected", micro=2)
BOUNDS = {"fp64": 1e-11, "fp32": 5e-5}

SHAPES = ("small", "thin", "experts")
EVERY = [
    (*place, micro, clip, shapes, dtype)
    for place in PLACES
    for micro in (1, 3)
    for clip in (0.0, 1.0)
    for shapes in SHAPES
    for dtype in BOUNDS
]
FAST = [
    (*place, 3, 1.0, shapes, "fp64")
    for place in (("one", 1), ("ddp", 3), ("fsdp2", 4), ("hsdp", 4))
    for shapes in SHAPES
]
FAST += [(*place, 1, 0.0, "small", "fp32") for place in PLACES]


@pytest.mark.parametrize(("layout", "ranks", "micro", "clip", "shapes", "dtype"), slow_except(FAST, EVERY))
def test_the_trajectory_is_the_references(layout, ranks, micro, clip, shapes, dtype):
    result = run_case(
        replace(PROJECTED, layout=layout, ranks=ranks, dtype=dtype, shapes=shapes, micro=micro, clip=clip)
    )
    assert result.counters == []
    assert result.deviation < BOUNDS[dtype]
    assert result.replicas_equal


VARIANTS: dict[str, dict[str, Any]] = {
    "whole-bases": {"shard_projection": False},
    "project": {"moments": "project"},
    "dominant": {"selection": "dominant"},
    "uniform": {"selection": "uniform"},
    "random": {"selection": "random"},
    "together": {"stagger": False},
    "one-by-one": {"wave_size": 1},
    "longer-side": {"proj_type": "reverse_std"},
    "left": {"proj_type": "left"},
    "groups": {"groups": 3},
    "silent": {"silent": 2},
    "dropped": {"dropped": 1},
    "frozen": {"frozen": (2, 3)},
    "added": {"added": 2},
    "grams": METHODS["grams"],
    "gaussian": {"selection": "gaussian"},
}


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 3), ("fsdp2", 3), ("hsdp", 4)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_else_there_is_to_choose(layout, ranks, variant):
    result = run_case(replace(PROJECTED, layout=layout, ranks=ranks, dtype="fp64", **VARIANTS[variant]))
    assert result.counters == []
    assert result.deviation < 1e-9
    assert result.replicas_equal


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 4), ("hsdp", 4)])
@pytest.mark.parametrize("directions", [1, 2])
def test_gradients_of_few_directions(layout, ranks, directions):
    """Rounding in directions that are none of the gradient's makes no step: also on ranks that compute no row."""
    for shapes in SHAPES:
        result = run_case(replace(PROJECTED, layout=layout, ranks=ranks, shapes=shapes, directions=directions))
        assert result.counters == []
        assert result.deviation < 1e-4


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 3)])
def test_with_int8_states_it_is_the_references(layout, ranks):
    result = run_case(replace(PROJECTED, layout=layout, ranks=ranks, state_dtype="int8", basis_dtype="int8", clip=1.0))
    assert result.counters == []
    assert result.deviation < 2e-3


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_with_bf16_gradients_it_is_the_reference_that_rounds_where_we_send(layout, ranks):
    """To one unit in the last place of bf16: where the reference's last bit tips a number over, one entry differs."""
    result = run_case(replace(PROJECTED, layout=layout, ranks=ranks, dtype="bf16"))
    assert result.counters == []
    assert result.replicas_equal
    assert result.deviation < 1e-4


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_bf16_weights_are_as_far_off_as_with_whole_gradients(layout, ranks):
    """What they lose is by their own rounding; replicas lose the same."""
    case = replace(PROJECTED, layout=layout, ranks=ranks, dtype="bf16", master=False, stochastic_rounding=True)
    result = run_case(case)
    full = run_case(replace(case, gradients="full", micro=0))
    assert result.counters == []
    assert result.replicas_equal
    assert result.deviation < 1.3 * full.deviation


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 3), ("fsdp2", 2), ("hsdp", 4)])
def test_sums_in_bf16_lose_little(layout, ranks):
    case = replace(PROJECTED, layout=layout, ranks=ranks, micro=3)
    narrow = run_case(replace(case, accumulator_dtype="bf16"))
    assert narrow.replicas_equal
    assert 1e-4 < narrow.deviation < 0.15
    assert narrow.counters == run_case(case).counters == []


# -- what is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)])
@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("selection", ["importance", "random"])
def test_no_more_whole_gradients_are_alive_than_are_refreshed_together(layout, ranks, stagger, selection):
    case = replace(PROJECTED, layout=layout, ranks=ranks, stagger=stagger, wave_size=2, micro=2, selection=selection)

    def rank() -> tuple[int, int]:
        run = Run(case)
        projected: Any = run.optimizer._projected
        most = 0
        inner = projected._take

        def take(name: str, gradient: torch.Tensor) -> None:
            nonlocal most
            assert run.layout.leaf(name).grad is None
            inner(name, gradient)
            most = max(most, len(projected._held))

        projected._take = take
        for _ in range(4):
            run.step()
        return most, len(projected._held)

    # Where bases lie in slices, gradients of what is not due wait for theirs, as many as are refreshed together.
    waiting = 2 if ranks > 1 else 0
    expected = waiting + (2 if selection == "importance" else 0)
    for most, left in run_ranks(ranks, rank):
        assert most <= expected
        assert left == 0


@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("ddp", 2), ("fsdp2", 3)])
@pytest.mark.parametrize("moments", ["keep", "project"])
def test_dropped_gradients_leave_no_trace(layout, ranks, moments):
    """zero_grad() in the place of step(): bases that were found, in a step in which all is due too, are not kept."""
    case = replace(PROJECTED, layout=layout, ranks=ranks, gap=2, steps=5, moments=moments)

    def rank(drops: bool) -> Any:
        run = Run(case)
        for step in range(case.steps):
            if drops:
                run.done = step + 7  # other gradients
                run.backward_of_own({n: run._gradient(n) for n in run.layout._members}, passes=1 + step % 2)
                with current(run.layout):
                    run.optimizer.zero_grad()
                run.done = step
            run.step()
        return {n: w for n, (_, w) in run.pieces().items()}, run.counters()

    plain, dropping = run_ranks(ranks, rank, False), run_ranks(ranks, rank, True)
    for (weights, counters), (others, other_counters) in zip(plain, dropping):
        assert counters == other_counters
        assert all(torch.equal(w, others[n]) for n, w in weights.items())


def small(**options: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter, LowRankAdamW]:
    torch.manual_seed(0)
    weight, other = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(5))
    groups = [{"params": [("w", weight)], "rank": 2}, {"params": [("b", other)]}]
    optimizer = LowRankAdamW(groups, lr=0.1, gradients="projected", **options)
    optimizer.ensure_state()
    return weight, other, optimizer


def test_a_save_before_the_step_is_refused():
    weight, _, optimizer = small()
    weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="between a backward pass and step"):
        optimizer.state_dict()
    optimizer.zero_grad()
    optimizer.state_dict()


@pytest.mark.parametrize("knows", [True, False])
def test_a_clip_that_does_not_know_of_projections_is_refused(knows):
    weight, other, optimizer = small()
    (weight.square().sum() + other.square().sum()).backward()
    if knows:
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        return
    torch.nn.utils.clip_grad_norm_([weight, other], 0.1)
    with pytest.raises(RuntimeError, match=r"gradient of b was changed.*optimizer\.clip_grad_norm_"):
        optimizer.step()


def test_the_norm_is_of_projections_and_of_the_rest():
    weight, other, optimizer = small()
    (weight.square().sum() + other.square().sum()).backward()
    assert weight.grad is None
    gradient = 2 * weight.detach()
    norm = optimizer.clip_grad_norm_(1e9)
    basis = optimizer._projected._beside["w"]["basis"]
    expected = ((gradient @ basis).square().sum() + (2 * other.detach()).square().sum()).sqrt()
    torch.testing.assert_close(norm, expected)


def test_a_backward_pass_after_a_clip_is_refused():
    weight, _, optimizer = small()
    weight.square().sum().backward()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="after the gradients were clipped"):
        weight.square().sum().backward()


def test_reentrant_checkpointing_is_refused():
    weight, _, optimizer = small()
    x = torch.randn(3, 4, requires_grad=True)
    loss = torch.utils.checkpoint.checkpoint(lambda v: (v @ weight.T).square().sum(), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()
    optimizer.zero_grad()
    loss = torch.utils.checkpoint.checkpoint(lambda v: (v @ weight.T).square().sum(), x, use_reentrant=False)
    loss.backward()
    optimizer.step()
    assert optimizer.state["lowrank"]["w"]["step"] == 1


def test_what_has_no_gradient_stands_still_on_one_process():
    weight, other, optimizer = small()
    before = weight.detach().clone()
    other.square().sum().backward()
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state["lowrank"]["w"]["step"] == 0


def test_a_closure():
    weight, other, optimizer = small()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum() + other.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.state["lowrank"]["w"]["step"] == 3


@pytest.mark.parametrize(
    "options",
    [{"layerwise": True}, {"rule": "fira"}, {"rule": "apollo", "selection": "gaussian"}, {"selection": "online_pca"}],
)
def test_what_does_not_go_with_it_is_refused(options):
    with pytest.raises(ValueError, match="projected"):
        small(**options)


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("fsdp2", 3), ("hsdp", 4)])
def test_what_was_never_sent_in_a_backward_pass_is_sent_in_the_step(layout, ranks):
    """A loop that averages what is not projected by itself, say: in the end nothing differs."""
    case = replace(PROJECTED, layout=layout, ranks=ranks, micro=1, steps=4)

    def rank(never: bool) -> Any:
        run = Run(case)
        for _ in range(case.steps):
            run.never_syncs = never
            run.step()
        return {n: w for n, (_, w) in run.pieces().items()}

    for weights, others in zip(run_ranks(ranks, rank, False), run_ranks(ranks, rank, True)):
        assert all(torch.equal(w, others[n]) for n, w in weights.items())
