"""DeepSpeed ZeRO-3: a flat slice of every parameter.

Rank k holds elements [k·p, (k+1)·p) of a parameter, p the rounded-up N-th of it. The slices of the parameters of one
sub-group lie one after the other in one flat master tensor, and ``step()`` is called once a sub-group, with all other
parameter groups empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.layouts.base import LayoutError, LocalGradients, Member, Piece, Tensors
from ds_lowrank.layouts.cuts import slice_piece
from ds_lowrank.layouts.zero import data_parallel_ranks, inside_error, parallelism


def is_zero3(members: Sequence[Member]) -> bool:
    """Whether DeepSpeed has partitioned these parameters and made an optimizer for them."""
    return any(hasattr(m.parameter, "_z3_optimizer") for m in members)


def in_sub_groups(members: Sequence[Member]) -> Callable[[Member], bool]:
    """Tells whether DeepSpeed has put a parameter into a sub-group; the same on all ranks."""
    zero = _optimizer_of(members)
    return lambda m: zero.get_param_id(m.parameter) in zero.grad_position


def _optimizer_of(members: Sequence[Member]) -> Any:
    return next(m.parameter._z3_optimizer for m in members if hasattr(m.parameter, "_z3_optimizer"))


class Zero3Layout:
    """Pieces of parameters in the flat sub-groups of DeepSpeed's stage 3."""

    kind = "ZeRO-3"
    replicated = False
    copied: frozenset[str] = frozenset()
    steps_alone = False
    by_parameter = False

    def __init__(self, members: Sequence[Member]):
        self._members = {m.name: m for m in members}
        self._zero = _optimizer_of(members)
        self.ranks = data_parallel_ranks(members, self._zero.dp_process_group)
        # The parameters themselves are empty between uses, and may lie on another device than the collectives.
        self.ranks.device = torch.device(self._zero.device)
        if getattr(self._zero, "offload_optimizer", False):
            from deepspeed.accelerator import get_accelerator

            self.ranks.device = torch.device(get_accelerator().current_device_name())
        self._tensors = Tensors()
        self._places: dict[str, tuple[int, int]] = {}
        self.pieces: dict[str, Piece] = {}
        # Told by mismatch(), which all ranks exchange: an error raised here on one rank would leave the others hanging.
        self._problem: str | None = None
        for m in members:
            self._problem = self._problem or parallelism(m)
            self._place(m)

    def _place(self, m: Member) -> None:
        parameter: Any = m.parameter
        sub_group, offset, share = self._zero.grad_position[self._zero.get_param_id(parameter)]
        self._tensors.add(self._zero.fp32_partitioned_groups_flat[sub_group], m.name)
        self._places[m.name] = (sub_group, offset)
        piece = slice_piece(parameter.ds_numel, share, self.ranks.rank)
        if piece.start < piece.stop:
            self.pieces[m.name] = piece

    def _slice(self, flat: Tensor, name: str) -> Tensor:
        piece = self.pieces[name]
        return flat.narrow(0, self._places[name][1], piece.stop - piece.start)

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return self._slice(self._zero.fp32_partitioned_groups_flat[self._places[name][0]].data, name)

    def store(self, name: str, weights: Tensor) -> None:  # noqa: D102
        pass

    def grad(self, name: str) -> Tensor | None:  # noqa: D102
        grad = self._zero.fp32_partitioned_groups_flat[self._places[name][0]].grad
        return None if grad is None else self._slice(grad, name)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._zero.fp32_partitioned_groups_flat[self._places[name][0]].dtype

    def gradient_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._members[name].parameter.dtype

    def unit(self, name: str) -> int:  # noqa: D102
        return self._places[name][0]

    def place(self, name: str) -> tuple[Tensor, int]:  # noqa: D102
        sub_group, offset = self._places[name]
        return self._zero.fp32_partitioned_groups_flat[sub_group], offset

    def names_in(self, tensor: Tensor) -> list[str]:  # noqa: D102
        return self._tensors.names_in(tensor)

    def mismatch(self) -> str | None:  # noqa: D102
        if self._problem:
            return self._problem
        for name, piece in self.pieces.items():
            parameter: Any = self._members[name].parameter
            model = parameter.ds_tensor.data[: piece.stop - piece.start]
            if not torch.equal(self.weight(name).to(device=model.device, dtype=model.dtype), model):
                return (
                    f"{name} {self._members[name].shape}: the place that DeepSpeed {version('deepspeed')} gives it in "
                    "its flat master does not hold its weights"
                )
        return None

    def local_gradients(self, names: Sequence[str]) -> LocalGradients:  # noqa: D102
        raise inside_error(self.kind)

    def checksums(self, what: str) -> None:  # noqa: D102
        return None


def write_partition(parameter: Any, read: Callable[[int, int], Tensor], rank: int) -> None:
    """Fill this rank's slice of a partitioned parameter, and the whole where it is there (small ones stay)."""
    part = parameter.ds_tensor.data
    start = min(rank * part.numel(), parameter.ds_numel)
    stop = min(start + part.numel(), parameter.ds_numel)
    if start < stop:
        part[: stop - start].copy_(read(start, stop))
    if parameter.data.numel() == parameter.ds_numel:
        parameter.data.view(-1).copy_(read(0, parameter.ds_numel))


def check_partitioned(members: Sequence[Member]) -> None:
    """Refuse parameters that ``zero.Init`` has partitioned but that no stage-3 optimizer manages.

    Raises:
        LayoutError: there are such parameters.
    """
    if any(hasattr(m.parameter, "ds_id") for m in members):
        raise LayoutError(
            "the parameters were partitioned by deepspeed.zero.Init but no stage-3 engine manages them yet: call "
            "deepspeed.initialize(model=model, optimizer=optimizer, ...) with stage 3 first"
        )
