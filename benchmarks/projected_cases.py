"""Runs with ``gradients="projected"`` beside the reference, which is given every rank's and micro-batch's own gradient.

What a rank's gradients are is found out apart from the framework: each rank has the whole model once more, of the same
weights before every step, and makes the backward passes of its micro-batches there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from cases import (
    Case,
    Follower,
    agree,
    arguments,
    assemble,
    at_first,
    build_model,
    held,
    matrix_of,
    model_is_master,
)
from harness import Run, start, whole
from torch import Tensor

from ds_lowrank.optimizer import STATE_KEY, LowRankAdamW


def run_projected(case: Case, with_full: bool = False) -> dict[str, Any]:
    """Train under the case's framework on all ranks beside the reference. Collective; rank 0's answer is complete.

    Args:
        case: its ``dropped`` parameter has no gradient on odd ranks, in no backward pass.
        with_full: train with ``gradients="full"``, too.

    Returns:
        As :func:`cases.run_case`, without a free-running reference, and on rank 0 ``clipped``: steps in which gradients
        were clipped; ``norm_deviation``: of the norms by which they were, relative to the reference's;
        ``to_full``: largest over the parameters of ‖W − W_full‖ / ‖W_full − W_0‖.
    """
    rank = dist.get_rank()
    torch.manual_seed(1000 + rank)  # nothing may depend on the global generator
    run = start(case, build_model(case))
    optimizer, own = run.optimizer, OwnGradients(case, run)
    fed = LocalFollower(case, optimizer) if rank == 0 else None
    equal, basis_deviation, clipped, norm_deviation = True, 0.0, 0, 0.0
    for step in range(case.steps):
        batches = local_arguments(case, step, rank)
        given = at_first(own(batches))
        run.step(batches)
        if fed is not None:
            norm, factor = fed.step_local(given)
            clipped += factor < 1
            told = getattr(run, "norm", None)
            if told is not None:
                norm_deviation = max(norm_deviation, abs(float(told) / norm - 1))
        if step % min(2, case.gap) == 0 or step == case.steps - 1:
            same, far = agree(optimizer, fed.reference if fed is not None else None)
            equal, basis_deviation = same and equal, max(far, basis_deviation)
    final, replicas_equal = assemble(optimizer, held(optimizer))
    states: dict[str, Any] = optimizer.state[STATE_KEY]  # type: ignore[index]
    result = {
        "deviation": None if fed is None else fed.deviation(final),
        "ranks_equal": equal,
        "basis_deviation": basis_deviation,
        "replicas_equal": replicas_equal,
        "refreshes": min((int(s["refreshes"]) for s in states.values()), default=None),
        "shared": sum(plan.shared for plan in optimizer.plans),
        "sent": dict(optimizer.comm.sent_bytes),
        "model_equal": model_is_master(run, final),
        "clipped": clipped,
        "norm_deviation": norm_deviation,
        "to_full": None,
    }
    run.close()
    if with_full:
        full = _train(replace(case, gradients="full"))
        if fed is not None:
            result["to_full"] = max(float((final[n] - w).norm() / (w - fed.start[n]).norm()) for n, w in full.items())
    return result


def _train(case: Case) -> dict[str, Tensor]:
    """Weights at the end. Collective."""
    run = start(case, build_model(case))
    for step in range(case.steps):
        run.step(local_arguments(case, step, dist.get_rank()))
    final, _ = assemble(run.optimizer, held(run.optimizer))
    run.close()
    return final


def local_arguments(case: Case, step: int, rank: int) -> list[dict[str, Any]]:
    """Of the micro-batches of a step on one rank."""
    dropped = case.dropped if rank % 2 else None
    return [{**arguments(case, step, micro, rank), "dropped": dropped} for micro in range(case.accumulation)]


class OwnGradients:
    """One rank's own gradients of each micro-batch.

    Args:
        case: of the run.
        run: whose weights are taken.
    """

    def __init__(self, case: Case, run: Run):
        self._run, self._wide = run, torch.float64 if case.dtype == "fp64" else torch.float32
        self._model = build_model(case)
        self._autocast = case.dtype == "bf16" and case.layout in ("one", "ddp")
        if case.dtype == "bf16" and not self._autocast:
            self._model.bfloat16()  # as mixed precision and DeepSpeed compute

    def __call__(self, batches: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Collective. Parameters without a gradient are missing."""
        theirs = dict(self._run.model.named_parameters())
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(whole(theirs[name]))
        found = []
        for batch in batches:
            self._model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
                loss = self._model(**batch)
            (loss / len(batches)).backward()
            parameters = self._model.named_parameters()
            found.append({n: p.grad.to(self._wide, copy=True) for n, p in parameters if p.grad is not None})
        return found


class LocalFollower(Follower):
    """A reference that projects what every rank has, and adds it up, where the optimizer does."""

    def __init__(self, case: Case, optimizer: LowRankAdamW):
        super().__init__(case, optimizer, free=False)
        layout = optimizer.layout
        projected = list(dict.fromkeys(spec.parameter for spec in self.specs))
        source = layout.local_gradients(projected)
        (wire,) = {source.wire_dtype(name) for name in projected}
        self.reference.wire = wire if wire.itemsize < self.wide.itemsize else None
        replicated = {plan.parameter for plan in optimizer.plans if plan.replicated}
        self.reference.replicas = layout.ranks.size if replicated else 1
        copy = layout.ranks.copy
        self.reference.copies = tuple(tuple(k for k, c in enumerate(copy) if c == one) for one in sorted(set(copy)))
        self._every = self.case.layout.startswith("zero")  # every micro-batch is sent

    def step_local(self, given: list[list[dict[str, Tensor]]]) -> tuple[float, float]:
        """One step of gradients by rank and micro-batch; returns their norm, and what they were multiplied by."""
        for micro, of_ranks in enumerate(zip(*given)):
            syncs = self._every or micro == self.case.accumulation - 1
            self.reference.add([self._views(gradients) for gradients in of_ranks], syncs)
        norm, clip = self.reference.norm(), self.case.clip
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        before = {n: self.weights[n].clone() for n in self.undecayed}
        self.reference.step_added(factor)
        for n, w in before.items():
            self.weights[n].add_(w, alpha=self.reference.lr * self.reference.weight_decay)
        return norm, factor

    def _views(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        whole_ones = {n: gradients.get(n, torch.zeros_like(w)) for n, w in self.weights.items()}
        return {**whole_ones, **{s.name: matrix_of(whole_ones[s.parameter], s.index) for s in self.specs}}
