"""Geometry of pieces, boxes and shares, against brute force."""

import itertools
import random

import pytest
import torch

from ds_lowrank.layouts import LayoutError, Piece
from ds_lowrank.plan.geometry import matrix_shape, part_of
from ds_lowrank.plan.matrices import plan_shares
from ds_lowrank.subspace.schedule import assign_owners


def cuts(numel: int, ranks: int, rng: random.Random) -> list[Piece | None]:
    """A random division of a parameter over ranks, some of which hold nothing."""
    bounds = sorted([0, *(rng.randint(0, numel) for _ in range(ranks - 1)), numel])
    return [Piece(a, b) if a < b else None for a, b in itertools.pairwise(bounds)]


def held_by(piece: Piece, whole: torch.Tensor) -> torch.Tensor:
    """The 1-D memory of a piece."""
    if piece.dim is None:
        return whole.flatten()[piece.start : piece.stop]
    return whole.narrow(piece.dim, piece.start, piece.stop - piece.start).contiguous().flatten()


def check_parts(whole: torch.Tensor, pieces: list[Piece | None], stacked: bool) -> None:
    """The parts of all pieces cover every matrix once, and their views show its elements."""
    shape = tuple(whole.shape)
    m, n = matrix_shape(shape, stacked)
    for index in range(shape[0]) if stacked else [None]:
        matrix = (whole if index is None else whole[index]).reshape(m, n)
        count = torch.zeros(m, n, dtype=torch.int)
        for piece in pieces:
            part = part_of(piece, shape, index, "w")
            if part is None:
                continue
            assert len(part.boxes) <= 3
            for box in part.boxes:
                window = (slice(box.top, box.bottom), slice(box.left, box.right))
                assert torch.equal(part.view(held_by(piece, whole), box), matrix[window])
                count[window] += 1
        assert (count == 1).all()


@pytest.mark.parametrize("seed", range(40))
def test_runs_of_a_matrix_of_stacked_matrices_and_of_a_kernel(seed):
    rng = random.Random(seed)
    for dimensions, stacked in ((2, False), (3, True), (4, False), (4, True)):
        shape = [rng.randint(1, 5) for _ in range(dimensions)]
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        check_parts(whole, cuts(whole.numel(), rng.randint(1, 5), rng), stacked)


@pytest.mark.parametrize(
    ("shape", "dim", "stacked"),
    [((3, 8), 1, False), ((4, 6, 5), 1, True), ((4, 5, 6), 2, True), ((4, 6, 3, 3), 1, False), ((2, 4, 6, 3), 2, True)],
)
def test_slices_of_a_dimension(shape, dim, stacked):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for ranks in (1, 2, 3):
        chunk = -(-shape[dim] // ranks)
        pieces = [Piece(min(k * chunk, shape[dim]), min((k + 1) * chunk, shape[dim]), dim) for k in range(ranks)]
        check_parts(whole, pieces, stacked)


def test_a_slice_of_a_folded_dimension_is_refused_by_name():
    with pytest.raises(LayoutError, match=r"conv\.weight \(4, 6, 3, 3\) is sharded along dimension 2"):
        part_of(Piece(0, 1, dim=2), (4, 6, 3, 3), None, "conv.weight")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_computed_once_and_only_cut_rows_move(side, seed):
    rng = random.Random(seed)
    m, n, ranks = rng.randint(1, 7), rng.randint(1, 7), rng.randint(1, 5)
    pieces = cuts(m * n, ranks, rng)
    shares = plan_shares((m, n), side, [part_of(p, (m, n), None, "w") for p in pieces], "w")
    long = m if side == "right" else n
    assert rows_of(shares) == list(range(long))
    holders = sum(p is not None for p in pieces)
    for piece, share in zip(pieces, shares):
        if share is None:
            continue
        assert piece is not None  # only a rank that holds elements computes
        if holders == 1:
            assert share.buffer is None
        elif side == "right":
            assert piece.start <= share.start * n < piece.stop  # a row belongs to its first element
            assert share.buffer is None or share.buffer.numel == n  # at most one row is brought together
            if share.view is not None:
                assert piece.start <= share.view.top * n
                assert share.view.bottom * n <= piece.stop
        else:
            assert share.view is None


def rows_of(shares) -> list[int]:
    return [row for share in shares if share for row in range(share.start, share.stop)]


@pytest.mark.parametrize(("side", "long"), [("left", 9), ("right", 4)])
def test_columns_held_are_rows_of_a_wide_matrix_and_are_dealt_out_for_a_tall_one(side, long):
    parts = [part_of(Piece(a, b, dim=1), (4, 9), None, "w") for a, b in ((0, 3), (3, 6), (6, 9))]
    shares = plan_shares((4, 9), side, parts, "w")
    assert rows_of(shares) == list(range(long))
    assert all((s.buffer is None) == (side == "left") for s in shares if s)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_rows_of_what_everybody_holds_are_dealt_out_evenly(side, ranks):
    parts = [part_of(Piece(0, 30), (5, 6), None, "w")] * ranks
    shares = plan_shares((5, 6), side, parts, "w", replicated=True)
    counts = [0 if s is None else s.rows for s in shares]
    assert rows_of(shares) == list(range(5 if side == "right" else 6))
    assert max(counts) - min(counts) <= 1
    assert all(s.buffer is None for s in shares if s)


def test_every_copy_of_the_model_computes_all_rows():
    parts = [part_of(p, (4, 3), None, "w") for p in (Piece(0, 6), Piece(6, 12)) * 2]
    shares = plan_shares((4, 3), "right", parts, "w", copy=[0, 0, 1, 1])
    assert rows_of(shares[:2]) == rows_of(shares[2:]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(0, 5), Piece(6, 12)],  # a gap
        [Piece(0, 7), Piece(6, 12)],  # an overlap
        [Piece(0, 5), None],  # too short
        [Piece(6, 12), Piece(0, 6)],  # out of order
        [None, None],
        [Piece(0, 2, dim=1), Piece(3, 4, dim=1)],  # a column is missing
    ],
)
def test_pieces_that_do_not_cover_the_matrix_are_refused_by_name(pieces):
    with pytest.raises(LayoutError, match=r"layers\.0\.q \(3, 4\)"):
        plan_shares((3, 4), "right", [part_of(p, (3, 4), None, "w") for p in pieces], "layers.0.q")


def test_owners_are_dealt_by_cost_and_begin_elsewhere_in_every_wave():
    everyone = [[0, 1, 2]] * 5
    assert assign_owners([5, 1, 1, 1, 1], everyone, 3) == [0, 1, 2, 1, 2]
    assert assign_owners([1.0], everyone[:1], 3, first=4) == [1]
    assert assign_owners([1.0, 1.0], [[2], [1, 2]], 3) == [2, 1]
