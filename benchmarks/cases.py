"""A model and a run that compare the optimizer, under every framework, with the one-process reference.

The model is a set of linear regressions whose data depend on (rank, micro-step): gradients differ between ranks, have a
decaying spectrum and full rank, and depend on the weights. The reference is fed the gradient that the framework
delivered (averaged, accumulated, clipped); a second one runs freely on gradients of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from harness import Run, start, whole
from low_bit import LowBitReference
from regressions import SHAPES, Regressions
from storage import state_bytes
from torch import Tensor

from ds_lowrank.engine.bases import Bases
from ds_lowrank.kernels.gaussian import gaussian_rows
from ds_lowrank.layouts import Piece
from ds_lowrank.optimizer import STATE_KEY, LowRankAdamW
from ds_lowrank.plan.geometry import matrix_shape
from ds_lowrank.reference import Reference

# Of online_pca. The basis moves by 0.005 a step, as the paper's does (5 × 0.001): by five times the rate of these runs,
# 0.1, its entries would go back and forth by more than their size. ε as the weights' below.
PCA = {"lr_factor": 0.25, "eps": 1e-6}

# Rules and selections that the package does not have, and what follows them.
REFERENCES: dict[str, type[LowBitReference]] = {}

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        layout: one of ``harness.LAYOUTS``.
        dtype: ``fp32``, ``bf16`` (computation; the optimizer's weights are fp32) or ``fp64`` (not under DeepSpeed).
        shapes: key of ``SHAPES``.
        layers: how often the shapes are repeated; 5 divides by none of 2, 3, 4 ranks, so matrices are cut.
        rank: r.
        rule, selection, moments, gap, wave_size, proj_type, shard_projection: options of the optimizer.
        state_dtype, basis_dtype: of the optimizer; the reference rounds what it keeps to them.
        master: with ``bf16``, the optimizer's weights are fp32; otherwise there are bf16 weights alone.
        stochastic_rounding: of weights without a master; the reference knows nothing of it.
        steps: optimizer steps.
        accumulation: micro-steps a step.
        clip: gradient norm.
        weight_decay: λ.
        directions: in how many directions a matrix's inputs lie, the same on all ranks, which changes from step to
            step; ``None``: in all. Of stacked experts the first gets no input and the second one direction.
        silent: how many first steps leave layer 0 without a gradient.
        dropped: name of a parameter whose gradient odd ranks lose before every step; the reference sees zeros there.
        targets: ``optim_target_modules``; all by name, since ``all-linear`` leaves out what is not larger than r.
        wide_on_columns: FSDP2 shards matrices along the side that suits the projection.
        offload: weights and states on the CPU.
        layerwise: step in the backward pass.
        gradients, accumulator_dtype: of the optimizer; see ``projected_cases`` for what follows projected ones.
        zero: further keys of ``zero_optimization``.
        config: further top-level keys.
    """

    layout: str = "zero2"
    dtype: str = "fp32"
    shapes: str = "small"
    layers: int = 5
    rank: int = 4
    rule: str = "adamw"
    selection: str = "importance"
    moments: str = "keep"
    gap: int = 4
    wave_size: int = 4
    proj_type: str = "std"
    shard_projection: bool = True
    state_dtype: str = "fp32"
    basis_dtype: str = "fp32"
    master: bool = True
    stochastic_rounding: bool = False
    steps: int = 10
    accumulation: int = 2
    clip: float = 0.3
    weight_decay: float = 0.1
    directions: int | None = None
    silent: int = 0
    dropped: str | None = None
    targets: str = "layers"
    wide_on_columns: bool = False
    offload: bool = False
    layerwise: bool = False
    gradients: str = "full"
    accumulator_dtype: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def model_dtype(self) -> torch.dtype:
        """Of the model before any framework has it: ZeRO keeps an fp32 master of bf16 weights unless told otherwise."""
        if self.dtype == "fp64":
            return torch.float64
        narrow = self.layout.startswith("zero") or not self.master
        return torch.bfloat16 if self.dtype == "bf16" and narrow else torch.float32

    @property
    def gradient_dtype(self) -> torch.dtype | None:
        """In which gradients are computed, where it is narrower than what they come in."""
        return torch.bfloat16 if self.dtype == "bf16" else None

    @property
    def options(self) -> dict[str, Any]:
        """Of the optimizer."""
        return {
            "rank": self.rank,
            "optim_target_modules": self.targets,
            "update_proj_gap": self.gap,
            "rule": self.rule,
            "selection": self.selection,
            "selection_options": dict(PCA) if self.selection == "online_pca" else {},
            "moments": self.moments,
            "proj_type": self.proj_type,
            "wave_size": self.wave_size,
            "shard_projection": self.shard_projection,
            "state_dtype": self.state_dtype,
            "basis_dtype": self.basis_dtype,
            "stochastic_rounding": self.stochastic_rounding,
            "seed": 3,
            "gram_dtype": "float64",
            # Of autocast the optimizer has to be told.
            "gradient_dtype": "bfloat16" if self.dtype == "bf16" and self.layout in ("one", "ddp") else "auto",
            "lr": 0.02,
            # The default. With a far smaller one Adam's first step is sign(R), which turns the rounding of an entry
            # near zero into a step of full size: free-running trajectories would differ by chance.
            "eps": 1e-6,
            "weight_decay": self.weight_decay,
            "layerwise": self.layerwise,
            "accumulation_steps": self.accumulation,
            "gradients": self.gradients,
            "accumulator_dtype": self.accumulator_dtype,
        }


def brief(ranks: int, **settings: Any) -> Case:
    """A case for a test: three refreshes of every matrix and matrices cut, in as few steps and layers as that takes."""
    return Case(**{"gap": 3, "steps": 7, "layers": 4 if ranks == 3 else 3, **settings})


def build_model(case: Case) -> Regressions:
    """The same model on every rank, whatever the global generator says.

    Where two singular values nearly coincide their vectors, and so a free-running trajectory, are up to rounding. The
    seed is one with which that does not happen on 1-4 ranks: in fp32 a run stays within 5e-6 of the reference.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Regressions(SHAPES[case.shapes], case.layers).to(case.model_dtype)


def run_case(case: Case, with_free: bool = True) -> dict[str, Any]:
    """Train under the case's framework on all ranks beside the references. Collective; rank 0's answer is complete.

    Returns:
        On rank 0 ``deviation`` and ``free_deviation``: largest over the parameters of ‖W − W_ref‖ / ‖W_ref − W_0‖, fed
        and free-running; ``ranks_equal``: indices and bases that were ever used are equal on all ranks, indices and
        counters equal to the reference's; ``basis_deviation``: largest ‖B − B_ref‖_F / √r; ``replicas_equal``: weights
        bitwise equal on ranks that hold the same; ``refreshes``: fewest of a matrix; ``state_bytes``; ``shared`` and
        ``moved``: matrices that lie on several ranks, of which rows move; ``sent``: bytes by purpose;
        ``model_equal``: the model computes with the weights that the optimizer moves.
    """
    rank = dist.get_rank()
    torch.manual_seed(1000 + rank)  # nothing may depend on the global generator
    run = start(case, build_model(case))
    optimizer = run.optimizer
    # The references run on rank 0: the others' cores are needed there.
    fed = Follower(case, optimizer, free=False) if rank == 0 else None
    free = Follower(case, optimizer, free=True) if rank == 0 and with_free else None
    delivered: dict[str, tuple[Piece, Tensor]] = {}
    _record_gradients(case, optimizer, delivered)
    equal, basis_deviation = True, 0.0
    for step in range(case.steps):
        delivered.clear()
        run.step([arguments(case, step, micro, rank) for micro in range(case.accumulation)])
        given = at_first(delivered)
        if fed is not None:
            fed.step(_joined(optimizer, given)[0])
        if free is not None:
            free.step(free.own_gradients(step, dist.get_world_size()))
        # A basis lives for a period: compared in every second step, none is missed.
        if step % min(2, case.gap) == 0 or step == case.steps - 1:
            same, far = agree(optimizer, fed.reference if fed is not None else None)
            equal, basis_deviation = same and equal, max(far, basis_deviation)
    final, replicas_equal = assemble(optimizer, held(optimizer))
    states: dict[str, Any] = optimizer.state[STATE_KEY]  # type: ignore[index]
    result = {
        "deviation": None if fed is None else fed.deviation(final),
        "free_deviation": None if free is None else free.deviation(final),
        "ranks_equal": equal,
        "basis_deviation": basis_deviation,
        "replicas_equal": replicas_equal,
        "refreshes": min((int(s["refreshes"]) for s in states.values()), default=None),
        "state_bytes": state_bytes(optimizer.state),
        "shared": sum(plan.shared for plan in optimizer.plans),
        "moved": sum(plan.moves for plan in optimizer.plans),
        "sent": dict(optimizer.comm.sent_bytes),
        "model_equal": model_is_master(run, final),
    }
    run.close()
    return result


class Follower:
    """A reference with weights of its own."""

    def __init__(self, case: Case, optimizer: LowRankAdamW, free: bool):
        self.case = case
        self.model = build_model(case) if free else None
        self.wide = torch.float64 if case.dtype == "fp64" else torch.float32
        self.start = {n: p.detach().to(self.wide).clone() for n, p in build_model(case).named_parameters()}
        self.weights = {n: w.clone() for n, w in self.start.items()}
        self.specs = optimizer.matrix_specs
        # Every matrix is a view of its parameter: one of the stacked, or all of it with trailing dimensions folded.
        views = {s.name: matrix_of(self.weights[s.parameter], s.index) for s in self.specs}
        projected = {s.parameter for s in self.specs}
        views.update({n: w for n, w in self.weights.items() if n not in projected})
        options = case.options
        kind = REFERENCES.get(case.rule, REFERENCES.get(case.selection, LowBitReference))
        self.reference = kind(
            views,
            {s.name: s.rank for s in self.specs},
            lr=options["lr"],
            eps=options["eps"],
            weight_decay=case.weight_decay,
            gap=case.gap,
            wave_size=case.wave_size,
            rule=case.rule,
            selection=case.selection,
            pca=(PCA["lr_factor"], 0.1, 0.9, 0.999, PCA["eps"]),
            gaussian=lambda key, short, r: gaussian_rows(key, (0, short), r),
            moments=case.moments,
            side=case.proj_type,
            seed=options["seed"],
            gradient_dtype=case.gradient_dtype,
            formats=optimizer.method.formats,
        )
        # The vector has no decay in the groups either.
        self.undecayed = {n for n, w in self.weights.items() if w.ndim < 2}

    def step(self, gradients: dict[str, Tensor]) -> None:
        before = {n: self.weights[n].clone() for n in self.undecayed}
        fed = {s.name: matrix_of(gradients[s.parameter], s.index) for s in self.specs}
        self.reference.step({**gradients, **fed})
        for n, w in before.items():
            self.weights[n].add_(w, alpha=self.reference.lr * self.reference.weight_decay)

    def own_gradients(self, step: int, ranks: int) -> dict[str, Tensor]:
        """Averaged over ranks and micro-steps, clipped by the global norm as the frameworks do."""
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        for n, p in parameters.items():
            p.data.copy_(self.weights[n])
        total = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        for rank in range(ranks):
            for micro in range(self.case.accumulation):
                self.model.zero_grad()
                self.model(**arguments(self.case, step, micro, rank)).backward()
                for n, p in parameters.items():
                    if p.grad is None:
                        continue
                    total[n] += p.grad.to(self.wide) / (ranks * self.case.accumulation)
        if not self.case.clip:
            return total
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in total.values()))
        factor = max(1.0, (norm + 1e-6) / self.case.clip)
        return {n: g / factor for n, g in total.items()}

    def deviation(self, final: dict[str, Tensor]) -> float:
        return max(float((final[n] - w).norm() / (w - self.start[n]).norm()) for n, w in self.weights.items())


def assemble(optimizer: LowRankAdamW, pieces: dict[str, tuple[Piece, Tensor]]) -> tuple[dict[str, Tensor], bool]:
    """Whole tensors on every rank from the pieces of all, and whether ranks that hold the same agree bitwise."""
    return _joined(optimizer, optimizer.comm.gather_objects(pieces))


def at_first(value: T) -> list[T]:
    """Every rank's ``value`` on rank 0, where it is compared, and nothing on the others."""
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered or None)
    return gathered


def _joined(optimizer: LowRankAdamW, gathered: list[dict[str, tuple[Piece, Tensor]]]) -> tuple[dict[str, Tensor], bool]:
    copy = optimizer.layout.ranks.copy
    equal = True
    found: dict[str, Tensor] = {}
    for member in optimizer.members:
        copies: dict[int, Tensor] = {}
        for rank, table in enumerate(gathered):
            if member.name not in table:
                continue
            piece, values = table[member.name]
            key = rank if optimizer.layout.replicated else copy[rank]
            target = copies.setdefault(key, torch.full(member.shape, float("nan"), dtype=values.dtype))
            if piece.dim is None:
                target.view(-1)[piece.start : piece.stop] = values
            else:
                part = target.narrow(piece.dim, piece.start, piece.stop - piece.start)
                part.copy_(values.view(part.shape))
        first, *others = copies.values()
        assert not first.isnan().any(), f"{member.name}: no rank was given all of its gradient"
        equal = equal and all(torch.equal(first, other) for other in others)
        found[member.name] = first
    return found, equal


def matrix_of(parameter: Tensor, index: int | None) -> Tensor:
    shape = matrix_shape(tuple(parameter.shape), index is not None)
    return (parameter if index is None else parameter[index]).view(shape)


def held(optimizer: LowRankAdamW) -> dict[str, tuple[Piece, Tensor]]:
    layout = optimizer.layout
    return {name: (piece, layout.weight(name).detach().cpu()) for name, piece in layout.pieces.items()}


def _record_gradients(case: Case, optimizer: LowRankAdamW, into: dict[str, tuple[Piece, Tensor]]) -> None:
    """Copy the gradient pieces that each (partial) step is given."""
    inner = optimizer.step

    def step(closure=None):
        layout = optimizer.layout
        # Only what steps now: of the rest a gradient may lie there that is not clipped yet.
        stepping = {n for group in optimizer.param_groups for p in group["params"] for n in layout.names_in(p)}
        if case.dropped in stepping and dist.get_rank() % 2:
            next(m for m in optimizer.members if m.name == case.dropped).parameter.grad = None
        for name in stepping & layout.pieces.keys():
            grad = layout.grad(name)
            if grad is None:
                grad = torch.zeros_like(layout.weight(name))
            into[name] = (layout.pieces[name], grad.clone())
        return inner(closure)

    optimizer.step = step  # type: ignore[method-assign]


def agree(optimizer: LowRankAdamW, reference: Reference | None) -> tuple[bool, float]:
    """Whether indices, counters and bases are equal on every rank that computes and the first two equal to the
    reference's, and how far its bases are. Rank 0 knows.
    """
    states: dict[str, Any] = optimizer.state[STATE_KEY]  # type: ignore[index]
    mine: dict[str, Any] = {}
    plans = [p for p in optimizer.plans if p.name in states]
    bases = Bases(optimizer.comm, optimizer.method)
    whole = bases.join([p for p in plans if p.shared], states).wait()
    whole.update({p.name: bases.whole(p, states[p.name]) for p in plans if not p.shared})
    for plan in plans:
        state, basis = states[plan.name], whole[plan.name]
        if basis is not None:
            mine[plan.name] = (state["indices"].tolist(), state["refreshes"], state["step"], basis.cpu())
    seen: dict[str, Any] = {}
    for table in at_first(mine):
        for name, (*rest, basis) in table.items():
            *known, known_basis = seen.setdefault(name, (*rest, basis))
            if known != rest or not torch.equal(known_basis, basis):
                return False, math.inf
    if reference is None:
        return True, 0.0
    if seen.keys() != reference.matrices.keys():
        return False, math.inf
    far = 0.0
    for name, state in reference.matrices.items():
        indices, refreshes, step, basis = seen[name]
        chosen = "indices" in state and refreshes > 0
        if (refreshes, step) != (state["refreshes"], state["t"]) or (chosen and indices != state["indices"].tolist()):
            return False, math.inf
        if refreshes:
            far = max(far, float((basis - state["basis"]).norm()) / math.sqrt(basis.shape[1]))
    return True, far


def model_is_master(run: Run, final: dict[str, Tensor]) -> bool:
    """Every rank's model holds the weights that the optimizer moves."""
    # A list, not a generator: every rank has to take part for every parameter.
    equal = [torch.equal(w := whole(p), final[n].to(w.dtype)) for n, p in run.model.named_parameters()]
    return all(equal)


def arguments(case: Case, step: int, micro: int, rank: int) -> dict[str, Any]:
    few = None if case.directions is None else (step, case.directions)
    return {"seed": (step * 64 + micro) * 16 + rank, "silent": step < case.silent, "few": few}
