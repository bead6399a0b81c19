"""The method of a run: its rule, selection and carry, made of a configuration and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_lowrank.rules import RULES, Rule
from ds_lowrank.selections import SELECTIONS, Selection
from ds_lowrank.selections.carry import CARRIES, Carry
from ds_lowrank.states import layout
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.layout import StateLayout

if TYPE_CHECKING:
    from ds_lowrank.config import LowRankConfig


@dataclass(frozen=True)
class Method:
    """What is computed.

    Attributes:
        rule, selection, carry: how rows step, where bases come from, what moments do when they change.
        rule_options, selection_options: their hyper-parameters, with defaults filled in.
        seed: of all draws.
        states: what is kept, and how.
    """

    rule: Rule
    selection: Selection
    carry: Carry
    rule_options: Mapping[str, float]
    selection_options: Mapping[str, float]
    seed: int
    states: StateLayout

    @property
    def formats(self) -> Formats:
        """How moments and bases are kept."""
        return self.states.formats

    def keeps_drawn(self, device: torch.device | str) -> bool:
        """Whether a rank keeps whole bases, until the next ones, that are neither stored nor sent.

        A CPU takes as long to draw a number again as for its products with about 200 rows. On a GPU memory is what
        such a selection is there to save.
        """
        return not self.selection.stored and torch.device(device).type == "cpu"


def make_method(config: LowRankConfig) -> Method:
    """The method that a configuration asks for.

    Raises:
        ValueError: a name or an option is unknown, or rule, selection, carry and formats do not go together.
    """
    rule, selection = RULES.make(config.rule), SELECTIONS.make(config.selection)
    carry = CARRIES.make(config.moments)
    slots = (*rule.slots, *selection.kept_slots())
    if len({slot.name for slot in slots}) < len(slots):
        raise ValueError(f"rule {rule.name!r} and selection {selection.name!r} both keep a slot of one name")
    if not selection.stored and (selection.evidence != "none" or selection.slots):
        raise ValueError(
            f"selection {selection.name!r} keeps no basis, so it has to draw it from its key alone: its evidence must "
            "be 'none', and it can have no slots"
        )
    if rule.needs_orthonormal and not selection.orthonormal:
        raise ValueError(
            f"rule {rule.name!r} needs orthonormal bases, and selection {selection.name!r} has none: use selection "
            "'importance', 'dominant' or 'random'"
        )
    if carry.needs_cross and not (selection.stored and selection.orthonormal):
        raise ValueError(
            f"moments {carry.name!r} turns moments by the product of the old and the new basis, which selection "
            f"{selection.name!r} does not have: use moments 'keep'"
        )
    if selection.evidence == "sketch" and config.basis_dtype != "fp32":
        raise ValueError(
            f"selection {selection.name!r} moves its basis by a little in every step, which basis_dtype "
            f"{config.basis_dtype!r} would round away: use basis_dtype 'fp32'"
        )
    if config.layerwise and config.accumulation_steps > 1 and (rule.reads_gradient or selection.evidence == "sketch"):
        what = f"rule {rule.name!r}" if rule.reads_gradient else f"selection {selection.name!r}"
        raise ValueError(
            f"{what} needs the gradient itself, and layerwise with accumulation_steps > 1 keeps projected gradients "
            "only: use accumulation_steps 1, or no layerwise"
        )
    if config.gradients == "projected" and (rule.reads_gradient or selection.evidence == "sketch"):
        what = f"rule {rule.name!r}" if rule.reads_gradient else f"selection {selection.name!r}"
        raise ValueError(
            f"{what} needs the gradient itself in every step, and gradients 'projected' keeps its projection only: use "
            "gradients 'full', or layerwise without accumulation"
        )
    rule_options = _options("rule_options", rule.name, rule.options, config.rule_options)
    selection_options = _options("selection_options", selection.name, selection.options, config.selection_options)
    rule.check(rule_options)
    selection.check(selection_options)
    return Method(
        rule,
        selection,
        carry,
        rule_options,
        selection_options,
        config.seed,
        StateLayout(slots, Formats(config.state_dtype, config.basis_dtype)),
    )


def saved_layout(dtypes: Mapping[str, torch.dtype]) -> StateLayout | None:
    """See :func:`ds_lowrank.states.layout.saved_layout`; knows all methods of the package, and those registered."""
    RULES.load()
    SELECTIONS.load()
    return layout.saved_layout(dtypes)


def state_fault(states: StateLayout, entry: Mapping[str, Any]) -> str | None:
    """What to say of a saved state that keeps other slots than a run, or keeps them in other formats.

    Args:
        states: what the run keeps.
        entry: the saved state: tensors, and numbers that are passed over.
    """
    try:
        saved = saved_layout({key: value.dtype for key, value in entry.items() if isinstance(value, Tensor)})
    except ValueError as error:
        return str(error)
    return None if saved is None else states.fault(saved)


def _options(option: str, name: str, known: Mapping[str, float], given: Mapping[str, Any]) -> dict[str, float]:
    for key, value in given.items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"lowrank.{option}: {name!r} has no option {key!r}; {has}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"lowrank.{option}[{key!r}] must be a number, got {value!r}")
    return {**known, **given}
