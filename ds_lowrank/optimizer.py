"""The torch optimizer: defaults, groups, state, step. No mathematics and no collectives of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Joinable

from ds_lowrank.assembly import (
    assemble,
    move_histories,
    prepare_group,
    project_in_backward,
    register_group,
    step_in_backward,
)
from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.config import LowRankConfig, check_adamw
from ds_lowrank.engine.backward import Layerwise
from ds_lowrank.engine.clipping import Clipping
from ds_lowrank.engine.joining import JoinableOptimizer, check_join, handed_over
from ds_lowrank.engine.projected import ProjectedGradients
from ds_lowrank.engine.refresh import Refresher, RefreshStats
from ds_lowrank.engine.state import MatrixState
from ds_lowrank.engine.step import LowRankStep
from ds_lowrank.full_rank.adamw import FullRank, keep_dtypes
from ds_lowrank.layouts import Layout, LayoutError, Member, check_left_out, ddp_models, in_join, replicates
from ds_lowrank.methods import make_method
from ds_lowrank.outside import StepsBeside
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.plan.specs import MatrixSpec
from ds_lowrank.state_dict.adopt import adopt_states, own_entries, take_entries
from ds_lowrank.state_dict.parameter_states import CONSOLIDATE
from ds_lowrank.state_dict.pieces import DESCRIPTION_KEY, EIGHT_BIT_KEY, PARTS_KEY, STATE_KEY, describe_pieces

logger = logging.getLogger(__name__)

# What a copy of an optimizer has beside what torch's optimizers have, and the key under which it travels.
_OWN = ("config", "narrow", "notes", "_members", "_specs", "_group_options", "_to_adopt", "_outside")
_COPIED = "ds_lowrank"

# Options of a configuration that are not a group's or AdamW's.
OPTIONS = frozenset(f.name for f in dataclasses.fields(LowRankConfig)) - {
    *("rank", "rank_pattern", "optim_target_modules", "lr", "betas", "eps", "weight_decay")
}

# Called by every construction: integrations refuse here what would otherwise go wrong without a word.
construction_checks: list[Callable[[], None]] = []


class LowRankAdamW(StepsBeside, JoinableOptimizer):
    r"""AdamW whose moments live in an r-dimensional subspace of each projected matrix's gradient.

    Every ``update_proj_gap`` steps a basis B (short × r) is selected from the gradient's singular vectors: drawn with
    probability proportional to the singular values (SARA, arXiv 2502.05790) or the dominant ones (GaLore, arXiv
    2403.03507). In between, with A the weight seen so that the projected dimension is its columns,

    .. math::
        R = \nabla A\,B \qquad N = \mathrm{Adam}(R) \qquad A \leftarrow (1-\eta\lambda)A - \eta\,\alpha\,N B^\top

    It runs on one process, under DistributedDataParallel, DeepSpeed ZeRO-1, 2 and 3, and FSDP2 (HSDP too), where
    moments, bases and decompositions are shared out over the ranks. How the model is sharded is found out, and
    verified, at the first step; the trajectory does not depend on it.

    Args:
        params: parameter groups, best made by :func:`ds_lowrank.param_groups`. A group with a ``rank`` (an int, or
            one a parameter) is low-rank: its parameters are matrices; it may set ``update_proj_gap``, ``scale``,
            ``proj_type`` as GaLore's groups do. ``stacked`` (a bool, or one a parameter) says what a parameter of more
            than two dimensions is: True: matrices stacked along the first (the experts of a layer); False: one
            matrix, out × (in · k · k), as a convolution's kernel. Other groups get plain AdamW. Give parameters as
            (name, parameter) pairs: the sampler is keyed by the name.
        lr: learning rate η; a tensor of one number stays one, so that it can be changed in place.
        betas: (β1, β2).
        eps: ε, added to the bias-corrected root.
        weight_decay: λ, decoupled, with the full η.
        options: any other option of :class:`ds_lowrank.LowRankConfig` that is not the groups': ``rule``, ``selection``,
            ``update_proj_gap``, ``state_dtype``, ``layerwise`` ...; of those that a group may set, what it does not.
            With ``layerwise`` call :meth:`ensure_state` before the first backward pass.

    Raises:
        ValueError: an option is out of range, or a low-rank parameter is no matrix.
        ds_lowrank.LayoutError: at the first step, on all ranks, when the sharding is not supported or the
            framework's links do not hold the model's weights.

    Example::

        optimizer = LowRankAdamW(param_groups(model, LowRankConfig(rank=128)), lr=0.01)
    """

    # Whether it is known that states have to be consolidated under DDP; if not, the first step says so.
    reminded = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Any,
    ):
        foreign = sorted(options.keys() - OPTIONS)
        if foreign:
            raise TypeError(
                f"LowRankAdamW has no option {foreign[0]!r}: it takes lr, betas, eps, weight_decay and "
                f"{', '.join(sorted(OPTIONS))}; what is projected, and with which rank, is said by the groups "
                "(ds_lowrank.param_groups)"
            )
        for check in construction_checks:
            check()
        check_adamw(lr, betas, eps, weight_decay)
        self.notes: list[str] = []  # what a run should be told of its framework, for the report
        self.config = LowRankConfig(**options)
        self.method = make_method(self.config)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        # Sharding frameworks replace a group's params by flat buffers, cut the list of groups during a step and
        # replace the group dicts on a load. What belongs to the user's parameters is therefore kept here, by name.
        self._all_groups: list[dict[str, Any]] = self.param_groups
        self._members: list[Member] = []
        self._specs: list[MatrixSpec] = []
        self.narrow: list[str] = []  # matrices that all-linear means and that are not larger than the rank
        self._group_options: list[dict[str, Any]] = []
        for group in self.param_groups:
            self._register(group)
        self._forget_layout()

    def _forget_layout(self) -> None:
        """Begin as a new optimizer does, with the groups, members and states that there are."""
        Joinable.__init__(self)
        self._left_out: list[Member] = []  # that the framework does not train
        self._frozen: set[str] = set()  # names, as of the last step
        self._loaded = bool(self.state)
        self._layout: Layout | None = None
        self._names: dict[int, list[str]] = {}  # of the parameters in a group's tensor
        self._outdated = False  # whether groups were added since the layout was found
        self._plans: list[MatrixPlan] = []
        self._stateful: list[MatrixPlan] = []  # of which this rank keeps something
        self._stepper: LowRankStep | None = None
        self._refresher: Refresher | None = None
        self._layerwise: Layerwise | None = None
        self._projected: ProjectedGradients | None = None
        self.full_rank: FullRank  # the parameters that are not projected; there once the layout is found
        self._complete: dict[str, MatrixState] | None = None  # the states that need no further look
        self._to_adopt: dict[str, Any] = {}  # entries of a loaded state, by parameter
        self._consolidated: dict[str, dict[str, Tensor]] | None = None  # until the next step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, between any two steps but under DeepSpeed. See the class for what a group may hold.

        States go on. The matrices of all groups share one schedule, which is that of an optimizer that was built with
        all of them in this order.

        Raises:
            ValueError: the group is not allowed, or DeepSpeed has made its flat buffers; nothing is added then.
        """
        if hasattr(self, "_specs"):
            prepare_group(param_group, self.param_groups, self._layout, self._backward)
        super().add_param_group(param_group)
        try:
            if not param_group["params"]:
                raise ValueError(f"parameter group {len(self.param_groups) - 1} is empty: leave it out")
            if hasattr(self, "_specs"):
                self._register(param_group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._outdated = True
        self._complete = self._consolidated = None

    def _register(self, group: dict[str, Any]) -> None:
        self.narrow += group.pop("narrow", [])  # not a part of checkpoints, as what stays in a group is
        members, specs, options = register_group(len(self._group_options), group, self._members, self.config)
        self._members += members
        self._specs += specs
        self._group_options.append(options)

    # -- layout and state -----------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """How the model is sharded; found at the first use, on all ranks together."""
        self.ensure_state()
        assert self._layout is not None
        return self._layout

    @property
    def comm(self) -> Comm:
        """The collectives, with the bytes they have sent."""
        self.ensure_state()
        return self._comm

    @property
    def plans(self) -> list[MatrixPlan]:
        """Plan of every projected matrix, in the model's parameter order."""
        self.ensure_state()
        return list(self._plans)

    @property
    def members(self) -> list[Member]:
        """The parameters that the optimizer was built with."""
        return list(self._members)

    @property
    def matrix_specs(self) -> list[MatrixSpec]:
        """What was asked of every projected matrix, in the model's parameter order; needs no layout."""
        return list(self._specs)

    def new_state(self, plan: MatrixPlan) -> MatrixState | None:
        """What this rank keeps of a matrix before its first step; see ``engine.state.NewStates``."""
        self.ensure_state()
        assert self._stepper is not None
        return self._stepper.states.new(plan)

    def replace_states(self, states: dict[str, MatrixState]) -> None:
        """Go on with other states of the matrices, those of a checkpoint."""
        self.state[STATE_KEY] = states  # type: ignore[index]
        self._to_adopt = {}
        self._take_others()
        self.ensure_state()

    def _take_others(self) -> None:
        """What was kept has been replaced: look at what is there now, and let go of what was."""
        self._loaded = True
        self._complete = self._consolidated = None
        if self._stepper is not None:
            self._stepper.forget_states()
        if self._backward is not None:
            self._backward.forget()

    @property
    def _backward(self) -> Layerwise | ProjectedGradients | None:
        """What uses gradients in the backward pass, if something does."""
        return self._projected or self._layerwise

    def release_parameters(self) -> None:
        """Let go of the whole parameters where the model is about to be sharded and the groups get the shards.

        accelerate does that to an optimizer that was built before its model was prepared for FSDP2; holding on to the
        originals would keep the whole model in memory until the first step.
        """
        self._members = [dataclasses.replace(m, held=None) for m in self._members]

    def take_stats(self) -> RefreshStats:
        """What this rank's refreshes did since the last call."""
        if self._refresher is None:
            return RefreshStats()
        stats, self._refresher.stats = self._refresher.stats, RefreshStats()
        return stats

    def ensure_state(self) -> None:
        """Find the layout, verify it and create what state is missing.

        Collective at the first call and at the first after a load, free otherwise.

        Raises:
            ValueError: a loaded state does not fit, on all ranks.
        """
        if self._layout is None or self._outdated or self.state[STATE_KEY] is not self._complete:  # type: ignore[index]
            self._make_state()

    @torch.inference_mode(False)  # which enables gradients; a state made there could not be changed elsewhere
    @torch.no_grad()
    def _make_state(self) -> None:
        if self._layout is None or self._outdated:
            self._find_layout()
        states = self.state[STATE_KEY]  # type: ignore[index]
        if states is self._complete:
            return
        if self._loaded:
            self._adopt_loaded(states)
        self._complete = states
        assert self._stepper is not None
        assert self._layout is not None
        for plan in self._stateful:
            if plan.name not in states:
                state = self._stepper.states.new(plan)
                if state is not None:
                    states[plan.name] = state
        self.full_rank.ensure(self.state)

    def _adopt_loaded(self, states: dict[str, MatrixState]) -> None:
        assert self._stepper is not None
        assert self._layout is not None
        projected = {plan.parameter for plan in self._plans}
        entries = self._to_adopt
        loaded = bool(entries) or len(self.state) > 1
        if self._layout.by_parameter:
            low = own_entries({n: entry for n, entry in entries.items() if n in projected})
            states.update(self._parameter_states.adopt(low))
        adopt_states(states, self._stateful, self._stepper.states.fit, self._comm, loaded)
        for tensor in [key for key in self.state if isinstance(key, Tensor)]:
            if projected.intersection(self._layout.names_in(tensor)):
                del self.state[tensor]  # what another optimizer kept for them
        self.full_rank.adopt(self.state, {n: entry for n, entry in entries.items() if n not in projected})
        self._to_adopt, self._loaded = {}, False  # now: what was refused is refused again

    def _find_layout(self) -> None:
        groups, options = self._all_groups, self._group_options
        found = assemble(self._members, self._specs, groups, options, self.config, self.method, self._joined_engine())
        move_histories(self._plans, found.plans, self.state[STATE_KEY], found.comm)  # type: ignore[index]
        self._members, self._plans, self._comm = found.members, found.plans, found.comm
        self._left_out = found.left_out
        found.refresher.stats = self.take_stats()
        self._ddp_models = ddp_models([m.parameter for m in self._members]) if found.layout.replicated else []
        self._stepper, self._refresher, self.full_rank = found.stepper, found.refresher, found.full_rank
        self._gradients = found.gradients
        if found.states is not None:
            self._parameter_states = found.states
        rank = found.layout.ranks.rank
        self._stateful = [p for p in self._plans if p.shared or p.shares[rank] is not None]
        self._group_of = {m.name: m.group for m in self._members}
        self._layout, self._outdated = found.layout, False
        self._names = {}
        if self.config.layerwise:
            self._layerwise = step_in_backward(
                found, self.config, self._adopted_states, lambda: dict(enumerate(self._all_groups)), self._step_alone
            )
        elif self.config.gradients == "projected":
            self._projected = project_in_backward(found, self.config, self.method, self._adopted_states)
        projected = {p.parameter for p in self._plans} if self._projected is not None else set()
        rest = [m for m in self._members if m.name not in projected]
        others = [m for m in self._members if m.name in projected]
        self._clipping = Clipping(found.layout, found.comm, rest, self._projected, others)

    def _step_alone(self, name: str, parameter: Tensor) -> None:
        group = {**self._all_groups[self._group_of[name]], "params": [parameter]}
        for weights in self.full_rank.step([name], group, self.state):
            weights.wait()

    def _adopted_states(self) -> dict[str, MatrixState]:
        if self._outdated:
            raise RuntimeError(
                "a backward pass after add_param_group(): call ensure_state() between the two, which puts the hooks on "
                "what was added"
            )
        self.ensure_state()  # a state may have been loaded since
        return self.state[STATE_KEY]  # type: ignore[index]

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as a framework saves it. Collective but on one process and under DeepSpeed and DDP.

        Under FSDP2 and on one process every projected parameter has an entry as any other has, DTensors or tensors of
        global shape: see docs/checkpoints.md, and :mod:`ds_lowrank.state_dict.parameter_states`. Under DDP the
        states are dealt over the ranks: call :meth:`consolidate_state_dict` on all of them before. Under DeepSpeed,
        whose groups hold flat buffers, every rank saves its own rows with a description of where they belong.

        Raises:
            RuntimeError: under DDP, when the state of this step was not consolidated on this rank.
        """
        if self._layout is None and not self.state and not self._to_adopt:
            return super().state_dict()  # accelerate takes it before the model is sharded
        if self._projected is not None and self._projected.busy:
            raise RuntimeError(
                "state_dict() between a backward pass and step(): projected gradients are no part of a checkpoint. "
                "Save after step(), or call zero_grad() to drop them"
            )
        if self._layout is None or not self._layout.replicated:
            self.ensure_state()
        assert self._layout is not None
        if self._layout.replicated and self._consolidated is None:
            raise RuntimeError(CONSOLIDATE)
        packed = super().state_dict()
        if not self._layout.by_parameter:
            packed[DESCRIPTION_KEY] = describe_pieces(self._layout, self._members, self._plans, self.param_groups)
            return packed
        states = packed["state"].pop(STATE_KEY)
        for key in (EIGHT_BIT_KEY, PARTS_KEY):
            packed["state"].pop(key, None)
        entries = self._consolidated
        if entries is None:
            entries = {**self._parameter_states.collect(states), **self.full_rank.collect(self.state)}
        for index, member in enumerate(self._members):
            if member.name in entries:
                packed["state"][index] = entries[member.name]
        return packed

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Under DDP, bring the whole state to rank ``to`` (``None``: to all) for :meth:`state_dict`. Collective.

        Elsewhere it does nothing. The name is ``torch.distributed.optim.ZeroRedundancyOptimizer``'s.
        """
        self.ensure_state()
        assert self._layout is not None
        self.reminded = True
        if self._layout.replicated:
            takers = range(self._layout.ranks.size) if to is None else [to]
            low = self._parameter_states.collect(self.state[STATE_KEY], takers)  # type: ignore[index]
            entries = {**low, **self.full_rank.collect(self.state, takers)}
            self._consolidated = entries if self._layout.ranks.rank in takers else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; what of it is low-rank is checked and dealt to the ranks at its first use.

        Args:
            state_dict: of this class, from the same kind of layout (:func:`ds_lowrank.load_checkpoint` takes any).

        Raises:
            ValueError: other parameter groups, or other parameters in them.
        """
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        projected = {spec.parameter for spec in self._specs}
        stepped = [p for group in self.param_groups for p in group["params"]]
        dealt = replicates(stepped) if self._layout is None else self._layout.replicated
        eight_bit = self.config.state_dtype == "int8"
        loaded, state_dict = take_entries(state_dict, self._members, projected, eight_bit, dealt)
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise ValueError(f"{error}. ds_lowrank.load_checkpoint goes by name, and takes other groups") from error
        self._to_adopt = loaded
        tensors = dict(zip(ids, (p for group in self.param_groups for p in group["params"])))
        keep_dtypes(self.state, state_dict["state"], tensors)

    # -- gradients ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip all gradients together by their norm, as :func:`torch.nn.utils.clip_grad_norm_` does. Collective.

        With ``gradients="projected"`` it is √(Σ ‖R‖² + Σ ‖g‖²): of what is projected by the length of its projection,
        which is all there is of it. torch's own function would clip the rest alone then; ``step()`` refuses that.

        Args:
            max_norm: gradients are multiplied by ``max_norm / (norm + 1e-6)`` where that is less than 1; ``math.inf``
                leaves them as they are.
            norm_type: 2.
            error_if_nonfinite: raise where the norm is not finite.

        Returns:
            The norm before, a float32 tensor of one number on the ranks' device.

        Raises:
            ValueError: another ``norm_type``.
            ds_lowrank.LayoutError: with ``layerwise``, or under DeepSpeed, whose engine clips.
            RuntimeError: ``error_if_nonfinite``, and it is not.
        """
        if norm_type != 2:
            raise ValueError(f"clip_grad_norm_ knows the 2-norm, got norm_type {norm_type!r}")
        self.ensure_state()
        assert self._layout is not None
        if self.config.layerwise:
            raise LayoutError("layerwise has used gradients before their norm is known: use gradients 'projected'")
        if not self._layout.by_parameter:
            raise LayoutError("under DeepSpeed its engine clips: set gradient_clipping in its configuration")
        return self._clipping.clip_(max_norm, error_if_nonfinite)

    # -- step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step the groups in ``param_groups``, which a framework may have cut to one of them.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(has_data=True)
        return loss

    def step_without_data(self) -> None:
        """The step of a rank that has run out of data. Collective with :meth:`step` of the others."""
        self._step(has_data=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _step(self, has_data: bool) -> None:
        self.ensure_state()
        assert self._layout is not None
        if self._layout.ranks.size > 1:
            check_join(self, self._layout, self._ddp_models)
        if self._layout.replicated and not self.reminded:
            self.reminded = True
            if self._layout.ranks.rank == 0:
                logger.warning("before every save: %s", CONSOLIDATE)
        self._consolidated = None
        joined = self._layout.replicated and in_join(self)
        kind = self._layout.ranks.device.type
        # Inside a user's autocast products of a step would be rounded to bf16.
        plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with plain, handed_over(self._members, self._all_groups, self._comm, has_data) if joined else nullcontext():
            self._step_members(self._layout)

    def _step_members(self, layout: Layout) -> None:
        assert self._stepper is not None
        if self._left_out:
            check_left_out(self._left_out)
        frozen = {m.name for m in self._members if m.held is not None and not m.held.requires_grad}
        if self._frozen - frozen:
            self._gradients.again()
        self._frozen = frozen
        self._gradients.run(self._members)
        if self._projected is not None:
            self._clipping.check()  # before anything moves
        stepping: set[str] = set()
        groups: dict[int, dict[str, Any]] = {}
        arriving: list[Pending[None]] = []
        lowrank = {plan.group for plan in self._plans}
        done = frozen | (self._layerwise.stepped if self._layerwise is not None else set())
        for group in self.param_groups:
            names = self._names_of(group["params"], layout)
            index = self._group_of[names[0]] if names else -1
            if index in lowrank:
                stepping.update(name for name in names if name not in frozen)
                groups[index] = group
            elif names:
                arriving += self.full_rank.step([name for name in names if name not in done], group, self.state)
        plans = [p for p in self._plans if p.parameter in stepping]
        if self._projected is not None:
            if self._outside is None or self.param_groups is self._outside.groups:
                self._projected.step(plans, groups)
        else:
            if self._layerwise is not None:
                plans = self._layerwise.remaining(plans)
            self._stepper.run(plans, self.state[STATE_KEY], groups)  # type: ignore[index]
        for weights in arriving:
            weights.wait()

    def _names_of(self, tensors: Sequence[Tensor], layout: Layout) -> list[str]:
        """Names of the parameters in tensors of a group; asked for once."""
        known, names = self._names, []
        for tensor in tensors:
            if id(tensor) not in known:
                known[id(tensor)] = layout.names_in(tensor)
            names += known[id(tensor)]
        return names

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and what was accumulated in their place."""
        super().zero_grad(set_to_none)
        if self._backward is not None:
            self._backward.forget()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has; the layout is found anew at its first step.

        Raises:
            TypeError: under DeepSpeed, whose flat buffers belong to its engine.
        """
        if self._layout is not None and not self._layout.by_parameter:
            raise TypeError(
                "under DeepSpeed the optimizer's groups hold flat buffers of the engine and cannot be copied or "
                "pickled: save with engine.save_checkpoint(), and load it with a new engine"
            )
        return {**super().__getstate__(), _COPIED: {name: getattr(self, name) for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called for a copy, and by ``load_state_dict``, which makes new group dicts: go on with those.

        What this run was configured with (ranks, scale, schedule, names) stays at a load; learning rate, betas, eps
        and weight decay are the checkpoint's, as torch's optimizers have it.
        """
        super().__setstate__({key: value for key, value in state.items() if key != _COPIED})
        self.defaults.pop("differentiable", None)  # torch's, for optimizers that have it: groups added later get it
        self._all_groups = self._every_group()
        if _COPIED in state:
            self._forget_layout()
            self.__dict__.update(state[_COPIED])
            self._all_groups = self._every_group()
            self.method = make_method(self.config)
            self._loaded = bool(self.state or self._to_adopt)
            return
        self._take_others()
        for group, options in zip(self._all_groups, self._group_options):
            group.update(options)
