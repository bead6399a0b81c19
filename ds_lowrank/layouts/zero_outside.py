"""DeepSpeed's stages 1 to 3 with matrices that its optimizer is not given: the model's own weights, beside it.

With ``gradients="projected"`` the projected matrices are in no group that DeepSpeed sees. It flattens, reduces, clips,
steps and saves the rest; here stands all that it has to be told about them, read from it or put in the place of
something of it. What is missing in an installed version is refused by the version's name.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_lowrank.layouts.base import Layout, LayoutError, LocalGradients, Member, Piece, Tensors
from ds_lowrank.layouts.cuts import slice_piece
from ds_lowrank.layouts.ddp import ReplicatedLayout
from ds_lowrank.layouts.hooks import WholeGradients
from ds_lowrank.layouts.zero_files import FRAGMENTS, SHAPES

_WATCHED = "_ds_lowrank_watched"
# By their names, so that nothing of DeepSpeed is imported before it is used: method -> whether stage 3 has it.
_STAGES = {"DeepSpeedZeroOptimizer": False, "DeepSpeedZeroOptimizer_Stage3": True}
_ENGINE_METHODS = ("_common_checkpoint_state", "load_module_state_dict", "_get_param_shape_func")
_ZERO_METHODS = {False: ("scaled_global_norm", "step"), True: ("_get_norm_groups", "_post_step", "step")}


class StepsOutside(Protocol):
    """What an optimizer does with its groups outside."""

    def outside_parameters(self) -> Mapping[str, nn.Parameter]:
        """Name -> parameter; empty where there is no group outside."""
        ...

    def join_engine(self, engine: OutsideEngine) -> None:
        """Called by :func:`watch_engines` once an engine has its optimizer."""
        ...

    def projected_norm_squared(self) -> Tensor:
        """See :meth:`ds_lowrank.LowRankAdamW.projected_norm_squared`."""
        ...

    def scale_projected_(self, coefficient: Tensor) -> None:
        """See :meth:`ds_lowrank.LowRankAdamW.scale_projected_`."""
        ...

    def step_outside(self) -> None:
        """Step the groups outside."""
        ...

    def forget_projected(self) -> None:
        """Drop the gradients of the groups outside."""
        ...


def watch_engines() -> None:
    """Join engines that are given an optimizer with groups outside, as soon as they have made an optimizer of it.

    DeepSpeed tells an optimizer nothing of the engine: nothing but the engine's own set-up knows both.

    Raises:
        LayoutError: the installed DeepSpeed has no such place.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = getattr(DeepSpeedEngine, "_configure_optimizer", None)
    if original is None:
        raise _unknown("DeepSpeedEngine._configure_optimizer")
    if getattr(original, _WATCHED, False):
        return

    @wraps(original)
    def configure(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        optimizer: Any = getattr(self, "basic_optimizer", None)
        asked = getattr(optimizer, "outside_parameters", None)
        if asked is not None and asked():
            optimizer.join_engine(OutsideEngine(self, optimizer))

    setattr(configure, _WATCHED, True)
    DeepSpeedEngine._configure_optimizer = configure


class OutsideEngine:
    """A DeepSpeed engine whose optimizer lacks some matrices; puts them into its norm, its step and its checkpoints.

    Args:
        engine: a ``DeepSpeedEngine`` that has its optimizer.
        optimizer: what steps the matrices; also what DeepSpeed's optimizer steps the rest with.

    Raises:
        LayoutError: on all ranks, when precision, offload or the installed version do not allow it.

    Attributes:
        names: of the matrices.
    """

    def __init__(self, engine: Any, optimizer: StepsOutside):
        self._zero: Any = engine.optimizer
        self._engine = weakref.ref(engine)
        self._optimizer = weakref.ref(optimizer)
        self._parameters = dict(optimizer.outside_parameters())
        self.names = frozenset(self._parameters)
        self._check(engine)
        self.partitioned = _STAGES[type(self._zero).__name__]
        # DeepSpeed's names, which its checkpoints go by.
        self._saved_as = {engine.param_names[p]: p for p in self._parameters.values()}
        self._join_step()
        self._join_checkpoints(engine)

    def _check(self, engine: Any) -> None:
        zero, kind = self._zero, type(self._zero).__name__
        option = "gradients 'projected'"
        if kind not in _STAGES:
            raise LayoutError(
                f"{option} goes with ZeRO stages 1, 2 and 3, and this configuration makes a {kind}: set "
                'zero_optimization.stage; with "bf16" in stage 1 leave out data_types.grad_accum_dtype = fp32'
            )
        methods = [(engine, name) for name in _ENGINE_METHODS] + [(zero, n) for n in _ZERO_METHODS[_STAGES[kind]]]
        for owner, name in methods:
            if not callable(getattr(owner, name, None)):
                raise _unknown(f"{type(owner).__name__}.{name}")
        for owner, name in (
            (engine, "param_names"),
            (engine, "inside_no_sync_ctxt"),
            (zero, "overflow"),
            (zero, "clip_grad"),
            (zero, "communication_data_type"),
            (zero, "_global_grad_norm"),
        ):
            if not hasattr(owner, name):
                raise _unknown(f"{type(owner).__name__}.{name}")
        _combine()
        if zero.dtype == torch.float16:
            raise LayoutError(f"{option} does not go with fp16, whose losses are scaled: use bf16")
        if any(getattr(zero, name, False) for name in ("cpu_offload", "offload_optimizer", "offload_param")):
            raise LayoutError(f"{option} does not go with offload yet: remove offload_optimizer and offload_param")
        if getattr(zero, "compute_grad_norm", True) is False:
            raise LayoutError(f"{option} needs the norm that it is clipped by: remove compute_grad_norm = false")
        if getattr(zero, "zero_hpz_partition_size", 1) > 1:
            raise LayoutError(
                f"{option} does not go with zero_hpz_partition_size > 1, which keeps second copies of the weights: "
                "remove it"
            )
        if getattr(engine, "gradient_average", True) is False:
            raise LayoutError(f"{option} averages gradients over the ranks: set gradient_allreduce_op to mean")

    # -- the step -----------------------------------------------------------------------------------------------------

    def _join_step(self) -> None:
        zero, step = self._zero, self._zero.step
        combine = _combine()

        def with_outside(norms: Sequence[Any]) -> Tensor:
            optimizer = self._optimizer()
            assert optimizer is not None
            like = torch.as_tensor(norms[0])
            return combine([*norms, optimizer.projected_norm_squared().sqrt().to(like.device, like.dtype)])

        def stepped(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            if zero.overflow:
                optimizer = self._optimizer()
                assert optimizer is not None
                optimizer.forget_projected()
            elif not self.partitioned:
                self._step()

        zero.step = stepped
        if self.partitioned:
            norm_groups, post_step = zero._get_norm_groups, zero._post_step
            zero._get_norm_groups = lambda: [with_outside(norm_groups())]

            def post(*args: Any, **kwargs: Any) -> None:
                self._step()  # now: what stays gathered is gathered anew in the other
                post_step(*args, **kwargs)

            zero._post_step = post
        else:
            norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda *args, **kwargs: with_outside([norm(*args, **kwargs)])

    def _step(self) -> None:
        """Step the matrices, clipped as DeepSpeed has clipped the rest."""
        optimizer, zero = self._optimizer(), self._zero
        assert optimizer is not None
        if zero.clip_grad > 0:
            excess = (torch.as_tensor(zero._global_grad_norm) + 1e-6) / zero.clip_grad
            optimizer.scale_projected_(1.0 / excess.clamp(min=1.0))
        optimizer.step_outside()

    def syncs(self) -> bool:
        """Whether gradients are averaged in the backward pass that runs now."""
        engine = self._engine()
        return engine is None or not engine.inside_no_sync_ctxt

    @property
    def wire_dtype(self) -> torch.dtype:
        """Dtype in which DeepSpeed reduces gradients."""
        return self._zero.communication_data_type

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _join_checkpoints(self, engine: Any) -> None:
        common, load = engine._common_checkpoint_state, engine.load_module_state_dict
        shape = engine._get_param_shape_func

        def saved(*args: Any, **kwargs: Any) -> dict[str, Any]:
            # Where DeepSpeed keeps what its optimizer does not own: its converters look there, and nowhere else.
            state = common(*args, **kwargs)
            for key, read in ((SHAPES, shape), (FRAGMENTS, self._fragment)):
                state[key] = OrderedDict(state.get(key) or {})
                state[key].update((name, read(p)) for name, p in self._saved_as.items())
            return state

        def loaded(checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
            fragments = dict(checkpoint.get(FRAGMENTS) or {})
            own = {name: fragments.pop(name) for name in self._saved_as if name in fragments}
            load({**checkpoint, FRAGMENTS: fragments or None}, *args, **kwargs)
            if self.partitioned:
                self._load(checkpoint.get("module") or {}, own)

        engine._common_checkpoint_state, engine.load_module_state_dict = saved, loaded

    def _fragment(self, parameter: Any) -> Tensor:
        # Of whole ones no copy: the file has the model's tensors too, and stores what is shared once.
        return parameter.ds_tensor.detach().cpu() if self.partitioned else parameter.detach()

    def _load(self, module: Mapping[str, Tensor], fragments: Mapping[str, Tensor]) -> None:
        """DeepSpeed's own load leaves what is there of them, without a word."""
        for name, parameter in self._saved_as.items():
            p: Any = parameter
            if name in module and module[name].numel() == p.ds_numel:
                continue  # the whole weights were loaded
            if name not in fragments:
                raise ValueError(
                    f"the checkpoint has no weights of {name} {tuple(p.ds_shape)} where gradients 'projected' keeps "
                    "them: a run with gradients 'full' saved it. ds_lowrank.load_checkpoint goes on with it"
                )
            if fragments[name].numel() != p.ds_tensor.numel():
                raise ValueError(
                    f"the checkpoint has {fragments[name].numel()} elements of {name} {tuple(p.ds_shape)} for this "
                    f"rank, which holds {p.ds_tensor.numel()}: another number of ranks saved it. "
                    "ds_lowrank.load_checkpoint goes on with it"
                )
            p.ds_tensor.data.copy_(fragments[name])


class OutsideLayout:
    """Pieces in DeepSpeed's flat buffers, and matrices beside them.

    Args:
        inside: of what DeepSpeed's optimizer owns.
        members: the matrices.
        engine: that they train beside.
    """

    replicated = False  # see is_replicated
    steps_alone = False
    by_parameter = False

    def __init__(self, inside: Layout, members: Sequence[Member], engine: OutsideEngine):
        self._inside, self._engine = inside, engine
        self._outside: Any = PartitionedLayout(members, inside) if engine.partitioned else ReplicatedLayout(members)
        self._parameters = {m.name: m.parameter for m in members}
        self._ids = {id(p) for p in self._parameters.values()}
        self.kind, self.ranks = inside.kind, inside.ranks
        self.pieces = {**inside.pieces, **self._outside.pieces}

    def _of(self, name: str) -> Any:
        return self._outside if name in self._parameters else self._inside

    def is_replicated(self, name: str) -> bool:
        """Whether every rank holds a parameter whole."""
        return name in self._parameters and bool(self._outside.replicated)

    def is_outside(self, name: str) -> bool:
        """Whether DeepSpeed's optimizer does not own a parameter: it lies in no flat buffer."""
        return name in self._parameters

    @property
    def copied(self) -> set[str]:  # noqa: D102
        return self._outside.copied

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return self._of(name).weight(name)

    def store(self, name: str, weights: Tensor) -> None:  # noqa: D102
        self._of(name).store(name, weights)

    def grad(self, name: str) -> Tensor | None:  # noqa: D102
        return self._of(name).grad(name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._of(name).dtype(name)

    def gradient_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._of(name).gradient_dtype(name)

    def unit(self, name: str) -> int:  # noqa: D102
        return -1 if name in self._parameters else self._inside.unit(name)

    def place(self, name: str) -> tuple[Tensor, int]:  # noqa: D102
        return self._of(name).place(name)

    def names_in(self, tensor: Tensor) -> list[str]:  # noqa: D102
        return (self._outside if id(tensor) in self._ids else self._inside).names_in(tensor)

    def mismatch(self) -> str | None:  # noqa: D102
        return self._inside.mismatch() or self._outside.mismatch()

    def checksums(self, what: str) -> Any:  # noqa: D102
        # The gradients outside are each rank's own.
        return self._outside.checksums(what) if what == "weights" else None

    def local_gradients(self, names: Sequence[str]) -> LocalGradients:  # noqa: D102
        parameters = {name: self._parameters[name] for name in names}
        return WholeGradients(parameters, self._engine.syncs, self._engine.wire_dtype)


class PartitionedLayout:
    """Slices of ZeRO-3's parameters that are the model's own weights, with no master copy.

    Args:
        members: the parameters.
        inside: of the others.
    """

    replicated = False
    copied: frozenset[str] = frozenset()

    def __init__(self, members: Sequence[Member], inside: Layout):
        self._parameters: dict[str, Any] = {m.name: m.parameter for m in members}
        self._shapes = {m.name: m.shape for m in members}
        self._tensors = Tensors()
        self._size = inside.ranks.size
        self.pieces: dict[str, Piece] = {}
        for name, parameter in self._parameters.items():
            self._tensors.add(parameter, name)
            piece = slice_piece(parameter.ds_numel, parameter.ds_tensor.numel(), inside.ranks.rank)
            if piece.start < piece.stop:
                self.pieces[name] = piece

    def weight(self, name: str) -> Tensor:  # noqa: D102
        piece = self.pieces[name]
        return self._parameters[name].ds_tensor.data.narrow(0, 0, piece.stop - piece.start)

    def store(self, name: str, weights: Tensor) -> None:  # noqa: D102
        pass

    def grad(self, name: str) -> None:  # noqa: D102
        return None

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._parameters[name].ds_tensor.dtype

    def gradient_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._parameters[name].dtype

    def place(self, name: str) -> tuple[Tensor, int]:  # noqa: D102
        return self._parameters[name], 0

    def names_in(self, tensor: Tensor) -> list[str]:  # noqa: D102
        return self._tensors.names_in(tensor)

    def mismatch(self) -> str | None:  # noqa: D102
        for name, parameter in self._parameters.items():
            part = parameter.ds_tensor
            if part.ndim != 1 or part.numel() * self._size < parameter.ds_numel or part.device.type == "meta":
                return (
                    f"{name} {self._shapes[name]}: DeepSpeed {version('deepspeed')} keeps {tuple(part.shape)} on "
                    f"{part.device} of it on this rank, where {self._size} ranks hold a slice each"
                )
        return None

    def checksums(self, what: str) -> None:  # noqa: D102
        return None


def _combine() -> Callable[[Sequence[Any]], Tensor]:
    """DeepSpeed's own way from the norms of groups to that of all, which votes on steps that are not finite."""
    import deepspeed.runtime.utils as utils

    found = getattr(utils, "combine_grad_norm_groups", None)
    if found is None:
        raise _unknown("deepspeed.runtime.utils.combine_grad_norm_groups")
    return found


def _unknown(what: str) -> LayoutError:
    return LayoutError(
        f"gradients 'projected' needs {what}, which DeepSpeed {version('deepspeed')} does not have (0.19.8 does): "
        "install another DeepSpeed, or use gradients 'full'"
    )
