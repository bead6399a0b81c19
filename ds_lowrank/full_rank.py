"""Plain AdamW for the parameters that are not projected: torch's own, on moments that may be narrower.

Their moments are kept as the weights are, or in bf16; in int8 by :mod:`ds_lowrank.adamw8bit`, which needs to know where
a parameter begins in the flat buffers that are stepped here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ds_lowrank.layouts import BF16_MASTER, Layout, LayoutError, Member, Piece, local_tensors
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.rounding import PART, random_bits, round_stochastic, rounding_key

MOMENTS = ("exp_avg", "exp_avg_sq")

# Numbers that are widened at once where moments are narrower than what is computed with.
_PART = 1 << 22


def moment_dtype(state_dtype: str, weights: torch.dtype) -> torch.dtype:
    """Dtype of moments that are numbers: bf16, or float32 at least; float64 for float64 weights."""
    if state_dtype != "bf16" or weights == torch.float64:
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
    """Places in the row-major whole parameter of the elements ``at`` of a piece's memory."""
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
    ensure_full_rank(params, states, state_dtype)
    for p in params:
        states[p]["step"] = states[p]["step"].to(p.device)  # loaders leave it on the CPU
        for key in MOMENTS:  # a checkpoint may have them in another dtype
            states[p][key] = states[p][key].to(moment_dtype(state_dtype, p.dtype))
    apart = {p for p in params if states[p]["exp_avg"].dtype != p.dtype or (rounding and p.dtype == torch.bfloat16)}
    alike = [p for p in params if p not in apart]
    if alike:
        _adamw(group, alike, [p.grad for p in alike], *([states[p][k] for p in alike] for k in (*MOMENTS, "step")))
    for p in params:
        if p in apart:
            _step_in_parts(group, p, states[p], rounding)


class FullRank(Protocol):
    """States and steps of the parameters that are not projected, in an optimizer's ``state``."""

    def ensure(self, states: MutableMapping[Any, Any]) -> None:
        """Make what is missing of what a framework wants to see before the first step."""
        ...

    def step(self, names: Sequence[str], group: Mapping[str, Any], states: MutableMapping[Any, Any]) -> None:
        """Step parameters of a group.

        Args:
            names: those that are to move, the same on all ranks; ``group["params"]`` are the tensors they lie in.
            group: also AdamW's hyper-parameters.
            states: the optimizer's.
        """
        ...

    def collect(self, states: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
        """Entries of a ``state_dict`` by parameter, beside what torch makes of ``states``."""
        ...

    def adopt(self, states: MutableMapping[Any, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with what was loaded: ``states``, and what :meth:`collect` has made."""
        ...


class WideFullRank:
    """Moments as numbers, on whatever tensors a framework has put into the groups.

    Args:
        layout: how the parameters lie.
        members: of the parameters that are not projected.
        state_dtype: ``fp32`` or ``bf16``.
        rounding: writes bf16 weights; ``None``: they are rounded to nearest.
    """

    def __init__(self, layout: Layout, members: Sequence[Member], state_dtype: str, rounding: Rounding | None):
        self._state_dtype, self._rounding = state_dtype, rounding
        # torch's checkpoints want them all, on all ranks
        self._tensors = [m.parameter for m in members] if layout.by_parameter else []

    def ensure(self, states: MutableMapping[Any, Any]) -> None:  # noqa: D102
        ensure_full_rank(self._tensors, states, self._state_dtype)

    def step(  # noqa: D102
        self, names: Sequence[str], group: Mapping[str, Any], states: MutableMapping[Any, Any]
    ) -> None:
        step_full_rank(group, states, self._state_dtype, self._rounding)

    def collect(self, states: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:  # noqa: D102
        return {}

    def adopt(self, states: MutableMapping[Any, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:  # noqa: D102
        pass


def keep_dtypes(states: MutableMapping[Any, Any], loaded: Mapping[Any, Any], tensors: Mapping[Any, Tensor]) -> None:
    """Undo what torch's loader did to the moments of full-rank parameters: it casts them to the dtype of the weights.

    Args:
        states: the optimizer's, after the load.
        loaded: number -> state, as it was saved.
        tensors: number -> tensor of the groups.
    """
    for key, tensor in tensors.items():
        for moment in MOMENTS:
            if moment in loaded.get(key, {}):
                states[tensor][moment] = loaded[key][moment].to(tensor.device)


def _adamw(
    group: Mapping[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
) -> None:
    # Element by element: what this rank holds of a DTensor is all that is needed.
    adamw(
        local_tensors(params),
        local_tensors(grads),
        local_tensors(exp_avgs),
        local_tensors(exp_avg_sqs),
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _step_in_parts(
    group: Mapping[str, Any], parameter: Tensor, state: Mapping[str, Tensor], rounding: Rounding | None
) -> None:
    """Weights and moments of different dtypes: computed in float32, a part at a time, and each rounded once."""
    grad = parameter.grad
    assert grad is not None
    kept = [t.detach().view(-1) for t in local_tensors([parameter, *(state[key] for key in MOMENTS)])]
    (flat_grad,) = (t.reshape(-1) for t in local_tensors([grad]))
    parts = zip(*(t.split(_PART) for t in (kept[0], flat_grad, *kept[1:])))
    for number, (weights, gradient, *moments) in enumerate(parts):
        narrow = [weights, *moments]
        wide = [t.float() for t in narrow]
        _adamw(group, [wide[0]], [gradient.float()], [wide[1]], [wide[2]], [state["step"].clone()])
        for tensor, computed in zip(narrow, wide):
            if tensor is weights and rounding is not None and weights.dtype == torch.bfloat16 and weights.numel():
                rounding(parameter, int(state["step"]) + 1, weights, computed, number * _PART)
            elif computed is not tensor:
                tensor.copy_(computed)
    state["step"].add_(1)
