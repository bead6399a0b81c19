"""A run on threads beside the one-process reference, which is fed the same averaged gradients.

Gradients are given, the same for every layout and any number of ranks: so one reference serves all of them. They have a
decaying spectrum, of full rank unless a case says otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from low_bit import LowBitReference
from safetensors.torch import save_file
from thread_layouts import FLAT, SHARDED, copies_of, place_model
from thread_ranks import gather_objects, run_ranks, this_rank
from torch import Tensor, nn

from ds_lowrank import LowRankAdamW, load_checkpoint
from ds_lowrank.kernels.gaussian import gaussian_rows
from ds_lowrank.layouts.base import Piece
from ds_lowrank.states.formats import Formats

# Methods, and the reference of each: a new one joins every test by being listed.
REFERENCES: dict[str, type[LowBitReference]] = {"adamw": LowBitReference}
RULES = tuple(REFERENCES)
SELECTIONS = ("importance", "dominant", "uniform", "random")
MOMENTS = ("keep", "project")
# Of the other rules and selections those that test_thread_method_layouts.py takes through every layout.
METHODS: dict[str, dict[str, Any]] = {
    "grams": {"rule": "grams"},
    "fira": {"rule": "fira"},
    "apollo": {"rule": "apollo", "selection": "gaussian"},
    "apollo_mini": {"rule": "apollo_mini", "selection": "random"},
    "adamw-gaussian": {"selection": "gaussian"},
    "online_pca": {"selection": "online_pca"},
}

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    # tall, wide, square; sizes that leave every boundary between 2, 3 and 4 ranks in the middle of a row
    "small": ((24, 10), (9, 31), (13, 13), (40, 7), (5, 23)),
    # fewer rows than ranks, so that rows are cut more than once and some ranks compute none
    "thin": ((2, 50), (3, 2), (61, 3)),
    # stacked experts: fewer than ranks, and more; tall and wide
    "experts": ((3, 12, 7), (5, 6, 16)),
    # sides that 2, 3 and 4 divide, for sharding wide matrices by columns
    "columns": ((12, 48), (24, 12), (12, 12), (2, 12, 24)),
    # kernels of convolutions, one matrix each
    "kernels": ((7, 3, 3, 3), (40, 2, 1, 5), (6, 19)),
    # even sizes, as models have them: what 2 and 4 ranks cut is whole rows
    "even": ((16, 16), (48, 16), (16, 48)),
    # LLaMA-60M's sizes, behind a small matrix that puts the boundaries of 2, 3 and 4 ranks in the middle of a row
    "real": ((37, 53), (1376, 512), (512, 1376)),
}
# What is not projected: lengths and sizes of which blocks and rows are cut.
REST: tuple[tuple[int, ...], ...] = ((5,), (130,), (9, 8))


@dataclass(frozen=True)
class Case:
    """One run; what of it does not depend on the ranks makes the reference.

    Attributes:
        layout, ranks: see :mod:`thread_layouts`.
        dtype: ``fp32``, ``fp64`` or ``bf16``: gradients are rounded to bf16, the optimizer's weights are fp32.
        master: with ``bf16``, the weights are fp32; otherwise bf16.
        shapes, layers, r: key of ``SHAPES``, how often these are repeated, rank of the subspaces.
        rule, selection, moments, gap, wave_size, stagger, proj_type, shard_projection, state_dtype, basis_dtype,
            weight_decay, stochastic_rounding, seed, gram_dtype: options of the optimizer.
        groups: how many parameter groups the projected matrices are in.
        steps: optimizer steps.
        directions: in how many directions gradients lie; ``None``: all. Of stacked ones the first has none.
        silent: how many first steps leave layer 0 without a gradient.
        dropped: place in layer 1 of a parameter that has a gradient in steps 1 to 3 only; odd ranks have ``None``, the
            others zeros.
        frozen: steps in which layer 1 is frozen.
        added: step before which the last layer's group is added; until then it is not there.
        columns: FSDP2 shards wide matrices by columns.
        micro: backward passes a step with ``layerwise`` or projected gradients; 0: gradients are given, and matrices
            step in ``step()``.
        gradients, accumulator_dtype: options of the optimizer; projected ones are those of every rank and micro-batch.
        clip: norm to which they are clipped; 0: they are not.
    """

    layout: str = "one"
    ranks: int = 1
    dtype: str = "fp32"
    master: bool = True
    shapes: str = "small"
    layers: int = 3
    r: int = 4
    rule: str = "adamw"
    selection: str = "importance"
    moments: str = "keep"
    gap: int = 3
    wave_size: int = 4
    stagger: bool = True
    proj_type: str = "std"
    shard_projection: bool = True
    state_dtype: str = "fp32"
    basis_dtype: str = "fp32"
    weight_decay: float = 0.1
    stochastic_rounding: bool = False
    seed: int = 3
    groups: int = 1
    steps: int = 7
    directions: int | None = None
    silent: int = 0
    dropped: int | None = None
    frozen: tuple[int, ...] = ()
    added: int = 0
    columns: bool = False
    gram_dtype: str = "float64"
    micro: int = 0
    gradients: str = "full"
    accumulator_dtype: str = "fp32"
    clip: float = 0.0

    @property
    def projects(self) -> bool:
        return self.gradients == "projected"

    @property
    def wide(self) -> torch.dtype:
        """Of the reference's weights."""
        return torch.float64 if self.dtype == "fp64" else torch.float32

    @property
    def weights(self) -> torch.dtype:
        """Of the weights that the optimizer moves."""
        return self.wide if self.master else torch.bfloat16

    @property
    def options(self) -> dict[str, Any]:
        """Of the optimizer."""
        found = {
            "lr": 0.02,
            # With a far smaller one Adam's first step is sign(R), which turns the rounding of an entry near zero into a
            # step of full size.
            "eps": 1e-6,
            "weight_decay": self.weight_decay,
            "update_proj_gap": self.gap,
            "selection": self.selection,
            "moments": self.moments,
            "wave_size": self.wave_size,
            "stagger": self.stagger,
            "proj_type": self.proj_type,
            "shard_projection": self.shard_projection,
            "state_dtype": self.state_dtype,
            "basis_dtype": self.basis_dtype,
            "stochastic_rounding": self.stochastic_rounding,
            "seed": self.seed,
            "gram_dtype": self.gram_dtype,
            "gradient_dtype": "bfloat16" if self.dtype == "bf16" else "auto",
            "layerwise": self.micro > 0 and not self.projects,
            "accumulation_steps": max(1, self.micro),
            "gradients": self.gradients,
            "accumulator_dtype": self.accumulator_dtype,
        }
        found["rule"] = self.rule
        # As benchmarks/cases.py has them: a step of 0.005, and ε as the weights'.
        found["selection_options"] = {"lr_factor": 0.25, "eps": 1e-6} if self.selection == "online_pca" else {}
        return found

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the projected parameters, in the model's order."""
        found = {}
        for layer in range(self.layers):
            for place, shape in enumerate(SHAPES[self.shapes]):
                found[f"layer{layer}_{place}"] = shape
        return found

    @property
    def rest(self) -> dict[str, tuple[int, ...]]:
        """Of the others."""
        return {f"rest{place}": shape for place, shape in enumerate(REST)}

    @property
    def oracle(self) -> Case:
        """Without what must not show."""
        alone = Case()
        if self.projects:  # what ranks and micro-batches there are does show
            layout = self.layout if self.layout in ("ddp", "hsdp") else "fsdp2"
            return replace(
                self, layout=layout, groups=1, shard_projection=True, columns=False, accumulator_dtype="fp32"
            )
        return replace(
            self,
            **{
                key: getattr(alone, key) for key in ("layout", "ranks", "master", "groups", "shard_projection", "micro")
            },
            columns=False,
            stochastic_rounding=False,
        )


def layer_of(name: str) -> int:
    return int(name[5:].partition("_")[0]) if name.startswith("layer") else -1


def _generator(*key: Any) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@cache
def start_of(case: Case) -> dict[str, Tensor]:
    """Weights before the first step."""
    shapes = {**case.matrices, **case.rest}
    drawn = {
        name: torch.randn(shape, dtype=torch.float64, generator=_generator("weight", name)) / math.sqrt(shape[-1])
        for name, shape in shapes.items()
    }
    return {name: w.to(case.weights) for name, w in drawn.items()}


@cache
def gradient_of(case: Case, step: int, name: str) -> Tensor | None:
    """The averaged gradient of a step; ``None``: nobody has one. In the dtype of the reference."""
    shape = {**case.matrices, **case.rest}[name]
    layer = layer_of(name)
    if (step < case.silent and layer == 0) or (step in case.frozen and layer == 1) or step < _born(case, name):
        return None
    if case.dropped is not None and name == f"layer1_{case.dropped}" and step not in (1, 2, 3):
        return None
    generator = _generator("gradient", name, step)
    gradient = 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    if name in case.matrices:
        stack = shape[0] if stacked(shape) else 1
        whole = gradient.view(stack, *_matrix(shape))
        for expert, g in enumerate(whole):
            m, n = g.shape
            g *= (
                torch.logspace(0, -1.5, n, dtype=torch.float64)
                * torch.logspace(0, -0.5, m, dtype=torch.float64)[:, None]
            )
            if case.directions is not None:
                count = min(expert, case.directions) if stacked(shape) else case.directions
                _keep_directions(g, count, generator)
    gradient = gradient.to(case.wide)
    return gradient.bfloat16().to(case.wide) if case.dtype == "bf16" else gradient


@cache
def local_gradient(case: Case, step: int, micro: int, rank: int, name: str) -> Tensor | None:
    """What a micro-batch adds to one rank's own gradient. Not projected ones are the same on all ranks."""
    mean = gradient_of(case, step, name)
    if mean is None or name not in case.matrices:
        return mean if mean is None else mean / case.micro
    own = torch.randn(mean.shape, dtype=torch.float64, generator=_generator("local", name, step, micro, rank))
    spread = float(mean.double().norm()) / math.sqrt(mean.numel())
    local = (mean / case.micro + 0.5 * spread * own.to(mean)).to(mean)
    if case.directions is not None:
        local = mean * float(1 + own.flatten()[0] / 4) / case.micro
    return local.bfloat16().to(mean) if case.dtype == "bf16" else local


def own_or_zeros(case: Case, step: int, micro: int, rank: int, name: str) -> Tensor:
    own = local_gradient(case, step, micro, rank, name)
    return torch.zeros({**case.matrices, **case.rest}[name], dtype=case.wide) if own is None else own


def _keep_directions(g: Tensor, count: int, generator: torch.Generator) -> None:
    """Of sizes that are far apart: vectors of equal singular values are arbitrary."""
    if count < min(g.shape):
        frame = torch.linalg.qr(torch.randn(g.shape[1], max(count, 1), dtype=g.dtype, generator=generator)).Q[:, :count]
        g.copy_((g @ frame * 0.5 ** torch.arange(count)) @ frame.mT)


def _born(case: Case, name: str) -> int:
    return case.added if layer_of(name) == case.layers - 1 else 0


def stacked(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    m, *rest = shape[1:] if stacked(shape) else shape
    return m, math.prod(rest)


def matrix_views(whole: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The projected parameters as the matrices that they are."""
    found = {}
    for name, shape in case.matrices.items():
        if name not in whole:
            continue
        if stacked(shape):
            found.update({f"{name}[{e}]": whole[name][e] for e in range(shape[0])})
        else:
            found[name] = whole[name].view(_matrix(shape))
    return found


# -- the reference ----------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What the reference has after its steps.

    Attributes:
        start, weights: of every parameter, before and after.
        counters: for every step, matrix -> (steps made, refreshes, indices).
        bases: matrix -> basis at the end.
    """

    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    counters: list[dict[str, tuple[int, int, list[int] | None]]]
    bases: dict[str, Tensor]


def expected(case: Case) -> Expected:
    return _expected(case.oracle)


@cache
def _expected(case: Case) -> Expected:
    start = {n: w.to(case.wide) for n, w in start_of(case).items()}
    weights = {n: w.clone() for n, w in start.items()}
    views = matrix_views(weights, case)
    make = partial(
        REFERENCES.get(case.rule, LowBitReference),
        rule=case.rule,
        pca=(0.25, 0.1, 0.9, 0.999, 1e-6),
        gaussian=lambda key, short, r: gaussian_rows(key, (0, short), r),
        lr=case.options["lr"],
        eps=case.options["eps"],
        weight_decay=case.weight_decay,
        gap=case.gap,
        wave_size=case.wave_size,
        stagger=case.stagger,
        selection=case.selection,
        moments=case.moments,
        side=case.proj_type,
        seed=case.seed,
        gradient_dtype=torch.bfloat16 if case.dtype == "bf16" else None,
        formats=Formats(case.state_dtype, case.basis_dtype),
        wire=torch.bfloat16 if case.dtype == "bf16" and case.projects and case.ranks > 1 else None,
        replicas=case.ranks if case.layout == "ddp" else 1,
        copies=copies_of(case.layout, case.ranks),
    )
    everything = {**views, **{n: weights[n] for n in case.rest}}
    reference = make(everything, dict.fromkeys(views, case.r))
    # Until all are there the schedule is that of those that are.
    first = make(everything, {n: case.r for n in views if not _born(case, n.partition("[")[0])})
    counters = []
    matrices = dict(reference.matrices)
    phases = {n: state["phase"] for n, state in matrices.items()}
    for step in range(case.steps):
        for n, state in matrices.items():
            state["phase"] = first.matrices[n]["phase"] if step < case.added and n in first.matrices else phases[n]
        given = {n: gradient_of(case, step, n) for n in weights}
        still = {n for n in case.matrices if (step in case.frozen and layer_of(n) == 1) or step < _born(case, n)}
        whole = {n: torch.zeros_like(weights[n]) if g is None else g for n, g in given.items()}
        reference.matrices = {n: state for n, state in matrices.items() if n.partition("[")[0] not in still}
        if case.projects:
            for micro in range(case.micro):
                local = [{n: own_or_zeros(case, step, micro, k, n) for n in weights} for k in range(case.ranks)]
                local = [{**of_rank, **matrix_views(of_rank, case)} for of_rank in local]
                reference.add(local, syncs=micro == case.micro - 1)
            reference.step_added(min(1.0, case.clip / (reference.norm() + 1e-6)) if case.clip else 1.0)
        else:
            reference.step({**whole, **matrix_views(whole, case)})
        counters.append({n: _counters(state, case.selection) for n, state in matrices.items()})
    return Expected(start, weights, counters, {n: s["basis"] for n, s in matrices.items() if "basis" in s})


def _counters(state: dict[str, Any], selection: str) -> tuple[int, int, list[int] | None]:
    drawn = "indices" in state and state["refreshes"] > 0
    return state["t"], state["refreshes"], state["indices"].tolist() if drawn else None


# -- a run ------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for name, w in weights.items():
            self.register_parameter(name, nn.Parameter(w.clone()))


class Run:
    """A model, its optimizer and its layout on this rank."""

    never_syncs = False  # no backward pass does

    def __init__(self, case: Case, start: dict[str, Tensor] | None = None, steps: int = 0):
        self.case, self.done = case, steps
        self.model = Model(start_of(case) if start is None else start)
        late = [n for n in case.matrices if _born(case, n) > steps]
        groups = [g for g in self._groups(case.groups) if not set(dict(g["params"])) & set(late)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*clamped to.*")
            warnings.filterwarnings("ignore", message=".*rounded to nearest.*")
            self.optimizer = LowRankAdamW(groups, **case.options)
            self.layout = place_model(case.layout, case.ranks, self.model, self.optimizer, **self._placing)
            self.layout.wire = torch.bfloat16 if case.dtype == "bf16" else None
            for parameter in self.model.parameters() if case.micro else ():
                parameter._ddp_ignored = True  # type: ignore[attr-defined]  # as exclude_from_ddp leaves it
            with current(self.layout):
                self.optimizer.ensure_state()

    @property
    def _placing(self) -> dict[str, Any]:
        case = self.case
        if case.layout not in (*FLAT, *SHARDED):
            return {}
        return {
            "columns": case.columns,
            "gradient_dtype": torch.bfloat16 if case.dtype == "bf16" else None,
            "apart": case.state_dtype != "int8",
        }

    def _groups(self, count: int) -> list[dict[str, Any]]:
        """Projected matrices in groups of whole layers, the last of a group of its own where it is added later."""
        named = dict(self.model.named_parameters())
        case = self.case
        names = list(case.matrices)
        cuts = [len(SHAPES[case.shapes]) * (case.layers * k // count) for k in range(count + 1)]
        if case.added:
            cuts = [0, len(names) - len(SHAPES[case.shapes]), len(names)]
        groups: list[dict[str, Any]] = []
        for a, b in itertools.pairwise(cuts):
            kinds = [stacked(case.matrices[n]) if len(case.matrices[n]) > 2 else None for n in names[a:b]]
            if a < b:
                groups.append({"params": [(n, named[n]) for n in names[a:b]], "rank": case.r, "stacked": kinds})
        rest = {"params": [(n, named[n]) for n in case.rest]}
        return [*groups[:-1], rest, groups[-1]] if case.added else [*groups, rest]

    def step(self) -> None:
        """One step on the gradients of its number."""
        case, optimizer = self.case, self.optimizer
        if case.added and self.done == case.added:
            optimizer.add_param_group(self._groups(1)[-1])
            self.layout = self.layout.renewed(optimizer.members, optimizer.param_groups)
            if case.micro:
                with current(self.layout):
                    optimizer.ensure_state()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not (layer_of(name) == 1 and self.done in case.frozen))
        gradients = {n: self._gradient(n) for n in self.layout._members}
        if case.projects:
            self.backward_of_own(gradients)
        elif case.micro:
            self.backward(gradients)
        else:
            self.layout.fill_gradients(gradients)
        self.step_as_filled()

    def backward(self, gradients: dict[str, Tensor | None]) -> None:
        """Backward passes whose gradients add up to these, one a micro-step."""
        for _ in range(self.case.micro):
            total = torch.zeros(())
            for name, parameter in self.model.named_parameters():
                gradient = gradients[name]
                if gradient is not None:
                    total = total + (parameter * self.layout.to_local(name, gradient)).sum() / self.case.micro
            with current(self.layout):
                total.backward()

    def backward_of_own(self, gradients: dict[str, Tensor | None], passes: int | None = None) -> None:
        """Backward passes of this rank's own gradients, of which the last syncs; then those that are not projected."""
        case = self.case.oracle
        for micro in range(self.case.micro if passes is None else passes):
            self.layout.syncing = micro == self.case.micro - 1 and not self.never_syncs
            total = torch.zeros(())
            for name in case.matrices:
                own = local_gradient(case, self.done, micro, this_rank(), name)
                if own is None and not self._forgets(name):
                    own = own_or_zeros(case, self.done, micro, this_rank(), name)
                if own is not None and name in self.layout._members and self._trained(name):
                    total = total + (self.layout.leaf(name) * own.to(self.case.weights)).sum()
            with current(self.layout):
                if total.requires_grad:
                    total.backward()
        self.layout.fill_gradients({n: gradients[n] for n in self.case.rest})

    def _trained(self, name: str) -> bool:
        return not (layer_of(name) == 1 and self.done in self.case.frozen)

    def step_as_filled(self) -> None:
        """One step on the gradients that lie there."""
        with current(self.layout), self.layout.calls(self.optimizer) as calls:
            if self.case.clip:
                self.optimizer.clip_grad_norm_(self.case.clip)
            for _ in calls:
                self.optimizer.step()
        if self.case.micro:
            self.optimizer.zero_grad()
        self.done += 1

    def _gradient(self, name: str) -> Tensor | None:
        gradient = gradient_of(self.case.oracle, self.done, name)
        if gradient is not None:
            return gradient.to(self.case.weights)
        if self._forgets(name):
            return None
        return torch.zeros({**self.case.matrices, **self.case.rest}[name], dtype=self.case.weights)

    def _forgets(self, name: str) -> bool:
        """Whether this rank has no gradient where others have zeros."""
        return self.case.layout in SHARDED and this_rank() % 2 == 1

    def pieces(self) -> dict[str, tuple[Piece, Tensor]]:
        layout = self.layout
        return {name: (piece, layout.weight(name).detach().clone()) for name, piece in layout.pieces.items()}

    def states(self) -> dict[str, dict[str, Any]]:
        """Of this rank, by matrix."""
        return self.optimizer.state["lowrank"]  # type: ignore[index]

    def counters(self) -> dict[str, tuple[int, int, list[int] | None]]:
        """As :class:`Expected` has them; without indices where this rank computes nothing."""
        drawn = self.case.selection in ("dominant", "importance", "uniform")
        return {
            n: (
                s["step"],
                s["refreshes"],
                s["indices"].tolist() if drawn and s["refreshes"] and "indices" in s else None,
            )
            for n, s in self.states().items()
        }


@contextlib.contextmanager
def current(layout: Any) -> Iterator[None]:
    """``find_layout`` finds this one on this thread."""
    found.layout = layout
    try:
        yield
    finally:
        found.layout = None


class _Found(threading.local):
    layout: Any = None


found = _Found()


def found_layout(members: Any, groups: Any) -> Any:
    return found.layout


@dataclass
class Result:
    """What a run on all ranks has come to.

    Attributes:
        deviation: largest over the matrices and other parameters of ‖W − W_ref‖ / ‖W_ref − W_0‖.
        basis_deviation: largest ‖B − B_ref‖_F / √r.
        counters: steps, refreshes and indices that are not the reference's, at any step on any rank; the first three.
        replicas_equal: weights bitwise equal on ranks that hold the same.
        shared, moved: matrices that lie on several ranks, and of which rows move.
        weights: of every parameter.
        refreshes: fewest of a matrix.
    """

    deviation: float
    basis_deviation: float
    counters: list[str]
    replicas_equal: bool
    shared: int
    moved: int
    weights: dict[str, Tensor]
    refreshes: int


def run_case(case: Case) -> Result:
    """Run a case on its ranks, and compare it with the reference."""
    answers = run_ranks(case.ranks, _run_rank, case)
    wanted = expected(case)
    wrong = []
    for rank, (_, _, counted, *_) in enumerate(answers):
        for step, (mine, right) in enumerate(zip(counted, wanted.counters)):
            for name, (steps, refreshes, indices) in mine.items():
                if (steps, refreshes) != right[name][:2] or (indices is not None and indices != right[name][2]):
                    wrong.append(f"rank {rank}, step {step}, {name}: {mine[name]}, not {right[name]}")
    weights, equal = joined([pieces for pieces, *_ in answers], case, answers[0][3])
    rows = whole_rows([states for _, states, *_ in answers])
    bases = {n: rows[f"{n} basis"] for n in wanted.bases if case.basis_dtype == "fp32" and f"{n} basis" in rows}
    far = [float((basis - wanted.bases[n]).norm()) / math.sqrt(basis.shape[1]) for n, basis in bases.items()]
    return Result(
        deviation(weights, wanted, case),
        max(far, default=0.0),
        wrong[:3],
        equal,
        answers[0][4],
        answers[0][5],
        weights,
        min((refreshes for _, refreshes, _ in wanted.counters[-1].values()), default=0),
    )


def _run_rank(case: Case) -> tuple[Any, ...]:
    run = Run(case)
    counted = []
    for _ in range(case.steps):
        run.step()
        counted.append(run.counters())
    plans = run.optimizer.plans
    sharing = sum(p.shared for p in plans), sum(p.moves for p in plans)
    return run.pieces(), run.states(), counted, run.layout.ranks.copy, *sharing


def deviation(weights: dict[str, Tensor], wanted: Expected, case: Case) -> float:
    """Per matrix, relative to how far it went; what should not move at all must not."""
    worst = 0.0
    ends, firsts, there = (
        {**matrix_views(w, case), **{n: w[n] for n in case.rest}} for w in (wanted.weights, wanted.start, weights)
    )
    for name, end in ends.items():
        off, distance = float((there[name].to(end) - end).norm()), float((end - firsts[name]).norm())
        worst = max(worst, off / distance if distance else math.inf * off if off else 0.0)
    return worst


def joined(
    gathered: list[dict[str, tuple[Piece, Tensor]]], case: Case, copy: tuple[int, ...]
) -> tuple[dict[str, Tensor], bool]:
    """Whole parameters from the pieces of all ranks, and whether what several hold is bitwise equal."""
    shapes = {**case.matrices, **case.rest}
    equal, whole = True, {}
    for name, shape in shapes.items():
        copies: dict[int, Tensor] = {}
        for rank, table in enumerate(gathered):
            if name not in table:
                continue
            piece, values = table[name]
            key = rank if case.layout == "ddp" else copy[rank]
            target = copies.setdefault(key, torch.full(shape, float("nan"), dtype=values.dtype))
            if piece.dim is None:
                target.view(-1)[piece.start : piece.stop] = values
            else:
                part = target.narrow(piece.dim, piece.start, piece.stop - piece.start)
                part.copy_(values.view(part.shape))
        first, *others = copies.values()
        assert not first.isnan().any(), f"{name}: no rank holds all of it, or it is NaN"
        equal = equal and all(torch.equal(first, other) for other in others)
        whole[name] = first
    return whole, equal


def whole_rows(states: list[dict[str, dict[str, Any]]]) -> dict[str, Tensor]:
    """``matrix key`` -> what all ranks keep together; what several keep must be equal, bit by bit."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    single: dict[str, Tensor] = {}
    for table in states:
        for name, state in table.items():
            for key, value in state.items():
                if key in ("row", "basis_row", "left"):
                    continue
                if not isinstance(value, Tensor) or key in ("indices", "overlaps", "limiter_norm"):
                    known = single.setdefault(f"{name} {key}", torch.as_tensor(value).clone())
                    assert torch.equal(known, torch.as_tensor(value)), f"ranks keep different {key} of {name}"
                else:
                    at = state["basis_row" if key.startswith("basis") else "row"]
                    parts.setdefault(f"{name} {key}", []).append((at, value))
    for key, rows in parts.items():
        size = max(at + len(value) for at, value in rows)
        whole = rows[0][1].new_zeros(size, *rows[0][1].shape[1:])
        covered = torch.zeros(size, dtype=torch.bool)
        for at, value in rows:
            there = whole[at : at + len(value)]
            seen = covered[at : at + len(value)]
            assert torch.equal(there[seen], value[seen]), f"ranks keep different rows of {key}"
            there.copy_(value)
            seen.fill_(True)
        assert covered.all(), f"rows of {key} are on no rank"
        single[key] = whole
    return single


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save(run: Run, folder: Path) -> None:
    """The files that the layout's framework writes; of FSDP2 whole tensors. Collective."""
    case, optimizer, rank = run.case, run.optimizer, this_rank()
    if case.layout in FLAT:
        flats = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        packed = optimizer.state_dict()
        masters = [flat.detach().clone() for flat in flats]
        if case.layout == "zero3":
            content = {"fp32_flat_groups": masters, "optimizer_state_dict": packed}
        else:
            content = {"single_partition_of_fp32_groups": masters, "base_optimizer_state": packed}
        tag = folder / f"global_step{run.done}"
        tag.mkdir(parents=True, exist_ok=True)
        torch.save({"optimizer_state_dict": content}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        (folder / "latest").write_text(tag.name)
        return
    optimizer.consolidate_state_dict()
    weights = {n: run.layout.to_whole(n, p.detach()) for n, p in run.model.named_parameters()}
    packed = whole_state_dict(run) if case.layout in SHARDED or rank == 0 else None
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        sharded = case.layout in SHARDED
        if sharded:
            torch.save(weights, folder / "pytorch_model_fsdp.bin")
        else:
            save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors")
        torch.save(packed, folder / ("optimizer.bin" if sharded else "optimizer.pt"))


def whole_state_dict(run: Run) -> dict[str, Any]:
    """``state_dict()`` with whole tensors. Collective under FSDP2."""
    packed = _each_moment(run, run.optimizer.state_dict(), run.layout.to_whole)
    state = {k: {n: run.layout.whole(v) for n, v in entry.items()} for k, entry in packed["state"].items()}
    return {**packed, "state": state}


def _each_moment(run: Run, packed: dict[str, Any], turn: Any) -> dict[str, Any]:
    """AdamW's moments of what is not projected, as torch keeps them, brought into another form."""
    names = [n for group in packed["param_groups"] for n in group["param_names"]]
    state = dict(packed["state"])
    for key, name in zip([k for group in packed["param_groups"] for k in group["params"]], names):
        if name in run.case.rest and key in state and "exp_avg" in state[key]:
            state[key] = {k: turn(name, v) if k != "step" else v.clone() for k, v in state[key].items()}
    return {**packed, "state": state}


def load_natively(run: Run, folder: Path) -> None:
    """What the same layout on as many ranks has saved, by the framework's own way: ``load_state_dict``."""
    optimizer, rank = run.optimizer, this_rank()
    if run.case.layout in FLAT:
        tag = folder / (folder / "latest").read_text()
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        content = torch.load(tag / name, weights_only=True)["optimizer_state_dict"]
        packed = content.get("base_optimizer_state", content.get("optimizer_state_dict"))
        masters = content.get("single_partition_of_fp32_groups", content.get("fp32_flat_groups"))
        flats = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        for flat, master in zip(flats, masters, strict=True):
            flat.data.copy_(master)
    else:
        sharded = run.case.layout in SHARDED
        packed = torch.load(folder / ("optimizer.bin" if sharded else "optimizer.pt"), weights_only=True)
        packed = _each_moment(run, packed, run.layout.to_local)
        if sharded:
            weights = torch.load(folder / "pytorch_model_fsdp.bin", weights_only=True)
        else:
            from safetensors.torch import load_file

            weights = load_file(folder / "model.safetensors")
        for name, parameter in run.model.named_parameters():
            parameter.data.copy_(run.layout.to_local(name, weights[name]))
    optimizer.load_state_dict(packed)
    optimizer.ensure_state()


def load_anywhere(run: Run, folder: Path) -> None:
    """By name, from whatever layout on however many ranks."""
    load_checkpoint(folder, run.model, run.optimizer)


def everything(run: Run) -> dict[str, Tensor]:
    """All that has to survive, put together from all ranks, on rank 0 (elsewhere nothing). Collective."""
    case, layout = run.case, run.layout
    state = run.optimizer.state
    moments: dict[str, tuple[Piece, dict[str, Tensor]]] = {}
    parts = getattr(run.optimizer.full_rank, "parts", layout)  # under DDP each rank has some
    for name in case.rest:
        if name not in parts.pieces:
            continue
        if "adamw" in state:
            kept = {k: v for k, v in state["adamw"][name].items() if k.startswith("exp_avg")}
            moments[name] = parts.pieces[name], {**kept, "step": state["adamw"][name]["step"].reshape(1)}
        elif case.state_dtype != "int8":
            tensor, offset = layout.place(name)
            numel = layout.weight(name).numel()
            kept = {k: v.reshape(-1)[offset : offset + numel] for k, v in state[tensor].items() if k != "step"}
            moments[name] = layout.pieces[name], {**kept, "step": state[tensor]["step"].reshape(1)}
        else:
            # The scales of cut blocks are on several ranks: those show in the next step.
            kept = state["adamw8bit"][name]
            codes = {key: kept[key] for key in ("exp_avg_codes", "exp_avg_sq_codes")}
            moments[name] = parts.pieces[name], {**codes, "step": torch.tensor([kept["step"]])}
    told = gather_objects((run.pieces(), run.states(), moments, layout.ranks.copy))
    if this_rank():
        return {}
    whole = whole_rows([states for _, states, *_ in told])
    whole.update({f"{n} weight": w for n, w in joined([p for p, *_ in told], case, told[0][3])[0].items()})
    for _, _, table, _ in told:
        for name, (piece, kept) in table.items():
            for key, values in kept.items():
                if key == "step":
                    whole[f"{name} step"] = values
                    continue
                size = math.prod(case.rest[name])
                target = whole.setdefault(f"{name} {key}", torch.zeros(size, dtype=values.dtype))
                if piece.dim is None:
                    target[piece.start : piece.stop] = values
                else:
                    part = target.view(case.rest[name]).narrow(piece.dim, piece.start, piece.stop - piece.start)
                    part.copy_(values.view(part.shape))
    return whole
