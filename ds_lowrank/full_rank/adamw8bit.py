"""AdamW with 8-bit moments (arXiv 2110.02861) for the parameters that are not projected, however they are cut.

Blocks are counted from a parameter's first element, so that what is kept depends neither on the layout nor on the
number of ranks. Of a block that a boundary cuts every rank that has a part keeps the codes of its elements and the
scale of the whole: the parts' largest numbers are known before the others are computed, and one maximum over the ranks,
a number a cut block and moment, is on its way meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending, done
from ds_lowrank.full_rank.adamw import MOMENTS, Rounding
from ds_lowrank.kernels.moments import adamw_moments_, adamw_weights_
from ds_lowrank.layouts import Layout, LayoutError, Member
from ds_lowrank.states.blocks import BLOCK, largest
from ds_lowrank.states.dynamic import dequantise, quantise, zero_code
from ds_lowrank.states.formats import Dynamic
from ds_lowrank.states.runs import Cut, Runs, cut_blocks, runs_of

FORMATS = {"exp_avg": Dynamic(signed=True), "exp_avg_sq": Dynamic(signed=False)}

# Numbers that are widened at once; whole blocks.
_PART = 1 << 22

# What a rank keeps of one parameter: ``step`` (int) and ``start`` (int: where its piece begins), and for each moment
# ``_codes`` (elements of the piece, uint8) and ``_scale`` (slots of its runs, float32), 1-D.
State = dict[str, Any]


class AdamW8bit:
    """States and steps of the parameters that are not projected. Collective: it learns what every rank holds.

    Args:
        layout: how the parameters lie.
        comm: the collectives.
        members: of the parameters that are not projected.
        rounding: writes bf16 weights; ``None``: they are rounded to nearest.

    Attributes:
        layout, comm: as above.
        shapes: name -> whole shape.
        runs: name -> what this rank holds, empty perhaps.
        cut_counts: name -> its blocks of which more than one run has elements; the same on all ranks.

    Raises:
        ds_lowrank.LayoutError: a parameter is float64.
    """

    def __init__(self, layout: Layout, comm: Comm, members: Sequence[Member], rounding: Rounding | None):
        self.layout, self.comm = layout, comm
        self.shapes = {m.name: m.shape for m in members}
        self._rounding = rounding
        for m in members:
            dtype = layout.dtype(m.name)
            if dtype == torch.float64:
                raise LayoutError(
                    f"{m.name} {m.shape} is float64, and state_dtype 'int8' is read as float32: use fp32 (which keeps "
                    "float64 for float64 weights), or float32 weights"
                )
            if dtype.is_complex:
                raise LayoutError(f"{m.name} {m.shape} is {dtype}, of which state_dtype 'int8' has no codes: use fp32")
        self.runs = {name: self._runs(name, layout.pieces) for name in self.shapes}
        self.cut_counts = dict.fromkeys(self.shapes, 0)
        self._cuts: dict[str, Cut] = {}
        # Whoever holds a parameter whole has whole blocks.
        if len(comm.ranks.shard_group) > 1 and not layout.replicated:
            self._find_cuts()

    def _runs(self, name: str, pieces: Mapping[str, Any]) -> Runs:
        piece = pieces.get(name)
        return Runs() if piece is None else runs_of(piece.start, piece.stop, piece.dim, self.shapes[name])

    def _find_cuts(self) -> None:
        mine = {name: self.layout.pieces[name] for name in self.shapes if name in self.layout.pieces}
        everyone = self.comm.gather_objects(mine)
        for name in self.shapes:
            cut = cut_blocks([self._runs(name, everyone[k]) for k in self.comm.ranks.shard_group])
            self.cut_counts[name] = len(cut)
            found = Cut.of(self.runs[name], cut)
            if len(found.slots):
                self._cuts[name] = found.to(self.layout.weight(name).device)

    def keeps(self, name: str) -> bool:
        """Whether this rank has a state of a parameter: torch's checkpoints want one where nothing is held, too."""
        return bool(self.runs[name].numel) or self.layout.by_parameter

    def new_state(self, name: str) -> State:
        """State of a parameter before its first step; tensors on the device of its weights."""
        device = self._device(name)
        runs = self.runs[name]
        piece = self.layout.pieces.get(name)
        state: State = {"step": 0, "start": 0 if piece is None else piece.start}
        for quantity, form in FORMATS.items():
            codes, scale = form.keys(quantity)
            state[codes] = torch.full((runs.numel,), zero_code(form.signed), dtype=torch.uint8, device=device)
            state[scale] = torch.zeros(runs.count * runs.slots, dtype=torch.float32, device=device)
        return state

    def _device(self, name: str) -> torch.device:
        if name in self.layout.pieces:
            return self.layout.weight(name).device
        return self.layout.place(name)[0].device

    def ensure(self, states: MutableMapping[str, State]) -> None:
        """Make the states that are missing."""
        for name in self.shapes:
            if name not in states and self.keeps(name):
                states[name] = self.new_state(name)

    # -- step -----------------------------------------------------------------------------------------------------

    def step(self, names: Sequence[str], group: Mapping[str, Any], states: Mapping[str, State]) -> None:
        """Step parameters. Collective over the ranks of a copy of the model where the layout cuts blocks of them.

        Where a model is sharded a missing gradient counts as zero: ranks may differ in what has one. Elsewhere it means
        no step, as in torch's optimizers.

        Args:
            names: the same on all ranks, in the same order.
            group: AdamW's hyper-parameters.
            states: of all parameters that :meth:`keeps`.
        """
        if len(self.comm.ranks.shard_group) == 1 or self.layout.replicated:
            names = [name for name in names if self.layout.grad(name) is not None]
        betas = group["betas"]
        edges = {}
        for name in names:
            if name in self._cuts:
                moments = self._edge(name, states[name])
                grad = self.layout.grad(name)
                if grad is None:
                    grad = torch.zeros_like(self.layout.weight(name))
                adamw_moments_(self._cuts[name].blocks(grad).float(), moments[0], moments[1], betas)
                edges[name] = moments
        scales = self._scales(names, edges)
        for name in names:
            if self.keeps(name):
                states[name]["step"] += 1
            if self.runs[name].numel:
                self._step(name, group, states[name])
        self._write_edges(states, edges, scales)

    def _step(self, name: str, group: Mapping[str, Any], state: State) -> None:
        weights, grad = self.layout.weight(name).detach(), self.layout.grad(name)
        tensor, offset = self.layout.place(name)
        options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
        for at, slot, part in self.runs[name].parts(_PART):
            here = slice(at, at + part.numel)
            gradient = torch.zeros_like(weights[here]) if grad is None else grad[here]
            exp_avg, exp_avg_sq = (self._read(state, quantity, at, slot, part) for quantity in MOMENTS)
            adamw_moments_(gradient.float(), exp_avg, exp_avg_sq, group["betas"])
            narrow = weights[here]
            wide = narrow.float()
            adamw_weights_(wide, exp_avg, exp_avg_sq, state["step"], lr=float(group["lr"]), **options)
            if self._rounding is not None and narrow.dtype == torch.bfloat16:
                self._rounding(tensor, state["step"], narrow, wide, offset + at)
            elif wide is not narrow:
                narrow.copy_(wide)
            for quantity, moment in zip(MOMENTS, (exp_avg, exp_avg_sq)):
                self._write(state, quantity, moment, at, slot, part)
        self.layout.store(name, weights)

    def _read(self, state: State, quantity: str, at: int, slot: int, part: Runs) -> Tensor:
        form = FORMATS[quantity]
        codes, scale = (state[key] for key in form.keys(quantity))
        blocks = part.to_blocks(codes[at : at + part.numel])
        scales = scale[slot : slot + len(blocks), None]
        return part.from_blocks(form.decode([blocks, scales], BLOCK, torch.float32))

    def _write(self, state: State, quantity: str, values: Tensor, at: int, slot: int, part: Runs) -> None:
        form = FORMATS[quantity]
        codes, scale = form.encode(part.to_blocks(values))
        ours, scales = (state[key] for key in form.keys(quantity))
        ours[at : at + part.numel] = part.from_blocks(codes)
        scales[slot : slot + len(scale)] = scale[:, 0]

    # -- blocks that a boundary cuts ------------------------------------------------------------------------------

    def _edge(self, name: str, state: State) -> list[Tensor]:
        """Both moments of this rank's parts of cut blocks: k × ``BLOCK``, float32."""
        cut, found = self._cuts[name], []
        for quantity, form in FORMATS.items():
            codes, scale = (state[key] for key in form.keys(quantity))
            blocks = cut.blocks(codes, zero_code(form.signed))
            found.append(dequantise(blocks, scale[cut.slots, None], form.signed))
        return found

    def _scales(self, names: Sequence[str], edges: Mapping[str, Sequence[Tensor]]) -> Pending[dict[str, list[Tensor]]]:
        """Scales of both moments of the cut blocks of ``names``. Collective; ``edges`` are this rank's parts."""
        counts = [self.cut_counts[name] for name in names for _ in MOMENTS]
        if not any(counts):
            return done({})
        # As whole numbers the bits of what is not negative are in the numbers' order, and NaN is the largest.
        every = torch.zeros(sum(counts), dtype=torch.int32, device=self.comm.ranks.device)
        split = every.split(counts)
        for place, name in enumerate(names):
            for number, blocks in enumerate(edges.get(name, ())):
                top = largest(blocks)[:, 0].view(torch.int32).to(every.device)
                index = self._cuts[name].numbers.to(every.device)
                split[2 * place + number].scatter_reduce_(0, index, top, "amax")
        pending = self.comm.maximum(every, "scales")

        def found() -> dict[str, list[Tensor]]:
            pending.wait()
            tops = [part.view(torch.float32) for part in split]
            return {name: tops[2 * place : 2 * place + 2] for place, name in enumerate(names)}

        return Pending(found)

    def _write_edges(
        self,
        states: Mapping[str, State],
        edges: Mapping[str, Sequence[Tensor]],
        scales: Pending[dict[str, list[Tensor]]],
    ) -> None:
        """Write cut blocks again, whose scale is now known."""
        tops = scales.wait()
        for name, moments in edges.items():
            cut = self._cuts[name]
            for (quantity, form), values, top in zip(FORMATS.items(), moments, tops[name]):
                codes, scale = (states[name][key] for key in form.keys(quantity))
                mine = top.to(scale.device)[cut.numbers]
                cut.write(codes, quantise(values, form.signed, scales=mine[:, None])[0])
                scale[cut.slots] = mine

    def encode(self, states: Mapping[str, State], values: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> None:
        """Write moments into states. Collective over the ranks of a copy of the model.

        Args:
            states: of ``names``, written.
            values: name -> both moments of this rank's piece, 1-D; without those of which it holds nothing.
            names: the same on all ranks, in the same order.
        """
        for name in names:  # a parameter at a time: they are wide
            edges = {}
            for quantity, moment in zip(MOMENTS, values.get(name, ())):
                for at, slot, part in self.runs[name].parts(_PART):
                    self._write(states[name], quantity, moment[at : at + part.numel].float(), at, slot, part)
            if name in values and name in self._cuts:
                edges[name] = [self._cuts[name].blocks(moment.float()) for moment in values[name]]
            self._write_edges(states, edges, self._scales([name], edges))
