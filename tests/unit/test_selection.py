"""The sampler's law and its keys."""

import itertools
import math

import pytest
import torch

from ds_lowrank.selections import SELECTIONS, Key
from ds_lowrank.selections.random import random_basis


def generator_for(seed: int, name: str, refresh: int) -> torch.Generator:
    return Key(seed, name, refresh).generator()


def select(sigma: torch.Tensor, rank: int, selection: str, generator: torch.Generator) -> torch.Tensor:
    return SELECTIONS.make(selection).choose(sigma, rank, generator)


def draw(sigma: torch.Tensor, rank: int, refresh: int, selection: str = "importance") -> list[int]:
    return select(sigma, rank, selection, generator_for(0, "w", refresh)).tolist()


@pytest.mark.parametrize(
    ("share", "exponent", "expected"),
    [
        (4, 0.0, 0.25),
        (4, 0.5, 0.32),
        (4, 1.0, 0.44),
        (4, 1.5, 0.56),
        (4, 2.0, 0.64),
        (16, 0.0, 0.06),
        (16, 0.5, 0.11),
        (16, 1.0, 0.29),
        (16, 1.5, 0.47),
        (16, 2.0, 0.60),
    ],
)
def test_overlap_of_independent_draws_follows_the_law(share, exponent, expected):
    """Squared or softmaxed weights, or draws with replacement, miss these figures by far more than 0.01."""
    size, pairs = 4096, 48
    sigma = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    rank = size // share
    overlaps = []
    for k in range(pairs):
        first, second = draw(sigma, rank, 2 * k), draw(sigma, rank, 2 * k + 1)
        overlaps.append(len(set(first) & set(second)) / rank)
    assert sum(overlaps) / pairs == pytest.approx(expected, abs=0.01)


def test_inclusion_probabilities_are_those_of_successive_sampling():
    """Against the exact law on four directions, by enumeration."""
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    p = (sigma / sigma.sum()).tolist()
    exact = [0.0] * 4
    for first, second in itertools.permutations(range(4), 2):
        probability = p[first] * p[second] / (1 - p[first])
        exact[first] += probability
        exact[second] += probability
    draws = 4000
    counts = [0] * 4
    for k in range(draws):
        for i in draw(sigma, 2, k):
            counts[i] += 1
    for seen, expected in zip(counts, exact):
        deviation = math.sqrt(draws * expected * (1 - expected))
        assert abs(seen - draws * expected) < 4 * deviation


def test_zero_weights_come_last_in_their_order():
    sigma = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0])
    for refresh in range(20):
        assert draw(sigma, 4, refresh) == [0, 1, 2, 3]


def test_dominant_and_uniform():
    sigma = torch.tensor([9.0, 1e-3, 1e-3, 1e-3])
    assert draw(sigma, 2, 0, "dominant") == [0, 1]
    seen = [i for k in range(400) for i in draw(sigma, 1, k, "uniform")]
    assert 60 < seen.count(0) < 140


def test_the_key_decides_and_nothing_else():
    sigma = torch.rand(64).sort(descending=True).values
    again = select(sigma, 8, "importance", generator_for(1, "a", 2)).tolist()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert select(sigma, 8, "importance", generator_for(1, "a", 2)).tolist() == again
    assert torch.equal(torch.get_rng_state(), before)
    for other in (generator_for(2, "a", 2), generator_for(1, "b", 2), generator_for(1, "a", 3)):
        assert select(sigma, 8, "importance", other).tolist() != again


def test_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="softmax"):
        select(torch.ones(3), 1, "softmax", generator_for(0, "w", 0))


def test_random_basis_is_orthonormal_and_unbiased():
    bases = [random_basis(6, 2, generator_for(0, "w", k)) for k in range(600)]
    assert torch.allclose(bases[0].mT @ bases[0], torch.eye(2, dtype=torch.float64))
    projector = sum(b @ b.mT for b in bases) / len(bases)
    assert torch.allclose(projector, torch.eye(6, dtype=torch.float64) / 3, atol=0.06)
