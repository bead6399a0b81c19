"""What moments do when the basis changes. The step counter is never reset."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import ClassVar

from torch import Tensor

from ds_lowrank.registry import Registry
from ds_lowrank.states.layout import Slot


class Carry:
    """What becomes of what a rule keeps. Subclass it and :func:`register` it.

    Attributes:
        name: by which ``moments`` asks for it.
        needs_cross: whether it needs B_oldᵀ B_new.
        changes: whether it changes anything.
    """

    name: ClassVar[str]
    needs_cross: ClassVar[bool] = True
    changes: ClassVar[bool] = True

    def __call__(
        self,
        moments: MutableMapping[str, Tensor],
        cross: Tensor | None,
        slots: Mapping[str, Slot],
        step: int,
        betas: tuple[float, float],
    ) -> None:
        """Carry moments over.

        Args:
            moments: slot's name -> what is kept, rows × r or rows × 1; replaced, or changed in place.
            cross: B_oldᵀ B_new, r × r.
            slots: how each turns.
            step: steps made so far.
            betas: (β1, β2).
        """
        raise NotImplementedError


CARRIES: Registry[Carry] = Registry("moments", dict.fromkeys(("keep", "project"), __name__))
register = CARRIES.register


@register
class Keep(Carry):
    """Everything stays as it is (GaLore's code, SARA)."""

    name = "keep"
    needs_cross = False
    changes = False

    def __call__(self, moments, cross, slots, step, betas) -> None:  # type: ignore[no-untyped-def]  # noqa: D102
        return


@register
class Project(Carry):
    """What is linear in R is expressed in the new basis, M ← M B_oldᵀ B_new; the rest stays (GoLore, 2410.11289)."""

    name = "project"

    def __call__(self, moments, cross, slots, step, betas) -> None:  # type: ignore[no-untyped-def]  # noqa: D102
        for name, slot in slots.items():
            if slot.turns == "linear":
                moments[name] = moments[name] @ cross


def overlap(cross: Tensor) -> float:
    """‖B_oldᵀ B_new‖_F² / r in [0, 1]: 1 for the same subspace, about r/short for unrelated ones (SARA, 2502.05790).

    Args:
        cross: B_oldᵀ B_new, r × r; the sum over slices of rows of both.
    """
    return float(cross.square().sum() / cross.shape[1])
