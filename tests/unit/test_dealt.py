"""How parameters that are not projected are cut for the ranks of DDP."""

from __future__ import annotations

import random

import pytest
import torch

from ds_lowrank.full_rank import dealt
from ds_lowrank.full_rank.dealt import deal, deal_members, portions_of
from ds_lowrank.states.blocks import BLOCK, count


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_element_is_on_one_rank_and_no_rank_has_a_block_more_than_another(ranks):
    drawn = random.Random(ranks)
    for _ in range(60):
        sizes = [
            drawn.choice([0, 1, 5, 63, 64, 65, 130, 1000, drawn.randrange(5000)]) for _ in range(drawn.randrange(9))
        ]
        numels = {f"p{k}": numel for k, numel in enumerate(sizes)}
        parts = deal(numels, ranks)
        assert len(parts) == ranks
        for name, numel in numels.items():
            pieces = [mine[name] for mine in parts if name in mine]
            assert [p.start for p in pieces] == [0, *(p.stop for p in pieces)][: len(pieces)]
            assert (pieces[-1].stop if pieces else 0) == numel
            assert all(p.start % BLOCK == 0 and p.start < p.stop for p in pieces)
        blocks = [sum(count(p.stop - p.start) for p in mine.values()) for mine in parts]
        assert max(blocks) - min(blocks) <= 1
        # What a rank has is contiguous: of the parameters between its first and its last it has all.
        for mine in parts:
            inside = [name for name in numels if name in mine][1:-1]
            assert all(mine[name].stop - mine[name].start == numels[name] for name in inside)


def test_groups_and_dtypes_are_cut_apart_and_added_ones_change_nothing():
    members = [
        ("a", (10, 64), 0, torch.float32),
        ("b", (640,), 0, torch.bfloat16),
        ("c", (20, 64), 0, torch.float32),
        ("d", (128,), 1, torch.float32),
    ]
    before = deal_members(members, 2)
    assert before[0] == deal({"a": 640, "c": 1280}, 2)[0] | deal({"b": 640}, 2)[0] | deal({"d": 128}, 2)[0]
    after = deal_members([*members, ("e", (999,), 2, torch.float32)], 2)
    for mine, more in zip(before, after):
        assert {name: piece for name, piece in more.items() if name != "e"} == mine


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_portions_are_equal_and_hold_every_element_once(monkeypatch, ranks):
    monkeypatch.setattr(dealt, "PORTION_NUMBERS", 100 * ranks)
    parts = [list(mine.items()) for mine in deal({"a": 130, "b": 700, "c": 63}, ranks)]
    portions = portions_of(parts)
    for rank, theirs in enumerate(parts):
        sent = [one for portion in portions for one in portion[rank]]
        places = [(name, k) for name, part in sent for k in range(part.start, part.stop)]
        assert places == [(name, k) for name, part in theirs for k in range(part.start, part.stop)]
        sizes = [sum(part.stop - part.start for _, part in portion[rank]) for portion in portions]
        assert max(sizes) <= 100
        assert all(size == 100 for size in sizes[: sum(sizes) // 100])
    assert portions_of([[], []]) == []
