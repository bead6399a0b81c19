"""Triton kernels against their torch twins: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_lowrank.kernels.gaussian import torch_fill_, words
from ds_lowrank.kernels.moments import fused_direction_, torch_direction_
from ds_lowrank.rules.adamw import MOMENTS
from ds_lowrank.states import dynamic
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.layout import StateLayout
from ds_lowrank.states.linear import dequantise_linear, quantise_linear
from ds_lowrank.states.rounding import Place, copy_stochastic_, rounding_key

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MODULES = ("triton_blocks", "triton_moments", "triton_lift", "triton_gaussian")


@pytest.fixture(scope="module")
def kernels():
    return {name: importlib.import_module(f"ds_lowrank.kernels.{name}") for name in MODULES}


def moments(formats: Formats, rows: int, r: int) -> dict[str, torch.Tensor]:
    m = torch.randn(rows, r) * 10.0 ** (3 * torch.rand(rows, r) - 5)
    state = {
        key: torch.full((rows, t.width), t.fill, dtype=t.dtype)
        for key, t in StateLayout(MOMENTS, formats).tensors(r, torch.float32).items()
    }
    formats.exp_avg.write_(state, "exp_avg", m)
    formats.exp_avg_sq.write_(state, "exp_avg_sq", m.square() * torch.rand(rows, r))
    return {key: tensor.to(DEVICE) for key, tensor in state.items()}


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("rows", "r"), [(16, 64), (19, 70), (3, 5)])
def test_the_direction_is_the_twins(kernels, state_dtype, rows, r):
    formats = Formats(state_dtype)
    ours, theirs = (moments(formats, rows, r) for _ in range(2))
    for key in ours:
        theirs[key].copy_(ours[key])
    for step in (1, 2, 50):
        gradient = torch.randn(rows, r, device=DEVICE) * 1e-3
        expected = torch_direction_(formats, theirs, gradient.clone(), step, (0.9, 0.999), 1e-6)
        found = fused_direction_(formats, ours, gradient.clone(), step, (0.9, 0.999), 1e-6)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
        for key, tensor in ours.items():
            if tensor.dtype == torch.uint8:  # the last bit of a product may tip a number over to the next code
                off = tensor.int() - theirs[key].int()
                assert off.abs().max() <= 1
                assert (off != 0).float().mean() < 0.02
            elif tensor.dtype == torch.bfloat16:  # the interpreter truncates what a GPU rounds
                assert torch.allclose(tensor.float(), theirs[key].float(), rtol=2.0**-7, atol=0)
            else:
                assert torch.allclose(tensor, theirs[key], rtol=1e-5, atol=1e-9)
            theirs[key].copy_(tensor)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("rows", "r"), [(16, 64), (19, 70)])
def test_quantised_bit_by_bit_as_the_twin(kernels, signed, rows, r):
    x = torch.randn(rows, r) * 10.0 ** (5 * torch.rand(rows, r) - 6)
    x = x if signed else x.square()
    x[1], x[2, 3:5], x[0, 0] = 0, 0, 1e-42
    codes, scales = dynamic.quantise(x, signed)
    found_codes, found_scales = kernels["triton_blocks"].quantise(x.to(DEVICE), signed)
    assert torch.equal(found_codes.cpu(), codes)
    assert torch.equal(found_scales.cpu(), scales)
    read = kernels["triton_blocks"].dequantise(found_codes, found_scales, signed)
    assert torch.equal(read.cpu(), dynamic.dequantise(codes, scales, signed))


def test_a_nan_is_not_hidden(kernels):
    x = torch.randn(4, 70)
    x[2, 66] = float("nan")
    codes, scales = kernels["triton_blocks"].quantise(x.to(DEVICE), True)
    read = kernels["triton_blocks"].dequantise(codes, scales, True).cpu()
    assert read[2, 64:].isnan().all()
    assert read[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("r", [64, 67])
def test_bases_are_read_bit_by_bit_as_by_the_twin(kernels, bits, r):
    codes, scales = quantise_linear(torch.randn(9, r), bits)
    found = kernels["triton_blocks"].dequantise_linear(codes.to(DEVICE), scales.to(DEVICE), bits, r)
    assert torch.equal(found.cpu(), dequantise_linear(codes, scales, bits, r))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lift_is_the_twins(kernels, dtype, left):
    from ds_lowrank.subspace.project import lift_

    rows, short, r = 70, 65, 9
    a = torch.randn(short, rows).to(dtype).mT if left else torch.randn(rows, short).to(dtype)
    n, b = torch.randn(rows, r), torch.randn(short, r)
    expected = a.clone()
    lift_(expected, n, b, 0.05, 0.99)
    found = a.to(DEVICE)
    kernels["triton_lift"].lift_(found, n.to(DEVICE), b.to(DEVICE), 0.05, 0.99)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 1e-5}
    assert torch.allclose(found.cpu().float(), expected.float(), **tolerance)


@pytest.mark.parametrize("left", [False, True])
def test_stochastic_rounding_has_the_twins_bits(kernels, left):
    """N Bᵀ of small whole numbers is exact, so that every element rounds the same number by the same bits."""
    rows, short, r = 30, 40, 5
    a = torch.randint(-8, 8, (rows, short)).bfloat16()
    a = a.mT.contiguous().mT if left else a
    n, b = torch.randint(-4, 5, (rows, r)).float(), torch.randint(-4, 5, (short, r)).float()
    key, first, strides = rounding_key(1, "w", 7), 3 << 32, (1, 1000) if left else (1000, 1)
    expected = torch.empty_like(a)
    copy_stochastic_(expected, a.float() - 2.0**-12 * (n @ b.mT), Place(key, first, strides))
    found = a.to(DEVICE)
    kernels["triton_lift"].lift_(found, n.to(DEVICE), b.to(DEVICE), 2.0**-12, 1.0, Place(key, first, strides))
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(expected, (a.float() - 2.0**-12 * (n @ b.mT)).bfloat16())


@pytest.mark.parametrize(("first", "count"), [(0, 2000), (7, 1301), (6, 1), (2**31 - 3, 100)])
def test_gaussian_numbers_are_the_twins(kernels, first, count):
    expected, found = torch.empty(count), torch.empty(count, device=DEVICE)
    key = words(0xDEADBEEF_87654321)
    torch_fill_(expected, first, key, 0.5)
    kernels["triton_gaussian"].fill_(found, first, key, 0.5)
    # Where a number is near zero only the absolute error of the angle and of the logarithm is small.
    assert torch.allclose(found.cpu(), expected, rtol=1e-5, atol=2e-6 if GPU else 5e-7)


@pytest.mark.slow  # half a minute of compilation
def test_kernels_compile_for_the_chips_without_one(tmp_path):
    """sm_80, sm_89, sm_90: to machine code, by Triton's own ptxas, in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = done.stdout.split()
    for chip in ("80", "89", "90"):
        assert sum(name.endswith(chip) for name in compiled) == 11


@pytest.mark.gpu
def test_a_step_on_a_gpu_uses_the_kernels_and_is_the_cpus(monkeypatch):
    import ds_lowrank
    from ds_lowrank.kernels import triton_moments

    weights, used = {}, []
    inner = triton_moments.int8
    monkeypatch.setattr(triton_moments, "int8", lambda *args: (used.append(1), inner(*args)))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Linear(96, 160, bias=False).to(device)
        optimizer = ds_lowrank.build_optimizer(
            model, {"rank": 24, "lr": 0.01, "state_dtype": "int8", "basis_dtype": "int8", "gram_dtype": "float64"}
        )
        for step in range(4):
            model.weight.grad = torch.randn(160, 96, generator=torch.Generator().manual_seed(step)).to(device)
            optimizer.step()
        weights[device] = model.weight.detach().cpu()
    assert len(used) == 4
    assert torch.allclose(weights["cpu"], weights["cuda"], atol=1e-4)
