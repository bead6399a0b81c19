"""The norm of all gradients where some are there as projections alone, and the clip by it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.engine.projected import ProjectedGradients
from ds_lowrank.layouts import Layout, Member, local_tensors


class Clipping:
    """Clips gradients by their norm, and notices when somebody else has done so with a part of them.

    Args:
        layout: where gradients lie; its groups hold the model's own parameters.
        comm: the collectives.
        members: parameters whose gradients are gradients: all, or those that are not projected.
        projected: what there is of the others.
        others: these.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Comm,
        members: Sequence[Member],
        projected: ProjectedGradients | None,
        others: Sequence[Member] = (),
    ) -> None:
        self._layout, self._comm, self._members, self._projected = layout, comm, members, projected
        self._others = others
        self._seen: dict[str, tuple[Tensor, int]] = {}
        if projected is not None and layout.by_parameter:  # DeepSpeed's gradients are its engine's, and it clips
            projected.after_pass = self.look

    def _gradients(self) -> list[tuple[str, Tensor]]:
        held = [(m.name, m.held.grad) for m in self._members if m.held is not None]
        return [(name, local_tensors([grad])[0]) for name, grad in held if grad is not None]

    def norm(self) -> Tensor:
        """√(Σ ‖R‖² + Σ ‖g‖²), over all parameters and ranks: one number, float64. Collective.

        R is the projection of what is projected, in the basis with which it is about to step; it is no longer than the
        gradient itself.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._comm.ranks.device)
        for _, grad in self._gradients():
            total += torch.linalg.vector_norm(grad, dtype=torch.float64).square().to(total.device)
        if not self._layout.replicated:
            total = self._comm.all_reduce(total, "norms").wait()
        if self._projected is not None:
            total = total + self._projected.norm_squared()
        return total.sqrt()

    def clip_(self, max_norm: float, error_if_nonfinite: bool) -> Tensor:
        """As :func:`torch.nn.utils.clip_grad_norm_`; see :meth:`ds_lowrank.LowRankAdamW.clip_grad_norm_`."""
        norm = self.norm()
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"the norm of the gradients is {float(norm)}, so they cannot be clipped by it: leave out "
                "error_if_nonfinite to go on all the same"
            )
        if max_norm == math.inf:  # a norm is asked for and no clip; ∞ / ∞ would be one
            return norm.float()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in self._gradients():
            grad.mul_(factor.to(grad.device, grad.dtype))
        self.look()  # of all at once: FSDP2's gradients of a module are views of one tensor, and have one version
        if self._projected is not None:
            self._projected.scale_(factor)
        return norm.float()

    def look(self) -> None:
        """Remember gradients as they are now."""
        self._seen = {name: (grad, grad._version) for name, grad in self._gradients()}

    def check(self) -> None:
        """Refuse gradients that were changed after the backward pass, where projected ones were not, and whole ones.

        Raises:
            RuntimeError: naming a parameter.
        """
        for m in self._others:
            # Zeros are what DCP makes a step of, to have all states before it loads them.
            if m.held is not None and m.held.grad is not None and bool(local_tensors([m.held.grad])[0].any()):
                raise RuntimeError(
                    f"{m.name} {m.shape} has a gradient that was not projected: its hook came after the backward pass. "
                    "Call ds_lowrank.describe(optimizer) before the first one (and after the model was wrapped)"
                )
        now, seen, self._seen = dict(self._gradients()), self._seen, {}
        for name, (grad, version) in seen.items():
            if name in now and now[name].data_ptr() == grad.data_ptr() and now[name]._version != version:
                raise RuntimeError(
                    f"the gradient of {name} was changed after the backward pass, and projected gradients, which are "
                    "in no .grad, were not: clip with optimizer.clip_grad_norm_(max_norm), which takes all together "
                    "(ds_lowrank.attach(trainer) has the HF Trainer do so, ds_lowrank.route_clipping(accelerator, "
                    "optimizer) accelerate, configure_gradient_clipping Lightning: docs/integrations.md), and scale "
                    "the loss, not gradients"
                )
