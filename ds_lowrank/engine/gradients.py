"""Whether the gradients that arrive can be right: their kind at every step, all else at the first."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.layouts import Layout, LayoutError, Member
from ds_lowrank.plan.matrices import check_equal

logger = logging.getLogger(__name__)


class GradientCheck:
    """Ranks that hold whole parameters must have been given the same gradients, and some parameter must have one.

    Args:
        layout: how the parameters lie.
        comm: the collectives.
        layerwise: whether gradients are used, and freed, in the backward pass.
    """

    def __init__(self, layout: Layout, comm: Comm, layerwise: bool):
        self._layout, self._comm, self._layerwise = layout, comm, layerwise
        self._seen = self._warned = False
        self.again()

    def again(self) -> None:
        """Look at the gradients of the next step, too: there are parameters that had none before."""
        self._done = not self._layout.steps_alone

    def run(self, members: Sequence[Member]) -> None:
        """At each step; looks at their kind only once gradients were seen. Collective under DDP until then.

        Raises:
            RuntimeError: a gradient is sparse.
            ds_lowrank.LayoutError: under DDP, when ranks have different gradients, or none has one.
        """
        if not self._layout.steps_alone:
            return
        held = [(m.name, m.held) for m in members if m.held is not None]
        fault = None
        for name, parameter in held:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                fault = sparse_fault(name, parameter)
                break
        if fault and (self._done or not self._layout.replicated):
            raise RuntimeError(fault)
        if self._done:
            return
        found = any(m.parameter.grad is not None for m in members)  # a rank may hold no element, and a gradient
        if self._layout.replicated:
            mine = (fault, found, None if fault else self._layout.checksums("gradients"))
            everywhere = self._comm.gather_objects(mine)
            for fault, *_ in everywhere:
                if fault:
                    raise RuntimeError(fault)
            found = any(there for _, there, _ in everywhere)
            remedy = (
                "nobody averages them. Wrap the model in DistributedDataParallel, anew where a parameter was frozen "
                "when it was wrapped and is trained now; with layerwise or gradients 'projected', call "
                "ds_lowrank.describe(optimizer) before the first backward pass"
            )
            check_equal([checksums for *_, checksums in everywhere], "gradients", remedy)
            if not (found or self._seen or self._layerwise):
                raise LayoutError(
                    "no parameter of the optimizer has a gradient on any rank: nothing would move. If the model was "
                    "sharded (fully_shard) or replaced after the optimizer was built, build the optimizer after it"
                )
        self._done = found or self._layerwise
        self._seen = self._seen or self._done
        if not (self._seen or self._warned):
            self._warned = True
            logger.warning(
                "step() was called and no parameter of the optimizer has a gradient: nothing moves. If the model was "
                "sharded (fully_shard) or replaced after the optimizer was built, build the optimizer after it"
            )


def sparse_fault(name: str, parameter: Tensor) -> str | None:
    """What torch's AdamW says of a sparse gradient, with the parameter's name; ``None`` where it is not sparse."""
    if parameter.grad is None or parameter.grad.layout == torch.strided:
        return None
    return (
        f"{name} {tuple(parameter.shape)} has a sparse gradient: Adam does not support sparse gradients, please "
        "consider SparseAdam instead (or build the embedding with sparse=False)"
    )
