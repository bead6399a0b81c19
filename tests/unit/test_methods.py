"""Rules and selections as pure functions: against references of a few lines, in stacks, and cut over ranks."""

from __future__ import annotations

import itertools
import math
import types

import method_references as references
import pytest
import torch

from ds_lowrank import LowRankConfig
from ds_lowrank.methods import make_method
from ds_lowrank.rules import RULES, Hyper, Stack, Update
from ds_lowrank.selections import SELECTIONS, Key, Sketch
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.layout import Slot, StateLayout, declare

LONG, SHORT, RANK, STEPS, GAP = 24, 10, 4, 20, 7
SETTINGS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
REFERENCES = {
    "adamw": references.AdamW,
    "grams": references.Grams,
    "fira": references.Fira,
    "apollo": references.Apollo,
    "apollo_mini": references.ApolloMini,
}


def bases(number: int, scale: float = 0.03) -> list[torch.Tensor]:
    """Of three refreshes, orthonormal but for what few bits would leave of that."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(3, SHORT, RANK, dtype=torch.float64, generator=generator)
    return list(torch.linalg.qr(drawn).Q + scale * drawn)


def gradients(number: int) -> list[torch.Tensor]:
    """Of growing and of shrinking norms, so that some steps are limited; one row and one step have none."""
    generator = torch.Generator().manual_seed(100 + number)
    drawn = torch.randn(STEPS, LONG, SHORT, dtype=torch.float64, generator=generator)
    drawn *= 10.0 ** torch.linspace(-2, 2, STEPS, dtype=torch.float64).sin()[:, None, None]
    drawn[:, 3] = 0
    drawn[9] = 0
    return list(drawn)


class Cut:
    """Matrices of one shape in one stack, of which each has some rows here."""

    def __init__(self, rule: str, matrices: list[int], rows: slice, alpha: float, dtype: torch.dtype, **options: float):
        self.rule, self.matrices, self.rows, self.dtype = RULES.make(rule), matrices, rows, dtype
        self.options, self.alpha = {**self.rule.options, **options}, alpha
        self.weights = [weight(k)[rows].to(dtype) for k in matrices]
        counts = [len(w) for w in self.weights]
        lengths = {"rows": sum(counts), "matrix": len(matrices)}
        widths = {"r": RANK, 1: 1}
        self.state = {s.name: torch.zeros(lengths[s.axis], widths[s.width], dtype=dtype) for s in self.rule.slots}

    def start(self, step: int):
        """What the rule gives back for a step: an update, or what yields sums first."""
        blocks = [gradients(k)[step][self.rows].to(self.dtype) for k in self.matrices]
        self.gradient = torch.cat(blocks)
        self.bases = [bases(k)[step // GAP].to(self.dtype) for k in self.matrices]
        r = torch.cat([block @ basis for block, basis in zip(blocks, self.bases)])
        # A rank without rows has no basis.
        stack = Stack(
            [len(b) for b in blocks],
            [[b[:5], b[5:]] for b in blocks],
            [basis if len(block) else None for block, basis in zip(blocks, self.bases)],
        )
        hyper = Hyper(**SETTINGS, scale=self.alpha, step=step + 1, options=self.options)
        return self.rule.step(r, self.state, hyper, stack)

    def finish(self, update: Update) -> None:
        """A ← keep A − η (α N Bᵀ + s ⊙ ∇A)."""
        move = torch.zeros_like(self.gradient)
        counts = [len(w) for w in self.weights]
        if update.low is not None:
            lifted = [n @ basis.mT for n, basis in zip(update.low.split(counts), self.bases)]
            move += self.alpha * torch.cat(lifted)
        if update.row_scale is not None:
            assert update.row_scale.shape == (sum(counts),)
            move += update.row_scale[:, None] * self.gradient
        assert (update.low is not None) <= self.rule.lifts
        assert (update.row_scale is not None) <= self.rule.reads_gradient
        keep = 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
        for weight_, part in zip(self.weights, move.split(counts)):
            weight_.mul_(keep).sub_(SETTINGS["lr"] * part)


def weight(number: int) -> torch.Tensor:
    return 0.1 * torch.randn(LONG, SHORT, dtype=torch.float64, generator=torch.Generator().manual_seed(200 + number))


def drive(cuts: list[Cut], steps: int = STEPS) -> None:
    """Step the cuts of one set of matrices in lockstep; what they yield is added up."""
    for step in range(steps):
        waiting = {i: cut.start(step) for i, cut in enumerate(cuts)}
        sent = dict.fromkeys(waiting)
        while waiting:
            yielded = {}
            for i, made in list(waiting.items()):
                if isinstance(made, types.GeneratorType):
                    try:
                        yielded[i] = made.send(sent[i])
                        continue
                    except StopIteration as stop:
                        made = stop.value
                cuts[i].finish(made)
                del waiting[i]
            assert not yielded or len(yielded) == len(cuts), "ranks differ in what they yield"
            assert len({part.shape for part in yielded.values()}) <= 1
            assert all(part.dim() == 1 for part in yielded.values())
            sent = dict.fromkeys(yielded, sum(yielded.values()))


def moved(cut_weights: torch.Tensor, number: int, expected: torch.Tensor) -> float:
    """How far two trajectories lie apart, of the distance that one has moved."""
    return float((cut_weights.double() - expected).norm() / (expected - weight(number)).norm())


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("rule", sorted(REFERENCES))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_rule_is_its_reference(rule, alpha, dtype, bound):
    expected = weight(0)
    reference = REFERENCES[rule](bases(0), gap=GAP, alpha=alpha, **SETTINGS)
    for gradient in gradients(0):
        reference.step(expected, gradient)
    if rule in ("fira", "apollo", "apollo_mini"):
        assert 3 <= reference.state["limited"] < STEPS - 3
    cut = Cut(rule, [0], slice(0, LONG), alpha, dtype)
    drive([cut])
    assert moved(cut.weights[0], 0, expected) <= bound


@pytest.mark.parametrize("rule", sorted(REFERENCES))
def test_a_stack_of_matrices_steps_as_each_alone(rule):
    stacked = Cut(rule, [0, 1, 2], slice(0, LONG), 0.7, torch.float64)
    drive([stacked])
    for number in range(3):
        alone = Cut(rule, [number], slice(0, LONG), 0.7, torch.float64)
        drive([alone])
        assert moved(stacked.weights[number], number, alone.weights[0]) <= 1e-12


@pytest.mark.parametrize("matrices", [[0], [0, 1]])
@pytest.mark.parametrize("rule", sorted(REFERENCES))
def test_rows_over_ranks_step_as_on_one(rule, matrices):
    whole = Cut(rule, matrices, slice(0, LONG), 0.7, torch.float64)
    drive([whole])
    ends = [(0, 7), (7, 7), (7, LONG)]
    cuts = [Cut(rule, matrices, slice(*rows), 0.7, torch.float64) for rows in ends]
    drive(cuts)
    for i, number in enumerate(matrices):
        joined = torch.cat([cut.weights[i] for cut in cuts])
        assert moved(joined, number, whole.weights[i]) <= 1e-12
    if "limiter_norm" in whole.state:  # one number a matrix, the same everywhere
        for cut in cuts:
            assert torch.allclose(cut.state["limiter_norm"], whole.state["limiter_norm"], rtol=1e-12)


@pytest.mark.parametrize("rule", ["fira", "apollo", "apollo_mini"])
def test_a_rank_without_rows_may_keep_no_norm(rule):
    cuts = [Cut(rule, [0], rows, 0.7, torch.float64) for rows in (slice(0, LONG), slice(0, 0))]
    cuts[1].state["limiter_norm"] = torch.zeros(0, 1, dtype=torch.float64)
    drive(cuts, 3)
    assert float(cuts[0].state["limiter_norm"]) > 0


@pytest.mark.parametrize("rule", ["fira", "apollo", "apollo_mini"])
def test_a_norm_that_is_zero_or_infinite_is_not_remembered(rule):
    cut = Cut(rule, [0], slice(0, LONG), 1.0, torch.float64)
    drive([cut], 9)
    before = cut.state["limiter_norm"].clone()
    generator = cut.start(9)  # a gradient of zeros
    total = next(generator)
    with pytest.raises(StopIteration):
        generator.send(total)
    assert torch.equal(cut.state["limiter_norm"], before)
    for last in (before, torch.zeros_like(before)):
        cut.state["limiter_norm"].copy_(last)
        generator = cut.start(10)
        with pytest.raises(StopIteration):
            generator.send(torch.full_like(next(generator), torch.inf))
        assert torch.equal(cut.state["limiter_norm"], last)


@pytest.mark.parametrize("rule", ["fira", "apollo", "apollo_mini"])
def test_the_limiter_bounds_the_growth_by_its_option(rule):
    limits = {}
    for limiter in (1.01, 1.5, float("inf")):
        cut = Cut(rule, [0], slice(0, LONG), 1.0, torch.float64, limiter=limiter)
        norms = []
        for step in range(6):
            cut_norm = cut.state["limiter_norm"]
            drive_one(cut, step)
            norms.append(float(cut_norm))
        limits[limiter] = max(after / before for before, after in itertools.pairwise(norms))
    assert limits[1.01] == pytest.approx(1.01, abs=1e-6)
    assert limits[1.01] < limits[1.5] <= 1.5 + 1e-6
    assert limits[float("inf")] >= limits[1.5]


def drive_one(cut: Cut, step: int) -> None:
    made = cut.start(step)
    total = next(made)
    with pytest.raises(StopIteration) as stop:
        made.send(total)
    cut.finish(stop.value.value)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_grams_of_kept_moments_is_that_of_read_ones(state_dtype):
    rule, formats = RULES.make("grams"), Formats(state_dtype)
    layout = StateLayout(rule.slots, formats)
    kept = {
        key: torch.full((LONG, t.width), t.fill, dtype=t.dtype)
        for key, t in layout.tensors(RANK, torch.float32).items()
    }
    state = {name: layout.read(kept, name, RANK, torch.float32).clone() for name in layout.slots}
    for step in range(1, 4):
        r = torch.randn(LONG, RANK)
        r[2, 1] = 0
        hyper = Hyper(**SETTINGS, scale=1.0, step=step)
        found = rule.kept_step(formats, kept, r.clone(), hyper).low
        expected = rule.step(r.clone(), state, hyper, Stack([LONG])).low
        assert torch.equal(found, expected)
        assert torch.equal(found.sign(), r.sign())
        state = {name: layout.read(kept, name, RANK, torch.float32).clone() for name in layout.slots}


# Selections


def refined(kept: dict, basis: torch.Tensor, sketch: Sketch, step: int, **group: float) -> torch.Tensor:
    selection = SELECTIONS.make("online_pca")
    given = {**SETTINGS, "lr": 0.001, "weight_decay": 0.0, **group}
    return selection.refine(basis, sketch, kept, Hyper(**given, scale=0.7, step=step, options=selection.options))


def sketch_of(gradient: torch.Tensor, basis: torch.Tensor, rows: slice = slice(None)) -> Sketch:
    r = gradient @ basis
    return Sketch((gradient.mT @ r)[rows], r.mT @ r, basis.mT @ basis, gradient.square().sum())


def moments_of(basis: torch.Tensor) -> dict[str, torch.Tensor]:
    return {slot.name: torch.zeros_like(basis) for slot in SELECTIONS.make("online_pca").slots}


def test_the_slope_of_online_pca_is_autograds():
    from ds_lowrank.selections.online_pca import loss_gradient

    gradient, basis = gradients(0)[0], bases(0)[0].requires_grad_()
    unit = gradient / gradient.norm()
    loss = (unit - unit @ basis @ basis.mT).square().sum()
    loss = loss + 0.3 * (basis.mT @ basis - torch.eye(RANK)).square().sum()
    (expected,) = torch.autograd.grad(loss, basis)
    found = loss_gradient(basis.detach(), sketch_of(gradient, basis.detach()), 0.3)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [[SHORT], [3, SHORT - 3]])
def test_online_pca_is_its_reference_however_the_basis_is_cut(cuts):
    start = bases(0)[0]
    reference = references.OnlinePCA(start, lr=0.005, penalty=0.1, weight_decay=0.2)
    parts = [part.clone() for part in start.split(cuts)]
    kept = [moments_of(part) for part in parts]
    for step in range(STEPS):
        gradient = gradients(1)[step]
        if not gradient.any():
            gradient = gradients(2)[step - 1]
        reference(step, gradient)
        whole = torch.cat(parts)
        first = 0
        for i, part in enumerate(list(parts)):
            sketch = sketch_of(gradient, whole, slice(first, first + len(part)))
            parts[i] = refined(kept[i], part.clone(), sketch, step + 1, weight_decay=0.2)
            first += len(part)
    expected = reference.state["p"]
    assert float((torch.cat(parts) - expected).norm() / (expected - start).norm()) <= 1e-12


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e-200])
def test_a_gradient_that_is_zero_or_not_finite_leaves_the_basis(bad):
    basis = bases(0)[0]
    kept = moments_of(basis)
    basis = refined(kept, basis, sketch_of(gradients(0)[0], basis), 1)
    before = [basis.clone(), *(tensor.clone() for tensor in kept.values())]
    gradient = gradients(0)[1]
    gradient[0, 0] = bad
    gradient = gradient if not 0 <= bad < 1 else torch.full_like(gradient, bad)
    after = refined(kept, basis, sketch_of(gradient, basis), 2, weight_decay=0.1)
    assert all(map(torch.equal, before, [after, *kept.values()]))


def test_online_pca_finds_the_subspace_of_a_gradient():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(LONG, RANK, dtype=torch.float64, generator=generator) @ bases(3)[0].mT
    selection = SELECTIONS.make("online_pca")
    basis = selection.draw(Key(0, "w", 0), SHORT, RANK, torch.float64, torch.device("cpu")).vectors
    assert torch.allclose(basis.mT @ basis, torch.eye(RANK, dtype=torch.float64))
    kept = moments_of(basis)
    for step in range(600):
        basis = refined(kept, basis, sketch_of(gradient, basis), step + 1, lr=0.002)
    q = torch.linalg.qr(basis).Q
    assert float((gradient @ q).square().sum() / gradient.square().sum()) > 0.999
    assert torch.allclose(basis.mT @ basis, torch.eye(RANK, dtype=torch.float64), atol=0.05)


def gaussian(key: Key, short: int, r: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return SELECTIONS.make("gaussian").draw(key, short, r, dtype, torch.device("cpu")).vectors


def test_gaussian_numbers_are_independent_and_normal():
    x = gaussian(Key(1, "w", 0), 700, 401).double() * 401**0.5
    count = x.numel()
    assert abs(float(x.mean())) < 4 / count**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(x.pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    assert 4 < float(x.abs().max()) < 6
    for apart in (1, 2, 256, 401, 512, 802):  # of neighbours, of one pair, of rows, of blocks
        flat = x.view(-1)
        assert abs(float((flat[apart:] * flat[:-apart]).mean())) < 4 / count**0.5
        squares = flat.square() - 1
        assert abs(float((squares[apart:] * squares[:-apart]).mean())) < 4 * 2 / count**0.5
    # The law as a whole: Kolmogorov and Smirnov's distance, whose 99.99 % are at 2.23 / sqrt(n).
    ordered = x.view(-1).sort().values
    law = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    assert float((law - torch.arange(1, count + 1) / count).abs().max()) < 2.23 / count**0.5


def test_other_keys_have_other_numbers():
    drawn = [gaussian(key, 50, 60).view(-1).double() * 60**0.5 for key in (
        Key(1, "w", 0), Key(2, "w", 0), Key(1, "v", 0), Key(1, "w", 1))]  # fmt: skip
    products = torch.stack(drawn) @ torch.stack(drawn).mT / 3000
    assert float((products - torch.eye(4)).abs().max()) < 5 * 2**0.5 / 3000**0.5
    assert torch.equal(gaussian(Key(1, "w", 0), 50, 60), gaussian(Key(1, "w", 0), 50, 60))
    assert torch.equal(gaussian(Key(1, "w", 0), 50, 60, torch.float64), gaussian(Key(1, "w", 0), 50, 60).double())


@pytest.mark.parametrize("width", [1, 3, 64])
def test_a_range_of_rows_is_made_alone(width):
    from ds_lowrank.kernels.gaussian import gaussian_rows

    whole = gaussian_rows(12345, (0, 333), width)
    for rows in ((0, 333), (1, 2), (7, 7), (100, 333), (33, 250)):
        assert torch.equal(gaussian_rows(12345, rows, width), whole[slice(*rows)])


def number_at(place: int, key: int) -> float:
    """Of N(0, 1), in whole numbers of Python and double precision."""
    block, within = divmod(place, 2 * 256)
    word = (block * 256 + within % 256) * 0xED5AD4BB + (key & 0xFFFFFFFF) & 0xFFFFFFFF
    word = (word ^ word >> 11) * 0xAC4C1B51 + (key >> 32) & 0xFFFFFFFF
    word = (word ^ word >> 15) * 0x31848BAB & 0xFFFFFFFF
    turn = (word ^ word >> 14) * 0x846CA68B & 0xFFFFFFFF
    signed = word - (word >> 31 << 32)
    radius = math.sqrt(-2 * math.log(min(1.0, signed / 2**32 + 0.5 + 2**-24)))
    return radius * (math.cos if within < 256 else math.sin)(2 * math.pi * turn / 2**32)


@pytest.mark.parametrize("key", [0, 12345, 0x7FEDCBA9_87654321])
@pytest.mark.parametrize("first", [0, 200, 512 * 7, 2**31 - 100, 2**32 - 700])
def test_gaussian_numbers_are_those_of_a_hash_of_their_places(first, key):
    from ds_lowrank.kernels.gaussian import torch_fill_, words

    found = torch.empty(700)
    torch_fill_(found, first, words(key), 1.0)
    expected = torch.tensor([number_at(first + k, key) for k in range(700)])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_gaussian_bases_stretch_as_random_matrices_do():
    """Marchenko and Pastur: the singular values of n × r numbers N(0, 1/n) end at 1 ± sqrt(r / n)."""
    for refresh in range(3):
        values = torch.linalg.svdvals(gaussian(Key(1, "w", refresh), 1024, 256).double() * (256 / 1024) ** 0.5)
        assert float((values[[0, -1]] - torch.tensor([1.5, 0.5])).abs().max()) < 0.04


def test_gaussian_numbers_are_uncorrelated_at_every_distance():
    x = gaussian(Key(3, "w", 0), 1024, 256).view(-1).double() * 16
    count = x.numel()
    for values in (x, (x.square() - 1) / 2**0.5, x.sign()):
        spectrum = torch.fft.rfft(values, 2 * count).abs().square()
        found = torch.fft.irfft(spectrum)[1 : count // 2] / (count - torch.arange(1, count // 2)).sqrt()
        assert float(found.abs().max()) < 6.5  # 131071 normal numbers: 1e-5 of them


@pytest.mark.parametrize("part", [1, 3, 7, 4096])
def test_gaussian_numbers_do_not_depend_on_how_many_are_made_at_once(part):
    from ds_lowrank.kernels.gaussian import torch_fill_, words

    expected, found = torch.empty(5001), torch.empty(5001)
    torch_fill_(expected, 5, words(7 << 50), 1.0)
    torch_fill_(found, 5, words(7 << 50), 1.0, part)
    assert torch.equal(found, expected)


# What goes together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "fira", "selection": "gaussian"}, "needs orthonormal bases"),
        ({"rule": "fira", "selection": "online_pca"}, "needs orthonormal bases"),
        ({"rule": "apollo", "selection": "gaussian", "moments": "project"}, "use moments 'keep'"),
        ({"selection": "online_pca", "moments": "project"}, "use moments 'keep'"),
        ({"selection": "online_pca", "basis_dtype": "int8"}, "use basis_dtype 'fp32'"),
        ({"rule": "fira", "layerwise": True, "accumulation_steps": 2}, "needs the gradient itself"),
        ({"rule": "grams", "rule_options": {"limiter": 1.1}}, "has no option 'limiter'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_method(LowRankConfig(rank=4, **options))


@pytest.mark.parametrize("rule", ["grams", "fira", "apollo", "apollo_mini"])
@pytest.mark.parametrize("selection", ["importance", "random", "gaussian", "online_pca"])
def test_every_other_rule_goes_with_every_selection(rule, selection):
    if rule == "fira" and selection in ("gaussian", "online_pca"):
        pytest.skip("refused, see above")
    method = make_method(LowRankConfig(rank=4, rule=rule, selection=selection))
    assert ("limiter_norm" in method.states.slots) == (rule != "grams")
    assert ("basis" in method.states.slots) == (selection != "gaussian")
    assert ("basis_exp_avg" in method.states.slots) == (selection == "online_pca")


def test_what_a_slot_or_a_selection_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'narrow' turns as R does"):
        declare([Slot("narrow", width=1, turns="linear")])

    class Forgetful(SELECTIONS.make("gaussian").__class__):
        evidence = "gram"

    config = LowRankConfig(selection="gaussian")
    registry = SELECTIONS._classes
    known = registry["gaussian"]
    try:
        registry["gaussian"] = Forgetful
        with pytest.raises(ValueError, match="keeps no basis"):
            make_method(config)
    finally:
        registry["gaussian"] = known
