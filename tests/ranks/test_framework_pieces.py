"""The contract with each framework: what its ranks really hold is what layouts/cuts.py and the planner say without it.

Tests of the arithmetic cut parameters by these functions alone, so this is what ties them to the frameworks. Every
element of the model has its own number here: whatever a rank holds, its values tell where it comes from.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Case, build_model
from harness import ZERO_STAGE, deepspeed_config, start

import ds_lowrank
from ds_lowrank.config import LowRankConfig
from ds_lowrank.layouts.base import Piece
from ds_lowrank.layouts.cuts import chunk_piece, flat_pieces, slice_piece
from ds_lowrank.planner import Setup, from_deepspeed, read_model
from ds_lowrank.planner.arrangement import arrange

PLACES = [(layout, ranks) for layout in ("ddp", *ZERO_STAGE, "fsdp2") for ranks in (2, 3, 4)] + [("hsdp", 4)]


@pytest.mark.parametrize("shapes", ["small", "thin", "experts"])
@pytest.mark.parametrize(("layout", "ranks"), PLACES)
def test_ranks_hold_what_the_functions_say(pools, layout, ranks, shapes):
    """Boundaries mid-row, ranks that hold nothing of a parameter, stacked experts."""
    case = Case(layout=layout, shapes=shapes, rank=2, layers=3, accumulation=1)
    answers = pools(ranks).run(_held, case)
    _compare(case, answers)
    if layout != "hsdp":  # which is not planned
        model = read_model(build_model(case))
        setup = Setup(layout, ranks, dtype="fp32", communication_dtype="fp32")
        if layout in ZERO_STAGE:
            setup, _ = from_deepspeed(deepspeed_config(case), ranks, 0, state_dtype=case.state_dtype)
        arrangement = arrange(model, LowRankConfig.from_dict(case.options), setup)
        for rank, answer in enumerate(answers):
            assert arrangement.pieces[rank] == answer["pieces"]
            assert repr(arrangement.plans) == answer["plans"]


@pytest.mark.parametrize(("layout", "ranks"), [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)])
def test_so_do_ranks_that_hold_columns(pools, layout, ranks):
    case = Case(layout=layout, shapes="columns", rank=2, layers=2, accumulation=1, wide_on_columns=True)
    answers = pools(ranks).run(_held, case)
    _compare(case, answers)
    assert any(piece.dim for piece in answers[0]["pieces"].values())


def _compare(case: Case, answers: list[dict[str, Any]]) -> None:
    model = dict(_numbered(case).named_parameters())
    for rank, answer in enumerate(answers):
        expected = _expected(case, answer["groups"], model, rank, len(answers))
        assert answer["pieces"] == expected
        for name, piece in expected.items():
            whole = model[name].detach()
            part = whole.view(-1) if piece.dim is None else whole.movedim(piece.dim, 0)
            part = part[piece.start : piece.stop]
            part = part if piece.dim is None else part.movedim(0, piece.dim).reshape(-1)
            assert torch.equal(answer["weights"][name], part), (rank, name)


def _expected(case: Case, groups: list[list[str]], model: dict[str, Any], rank: int, ranks: int) -> dict[str, Piece]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.items()}
    if case.layout in ("zero1", "zero2"):
        cut = [flat_pieces({name: shapes[name] for name in group}, ranks)[rank] for group in groups]
        return {name: piece for pieces in cut for name, piece in pieces.items()}
    shards = ranks // 2 if case.layout == "hsdp" else ranks  # two copies of the model, one after the other
    place = ds_lowrank.long_side_placement(shards, min_numel=0) if case.wide_on_columns else lambda parameter: None
    found = {}
    for name, shape in shapes.items():
        if case.layout == "zero3":
            piece = slice_piece(math.prod(shape), -(-math.prod(shape) // ranks), rank)
        elif case.layout == "ddp":
            piece = Piece(0, math.prod(shape))
        else:
            placement = place(model[name])
            piece = chunk_piece(shape, placement.dim if placement else 0, shards, rank % shards)
        if piece.start < piece.stop:
            found[name] = piece
    return found


def _numbered(case: Case) -> torch.nn.Module:
    model, first = build_model(case), 1
    for parameter in model.parameters():
        numbers = torch.arange(first, first + parameter.numel(), dtype=torch.float32)
        parameter.data.copy_(numbers.view(parameter.shape))
        first += parameter.numel()
    assert first < 1 << 24, "fp32 has no more whole numbers"
    return model


def _held(case: Case) -> dict[str, Any]:
    run = start(case, _numbered(case))
    optimizer = run.optimizer
    optimizer.ensure_state()
    layout = optimizer.layout
    groups: list[list[str]] = [[] for _ in optimizer.param_groups]
    for member in optimizer.members:
        groups[member.group].append(member.name)
    answer = {
        "pieces": dict(layout.pieces),
        "weights": {name: layout.weight(name).detach().clone() for name in layout.pieces},
        "groups": groups,
        "plans": repr(optimizer.plans),
    }
    run.close()
    return answer
