"""The torch optimizer: defaults, groups, state, step. No mathematics and no collectives of its own."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ds_lowrank.comm import Comm
from ds_lowrank.config import LowRankConfig, check_adamw
from ds_lowrank.layouts import Layout, Member, find_layout
from ds_lowrank.plan import MatrixSpec, make_plan
from ds_lowrank.refresh import MatrixState, Refresher, RefreshStats
from ds_lowrank.rows import MatrixPlan
from ds_lowrank.step import LowRankStep, work_dtype

logger = logging.getLogger(__name__)

# Low-rank states hang on a string key of ``state``: torch's and DeepSpeed's loaders cast what hangs on a parameter
# to its dtype and pass over the rest.
STATE_KEY = "lowrank"

_LOWRANK_KEYS = ("rank", "update_proj_gap", "scale", "proj_type")

# Called by every construction: integrations refuse here what would otherwise go wrong without a word.
construction_checks: list[Callable[[], None]] = []


class LowRankAdamW(torch.optim.Optimizer):
    r"""AdamW whose moments live in an r-dimensional subspace of each projected matrix's gradient.

    Every ``update_proj_gap`` steps a basis B (short × r) is selected from the gradient's singular vectors: drawn with
    probability proportional to the singular values (SARA, arXiv 2502.05790) or the dominant ones (GaLore, arXiv
    2403.03507). In between, with A the weight seen so that the projected dimension is its columns,

    .. math::
        R = \nabla A\,B \qquad N = \mathrm{Adam}(R) \qquad A \leftarrow (1-\eta\lambda)A - \eta\,\alpha\,N B^\top

    It runs on one process and under DeepSpeed ZeRO-1 and ZeRO-2, where moments, bases and decompositions are shared
    out over the ranks. How the model is sharded is found out, and verified, at the first step.

    Args:
        params: parameter groups, best made by :func:`ds_lowrank.param_groups`. A group with a ``rank`` (an int, or
            one a parameter) is low-rank: its parameters are 2-D; it may set ``update_proj_gap``, ``scale``,
            ``proj_type`` as GaLore's groups do. Other groups get plain AdamW. Give parameters as (name, parameter)
            pairs: the sampler is keyed by the name.
        lr: learning rate η.
        betas: (β1, β2).
        eps: ε, added to the bias-corrected root.
        weight_decay: λ, decoupled, with the full η.
        update_proj_gap: τ, steps between two refreshes of a matrix.
        scale: α, factor on the low-rank update.
        proj_type: ``std``, ``reverse_std``, ``right`` or ``left``.
        selection: ``importance``, ``dominant``, ``uniform`` or ``random``.
        moments: ``keep`` or ``project``, see :func:`ds_lowrank.subspace.basis.carry_moments_`.
        seed: key of the sampler.
        stagger: refresh in waves spread over the period (True) or all matrices at once (False).
        wave_size: matrices in a wave.
        gram_dtype: ``float32``, ``float64``, or ``auto``: float64 on a CPU, float32 elsewhere.

    Raises:
        ValueError: an option is out of range, or a low-rank parameter is not 2-D.
        ds_lowrank.LayoutError: at the first step, on all ranks, when the sharding is not supported or the
            framework's links do not hold the model's weights.

    Example::

        optimizer = LowRankAdamW(param_groups(model, LowRankConfig(rank=128)), lr=0.01)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        selection: str = "importance",
        moments: str = "keep",
        seed: int = 0,
        stagger: bool = True,
        wave_size: int = 8,
        gram_dtype: str = "auto",
    ):
        for check in construction_checks:
            check()
        check_adamw(lr, betas, eps, weight_decay)
        self.config = LowRankConfig(
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            selection=selection,
            moments=moments,
            seed=seed,
            stagger=stagger,
            wave_size=wave_size,
            gram_dtype=gram_dtype,
        )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        # Sharding frameworks replace a group's params by flat buffers, cut the list of groups during a step and
        # replace the group dicts on a load. What belongs to the user's parameters is therefore kept here, by name.
        self._all_groups: list[dict[str, Any]] = self.param_groups
        self._members: list[Member] = []
        self._specs: list[MatrixSpec] = []
        self._group_options: list[dict[str, Any]] = []
        for index, group in enumerate(self.param_groups):
            self._register(index, group)
        self._loaded = False
        self._layout: Layout | None = None
        self._plans: list[list[MatrixPlan]] = []  # a list a group
        self._stateful: list[MatrixPlan] = []  # of which this rank keeps something
        self._stepper: LowRankStep | None = None
        self._refresher: Refresher | None = None
        self._group_index: dict[int, int] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group before the first step. See the class for what a group may hold."""
        if getattr(self, "_layout", None) is not None:
            raise ValueError("parameter groups cannot be added after the layout was found (the first step)")
        super().add_param_group(param_group)
        if not param_group["params"]:
            raise ValueError(f"parameter group {len(self.param_groups) - 1} is empty: leave it out")
        if hasattr(self, "_specs"):
            self._register(len(self.param_groups) - 1, param_group)

    def _register(self, index: int, group: dict[str, Any]) -> None:
        names = group.get("param_names") or [f"group{index}.{k}" for k in range(len(group["params"]))]
        check_adamw(group["lr"], group["betas"], group["eps"], group["weight_decay"], where=f"group {index}: ")
        ranks: Any = group.get("rank")
        lowrank = ranks is not None
        if lowrank:
            _refuse_unknown(index, group)
            group.setdefault("scale", self.config.scale)
            if not isinstance(ranks, (list, tuple)):
                ranks = [ranks] * len(names)
            if len(ranks) != len(names):
                raise ValueError(f"group {index}: {len(ranks)} ranks for {len(names)} parameters")
        for k, (name, parameter) in enumerate(zip(names, group["params"])):
            shape = tuple(parameter.shape)
            if any(m.name == name for m in self._members):
                raise ValueError(f"group {index}: the parameter name {name!r} is taken already: names must be unique")
            self._members.append(Member(name, parameter, shape, index))
            if lowrank:
                self._specs.append(self._spec(name, shape, index, ranks[k], group))
        kept = ("name", "param_names", *_LOWRANK_KEYS)
        self._group_options.append({key: group[key] for key in kept if key in group})

    def _spec(self, name: str, shape: tuple[int, ...], index: int, rank: int, group: dict[str, Any]) -> MatrixSpec:
        if len(shape) != 2:
            raise ValueError(
                f"{name} {shape} is in a low-rank group but is not a matrix: put it into a group without 'rank'"
            )
        options = LowRankConfig(
            rank=rank,
            update_proj_gap=group.get("update_proj_gap", self.config.update_proj_gap),
            scale=group["scale"],
            proj_type=group.get("proj_type", self.config.proj_type),
        )
        if rank > max(shape):
            raise ValueError(f"rank {rank} is larger than both sides of {name} {shape}: use at most {min(shape)}")
        if rank > min(shape):
            warnings.warn(
                f"rank {rank} is larger than the shorter side of {name} {shape}: clamped to {min(shape)}", stacklevel=4
            )
        return MatrixSpec(
            name, (shape[0], shape[1]), index, min(rank, *shape), options.update_proj_gap, options.proj_type
        )

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
        return [plan for group in self._plans for plan in group]

    @property
    def members(self) -> list[Member]:
        """The parameters that the optimizer was built with."""
        return list(self._members)

    @property
    def matrix_specs(self) -> list[MatrixSpec]:
        """What was asked of every projected matrix, in the model's parameter order; needs no layout."""
        return list(self._specs)

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
        if not hasattr(self, "_specs"):
            raise TypeError("a copied or unpickled LowRankAdamW has no parameters: build a new one and load its state")
        if self._layout is None:
            self._find_layout()
        states = self.state[STATE_KEY]  # type: ignore[index]
        if self._loaded:
            self._adopt_loaded(states)
        if all(plan.name in states for plan in self._stateful):
            return
        assert self._stepper is not None
        for plan in self._stateful:
            if plan.name not in states:
                state = self._stepper.new_state(plan, self._dtype_of(plan.group))
                if state is not None:
                    states[plan.name] = state

    def _adopt_loaded(self, states: dict[str, MatrixState]) -> None:
        """Check a loaded state against the plan and put it where the weights are: loaders leave it on the CPU."""
        assert self._stepper is not None
        known = {plan.name for plan in self._stateful}
        wrong = [f"it has {name!r}, which is no projected parameter here" for name in states if name not in known]
        for plan in self._stateful:
            if plan.name in states:
                fault = self._stepper.fit_state(plan, states[plan.name], self._dtype_of(plan.group))
                wrong += [fault] if fault else []
        for rank, faults in enumerate(self._comm.gather_objects(wrong[:1])):
            if faults:
                raise ValueError(
                    f"the loaded optimizer state does not fit this run (rank {rank}): {faults[0]}. Resume with the "
                    "same model, rank, rank_pattern, optim_target_modules and number of ranks"
                )
        missing = [plan.name for plan in self._stateful if plan.name not in states]
        if missing:
            logger.warning(
                "the loaded optimizer state has nothing for %d of the %d matrices here (%s, ...): they start anew",
                len(missing),
                len(self._stateful),
                missing[0],
            )
        for index, plans in enumerate(self._plans):
            for tensor in self._layout.flat_params(index) if plans and self._layout else []:
                self.state.pop(tensor, None)  # what another optimizer kept for them
        self._loaded = False

    def _find_layout(self) -> None:
        if not self._specs:
            warnings.warn(
                "nothing is projected: no parameter group sets a rank. Make the groups with "
                "ds_lowrank.param_groups(model), or the optimizer with ds_lowrank.build_optimizer(model)",
                stacklevel=4,
            )
        layout = find_layout(self._members, self._all_groups)
        comm = Comm(layout.ranks)
        config = self.config
        scales = [options.get("scale") for options in self._group_options]
        plans = make_plan(
            self._specs,
            layout,
            comm,
            stagger=config.stagger,
            wave_size=config.wave_size,
            options=repr((config, scales)),
        )
        self._refresher = Refresher(
            comm, config.selection, config.moments, config.seed, _gram_dtype(config.gram_dtype, layout.ranks.device)
        )
        self._stepper = LowRankStep(layout, comm, self._refresher)
        self._plans = [[p for p in plans.values() if p.group == i] for i in range(len(self._all_groups))]
        rank = layout.ranks.rank
        self._stateful = [p for p in plans.values() if p.cut or p.shares[rank] is not None]
        self._group_index = {id(tensor): i for i in range(len(self._all_groups)) for tensor in layout.flat_params(i)}
        self._comm = comm
        self._layout = layout

    def _dtype_of(self, group: int) -> torch.dtype:
        return work_dtype(next(m.parameter.dtype for m in self._members if m.group == group))

    # -- step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        self.ensure_state()
        assert self._stepper is not None
        states = self.state[STATE_KEY]  # type: ignore[index]
        for group in self.param_groups:
            index = self._group_index[id(group["params"][0])]
            if self._plans[index]:
                self._stepper.run(self._plans[index], states, group, self._dtype_of(index))
            else:
                self._step_full_rank(group)
        return loss

    def _step_full_rank(self, group: dict[str, Any]) -> None:
        """Plain AdamW, torch's own, on whatever tensors the group holds."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if self.state[p]:
                self.state[p]["step"] = self.state[p]["step"].to(p.device)  # loaders leave it on the CPU
            else:
                # torch's fused kernel takes counters on the parameter's device and moments in its dtype
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        if not params:
            return
        moments: list[list[Tensor]] = [[self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq")]
        adamw(
            params,
            [p.grad for p in params],
            moments[0],
            moments[1],
            [],
            [self.state[p]["step"] for p in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by ``load_state_dict``, which makes new group dicts: go on with those.

        What this run was configured with (ranks, scale, schedule, names) stays; learning rate, betas, eps and weight
        decay are the checkpoint's, as torch's optimizers have it.
        """
        super().__setstate__(state)
        if hasattr(self, "_specs"):
            self._all_groups = self.param_groups
            self._loaded = True
            for group, options in zip(self.param_groups, self._group_options):
                group.update(options)


def _refuse_unknown(index: int, group: dict[str, Any]) -> None:
    known = ("params", "param_names", "name", "lr", "initial_lr", "betas", "eps", "weight_decay", *_LOWRANK_KEYS)
    for key in group:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"group {index}: unknown option {key!r}{hint} A low-rank group may set {', '.join(_LOWRANK_KEYS)} and "
                "AdamW's options; selection, moments, seed and the rest belong to the optimizer"
            )


def _gram_dtype(option: str, device: torch.device) -> torch.dtype:
    if option == "auto":
        return torch.float64 if device.type == "cpu" else torch.float32
    return torch.float64 if option == "float64" else torch.float32
