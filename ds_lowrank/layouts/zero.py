"""DeepSpeed ZeRO-1 and ZeRO-2: a slice of one long flat buffer a parameter group.

Serves DeepSpeedZeroOptimizer (stages 1 and 2, with and without CPU offload) and BF16_Optimizer (which stage 1 uses for
bf16 weights with fp32 accumulation). Both replace the parameters of a group by this rank's flat partition and link
every model parameter to its fragment of it; the fragments' addresses are trusted, never a running sum, because
DeepSpeed may pad between parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.layouts.base import Group, LayoutError, LocalGradients, Member, Piece, Ranks, Tensors

# What makes DeepSpeed's flat buffers bf16, in any stage and without offload.
BF16_MASTER = '"bf16": {"enabled": true, "bf16_master_weights_and_grads": true, "bf16_optimizer_states": true}'


def is_zero12(members: Sequence[Member]) -> bool:
    """Whether DeepSpeed has linked these parameters to flat partitions."""
    return any(hasattr(m.parameter, "_hp_mapping") for m in members)


def in_flat_buffers(member: Member) -> bool:
    """Whether DeepSpeed has put a parameter into a flat buffer, on whatever rank."""
    return hasattr(member.parameter, "_hp_mapping")


def check_left_out(members: Sequence[Member]) -> None:
    """Refuse to train parameters that DeepSpeed does not train.

    Args:
        members: those that it left out of its flat buffers.

    Raises:
        LayoutError: naming the first that is not frozen.
    """
    for m in members:
        if m.parameter.requires_grad and 0 not in m.shape:  # what has no elements is in no buffer, and stands still
            raise LayoutError(
                f"{m.name} {m.shape} was frozen, or not there, in deepspeed.initialize(), which makes flat buffers of "
                "what is trainable then: DeepSpeed cannot train it in this run. Call initialize() while everything is "
                "trainable that ever will be, and freeze afterwards; or save, and start anew with it set free"
            )


class ZeroLayout:
    """Pieces of parameters in the flat partitions of DeepSpeed's stages 1 and 2."""

    kind = "ZeRO-1/2"
    replicated = False
    copied: frozenset[str] = frozenset()
    steps_alone = False
    by_parameter = False

    def __init__(self, members: Sequence[Member], groups: Sequence[Group]):
        self._flats = {m.group: _only_partition(groups[m.group]) for m in members}
        # DeepSpeed counts the groups that it was given.
        self._units = {group: number for number, group in enumerate(sorted(self._flats))}
        self._fragments: dict[str, tuple[Tensor, int, int]] = {}
        self._members = {m.name: m for m in members}
        self._tensors = Tensors()
        self.pieces: dict[str, Piece] = {}
        # Told by mismatch(), which all ranks exchange: an error raised here on one rank would leave the others hanging.
        self._problem: str | None = None
        for m in members:
            self._tensors.add(self._flats[m.group], m.name)
            self._problem = self._problem or parallelism(m)
            mapping = getattr(m.parameter, "_hp_mapping", None)
            if mapping is None:  # this rank holds nothing of it
                continue
            flat = self._flats[m.group]
            address, source = mapping.hp_fragment_address, mapping.lp_fragment_address
            inside = flat.data_ptr() + address.start * flat.element_size()
            if mapping.hp_fragment.data_ptr() != inside:
                self._problem = (
                    f"{m.name} {m.shape}: DeepSpeed {version('deepspeed')} links it to a buffer that is not partition "
                    f"{m.group} of the optimizer. Was a parameter group added or removed after initialize()?"
                )
                continue
            self._fragments[m.name] = (flat, address.start, address.numel)
            self.pieces[m.name] = Piece(source.start, source.start + source.numel)
        self.ranks = data_parallel_ranks(members)

    def weight(self, name: str) -> Tensor:  # noqa: D102
        flat, start, numel = self._fragments[name]
        return flat.data.narrow(0, start, numel)

    def store(self, name: str, weights: Tensor) -> None:  # noqa: D102
        pass

    def grad(self, name: str) -> Tensor | None:  # noqa: D102
        flat, start, numel = self._fragments[name]
        return None if flat.grad is None else flat.grad.narrow(0, start, numel)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._flats[self._members[name].group].dtype

    def gradient_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._members[name].parameter.dtype

    def unit(self, name: str) -> int:  # noqa: D102
        return self._units[self._members[name].group]

    def place(self, name: str) -> tuple[Tensor, int]:  # noqa: D102
        flat, start, _ = self._fragments[name]
        return flat, start

    def names_in(self, tensor: Tensor) -> list[str]:  # noqa: D102
        return self._tensors.names_in(tensor)

    def mismatch(self) -> str | None:  # noqa: D102
        if self._problem:
            return self._problem
        for name, piece in self.pieces.items():
            model = self._members[name].parameter.data.reshape(-1)[piece.start : piece.stop]
            master = self.weight(name).to(device=model.device, dtype=model.dtype)
            if not torch.equal(master, model):
                return (
                    f"{name} {self._members[name].shape}: the fragment that DeepSpeed {version('deepspeed')} links "
                    'does not hold its weights. "round_robin_gradients": true does this; set it to false'
                )
        return None

    def local_gradients(self, names: Sequence[str]) -> LocalGradients:  # noqa: D102
        raise inside_error(self.kind)

    def checksums(self, what: str) -> None:  # noqa: D102
        return None


def _only_partition(group: Group) -> Tensor:
    params = group["params"]
    if len(params) != 1 or params[0].ndim != 1:
        raise LayoutError(
            f"parameter group {group.get('name', '?')!r} holds {len(params)} tensors where DeepSpeed's stages 1 and 2 "
            "put one flat partition: this stage or optimizer wrapper is not supported"
        )
    return params[0]


def inside_error(kind: str) -> LayoutError:
    """Of matrices that DeepSpeed was given, whose gradients it reduces itself."""
    return LayoutError(
        f"gradients 'projected' under {kind} needs an optimizer that keeps its matrices from DeepSpeed: make it by "
        "ds_lowrank.deepspeed_optimizer(model, config), or in the HF Trainer by ds_lowrank.trainer_optimizer()"
    )


def parallelism(member: Member) -> str | None:
    """What is wrong with a parameter that another parallelism than data parallelism owns."""
    parameter: Any = member.parameter
    for attribute, value, what in (
        ("allreduce", False, "an expert-parallel (MoE) parameter"),
        ("model_parallel", True, "a model-parallel parameter"),
        ("tensor_model_parallel", True, "a tensor-parallel parameter"),
    ):
        if getattr(parameter, attribute, not value) == value:
            return (
                f"{member.name} {member.shape} is {what}: ds_lowrank supports data parallelism under ZeRO only. "
                "Turn that parallelism off, or train with another optimizer"
            )
    return None


def data_parallel_ranks(members: Sequence[Member], process_group: Any = None) -> Ranks:
    """The ranks that DeepSpeed shards over: of ``process_group``, else of the group linked to the parameters.

    Raises:
        LayoutError: they are not all ranks.
    """
    dist = torch.distributed
    if process_group is None:
        process_group = next(m.parameter._dp_group for m in members if hasattr(m.parameter, "_dp_group"))
    size = dist.get_world_size(process_group)
    if size != dist.get_world_size():
        raise LayoutError(
            f"the data-parallel group has {size} of {dist.get_world_size()} ranks: tensor, pipeline and expert "
            "parallelism are not supported beside ZeRO"
        )
    return Ranks(process_group, dist.get_rank(process_group), size, members[0].parameter.device)
