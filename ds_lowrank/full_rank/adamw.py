"""Plain AdamW for the parameters that are not projected: torch's own, on moments that may be narrower.

Their moments are kept as the weights are, or in bf16; in int8 by
:mod:`ds_lowrank.full_rank.adamw8bit`, which needs to know where a parameter begins in the flat
buffers that are stepped here. Under DDP each rank steps a part of them, see
:mod:`ds_lowrank.full_rank.dealt`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.layouts import BF16_MASTER, Layout, LayoutError, Member, ParameterLayout, Piece, local_tensors
from ds_lowrank.state_dict.adopt import moments_fault, refuse_together, tensor_name
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.rounding import PART, random_bits, round_stochastic, rounding_key

MOMENTS = ("exp_avg", "exp_avg_sq")

# Numbers that are widened at once where moments are narrower than what is computed with.
_PART = 1 << 22


def moment_dtype(state_dtype: str, weights: torch.dtype) -> torch.dtype:
    """Dtype of moments that are numbers: bf16, or float32 at least; float64 and complex ones for such weights."""
    if state_dtype != "bf16" or weights == torch.float64 or weights.is_complex:
        return torch.promote_types(weights, torch.float32)
    return torch.bfloat16


def moment_bytes(state_dtype: str, weights: torch.dtype, numel: int) -> int:
    """Bytes of both moments of consecutive weights that are not projected, from a parameter's first one on."""
    if state_dtype == "int8":
        return 2 * Formats(state_dtype).exp_avg.bytes(1, numel)
    return 2 * numel * moment_dtype(state_dtype, weights).itemsize


def new_state(tensor: Tensor, state_dtype: str) -> dict[str, Tensor]:
    """State of a tensor before its first step: ``step`` (float32 number), ``exp_avg`` and ``exp_avg_sq`` like it."""
    dtype = moment_dtype(state_dtype, tensor.dtype)
    # torch's fused kernel takes counters on the parameter's device
    state = {"step": torch.zeros((), dtype=torch.float32, device=tensor.device)}
    state.update({key: torch.zeros_like(tensor, dtype=dtype) for key in MOMENTS})
    return state


def ensure_full_rank(params: Iterable[Tensor], states: MutableMapping[Any, Any], state_dtype: str) -> None:
    """Make the state of those parameters that have none."""
    for p in params:
        if not states[p]:
            states[p].update(new_state(p, state_dtype))


# A tensor of the optimizer's groups, its step, a part of its flat memory on this rank, what was computed for the part,
# and where in that memory it begins.
Rounding = Callable[[Tensor, int, Tensor, Tensor, int], None]


def weight_rounding(layout: Layout, shapes: Mapping[str, tuple[int, ...]], seed: int | None) -> Rounding | None:
    """Writes bf16 weights that are not projected, rounded by bits that depend on their place in the whole parameter.

    Args:
        layout: any.
        shapes: name -> whole shape.
        seed: see :func:`ds_lowrank.states.rounding.rounding_key`; ``None``: they are rounded to nearest, with a
            warning where there are any.

    Raises:
        ds_lowrank.LayoutError: there is a seed, and no weight that the optimizer is given is bf16.
    """
    dtypes = {layout.dtype(name) for name in shapes}
    if seed is None:
        if torch.bfloat16 in dtypes and layout.ranks.rank == 0:
            warnings.warn(
                "the weights are bf16 without an fp32 master copy and are rounded to nearest: updates smaller than "
                "half a step of bf16 are lost. Set stochastic_rounding, or keep an fp32 master copy",
                stacklevel=2,
            )
        return None
    if torch.bfloat16 not in dtypes:
        remedy = "convert the model to bf16" if layout.by_parameter else f"set {BF16_MASTER} in its configuration"
        raise LayoutError(
            f"stochastic_rounding is for bf16 weights without an fp32 master copy, and {layout.kind} gives the "
            f"optimizer {', '.join(sorted(map(str, dtypes)))}. Leave it out, or {remedy}"
        )

    def write(tensor: Tensor, step: int, weights: Tensor, computed: Tensor, start: int) -> None:
        # A flat buffer holds several parameters, cut anywhere, and zeros that no parameter has.
        for name in layout.names_in(tensor):
            if name not in layout.pieces:  # all of it is on other ranks
                continue
            offset = layout.place(name)[1] - start
            first, last = max(0, offset), min(weights.numel(), offset + layout.weight(name).numel())
            key = rounding_key(seed, name, step)
            for begin in range(first, last, PART):
                end = min(begin + PART, last)
                at = torch.arange(begin - offset, end - offset, device=weights.device)
                bits = random_bits(_in_whole(at, layout.pieces[name], shapes[name]), key)
                weights[begin:end].copy_(round_stochastic(computed[begin:end], bits))

    return write


def _in_whole(at: Tensor, piece: Piece, shape: tuple[int, ...]) -> Tensor:
    """Arrangement in the row-major whole parameter of the elements ``at`` of a piece's memory."""
    if piece.dim is None:
        return piece.start + at
    # A slice of a later dimension: runs of it, a whole row of that dimension apart.
    inner = math.prod(shape[piece.dim + 1 :])
    width = (piece.stop - piece.start) * inner
    return (at // width) * (shape[piece.dim] * inner) + piece.start * inner + at % width


def step_full_rank(
    group: Mapping[str, Any],
    states: MutableMapping[Any, Any],
    state_dtype: str = "fp32",
    rounding: Rounding | None = None,
) -> None:
    """Step the parameters of a group that have a gradient, on whatever tensors a framework has put into it.

    Args:
        group: ``params`` (any shapes; DTensors too) and AdamW's hyper-parameters.
        states: the optimizer's, by tensor; made here where there is none, see :func:`new_state`.
        state_dtype: see :class:`ds_lowrank.LowRankConfig`.
        rounding: writes bf16 weights; ``None``: they are rounded to nearest.
    """
    params = [p for p in group["params"] if p.grad is not None]
    _make_ready(params, states, state_dtype)
    step_tensors(group, [Stepped(p, 0, p, cast(Tensor, p.grad), states[p]) for p in params], rounding)


class Stepped(NamedTuple):
    """What of a tensor of the optimizer's groups is stepped.

    Attributes:
        tensor: of the groups.
        start: where in its flat memory the weights begin.
        weights, gradient: of one shape; DTensors too.
        state: ``step``, a float32 number on the device of the weights, and the moments, of their shape.
    """

    tensor: Tensor
    start: int
    weights: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]


def step_tensors(group: Mapping[str, Any], stepped: Sequence[Stepped], rounding: Rounding | None) -> None:
    """Step what has a gradient and a state; see :func:`step_full_rank`."""
    alike: list[Stepped] = []
    apart: list[Stepped] = []
    for one in stepped:
        dtype = one.weights.dtype
        narrow = one.state["exp_avg"].dtype != dtype or (rounding is not None and dtype == torch.bfloat16)
        (apart if narrow else alike).append(one)
    if alike:
        moments = ([one.state[key] for one in alike] for key in (*MOMENTS, "step"))
        _adamw(group, [one.weights for one in alike], [one.gradient for one in alike], *moments)
    for one in apart:
        _step_in_parts(group, one, rounding)


def _make_ready(params: Sequence[Tensor], states: MutableMapping[Any, Any], state_dtype: str) -> None:
    ensure_full_rank(params, states, state_dtype)
    for p in params:
        states[p]["step"] = states[p]["step"].to(p.device)  # loaders leave it on the CPU
        for key in MOMENTS:  # a checkpoint may have them in another dtype
            states[p][key] = states[p][key].to(moment_dtype(state_dtype, p.dtype))


class FullRank(Protocol):
    """States and steps of the parameters that are not projected, in an optimizer's ``state``."""

    def ensure(self, states: MutableMapping[Any, Any]) -> None:
        """Make what is missing of what a framework wants to see before the first step."""
        ...

    def step(
        self, names: Sequence[str], group: Mapping[str, Any], states: MutableMapping[Any, Any]
    ) -> Sequence[Pending[None]]:
        """Step parameters of a group.

        Args:
            names: those that are to move, the same on all ranks; ``group["params"]`` are the tensors they lie in.
            group: also AdamW's hyper-parameters.
            states: the optimizer's.

        Returns:
            What writes the weights that other ranks have stepped, once they are here.
        """
        ...

    def collect(self, states: Mapping[Any, Any], takers: Sequence[int] | None = None) -> dict[str, dict[str, Tensor]]:
        """Entries of a ``state_dict`` by parameter, beside what torch makes of ``states``.

        Args:
            states: the optimizer's.
            takers: where states are dealt over the ranks, those that get them whole, on the CPU; the others get
                nothing. Collective there.
        """
        ...

    def adopt(self, states: MutableMapping[Any, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with what was loaded: ``states``, and what :meth:`collect` has made."""
        ...


class WideFullRank:
    """Moments as numbers, on whatever tensors a framework has put into the groups.

    Args:
        layout: how the parameters lie.
        comm: the collectives.
        members: of the parameters that are not projected.
        state_dtype: ``fp32`` or ``bf16``.
        rounding: writes bf16 weights; ``None``: they are rounded to nearest.
    """

    def __init__(
        self, layout: Layout, comm: Comm, members: Sequence[Member], state_dtype: str, rounding: Rounding | None
    ):
        self._layout, self._comm = layout, comm
        self._state_dtype, self._rounding = state_dtype, rounding
        # torch's checkpoints want them all, on all ranks
        self._tensors = [m.parameter for m in members] if layout.by_parameter else []

    def ensure(self, states: MutableMapping[Any, Any]) -> None:  # noqa: D102
        ensure_full_rank(self._tensors, states, self._state_dtype)

    def step(  # noqa: D102
        self, names: Sequence[str], group: Mapping[str, Any], states: MutableMapping[Any, Any]
    ) -> Sequence[Pending[None]]:
        moving = set(names)
        still = [n for tensor in group["params"] for n in self._layout.names_in(tensor) if n not in moving]
        if still and self._layout.by_parameter:
            group = {**group, "params": [p for p in group["params"] if self._layout.names_in(p)[0] in moving]}
        _make_ready([p for p in group["params"] if p.grad is not None], states, self._state_dtype)
        kept = [(view, view.clone()) for view in self._views(still, states)]
        step_full_rank(group, states, self._state_dtype, self._rounding)
        for view, before in kept:
            view.copy_(before)
        return ()

    def _views(self, names: Sequence[str], states: Mapping[Any, Any]) -> Iterator[Tensor]:
        """Weights and moments on this rank of parameters that do not move while others in their flat buffer do."""
        for name in names if not self._layout.by_parameter else ():
            if name in self._layout.pieces:
                weights = self._layout.weight(name)
                tensor, offset = self._layout.place(name)
                yield weights
                if tensor.grad is not None:
                    yield from (states[tensor][key].view(-1).narrow(0, offset, weights.numel()) for key in MOMENTS)

    def collect(  # noqa: D102
        self, states: Mapping[Any, Any], takers: Sequence[int] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        return {}

    def adopt(self, states: MutableMapping[Any, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Check what torch's loader has put on the tensors of the groups, and make it what a step takes. Collective.

        Raises:
            ValueError: on all ranks, when something does not fit.
        """
        layout = self._layout
        for name, entry in entries.items():
            states[layout.place(name)[0]] = dict(entry)
        # Before its first step a tensor may have an empty state.
        loaded = {key: state for key, state in states.items() if isinstance(key, Tensor) and state != {}}
        names = {tensor: layout.names_in(tensor) for tensor in loaded}
        found = [moments_fault(tensor_name(names[tensor]), tensor, state, MOMENTS) for tensor, state in loaded.items()]
        faults = [fault for fault in found if fault]
        # Ranks that hold shards may have made different steps: what has no gradient on one stands still there.
        refuse_together(self._comm, faults, {})
        for tensor, state in loaded.items():
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=tensor.device)
            for key in MOMENTS:
                state[key] = state[key].to(tensor.device)
                if layout.by_parameter:
                    state[key] = as_sharded(cast(ParameterLayout, layout), names[tensor][0], state[key])
                kept, like = local_tensors([state[key], tensor])
                if kept is state[key] and kept.stride() != like.stride():  # expanded, or from another layout
                    state[key] = torch.empty_like(like, dtype=kept.dtype).copy_(kept)


def held_part(layout: ParameterLayout, name: str, tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor of a parameter's shape, which may be whole on every rank: 1-D."""
    dim = layout.shard_dim(name)
    local, whole = layout.local(tensor, 0 if dim is None else dim)
    piece = layout.pieces.get(name)
    if not whole:
        return local.reshape(-1)
    if piece is None:
        return local.reshape(-1)[:0]
    if piece.dim is None:
        return local.reshape(-1)[piece.start : piece.stop]
    return local.narrow(piece.dim, piece.start, piece.stop - piece.start).reshape(-1)


def as_sharded(layout: ParameterLayout, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a parameter's shape as the parameter is sharded: only torch's own functions load it so."""
    dim = layout.shard_dim(name)
    if dim is None or local_tensors([tensor])[0] is not tensor:
        return tensor
    local = local_tensors([layout.place(name)[0]])[0]
    part = held_part(layout, name, tensor).clone()  # a view would keep the whole
    return layout.distribute(part.view(local.shape), tuple(tensor.shape), dim)


def keep_dtypes(states: MutableMapping[Any, Any], loaded: Mapping[Any, Any], tensors: Mapping[Any, Tensor]) -> None:
    """Undo what torch's loader did to the moments of full-rank parameters: it casts them to the dtype of the weights.

    Args:
        states: the optimizer's, after the load.
        loaded: number -> state, as it was saved.
        tensors: number -> tensor of the groups.
    """
    for key, tensor in tensors.items():
        found = loaded.get(key)
        if not isinstance(found, Mapping):
            continue  # nothing, or what is refused when it is adopted
        for moment in MOMENTS:
            if isinstance(found.get(moment), Tensor):
                states[tensor][moment] = found[moment].to(tensor.device)


def _adamw(
    group: Mapping[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
) -> None:
    # Element by element: what this rank holds of a DTensor is all that is needed.
    held = [_real(local_tensors(tensors)) for tensors in zip(params, grads, exp_avgs, exp_avg_sqs)]
    # The fused kernel takes it for granted that the four lie in the same order in memory, and without gaps.
    ordered = [_in_order(tensors) for tensors in held]
    packed = [[t.contiguous() for t in tensors] for tensors in ordered]
    weights, gradients, firsts, seconds = ([tensors[place] for tensors in packed] for place in range(4))
    adamw(
        weights,
        gradients,
        firsts,
        seconds,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for views, stepped in zip(ordered, packed):
        for place in (0, 2, 3):
            if stepped[place] is not views[place]:
                views[place].copy_(stepped[place])


def _in_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of tensors of one shape with their dimensions in the order in which the first has them in memory."""
    if all(t.is_contiguous() for t in tensors):
        return list(tensors)
    order = sorted(range(tensors[0].ndim), key=tensors[0].stride, reverse=True)
    return [t.permute(order) for t in tensors]


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Complex ones as their real and imaginary parts, as torch's AdamW steps them."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _step_in_parts(group: Mapping[str, Any], stepped: Stepped, rounding: Rounding | None) -> None:
    """Weights and moments of different dtypes: computed in float32, a part at a time, and each rounded once."""
    state = stepped.state
    held = _real(local_tensors([stepped.weights.detach(), *(state[key] for key in MOMENTS)]))
    kept = [t.reshape(-1) for t in held]  # copies of what is not row-major
    (flat_grad,) = (t.reshape(-1) for t in _real(local_tensors([stepped.gradient])))
    parts = zip(*(t.split(_PART) for t in (kept[0], flat_grad, *kept[1:])))
    for number, (weights, gradient, *moments) in enumerate(parts):
        narrow = [weights, *moments]
        wide = [t.float() for t in narrow]
        _adamw(group, [wide[0]], [gradient.float()], [wide[1]], [wide[2]], [state["step"].clone()])
        for tensor, computed in zip(narrow, wide):
            if tensor is weights and rounding is not None and weights.dtype == torch.bfloat16 and weights.numel():
                start = stepped.start + number * _PART
                rounding(stepped.tensor, int(state["step"]) + 1, weights, computed, start)
            elif computed is not tensor:
                tensor.copy_(computed)
    for tensor, flat in zip(held, kept):
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))
    state["step"].add_(1)
