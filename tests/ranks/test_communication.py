"""What is sent is what the formulas say, and what is kept is an N-th: one matrix at a time."""

from __future__ import annotations

import pytest
import torch
from communication import REFRESH, STEP, expected_bytes, measure
from galore_fsdp2 import Wiretap, tapped_step
from harness import shard, start
from llama import Matrices, Setting
from storage import state_bytes
from tiers import slow_except

import ds_lowrank
from ds_lowrank.optimizer import STATE_KEY

RANK = 8
SHAPES = {
    "tall": (96, 24),
    "wide": (24, 96),
    "square": (48, 48),
    "tall-cut": (37, 24),  # 2, 3 and 4 parts of equal size end in the middle of a row
    "wide-cut": (24, 37),
}
# An odd number of ranks holds one copy under HSDP, which is FSDP2.
LAYOUTS = [(layout, ranks) for layout in ("ddp", "zero2", "zero3", "fsdp2") for ranks in (2, 3, 4)]


@pytest.mark.parametrize(
    ("layout", "ranks"),
    slow_except(
        [("ddp", 3), ("zero2", 3), ("zero3", 3), ("fsdp2", 3), ("hsdp", 4)], [*LAYOUTS, ("hsdp", 2), ("hsdp", 4)]
    ),
)
def test_every_purpose_sends_what_its_formula_says(pools, layout, ranks):
    """A change that moves more (or less) than the rows, the basis, the Gram and the verdict that it must."""
    for name, shape in SHAPES.items():
        counted = pools(ranks).run(measure, layout, [[shape]], RANK)
        expected = expected_bytes(layout, ranks, [[shape]], RANK)
        for event, purposes in (("step", STEP), ("refresh", REFRESH)):
            sent = {p: sum(c[event].get(p, 0) for c in counted) for p in STEP + REFRESH}
            assert sent == {p: expected[p] if p in purposes else 0 for p in sent}, f"{name}, {event}"


def test_formulas_of_the_issue():
    """The formulas themselves, where they can be said in one line: W is m × n, N ranks, 4 bytes."""
    m, n, ranks, r = 24, 96, 4, RANK
    wide = expected_bytes("fsdp2", ranks, [[(m, n)]], r)
    assert wide["gradient rows"] == wide["updates"] == 4 * ranks * (m * n * (ranks - 1) // ranks**2)
    assert wide["Gram matrices"] == 4 * (ranks - 1) * m * m
    assert wide["bases"] == 4 * (m - m // ranks) * r
    tall = expected_bytes("zero3", ranks, [[(37, 24)]], r)  # 222 elements each: 9.25 rows
    assert tall["gradient rows"] == 4 * (18 + 12 + 6)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("layout", ["zero1", "zero2"])
def test_whole_matrices_send_nothing(pools, layout, ranks):
    model = [list(SHAPES.values())[:3]] * 4
    for counted in pools(ranks).run(measure, layout, model, RANK):
        assert sum(counted["step"].values()) == sum(counted["refresh"].values()) == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_wide_matrices_sharded_by_columns_move_no_rows(pools, ranks):
    """The long-side placement is there to save exactly this."""
    for layout, moves in (("fsdp2", True), ("fsdp2 long side", False)):
        for counted in pools(ranks).run(measure, layout, [[SHAPES["wide"]]], RANK):
            assert [counted["step"].get(p, 0) > 0 for p in ("gradient rows", "updates")] == [moves, moves]


def test_what_is_counted_is_what_runs(pools):
    """A collective that goes past the counter of ``comm``, or one counted otherwise than it is sent."""
    for answer in pools(3).run(_tapped, list(SHAPES.values())):
        assert answer["counted"] == answer["ran"] > 0


def _tapped(shapes: list) -> dict[str, int]:
    model = Matrices([shapes])
    shard(Setting("fsdp2", {}), model)
    options = {"rank": RANK, "update_proj_gap": 2, "stagger": False, "gram_dtype": "float32", "lr": 1e-3}
    optimizer = ds_lowrank.build_optimizer(model, options)
    model(0).backward()
    optimizer.step()
    counted = ran = 0
    for seed in (1, 2):
        tap: Wiretap = tapped_step(model, optimizer, seed)
        counted += optimizer.comm.sent_bytes.total()
        ran += tap.sent.total()
    return {"counted": counted, "ran": ran}


@pytest.mark.parametrize("layout", slow_except(["zero2", "fsdp2"], ["ddp", "zero2", "zero3", "fsdp2"]))
def test_a_rank_keeps_an_nth_of_the_state(pools, layout):
    """Bases and moments that lie on more ranks than one, or unevenly on them."""
    model = [list(SHAPES.values())[:3]] * 4
    (alone,) = pools(1).run(_kept, layout, model)
    for ranks in (2, 4):
        for kept in pools(ranks).run(_kept, layout, model):
            assert kept["moments and bases"] <= 1.05 * alone["moments and bases"] / ranks
        # Without a basis to share, every rank that computes keeps all of it: then the bound above does not hold.
        whole = pools(ranks).run(_kept, layout, model, shard_projection=False)
        repeated = any(w["moments and bases"] > 1.05 * alone["moments and bases"] / ranks for w in whole)
        assert repeated == (layout != "zero2")


def _kept(layout: str, model: list, shard_projection: bool = True) -> dict[str, int]:
    options = {"rank": RANK, "lr": 1e-3, "shard_projection": shard_projection}
    run = start(Setting(layout, options), Matrices(model))
    run.step([{"seed": torch.distributed.get_rank()}])
    states = run.optimizer.state[STATE_KEY]  # type: ignore[index]
    kept = {n: {k: s[k] for k in ("exp_avg", "exp_avg_sq", "basis") if k in s} for n, s in states.items()}
    run.close()
    return {"moments and bases": state_bytes(kept)}
