"""Refreshing subspaces across ranks: evidence to the owner, decisions and bases back to the holders.

Nobody repeats a decomposition. What the owner decided travels with the basis, to every rank, so that the ranks agree on
which matrices have a basis and how often they have refreshed. Where the key alone decides, one number of each matrix
says whether it has a gradient.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.engine.bases import Bases
from ds_lowrank.engine.evidence import Evidence, Rows
from ds_lowrank.engine.state import MatrixState, number_of, tensor_of
from ds_lowrank.methods import Method
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.selections import Basis, Gram, Key
from ds_lowrank.selections.carry import overlap
from ds_lowrank.subspace.project import gram_of_short_rows

logger = logging.getLogger(__name__)

# Hyper-parameters of the parameter groups that step now, by the group's index.
Groups = Mapping[int, Mapping[str, Any]]
_HEADER = 1  # numbers before the indices in a verdict on the wire: is there a new basis


@dataclass
class RefreshStats:
    """Sums over the matrices that this rank owns and that have a new basis since the last reading.

    Attributes:
        refreshed: how many.
        seconds: wall time of the refreshes of this rank, exchanges included.
        decomposing: of which its own draws.
        overlap, overlaps: sum and number of overlaps with the basis before.
        captured, captures: sum and number of the shares of gradient energy inside the new subspace.
    """

    refreshed: int = 0
    seconds: float = 0.0
    decomposing: float = 0.0
    overlap: float = 0.0
    overlaps: int = 0
    captured: float = 0.0
    captures: int = 0


@dataclass(frozen=True)
class NewBases:
    """Bases that have been drawn and are not used yet.

    Attributes:
        plans: the matrices that have one; the shared ones are the same on all ranks.
        indices: name -> (r,) int32; ``None``: none of a gradient's directions.
        stored: name -> the rows that this rank keeps, encoded; nothing where bases are not stored.
    """

    plans: Sequence[MatrixPlan]
    indices: Mapping[str, Tensor | None]
    stored: Mapping[str, Sequence[Tensor]]


class Refresher:
    """Gives matrices that are due a new basis.

    Args:
        comm: the collectives.
        method: what is computed, and how states are kept.
        gram_dtype: float32 or float64.
    """

    def __init__(self, comm: Comm, method: Method, gram_dtype: torch.dtype):
        self._comm = comm
        self._method = method
        self._format = method.formats.basis
        self._rank = comm.ranks.rank
        self._gram_dtype = gram_dtype
        self._evidence = Evidence(comm, gram_dtype)
        self._bases = Bases(comm, method)
        self._warned = False
        self.stats = RefreshStats()

    def run(self, plans: Sequence[MatrixPlan], rows: Rows, states: Mapping[str, MatrixState], groups: Groups) -> None:
        """Refresh a wave of matrices side by side. Collective when one of them is shared.

        Args:
            plans: matrices of one dtype that are due and of which this rank keeps a state; the shared ones are the
                same on all ranks.
            rows: name -> blocks of rows of A's gradient on this rank.
            states: name -> state; the counters of shared matrices are known to every rank, others to their holder.
            groups: hyper-parameters by a group's index; ``betas``, for what carries moments over.
        """
        self.install(self.find(plans, rows, states), states, groups)

    def find(self, plans: Sequence[MatrixPlan], rows: Rows | None, states: Mapping[str, MatrixState]) -> NewBases:
        """New bases, encoded and with those who keep them, while states stay as they are. Collective as :meth:`run`.

        Args:
            plans, states: see :meth:`run`.
            rows: see :meth:`run`; ``None`` where the key alone decides and it is not known yet which matrices have a
                gradient: all of them get a basis.
        """
        start = time.perf_counter()
        shared = [p for p in plans if p.shared]
        local = [p for p in plans if not p.shared]
        fresh: dict[str, Tensor | None]  # name -> indices of a new basis; None: of no gradient's directions
        if self._method.selection.evidence == "gram":
            assert rows is not None
            totals = self._evidence.shared(shared, rows)
            drawn = {p.name: self._decompose(p, self._evidence.local(p, rows), states[p.name]) for p in local}
            # Taken out one by one: a Gram is gone when it has been decomposed.
            for plan in shared:
                if plan.name in totals:
                    drawn[plan.name] = self._decompose(plan, totals.pop(plan.name).wait(), states[plan.name])
            fresh = {p.name: basis.indices for p in local if (basis := drawn[p.name]) is not None}
            fresh.update(self._tell(shared, drawn))
        else:
            alive = {p.name for p in plans} if rows is None else self._evidence.alive(plans, rows)
            fresh = dict.fromkeys(sorted(alive))
            drawn = {}
            if self._method.selection.stored:
                mine = [p for p in plans if p.name in fresh and (p.owner == self._rank or not p.shared)]
                drawn = {p.name: self._draw(p, states[p.name]) for p in mine}
        found = [p for p in plans if p.name in fresh]
        stored = self._bring(found, drawn) if self._method.selection.stored else {}
        self.stats.seconds += time.perf_counter() - start
        return NewBases(found, fresh, stored)

    def beside(self, plan: MatrixPlan, new: NewBases, state: MatrixState) -> MatrixState:
        """A state as it will be with a new basis, for projecting; the state itself stays as it is."""
        indices = new.indices[plan.name]
        found = {**state, **dict(zip(self._format.keys("basis"), new.stored.get(plan.name, ())))}
        found["refreshes"] = number_of(state, "refreshes") + 1
        found["indices"] = torch.full((plan.r,), -1, dtype=torch.int32) if indices is None else indices
        return found

    def alive(self, plans: Sequence[MatrixPlan], rows: Rows) -> set[str]:
        """Names of matrices whose rows, of a gradient or of its projection, are finite and not all zero. Collective."""
        return self._evidence.alive(plans, rows)

    def _key(self, plan: MatrixPlan, state: MatrixState) -> Key:
        return Key(self._method.seed, plan.name, number_of(state, "refreshes"))

    def _decompose(self, plan: MatrixPlan, whole: Tensor, state: MatrixState) -> Basis | None:
        """Decompose on the owner. ``whole``: the Gram, or where rows are gathered A's gradient."""
        start = time.perf_counter()
        matrix, frame = gram_of_short_rows(whole, self._gram_dtype) if plan.gathers else (whole, None)
        found = self._draw(plan, state, Gram(matrix, frame, plan.gradient_dtype))
        self.stats.decomposing += time.perf_counter() - start
        if found is None:
            self._explain(plan, matrix)
        return found

    def _draw(self, plan: MatrixPlan, state: MatrixState, gram: Gram | None = None) -> Basis | None:
        selection, device = self._method.selection, self._comm.ranks.device
        found = selection.draw(self._key(plan, state), plan.short, plan.r, plan.dtype, device, gram)
        if found is not None and found.captured is not None:
            self.stats.captured += found.captured
            self.stats.captures += 1
        return found

    def _explain(self, plan: MatrixPlan, gram_sum: Tensor) -> None:
        if not self._warned and float(gram_sum.diagonal().sum()) != 0.0:  # a zero gradient is ordinary, NaN != 0
            self._warned = True
            logger.warning(
                "%s %s: its gradient is not finite or its Gram matrix cannot be decomposed; the matrix keeps the "
                "subspace it has. Reported once.",
                plan.name,
                plan.shape,
            )

    def _tell(self, plans: Sequence[MatrixPlan], drawn: Mapping[str, Basis | None]) -> dict[str, Tensor]:
        """Owners tell every rank their verdicts: name -> indices, of the matrices that have a new basis."""
        if not plans:
            return {}
        everyone = range(self._comm.ranks.size)
        said = []
        for plan in plans:
            if plan.owner == self._rank:
                basis = drawn[plan.name]
                indices = [-1] * plan.r if basis is None else basis.indices.tolist()
                # As float64 numbers, in which indices are exact.
                said.append(torch.tensor([float(basis is not None), *indices], dtype=torch.float64))
        owned = [[p for p in plans if p.owner == k] for k in everyone]
        sizes = [[_HEADER + p.r for p in of] for of in owned]
        sending = [said for _ in everyone]
        arrived = self._comm.exchange(sending, [sum(s) for s in sizes], torch.float64, "refresh verdicts").wait()
        return {
            plan.name: packed[_HEADER:].to(torch.int32)
            for of, size, values in zip(owned, sizes, arrived)
            for plan, packed in zip(of, values.cpu().split(size))
            if bool(packed[0])
        }

    def _bring(self, plans: Sequence[MatrixPlan], drawn: Mapping[str, Basis | None]) -> dict[str, Sequence[Tensor]]:
        """New bases to those who keep them: name -> this rank's rows, encoded."""
        vectors = {name: basis.vectors for name, basis in drawn.items() if basis is not None}
        shared = [p for p in plans if p.shared]
        arrived = self._bases.scatter(shared, vectors) if shared else {}
        arrived.update({p.name: vectors[p.name] for p in plans if not p.shared})
        return {name: self._format.encode(rows) for name, rows in arrived.items()}

    def install(self, new: NewBases, states: Mapping[str, MatrixState], groups: Groups) -> None:
        """Take new bases over, and carry moments into them. Collective as :meth:`run`."""
        start = time.perf_counter()
        if self._method.selection.stored:
            crosses = self._crosses(
                [p for p in new.plans if number_of(states[p.name], "refreshes")], new.stored, states
            )
            for plan in new.plans:
                state = states[plan.name]
                if plan.name in crosses:
                    self._carry(plan, state, crosses[plan.name], groups[plan.group]["betas"])
                if plan.name in new.stored:
                    self._format.put_(state, "basis", new.stored[plan.name])
        for plan in new.plans:
            state, indices = states[plan.name], new.indices[plan.name]
            if "indices" in state:
                known = tensor_of(state, "indices")
                known.fill_(-1) if indices is None else known.copy_(indices)
            state["refreshes"] = number_of(state, "refreshes") + 1
            self.stats.refreshed += plan.owner == self._rank
        self.stats.seconds += time.perf_counter() - start

    def _crosses(
        self, plans: Sequence[MatrixPlan], stored: Mapping[str, Sequence[Tensor]], states: Mapping[str, MatrixState]
    ) -> dict[str, Tensor]:
        """B_oldᵀ B_new (r × r), both as they are used, of every matrix of which this rank keeps rows of the basis.

        Of a sharded basis it is the sum of what the slices of rows contribute: on every rank that computes, if moments
        need it there, otherwise on the owner, which reports how far the subspace has turned. Collective then.
        """
        form, group = self._format, self._comm.ranks.shard_group
        crosses = {}
        for plan in [p for p in plans if p.name in stored]:
            new = form.decode(stored[plan.name], plan.r, plan.dtype)
            crosses[plan.name] = form.read(states[plan.name], "basis", plan.r, plan.dtype).to(new).mT @ new
        summing = []
        for plan in [p for p in plans if p.basis_sharded]:
            mine = crosses.pop(plan.name, None)
            if mine is None:
                mine = torch.zeros(plan.r, plan.r, dtype=plan.dtype, device=self._comm.ranks.device)
            if self._method.carry.needs_cross:
                summing.append((plan, self._comm.all_reduce(mine, "overlaps")))
            elif plan.owner in group:  # other copies of the model leave it to this one
                summing.append((plan, self._comm.reduce(mine, plan.owner, "overlaps")))
        for plan, pending in summing:
            total = pending.wait()
            if plan.owner == self._rank or self._method.carry.needs_cross:
                crosses[plan.name] = total
        return crosses

    def _carry(self, plan: MatrixPlan, state: MatrixState, cross: Tensor, betas: tuple[float, float]) -> None:
        """What moments do when the basis changes, and how far it has turned."""
        method = self._method
        slots = {slot.name: slot for slot in method.rule.slots if slot.turns != "fixed"}
        if method.carry.changes and slots and plan.shares[self._rank] is not None:
            opened = {name: method.states.read(state, name, plan.r, plan.dtype) for name in slots}
            home = next(iter(opened.values())).device
            method.carry(opened, cross.to(home), slots, number_of(state, "step"), betas)
            for name, value in opened.items():
                method.states.write_(state, name, value)
        if plan.owner == self._rank:
            turned = overlap(cross)
            self.stats.overlap += turned
            self.stats.overlaps += 1
            history = tensor_of(state, "overlaps")
            history.copy_(torch.cat([history[1:], history.new_tensor([turned])]))
