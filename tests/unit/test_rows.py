"""Geometry of pieces, boxes and shares, against brute force."""

import itertools
import random

import pytest
import torch

from ds_lowrank.layouts import LayoutError, Piece
from ds_lowrank.rows import boxes_of, plan_shares, view_of


def cuts(numel: int, ranks: int, rng: random.Random) -> list[Piece | None]:
    """A random division of a matrix over ranks, some of which hold nothing."""
    bounds = sorted([0, *(rng.randint(0, numel) for _ in range(ranks - 1)), numel])
    return [Piece(a, b) if a < b else None for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("seed", range(40))
def test_boxes_cover_a_piece_exactly(seed):
    rng = random.Random(seed)
    m, n = rng.randint(1, 6), rng.randint(1, 6)
    start = rng.randint(0, m * n - 1)
    piece = Piece(start, rng.randint(start + 1, m * n))
    flat = torch.arange(m * n)
    boxes = boxes_of(piece, n)
    assert len(boxes) <= 3
    held = flat[piece.start : piece.stop]
    seen = torch.cat([view_of(held, piece, box, n).flatten() for box in boxes])
    assert seen.tolist() == held.tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_computed_once_and_only_cut_rows_move(side, seed):
    rng = random.Random(seed)
    m, n, ranks = rng.randint(1, 7), rng.randint(1, 7), rng.randint(1, 5)
    pieces = cuts(m * n, ranks, rng)
    shares = plan_shares((m, n), side, pieces, "w")
    long = m if side == "right" else n
    rows = [row for share in shares if share for row in range(share.start, share.stop)]
    assert rows == list(range(long))
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


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(0, 5), Piece(6, 12)],  # a gap
        [Piece(0, 7), Piece(6, 12)],  # an overlap
        [Piece(0, 5), None],  # too short
        [Piece(6, 12), Piece(0, 6)],  # out of order
        [None, None],
    ],
)
def test_pieces_that_do_not_cover_the_matrix_are_refused_by_name(pieces):
    with pytest.raises(LayoutError, match=r"layers\.0\.q \(3, 4\)"):
        plan_shares((3, 4), "right", pieces, "layers.0.q")
