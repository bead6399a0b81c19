"""Refreshing subspaces across ranks: Grams to the owner, decisions and bases back to the holders.

Nobody repeats a decomposition, and nobody gathers a full gradient but where the longer side is projected, whose Gram is
larger than the gradient. What the owner decided travels with the basis, to
every rank, so that the ranks agree on which matrices have a basis and how often they have refreshed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.engine.bases import Bases
from ds_lowrank.methods import Method
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.subspace.basis import Basis, carry_moments_, draw_basis, overlap
from ds_lowrank.subspace.project import gram, gram_of_short_rows

logger = logging.getLogger(__name__)

# What a rank keeps of one matrix; numbers and tensors only, so that weights_only=True loads it. See states.
MatrixState = dict[str, int | Tensor]
HISTORY = 16  # overlaps that a matrix's state remembers
_HEADER = 1  # numbers before the indices in a verdict on the wire: is there a new basis


@dataclass(frozen=True)
class Verdict:
    """What an owner tells every rank about one matrix; the basis itself goes to those who compute.

    Attributes:
        fresh: whether there is a new basis.
        indices: (r,) int32, the kept singular directions.
    """

    fresh: bool
    indices: Tensor

    def pack(self) -> Tensor:
        """As float64 numbers, in which indices are exact."""
        return torch.tensor([float(self.fresh), *self.indices.tolist()], dtype=torch.float64)

    @staticmethod
    def unpack(packed: Tensor) -> Verdict:
        """Inverse of :meth:`pack`."""
        return Verdict(bool(packed[0]), packed[_HEADER:].to(torch.int32))


@dataclass
class RefreshStats:
    """Sums over the matrices that this rank has decomposed since the last reading.

    Attributes:
        decomposed: how many.
        seconds: wall time of the refreshes of this rank, exchanges included.
        decomposing: of which its own decompositions.
        overlap, overlaps: sum and number of overlaps with the basis before.
        captured: sum of the shares of gradient energy inside the new subspace.
    """

    decomposed: int = 0
    seconds: float = 0.0
    decomposing: float = 0.0
    overlap: float = 0.0
    overlaps: int = 0
    captured: float = 0.0


class Refresher:
    """Gives matrices that are due a new basis.

    Args:
        comm: the collectives.
        method: what is computed, and how states are kept.
        gram_dtype: float32 or float64.
    """

    def __init__(self, comm: Comm, method: Method, gram_dtype: torch.dtype):
        self._comm = comm
        self._formats = method.formats
        self._rank = comm.ranks.rank
        self._selection = method.selection.name
        self._moments = method.carry.name
        self._seed = method.seed
        self._gram_dtype = gram_dtype
        self._bases = Bases(comm, method.formats.basis)
        self._warned = False
        self.stats = RefreshStats()

    def run(
        self,
        plans: Sequence[MatrixPlan],
        blocks: Mapping[str, Sequence[Tensor]],
        states: Mapping[str, MatrixState],
    ) -> None:
        """Refresh a wave of matrices side by side. Collective when one of them is shared.

        Args:
            plans: matrices of one dtype that are due and of which this rank keeps a state; the shared ones are the
                same on all ranks.
            blocks: name -> blocks of rows of A's gradient on this rank.
            states: name -> state; the counters of shared matrices are known to every rank, others to their holder.
        """
        if not plans:
            return
        start = time.perf_counter()
        shared = [p for p in plans if p.shared]
        totals = self._sum_grams([p for p in shared if not p.gathers], blocks)
        totals.update(self._gather_rows([p for p in shared if p.gathers], blocks))
        for plan in plans:  # while Grams are on their way
            if not plan.shared:
                state = states[plan.name]
                whole = self._rows(plan, blocks) if plan.gathers else self._gram(plan, blocks)
                drawn = self._draw(plan, whole, state)
                if drawn is not None:
                    stored = self._formats.basis.encode(drawn.vectors)
                    cross = self._cross(plan, state, stored) if _int(state, "refreshes") else None
                    self._install(plan, state, stored, drawn.indices, cross)
        if shared:
            self._refresh_shared(shared, totals, states)
        self.stats.seconds += time.perf_counter() - start

    def _gram(self, plan: MatrixPlan, blocks: Mapping[str, Sequence[Tensor]]) -> Tensor:
        device = self._comm.ranks.device
        parts = [gram(block.to(device), self._gram_dtype) for block in blocks[plan.name]]
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    def _rows(self, plan: MatrixPlan, blocks: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """The rows of A's gradient on this rank."""
        return torch.cat([block.to(self._comm.ranks.device, plan.dtype) for block in blocks[plan.name]])

    def _draw(self, plan: MatrixPlan, whole: Tensor, state: MatrixState) -> Basis | None:
        """Decompose on the owner. ``whole``: the Gram, or where rows are gathered A's gradient."""
        start = time.perf_counter()
        gram_sum, frame = gram_of_short_rows(whole, self._gram_dtype) if plan.gathers else (whole, None)
        drawn = draw_basis(
            gram_sum,
            plan.r,
            self._selection,
            plan.dtype,
            frame=frame,
            gradient_dtype=plan.gradient_dtype,
            seed=self._seed,
            name=plan.name,
            refresh=_int(state, "refreshes"),
        )
        self.stats.decomposing += time.perf_counter() - start
        if drawn is None:
            self._explain(plan, gram_sum)
            return None
        self.stats.decomposed += 1
        self.stats.captured += drawn.captured
        return drawn

    def _explain(self, plan: MatrixPlan, gram_sum: Tensor) -> None:
        if not self._warned and float(gram_sum.diagonal().sum()) != 0.0:  # a zero gradient is ordinary, NaN != 0
            self._warned = True
            logger.warning(
                "%s %s: its gradient is not finite or its Gram matrix cannot be decomposed; the matrix keeps the "
                "subspace it has. Reported once.",
                plan.name,
                plan.shape,
            )

    def _cross(self, plan: MatrixPlan, state: MatrixState, stored: Sequence[Tensor]) -> Tensor:
        """B_oldᵀ B_new of the rows that this rank keeps, both as they are used."""
        new = self._formats.basis.decode(stored, plan.r, plan.dtype)
        return self._formats.basis.read(state, "basis", plan.r, plan.dtype).to(new).mT @ new

    def _install(
        self,
        plan: MatrixPlan,
        state: MatrixState,
        stored: Sequence[Tensor] | None,
        indices: Tensor,
        cross: Tensor | None,
    ) -> None:
        """Take over what is kept here of a new basis. ``stored``: ``None`` where no row is computed."""
        if stored is not None:
            if cross is not None and self._moments != "keep":
                moment = self._formats.exp_avg
                exp_avg = moment.read(state, "exp_avg", plan.r, plan.dtype)
                carry_moments_(exp_avg, cross.to(exp_avg.device), self._moments)
                moment.write_(state, "exp_avg", exp_avg)
            self._formats.basis.put_(state, "basis", stored)
            tensor_of(state, "indices").copy_(indices)
        if cross is not None and plan.owner == self._rank:
            turned = overlap(cross)
            self.stats.overlap += turned
            self.stats.overlaps += 1
            history = tensor_of(state, "overlaps")
            history.copy_(torch.cat([history[1:], history.new_tensor([turned])]))
        state["refreshes"] = _int(state, "refreshes") + 1

    def _refresh_shared(
        self,
        plans: Sequence[MatrixPlan],
        totals: dict[str, Pending[Tensor]],
        states: Mapping[str, MatrixState],
    ) -> None:
        """Decompose what is owned here; verdicts to everyone, slices of bases to those who compute."""
        # Taken out one by one: a Gram is gone when it has been decomposed.
        drawn = {n: self._draw(p, totals.pop(n).wait(), states[n]) for p in plans if (n := p.name) in totals}
        verdicts = self._tell(plans, drawn)
        fresh = [p for p in plans if verdicts[p.name].fresh]
        if not fresh:
            return
        vectors = {name: basis.vectors for name, basis in drawn.items() if basis is not None}
        arrived = {n: self._formats.basis.encode(rows) for n, rows in self._bases.scatter(fresh, vectors).items()}
        crosses = self._sum_crosses([p for p in fresh if _int(states[p.name], "refreshes")], arrived, states)
        for plan in fresh:
            name = plan.name
            self._install(plan, states[name], arrived.get(name), verdicts[name].indices, crosses.get(name))

    def _sum_grams(
        self, plans: Sequence[MatrixPlan], blocks: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Pending[Tensor]]:
        """Grams of whole matrices, on their owners: the parts of the ranks in the owner's copy of the model."""
        totals: dict[str, Pending[Tensor]] = {}
        shard_group = self._comm.ranks.shard_group
        few = []
        before: Pending[Tensor] | None = None
        for plan in plans:
            if len(plan.contributors) != len(shard_group):
                few.append(plan)
            elif plan.owner in shard_group:  # other copies of the model have the same gradient and leave it to this one
                summing = self._comm.reduce(self._gram(plan, blocks), plan.owner, "Gram matrices")
                if plan.owner == self._rank:
                    totals[plan.name] = summing
                # One is computed while another travels: what is not owned here is freed as soon as it has left.
                if before is not None:
                    before.wait()
                before = summing
        if few:
            totals.update(self._exchange_grams(few, blocks))
        return totals

    def _exchange_grams(
        self, plans: Sequence[MatrixPlan], blocks: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Pending[Tensor]]:
        """The same where few ranks hold a matrix: only they send. Summed in rank order."""
        mine = {p.name: self._gram(p, blocks) for p in plans if self._rank in p.contributors}
        summing = self._sum_on_owners(plans, mine, lambda p: p.short, self._gram_dtype, "Gram matrices")
        owned = [p.name for p in plans if p.owner == self._rank]
        if not owned:
            summing.wait()  # its part is done when what it sends has left
        return {name: Pending(lambda name=name: summing.wait().pop(name)) for name in owned}  # type: ignore[misc]

    def _gather_rows(
        self, plans: Sequence[MatrixPlan], blocks: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Pending[Tensor]]:
        """Gradients of whole matrices, on their owners: rows from the ranks in the owner's copy, in rank order."""
        if not plans:
            return {}
        everyone, rank = range(self._comm.ranks.size), self._rank
        send = [
            [self._rows(p, blocks).reshape(-1) for p in plans if p.owner == k and rank in p.contributors]
            for k in everyone
        ]
        owned = [p for p in plans if p.owner == rank]
        coming = [[p for p in owned if k in p.contributors] for k in everyone]
        sizes = [[p.rows_of(k) * p.short for p in c] for k, c in zip(everyone, coming)]
        arriving = self._comm.exchange(send, [sum(s) for s in sizes], plans[0].dtype, "gathered gradients")

        def gather() -> dict[str, list[Tensor]]:
            rows: dict[str, list[Tensor]] = {p.name: [] for p in owned}
            for found, counts, values in zip(coming, sizes, arriving.wait()):
                for plan, part in zip(found, values.split(counts)):
                    rows[plan.name].append(part.view(-1, plan.short))
            return rows

        gathered = Pending(gather)
        if not owned:
            gathered.wait()  # its part is done when what it sends has left
        return {p.name: Pending(lambda name=p.name: torch.cat(gathered.wait().pop(name))) for p in owned}  # type: ignore[misc]

    def _sum_on_owners(
        self,
        plans: Sequence[MatrixPlan],
        mine: Mapping[str, Tensor],
        side: Callable[[MatrixPlan], int],
        dtype: torch.dtype,
        purpose: str,
    ) -> Pending[dict[str, Tensor]]:
        """Square matrices added up on the owners, from the ranks in their copy of the model, in rank order."""
        everyone = range(self._comm.ranks.size)
        send = [[mine[p.name] for p in plans if p.owner == k and self._rank in p.contributors] for k in everyone]
        owned = [p for p in plans if p.owner == self._rank]
        coming = [[p for p in owned if k in p.contributors] for k in everyone]
        arriving = self._comm.exchange(send, [sum(side(p) ** 2 for p in c) for c in coming], dtype, purpose)

        def totals() -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}
            for parts, values in zip(coming, arriving.wait()):
                for plan, part in zip(parts, values.split([side(p) ** 2 for p in parts])):
                    square = part.view(side(plan), side(plan))
                    sums[plan.name] = sums[plan.name].add_(square) if plan.name in sums else square.clone()
            return sums

        return Pending(totals)

    def _sum_crosses(
        self, plans: Sequence[MatrixPlan], fresh: Mapping[str, Sequence[Tensor]], states: Mapping[str, MatrixState]
    ) -> dict[str, Tensor]:
        """B_oldᵀ B_new (r × r) of every matrix, the sum of what the slices of rows contribute: on every rank that
        computes, if moments need it there, otherwise on the owner, which reports how far the subspace has turned.
        """
        crosses = {p.name: self._cross(p, states[p.name], fresh[p.name]) for p in plans if p.name in fresh}
        sharded = [p for p in plans if p.basis_sharded]
        if not sharded:
            return crosses
        if self._moments == "keep":
            mine = {p.name: crosses.pop(p.name) for p in sharded if p.name in crosses}
            return {
                **crosses,
                **self._sum_on_owners(sharded, mine, lambda p: p.r, sharded[0].dtype, "overlaps").wait(),
            }
        sums = torch.zeros(sum(p.r**2 for p in sharded), dtype=sharded[0].dtype, device=self._comm.ranks.device)
        parts = dict(zip([p.name for p in sharded], sums.split([p.r**2 for p in sharded])))
        for plan in sharded:
            square = parts[plan.name].view(plan.r, plan.r)
            if plan.name in crosses:
                square.copy_(crosses[plan.name])
            crosses[plan.name] = square
        self._comm.all_reduce(sums, "overlaps").wait()
        return crosses

    def _tell(self, plans: Sequence[MatrixPlan], drawn: Mapping[str, Basis | None]) -> dict[str, Verdict]:
        """Owners tell every rank what they decided."""
        everyone = range(self._comm.ranks.size)
        said = []
        for plan in plans:
            if plan.owner == self._rank:
                basis = drawn[plan.name]
                indices = torch.full((plan.r,), -1) if basis is None else basis.indices
                said.append(Verdict(basis is not None, indices).pack())
        sizes = [[_HEADER + p.r for p in plans if p.owner == k] for k in everyone]
        arrived = self._comm.exchange(
            [said for _ in everyone], [sum(s) for s in sizes], torch.float64, "refresh verdicts"
        ).wait()
        verdicts: dict[str, Verdict] = {}
        for k, values in zip(everyone, arrived):
            owned = [p for p in plans if p.owner == k]
            for plan, packed in zip(owned, values.cpu().split(sizes[k])):
                verdicts[plan.name] = Verdict.unpack(packed)
        return verdicts


def gram_dtype_on(option: str, device: torch.device) -> torch.dtype:
    """Dtype of Gram matrices for the option ``gram_dtype``; ``auto``: float64 on a CPU, float32 elsewhere."""
    wide = option == "float64" or (option == "auto" and device.type == "cpu")
    return torch.float64 if wide else torch.float32


def _int(state: MatrixState, key: str) -> int:
    value = state[key]
    assert isinstance(value, int)
    return value


def tensor_of(state: MatrixState, key: str) -> Tensor:
    """The tensor that a state has under ``key``."""
    value = state[key]
    assert isinstance(value, Tensor)
    return value
