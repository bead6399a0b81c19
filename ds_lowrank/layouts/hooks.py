"""Hooks on gradients: a function is called as soon as the backward pass has a parameter's."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from ds_lowrank.layouts.base import LayoutError

_OWNER = "_ds_lowrank_owner"
_numbers = itertools.count(1)


def hook_gradients(parameters: Mapping[str, Tensor], ready: Callable[[str, Tensor], None]) -> None:
    """Call a method with a parameter's name and the parameter whenever its gradient has been accumulated.

    A hook outlives its optimizer: only the newest one of a parameter is called, and none whose object is gone.

    Args:
        parameters: name -> leaf tensor; frozen ones are called when they are set free.
        ready: a bound method.
    """
    # The parameter says which is the newest by a number, since a model is pickled with what hangs on its parameters.
    number, handles = next(_numbers), []
    method = weakref.WeakMethod(ready)
    for name, parameter in parameters.items():
        setattr(parameter, _OWNER, number)
        handles.append(_hook(parameter, partial(_call, method, name, number)))
    weakref.finalize(ready.__self__, _remove, handles).atexit = False  # type: ignore[attr-defined]


def _hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    frozen = not parameter.requires_grad
    if frozen:  # torch takes no hook then; it stays, for when the parameter is set free
        parameter.requires_grad_(True)
    handle = parameter.register_post_accumulate_grad_hook(hook)
    if frozen:
        parameter.requires_grad_(False)
    return handle


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _call(method: weakref.WeakMethod, name: str, number: int, parameter: Tensor) -> None:
    alive = method()
    if alive is not None and getattr(parameter, _OWNER, None) == number:
        alive(name, parameter)


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now has ended, after what was asked for before."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def absent(leaves: Mapping[str, Tensor]) -> list[str]:
    """Which leaves will have no gradient in the backward pass that runs now: an expert without tokens.

    As torch's register_multi_grad_hook finds it out.

    Args:
        leaves: name -> tensor; frozen ones are passed over.
    """
    found = []
    for name, leaf in leaves.items():
        if leaf.requires_grad and not torch._C._will_engine_execute_node(get_gradient_edge(leaf).node):
            found.append(name)
    return found


class WholeGradients:
    """Gradients of parameters that this rank holds whole: one process, DDP, and what DeepSpeed is not given.

    See :class:`ds_lowrank.layouts.base.LocalGradients`.

    Args:
        parameters: name -> parameter.
        syncs: asked once a backward pass, whether it is the last before a step.
        wire: dtype in which the framework would send a gradient; ``None``: the gradient's.
        others: further parameters; a backward pass has begun when one of them has its gradient, too.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        syncs: Callable[[], bool],
        wire: torch.dtype | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._parameters, self._syncs, self._wire = dict(parameters), syncs, wire
        self._others = dict(others or {})
        self._hooked: dict[str, Tensor] = {}
        self._ready: weakref.WeakMethod | None = None
        self._absent: weakref.WeakMethod | None = None
        self._pass = -1

    def hook(  # noqa: D102
        self,
        names: Sequence[str],
        ready: Callable[[str, Tensor], None],
        absent: Callable[[Sequence[str]], None],
    ) -> None:
        self._ready, self._absent = weakref.WeakMethod(ready), weakref.WeakMethod(absent)
        self._hooked = {name: self._parameters[name] for name in names}
        hook_gradients(self._hooked, self._take)
        hook_gradients(self._others, self._look)

    def _look(self, name: str, parameter: Any) -> None:
        """Tell once in a pass what will not come."""
        now, told = torch._C._current_graph_task_id(), None if self._absent is None else self._absent()
        if now != self._pass and told is not None:
            self._pass = now
            told(absent(self._hooked))

    def _take(self, name: str, parameter: Any) -> None:
        self._look(name, parameter)
        gradient, ready = parameter.grad, None if self._ready is None else self._ready()
        if gradient is None or ready is None:
            return
        parameter.grad = None
        if gradient.layout != torch.strided:
            raise LayoutError(f"{name} {tuple(parameter.shape)} has a sparse gradient, which cannot be projected")
        ready(name, gradient)

    def syncs(self) -> bool:  # noqa: D102
        return self._syncs()

    def wire_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._wire or self._parameters[name].dtype

    def trained(self, name: str) -> bool:  # noqa: D102
        return self._parameters[name].requires_grad
