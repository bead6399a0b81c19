"""Plain AdamW, torch's own, for the parameters that are not projected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ds_lowrank.layouts import local_tensors


def ensure_full_rank(params: Iterable[Tensor], states: MutableMapping[Any, Any]) -> None:
    """Make the state of those parameters that have none: torch's fused kernel takes counters on the parameter's device
    and moments in its dtype.
    """
    for p in params:
        if not states[p]:
            states[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            states[p]["exp_avg"] = torch.zeros_like(p)
            states[p]["exp_avg_sq"] = torch.zeros_like(p)


def step_full_rank(group: Mapping[str, Any], states: MutableMapping[Any, Any]) -> None:
    """Step the parameters of a group that have a gradient, on whatever tensors a framework has put into it.

    Args:
        group: ``params`` (any shapes; DTensors too) and AdamW's hyper-parameters.
        states: the optimizer's, by tensor; made here where there is none: ``step`` (float32 number), ``exp_avg`` and
            ``exp_avg_sq`` like the parameter.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    ensure_full_rank(params, states)
    for p in params:
        states[p]["step"] = states[p]["step"].to(p.device)  # loaders leave it on the CPU

    # Element by element: what this rank holds of a DTensor is all that is needed.
    adamw(
        local_tensors(params),
        local_tensors([p.grad for p in params]),
        local_tensors([states[p]["exp_avg"] for p in params]),
        local_tensors([states[p]["exp_avg_sq"] for p in params]),
        [],
        [states[p]["step"] for p in params],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
