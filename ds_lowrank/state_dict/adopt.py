"""A loaded state, checked against the run that is to go on with it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.engine.state import MatrixState
from ds_lowrank.layouts import Member, is_dtensor, local_tensors
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.state_dict.pieces import EIGHT_BIT_KEY, STATE_KEY
from ds_lowrank.targets.patterns import advise_naming

logger = logging.getLogger(__name__)

_CODES = "the loaded optimizer state has 8-bit moments, and this run has none: use state_dtype 'int8'"


def adopt_states(
    states: Mapping[str, MatrixState],
    plans: Sequence[MatrixPlan],
    fit: Callable[[MatrixPlan, MatrixState], str | None],
    comm: Comm,
    loaded: bool,
) -> None:
    """Check this rank's states against the plan and put them where the weights are: loaders leave them on the CPU.

    Collective.

    Args:
        states: name of a matrix -> state.
        plans: of the matrices of which this rank keeps something.
        fit: says what of a state does not fit, see :meth:`ds_lowrank.engine.state.NewStates.fit`.
        comm: the collectives.
        loaded: whether something was; accelerate loads the empty state that it took from here.

    Raises:
        ValueError: on all ranks, when a state does not fit, or ranks disagree.
    """
    known = {plan.name for plan in plans}
    foreign = [name for name in states if name not in known]
    wrong = (
        [f"it has {foreign[0]!r}, which is no projected parameter here ({advise_naming(foreign)})"] if foreign else []
    )
    for plan in plans:
        if plan.name in states:
            state, label = states[plan.name], f"{plan.name} {plan.shape}"
            if not isinstance(state, MutableMapping):
                wrong.append(f"the state of {label} is of type {type(state).__name__}, not a mapping")
                continue
            fault = fit(plan, state) or counters_fault(label, state)
            if fault:
                wrong.append(fault)
            else:
                state.update({key: int(state[key]) for key in ("step", "refreshes")})
    # Ranks that disagree about what has a basis or is due would wait for each other for ever.
    counters = {
        p.name: (states[p.name]["step"], states[p.name]["refreshes"]) if p.name in states else (0, 0)
        for p in plans
        if p.shared and not wrong
    }
    answers = comm.gather_objects((wrong[:1], counters))
    for rank, (faults, theirs) in enumerate(answers):
        if not faults and not answers[0][0] and theirs != answers[0][1]:
            name = next(n for n, count in theirs.items() if count != answers[0][1][n])
            faults = [f"of {name} it has made {theirs[name][0]} steps, rank 0 {answers[0][1][name][0]}"]
        if faults:
            raise ValueError(
                f"the loaded optimizer state does not fit this run (rank {rank}): {faults[0]}. Resume with the "
                "same model, rank, rank_pattern, optim_target_modules and number of ranks, each rank its own state; "
                "ds_lowrank.load_checkpoint goes on with what another number of ranks or another layout has saved"
            )

    missing = [plan.name for plan in plans if plan.name not in states]
    if missing and loaded:
        logger.warning(
            "the loaded optimizer state has nothing for %d of the %d matrices here (%s, ...): they start anew",
            len(missing),
            len(plans),
            missing[0],
        )


def take_entries(
    state_dict: dict[str, Any], members: Sequence[Member], projected: set[str], eight_bit: bool, dealt: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the entries of parameters out of a state dict whose states are our own: torch's loader would cast them.

    Args:
        state_dict: one that is to be loaded.
        members: of this optimizer, group by group.
        projected: names of those that are projected.
        eight_bit: whether the others have 8-bit moments.
        dealt: whether the states of all are dealt over the ranks: whole ones wait for that on the CPU.

    Returns:
        name -> entry, and the state dict without them; nothing is taken where states hang on a key of their own.

    Raises:
        ValueError: names are in another order, something was projected that is not here, an entry is empty, or there
            are 8-bit moments and ``eight_bit`` is not set.
    """
    state = state_dict["state"]
    if not eight_bit and EIGHT_BIT_KEY in state:
        raise ValueError(_CODES)
    ids = [key for group in state_dict["param_groups"] for key in group["params"]]
    if STATE_KEY in state or len(ids) != len(members):
        return {}, state_dict
    groups = state_dict["param_groups"]
    named = {key: name for g in groups for key, name in zip(g["params"], g.get("param_names") or ())}
    _check_projected(named, state, projected)
    _check_names([group.get("param_names") for group in groups], members)
    here = {key: m.name for key, m in zip(ids, members) if key in state}
    others = {key: state[key] for key, name in here.items() if name not in projected}
    if not eight_bit and any(isinstance(entry, Mapping) and "exp_avg_codes" in entry for entry in others.values()):
        raise ValueError(_CODES)
    # Before its first step a parameter may have an empty state.
    left = () if eight_bit else [key for key, entry in others.items() if not (dealt and entry)]
    taken = {key: name for key, name in here.items() if key not in left}
    loaded = {name: state[key] for key, name in taken.items()}
    _check_entries(loaded)
    if dealt:
        loaded = {name: {key: _on_cpu(value) for key, value in entry.items()} for name, entry in loaded.items()}
    return loaded, {**state_dict, "state": {key: entry for key, entry in state.items() if key not in taken}}


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) and not is_dtensor(value) else value


def _check_projected(names: Mapping[Any, str], state: Mapping[Any, Any], projected: set[str]) -> None:
    """Refuse low-rank states of what is trained full-rank here: those would be taken for AdamW's.

    Args:
        names: key in ``state`` -> name of the parameter, of those that have one.
        state: key -> entry of a parameter.
        projected: names of the parameters that are projected here.

    Raises:
        ValueError: naming the first of them, with what to set.
    """
    entries = {n: state[key] for key, n in names.items() if n not in projected and key in state}
    foreign = [n for n, entry in entries.items() if isinstance(entry, Mapping) and "indices" in entry]
    if foreign:
        raise ValueError(
            f"the loaded optimizer state has a low-rank state of {foreign[0]}, which is not projected here: "
            + advise_naming(foreign)
        )


def _check_names(saved: Sequence[Sequence[str] | None], members: Sequence[Member]) -> None:
    """Refuse a state whose parameters are in another order: torch's loaders go by their places.

    Args:
        saved: the names in each group of the state, ``None`` where it has none.
        members: of this optimizer, group by group.

    Raises:
        ValueError: naming the first difference.
    """
    if any(names is None for names in saved):
        return
    for there, member in zip([name for names in saved for name in names or ()], members):
        if there != member.name:
            raise ValueError(
                f"the loaded optimizer state has {there} where this optimizer has {member.name}: make the parameter "
                "groups in the same order, or use ds_lowrank.load_checkpoint, which goes by name"
            )


def refuse_together(comm: Comm, faults: Sequence[str], alike: Mapping[str, Any]) -> None:
    """Refuse the loaded state of what is not projected. Collective: one rank's error would leave the others waiting.

    Args:
        comm: the collectives.
        faults: of this rank.
        alike: name -> what must be the same on all ranks, if there are no faults.

    Raises:
        ValueError: on all ranks, with the first fault of the first rank that has one.
    """
    answers = comm.gather_objects((faults[:1], alike), "checkpoint")
    for rank, (found, theirs) in enumerate(answers):
        if not found and not answers[0][0] and theirs != answers[0][1]:
            first = answers[0][1]
            name = min(n for n in {**theirs, **first} if theirs.get(n) != first.get(n))
            found = [f"of {name} it has {theirs.get(name, 'nothing')}, and on rank 0 {first.get(name, 'nothing')}"]
        if found:
            raise ValueError(
                f"the loaded optimizer state does not fit this run (rank {rank}): {found[0]}. Resume with the same "
                "model and number of ranks, each rank its own state; ds_lowrank.load_checkpoint goes on with what "
                "another number of ranks or another layout has saved. What has no entry in the state starts anew"
            )


def tensor_name(names: Sequence[str]) -> str:
    """A parameter's name, or what to call a flat buffer that holds several."""
    if len(names) == 1:
        return names[0]
    return f"the flat buffer of {len(names)} parameters ({', '.join(names[:1])}, ...)"


def count_of(value: Any) -> int | None:
    """A loaded counter (a number, or a tensor of one) as a number; ``None``: it is not finite, whole and >= 0."""
    if isinstance(value, Tensor):
        (value,) = local_tensors([value])
        if value.numel() != 1 or value.is_complex():
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if value >= 0 and value == int(value) else None


def counters_fault(label: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the counters of one matrix's loaded state, if anything.

    Args:
        label: name and shape of the matrix.
        entry: with ``step`` and ``refreshes``, as numbers or tensors of one.
    """
    counts = {key: count_of(entry[key]) for key in ("step", "refreshes")}
    for key, count in counts.items():
        if count is None:
            return f"{key} of {label} is {entry[key]!r}, not a whole number >= 0"
    steps, refreshes = counts["step"], counts["refreshes"]
    # Every refresh is followed by a step, and without a basis there is none.
    if refreshes > steps or (steps and not refreshes):  # type: ignore[operator]
        return f"{label} has made {steps} steps with {refreshes} refreshes, which no run does"
    return None


def moments_fault(name: str, tensor: Tensor, state: Any, keys: Sequence[str]) -> str | None:
    """What is wrong with AdamW's loaded state of one tensor, if anything.

    Args:
        name: the parameter's, or of what a flat buffer holds.
        tensor: that is stepped: a parameter, a DTensor or a flat buffer.
        state: what was loaded for it.
        keys: of the moments, which have the tensor's shape.
    """
    shape = tuple(tensor.shape)
    if not isinstance(state, Mapping):
        return f"the state of {name} {shape} is of type {type(state).__name__}, not a mapping"
    if "indices" in state and "refreshes" in state:
        return f"{name} {shape} was projected when it was saved, and is trained full-rank here"
    for key in ("step", *keys):
        if key not in state:
            return f"{name} {shape} has no {key}, only {sorted(map(str, state))}"
    if count_of(state["step"]) is None:
        return f"step of {name} {shape} is {state['step']!r}, not a whole number >= 0"
    for key in keys:
        found = state[key]
        if not isinstance(found, Tensor):
            return f"{key} of {name} {shape} is of type {type(found).__name__}, not a tensor"
        if tuple(found.shape) != shape:
            return f"{key} of {name} is {tuple(found.shape)} in it, and the parameter is {shape} here"
        if found.is_complex() != tensor.is_complex() or not (found.is_complex() or found.is_floating_point()):
            return f"{key} of {name} {shape} is {found.dtype}, and the parameter {tensor.dtype}"
        part, here = local_tensors([found, tensor])
        if part is not found and part.shape != here.shape:
            return (
                f"of {key} of {name} {shape} this rank has the part {tuple(part.shape)}, and of the parameter "
                f"{tuple(here.shape)}: it is sharded in another way"
            )
    return None


def wholes(entry: Mapping[str, Any], keys: Iterable[str]) -> set[bool]:
    """Whether tensors are whole on every rank (True), or sharded (False)."""
    return {local_tensors([entry[key]])[0] is entry[key] for key in keys}


def _check_entries(entries: Mapping[str, Any]) -> None:
    """Refuse what is no entry, or what ``StateDictOptions(flatten_optimizer_state_dict=True)`` leaves of low-rank ones.

    Raises:
        ValueError: an entry is there and is no mapping, or empty.
    """
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"the loaded state of {name} is of type {type(entry).__name__}, not a mapping")
    empty = [name for name, entry in entries.items() if not entry]
    if empty:
        raise ValueError(
            f"the loaded state of {empty[0]} is empty: flatten_optimizer_state_dict=True cannot hold low-rank states. "
            "Leave it out, when saving and when loading"
        )


def own_entries(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Those that are of this optimizer: a state of AdamW or galore-torch says nothing about these subspaces.

    Args:
        entries: parameter -> what a state dict has for it.
    """
    own = {name: entry for name, entry in entries.items() if "indices" in entry and "refreshes" in entry}
    if len(own) < len(entries):
        name = next(n for n in entries if n not in own)
        logger.warning(
            "the loaded state of %d of %d projected parameters (%s, ...) is another optimizer's: they start with "
            "fresh moments and subspaces",
            len(entries) - len(own),
            len(entries),
            name,
        )
    return own
