"""A rank that dies or hangs, ranks that were promised to be equal and are not: an error that says so, everywhere."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import pytest
import torch
from cases import Case, arguments, build_model
from harness import start, whole
from rank_pool import RankError, RankPool

import ds_lowrank

TIMEOUT = 10.0  # less than that a rank may fall behind on a machine that others use


@pytest.mark.parametrize("how", ["hangs", "dies"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_every_other_rank_gets_an_error_with_the_collectives_name(tmp_path, layout, how):
    pool = RankPool(3, timeout=TIMEOUT, patience=180.0)
    begin = time.monotonic()
    answers = pool.run_to_the_end(_step_without_rank_1, Case(layout=layout, accumulation=1), how, tmp_path)
    assert time.monotonic() - begin < 3 * TIMEOUT + 20  # the ranks' own start of the model included
    for rank in (0, 2):
        text, seconds = answers[rank]
        assert f"failed on rank {rank}" in text
        assert " of " in text.split("failed")[0]  # such as "all-gather of bases joined"
        assert any(name in text for name in ("Gram matrices", "bases", "verdicts", "gradient rows", "weights"))
        assert seconds < TIMEOUT + 3
    assert (how == "dies") == isinstance(answers[1], RankError)


def _step_without_rank_1(case: Case, how: str, folder: Path) -> tuple[str, float]:
    run = start(case, build_model(case))
    rank = torch.distributed.get_rank()
    run.step([arguments(case, 0, 0, rank)])
    inner = run.optimizer.step

    def step(closure=None):
        if rank == 1:
            if how == "dies":
                os._exit(1)
            while len(list(folder.iterdir())) < 2 and time.monotonic() - begin < 60:
                time.sleep(0.1)  # until the others have given up
        return inner(closure)

    run.optimizer.step = step  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        run.step([arguments(case, 1, 0, rank)])
    except RuntimeError as error:
        seconds = time.monotonic() - begin
        (folder / str(rank)).touch()
        return str(error), seconds
    return "no error", 0.0


def test_weights_that_differ_are_refused_on_every_rank(pools):
    for text in pools(3).run(_unequal, "weights"):
        assert "the weights of layers.0.0.weight differ between rank 0 and rank 2" in text


def test_gradients_that_nobody_averages_are_refused_on_every_rank(pools):
    for text in pools(3).run(_unequal, "gradients"):
        assert "the gradients of layers.0.0.weight differ between rank 0 and rank 1" in text
        assert "DistributedDataParallel" in text


def _unequal(what: str) -> str:
    case = Case(layout="ddp")
    model = build_model(case)
    rank = torch.distributed.get_rank()
    if what == "weights" and rank == 2:
        model.layers[0].get_parameter("0.weight").data += 1e-6
    optimizer = ds_lowrank.build_optimizer(model, case.options)
    try:
        model(seed=rank).backward()  # no DistributedDataParallel
        optimizer.step()
    except ds_lowrank.LayoutError as error:
        return str(error)
    return "no error"


def test_copies_of_the_model_that_differ_are_refused_on_every_rank(pools):
    """fully_shard broadcasts nothing over the copies of HSDP."""
    for text in pools(4).run(_unequal_copies):
        assert "the weights of layers.0.0.weight differ between rank 0 and rank 2" in text


def _unequal_copies() -> str:
    case = Case(layout="hsdp")
    model = build_model(case)
    if torch.distributed.get_rank() >= 2:
        model.layers[0].get_parameter("0.weight").data += 1e-6
    try:
        start(case, model).optimizer.ensure_state()
    except ds_lowrank.LayoutError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ("rank 0's", "it is another rank's state"),
        ("older on rank 1", "of layers.0.0.weight it has made 1 steps, rank 0 3"),
        ("incomplete on rank 1", "of layers.0.0.weight it has made 0 steps, rank 0 3"),
    ],
)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_state_that_is_not_this_ranks_is_refused_on_every_rank(pools, layout, trouble, text):
    for error in pools(2).run(_load_wrong, Case(layout=layout, shapes="even", accumulation=1), trouble):
        assert text in error


def _load_wrong(case: Case, trouble: str) -> str:
    rank = torch.distributed.get_rank()
    run = start(case, build_model(case))
    states = []
    for step in range(3):
        run.step([arguments(case, step, 0, rank)])
        # As DeepSpeed saves it: every rank its own rows. Here entries are by parameter, and whole.
        states.append(copy.deepcopy(torch.optim.Optimizer.state_dict(run.optimizer)))
    state = states[-1]
    if trouble == "rank 0's":
        state = run.optimizer.comm.gather_objects(state["state"]["lowrank"])[0]
        state = {**states[-1], "state": {**states[-1]["state"], "lowrank": state}}
    elif rank == 1 and trouble.startswith("older"):
        state = states[0]
    elif rank == 1:
        del state["state"]["lowrank"]["layers.0.0.weight"]
    run.optimizer.load_state_dict(state)
    try:
        run.step([arguments(case, 3, 0, rank)])
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_nan_gradient_at_the_first_step_changes_no_matrix(pools, layout):
    assert all(pools(2).run(_nan_first, Case(layout=layout, accumulation=1, clip=0.0)))


def _nan_first(case: Case) -> bool:
    run = start(case, build_model(case))
    before = [whole(p).clone() for p in run.model.parameters() if p.ndim == 2]
    inner = run.optimizer.step

    def step(closure=None):
        for p in run.model.parameters():
            p.grad.mul_(float("nan"))
        return inner(closure)

    run.optimizer.step = step  # type: ignore[method-assign]
    run.step([arguments(case, 0, 0, torch.distributed.get_rank())])
    return all(map(torch.equal, before, [whole(p) for p in run.model.parameters() if p.ndim == 2]))


def test_matrices_of_several_dtypes_step_in_the_same_order_on_all_ranks(pools):
    """Rank 0 alone holds an fp64 expert; an fp32 and an fp64 matrix are shared: nobody may wait for another's dtype."""
    assert all(pools(2).run(_mixed_dtypes))


def _mixed_dtypes() -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Module()
    for name, shape, dtype in (
        ("a", (1, 6, 4), torch.float64),
        ("b", (6, 4), torch.float32),
        ("c", (6, 4), torch.float64),
    ):
        part = torch.nn.Module()
        part.register_parameter("experts", torch.nn.Parameter(torch.randn(shape, dtype=dtype)))
        model.add_module(name, fully_shard(part, mesh=init_device_mesh("cpu", (2,))))
    named = list(model.named_parameters())
    groups = [
        {"params": [named[0]], "rank": 2, "stacked": True},
        {"params": named[1:], "rank": 2},
    ]
    optimizer = ds_lowrank.LowRankAdamW(groups, lr=0.1, update_proj_gap=2)
    before = [whole(p).clone() for _, p in named]
    for _ in range(4):
        for _, p in named:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return not any(map(torch.equal, before, [whole(p) for _, p in named]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_has_no_gradient_any_more_stands_still(pools, ranks):
    """The same on one process and under DDP: a parameter that was frozen later, or left out of the graph."""
    assert all(pools(ranks).run(_stands_still))


def _stands_still() -> bool:
    case = Case(layout="ddp", accumulation=1, clip=0.0)
    run = start(case, build_model(case))
    rank = torch.distributed.get_rank()
    run.step([arguments(case, 0, 0, rank)])
    frozen, left_out = (run.model.get_parameter(f"layers.{k}.0.weight") for k in (1, 2))
    before = [frozen.detach().clone(), left_out.detach().clone()]
    inner = run.optimizer.step

    def step(closure=None):
        left_out.grad = None
        frozen.requires_grad_(False)
        inner(closure)
        frozen.requires_grad_(True)  # DistributedDataParallel waits for its gradient

    run.optimizer.step = step  # type: ignore[method-assign]
    for index in range(1, 4):
        run.step([arguments(case, index, 0, rank)])
    return torch.equal(before[0], frozen) and torch.equal(before[1], left_out)
