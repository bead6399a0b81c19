"""Formats of moments and bases: what is rounded, to what, and that a cut between rows changes nothing."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.methods import saved_layout
from ds_lowrank.rules.adamw import MOMENTS
from ds_lowrank.states.blocks import BLOCK, count
from ds_lowrank.states.dynamic import dequantise, dynamic_map, midpoints, quantise, zero_code
from ds_lowrank.states.formats import BASIS_DTYPES, STATE_DTYPES, Formats
from ds_lowrank.states.layout import BASIS, Slot, StateLayout
from ds_lowrank.states.linear import dequantise_linear, quantise_linear
from ds_lowrank.states.packing import pack, unpack

QUANTITIES = [("exp_avg", s) for s in STATE_DTYPES] + [("exp_avg_sq", s) for s in STATE_DTYPES]
QUANTITIES += [("basis", s) for s in BASIS_DTYPES]
# Half a step at the largest value of a block, over it.
HALF_STEP = {"fp32": 0.0, "bf16": 2.0**-8, "exp_avg": 0.45 / 64, "exp_avg_sq": 0.45 / 128, "int8": 0.5 / 127}
HALF_STEP["int4"] = 0.5 / 7


def form_of(quantity: str, name: str):
    formats = Formats(basis_dtype=name) if quantity == "basis" else Formats(state_dtype=name)
    return getattr(formats, quantity)


def numbers(quantity: str, rows: int = 7, r: int = 150) -> torch.Tensor:
    """Magnitudes over five decades within every block, as moments have them."""
    x = torch.randn(rows, r) * 10.0 ** (5 * torch.rand(rows, r) - 6)
    return x.square() if quantity == "exp_avg_sq" else x


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_256_values_as_the_paper_has_them(signed):
    values = dynamic_map(signed)
    assert len(values) == 256
    assert (values.diff() > 0).all()
    assert values[zero_code(signed)] == 0
    assert values[-1] == 1
    assert (values < 0).sum() == (127 if signed else 0)
    assert len(midpoints(signed)) == 255


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_peers(signed):
    """Both are 8-bit optimizers of the paper's authors' kind: the same 256 values."""
    ours = dynamic_map(signed)
    bnb = pytest.importorskip("bitsandbytes").functional.create_dynamic_map(signed)
    assert torch.allclose(torch.as_tensor(bnb).float().sort().values, ours, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_peers(signed):
    """bitsandbytes, one of its blocks a row. On a CPU it looks codes up in 65536 cells, too coarse near zero."""
    functional = pytest.importorskip("bitsandbytes").functional
    x = torch.randn(8, 64) if signed else torch.randn(8, 64).square()
    codes, scales = quantise(x, signed, block=64)
    theirs, state = functional.quantize_blockwise(x.flatten(), code=dynamic_map(signed).clone(), blocksize=64)
    assert torch.allclose(scales.flatten(), state.absmax)
    fine = (x / scales).abs().flatten() > 0.01
    off = (codes.flatten().int() - theirs.int())[fine]
    assert (off.abs() <= 1).all()
    assert (off != 0).float().mean() < 0.05
    read = functional.dequantize_blockwise(codes.flatten(), state)
    assert torch.equal(read.view(8, 64), dequantise(codes, scales, signed, block=64))


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest_value(signed):
    x = numbers("exp_avg" if signed else "exp_avg_sq", 5, 150)
    codes, scales = quantise(x, signed)
    unit = (x / scales.repeat_interleave(BLOCK, 1)[:, :150]).double()
    values = dynamic_map(signed).double()
    found = (values[codes.long()] - unit).abs()
    best = (values - unit[..., None]).abs().amin(-1)
    away = (codes == 1) & (not signed)  # what would become zero
    assert torch.allclose(found[~away], best[~away], rtol=0, atol=1e-7)


def test_no_second_moment_becomes_zero_but_zero():
    """Adam would divide by ε alone."""
    v = torch.zeros(2, 64)
    v[0, 0], v[0, 1], v[0, 2] = 1.0, 1e-12, 1e-44
    codes, scales = quantise(v, signed=False)
    read = dequantise(codes, scales, signed=False)
    assert (read[0, :3] > 0).all()
    assert (read[0, 3:] == 0).all()
    assert (read[1] == 0).all()


@pytest.mark.parametrize(("quantity", "name"), QUANTITIES)
@pytest.mark.parametrize("r", [1, 63, 64, 65, 150])
def test_what_is_read_is_within_half_a_step_of_the_blocks_largest(quantity, name, r):
    form, x = form_of(quantity, name), numbers(quantity, r=r)
    read = form.decode(form.encode(x), r, torch.float32)
    top = torch.stack([part.abs().amax(1) for part in x.split(BLOCK, dim=1)], 1).repeat_interleave(BLOCK, 1)[:, :r]
    share = HALF_STEP[quantity if name == "int8" and quantity != "basis" else name]
    assert ((read - x).abs() <= top * share * 1.001).all()


@pytest.mark.parametrize(("quantity", "name"), QUANTITIES)
def test_any_cut_between_rows_changes_nothing(quantity, name):
    form, x = form_of(quantity, name), numbers(quantity, rows=11)
    whole = form.encode(x)
    for at in range(12):
        parts = [form.encode(part) for part in (x[:at], x[at:])]
        for tensor, *cut in zip(whole, *parts):
            assert torch.equal(tensor, torch.cat(cut))


@pytest.mark.parametrize(("quantity", "name"), QUANTITIES)
def test_zero_stays_zero_and_zero_blocks_are_fine(quantity, name):
    form, x = form_of(quantity, name), numbers(quantity, r=130)
    x[:, 3] = 0
    x[2, 64:128] = 0
    read = form.decode(form.encode(x), 130, torch.float32)
    assert torch.equal(read[:, 3], torch.zeros(7))
    assert torch.equal(read[2, 64:128], torch.zeros(64))
    assert read.isfinite().all()


@pytest.mark.parametrize(("quantity", "name"), QUANTITIES)
def test_a_fresh_state_is_what_zeros_are_written_as(quantity, name):
    form = form_of(quantity, name)
    fresh = [torch.full((3, t.width), t.fill, dtype=t.dtype) for t in form.rows("x", 70, torch.float32).values()]
    for tensor, written in zip(fresh, form.encode(torch.zeros(3, 70))):
        assert torch.equal(tensor, written)
        assert tensor.dtype == written.dtype


@pytest.mark.parametrize(("quantity", "name"), QUANTITIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(quantity, name, bad):
    """One wrong number spoils its block, never another row and never silently."""
    form, x = form_of(quantity, name), numbers(quantity, r=130)
    x[1, 70] = bad
    read = form.decode(form.encode(x), 130, torch.float32)
    assert not read[1, 70].isfinite()
    assert read[1, :64].isfinite().all()
    assert read[[0, *range(2, 7)]].isfinite().all()


@pytest.mark.parametrize(("quantity", "name"), QUANTITIES)
def test_bytes_are_what_is_allocated_and_rows_survive_packing(quantity, name):
    form, x = form_of(quantity, name), numbers(quantity, r=67)
    stored = form.encode(x)
    assert form.bytes(7, 67) == sum(t.numel() * t.element_size() for t in stored)
    rows = form.rows(quantity, 67, torch.float32)
    packed = pack(stored)
    assert packed.shape == (7, form.bytes(1, 67))
    for before, after in zip(stored, unpack(packed.clone(), rows.values())):
        assert torch.equal(before, after)
        assert before.dtype == after.dtype
    state = {key: torch.zeros_like(tensor) for key, tensor in zip(form.keys(quantity), stored)}
    form.write_(state, quantity, x)
    assert torch.equal(form.read(state, quantity, 67, torch.float32), form.decode(stored, 67, torch.float32))


def test_full_precision_is_read_without_a_copy_and_written_in_its_place():
    form = form_of("exp_avg", "fp32")
    state = {"exp_avg": torch.ones(2, 3)}
    read = form.read(state, "exp_avg", 3, torch.float32)
    assert read.data_ptr() == state["exp_avg"].data_ptr()
    form.write_(state, "exp_avg", read.mul_(2))
    assert torch.equal(state["exp_avg"], torch.full((2, 3), 2.0))


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_codes_span_the_whole_range(bits):
    x = torch.linspace(-1, 1, 64)[None]
    codes, scales = quantise_linear(x, bits)
    values = (dequantise_linear(codes, scales, bits, 64) / scales).round()
    assert (values.min(), values.max()) == (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    assert len(values.unique()) == min(64, 2**bits - 1)


def llama_share(state_dtype: str, basis_dtype: str, hidden: int, inner: int) -> float:
    """Of what AdamW keeps in fp32 for the matrices of a layer, at r = h/4."""
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 3
    kept = StateLayout((*MOMENTS, BASIS), Formats(state_dtype, basis_dtype))
    ours = sum(kept.bytes(long, short, hidden // 4) for long, short in shapes)
    return ours / sum(8 * long * short for long, short in shapes)


@pytest.mark.parametrize(("hidden", "inner"), [(512, 1376), (768, 2048), (1024, 2736), (2048, 5461), (4096, 11008)])
def test_shares_of_adamws_state(hidden, inner):
    """60M to 7B."""
    assert 0.31 < llama_share("fp32", "fp32", hidden, inner) < 0.33
    assert llama_share("int8", "bf16", hidden, inner) <= 0.105
    assert llama_share("int8", "int8", hidden, inner) <= 0.09
    assert llama_share("int8", "int4", hidden, inner) <= 0.08


def dtypes(state_dtype: str, basis_dtype: str) -> dict[str, torch.dtype]:
    kept = StateLayout((*MOMENTS, BASIS), Formats(state_dtype, basis_dtype))
    return {key: tensor.dtype for key, tensor in kept.tensors(5, torch.float32).items()}


def test_bytes_of_slots_by_hand():
    """int8: 70 codes and two scales a row; one of width 1 a code and a scale."""
    one = Slot("one", width=1, format="unsigned")
    kept = StateLayout((*MOMENTS, one, BASIS, Slot("norm", "matrix", 1, "exact")), Formats("int8", "int4"))
    assert kept.row_bytes(70) == {"rows": 2 * (70 + 8) + 1 + 4, "basis": 35 + 8, "matrix": 4}
    assert kept.bytes(10, 6, 70) == 10 * 161 + 6 * 43 + 4
    assert kept.bytes(0, 0, 70) == 0
    assert kept.slot_bytes(10, 6, 70) == {"exp_avg": 780, "exp_avg_sq": 780, "one": 50, "basis": 258, "norm": 4}
    assert kept.row_bytes(70, torch.float64)["matrix"] == 8
    assert kept.length("exp_avg_scale", 70, torch.float32, 10, 6) == 10
    assert kept.length("norm", 70, torch.float32, 10, 6) == 1


@pytest.mark.parametrize("missing", ["exp_avg", "exp_avg_sq", "basis"])
def test_a_slot_that_is_missing_is_named(missing):
    here = StateLayout((*MOMENTS, BASIS), Formats())
    saved = saved_layout({key: dtype for key, dtype in dtypes("fp32", "fp32").items() if key != missing})
    assert saved is not None
    assert here.fault(saved).startswith(f"has no {missing}: it was saved with ")
    assert here.fault(saved).endswith("use the rule and selection that it was saved with")
    assert saved.fault(here).startswith("was saved with exp_avg, exp_avg_sq, basis, and the rule and selection of this")


def test_formats_are_known_from_what_was_saved():
    for state in STATE_DTYPES:
        for basis in BASIS_DTYPES:
            found = saved_layout(dtypes(state, basis))
            assert found is not None
            assert (found.names, list(found.slots)) == ((state, basis), ["exp_avg", "exp_avg_sq", "basis"])
    without = saved_layout({"exp_avg": torch.float32, "exp_avg_sq": torch.float32})
    assert without is not None
    assert list(without.slots) == ["exp_avg", "exp_avg_sq"]
    assert saved_layout({"basis": torch.float16}) is None
    assert saved_layout({}) is None


def test_keys_of_codes_are_never_keys_of_numbers():
    """torch's checkpoints copy by key: codes of one run would become the moments of another."""
    assert not set(dtypes("int8", "int8")) & set(dtypes("fp32", "fp32"))


def test_count_of_blocks():
    assert [count(r) for r in (1, 64, 65, 128, 129)] == [1, 1, 2, 2, 3]


def test_more_precise_weights_are_refused():
    Formats().check(torch.float64, "w")
    Formats("int8", "int4").check(torch.bfloat16, "w")
    with pytest.raises(ValueError, match=r"w is float64, and state_dtype 'int8', basis_dtype 'fp32'"):
        Formats("int8").check(torch.float64, "w")
