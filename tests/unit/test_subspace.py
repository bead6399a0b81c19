"""Gram, spectrum, basis, moments, products, sides and schedule."""

import pytest
import torch

from ds_lowrank.engine.step import is_due
from ds_lowrank.kernels.moments import adamw_direction_
from ds_lowrank.rules import RULES
from ds_lowrank.selections import SELECTIONS, Gram, Key
from ds_lowrank.selections.carry import CARRIES, overlap
from ds_lowrank.subspace import spectrum as spectrum_module
from ds_lowrank.subspace.project import drop_rounding_, energy, gram, gram_of_short_rows, lift_, project
from ds_lowrank.subspace.schedule import phases, refresh_cost, waves
from ds_lowrank.subspace.sides import as_rows, projected_side
from ds_lowrank.subspace.spectrum import fix_signs, spectrum

KEY = {"gradient_dtype": torch.float64, "seed": 0, "name": "w", "refresh": 0}


def draw_basis(square, r, selection, dtype, *, gradient_dtype, seed, name, refresh, frame=None):
    evidence = Gram(square, frame, gradient_dtype)
    short = len(square if frame is None else frame)
    key = Key(seed, name, refresh)
    return SELECTIONS.make(selection).draw(key, short, r, dtype, torch.device("cpu"), evidence)


def _product(a: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    out = basis.new_empty(len(a), basis.shape[1])
    project(a, basis, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectrum_is_the_svd(dtype):
    a = torch.randn(30, 12, dtype=dtype)
    sigma, vectors = spectrum(gram(a, dtype))
    _, expected, vt = torch.linalg.svd(a, full_matrices=False)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert torch.allclose(sigma, expected, atol=tolerance)
    assert torch.allclose(fix_signs(vectors), fix_signs(vt.mT), atol=tolerance)


def test_grams_of_row_blocks_add_up_and_are_exact_in_float64():
    a = torch.randn(5000, 7)
    whole = gram(a, torch.float64)
    assert torch.allclose(whole, a.double().mT @ a.double(), rtol=1e-14)
    assert torch.allclose(gram(a[:1234], torch.float64) + gram(a[1234:], torch.float64), whole, rtol=1e-14)


@pytest.mark.parametrize("layout", ["tall", "wide", "cut"])
def test_the_energy_of_a_large_matrix_is_that_of_float64(layout):
    a = {"tall": torch.randn(2048, 768), "wide": torch.randn(768, 2048).mT, "cut": torch.randn(1376, 1024)[:, :512]}
    exact = float(a[layout].double().square().sum())
    assert abs(float(energy(a[layout], torch.float32)) / exact - 1) < 1e-6
    assert float(energy(a[layout].bfloat16(), torch.float32)) == pytest.approx(exact, rel=1e-3)
    assert energy(a[layout][:0], torch.float32) == 0


def test_signs_are_fixed_by_the_largest_entry():
    fixed = fix_signs(torch.tensor([[0.1, -0.2], [-3.0, 2.0]]))
    assert torch.equal(fixed, torch.tensor([[-0.1, -0.2], [3.0, 2.0]]))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("selection", ["dominant", "importance", "uniform"])
def test_a_zero_or_non_finite_gradient_gives_no_basis(bad, selection):
    a = torch.zeros(6, 4)
    a[2, 1] = bad
    assert draw_basis(gram(a, torch.float64), 2, selection, torch.float32, **KEY) is None


def test_a_rank_deficient_gradient_gives_an_orthonormal_basis_that_captures_it():
    a = torch.randn(20, 2) @ torch.randn(2, 9)
    drawn = draw_basis(gram(a, torch.float64), 5, "importance", torch.float32, **KEY)
    assert torch.allclose(drawn.vectors.mT @ drawn.vectors, torch.eye(5), atol=1e-5)
    assert drawn.indices.tolist() == [0, 1, -1, -1, -1]  # the rest is none of the gradient's
    assert torch.allclose(a @ drawn.vectors @ drawn.vectors.mT, a, atol=1e-4)
    assert drawn.captured == pytest.approx(1.0)


def _turned(a: torch.Tensor) -> torch.Tensor:
    """The same rows in another basis of the rows' space: AᵀA is equal but for rounding."""
    return torch.linalg.qr(torch.randn(len(a), len(a), dtype=torch.float64))[0] @ a.double()


@pytest.mark.parametrize("selection", ["dominant", "importance", "uniform"])
@pytest.mark.parametrize("gradient_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_subspaces_give_equal_bases(selection, gradient_dtype):
    """Of a gradient of rank 3 the other 5 directions of the basis must not be what rounding has left in the Gram."""
    a = torch.randn(64, 3, dtype=torch.float64) @ torch.randn(3, 32, dtype=torch.float64)
    key = {**KEY, "gradient_dtype": gradient_dtype}
    first, second = (
        draw_basis(gram(x.to(gradient_dtype).double(), torch.float64), 8, selection, torch.float64, **key)
        for x in (a, a + 1e-9 * torch.randn(64, 32))
    )
    if gradient_dtype == torch.float64:  # 1e-9 is a direction there
        second = draw_basis(gram(_turned(a), torch.float64), 8, selection, torch.float64, **key)
    assert first.indices.tolist() == second.indices.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    apart = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[gradient_dtype]
    assert torch.allclose(first.vectors, second.vectors, atol=apart)
    assert torch.allclose(first.vectors.mT @ first.vectors, torch.eye(8, dtype=torch.float64), atol=1e-12)
    other = draw_basis(gram(a, torch.float64), 8, selection, torch.float64, **{**KEY, "refresh": 1})
    assert not torch.allclose(first.vectors[:, 3:], other.vectors[:, 3:], atol=0.1)


def test_a_null_space_is_filled_only_where_directions_lack():
    """With as many as r above the floor nothing is drawn but by the selection, whatever lies below it."""
    a = torch.randn(64, 8, dtype=torch.float64) @ torch.randn(8, 32, dtype=torch.float64)
    noisy = a + 1e-7 * torch.randn(64, 32, dtype=torch.float64)  # float32's rounding, or less
    key = {**KEY, "gradient_dtype": torch.float32}
    assert draw_basis(gram(noisy, torch.float64), 8, "dominant", torch.float64, **key).indices.tolist() == [*range(8)]
    assert draw_basis(gram(noisy, torch.float64), 9, "dominant", torch.float64, **key).indices.tolist()[8:] == [-1]
    drawn = draw_basis(gram(a, torch.float64), 6, "uniform", torch.float64, **KEY)  # never a direction that is none
    assert drawn.indices.max() < 8
    assert drawn.indices.min() >= 0


@pytest.mark.parametrize("rank", [3, 6])
def test_the_longer_side_is_decomposed_by_the_shorter_ones_gram(rank):
    a = torch.randn(6, 50, dtype=torch.float64)
    if rank == 6:
        a = a[:, :1] @ torch.randn(1, 50, dtype=torch.float64)  # five directions are drawn
    small, frame = gram_of_short_rows(a, torch.float64)
    assert small.shape == (6, 6)
    ours = draw_basis(small, rank, "importance", torch.float64, frame=frame, **KEY)
    whole = draw_basis(gram(a, torch.float64), rank, "dominant", torch.float64, **KEY)
    assert torch.allclose(ours.vectors.mT @ ours.vectors, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    if rank == 6:
        assert torch.allclose(ours.vectors, whole.vectors, atol=1e-10)
    else:
        _, _, vt = torch.linalg.svd(a, full_matrices=False)
        assert torch.allclose(ours.vectors, fix_signs(vt.mT[:, ours.indices.long()]), atol=1e-10)
    share = (a @ ours.vectors).square().sum() / a.square().sum()
    assert ours.captured == pytest.approx(float(share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_makes_of_nothing_is_nothing(dtype):
    """Adam divides by its own size: of 1e-9 in a direction that a gradient does not have it would make a full step."""
    a = (torch.randn(200, 2, dtype=torch.float64) @ torch.randn(2, 96, dtype=torch.float64)).to(dtype)
    drawn = draw_basis(gram(a, torch.float64), 8, "importance", dtype, **{**KEY, "gradient_dtype": dtype})
    columns = drawn.indices < 0
    product = _product(a, drawn.vectors)
    assert product[:, columns].abs().max() > 0
    before = product.clone()
    drop_rounding_(product, a, columns, dtype)
    assert product[:, columns].abs().max() == 0
    assert torch.equal(product[:, ~columns], before[:, ~columns])
    other = torch.randn(200, 96, dtype=dtype)  # the next step's, which has something there
    product = _product(other, drawn.vectors)
    before = product.clone()
    drop_rounding_(product, other, columns, dtype)
    assert torch.equal(product, before)


def test_a_failing_decomposition_is_retried_in_float64_then_given_up(monkeypatch):
    real, seen = torch.linalg.eigh, []

    def failing(matrix, fails):
        seen.append(matrix.dtype)
        if matrix.dtype in fails:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    square = gram(torch.randn(8, 5), torch.float32)
    monkeypatch.setattr(spectrum_module.torch.linalg, "eigh", lambda m: failing(m, [torch.float32]))
    sigma, vectors = spectrum(square)
    assert seen == [torch.float32, torch.float64]
    assert sigma.dtype == vectors.dtype == torch.float32
    assert torch.allclose(vectors.mT @ vectors, torch.eye(5), atol=1e-5)
    monkeypatch.setattr(spectrum_module.torch.linalg, "eigh", lambda m: failing(m, [torch.float32, torch.float64]))
    assert spectrum(square) is None


@pytest.mark.parametrize("selection", ["dominant", "importance", "uniform", "random"])
def test_a_basis_is_orthonormal_and_keeps_nothing_else_alive(selection):
    drawn = draw_basis(gram(torch.randn(40, 16), torch.float64), 4, selection, torch.float32, **KEY)
    assert torch.allclose(drawn.vectors.mT @ drawn.vectors, torch.eye(4), atol=1e-5)
    assert drawn.vectors.is_contiguous()
    assert drawn.vectors.untyped_storage().nbytes() == 16 * 4 * 4
    assert drawn.captured is None if selection == "random" else 0 < drawn.captured < 1


def test_captured_is_the_share_of_energy():
    a = torch.randn(40, 16, dtype=torch.float64)
    for selection in ("importance", "uniform"):
        drawn = draw_basis(gram(a, torch.float64), 4, selection, torch.float64, **KEY)
        share = (a @ drawn.vectors).square().sum() / a.square().sum()
        assert drawn.captured == pytest.approx(float(share))


def test_overlap_of_same_and_orthogonal_subspaces():
    eye = torch.eye(6)
    turn = torch.linalg.qr(torch.randn(2, 2))[0]
    assert overlap(eye[:, :2].mT @ (eye[:, :2] @ turn)) == pytest.approx(1.0)
    assert overlap(eye[:, :2].mT @ eye[:, 2:4]) == 0.0


def test_projected_moments_lift_to_the_projection_of_the_old_lift():
    old, new = (torch.linalg.qr(torch.randn(9, 3))[0] for _ in range(2))
    moment = torch.randn(5, 3)
    kept = moment.clone()
    slots = {slot.name: slot for slot in RULES.make("adamw").slots}
    moments = {"exp_avg": kept, "exp_avg_sq": kept.square()}
    CARRIES.make("keep")(moments, old.mT @ new, slots, 3, (0.9, 0.999))
    assert torch.equal(moments["exp_avg"], moment)
    CARRIES.make("project")(moments, old.mT @ new, slots, 3, (0.9, 0.999))
    assert torch.allclose(moments["exp_avg"] @ new.mT, moment @ old.mT @ new @ new.mT, atol=1e-6)
    assert torch.equal(moments["exp_avg_sq"], moment.square())
    with pytest.raises(ValueError, match="forget"):
        CARRIES.make("forget")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["right", "left"])
def test_lift_decays_and_moves_in_place(dtype, side):
    w = torch.randn(6, 8).to(dtype)
    a = as_rows(w, side)
    basis, n = torch.randn(a.shape[1], 2), torch.randn(a.shape[0], 2)
    expected = (0.9 * a.float() - 0.5 * n @ basis.mT).to(dtype)
    lift_(a, n, basis, 0.5, 0.9)
    assert torch.allclose(as_rows(w, side).float(), expected.float(), atol=1e-6)


def test_lift_overwrites_uninitialised_memory():
    a = torch.full((3, 4), float("nan"))
    basis, n = torch.randn(4, 2), torch.randn(3, 2)
    lift_(a, n, basis, 1.0, 0.0)
    assert torch.allclose(a, -n @ basis.mT)


def test_project_widens_to_the_basis():
    a, basis = torch.randn(3, 4).bfloat16(), torch.randn(4, 2)
    assert torch.equal(_product(a, basis), a.float() @ basis)


def test_adamw_direction_is_torchs():
    weight = torch.zeros(4, 3, requires_grad=True)
    peer = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.0)
    exp_avg, exp_avg_sq, mine = (torch.zeros(4, 3) for _ in range(3))
    for step in range(1, 6):
        gradient = torch.randn(4, 3)
        weight.grad = gradient.clone()
        peer.step()
        mine -= 0.1 * adamw_direction_(gradient, exp_avg, exp_avg_sq, step, (0.8, 0.95), 1e-4)
        assert torch.allclose(mine, weight, atol=1e-6)
        assert torch.allclose(exp_avg_sq, peer.state[weight]["exp_avg_sq"])


@pytest.mark.parametrize(
    ("shape", "proj_type", "side"),
    [
        ((5, 3), "std", "right"),
        ((3, 3), "std", "right"),
        ((3, 5), "std", "left"),
        ((5, 3), "reverse_std", "left"),
        ((3, 5), "reverse_std", "right"),
        ((5, 3), "left", "left"),
        ((3, 5), "right", "right"),
    ],
)
def test_sides_are_galores(shape, proj_type, side):
    assert projected_side(shape, proj_type) == side


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match="full"):
        projected_side((2, 2), "full")


def test_equal_waves_take_every_wth_matrix():
    assert phases([1] * 20, 100, 8, True) == [0, 33, 66] * 6 + [0, 33]
    assert phases([1] * 20, 100, 8, False) == [0] * 20
    assert phases([1] * 3, 100, 8, True) == [0, 0, 0]
    assert phases([], 100, 8, True) == []


def test_waves_cost_the_same_where_they_are_as_many_as_a_layer_has_matrices():
    layer = [refresh_cost(*shape) for shape in [(512, 512)] * 4 + [(1376, 512)] * 3]
    wave = waves(layer * 8, 8)
    assert max(wave) == 6
    for start in range(0, 56, 7):
        assert sorted(wave[start : start + 7]) == list(range(7))
    loads = [sum(cost for cost, of in zip(layer * 8, wave) if of == w) for w in range(7)]
    assert max(loads) - min(loads) <= layer[-1] - layer[0]


def test_a_matrix_refreshes_at_its_first_step_and_then_in_its_phase():
    assert [t for t in range(12) if is_due(t, 3, 4)] == [0, 3, 7, 11]
