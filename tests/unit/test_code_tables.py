"""Codes from tables, part by part, are bit by bit those of a search through the map's midpoints over the whole."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.kernels.moments import kept_direction_, parted_direction_, torch_direction_
from ds_lowrank.rules.adamw import MOMENTS
from ds_lowrank.states import blocks
from ds_lowrank.states.blocks import BLOCK
from ds_lowrank.states.dynamic import dequantise, dynamic_map, midpoints, quantise
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.layout import StateLayout
from ds_lowrank.states.linear import dequantise_linear, quantise_linear

LARGEST = 3.4e38


@pytest.fixture(params=[1 << 16, 64, 1000], ids=lambda n: f"part{n}")
def _part(request, monkeypatch):
    """One part, and several: of whole blocks, and of some rows."""
    monkeypatch.setattr(blocks, "PART", request.param)


def spread(scales: torch.Tensor, r: int) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK, 1)[:, :r]


def tops(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.abs().amax(1) for part in x.split(BLOCK, dim=1)], 1)


def searched(x: torch.Tensor, signed: bool, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: how many midpoints lie below, and of V nothing but zero is zero."""
    scales = tops(x) if scales is None else scales
    unit = x / spread(torch.where(scales > 0, scales, 1.0), x.shape[1])
    codes = torch.bucketize(unit.contiguous(), midpoints(signed), out_int32=True)
    if not signed:
        codes = torch.where((x > 0) & (codes == 0), 1, codes)
    return codes.to(torch.uint8), scales


def bits(x: torch.Tensor) -> torch.Tensor:
    """NaN is equal to itself here, and zero not to its negative."""
    return x.contiguous().view(torch.int32)


def assert_as_searched(x: torch.Tensor, signed: bool, scales: torch.Tensor | None = None) -> None:
    codes, expected = searched(x, signed, scales)
    found, found_scales = quantise(x, signed, scales=scales)
    assert torch.equal(found, codes)
    assert torch.equal(bits(found_scales), bits(expected))
    read = dynamic_map(signed)[codes.long()] * spread(expected, x.shape[1])
    assert torch.equal(bits(dequantise(found, found_scales, signed)), bits(read))


def any_bits(rows: int, r: int) -> torch.Tensor:
    """Every kind of number: denormal, infinite, NaN with any payload."""
    return torch.randint(-(2**31), 2**31, (rows, r)).to(torch.int32).view(torch.float32)


def kinds(rows: int, r: int) -> dict[str, torch.Tensor]:
    moments = torch.randn(rows, r) * 10.0 ** (7 * torch.rand(rows, r) - 7)
    holes = moments * (torch.rand(rows, r) < 0.5)
    holes[rows // 2 :] = 0
    return {
        "moments": moments,
        "holes": holes,
        "all magnitudes": torch.randn(rows, r) * 10.0 ** (80 * torch.rand(rows, r) - 45),
        "denormal": torch.randn(rows, r) * 1e-42,
        "any bits": any_bits(rows, r),
        "turned": torch.randn(r, rows).mT,
    }


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("r", [1, 5, 63, 64, 65, 130, 256])
@pytest.mark.usefixtures("_part")
def test_of_any_numbers_and_widths(signed, r):
    torch.manual_seed(r)
    for rows in (0, 1, 9):
        for name, x in kinds(rows, r).items():
            assert_as_searched(x if signed or name == "any bits" else x.abs(), signed)


@pytest.mark.parametrize("signed", [True, False])
def test_in_every_cell_of_the_table_and_at_every_midpoint(signed):
    """The first and the last number of each cell, the midpoints and their neighbours; all kinds of NaN among them."""
    first = (torch.arange(1 << 16) << 16).to(torch.int32)
    middle = midpoints(signed).view(torch.int32)
    near = torch.cat([first, first | 0xFFFF, *(middle + k for k in range(-2, 3))])
    x = torch.nn.functional.pad(near, (0, -len(near) % BLOCK)).view(torch.float32).view(-1, BLOCK)
    assert_as_searched(x, signed, torch.ones(len(x), 1))


def test_a_second_moment_that_vanishes_beside_its_scale_is_not_zero():
    x = torch.zeros(3, 70)
    x[:, 0], x[:, 1], x[2, 69] = 1e-45, LARGEST, 1e-45
    x[1, 2] = float("nan")  # in another block of the part
    assert x[0, 0] / x[0, 1] == 0
    assert_as_searched(x, signed=False)
    assert quantise(x, signed=False)[0][0, 0] == 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("r", [1, 5, 63, 64, 65, 130])
def test_bases_are_divided_and_multiplied_as_by_a_scale_a_number(bits, r):
    top = 2 ** (bits - 1) - 1
    for x in kinds(9, r).values():
        codes, scales = quantise_linear(x, bits)
        assert torch.equal(scales.nan_to_num(-1.0), (tops(x) / top).nan_to_num(-1.0))
        unit = x / spread(torch.where(scales > 0, scales, 1.0), r)
        whole = unit.round().nan_to_num(0.0).clamp(-top, top)
        found = codes if bits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :r].to(torch.int8) - 8
        assert torch.equal(found.float(), whole + 0.0)
        read = dequantise_linear(codes, scales, bits, r)
        assert torch.equal(read.nan_to_num(-1.0), (found.float() * spread(scales, r)).nan_to_num(-1.0))


@pytest.mark.parametrize("r", [5, 64, 70, 128])
@pytest.mark.usefixtures("_part")
def test_a_step_by_parts_is_that_of_the_whole(r):
    """N, codes and scales, bit by bit, also from a gradient that is not finite."""
    torch.manual_seed(r)
    formats, rows = Formats("int8"), 37
    fresh = {
        k: torch.full((rows, t.width), t.fill, dtype=t.dtype)
        for k, t in StateLayout(MOMENTS, formats).tensors(r, torch.float32).items()
    }
    whole, parted, kept = ({k: t.clone() for k, t in fresh.items()} for _ in range(3))
    for step in range(1, 6):
        gradient = torch.randn(rows, r) * 10.0 ** (4 * torch.rand(rows, r) - 6)
        if step == 5:
            gradient[3, 1], gradient[4, 2] = float("nan"), float("inf")
        arguments = (step, (0.9, 0.999), 1e-8)
        expected = torch_direction_(formats, whole, gradient.clone(), *arguments)
        for direction, state in ((parted_direction_, parted), (kept_direction_, kept)):
            given = gradient.clone()
            found = direction(formats, state, given, *arguments)
            assert found is given
            assert torch.equal(bits(found), bits(expected))
            for key, tensor in whole.items():
                assert torch.equal(state[key].view(torch.uint8), tensor.view(torch.uint8)), key
