"""The references of the papers' methods by themselves: where a method must fall together with one that is known."""

import math
from itertools import pairwise

import pytest
import torch
from method_references import AdamW, Apollo, ApolloMini, Fira, Grams, OnlinePCA, online_pca_gradient

SHAPES = [(12, 6), (6, 12), (8, 8)]
EPS = 1e-10
UNCORRECTED = 0.1 / math.sqrt(0.001)  # (1 − β1) / √(1 − β2): a first step's N beside N̂


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthonormal(short: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(matrix(short, r)).Q


def run(method, shape: tuple[int, int], steps: int = 8, gradients=None) -> torch.Tensor:
    """What ``method`` makes of a fixed start and fixed gradients."""
    torch.manual_seed(1)
    weight = matrix(*shape)
    for k in range(steps):
        gradient = matrix(*shape)
        method.step(weight, gradient if gradients is None else gradients[k])
    return weight


def full_adamw(shape: tuple[int, int], steps: int = 8, **settings) -> torch.Tensor:
    torch.manual_seed(1)
    weight = torch.nn.Parameter(matrix(*shape))
    optimizer = torch.optim.AdamW([weight], **settings)
    for _ in range(steps):
        weight.grad = matrix(*shape)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [AdamW, Fira])
def test_with_the_whole_space_and_its_own_axes_it_is_adamw(method, shape):
    """B = I has no residual, so Fira too is what torch makes of the full gradient."""
    settings = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    ours = run(method([torch.eye(min(shape), dtype=torch.float64)], **settings), shape)
    torch.testing.assert_close(ours, full_adamw(shape, **settings), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_in_a_whole_rotated_space_is_adamw_there(shape):
    basis = orthonormal(min(shape), min(shape))
    assert torch.allclose(run(Fira([basis], lr=0.01), shape), run(AdamW([basis], lr=0.01), shape), atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_fira_is_adamw_and_a_residual(shape, alpha):
    """At the first step N̂ is sign(R): φ is √r / |R| a row, and nothing is limited yet.

    The residual is G − α R Bᵀ, outside of the subspace for α = 1 alone. The norm kept is that before bias correction.
    """
    torch.manual_seed(0)
    basis, gradient, start = orthonormal(min(shape), 3), matrix(*shape), matrix(*shape)
    fira, adamw = start.clone(), start.clone()
    method = Fira([basis], lr=1.0, eps=EPS, alpha=alpha)
    method.step(fira, gradient)
    AdamW([basis], lr=1.0, eps=EPS, alpha=alpha).step(adamw, gradient)
    beside, g = (adamw - fira, gradient) if shape[0] >= shape[1] else ((adamw - fira).T, gradient.T)
    phi = math.sqrt(3) / (g @ basis).norm(dim=1, keepdim=True)
    torch.testing.assert_close(beside, phi * (g - alpha * g @ basis @ basis.T), rtol=1e-6, atol=1e-6)
    assert ((beside @ basis).abs().max() < 1e-6) == (alpha == 1)
    assert float(method.state["norm"]) == pytest.approx(UNCORRECTED * float(beside.norm()), rel=1e-6)


def test_the_limiter_lets_a_norm_grow_by_a_hundredth_a_step():
    torch.manual_seed(0)
    direction, weight = matrix(12, 6), matrix(12, 6)
    apollo = Apollo([matrix(6, 3)], eps=1e3)  # beside so large an ε the scaled gradient grows as the gradient does
    norms = []
    for k in range(4):
        apollo.step(weight, 10.0**k * direction)
        norms.append(float(apollo.state["norm"]))
    assert [b / a for a, b in pairwise(norms)] == pytest.approx([1.01] * 3, rel=1e-4)  # 1e-8 stand beside the norm
    assert apollo.state["limited"] == 3
    before = apollo.state["norm"]
    apollo.step(weight, torch.zeros(12, 6, dtype=torch.float64))
    assert apollo.state["norm"] == before  # zeros are not remembered


def test_the_limiter_is_blind_to_what_does_not_grow():
    """With β = 0 N is sign(R), and φ makes the residual blind to the gradient's size."""
    torch.manual_seed(0)
    fira, weight, direction = Fira([orthonormal(6, 3)], betas=(0.0, 0.0)), matrix(12, 6), matrix(12, 6)
    norms = []
    for k in range(4):
        fira.step(weight, 10.0**k * direction)
        norms.append(float(fira.state["norm"]))
    assert norms == pytest.approx([norms[0]] * 4)
    assert fira.state["limited"] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_whose_projection_is_the_identity_scales_rows_as_adam_would(shape):
    """P = I, first step: N is sign(G), so a row moves along G by √short, and Mini's matrix by √(long · short)."""
    torch.manual_seed(0)
    gradient, long, short = matrix(*shape), max(shape), min(shape)
    g = gradient if shape[0] >= shape[1] else gradient.T
    for method, expected in (
        (Apollo, math.sqrt(short) * g / g.norm(dim=1, keepdim=True)),
        (ApolloMini, math.sqrt(long * short) * g / g.norm()),
    ):
        weight = torch.zeros(shape, dtype=torch.float64)
        apollo = method([torch.eye(short, dtype=torch.float64)], lr=1.0, alpha=2.0, eps=EPS)
        apollo.step(weight, gradient)
        moved = -weight if shape[0] >= shape[1] else -weight.T
        torch.testing.assert_close(moved, 2 * expected, rtol=1e-6, atol=1e-6)
        assert float(apollo.state["norm"]) == pytest.approx(UNCORRECTED * float(expected.norm()), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_grams_moves_as_far_as_adam_and_never_against_the_gradient(shape):
    torch.manual_seed(0)
    gradients = [matrix(*shape) for _ in range(6)]
    basis = torch.eye(min(shape), dtype=torch.float64)
    adamw, grams, turned = AdamW([basis], lr=1.0), Grams([basis], lr=1.0), 0
    for gradient in gradients:
        moves = []
        for method in (adamw, grams):
            weight = torch.zeros(shape, dtype=torch.float64)
            method.step(weight, gradient)
            moves.append(-weight)
        torch.testing.assert_close(moves[1].abs(), moves[0].abs())
        assert (moves[1] * gradient >= 0).all()
        turned += int((moves[0] * gradient < 0).sum())
    assert turned > 0  # Adam does go against it somewhere, so there was something to turn


@pytest.mark.parametrize("method", [AdamW, Fira, Apollo, ApolloMini, Grams])
def test_conventions_agree_where_epsilon_and_decay_vanish(method):
    """And each makes a difference where they do not."""
    torch.manual_seed(0)
    basis = orthonormal(6, 3)
    small, large = ({"lr": 0.01, "eps": eps, "weight_decay": decay} for eps, decay in ((1e-14, 0.0), (1e-3, 0.1)))
    plain, marked = (run(method([basis], **settings), (12, 6)) for settings in (small, large))
    for convention in ({"raw_eps": True}, {"decay_last": True}):
        assert torch.allclose(run(method([basis], **small, **convention), (12, 6)), plain, atol=1e-10)
        assert not torch.allclose(run(method([basis], **large, **convention), (12, 6)), marked, atol=1e-6)


@pytest.mark.parametrize("size", [(12, 6, 3), (6, 6, 6), (8, 5, 1)])
def test_online_pcas_gradient_is_autograds(size):
    """From S, T and ‖G‖² alone, for a basis that is not orthonormal."""
    torch.manual_seed(0)
    long, short, r = size
    g, p, penalty = 3 * matrix(long, short), matrix(short, r).requires_grad_(), 0.7
    scaled = g / g.norm()
    loss = (scaled - scaled @ p @ p.T).square().sum()
    loss = loss + penalty * (p.T @ p - torch.eye(r, dtype=torch.float64)).square().sum()
    (expected,) = torch.autograd.grad(loss, p)
    p = p.detach()
    projected = g @ p
    slope = online_pca_gradient(p, g.T @ projected, projected.T @ projected, g.square().sum(), penalty)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("betas", [None, (0.9, 0.999)])
def test_online_pca_steps_as_torchs_optimizers_do(betas):
    torch.manual_seed(0)
    start, gradients = orthonormal(6, 3), [matrix(12, 6) for _ in range(5)]
    ours = OnlinePCA(start, lr=0.05, penalty=0.3, betas=betas, eps=1e-3, weight_decay=0.1)
    p = torch.nn.Parameter(start.clone())
    if betas is None:
        theirs: torch.optim.Optimizer = torch.optim.SGD([p], lr=0.05)
    else:
        theirs = torch.optim.AdamW([p], lr=0.05, betas=betas, eps=1e-3, weight_decay=0.1)
    for k, g in enumerate(gradients):
        assert torch.allclose(ours(k, g), p, atol=1e-12)  # the basis of before
        scaled = g / g.norm()
        loss = (scaled - scaled @ p @ p.T).square().sum()
        (p.T @ p - torch.eye(3, dtype=torch.float64)).square().sum().mul(0.3).add(loss).backward()
        if betas is None:  # SGD's own weight_decay is the same thing, decoupled or not
            p.grad += 0.1 * p.detach()
        theirs.step()
        p.grad = None


def test_online_pca_finds_the_subspace_that_gradients_share():
    """The captured energy of gradients of one 3-dimensional row space rises to all of it."""
    torch.manual_seed(0)
    space = orthonormal(8, 3)
    basis = OnlinePCA(orthonormal(8, 3), lr=0.05, penalty=1.0)
    method, weight = AdamW(basis, gap=1), matrix(16, 8)
    for _ in range(300):
        method.step(weight, matrix(16, 3) @ space.T)
    q = torch.linalg.qr(basis.state["p"]).Q
    assert float((q.T @ space).square().sum() / 3) > 0.99


def test_bases_follow_refreshes():
    """A list has one basis a refresh, a function sees its number and the gradient of A."""
    seen = []

    def bases(refresh: int, g: torch.Tensor) -> torch.Tensor:
        seen.append((refresh, tuple(g.shape)))
        return listed[refresh]

    torch.manual_seed(0)
    listed = [orthonormal(6, 2) for _ in range(3)]
    by_function = run(AdamW(bases, gap=3), (6, 12))
    assert seen == [(0, (12, 6)), (1, (12, 6)), (2, (12, 6))]
    assert torch.equal(by_function, run(AdamW(listed, gap=3), (6, 12)))
