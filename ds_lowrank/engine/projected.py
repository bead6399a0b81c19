"""Gradients that are projected before they are stored or sent: R = ∇A B travels, is added up and is clipped.

Between refreshes all ranks have the same basis, and a projection is linear: the mean of the ranks' projections is the
projection of their mean. So each rank projects its own gradient of a whole matrix when the backward pass has made it,
and frees it. R of all rows is added up where it was made (``whole``) until a backward pass in which the framework would
average gradients; then it goes to the ranks that compute its rows, which add it to theirs (``rows``).

A matrix that is due for a refresh needs its averaged gradient: the first one of a step gives the basis. Whole gradients
of as many matrices as are refreshed side by side are kept until all of these are there; they are averaged by rows,
decomposed as ever, and projected. States change in ``step()`` alone: until then the new basis stands beside the old.

What communicates does so in the order of the parameter list, backwards, never in that in which gradients arrive. What
has not arrived when a backward pass ends counts as zero.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending, done
from ds_lowrank.engine.bases import Bases
from ds_lowrank.engine.batches import STACK_NUMBERS
from ds_lowrank.engine.refresh import Groups, NewBases, Refresher
from ds_lowrank.engine.state import MatrixState, number_of
from ds_lowrank.engine.step import LowRankStep, States
from ds_lowrank.engine.sums import Sums
from ds_lowrank.layouts import LocalGradients, at_end_of_backward
from ds_lowrank.methods import Method
from ds_lowrank.plan.geometry import matrix_shape
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.subspace.sides import as_rows

# Numbers of projected gradients that travel together.
BUCKET_NUMBERS = 1 << 22


@dataclass
class _Item:
    """Something that ranks do together, when all gradients that it needs are there."""

    do: Callable[[Sequence[MatrixPlan]], None]
    plans: list[MatrixPlan] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """Of projected gradients.

    Attributes:
        wave_size: whole gradients that are alive at once.
        narrow: whether sums are bf16, rounded stochastically.
        seed: of the rounding.
    """

    wave_size: int
    narrow: bool
    seed: int


class ProjectedGradients:
    """Projects gradients in the backward pass, and keeps their sums for ``step()``.

    Args:
        source: this rank's own gradients.
        shapes: of the parameters.
        plans: of all projected matrices.
        comm: the collectives.
        method: what is computed, and how states are kept.
        stepper, refresher: of these matrices.
        states: their states.
        options: see there.
    """

    def __init__(
        self,
        source: LocalGradients,
        shapes: Mapping[str, tuple[int, ...]],
        plans: Sequence[MatrixPlan],
        comm: Comm,
        method: Method,
        stepper: LowRankStep,
        refresher: Refresher,
        states: Callable[[], States],
        options: Options,
    ):
        self._source, self._shapes, self._comm, self._method = source, shapes, comm, method
        self._stepper, self._refresher, self._states = stepper, refresher, states
        self._bases = Bases(comm, method)
        self._wave_size = options.wave_size
        self._alone = comm.ranks.size == 1
        self._plans_of: dict[str, list[MatrixPlan]] = {}
        for plan in reversed(plans):
            self._plans_of.setdefault(plan.parameter, []).append(plan)
        self.sums = Sums(comm, source.wire_dtype, options.narrow, options.seed, self._plans_of)
        self._passes = 0  # backward passes since the last step
        self._unsent = False  # whether one of them has left its sums where they were made
        self._new: list[NewBases] = []
        self._beside: dict[str, MatrixState] = {}  # states with bases that are not taken over yet
        self._waiting: dict[str, MatrixPlan] = {}  # due, without a new basis
        self.after_pass: Callable[[], None] | None = None  # called when a backward pass has ended
        self._forget_pass()
        source.hook(list(self._plans_of), self._ready, self._absent)

    def _forget_pass(self) -> None:
        self._open = False
        self._arrived: set[str] = set()
        self._held: dict[str, Tensor] = {}  # matrix -> rows of this rank's own gradient, long × short
        self._items: deque[_Item] = deque()
        self._joining: dict[str, Pending[dict[str, Tensor | None]]] = {}

    @property
    def busy(self) -> bool:
        """Whether gradients have arrived since the last step."""
        return self._passes > 0 or self._open

    def forget(self) -> None:
        """Drop what has been added up, and bases that were found with it."""
        self.sums.clear()
        self._passes, self._unsent = 0, False
        self._new.clear()
        self._beside.clear()
        self._waiting.clear()
        self._forget_pass()

    # -- the backward pass --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _ready(self, name: str, gradient: Tensor) -> None:
        with self._plainly():
            self._take(name, gradient)

    @torch.no_grad()
    def _absent(self, names: Sequence[str]) -> None:
        """Some parameters have no gradient in this pass: ranks that have one do not wait for ours until its end."""
        with self._plainly():
            if not self._open:
                self._begin()
            self._arrived.update(names)
            self._run_items(lambda plan: plan.parameter in self._arrived)

    def _take(self, name: str, gradient: Tensor) -> None:
        if not self._open:
            self._begin()
        if name in self._arrived:
            raise RuntimeError(
                f"{name} {self._shapes[name]} has a second gradient in one backward pass, and the first is projected "
                "already: use gradients 'full', or checkpoint with use_reentrant=False"
            )
        self._arrived.add(name)
        for plan in self._plans_of[name]:
            rows = _rows_of(gradient, plan, self._shapes[name])
            if plan.name in self._waiting or (plan.basis_sharded and plan.shared):
                self._held[plan.name] = rows
            elif self._has_basis(plan):
                self._add(plan, rows, self._bases.whole(plan, self._state(plan)))
        self._run_items(lambda plan: plan.parameter in self._arrived)

    def _begin(self) -> None:
        if _inside_reentrant_checkpoint():
            raise RuntimeError(
                "gradients 'projected' does not go with reentrant checkpointing, which makes gradients in pieces: "
                "checkpoint with use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        self._open = True
        at_end_of_backward(self._end)
        if self._passes == 0:
            self._find_due()
        self._passes += 1
        self.sums.begin(self._states(), self._passes)
        syncs = self._source.syncs()
        self._items = self._arrange(syncs and not self._alone)
        self._unsent = not syncs and not self._alone

    def _find_due(self) -> None:
        states = self._states()
        due = {p.name: p for plans in self._trained() for p in plans if p.name in states}
        due = {name: p for name, p in due.items() if self._stepper.is_due(p, states)}
        if self._method.selection.evidence != "none":
            self._waiting = due
            return
        plans = list(due.values())
        for at in range(0, len(plans), self._wave_size):
            self._find(plans[at : at + self._wave_size], None)

    def _trained(self) -> Iterable[list[MatrixPlan]]:
        return (plans for name, plans in self._plans_of.items() if self._source.trained(name))

    def _arrange(self, sends: bool) -> deque[_Item]:
        """What ranks do together in this pass, in an order that all of them know."""
        items: deque[_Item] = deque()
        wave, joined, bucket = _Item(self._average), _Item(self._project), _Item(self.sums.send)

        def close(item: _Item) -> _Item:
            if item.plans:
                items.append(item)
            return _Item(item.do)

        for plan in (p for plans in self._trained() for p in plans):
            if plan.name in self._waiting:
                wave.plans.append(plan)
                if len(wave.plans) == self._wave_size:
                    wave = close(wave)
                continue
            if plan.basis_sharded and plan.shared:
                joined.plans.append(plan)
                numbers = sum((p.long + p.short) * p.r for p in joined.plans)
                if numbers > STACK_NUMBERS or len(joined.plans) == self._wave_size:
                    joined = close(joined)
            if sends:
                bucket.plans.append(plan)
                if sum(p.long * p.r for p in bucket.plans) > BUCKET_NUMBERS:
                    joined = close(joined)  # before they leave
                    bucket = close(bucket)
        for item in (wave, joined, bucket):
            close(item)
        return items

    def _run_items(self, there: Callable[[MatrixPlan], bool]) -> None:
        while self._items and all(there(plan) for plan in self._items[0].plans):
            item = self._items.popleft()
            item.do(item.plans)

    @torch.no_grad()
    def _end(self) -> None:
        """A backward pass is over."""
        if self._open:
            with self._plainly():
                self._run_items(lambda plan: True)
            self._forget_pass()
            if self.after_pass is not None:  # and after what the framework does at the end
                at_end_of_backward(self.after_pass)

    def _plainly(self) -> Any:
        """Inside a user's autocast products would be rounded to bf16."""
        kind = self._comm.ranks.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def _project(self, plans: Sequence[MatrixPlan]) -> None:
        """Project gradients with bases that lie in slices; those of the next are on their way meanwhile."""
        bases = self._join(plans).wait()
        self._joining.clear()
        following = next((item for item in self._items if item.do == self._project), None)
        if following is not None:
            self._joining[following.plans[0].name] = self._join(following.plans)
        for plan in plans:
            rows, basis = self._held.pop(plan.name, None), bases[plan.name]
            if rows is not None:
                self._add(plan, rows, basis)

    def _join(self, plans: Sequence[MatrixPlan]) -> Pending[dict[str, Tensor | None]]:
        on_its_way = self._joining.get(plans[0].name)
        if on_its_way is not None:
            return on_its_way
        with_basis = [p for p in plans if self._has_basis(p)]
        nothing: dict[str, Tensor | None] = dict.fromkeys(p.name for p in plans)
        if not with_basis:
            return done(nothing)
        joining = self._bases.join(with_basis, {p.name: self._state(p) for p in with_basis})
        return Pending(lambda: {**nothing, **joining.wait()})

    def _add(self, plan: MatrixPlan, rows: Tensor, basis: Tensor | None) -> None:
        """Add the projection of this rank's own gradient."""
        if basis is None:
            return
        product = torch.empty(plan.long, plan.r, dtype=plan.dtype, device=basis.device)
        self._stepper.project(plan, self._state(plan), [rows], basis, product)
        self.sums.add(plan, product)

    def _average(self, plans: Sequence[MatrixPlan]) -> None:
        """New bases from the averaged gradients of a wave, and what these are in them."""
        if self._alone:  # what has no gradient stands still there
            plans = [p for p in plans if p.name in self._held]
        rows = self.sums.average(plans, self._held)
        for plan in plans:
            self._held.pop(plan.name, None)
        self._find(plans, rows)
        for dtype in sorted({p.dtype for p in plans}, key=str):  # the same order on all ranks
            wave = [p for p in plans if p.dtype == dtype and self._has_basis(p)]
            if not wave:
                continue
            bases = self._bases.join(wave, {p.name: self._state(p) for p in wave}).wait()
            for plan in wave:
                basis, blocks = bases[plan.name], rows.pop(plan.name)
                if blocks and basis is not None:
                    product = torch.empty(len(blocks[0]), plan.r, dtype=plan.dtype, device=basis.device)
                    self._stepper.project(plan, self._state(plan), blocks, basis, product)
                    self.sums.add_rows(plan, product)

    def _find(self, plans: Sequence[MatrixPlan], rows: Mapping[str, Sequence[Tensor]] | None) -> None:
        states = self._states()
        for dtype in sorted({p.dtype for p in plans}, key=str):
            new = self._refresher.find([p for p in plans if p.dtype == dtype], rows, states)
            self._new.append(new)
            for plan in new.plans:
                self._waiting.pop(plan.name, None)
                self._beside[plan.name] = self._refresher.beside(plan, new, states[plan.name])

    def _state(self, plan: MatrixPlan) -> MatrixState:
        return self._beside.get(plan.name) or self._states()[plan.name]

    def _has_basis(self, plan: MatrixPlan) -> bool:
        states = self._states()
        return plan.name in states and number_of(self._state(plan), "refreshes") > 0

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def flush(self) -> None:
        """Send what has not been sent. Collective."""
        if self._open:
            raise RuntimeError("the backward pass has not ended (an error in it?): call zero_grad() and begin anew")
        if self._unsent:
            for item in self._arrange(True):
                if item.do == self.sums.send:
                    item.do(item.plans)
            self._unsent = False
        self.sums.wait()

    def norm_squared(self) -> Tensor:
        """Σ ‖R‖² of what has been added up, over all matrices and ranks: float64, the same on all ranks. Collective."""
        self.flush()
        return self.sums.norm_squared()

    def scale_(self, factor: Tensor) -> None:
        """Multiply what has been added up by a number."""
        self.sums.scale_(factor)

    def step(self, plans: Sequence[MatrixPlan], groups: Groups) -> None:
        """Step matrices by the sums of their projected gradients, which are used up. Collective.

        Args:
            plans: those that are to move.
            groups: their hyper-parameters.
        """
        self.flush()
        if not self._passes:
            return
        states = self._states()
        moving = {p.name for p in plans}
        sums = self.sums.take([p for p in plans if p.name in states])
        for new in self._new:
            found = [p for p in new.plans if p.name in moving]
            if self._method.selection.evidence == "none":
                # Only now it is known which of them have a gradient.
                alive = self._refresher.alive(found, {n: [r] for n, r in sums.items() if r is not None})
                found = [p for p in found if p.name in alive]
            self._refresher.install(NewBases(found, new.indices, new.stored), states, groups)
        factor, wire = self.sums.factor, self._source.wire_dtype
        self.forget()
        self._stepper.run_projected(plans, states, groups, sums, factor, wire)


def _rows_of(gradient: Tensor, plan: MatrixPlan, shape: tuple[int, ...]) -> Tensor:
    """A's rows, long × short, of a matrix in the gradient of its parameter."""
    if plan.index is not None:
        gradient = gradient.view(shape)[plan.index]
    return as_rows(gradient.reshape(matrix_shape(shape, False) if plan.index is None else plan.shape), plan.side)


def _inside_reentrant_checkpoint() -> bool:
    code: Any = torch.utils.checkpoint.CheckpointFunction.backward.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
