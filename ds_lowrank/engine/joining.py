"""Ranks that have run out of data: ``torch.distributed.algorithms.join.Join`` around a loop under DDP.

Such a rank goes on with the collectives of those that have some. DistributedDataParallel's own hook adds zeros to the
sums of gradients and leaves none on the rank; the rows that it steps need them, so a rank that still has data hands
them over, with the learning rates, for its schedulers stand still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.config import LowRankConfig
from ds_lowrank.layouts import Layout, LayoutError, Member, ddp_models, in_join, joins_first, steps_now

_SHARED = ("lr", "betas", "eps", "weight_decay", "scale")


class JoinableOptimizer(torch.optim.Optimizer, Joinable):
    """A torch optimizer for ``with Join([model, optimizer])``, the model in DistributedDataParallel."""

    config: LowRankConfig

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For :class:`torch.distributed.algorithms.join.Join`, which calls it on all ranks.

        Raises:
            ValueError: the optimizer is layerwise.
        """
        if self.config.layerwise:
            raise ValueError(
                "layerwise averages and steps in the backward pass, which ranks without data do not make: leave it "
                "out, or give all ranks as many batches"
            )
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """Where the collectives of ``Join`` run."""
        return self.param_groups[0]["params"][0].device

    @property
    def join_process_group(self) -> Any:
        """The process group of ``Join``: all ranks."""
        return dist.group.WORLD

    def step_without_data(self) -> None:
        """The step of a rank that has run out of data. Collective with :meth:`step` of the others."""
        raise NotImplementedError


class _Shadow(JoinHook):
    def __init__(self, optimizer: JoinableOptimizer):
        self._optimizer = optimizer
        self._models = ddp_models([p for group in optimizer.param_groups for p in group["params"]])

    def main_hook(self) -> None:
        if steps_now(self._models):  # the others only add up gradients otherwise
            self._optimizer.step_without_data()


def check_join(optimizer: JoinableOptimizer, layout: Layout, models: Sequence[DistributedDataParallel]) -> None:
    """Refuse what would leave ranks waiting for each other.

    Args:
        optimizer: before a step.
        layout: how its parameters lie.
        models: those that average its gradients.

    Raises:
        ds_lowrank.LayoutError: inside ``model.join()``, which does not know of the optimizer, or inside a ``Join`` that
            cannot be.
    """
    how = "with torch.distributed.algorithms.join.Join([model, optimizer]):, the model in DistributedDataParallel first"
    if not in_join(optimizer):
        if any(map(in_join, models)):
            raise LayoutError(
                "under DDP every rank steps a part of the matrices, and DistributedDataParallel.join() does not let "
                f"ranks without data take part: write {how}"
            )
    elif layout.ranks.size > 1 and not layout.replicated:
        raise LayoutError(f"join is for DistributedDataParallel: under {layout.kind} give all ranks as many batches")
    elif joins_first(optimizer):
        raise LayoutError(f"the optimizer comes before the model that averages its gradients: write {how}")


@contextmanager
def handed_over(
    members: Sequence[Member], groups: Sequence[dict[str, Any]], comm: Comm, has_data: bool
) -> Iterator[None]:
    """Gradients and hyper-parameters, while this lasts, for ranks that have none. Collective.

    Args:
        members: with gradients on the ranks that have data.
        groups: all parameter groups.
        comm: the collectives.
        has_data: whether this rank has.
    """
    mine = [{key: group[key] for key in _SHARED if key in group} for group in groups]
    names = [m.name for m in members if m.parameter.grad is not None]
    told = comm.gather_objects((has_data, names, mine), "join")
    if all(has for has, *_ in told):
        yield
        return
    source = next(rank for rank, (has, *_) in enumerate(told) if has)
    _, given, options = told[source]
    wanted = set(given)
    for m in members:
        grad = m.parameter.grad
        if not has_data:
            m.parameter.grad = None
        if m.name in wanted:
            if has_data and grad is not None:
                grad.add_(0.0)  # no negative zeros: a sum with zeros has none, and ranks are compared bit by bit
            sent = grad.clone() if comm.ranks.rank == source and grad is not None else torch.zeros_like(m.parameter)
            comm.all_reduce(sent, "gradients").wait()
            if not has_data:
                m.parameter.grad = sent
    if has_data:
        yield
        return
    for group, shared in zip(groups, options):
        group.update(shared)
    try:
        yield
    finally:
        for group, own in zip(groups, mine):
            group.update(own)
        for m in members:
            m.parameter.grad = None
