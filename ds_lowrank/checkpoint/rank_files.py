"""Whether the files of all ranks of a DeepSpeed checkpoint hold what their descriptions say, before anything is used.

Every rank looks at all of them, at keys, shapes and places and at no data, so that all ranks find the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.full_rank.adamw import MOMENTS
from ds_lowrank.methods import saved_layout
from ds_lowrank.state_dict.pieces import DESCRIPTION_KEY, EIGHT_BIT_KEY, FORMAT, INSIDE, STATE_KEY
from ds_lowrank.states.blocks import BLOCK, count
from ds_lowrank.states.layout import StateLayout

CODES = tuple(f"{moment}_codes" for moment in MOMENTS)
SCALES = tuple(f"{moment}_scale" for moment in MOMENTS)
# Axis -> key of the number of a tensor's first row in the whole; of what there is one a matrix every rank has all.
FIRST_ROW = {"rows": "row", "basis": "basis_row", "matrix": None}


def check_rank_files(folder: Path, files: Sequence[tuple[Path, list[Tensor], dict[str, Any]]]) -> None:
    """Look at the files of all ranks together.

    Args:
        folder: they are in.
        files: path, flat masters and packed state (with its description) of each, in rank order.

    Raises:
        ValueError: one is damaged, some are missing, or something is in none of them; names the file.
    """
    for path, masters, packed in files:
        _check_description(path, masters, packed)
    first = files[0][2][DESCRIPTION_KEY]
    if [packed[DESCRIPTION_KEY]["rank"] for _, _, packed in files] != list(range(first["ranks"])):
        raise ValueError(
            f"{folder} has the files of {len(files)} ranks, and {first['ranks']} wrote it: some are missing, or left "
            "over from another run"
        )
    shapes = {name: about["shape"] for name, about in first["parameters"].items()}
    for path, _, packed in files[1:]:
        about = packed[DESCRIPTION_KEY]
        theirs = {name: found["shape"] for name, found in about["parameters"].items()}
        if (about["ranks"], about["matrices"], theirs) != (first["ranks"], first["matrices"], shapes):
            raise ValueError(f"{path} and {files[0][0]} are of different runs: {DESCRIPTION_KEY} differs in them")
    for name, shape in shapes.items():
        pieces = [(path, *_piece(packed, name)[:2]) for path, _, packed in files]
        _check_covered(folder, pieces, torch.Size(shape).numel(), f"elements of the weight of {name}")
    _check_moments(files, first)
    kept = common_layout(
        [
            (f"{path}: the state of {name}", entry)
            for path, _, packed in files
            for name, entry in packed["state"].get(STATE_KEY, {}).items()
            if "row" in entry
        ]
    )
    for name, about in first["matrices"].items():
        _check_matrix(folder, files, name, about, kept)


def common_layout(entries: Iterable[tuple[str, Mapping[str, Any]]]) -> StateLayout | None:
    """What the states of a checkpoint keep, all of them together: what one lacks is missing there.

    Args:
        entries: of each state what to call it, and its tensors and numbers.

    Returns:
        ``None``: there is no state, or a tensor has a dtype that no format has.

    Raises:
        ValueError: one keeps something that no registered method does.
    """
    dtypes: dict[str, torch.dtype] = {}
    for what, entry in entries:
        own = {key: dtype for key, value in entry.items() if (dtype := _dtype(value)) is not None}
        try:
            saved_layout(own)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from None
        dtypes.update(own)
    return saved_layout(dtypes)


def wide_dtype(entry: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a state is computed with."""
    return torch.float64 if torch.float64 in map(_dtype, entry.values()) else torch.float32


def _check_description(path: Path, masters: Sequence[Tensor], packed: Mapping[str, Any]) -> None:
    about = packed[DESCRIPTION_KEY]
    if isinstance(about, Mapping) and about.get("format") not in (INSIDE, FORMAT):
        raise ValueError(
            f"{path} has format {about.get('format')!r} and this version reads {FORMAT}: use the version of then"
        )
    try:
        fits = _fits(about, masters, packed["state"])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged: {DESCRIPTION_KEY} in it, which says what lies where, does not fit it")


def _fits(about: Mapping[str, Any], masters: Sequence[Tensor], state: Mapping[Any, Any]) -> bool:
    """Whether a description is one, and within the buffers beside it; may end in any error of a wrong type."""
    for found in about["parameters"].values():
        if not all(_whole(size) for size in found["shape"]):
            return False
        if "start" in found:
            start, stop = found["start"], found["stop"]
            if not (_whole(start) and _whole(stop) and start <= stop <= torch.Size(found["shape"]).numel()):
                return False
            if "outside" in found:  # its weights are in the model's file, and it has no moments of AdamW
                continue
            unit, offset = found["unit"], found["offset"]
            if not all(_whole(number) for number in (unit, offset, found["state"] + 1)):
                return False
            if masters[unit].ndim != 1 or offset + stop - start > masters[unit].numel():
                return False
    for found in about["matrices"].values():
        if found["parameter"] not in about["parameters"] or found["left"] not in (0, 1) or len(found["shape"]) != 2:
            return False
        if not all(_whole(number, 1) for number in (*found["shape"], found["rank"], found["index"] + 2)):
            return False
    projected = {found["parameter"] for found in about["matrices"].values()}
    if any("outside" in found and name not in projected for name, found in about["parameters"].items()):
        return False
    names = (*about["parameters"], *about["matrices"])
    entries = [entry for key in (STATE_KEY, EIGHT_BIT_KEY) for entry in state.get(key, {}).values()]
    return (
        isinstance(about["layout"], str)
        and _whole(about["ranks"], 1)
        and _whole(about["rank"])
        and all(isinstance(name, str) for name in names)
        and all(isinstance(entry, Mapping) for entry in entries)
    )


def _check_moments(files: Sequence[tuple[Path, list[Tensor], dict[str, Any]]], about: Mapping[str, Any]) -> None:
    """AdamW's, of all that is not projected: all or none, whoever holds a piece."""
    projected = {matrix["parameter"] for matrix in about["matrices"].values()}
    places = [
        (path, name, packed["state"], packed[DESCRIPTION_KEY]["parameters"][name])
        for name in about["parameters"]
        if name not in projected
        for path, _, packed in files
        if _piece(packed, name)[0] < _piece(packed, name)[1]
    ]
    coded = {name for _, name, state, _ in places if name in state.get(EIGHT_BIT_KEY, {})}
    stepped = bool(coded) or any(state.get(piece["state"]) for _, _, state, piece in places)
    stepped |= any(_steps(entry) > 0 for _, _, p in files for entry in p["state"].get(STATE_KEY, {}).values())
    for path, name, state, piece in places if stepped else ():
        numel = piece["stop"] - piece["start"]
        if name in coded:
            found, offset = state.get(EIGHT_BIT_KEY, {}).get(name, {}), 0
            blocks = count(piece["stop"]) - piece["start"] // BLOCK
            sizes = {**dict.fromkeys(CODES, numel), **dict.fromkeys(SCALES, blocks)}
        elif piece["state"] < 0:
            continue
        else:
            found, offset = state.get(piece["state"]), piece["offset"]
            sizes = dict.fromkeys(MOMENTS, numel)
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} lacks the moments of {name}: the file is damaged")
        for key, size in sizes.items():
            tensor = found.get(key)
            if not isinstance(tensor, Tensor) or tensor.ndim != 1 or tensor.numel() < offset + size:
                raise ValueError(f"{path} lacks {key} of {name}: the file is damaged")
        check_counter(found, "step", name, path)


def _check_matrix(
    folder: Path,
    files: Sequence[tuple[Path, list[Tensor], dict[str, Any]]],
    name: str,
    about: Mapping[str, Any],
    kept_as: StateLayout | None,
) -> None:
    long, short = reversed(about["shape"]) if about["left"] else about["shape"]
    entries = [(path, packed["state"].get(STATE_KEY, {}).get(name)) for path, _, packed in files]
    kept = [(path, entry) for path, entry in entries if entry is not None and "row" in entry]
    if not kept:
        raise ValueError(f"{folder} has no low-rank state of {name}, which its files describe: one of them is damaged")
    if kept_as is None:
        raise ValueError(f"{kept[0][0]} is damaged: the state of {name} in it is of no format that is known")
    # A rank may keep rows of A and none of the basis, but the keys of both.
    rows = kept_as.tensors(about["rank"], wide_dtype(kept[0][1]))
    for path, entry in kept:
        for key, expected in rows.items():
            tensor, first = entry.get(key), _first_row(entry, expected.axis)
            if not isinstance(tensor, Tensor) or not _whole(first):
                raise ValueError(f"{path} lacks {key} of {name}: the file is damaged")
            if tensor.ndim != 2 or (tensor.shape[1], tensor.dtype) != (expected.width, expected.dtype):
                is_like = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(
                    f"{path} is damaged: {key} of {name} is {is_like} in it, not rows of {expected.width} "
                    f"{expected.dtype}"
                )
        if _shape(entry.get("indices")) != (about["rank"],):
            raise ValueError(f"{path} lacks indices of {name}: the file is damaged")
        for key in ("step", "refreshes"):
            check_counter(entry, key, name, path)
    for key, expected in rows.items():
        parts = [(path, first := _first_row(entry, expected.axis), first + entry[key].shape[0]) for path, entry in kept]
        size = {"rows": long, "basis": short, "matrix": 1}[expected.axis]
        _check_covered(folder, parts, size, f"rows of {key} of {name}")
    if not any(isinstance(entry.get("overlaps"), Tensor) for _, entry in kept):
        raise ValueError(f"{folder} has no counters of {name}: the files of a rank are damaged")


def check_counter(entry: Mapping[str, Any], key: str, name: str, path: Path | str) -> None:
    """Refuse a number of steps that is none.

    Raises:
        ValueError: it is missing, negative, infinite or no number.
    """
    value = entry.get(key)
    numbers = value if isinstance(value, Tensor) else torch.tensor(value if isinstance(value, (int, float)) else -1.0)
    if numbers.is_complex() or not numbers.numel() or not bool((torch.isfinite(numbers) & (numbers >= 0)).all()):
        raise ValueError(f"{path} is damaged: {key} of {name} is {value!r} in it, not a number of steps")


def _check_covered(folder: Path, parts: Iterable[tuple[Path, int, int]], size: int, what: str) -> None:
    """Refuse what lies in no file; parts of several may overlap."""
    end, before = 0, None
    for path, start, stop in sorted(parts, key=lambda part: part[1:]):
        if start < stop:
            if start > end:
                break
            if stop > size:
                raise ValueError(f"{path} is damaged: it has {what} beyond {size}")
            if stop > end:
                end, before = stop, path
    if end < size:
        after = f", which follow those in {before.name}," if before is not None else ""
        raise ValueError(f"{folder} lacks {what}: those from {end}{after} are in none of its files; one is damaged")


def _first_row(entry: Mapping[str, Any], axis: str) -> Any:
    at = FIRST_ROW[axis]
    return 0 if at is None else entry.get(at)


def _piece(packed: Mapping[str, Any], name: str) -> tuple[int, int]:
    piece = packed[DESCRIPTION_KEY]["parameters"][name]
    return piece.get("start", 0), piece.get("stop", 0)


def _steps(entry: Mapping[str, Any]) -> int:
    return entry["step"] if _whole(entry.get("step")) else 0


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _dtype(value: Any) -> torch.dtype | None:
    """Of a tensor, or of what reads one."""
    found = getattr(value, "dtype", None)
    return found if isinstance(found, torch.dtype) else None
