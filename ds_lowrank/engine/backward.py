"""The optimizer in the backward pass: a gradient is used as soon as it is there, and freed.

Without accumulation a matrix steps when its gradient arrives; those that are due for a refresh wait for each other, a
wave at a time, so that they are decomposed side by side. With accumulation the projection of each micro-step's gradient
is added up instead (long × r numbers in the place of long × short), and the step is made where ``step()`` is called; a
matrix that is due accumulates its gradient in full for that step, since its next basis is not known yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ds_lowrank.engine.gradients import sparse_fault
from ds_lowrank.engine.refresh import Groups
from ds_lowrank.engine.state import MatrixState
from ds_lowrank.engine.step import LowRankStep
from ds_lowrank.layouts import hook_gradients
from ds_lowrank.plan.matrices import MatrixPlan


class Layerwise:
    """Hooks that step parameters in the backward pass.

    Every parameter has to get its gradient in the same order on all ranks, in every backward pass: its step
    communicates.

    Args:
        parameters: name -> parameter whose gradient is used at once.
        plans: all projected matrices; parameters without one are full-rank.
        stepper: steps projected matrices.
        states: their states.
        groups: hyper-parameters of all parameter groups.
        step_full_rank: steps one parameter by plain AdamW.
        average: averages a gradient over the ranks, where the framework leaves that to us.
        wave_size: matrices that are refreshed side by side.
        accumulation: micro-steps a step.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        plans: Sequence[MatrixPlan],
        stepper: LowRankStep,
        states: Callable[[], Mapping[str, MatrixState]],
        groups: Callable[[], Groups],
        step_full_rank: Callable[[str, Tensor], None],
        average: Callable[[Tensor], None] | None,
        wave_size: int,
        accumulation: int,
    ):
        self._plans_of: dict[str, list[MatrixPlan]] = {}
        for plan in plans:
            self._plans_of.setdefault(plan.parameter, []).append(plan)
        self._stepper = stepper
        self._states = states
        self._groups = groups
        self._step_full_rank = step_full_rank
        self._average = average
        self._wave_size = wave_size
        self._accumulation = accumulation
        self._stepped: set[str] = set()  # parameters that are done with before step()
        self._waiting: dict[str, tuple[Tensor, list[MatrixPlan]]] = {}
        hook_gradients(parameters, self._ready)

    @property
    def busy(self) -> bool:
        """Whether a backward pass has used gradients that :meth:`remaining` has not been asked about."""
        return bool(self._stepped or self._waiting or self._stepper.accumulating)

    @property
    def stepped(self) -> set[str]:
        """Parameters that have stepped in this backward pass."""
        return set(self._stepped)

    def remaining(self, plans: Sequence[MatrixPlan]) -> list[MatrixPlan]:
        """Those of ``plans`` that have not stepped in the backward pass; the next pass begins anew."""
        waiting = {plan.name for _, due in self._waiting.values() for plan in due}
        left = [p for p in plans if p.name in waiting or p.parameter not in self._stepped]
        self._stepped.clear()
        self._waiting.clear()
        return left

    def forget(self) -> None:
        """Begin a backward pass anew: what has been accumulated is dropped."""
        self._stepper.forget()
        self._stepped.clear()
        self._waiting.clear()

    @torch.no_grad()
    def _ready(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if fault := sparse_fault(name, parameter):
            raise RuntimeError(fault)
        if parameter.grad.device.type == "cpu" and torch.cuda.is_available():
            # Before torch knew of hooks here it copied an offloaded gradient to the CPU without waiting for it.
            torch.cuda.current_stream().synchronize()
        plans = self._plans_of.get(name)
        if self._average is not None:
            self._average(parameter.grad)
        if self._accumulation > 1:
            if plans is not None:
                self._accumulate(parameter, plans)
            return
        if name in self._stepped:
            raise RuntimeError(
                f"{name} has a second gradient before step(), but with layerwise it has made its step already: set "
                "accumulation_steps to the number of backward passes a step (and use no gradient scaler: it cannot "
                "take a step back)"
            )
        self._stepped.add(name)
        if plans is None:
            self._step_full_rank(name, parameter)
            parameter.grad = None
        else:
            self._step(name, parameter, plans)

    def _step(self, name: str, parameter: Tensor, plans: Sequence[MatrixPlan]) -> None:
        states, groups = self._states(), self._groups()
        due = [p for p in plans if p.shared and self._stepper.is_due(p, states)]
        late = {p.name for p in due}
        self._stepper.run([p for p in plans if p.name not in late], states, groups)
        if not due:
            parameter.grad = None
            return
        self._waiting[name] = (parameter, due)
        if sum(len(wave) for _, wave in self._waiting.values()) >= self._wave_size:
            self._stepper.refresh_and_step([p for _, wave in self._waiting.values() for p in wave], states, groups)
            for waiting, _ in self._waiting.values():
                waiting.grad = None
            self._waiting.clear()

    def _accumulate(self, parameter: Tensor, plans: Sequence[MatrixPlan]) -> None:
        states = self._states()
        # Of one parameter either all matrices are shared or none is, so the ranks that share one agree on this.
        if not any(p.name in states and self._stepper.is_due(p, states) for p in plans):
            self._stepper.accumulate(plans, states)
            parameter.grad = None
