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
from ds_lowrank.layouts.hooks import absent, hook_gradients

_WATCHER = "_ds_lowrank_watcher"


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
        self._wanted: set[str] = set()
        self._hooked: set[str] = set()
        self._ready: weakref.WeakMethod | None = None
        self._absent: weakref.WeakMethod | None = None

    def _fault(self, name: str) -> str | None:
        if name not in self._fsdp:
            return (
                f"needs FSDP2's own record of the parameter, which torch {torch.__version__} does not show: build the "
                "optimizer after fully_shard, or use gradients 'full'"
            )
        inner, group = self._fsdp[name]
        if not all(hasattr(group, part) for part in ("reduce_grads", "mp_policy", "modules", "post_backward")):
            return f"does not know the FSDP2 of torch {torch.__version__}: use gradients 'full'"
        if getattr(inner, "offload_to_cpu", False):
            return "does not go with CPUOffloadPolicy: use gradients 'full', or leave the offloading out"
        return None

    def hook(  # noqa: D102
        self,
        names: Sequence[str],
        ready: Callable[[str, Tensor], None],
        absent: Callable[[Sequence[str]], None],
    ) -> None:
        self._ready, self._absent = weakref.WeakMethod(ready), weakref.WeakMethod(absent)
        self._wanted = set(names)
        method = weakref.WeakMethod(self._hook_those_there)

        def before(module: Any, args: Any) -> None:
            alive = method()
            if alive is not None:
                alive()

        handles = []
        for group in self._groups:
            for module in group.modules:  # after FSDP2's own hook, which unshards
                handles.append(module.register_forward_pre_hook(before))
            _watch(group, weakref.WeakMethod(self._tell_absent))
        weakref.finalize(self, _remove, handles).atexit = False
        self._hook_those_there()

    def _tell_absent(self, group: Any) -> None:
        """Of a group whose backward pass is over: what it has not brought, it will not bring.

        Later a rank may wait in FSDP2's own collectives for one that waits for these.
        """
        told = None if self._absent is None else self._absent()
        mine = {n: inner for n, (inner, of) in self._fsdp.items() if of is group and n in self._wanted}
        if told is None or not mine:
            return
        unsharded = {n: getattr(inner, "_unsharded_param", None) for n, inner in mine.items() if self.trained(n)}
        missing = [n for n, leaf in unsharded.items() if leaf is None]
        missing += absent({n: leaf for n, leaf in unsharded.items() if leaf is not None})
        if missing:
            told(missing)

    def _hook_those_there(self) -> None:
        for name in self._wanted - self._hooked:
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


def _watch(group: Any, tell: weakref.WeakMethod) -> None:
    """Call a method when FSDP2 takes it that a group has all its gradients, before it averages those that it has.

    The newest optimizer's only: a group is changed once.
    """
    known = hasattr(group, _WATCHER)
    setattr(group, _WATCHER, tell)
    if known:
        return
    inner = group.post_backward

    def post_backward(*unused: Any) -> Any:
        alive = getattr(group, _WATCHER)()
        if alive is not None:
            alive(group)
        return inner(*unused)

    group.post_backward = post_backward


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
