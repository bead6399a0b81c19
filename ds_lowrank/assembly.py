"""From parameter groups to all that steps them: what was asked for, and, once the layout is known, who does what.

Made at the first step, and again when parameter groups have been added.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.config import LowRankConfig, check_adamw
from ds_lowrank.engine.backward import Layerwise
from ds_lowrank.engine.evidence import gram_dtype_on
from ds_lowrank.engine.gradients import GradientCheck
from ds_lowrank.engine.projected import Options, ProjectedGradients
from ds_lowrank.engine.refresh import Groups, Refresher
from ds_lowrank.engine.state import MatrixState, tensor_of
from ds_lowrank.engine.step import LowRankStep
from ds_lowrank.full_rank.adamw import FullRank, WideFullRank, weight_rounding
from ds_lowrank.full_rank.adamw8bit_states import EightBitFullRank
from ds_lowrank.full_rank.dealt import DealtFullRank
from ds_lowrank.layouts import (
    Layout,
    LayoutError,
    Member,
    OutsideEngine,
    ParameterLayout,
    check_excluded,
    find_layout,
    find_layout_beside,
    own_groups,
    whole_shape,
)
from ds_lowrank.methods import Method
from ds_lowrank.plan.matrices import MatrixPlan, make_plan
from ds_lowrank.plan.specs import LOWRANK_KEYS, MatrixSpec, check_dtypes, make_specs
from ds_lowrank.state_dict.parameter_states import ParameterStates

# What uses gradients in the backward pass.
Backward = Layerwise | ProjectedGradients


def register_group(
    index: int, group: dict[str, Any], taken: Sequence[Member], config: LowRankConfig
) -> tuple[list[Member], list[MatrixSpec], dict[str, Any]]:
    """What a parameter group holds and asks for.

    Args:
        index: of the group.
        group: as the user gave it; a low-rank one gets its ``scale``.
        taken: members of the groups before it.
        config: the optimizer's own options.

    Returns:
        Its members, the matrices that it projects, and those of its options that no load may change.

    Raises:
        ValueError: an option is unknown or out of range, a low-rank parameter is no matrix, or a name is taken.
    """
    names = group.get("param_names") or [f"group{index}.{k}" for k in range(len(group["params"]))]
    check_adamw(group["lr"], group["betas"], group["eps"], group["weight_decay"], where=f"group {index}: ")
    before = {m.name for m in taken}
    shapes: dict[str, tuple[int, ...]] = {}
    members = []
    for name, parameter in zip(names, group["params"]):
        if name in before or name in shapes:
            raise ValueError(f"group {index}: the parameter name {name!r} is taken already: names must be unique")
        shapes[name] = whole_shape(parameter)
        members.append(Member(name, parameter, shapes[name], index))
    specs = []
    if group.get("rank") is not None:
        group.setdefault("scale", config.scale)
        check_dtypes(index, names, group["params"])
        specs = make_specs(index, group, shapes, config)
    kept = ("name", "param_names", *LOWRANK_KEYS)
    return members, specs, {key: group[key] for key in kept if key in group}


@dataclass
class Assembly:
    """All that knows the layout.

    Attributes:
        layout: how the parameters lie.
        members: with the parameters that are in the groups now.
        left_out: members that the framework does not train.
        comm: the collectives.
        plans: of all projected matrices, in the model's parameter order.
        refresher, stepper: of these.
        full_rank: the parameters that are not projected.
        states: saves and loads by parameter, where groups hold the model's own.
        gradients: the look at the first ones.
    """

    layout: Layout
    members: list[Member]
    left_out: list[Member]
    comm: Comm
    plans: list[MatrixPlan]
    refresher: Refresher
    stepper: LowRankStep
    full_rank: FullRank
    states: ParameterStates | None
    gradients: GradientCheck


def assemble(
    members: Sequence[Member],
    specs: Sequence[MatrixSpec],
    groups: Sequence[dict[str, Any]],
    group_options: Sequence[Mapping[str, Any]],
    config: LowRankConfig,
    method: Method,
    engine: OutsideEngine | None = None,
) -> Assembly:
    """Find the layout, verify it and plan every matrix. Collective.

    Args:
        members: the parameters that the optimizer was given, group by group.
        specs: its matrices, in the model's parameter order.
        groups: all its parameter groups as they are now.
        group_options: of every group, see :func:`register_group`.
        config: the optimizer's own options.
        method: what is computed, and how states are kept.
        engine: of DeepSpeed, beside which projected matrices step.

    Raises:
        ds_lowrank.LayoutError: on all ranks, when the sharding is not supported or not what it seems.
        ValueError: the formats do not suit the weights.
    """
    if not specs:
        warnings.warn(
            "nothing is projected: no parameter group sets a rank. Make the groups with "
            "ds_lowrank.param_groups(model), or the optimizer with ds_lowrank.build_optimizer(model)",
            stacklevel=5,
        )
    found = find_layout(members, groups) if engine is None else find_layout_beside(engine, members, groups)
    layout, kept = found
    names = {m.name for m in kept}
    left_out = [m for m in members if m.name not in names]
    comm = Comm(own_groups(layout.ranks) if config.gradients == "projected" else layout.ranks)
    scales = [options.get("scale") for options in group_options]
    plans = make_plan(
        specs,
        layout,
        comm,
        gradient_dtype=None if config.gradient_dtype == "auto" else getattr(torch, config.gradient_dtype),
        stagger=config.stagger,
        wave_size=config.wave_size,
        shard_projection=config.shard_projection,
        options=repr((config, scales)),
        left_out=[m.name for m in left_out],
        projected=config.gradients == "projected",
    )
    for plan in plans:
        method.formats.check(plan.weight_dtype, plan.name)
    gram_dtype = gram_dtype_on(config.gram_dtype, layout.ranks.device)
    refresher = Refresher(comm, method, gram_dtype)
    seed = config.seed if config.stochastic_rounding else None
    rounding = weight_rounding(layout, {m.name: m.shape for m in kept}, seed)
    projected = {plan.parameter for plan in plans}
    rest = [m for m in kept if m.name not in projected]
    full_rank: FullRank
    if layout.replicated:
        full_rank = DealtFullRank(layout, comm, rest, config.state_dtype, rounding)
    elif config.state_dtype == "int8":
        full_rank = EightBitFullRank(layout, comm, rest, rounding)
    else:
        full_rank = WideFullRank(layout, comm, rest, config.state_dtype, rounding)
    stepper = LowRankStep(layout, comm, plans, refresher, method, seed)
    states = None
    if layout.by_parameter:
        states = ParameterStates(cast(ParameterLayout, layout), comm, plans, stepper.states.new, method.states)
    gradients = GradientCheck(layout, comm, config.layerwise or config.gradients == "projected")
    return Assembly(layout, kept, left_out, comm, plans, refresher, stepper, full_rank, states, gradients)


def move_histories(
    before: Sequence[MatrixPlan], plans: Sequence[MatrixPlan], states: Mapping[str, MatrixState], comm: Comm
) -> None:
    """Give the overlaps of matrices to their new owners: those are dealt among all matrices. Collective.

    Args:
        before: the plans until now; none at first.
        plans: the plans from now on, of more matrices.
        states: of this rank.
        comm: the collectives.
    """
    owners = {p.name: p.owner for p in before}
    moved = {p.name: p.owner for p in plans if owners.get(p.name, p.owner) != p.owner}
    if not moved:
        return
    mine = {n: tensor_of(states[n], "overlaps").tolist() for n in moved if "overlaps" in states.get(n, {})}
    for name in mine:
        del states[name]["overlaps"]
    for told in comm.gather_objects(mine):
        for name, history in told.items():
            if moved[name] == comm.ranks.rank:
                states[name]["overlaps"] = torch.tensor(history)


def prepare_group(
    group: dict[str, Any], others: Sequence[Mapping[str, Any]], layout: Layout | None, backward: Backward | None
) -> None:
    """Refuse a parameter group where none can be added, and name its parameters where the others have names.

    Args:
        group: that is to be added; changed.
        others: the groups that there are.
        layout: ``None`` before it is found.
        backward: the hooks, if there are any.

    Raises:
        ValueError: DeepSpeed has made its flat buffers, or a backward pass has stepped already.
    """
    if layout is not None and not layout.by_parameter:
        raise ValueError(
            "parameter groups cannot be added after deepspeed.initialize(), which makes flat buffers of those that "
            "there are: build the optimizer with all of them, and freeze what is to be trained later"
        )
    if backward is not None and backward.busy:
        raise ValueError("add a parameter group before the first backward pass of a step: gradients are used in it")
    params = group["params"]
    if isinstance(params, set):
        return  # which torch refuses
    params = group["params"] = [params] if isinstance(params, Tensor) else list(params)
    if params and all(isinstance(p, Tensor) for p in params) and all("param_names" in other for other in others):
        # torch takes groups with names or groups without, and Lightning's BaseFinetuning adds them without.
        group["params"] = [(f"group{len(others)}.{k}", p) for k, p in enumerate(params)]


def project_in_backward(
    found: Assembly, config: LowRankConfig, method: Method, states: Callable[[], Mapping[str, MatrixState]]
) -> ProjectedGradients:
    """The hooks of ``gradients="projected"``.

    Args:
        found: the assembly.
        config: the optimizer's own options.
        method: what is computed, and how states are kept.
        states: of the matrices.

    Raises:
        ds_lowrank.LayoutError: a rank's own gradients cannot be had, or DDP averages them.
    """
    layout = found.layout
    projected = {plan.parameter for plan in found.plans}
    if layout.replicated:
        check_excluded([m for m in found.members if m.name in projected], "gradients 'projected'")
    return ProjectedGradients(
        layout.local_gradients(list(dict.fromkeys(plan.parameter for plan in found.plans))),
        {m.name: m.shape for m in found.members},
        found.plans,
        found.comm,
        method,
        found.stepper,
        found.refresher,
        states,
        Options(config.wave_size, config.accumulator_dtype == "bf16", config.seed),
    )


def step_in_backward(
    found: Assembly,
    config: LowRankConfig,
    states: Callable[[], Mapping[str, MatrixState]],
    groups: Callable[[], Groups],
    step_full_rank: Callable[[str, Tensor], None],
) -> Layerwise:
    """The hooks of ``layerwise``.

    Args:
        found: the assembly.
        config: the optimizer's own options.
        states, groups, step_full_rank: see :class:`ds_lowrank.engine.backward.Layerwise`.

    Raises:
        ds_lowrank.LayoutError: a framework's engine decides when to step, or DDP averages the same gradients.
    """
    layout, comm = found.layout, found.comm
    if not layout.steps_alone:
        raise LayoutError(f"layerwise is not supported under {layout.kind}: its engine decides when to step")
    projected = {plan.parameter for plan in found.plans}
    members = [m for m in found.members if m.name in projected or not layout.replicated]

    def average(gradient: Tensor) -> None:
        comm.all_reduce(gradient, "gradients").wait().div_(comm.ranks.size)

    if layout.replicated:
        check_excluded(members, "layerwise")
    return Layerwise(
        {m.name: m.parameter for m in members},
        found.plans,
        found.stepper,
        states,
        groups,
        step_full_rank,
        average if layout.replicated else None,
        config.wave_size,
        config.accumulation_steps,
    )
