"""A rank that dies or hangs, ranks that were promised to be equal and are not: an error that says so, everywhere."""

from __future__ import annotations

import os
import time

import pytest
import torch
from cases import Case, arguments, build_model
from harness import start
from rank_pool import RankError, RankPool

import ds_lowrank

TIMEOUT = 5.0


@pytest.mark.parametrize("how", ["hangs", "dies"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_every_other_rank_gets_an_error_with_the_collectives_name(layout, how):
    pool = RankPool(3, timeout=TIMEOUT, patience=60.0)
    begin = time.monotonic()
    answers = pool.run_to_the_end(_step_without_rank_1, Case(layout=layout, accumulation=1), how)
    assert time.monotonic() - begin < 3 * TIMEOUT + 20  # the ranks' own start of the model included
    for rank in (0, 2):
        text, seconds = answers[rank]
        assert f"failed on rank {rank}" in text
        assert " of " in text.split("failed")[0]  # such as "all-gather of bases joined"
        assert any(name in text for name in ("Gram matrices", "bases", "verdicts", "gradient rows", "weights"))
        assert seconds < TIMEOUT + 3
    assert (how == "dies") == isinstance(answers[1], RankError)


def _step_without_rank_1(case: Case, how: str) -> tuple[str, float]:
    run = start(case, build_model(case))
    rank = torch.distributed.get_rank()
    run.step([arguments(case, 0, 0, rank)])
    inner = run.optimizer.step

    def step(closure=None):
        if rank == 1:
            if how == "dies":
                os._exit(1)
            time.sleep(2 * TIMEOUT)
        return inner(closure)

    run.optimizer.step = step  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        run.step([arguments(case, 1, 0, rank)])
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
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
