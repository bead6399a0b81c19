"""A loaded state, checked against the run that is to go on with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ds_lowrank.comm import Comm
from ds_lowrank.plan import MatrixPlan
from ds_lowrank.refresh import MatrixState
from ds_lowrank.step import LowRankStep

logger = logging.getLogger(__name__)


def adopt_states(
    states: Mapping[str, MatrixState], plans: Sequence[MatrixPlan], stepper: LowRankStep, comm: Comm
) -> None:
    """Check this rank's states against the plan and put them where the weights are: loaders leave them on the CPU.

    Collective.

    Args:
        states: name of a matrix -> state.
        plans: of the matrices of which this rank keeps something.
        stepper: knows what a state has to hold.
        comm: the collectives.

    Raises:
        ValueError: on all ranks, when a state does not fit, or ranks disagree.
    """
    known = {plan.name for plan in plans}
    wrong = [f"it has {name!r}, which is no projected parameter here" for name in states if name not in known]
    for plan in plans:
        if plan.name in states:
            fault = stepper.fit_state(plan, states[plan.name])
            wrong += [fault] if fault else []
    # Ranks that disagree about what is born or due would wait for each other for ever.
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
