"""A model and a run that compare the optimizer, under DeepSpeed, with the one-process reference.

The model is a set of linear regressions whose data depend on (rank, micro-step): gradients differ between ranks, have a
decaying spectrum and full rank, and depend on the weights. The reference is fed the gradient that DeepSpeed delivered
(averaged, accumulated, clipped); a second one runs freely on gradients of its own.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from storage import state_bytes
from torch import Tensor, nn

import ds_lowrank
from ds_lowrank.layouts import Piece
from ds_lowrank.optimizer import STATE_KEY, LowRankAdamW
from ds_lowrank.reference import Reference

Shapes = tuple[tuple[int, int], ...]

# (out, in) of the linear layers of one "layer".
SHAPES: dict[str, Shapes] = {
    # tall, wide, square; sizes that leave every partition boundary of 2, 3 and 4 ranks in the middle of a row
    "small": ((24, 10), (9, 31), (13, 13), (40, 7), (5, 23)),
    # fewer rows than ranks, so that rows are cut more than once and some ranks compute none
    "thin": ((2, 50), (3, 2), (61, 3)),
    # even sizes, as models have them: DeepSpeed pads a group to 2 × ranks elements, which shifts odd boundaries
    "even": ((16, 16), (48, 16), (16, 48)),
    # LLaMA-60M's sizes, behind a small matrix that puts the boundaries of 2, 3 and 4 ranks in the middle of a row
    "real": ((37, 53), (1376, 512), (512, 1376)),
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        stage: ZeRO stage.
        dtype: of the model: ``fp32`` or ``bf16``.
        shapes: key of ``SHAPES``.
        layers: how often the shapes are repeated; 5 divides by none of 2, 3, 4 ranks, so matrices are cut.
        rank: r.
        selection, moments, gap, wave_size, proj_type: options of the optimizer.
        steps: optimizer steps.
        accumulation: micro-steps a step.
        clip: gradient norm.
        weight_decay: λ.
        silent: how many first steps leave layer 0 without a gradient.
        zero: further keys of ``zero_optimization``.
        config: further top-level keys.
    """

    stage: int = 2
    dtype: str = "fp32"
    shapes: str = "small"
    layers: int = 5
    rank: int = 4
    selection: str = "importance"
    moments: str = "keep"
    gap: int = 4
    wave_size: int = 4
    proj_type: str = "std"
    steps: int = 10
    accumulation: int = 2
    clip: float = 0.3
    weight_decay: float = 0.1
    silent: int = 0
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


class Regressions(nn.Module):
    """Linear layers that each fit a target of their own; a vector scales every layer's outputs."""

    def __init__(self, shapes: Shapes, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes) for _ in range(layers)
        )
        self.gain = nn.Parameter(torch.ones(layers))

    def forward(self, seed: int, silent: bool = False) -> Tensor:
        """Loss on the data of ``seed``; ``silent`` leaves layer 0 out, so that it has no gradient."""
        loss = torch.zeros((), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for index, (layer, gain) in enumerate(zip(self.layers, self.gain)):
            if silent and index == 0:
                continue
            for linear in layer.children():
                assert isinstance(linear, nn.Linear)
                m, n = linear.weight.shape
                tokens = min(m, n) * 5 // 4 + 3
                x = torch.randn(tokens, n, generator=generator) * _decay(n)
                y = torch.randn(tokens, m, generator=generator) * _decay(m)
                dtype = linear.weight.dtype
                error = gain * linear(x.to(dtype)) - y.to(dtype)
                loss = loss + error.float().square().sum() / tokens
        return loss


def build_model(case: Case) -> Regressions:
    """The same model on every rank, whatever the global generator says."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Regressions(SHAPES[case.shapes], case.layers).to(case.torch_dtype)


def deepspeed_config(case: Case) -> dict[str, Any]:
    """The DeepSpeed configuration of a case, with its ``"lowrank"`` block."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 100_000, **case.zero},
        "lowrank": lowrank_block(case),
        **case.config,
    }


def lowrank_block(case: Case) -> dict[str, Any]:
    """Options of the optimizer in a case."""
    return {
        "rank": case.rank,
        "update_proj_gap": case.gap,
        "selection": case.selection,
        "moments": case.moments,
        "proj_type": case.proj_type,
        "wave_size": case.wave_size,
        "seed": 3,
        "gram_dtype": "float64",
        "lr": 0.02,
        "eps": 1e-8,
        "weight_decay": case.weight_decay,
    }


def run_case(case: Case, with_free: bool = True) -> dict[str, Any]:
    """Train under DeepSpeed on all ranks beside the references. Collective; rank 0's answer is complete.

    Returns:
        ``deviation`` and ``free_deviation``: largest over the parameters of ‖W − W_ref‖ / ‖W_ref − W_0‖, fed and
        free-running; ``ranks_equal``: indices and basis hashes equal on all ranks at every refresh and the indices
        equal to the reference's; ``state_bytes``; ``cut``: matrices cut by a boundary; ``sent``: bytes by purpose.
    """
    import warnings

    import deepspeed

    rank = torch.distributed.get_rank()
    torch.manual_seed(1000 + rank)  # nothing may depend on the global generator
    model = build_model(case)
    # In a model this small clamping the rank is what the case is about; the warning has a test of its own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = ds_lowrank.deepspeed_optimizer(model, deepspeed_config(case))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case))
    # The references run on rank 0: the others' cores are needed there.
    fed = _Follower(case, optimizer, free=False) if rank == 0 else None
    free = _Follower(case, optimizer, free=True) if rank == 0 and with_free else None
    delivered: dict[str, tuple[Piece, Tensor]] = {}
    _record_gradients(optimizer, delivered)
    equal = True
    for step in range(case.steps):
        delivered.clear()
        for micro in range(case.accumulation):
            engine.backward(engine(_seed(step, micro, rank), step < case.silent))
            engine.step()
        gradients = _assemble(optimizer, delivered)
        if fed is not None:
            fed.step(gradients)
        if free is not None:
            free.step(free.own_gradients(step, torch.distributed.get_world_size()))
        equal = _agree(optimizer, fed.reference if fed is not None else None) and equal
    final = _assemble(optimizer, {n: (p, optimizer.layout.weight(n)) for n, p in optimizer.layout.pieces.items()})
    result = {
        "deviation": None if fed is None else fed.deviation(final),
        "free_deviation": None if free is None else free.deviation(final),
        "ranks_equal": equal,
        "refreshes": min(int(s["refreshes"]) for s in optimizer.state[STATE_KEY].values()),  # type: ignore[index]
        "state_bytes": state_bytes(optimizer.state),
        "cut": sum(plan.cut for plan in optimizer.plans),
        "sent": dict(optimizer.comm.sent_bytes),
        "model_equal": _model_is_master(model, final),
    }
    engine.destroy()
    return result


class _Follower:
    """A reference with weights of its own."""

    def __init__(self, case: Case, optimizer: LowRankAdamW, free: bool):
        self.case = case
        self.model = build_model(case) if free else None
        model = build_model(case)
        self.start = {n: p.detach().float().clone() for n, p in model.named_parameters()}
        weights = {n: w.clone() for n, w in self.start.items()}
        block = lowrank_block(case)
        self.reference = Reference(
            weights,
            {s.name: s.rank for s in optimizer.matrix_specs},
            lr=block["lr"],
            eps=block["eps"],
            weight_decay=case.weight_decay,
            gap=case.gap,
            wave_size=case.wave_size,
            selection=case.selection,
            moments=case.moments,
            side=case.proj_type,
            seed=block["seed"],
        )
        # The vector has no decay in the groups either.
        self.undecayed = {n for n, w in weights.items() if w.ndim < 2}

    def step(self, gradients: dict[str, Tensor]) -> None:
        before = {n: self.reference.weights[n].clone() for n in self.undecayed}
        self.reference.step(gradients)
        for n, w in before.items():
            self.reference.weights[n].add_(w, alpha=self.reference.lr * self.reference.weight_decay)

    def own_gradients(self, step: int, ranks: int) -> dict[str, Tensor]:
        """Averaged over ranks and micro-steps, clipped by the global norm as DeepSpeed does."""
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        for n, p in parameters.items():
            p.data.copy_(self.reference.weights[n])
        total = {n: torch.zeros_like(w) for n, w in self.reference.weights.items()}
        for rank in range(ranks):
            for micro in range(self.case.accumulation):
                self.model.zero_grad()
                self.model(_seed(step, micro, rank), step < self.case.silent).backward()
                for n, p in parameters.items():
                    if p.grad is None:
                        continue
                    total[n] += p.grad.float() / (ranks * self.case.accumulation)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in total.values()))
        factor = max(1.0, (norm + 1e-6) / self.case.clip)
        return {n: g / factor for n, g in total.items()}

    def deviation(self, final: dict[str, Tensor]) -> float:
        weights = self.reference.weights
        return max(float((final[n] - w).norm() / (w - self.start[n]).norm()) for n, w in weights.items())


def _record_gradients(optimizer: LowRankAdamW, into: dict[str, tuple[Piece, Tensor]]) -> None:
    """Copy the gradient pieces that each (partial) step is given."""
    inner = optimizer.step

    def step(closure=None):
        layout = optimizer.layout
        # Only of the groups that step now: of the others a gradient may lie there that is not clipped yet.
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for member in optimizer.members:
            if member.name in layout.pieces and id(layout.flat_params(member.group)[0]) in stepping:
                grad = layout.grad(member.name)
                assert grad is not None
                into[member.name] = (layout.pieces[member.name], grad.clone())
        return inner(closure)

    optimizer.step = step  # type: ignore[method-assign]


def _assemble(optimizer: LowRankAdamW, pieces: dict[str, tuple[Piece, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors on every rank from the pieces of all."""
    mine = {name: (piece, tensor.float()) for name, (piece, tensor) in pieces.items()}
    gathered = optimizer.comm.gather_objects(mine)
    whole = {}
    for member in optimizer.members:
        flat = torch.full((math.prod(member.shape),), float("nan"))
        for table in gathered:
            if member.name in table:
                piece, values = table[member.name]
                flat[piece.start : piece.stop] = values
        assert not flat.isnan().any(), f"{member.name}: no rank was given all of its gradient"
        whole[member.name] = flat.view(member.shape)
    return whole


def _agree(optimizer: LowRankAdamW, reference: Reference | None) -> bool:
    """Indices and bases equal on every rank that computes, and the indices equal to the reference's."""
    mine = {}
    for name, state in optimizer.state[STATE_KEY].items():  # type: ignore[index]
        if "basis" in state:
            digest = hashlib.sha256(state["basis"].numpy().tobytes()).hexdigest()
            mine[name] = (state["indices"].tolist(), digest, state["refreshes"], state["step"])
    seen: dict[str, Any] = {}
    for table in optimizer.comm.gather_objects(mine):
        for name, value in table.items():
            if seen.setdefault(name, value) != value:
                return False
    if reference is None:
        return True
    drawn = reference.selection != "random"
    return seen.keys() == reference.matrices.keys() and all(
        seen[n][2:] == (s["refreshes"], s["t"])
        and (not drawn or s["refreshes"] == 0 or seen[n][0] == s["indices"].tolist())
        for n, s in reference.matrices.items()
    )


def _model_is_master(model: nn.Module, final: dict[str, Tensor]) -> bool:
    """Every rank's model holds the weights that the partitions hold."""
    return all(torch.equal(p.detach(), final[n].to(p.dtype)) for n, p in model.named_parameters())


def _seed(step: int, micro: int, rank: int) -> int:
    return (step * 64 + micro) * 16 + rank


def _decay(size: int) -> Tensor:
    return torch.logspace(0, -1.5, size)
