"""What an update rule is: how the moments of projected gradients make a direction, row by row.

With A the tall weight (long × short), B its basis (short × r) and R = ∇A·B, every method of the family moves

    A ← keep · A − η (α N Bᵀ + s ⊙ ∇A)

by N, a direction inside the subspace, and s, one number a row of A. GaLore and SARA have s = 0; Fira's residual and
APOLLO's scaled gradient are s. A rule gives the two (:class:`Update`) and declares what it keeps (:class:`Slot`); the
engine moves rows, keeps states in their formats, adds up what a rule yields, and lifts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_lowrank.states.formats import Formats
from ds_lowrank.states.layout import Slot
from ds_lowrank.subspace.project import energy, row_squares


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of one step.

    Attributes:
        lr, betas, eps, weight_decay, scale: η, (β1, β2), ε, λ, α, of the parameter group.
        step: number of this step of these matrices, from 1.
        options: the rule's own, see :attr:`Rule.options`.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float
    step: int
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a rule gives back.

    Attributes:
        low: N, rows × r; ``None``: nothing is lifted.
        row_scale: s, (rows,); ``None``: the gradient itself does not move the weights.
    """

    low: Tensor | None
    row_scale: Tensor | None = None


class Stack:
    """The rows that a rule steps together: of one matrix, or of several of one group and rank, one below the other.

    Args:
        counts: rows of each matrix on this rank; 0 where others compute it.
        blocks: for each matrix, the blocks of rows of ∇A (rows × short each) on this rank; read by rules that have
            ``reads_gradient``.
        bases: for each matrix, B (short × r), ``None`` where no row is computed or the rule lifts nothing.
        device: of all of these, and of the states.
        squares: |∇A_i|² of every row of each block, by the matrix' number, where they are known.
    """

    def __init__(
        self,
        counts: Sequence[int],
        blocks: Sequence[Sequence[Tensor]] = (),
        bases: Sequence[Tensor | None] = (),
        device: torch.device | str = "cpu",
        squares: Mapping[int, Sequence[Tensor]] | None = None,
    ):
        self.counts = list(counts)
        self.device = device
        self.blocks = blocks
        self.bases = bases
        self._squares = dict(squares or {})

    def totals(self, numbers: Tensor) -> Tensor:
        """Sum of a number a row over the rows of each matrix that are on this rank.

        Args:
            numbers: (rows,).

        Returns:
            (matrices,): yield it to get the sums over all ranks.
        """
        if len(self.counts) == 1:
            return numbers.sum(0, keepdim=True)
        return torch.stack([part.sum() for part in numbers.split(self.counts)])

    def each_row(self, numbers: Tensor) -> Tensor:
        """Every row's number of its matrix: (matrices,) -> (rows,)."""
        if len(self.counts) == 1:
            return numbers.expand(self.counts[0])
        return numbers.repeat_interleave(torch.tensor(self.counts, device=numbers.device))

    def gradient_squares(self, dtype: torch.dtype) -> Tensor:
        """|∇A_i|² of every row, (rows,) in ``dtype``; a tensor of its own."""
        parts: list[Tensor] = []
        for k, blocks in enumerate(self.blocks):  # known ones are given away: a rule may change them
            parts += self._squares.pop(k, ()) or [row_squares(block, dtype) for block in blocks]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=self.device)

    def gradient_totals(self, dtype: torch.dtype) -> Tensor:
        """Sum of these over the rows of each matrix that are on this rank, without them: (matrices,) in ``dtype``."""
        parts = [
            [square.sum() for square in self._squares[k]]
            if k in self._squares
            else [energy(block, dtype) for block in blocks]
            for k, blocks in enumerate(self.blocks)
        ]
        if len(parts) == 1 == len(parts[0]):
            return parts[0][0].view(1)
        zero = torch.zeros((), dtype=dtype, device=self.device)
        return torch.stack([sum(of, zero) for of in parts])

    def lifted_squares(self, x: Tensor) -> Tensor:
        """|x_i Bᵀ|² of every row of ``x`` (rows × r): (rows,). A basis that is kept in few bits is not orthonormal."""
        parts = [
            (part @ (basis.mT @ basis)).mul_(part).sum(dim=1)
            for part, basis in zip(x.split(self.counts) if len(self.counts) > 1 else [x], self.bases)
            if basis is not None
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else x.new_zeros(0)


Steps = Generator[Tensor, Tensor, Update]


class Rule:
    """An update rule. Subclass it in a file of its own and :func:`ds_lowrank.rules.register` it.

    Attributes:
        name: by which ``rule`` asks for it.
        slots: what it keeps.
        options: names and defaults of its own hyper-parameters, set by ``rule_options``.
        reads_gradient: whether it needs ∇A beside R: asks ``stack.gradient_squares`` or returns a ``row_scale``.
            Layouts that bring rows to where they are computed hold them a little longer then.
        lifts: whether it ever returns ``low``.
        needs_orthonormal: whether it is right for orthonormal bases only.
        copies: how many tensors of R's size its step makes beside R, for the plan of memory.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[Slot, ...]] = ()
    options: ClassVar[Mapping[str, float]] = {}
    reads_gradient: ClassVar[bool] = False
    lifts: ClassVar[bool] = True
    needs_orthonormal: ClassVar[bool] = False
    copies: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        """Who steps in another way than what it is made of does not inherit that one's ``kept_step``."""
        if "step" in cls.__dict__ and "kept_step" not in cls.__dict__:
            cls.kept_step = None

    def check(self, options: Mapping[str, float]) -> None:
        """Refuse values of its own options.

        Raises:
            ValueError: naming the option.
        """

    @property
    def sums(self) -> bool:
        """Whether :meth:`step` is a generator, which asks for sums over the ranks."""
        # One that hands over to the step of what it is made of returns that one's generator.
        return any(inspect.isgeneratorfunction(cls.__dict__.get("step")) for cls in type(self).__mro__)

    # A rule whose moments are read, stepped and written at once, in whatever formats they are kept: given the formats,
    # the kept tensors by their keys, R (overwritten) and the hyper-parameters, it does all of :meth:`step`.
    kept_step: Callable[[Formats, MutableMapping[str, Any], Tensor, Hyper], Update] | None = None

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Update | Steps:
        """Step rows: update ``state`` and return how the weights move.

        A rule that needs sums over all rows of a matrix is a generator: ``total = yield partial`` gives a tensor of
        few numbers, of this rank's rows, and gets its sum over the ranks that share the matrices. All ranks make the
        same yields, those that compute no row too (with zero rows): how many, and how long, must not depend on values.

        Args:
            r: R, rows × r, float32 or float64; may be overwritten.
            state: slot's name -> what it keeps, rows × width, or for one a matrix matrices × width (of all matrices of
                the stack, those too of which this rank has no row); changed in place, or replaced.
            hyper: hyper-parameters.
            stack: whose rows these are.
        """
        raise NotImplementedError
