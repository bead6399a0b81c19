"""One step of projected matrices: rows in, refresh, direction, lift, updates out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.engine.bases import Bases
from ds_lowrank.engine.batches import Batches, waves_of
from ds_lowrank.engine.evidence import Squares
from ds_lowrank.engine.held import Held
from ds_lowrank.engine.refine import Refiner
from ds_lowrank.engine.refresh import Groups, Refresher
from ds_lowrank.engine.rows import Arrived, Blocks, RowExchange
from ds_lowrank.engine.state import MatrixState, NewStates, number_of
from ds_lowrank.engine.trial import Trial
from ds_lowrank.layouts.base import Layout
from ds_lowrank.methods import Method
from ds_lowrank.plan.geometry import Box
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.rules import Hyper, Stack, Update
from ds_lowrank.states.rounding import Place, rounding_key
from ds_lowrank.subspace.project import Push, drop_rounding_, lift_, project, round_, row_squares
from ds_lowrank.subspace.sides import Side, as_rows

States = Mapping[str, MatrixState]
# name -> B (short × r), None where this rank computes no row.
WholeBases = Mapping[str, Tensor | None]


class LowRankStep:
    """Steps projected matrices.

    Args:
        layout: where weights and gradients lie.
        comm: the collectives.
        plans: of all projected matrices.
        refresher: gives new bases.
        method: what is computed, and how states are kept.
        rounding_seed: of stochastic rounding of bf16 weights; ``None``: they are rounded to nearest.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Comm,
        plans: Sequence[MatrixPlan],
        refresher: Refresher,
        method: Method,
        rounding_seed: int | None = None,
    ):
        self._rounding_seed = rounding_seed
        self._method = method
        self._periodic = method.selection.periodic
        # Whether the basis moves in every step: by a sum over the ranks, those that compute no row too.
        self._sketches = method.selection.evidence == "sketch"
        # First matrices of runs whose rule has been looked at, or need not be.
        self._tried: set[str] = set()
        self._trial = None if method.rule.kept_step is not None else Trial(comm, method.rule)
        self._filled: dict[str, tuple[Tensor, int, Tensor | None]] = {}
        self._comm = comm
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device
        self._held = Held(layout)
        self._rows = RowExchange(comm, self._held)
        self._bases = Bases(comm, method)
        self._batches = Batches(plans, self._rank, method.states)
        self._refresher = refresher
        self._refiner = Refiner(comm, method)
        self.states = NewStates(self._rank, method.states, self._held.home)
        # Sums of projected gradients, see accumulate(); None where this rank computes no row.
        self._projected: dict[str, Tensor | None] = {}
        self._factor: Tensor | None = None  # on these sums
        self._wire: Callable[[str], torch.dtype] | None = None  # of directions, by parameter
        # |∇A_i|² of every row where a refresh has found them, until the step; None: nobody wants them.
        self._squares: Squares | None = {} if method.rule.reads_gradient else None

    def run(self, plans: Sequence[MatrixPlan], states: States, groups: Groups) -> None:
        """Step matrices. Collective when one of them is shared.

        Args:
            plans: all projected matrices that step in this call, in the model's order.
            states: name -> state, see :class:`ds_lowrank.engine.state.NewStates`.
            groups: their hyper-parameters: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``scale``.
        """
        self._forget_gradients()
        # On one process and under DDP, which gives all ranks the same gradients, a missing one means no step, as in
        # torch's optimizers. Where a model is sharded it counts as zero, as DeepSpeed delivers it: ranks may differ in
        # what has one, and the collectives must not.
        summed, asked = self._projected, self._held.has_gradient
        plans = [
            p for p in plans if p.name in states and (not p.shared or not p.replicated or p.name in summed or asked(p))
        ]
        due = [p for p in plans if self.is_due(p, states)]
        if due:
            due = [p for p in due if p.shared or p.name in summed or asked(p)]
            for wave in waves_of(due):
                self.refresh_and_step(wave, states, groups)
            done = {p.name for p in due if p.shared}
            plans = [p for p in plans if p.name not in done]
        # A matrix whose gradient has always been zero has no basis: no step.
        self._step_batches([p for p in plans if states[p.name]["refreshes"]], states, groups)
        self._forget_gradients()

    def run_projected(
        self,
        plans: Sequence[MatrixPlan],
        states: States,
        groups: Groups,
        sums: Mapping[str, Tensor | None],
        factor: Tensor | None,
        wire: Callable[[str], torch.dtype],
    ) -> None:
        """Step matrices by what was projected before, in bases that they have. Collective when one of them is shared.

        Args:
            plans, states, groups: see :meth:`run`.
            sums: name -> R (rows × r) of the rows that this rank computes, ``None`` where it computes none; emptied.
                Matrices that are not here stand still.
            factor: on R, a tensor of one number; ``None``: 1.
            wire: dtype in which directions of a parameter travel.
        """
        self._held.forget()
        self._projected, self._factor, self._wire = dict(sums), factor, wire
        try:
            moving = [p for p in plans if p.name in states and p.name in sums and states[p.name]["refreshes"]]
            self._step_batches(moving, states, groups)
        finally:
            self._projected, self._factor, self._wire = {}, None, None
            self._held.forget()

    def accumulate(self, plans: Sequence[MatrixPlan], states: States) -> None:
        """Project the gradients of a micro-step and add them to what the next step uses instead of a gradient.

        Collective when one of ``plans`` is shared. A projection is linear: the sum of projections is the projection of
        the sum, as long as the basis stays.

        Args:
            plans: matrices of one parameter that are not due for a refresh.
            states: see :meth:`run`.
        """
        plans = [p for p in plans if p.name in states]
        rows = self._rows.collect(plans).wait()
        for batch in self._batches.group(plans):
            bases = self._bases.join(batch, states).wait()
            for plan in batch:
                product, basis = None, bases[plan.name]
                if basis is not None:
                    product = torch.empty(plan.rows_of(self._rank), plan.r, dtype=plan.dtype, device=self._device)
                    self.project(plan, states[plan.name], rows[plan.name], basis, product)
                before = self._projected.get(plan.name)
                self._projected[plan.name] = product if before is None or product is None else before.add_(product)

    @property
    def accumulating(self) -> bool:
        """Whether there are accumulated projections."""
        return bool(self._projected)

    def forget(self) -> None:
        """Drop accumulated projections."""
        self._projected.clear()

    def _forget_gradients(self) -> None:
        """Let go of what one step holds: at its end, and where one has failed at the beginning of the next."""
        self._held.forget()
        if self._squares:
            self._squares.clear()

    def forget_states(self) -> None:
        """Let go of states in whose place others were loaded."""
        self._batches.forget()
        self._filled.clear()

    def is_due(self, plan: MatrixPlan, states: States) -> bool:
        """Whether a matrix refreshes its subspace before its next step."""
        step = states[plan.name]["step"]
        return bool(step == 0 or (self._periodic and is_due(int(step), plan.phase, plan.gap)))

    def refresh_and_step(self, plans: Sequence[MatrixPlan], states: States, groups: Groups) -> None:
        """Refresh a wave of matrices that are due, and step the shared ones. Collective when one of them is shared.

        Args:
            plans: see :meth:`run`; the shared ones are the same on all ranks. Of the others no row has to be held
                until the step, which they make with all that are not due.
            states, groups: see :meth:`run`.
        """
        for dtype in sorted({p.dtype for p in plans}, key=str):  # the same order on all ranks
            wave = [p for p in plans if p.dtype == dtype]
            shared = [p for p in wave if p.shared]
            rows = self._rows.collect(shared).wait() if shared else {}
            rows.update({p.name: self._rows.local(p) for p in wave if not p.shared})
            self._refresher.run(wave, rows, states, groups, self._squares)
            for batch in self._batches.group([p for p in shared if states[p.name]["refreshes"]]):
                leaving = self._step_batch(batch, rows, self._bases.join(batch, states).wait(), states, groups)
                if leaving is not None:
                    self._arrive(leaving, states, groups)
        self._held.store()

    def _step_batches(self, plans: Sequence[MatrixPlan], states: States, groups: Groups) -> None:
        """Step matrices that have a basis; while one batch is computed, rows and bases of the next are on their way."""
        batches = self._batches.group(plans)
        ahead = self._fetch(batches[0], states) if batches and batches[0][0].shared else None
        leaving: Leaving | None = None
        rows: Blocks
        bases: WholeBases
        for i, batch in enumerate(batches):
            if ahead is not None:
                rows, bases = ahead[0].wait(), ahead[1].wait()
            else:
                rows, bases = self._lying_here(batch, states)
                batch = [p for p in batch if p.name in rows]
            following = batches[i + 1] if i + 1 < len(batches) else None
            ahead = self._fetch(following, states) if following and following[0].shared else None
            left, leaving = leaving, self._step_batch(batch, rows, bases, states, groups) if batch else None
            if left is not None:
                self._arrive(left, states, groups)
        if leaving is not None:
            self._arrive(leaving, states, groups)
        self._held.store()

    def _lying_here(self, batch: Sequence[MatrixPlan], states: States) -> tuple[Blocks, WholeBases]:
        """Rows and bases of matrices that lie here whole, but for those without a gradient."""
        rows: Blocks = {}
        bases: dict[str, Tensor | None] = {}
        for plan in batch:
            gradient = None if plan.name in self._projected else self._held.gradient_rows(plan)
            if gradient is not None or plan.name in self._projected:
                rows[plan.name] = [] if gradient is None else [gradient]
                bases[plan.name] = self._bases.whole(plan, states[plan.name])
        return rows, bases

    def _fetch(
        self, batch: Sequence[MatrixPlan], states: States
    ) -> tuple[Pending[Blocks], Pending[dict[str, Tensor | None]]]:
        """Rows and bases of shared matrices, on their way."""
        return self._rows.collect([p for p in batch if p.name not in self._projected]), self._bases.join(batch, states)

    def _step_batch(
        self,
        batch: Sequence[MatrixPlan],
        rows: Blocks,
        bases: WholeBases,
        states: States,
        groups: Groups,
    ) -> Leaving | None:
        """Step a batch; of what is shared, updates leave for those who hold the weights."""
        updates: dict[str, Tensor] = {}
        for run in self._batches.runs(batch, states) if len(batch) > 1 else [batch]:
            self._step_run(run, rows, bases, states, groups[run[0].group], updates)
        if not batch[0].shared:
            return None
        if batch[0].lifted_everywhere:
            assert self._wire is not None
            # One dtype, so that all of a batch travels together.
            dtype = min((self._wire(p.parameter) for p in batch), key=lambda d: d.itemsize)
            directions = self._rows.spread(batch, updates, min(dtype, batch[0].dtype, key=lambda d: d.itemsize))
            return Leaving(list, (), Lifting(batch, directions, bases))
        weights = self._rows.hand_round(batch) if batch[0].replicated else ()
        return Leaving(self._rows.send_back(batch, updates), weights)

    def _lift_everywhere(self, lifting: Lifting, states: States, groups: Groups) -> None:
        """Move replicas of whole matrices, by the same numbers on all ranks."""
        directions = lifting.directions.wait()
        for plan in lifting.plans:
            group, (m, n) = groups[plan.group], plan.shape
            lr, box = float(group["lr"]), Box(0, m, 0, n)
            place = None if self._rounding_seed is None else self._place(plan, states[plan.name], box, plan.side)
            low = directions.pop(plan.name).to(plan.dtype)
            weights = as_rows(self._held.weights(plan, box), plan.side)
            keep = 1.0 - lr * group["weight_decay"]
            lift_(weights, low, lifting.bases[plan.name], lr * group["scale"], keep, place)

    def _arrive(self, leaving: Leaving, states: States, groups: Groups) -> None:
        """Move the weights of this rank by what other ranks have computed."""
        if leaving.lifting is not None:
            self._lift_everywhere(leaving.lifting, states, groups)
        for plan, box, values in leaving.updates():
            group = groups[plan.group]
            keep = 1.0 - float(group["lr"]) * group["weight_decay"]
            place = None if self._rounding_seed is None else self._place(plan, states[plan.name], box, "right")
            _apply(self._held.weights(plan, box), values.view(box.shape), plan.dtype, keep, place)
        for weights in leaving.weights:
            weights.wait()

    def _step_run(
        self,
        run: Sequence[MatrixPlan],
        rows: Blocks,
        bases: WholeBases,
        states: States,
        group: Mapping[str, Any],
        updates: dict[str, Tensor],
    ) -> None:
        """Step the rows of A that this rank computes: a view of them in place, buffered ones into ``updates``."""
        step = int(states[run[0].name]["step"]) + 1
        for plan in run:
            states[plan.name]["step"] = step
        shares = [p.shares[self._rank] for p in run]
        here = [p for p, share in zip(run, shares) if share is not None]
        trial = None if self._trial is None or run[0].name in self._tried else self._new_trial(run)
        # Of a shared matrix a rank with no row still has a part in the rule's sums, and in a step of the basis.
        resting = not here and not (self._method.rule.sums and run[0].shared)
        if resting and not (self._sketches and run[0].shared):
            for plan in run:
                self._projected.pop(plan.name, None)
            if trial is not None:
                trial.stand_by(run)
            return
        counts = [0 if share is None else share.stop - share.start for share in shares]
        r = torch.empty(sum(counts), run[0].r, dtype=run[0].dtype, device=self._device)
        cuts = [count for count in counts if count]
        parts = dict(zip([p.name for p in here], r.split(cuts) if len(cuts) > 1 else [r]))
        for plan in run:
            summed, basis = self._projected.pop(plan.name, None), bases[plan.name]
            if summed is not None:
                parts[plan.name].copy_(summed)
                if self._factor is not None:
                    parts[plan.name].mul_(self._factor)
            elif plan.name in parts and basis is not None:
                if self._squares is not None:
                    self._find_squares(plan, rows[plan.name], self._squares)
                self.project(plan, states[plan.name], rows[plan.name], basis, parts[plan.name])
        refining = None
        if self._sketches:
            refining = self._refiner.start(run, parts, rows, bases)
        if not self._method.rule.reads_gradient:
            for plan in run:
                rows.pop(plan.name, None)  # what was brought here goes before updates come
        hyper = Hyper(
            float(group["lr"]),
            group["betas"],
            group["eps"],
            group["weight_decay"],
            group["scale"],
            step,
            self._method.rule_options,
        )
        if resting:  # it has a part in the basis' step alone
            update = Update(None)
            if trial is not None:
                trial.stand_by(run)
        else:
            update = self._direct(run, here, counts, r, hyper, rows, bases, states, trial)
        lows = _parts(update.low, cuts, self._device)
        scales = _parts(update.row_scale, cuts, self._device)
        for plan, low, scale in zip(here, lows, scales):
            if low is not None and plan.lifted_everywhere:
                updates[plan.name] = low
                continue
            self._lift(plan, states[plan.name], low, scale, rows.pop(plan.name, ()), bases[plan.name], hyper, updates)
        if refining is not None:
            self._refiner.finish(refining, states, hyper)

    def _find_squares(self, plan: MatrixPlan, blocks: Sequence[Tensor], squares: Squares) -> None:
        """Squares of rows ahead of the projection, which takes half the time on a CPU where the gradient is cached."""
        if plan.name not in squares and all(b.device.type == "cpu" and b.stride(1) == 1 for b in blocks):
            squares[plan.name] = [row_squares(block, plan.dtype) for block in blocks]

    def project(
        self, plan: MatrixPlan, state: MatrixState, blocks: Sequence[Tensor], basis: Tensor, out: Tensor
    ) -> None:
        """R from the blocks of the gradient's rows, into ``out``."""
        drawn = self._drawn(plan.name, state)
        at = 0
        for block in blocks:
            if block.device != self._device:
                block = block.to(self._device)
            product = out if len(blocks) == 1 else out[at : at + len(block)]
            project(block, basis, product)
            if drawn is not None:
                drop_rounding_(product, block, drawn, plan.gradient_dtype)
            at += len(block)

    def _drawn(self, name: str, state: MatrixState) -> Tensor | None:
        """Columns of a basis whose directions are none of a gradient's, where that had too few; else ``None``."""
        indices = state["indices"]
        assert isinstance(indices, Tensor)
        known = self._filled.get(name)
        if known is None or known[0] is not indices or known[1] != indices._version:
            drawn = indices < 0 if int(indices[0]) >= 0 > int(indices[-1]) else None
            known = self._filled[name] = (indices, indices._version, drawn)
        return known[2]

    def _direct(
        self,
        run: Sequence[MatrixPlan],
        here: Sequence[MatrixPlan],
        counts: Sequence[int],
        r: Tensor,
        hyper: Hyper,
        rows: Blocks,
        bases: WholeBases,
        states: States,
        trial: Trial | None,
    ) -> Update:
        """What the rule makes of R (overwritten), computed where the moments lie."""
        rule, layout = self._method.rule, self._method.states
        kept = self._batches.kept(run, here, states)
        if here and kept:
            home = next(iter(kept.values())).device
            r = r if r.device == home else r.to(home)
        elif kept:  # of no row there are no states, and so no home
            kept = {key: tensor.to(r.device) for key, tensor in kept.items()}
        if rule.kept_step is not None:
            update = rule.kept_step(layout.formats, kept, r, hyper)
            self._batches.put(run, states, kept)
            return update
        home = r.device
        blocks = [[_on(home, b) for b in rows.get(p.name, ())] for p in run] if rule.reads_gradient else []
        whole = [None if basis is None else _on(home, basis) for basis in (bases[p.name] for p in run)]
        opened = {slot.name: layout.read(kept, slot.name, r.shape[1], r.dtype) for slot in rule.slots}
        known = {}
        if self._squares:
            known = {k: found for k, p in enumerate(run) if (found := self._squares.pop(p.name, None)) is not None}
        stack = Stack(counts, blocks, whole, home, {k: [_on(home, part) for part in of] for k, of in known.items()})
        stepping = rule.step(r, opened, hyper, stack) if trial is None else trial.watch(run, r, opened, hyper, stack)
        update = self._drive(stepping, run[0].shared) if isinstance(stepping, Generator) else stepping
        for name, value in opened.items():
            layout.write_(kept, name, value)
        self._batches.put(run, states, kept)
        return update

    def _new_trial(self, run: Sequence[MatrixPlan]) -> Trial | None:
        self._tried.add(run[0].name)
        assert self._trial is not None
        return self._trial if self._trial.is_new(run) else None

    def _drive(self, steps: Generator[Tensor, Tensor, Update], shared: bool) -> Update:
        """Give a rule the sums over the ranks that it asks for."""
        try:
            partial = next(steps)
            while True:
                total = partial
                if shared:  # of a copy: what a rule has yielded stays its own
                    mine = partial.to(self._device, copy=True).contiguous()
                    total = self._comm.all_reduce(mine, "sums of a rule").wait().to(partial.device)
                partial = steps.send(total)
        except StopIteration as stop:
            return stop.value

    def _lift(
        self,
        plan: MatrixPlan,
        state: MatrixState,
        low: Tensor | None,
        scale: Tensor | None,
        blocks: Sequence[Tensor],
        basis: Tensor | None,
        hyper: Hyper,
        updates: dict[str, Tensor],
    ) -> None:
        """Move the weights of rows that lie where they are computed; updates of the others."""
        share = plan.shares[self._rank]
        assert share is not None
        step_size, keep = hyper.lr * hyper.scale, 1.0 - hyper.lr * hyper.weight_decay
        whole = share.stop - share.start - (0 if share.buffer is None else _buffered_rows(plan, share.buffer))
        if share.view is not None:
            weights = self._held.weight_rows(plan)
            place = None if self._rounding_seed is None else self._place(plan, state, share.view, plan.side)
            inside = low if low is None or share.buffer is None else low[:whole]
            push = None
            if scale is not None:
                push = Push(scale if share.buffer is None else scale[:whole], hyper.lr, blocks[0])
            if weights.device == self._device:
                lift_(weights, inside, basis, step_size, keep, place, push)
            else:  # offloaded weights visit the device one matrix at a time
                visiting = weights.to(self._device)
                if push is not None:
                    push = push._replace(gradient=push.gradient.to(self._device))
                lift_(visiting, inside, basis, step_size, keep, place, push)
                weights.copy_(visiting)
        if share.buffer is not None:
            update = torch.empty(share.buffer.shape, dtype=plan.dtype, device=self._device)
            push = None if scale is None else Push(scale[whole:], hyper.lr, blocks[-1])
            inside = None if low is None else low[whole:]
            lift_(as_rows(update, plan.side), inside, basis, step_size, 0.0, None, push)
            updates[plan.name] = update

    def _place(self, plan: MatrixPlan, state: MatrixState, box: Box, side: Side) -> Place | None:
        """Where the rows that ``side`` makes of a box are in W, for stochastic rounding."""
        if plan.weight_dtype != torch.bfloat16:
            return None
        assert self._rounding_seed is not None
        n = plan.shape[1]
        key = rounding_key(self._rounding_seed, plan.name, number_of(state, "step"))
        return Place(key, box.top * n + box.left, (n, 1) if side == "right" else (1, n))


class Lifting(NamedTuple):
    """Directions of all rows, on their way to every rank.

    Attributes:
        plans: of a batch.
        directions: name -> N, long × r.
        bases: name -> B, short × r.
    """

    plans: Sequence[MatrixPlan]
    directions: Pending[dict[str, Tensor]]
    bases: WholeBases


class Leaving(NamedTuple):
    """Updates and weights on their way to those who hold them.

    Attributes:
        updates: waits for updates of rows that were computed elsewhere.
        weights: copies of rows that every rank holds.
        lifting: what moves matrices that every rank holds whole.
    """

    updates: Callable[[], Arrived]
    weights: Sequence[Pending[None]]
    lifting: Lifting | None = None


def is_due(step: int, phase: int, gap: int) -> bool:
    """Whether a matrix that has made ``step`` steps refreshes before its next: at its first, then every ``gap``."""
    return step == 0 or (step - phase) % gap == 0


def _apply(weights: Tensor, update: Tensor, dtype: torch.dtype, keep: float, place: Place | None) -> None:
    """W ← keep · W + update, rounded once, as ``lift_`` does where rows lie."""
    if weights.dtype == dtype:
        weights.mul_(keep).add_(update.to(weights.device)) if keep != 1.0 else weights.add_(update.to(weights.device))
    else:
        round_(weights, weights.to(dtype).mul_(keep).add_(update.to(weights.device)), place)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)


def _buffered_rows(plan: MatrixPlan, buffer: Box) -> int:
    height, width = buffer.shape
    return height if plan.side == "right" else width


def _parts(whole: Tensor | None, cuts: Sequence[int], device: torch.device) -> Iterable[Tensor | None]:
    """What a rule has given for rows, matrix by matrix."""
    if whole is None:
        return [None] * len(cuts)
    if whole.device != device:
        whole = whole.to(device)
    return whole.split(cuts) if len(cuts) > 1 else [whole]
