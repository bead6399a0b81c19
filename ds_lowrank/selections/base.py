"""What a selection is: where the basis of a subspace comes from.

A selection says what it has to know of a gradient (its *evidence*), and makes a basis of it; the engine brings the
evidence to the rank that draws, and the basis to those that use it.

    none      nothing: the basis is drawn from the key alone. No Gram is computed; a matrix whose gradient is zero or
              not finite keeps what it has, which one number of each matrix tells all ranks.
    gram      ∇Aᵀ∇A (short × short), added up on the matrix's owner.
    sketch    drawn from the key at first, and refined from S = ∇Aᵀ R (short × r) afterwards: every rank gets the
              rows of S whose rows of the basis it keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ds_lowrank.rules.base import Hyper
from ds_lowrank.states.layout import BASIS, Slot


@dataclass(frozen=True)
class Key:
    """Of one draw: what is drawn, and nothing else, so that ranks, layouts and resumed runs draw the same.

    Attributes:
        seed, name, refresh: of the run; the matrix; how many refreshes it has had.
    """

    seed: int
    name: str
    refresh: int

    def number(self) -> int:
        """63 bits of it."""
        digest = hashlib.blake2b(f"{self.seed}\0{self.name}\0{self.refresh}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self) -> torch.Generator:
        """A CPU generator; the global one is never touched."""
        return torch.Generator().manual_seed(self.number())


@dataclass(frozen=True)
class Gram:
    """The evidence of a decomposition.

    Attributes:
        matrix: side × side, float32 or float64, with side = min(m, n).
        frame: short × side with orthonormal columns, the coordinates of the Gram where the longer side is projected:
            see :func:`ds_lowrank.subspace.project.gram_of_short_rows`. ``None``: side = short, no frame is needed.
        gradient_dtype: in which the gradient was computed, perhaps narrower than what it comes in.
    """

    matrix: Tensor
    frame: Tensor | None
    gradient_dtype: torch.dtype


@dataclass(frozen=True)
class Sketch:
    """The evidence of a step of the basis: sums over all rows of A, of which S and the basis are given in slices.

    Attributes:
        s: rows of ∇Aᵀ R (of short) × r, for the rows of the basis that are refined here.
        rr: Rᵀ R, r × r.
        bb: Bᵀ B, r × r, float64: of a basis that is nearly orthonormal only its difference from I is of use.
        energy: ‖∇A‖², a tensor of one number.
    """

    s: Tensor
    rr: Tensor
    bb: Tensor
    energy: Tensor


@dataclass(frozen=True)
class Basis:
    """A drawn subspace.

    Attributes:
        vectors: short × r, contiguous (never a view that keeps a whole decomposition alive).
        indices: (r,) int32 on the CPU, the kept singular directions, ascending; -1 where a direction is none of the
            gradient's: all of what a key alone draws, and at the end what fills up a basis of a gradient with too few.
        captured: share of the gradient's energy ‖∇A‖² inside the subspace, in [0, 1]; ``None`` where it is not known.
    """

    vectors: Tensor
    indices: Tensor
    captured: float | None = None


class Selection:
    """A way to choose a basis. Subclass it in a file of its own and :func:`ds_lowrank.selections.register` it.

    Attributes:
        name: by which ``selection`` asks for it.
        evidence: ``none``, ``gram`` or ``sketch``, see the module.
        periodic: whether a matrix gets a new basis every ``update_proj_gap`` steps, or at its first step only.
        orthonormal: whether bases have orthonormal columns.
        stored: whether bases are kept. If not, every rank makes them again from their key, on its device, whenever
            they are used (``evidence`` is ``none`` then), and nothing of them is kept or sent.
        slots: what it keeps beside the basis; of axis ``basis`` or ``matrix``.
        options: names and defaults of its own hyper-parameters, set by ``selection_options``.
    """

    name: ClassVar[str]
    evidence: ClassVar[Literal["none", "gram", "sketch"]] = "gram"
    periodic: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = True
    stored: ClassVar[bool] = True
    slots: ClassVar[tuple[Slot, ...]] = ()
    options: ClassVar[Mapping[str, float]] = {}

    def check(self, options: Mapping[str, float]) -> None:
        """Refuse values of its own options.

        Raises:
            ValueError: naming the option.
        """

    def draw(
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis | None:
        """A new basis.

        Args:
            key: of the draw.
            short, r: its rows and columns.
            dtype, device: of the basis, where it is drawn.
            gram: the evidence, if it is that.

        Returns:
            ``None``: nothing can be drawn from this evidence (a Gram that is zero or not finite); the matrix keeps what
            it has.
        """
        raise NotImplementedError

    def refine(
        self,
        basis: Tensor,
        sketch: Sketch,
        state: MutableMapping[str, Tensor],
        hyper: Hyper,
    ) -> Tensor:
        """A step of the basis from the gradient that it has just projected; with evidence ``sketch``, every step.

        Args:
            basis: the rows of B (of short) × r that are refined here; may be overwritten.
            sketch: sums over the rows of A.
            state: slot's name -> what it keeps for these rows; changed in place, or replaced.
            hyper: hyper-parameters of the step that the weights make; its ``options`` are the selection's own.

        Returns:
            The rows of the new basis.
        """
        raise NotImplementedError

    def kept_slots(self) -> tuple[Slot, ...]:
        """All that it keeps: the basis, if it is stored, and its slots."""
        return ((BASIS,) if self.stored else ()) + self.slots
