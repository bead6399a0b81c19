"""Stochastic rounding by a counter: unbiased, and the same whoever rounds which part."""

from __future__ import annotations

import torch

from ds_lowrank.states.rounding import Key, Place, copy_stochastic_, random_bits, round_stochastic, rounding_key


def test_stochastic_rounding_is_unbiased_and_between_the_neighbours():
    x = torch.tensor([1.0 + 2.0**-9, -3.14159, 1e-30, 0.0, 256.3])
    index = torch.arange(20000)[:, None] * 5 + torch.arange(5)
    rounded = round_stochastic(x.expand(20000, 5), random_bits(index, rounding_key(0, "w", 1))).float()
    step = (rounded.amax(0) - rounded.amin(0)).double()
    assert ((rounded - x).abs() < x.abs() * 2.0**-7).logical_or(x == 0).all()
    off = (rounded.double().mean(0) - x.double()).abs()
    assert (off <= 4 * 0.5 * step / 20000**0.5).all()
    assert (step[[0, 1, 2, 4]] > 0).all()


def test_what_is_not_a_number_or_exact_stays():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.5, -2.0])
    for step in range(20):
        bits = random_bits(torch.arange(6), rounding_key(0, "w", step))
        rounded = round_stochastic(x, bits).float()
        assert rounded[0].isnan()
        assert torch.equal(rounded[1:], x[1:])


def test_bits_are_those_of_the_place_and_not_of_the_cut():
    key = rounding_key(3, "w", 4)
    x = torch.randn(9, 33)
    whole = torch.empty(9, 33, dtype=torch.bfloat16)
    copy_stochastic_(whole, x, Place(key, 0, (33, 1)))
    for top, left in ((4, 0), (1, 20)):
        part = torch.empty(9 - top, 33 - left, dtype=torch.bfloat16)
        copy_stochastic_(part, x[top:, left:], Place(key, top * 33 + left, (33, 1)))
        assert torch.equal(part, whole[top:, left:])
    turned = torch.empty(33, 9, dtype=torch.bfloat16)
    copy_stochastic_(turned, x.mT, Place(key, 0, (1, 33)))
    assert torch.equal(turned.mT, whole)
    others = [rounding_key(4, "w", 4), rounding_key(3, "v", 4), rounding_key(3, "w", 5)]
    index = torch.arange(64)
    assert all((random_bits(index, key) != random_bits(index, other)).all() for other in others)


def test_bits_are_even():
    """Each bit is set half the time, also in the upper half of a long index, and neighbours do not know each other."""
    for first in (0, 5 << 32):
        bits = random_bits(first + torch.arange(1 << 14), Key(1, 2))
        ones = torch.stack([(bits >> k) & 1 for k in range(32)]).double()
        assert ((ones.mean(1) - 0.5).abs() < 0.02).all()
        correlation = torch.corrcoef(torch.cat([ones, ones.roll(1, 1)]))
        assert (correlation - torch.eye(64)).abs().max() < 0.05
