"""Parameter groups that a framework's engine is not to see, since it would flatten what is in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ds_lowrank.layouts import LayoutError, OutsideEngine

Group = dict[str, Any]

# Hyper-parameters that a schedule may change, and a load.
_FOLLOWED = ("lr", "betas", "eps", "weight_decay")


class OutsideGroups:
    """Groups of an optimizer that are not in its ``param_groups``, and follow one that is.

    Schedules write learning rates into ``param_groups``, and loaders what was saved. A group outside follows the group
    there that it was most alike: in what was equal it stays equal, and its learning rate keeps its ratio.

    Args:
        groups: all of them.
        outside: indices of those that are to leave.

    Raises:
        ValueError: none would be left, or one has a learning rate that cannot follow.

    Attributes:
        groups: those outside.
    """

    def __init__(self, groups: Sequence[Group], outside: Collection[int]):
        staying = [index for index in range(len(groups)) if index not in outside]
        if not staying:
            raise ValueError(
                "every parameter is projected, and with gradients 'projected' DeepSpeed's own optimizer would have "
                "none: leave something trainable out of optim_target_modules (norms, embeddings), or use gradients "
                "'full'"
            )
        self._outside = {index: groups[index] for index in sorted(outside)}
        self.groups = list(self._outside.values())
        self._guides: list[int] = []  # of each, its place among those that stay
        self._ratios: list[float] = []  # of learning rates
        self._equal: list[list[str]] = []
        for group in self.groups:
            alike = [[key for key in _FOLLOWED if _same(group[key], groups[k][key])] for k in staying]
            # Of those that agree in as much, one with this learning rate, which is then copied and not computed.
            guide = max(range(len(staying)), key=lambda k: ("lr" in alike[k], len(alike[k]), -k))
            rate, base = float(group["lr"]), float(groups[staying[guide]]["lr"])
            if "lr" not in alike[guide] and base == 0:
                raise ValueError(
                    f"group {group.get('name', '?')!r} has a learning rate of {rate}, and those that DeepSpeed steps, "
                    "which it would follow by their ratio, have 0: give them one above 0, and schedule it"
                )
            self._guides.append(guide)
            self._ratios.append(rate / base if base else 1.0)
            self._equal.append(alike[guide])

    def among(self, staying: Sequence[Group]) -> list[Group]:
        """All groups in their first order.

        Args:
            staying: ``param_groups`` as they are now.
        """
        rest = iter(staying)
        return [
            self._outside[index] if index in self._outside else next(rest)
            for index in range(len(staying) + len(self._outside))
        ]

    def follow(self, staying: Sequence[Mapping[str, Any]]) -> None:
        """Take over what has changed in ``param_groups``."""
        for group, guide, ratio, equal in zip(self.groups, self._guides, self._ratios, self._equal):
            for key in equal:
                group[key] = staying[guide][key]
            if "lr" not in equal:
                group["lr"] = float(staying[guide]["lr"]) * ratio


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return float(one) == float(other)
    return bool(one == other)


class StepsBeside:
    """The part of an optimizer that steps some of its groups beside a framework's engine, which has the others.

    An engine steps its groups with ``param_groups`` cut to one of them; those outside step the same way, once a step,
    when the engine says so.
    """

    param_groups: list[Group]
    _all_groups: list[Group]
    _members: list[Any]
    _specs: list[Any]
    _projected: Any
    _outside: OutsideGroups | None = None
    _engine: OutsideEngine | None = None

    def keep_outside(self) -> None:
        """Take the groups with a rank out of ``param_groups``, ahead of an engine that flattens what is in there.

        Raises:
            ValueError: see :class:`OutsideGroups`.
        """
        outside = OutsideGroups(self.param_groups, {spec.group for spec in self._specs})
        self.param_groups = [g for g in self.param_groups if all(g is not o for o in outside.groups)]
        self._outside = outside
        self._all_groups = outside.among(self.param_groups)

    def _every_group(self) -> list[Group]:
        return self.param_groups if self._outside is None else self._outside.among(self.param_groups)

    def outside_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter that is in a group outside."""
        if self._outside is None:
            return {}
        names = {spec.parameter for spec in self._specs}
        return {m.name: m.parameter for m in self._members if m.name in names}

    def join_engine(self, engine: OutsideEngine) -> None:
        """Go on beside an engine that has made its own of ``param_groups``. Collective: it finds the layout."""
        self._engine = engine
        self.ensure_state()

    def _joined_engine(self) -> OutsideEngine | None:
        """The engine beside which this steps, where it has groups outside.

        Raises:
            LayoutError: there is none, and nobody would step them.
        """
        if self._outside is not None and self._engine is None:
            raise LayoutError(
                "the optimizer was made for DeepSpeed, with projected matrices outside its groups, and no engine has "
                "it: call deepspeed.initialize(model=model, optimizer=optimizer, ...) first, or make it by "
                "ds_lowrank.build_optimizer"
            )
        return self._engine

    def step_outside(self) -> None:
        """Step the groups outside, with the learning rates that are in ``param_groups`` now. Collective."""
        assert self._outside is not None
        self._outside.follow(self.param_groups)
        staying, self.param_groups = self.param_groups, self._outside.groups
        try:
            self.step()
        finally:
            self.param_groups = staying

    def projected_norm_squared(self) -> Tensor:
        """Σ ‖R‖² over all projected matrices and ranks, before any scaling by the same step's clip. Collective."""
        return self._projected.norm_squared()

    def scale_projected_(self, coefficient: Tensor) -> None:
        """Multiply all projected gradients by a number."""
        self._projected.scale_(coefficient)

    def forget_projected(self) -> None:
        """Drop the projected gradients of a step that is not made. Collective where some are on their way."""
        if self._projected is not None:
            self._projected.forget()

    def ensure_state(self) -> None:
        """See :class:`ds_lowrank.LowRankAdamW`."""
        raise NotImplementedError

    def step(self, closure: Any = None) -> Any:
        """See :class:`ds_lowrank.LowRankAdamW`."""
        raise NotImplementedError
