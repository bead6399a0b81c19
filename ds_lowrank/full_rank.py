"""Plain AdamW for the parameters that are not projected: torch's own, on moments that may be narrower.

Their moments are kept as the weights are, or in bf16 where those of projected matrices are kept in bf16 or int8. Not in
int8: ZeRO cuts its flat buffers anywhere, so blocks of a scale each would depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ds_lowrank.layouts import local_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")

# Numbers that are widened at once where moments are narrower than what is computed with.
_PART = 1 << 22


def moment_dtype(state_dtype: str, weights: torch.dtype) -> torch.dtype:
    """Dtype of the moments of weights that are not projected: bf16, or float32 at least; float64 for float64."""
    if state_dtype == "fp32" or weights == torch.float64:
        return torch.promote_types(weights, torch.float32)
    return torch.bfloat16


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


def step_full_rank(group: Mapping[str, Any], states: MutableMapping[Any, Any], state_dtype: str = "fp32") -> None:
    """Step the parameters of a group that have a gradient, on whatever tensors a framework has put into it.

    Args:
        group: ``params`` (any shapes; DTensors too) and AdamW's hyper-parameters.
        states: the optimizer's, by tensor; made here where there is none, see :func:`new_state`.
        state_dtype: see :class:`ds_lowrank.LowRankConfig`.
    """
    params = [p for p in group["params"] if p.grad is not None]
    ensure_full_rank(params, states, state_dtype)
    for p in params:
        states[p]["step"] = states[p]["step"].to(p.device)  # loaders leave it on the CPU
        for key in MOMENTS:  # a checkpoint may have them in another dtype
            states[p][key] = states[p][key].to(moment_dtype(state_dtype, p.dtype))
    alike = [p for p in params if states[p]["exp_avg"].dtype == p.dtype]
    if alike:
        _adamw(group, alike, [p.grad for p in alike], *([states[p][k] for p in alike] for k in (*MOMENTS, "step")))
    for p in params:
        if states[p]["exp_avg"].dtype != p.dtype:
            _step_in_parts(group, p, states[p])


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


def _step_in_parts(group: Mapping[str, Any], parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Weights and moments of different dtypes: computed in float32, a part at a time, and each rounded once."""
    grad = parameter.grad
    assert grad is not None
    kept = [t.detach().view(-1) for t in local_tensors([parameter, *(state[key] for key in MOMENTS)])]
    (flat_grad,) = (t.reshape(-1) for t in local_tensors([grad]))
    for weights, gradient, *moments in zip(*(t.split(_PART) for t in (kept[0], flat_grad, *kept[1:]))):
        narrow = [weights, *moments]
        wide = [t.float() for t in narrow]
        _adamw(group, [wide[0]], [gradient.float()], [wide[1]], [wide[2]], [state["step"].clone()])
        for tensor, computed in zip(narrow, wide):
            if computed is not tensor:
                tensor.copy_(computed)
    state["step"].add_(1)
