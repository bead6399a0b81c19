"""A rank's own gradients under FSDP2: taken from the unsharded parameters before FSDP2 averages them.

FSDP2 unshards a parameter into one tensor that stays the same from its first forward pass on, and passes over one
that has no gradient when its module's backward pass ends: so what a hook takes away there is neither stored nor sent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._composable_state import _module_state_mapping

from ds_lowrank.layouts.base import LayoutError
from ds_lowrank.layouts.hooks import hook_gradients


def param_groups() -> Iterator[Any]:
    """FSDP2's own groups of parameters, of all models of this process."""
    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            if group is not None:
                yield group


class UnshardedGradients:
    """See :class:`ds_lowrank.layouts.base.LocalGradients`.

    Args:
        parameters: name -> sharded parameter.

    Raises:
        LayoutError: a parameter is none of FSDP2's, its weights are offloaded, or this torch has other internals.
    """

    def __init__(self, parameters: Mapping[str, Any]):
        self._parameters = dict(parameters)
        names = {id(p): name for name, p in parameters.items()}
        self._groups: list[Any] = []
        self._fsdp: dict[str, tuple[Any, Any]] = {}  # name -> FSDP2's parameter, and its group
        for group in param_groups():
            for inner in group.fsdp_params:
                name = names.get(id(inner.sharded_param))
                if name is not None:
                    self._fsdp[name] = (inner, group)
                    if not any(group is known for known in self._groups):
                        self._groups.append(group)
        for name, parameter in parameters.items():
            fault = self._fault(name)
            if fault:
                raise LayoutError(f"{name} {tuple(parameter.shape)}: gradients 'projected' {fault}")
        self._hooked: set[str] = set()
        self._ready: weakref.WeakMethod | None = None

    def _fault(self, name: str) -> str | None:
        if name not in self._fsdp:
            return (
                f"needs FSDP2's own record of the parameter, which torch {torch.__version__} does not show: build the "
                "optimizer after fully_shard, or use gradients 'full'"
            )
        inner, group = self._fsdp[name]
        if not all(hasattr(group, attribute) for attribute in ("reduce_grads", "mp_policy", "modules")):
            return f"does not know the FSDP2 of torch {torch.__version__}: use gradients 'full'"
        if getattr(inner, "offload_to_cpu", False):
            return "does not go with CPUOffloadPolicy: use gradients 'full', or leave the offloading out"
        return None

    def hook(self, names: Sequence[str], ready: Callable[[str, Tensor], None]) -> None:  # noqa: D102
        self._ready = weakref.WeakMethod(ready)
        wanted = set(names)
        method = weakref.WeakMethod(self._hook_those_there)

        def before(module: Any, args: Any) -> None:
            alive = method()
            if alive is not None:
                alive(wanted)

        handles = []
        for group in self._groups:
            for module in group.modules:  # after FSDP2's own hook, which unshards
                handles.append(module.register_forward_pre_hook(before))
        weakref.finalize(self, _remove, handles).atexit = False
        self._hook_those_there(wanted)

    def _hook_those_there(self, wanted: set[str]) -> None:
        for name in wanted - self._hooked:
            inner, _ = self._fsdp[name]
            unsharded = getattr(inner, "_unsharded_param", None)
            if unsharded is not None:
                self._hooked.add(name)
                hook_gradients({name: unsharded}, self._take)

    def _take(self, name: str, parameter: Any) -> None:
        gradient, ready = parameter.grad, None if self._ready is None else self._ready()
        if gradient is not None and ready is not None:
            parameter.grad = None
            ready(name, gradient)

    def syncs(self) -> bool:  # noqa: D102
        return all(group.reduce_grads for group in self._groups)

    def wire_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        policy = self._fsdp[name][1].mp_policy
        return policy.reduce_dtype or policy.param_dtype or self._parameters[name].dtype

    def trained(self, name: str) -> bool:  # noqa: D102
        return self._parameters[name].requires_grad


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
