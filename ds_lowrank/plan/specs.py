"""A parameter group as the user gave it -> what is asked of each of its matrices."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_lowrank.config import LowRankConfig
from ds_lowrank.plan.geometry import matrix_shape

# What a low-rank group may set beside AdamW's options.
LOWRANK_KEYS = ("rank", "update_proj_gap", "scale", "proj_type", "stacked")


@dataclass(frozen=True)
class MatrixSpec:
    """What the optimizer was asked to do with one matrix, before any sharding.

    Attributes:
        name: of the matrix: the parameter's, with ``[e]`` behind it for one of several stacked matrices.
        parameter, parameter_shape: name and whole shape of the parameter.
        index: which of the stacked matrices it is; ``None`` where the parameter is one matrix.
        shape: (m, n).
        group: index of its parameter group.
        rank: r, clamped.
        gap: τ, steps between refreshes.
        proj_type: see :mod:`ds_lowrank.subspace.sides`.
    """

    name: str
    parameter: str
    parameter_shape: tuple[int, ...]
    index: int | None
    shape: tuple[int, int]
    group: int
    rank: int
    gap: int
    proj_type: str


def check_dtypes(index: int, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Refuse low-rank parameters that have no real singular vectors.

    Raises:
        ValueError: a parameter is complex, or holds whole numbers.
    """
    for name, parameter in zip(names, parameters):
        if not parameter.is_floating_point():
            raise ValueError(
                f"group {index}: {name} {tuple(parameter.shape)} is {parameter.dtype} and cannot be projected: put it "
                "into a group without 'rank', where torch's AdamW trains complex numbers, too"
            )


def make_specs(
    index: int, group: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: LowRankConfig
) -> list[MatrixSpec]:
    """What a low-rank parameter group asks of its matrices.

    Args:
        index: of the group.
        group: its options; those that it does not set are the configuration's.
        shapes: name -> whole shape of its parameters, in their order.
        config: the optimizer's own options.

    Raises:
        ValueError: an option is unknown or out of range, or a parameter is no matrix.
    """
    _refuse_unknown(index, group)
    ranks = _one_each("ranks", group["rank"], index, len(shapes))
    stacked = _one_each("values of 'stacked'", group.get("stacked"), index, len(shapes))
    return [
        spec
        for (name, shape), rank, stack in zip(shapes.items(), ranks, stacked)
        for spec in _specs_of(name, shape, index, rank, stack, group, config)
    ]


def _specs_of(
    name: str,
    shape: tuple[int, ...],
    index: int,
    rank: int,
    stacked: bool | None,
    group: Mapping[str, Any],
    config: LowRankConfig,
) -> list[MatrixSpec]:
    """The matrix, or the stacked matrices, of one parameter."""
    if len(shape) < 2:
        raise ValueError(
            f"{name} {shape} is in a low-rank group but is not a matrix: put it into a group without 'rank'"
        )
    if 0 in shape:
        return []  # nothing of it can move
    if stacked is None and len(shape) > 2:
        raise ValueError(
            f"{name} {shape} has {len(shape)} dimensions: set 'stacked' in its group to True if they are matrices "
            "stacked along the first (experts), to False if it is one matrix with its trailing dimensions folded "
            "into columns (a convolution's kernel), or put it into a group without 'rank'"
        )
    if stacked and len(shape) < 3:
        raise ValueError(f"{name} {shape} is 'stacked' but has two dimensions only: leave 'stacked' out")
    options = LowRankConfig(
        rank=rank,
        update_proj_gap=group.get("update_proj_gap", config.update_proj_gap),
        scale=group.get("scale", config.scale),
        proj_type=group.get("proj_type", config.proj_type),
    )
    m, n = matrix_shape(shape, bool(stacked))
    if rank > max(m, n):
        raise ValueError(f"rank {rank} is larger than both sides of {name} {(m, n)}: use at most {min(m, n)}")
    if rank > min(m, n):
        warnings.warn(
            f"rank {rank} is larger than the shorter side of {name} {(m, n)}: clamped to {min(m, n)}", stacklevel=7
        )
    return [
        MatrixSpec(
            name=name if e is None else f"{name}[{e}]",
            parameter=name,
            parameter_shape=shape,
            index=e,
            shape=(m, n),
            group=index,
            rank=min(rank, m, n),
            gap=options.update_proj_gap,
            proj_type=options.proj_type,
        )
        for e in (range(shape[0]) if stacked else [None])
    ]


def _one_each(what: str, given: Any, index: int, count: int) -> Sequence[Any]:
    """A group's option as one value a parameter."""
    values = given if isinstance(given, (list, tuple)) else [given] * count
    if len(values) != count:
        raise ValueError(f"group {index}: {len(values)} {what} for {count} parameters")
    return values


def _refuse_unknown(index: int, group: Mapping[str, Any]) -> None:
    known = ("params", "param_names", "name", "lr", "initial_lr", "betas", "eps", "weight_decay", *LOWRANK_KEYS)
    for key in group:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"group {index}: unknown option {key!r}{hint} A low-rank group may set {', '.join(LOWRANK_KEYS)} and "
                "AdamW's options; selection, moments, seed and the rest belong to the optimizer"
            )
