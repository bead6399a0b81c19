"""Checkpoints as what is in them by name: weights, AdamW's moments and low-rank rows, whoever wrote them.

Read from memory-mapped files, one parameter at a time; only the weights of a DeepSpeed checkpoint of another optimizer
are put together as a whole, by DeepSpeed's own tool.

    DeepSpeed               <tag>/*_optim_states.pt of all ranks (what lies where: state_dict/pieces.py)
    FSDP2, sharded          pytorch_model_fsdp_0/ and optimizer_0/, in torch's distributed checkpoint format
    FSDP2 full, DDP,
    one process             pytorch_model_fsdp.bin or model.safetensors, optimizer.bin or optimizer.pt
    another optimizer       the weights of any of these
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_lowrank.checkpoint.rank_files import (
    CODES,
    FIRST_ROW,
    SCALES,
    check_counter,
    check_rank_files,
    common_layout,
    wide_dtype,
)
from ds_lowrank.full_rank.adamw import MOMENTS
from ds_lowrank.layouts import Piece
from ds_lowrank.plan.geometry import matrix_shape
from ds_lowrank.state_dict.pieces import DESCRIPTION_KEY, EIGHT_BIT_KEY, STATE_KEY
from ds_lowrank.states.blocks import BLOCK, count
from ds_lowrank.states.layout import StateLayout

_ADAMW = {"step", *MOMENTS, *CODES, *SCALES}
# What no other optimizer keeps.
_OURS = ("refreshes", "overlaps")
NUMBERS = ("step", "refreshes", "indices", "overlaps")


@dataclass(frozen=True)
class SavedMatrix:
    """A matrix with a low-rank state in a checkpoint.

    Attributes:
        parameter: name of its parameter.
        index: which of the matrices stacked in it; ``None``: it is one.
        long, short, rank: of A (long × short) and the subspace (r).
        left: whether A = Wᵀ.
        states: what is kept of it, and how.
        dtype: that it is computed with.
    """

    parameter: str
    index: int | None
    long: int
    short: int
    rank: int
    left: bool
    states: StateLayout
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return self.states.bytes(self.long, self.short, self.rank, self.dtype)

    @property
    def slot_bytes(self) -> dict[str, int]:
        """Slot -> bytes."""
        return self.states.slot_bytes(self.long, self.short, self.rank, self.dtype)


class Source(Protocol):
    """What a checkpoint holds.

    Attributes:
        folder: where it is.
        layout: kind of sharding that wrote it, for humans.
        ranks: how many ranks wrote it; ``None`` where its files do not say.
        matrices: name -> low-rank state; empty where another optimizer wrote it.
        others: what a model has beside :meth:`parameters`: frozen ones and buffers, in float32.
    """

    folder: Path
    layout: str
    ranks: int | None
    matrices: dict[str, SavedMatrix]
    others: Mapping[str, Tensor]

    def full_rank(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the parameters of which AdamW's moments are there."""
        ...

    def moment_dtype(self, parameter: str) -> torch.dtype:
        """Dtype of AdamW's moments of a parameter in :meth:`full_rank`; uint8: they are codes."""
        ...

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights."""
        ...

    def elements(self, parameter: str, key: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of a flattened parameter's ``weight``, ``exp_avg`` or ``exp_avg_sq``, or of their
        ``_codes``; of their ``_scale`` blocks [start, stop). ``None``: not in the checkpoint.
        """
        ...

    def counter(self, parameter: str) -> float | None:
        """AdamW's steps of a parameter that is not projected."""
        ...

    def rows(self, matrix: str, key: str, start: int, stop: int) -> Tensor:
        """Rows of what is kept under ``key``; of what there is one a matrix, row 0."""
        ...

    def numbers(self, matrix: str) -> dict[str, Any]:
        """``step``, ``refreshes``, ``indices`` (r), ``overlaps``."""
        ...

    def probe(self, share: int, shares: int) -> None:
        """Read one of ``shares`` parts of what cannot be known to be whole before it is read, and forget it.

        Raises:
            ValueError: something is damaged; names the file.
        """
        ...


def read_piece(source: Source, name: str, key: str, piece: Piece, shape: tuple[int, ...]) -> Tensor:
    """1-D elements of a piece of a parameter, see :meth:`Source.elements`.

    Raises:
        ValueError: the checkpoint lacks them.
    """

    def read(start: int, stop: int) -> Tensor:
        found = source.elements(name, key, start, stop)
        if found is None:
            raise ValueError(f"{source.folder} has no {key} of {name}: a file is incomplete")
        return found

    return cut_piece(read, piece, shape)


def cut_piece(read: Callable[[int, int], Tensor], piece: Piece, shape: tuple[int, ...]) -> Tensor:
    """1-D elements of a piece of a parameter of ``shape``, of which ``read`` gives elements [start, stop)."""
    if piece.dim is None:
        return read(piece.start, piece.stop)
    whole = read(0, torch.Size(shape).numel()).view(shape)
    return whole.narrow(piece.dim, piece.start, piece.stop - piece.start).reshape(-1)


class WholeSource:
    """A checkpoint whose tensors have global shapes: FSDP2, DDP, one process.

    Args:
        folder: of the checkpoint.
        layout, ranks: see :class:`Source`.
        weights: name -> tensor, or what reads it.
        states: name -> key -> tensor; the same.
        projected: parameters that the optimizer's groups say are projected.
        teller: file or folder of the states, for errors.

    Raises:
        ValueError: a state lacks some of its tensors, or they do not fit together.
    """

    def __init__(
        self,
        folder: Path,
        layout: str,
        weights: Mapping[str, Any],
        states: Mapping[str, Mapping[str, Any]],
        ranks: int | None = None,
        projected: Iterable[str] = (),
        teller: Path | None = None,
    ):
        self.folder, self.layout, self.ranks = folder, layout, ranks
        self._weights, self._states = weights, states
        self._last: tuple[Any, Tensor] = (None, torch.empty(0))
        self.others: Mapping[str, Tensor] = {}
        self.matrices: dict[str, SavedMatrix] = {}
        teller = teller or folder
        ours = [name for name, entry in states.items() if any(key in entry for key in _OURS)]
        # A state that is AdamW's and nothing else is looked at as that.
        without = [name for name in projected if not states.get(name) or not _ADAMW.issuperset(states[name])]
        projected = list(dict.fromkeys((*ours, *(without if ours else ()))))
        # All matrices of a run keep the same: what one of them lacks, others tell.
        kept = common_layout([(f"{teller}: the state of {name}", states.get(name, {})) for name in projected])
        for parameter in projected:
            self._take_matrix(parameter, states.get(parameter, {}), kept, teller)
        self._check_moments(bool(ours), teller)

    def _take_matrix(self, parameter: str, entry: Mapping[str, Any], kept: StateLayout | None, teller: Path) -> None:
        keys = [key for slot in kept.slots for key in kept.keys(slot)] if kept is not None else []
        missing = [key for key in (*NUMBERS, "left", *keys) if key not in entry]
        if missing:
            what = ", ".join(missing) if entry else "the state"
            raise ValueError(f"{teller} lacks {what} of {parameter}, which is projected in it: it is damaged")
        shapes = {key: tuple(tensor.shape) for key, tensor in entry.items()}
        *stack, r = shapes["indices"] or (0,)
        if kept is None or len(stack) > 1:
            raise ValueError(f"{teller} is damaged: the state of {parameter} is {shapes}")
        for key in ("step", "refreshes"):
            check_counter({key: self._state(parameter, key)}, key, parameter, teller)
        left = bool(self._state(parameter, "left").flatten()[0])
        tensors = kept.tensors(r, wide_dtype(entry))
        sizes: dict[str, int] = {"matrix": 1}
        for key, rows in tensors.items():
            size = sizes.setdefault(rows.axis, shapes[key][-2] if len(shapes[key]) > 1 else 0)
            if shapes[key] != (*stack, size, rows.width) or entry[key].dtype != rows.dtype:
                raise ValueError(
                    f"{teller} is damaged: {key} of {parameter} is {shapes[key]} {entry[key].dtype}, not "
                    f"{(*stack, size, rows.width)} {rows.dtype}"
                )
        numbers = (shapes["step"], shapes["refreshes"], shapes["left"], shapes["overlaps"][:-1])
        if any(shape != tuple(stack) for shape in numbers):
            raise ValueError(f"{teller} is damaged: the tensors of {parameter} do not fit together: {shapes}")
        long, short = self._sides(parameter, tuple(stack), left, sizes, teller)
        for e in range(stack[0]) if stack else [None]:
            name = parameter if e is None else f"{parameter}[{e}]"
            self.matrices[name] = SavedMatrix(parameter, e, long, short, r, left, kept, wide_dtype(entry))

    def _sides(
        self, parameter: str, stack: tuple[int, ...], left: bool, sizes: Mapping[str, int], teller: Path
    ) -> tuple[int, int]:
        """Long and short: of what is kept, and of the weight, which has to be of that size."""
        weight = self._weights.get(parameter)
        if weight is None:
            if not {"rows", "basis"} <= sizes.keys():
                raise ValueError(
                    f"{self.folder} has no weights of {parameter}, whose state in {teller} does not say of which size "
                    "they are: it is incomplete"
                )
            return sizes["rows"], sizes["basis"]
        shape = tuple(weight.shape)
        fits = len(shape) >= 2 + len(stack) and shape[: len(stack)] == stack
        m, n = matrix_shape(shape, bool(stack)) if fits else (-1, -1)
        whole = (n, m) if left else (m, n)
        long, short = (sizes.get(axis, size) for axis, size in zip(("rows", "basis"), whole))
        if (long, short) != whole:
            raise ValueError(
                f"{teller} has a state of {parameter} for {long} x {short} weights, and those in {self.folder} are "
                f"{shape}: they are not of one checkpoint"
            )
        return long, short

    def _check_moments(self, ours: bool, teller: Path) -> None:
        """AdamW's, of what is not projected: whole where this package, or any AdamW, has written them."""
        projected = {saved.parameter for saved in self.matrices.values()}
        rest = {name: set(entry) for name, entry in self._states.items() if name not in projected and entry}
        whole = dict.fromkeys(name for name in rest if self._moment(name))  # in order: all ranks name the same fault
        for name, keys in rest.items():
            if name not in whole and keys <= _ADAMW and (ours or whole):
                wanted = (*CODES, *SCALES, "step") if keys & {*CODES, *SCALES} else (*MOMENTS, "step")
                missing = [key for key in wanted if key not in keys]
                raise ValueError(f"{teller} lacks {', '.join(missing)} of {name}: it is damaged")
        for name in whole:
            shape = tuple(self._states[name][self._moment(name)].shape)
            known = tuple(self._weights[name].shape) if name in self._weights else shape
            sizes = dict.fromkeys((*MOMENTS, *CODES), known)
            sizes.update(dict.fromkeys(SCALES, (count(torch.Size(known).numel()),)))
            for key in [key for key in sizes if key in rest[name]]:
                found = tuple(self._states[name][key].shape)
                if ours and found != sizes[key]:
                    raise ValueError(f"{teller} is damaged: {key} of {name} is {found} in it, not {sizes[key]}")
            if ours:
                check_counter({"step": self._state(name, "step")}, "step", name, teller)

    def probe(self, share: int, shares: int) -> None:  # noqa: D102
        tables = [self._weights, *self._states.values()]
        stored = [tensor for table in tables for tensor in table.values() if not isinstance(tensor, Tensor)]
        for tensor in stored[share::shares]:
            tensor.read()

    def full_rank(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        projected = {saved.parameter for saved in self.matrices.values()}
        kept = ((n, key) for n in self._states if n not in projected and (key := self._moment(n)))
        return {name: tuple(self._states[name][key].shape) for name, key in kept}

    def moment_dtype(self, parameter: str) -> torch.dtype:  # noqa: D102
        return self._states[parameter][self._moment(parameter)].dtype

    def _moment(self, parameter: str) -> str:
        """Key of M; empty: AdamW's state is not there, or not whole."""
        entry = self._states.get(parameter, {})
        kinds = (("exp_avg", MOMENTS), ("exp_avg_codes", (*CODES, *SCALES)))
        return next((key for key, all_keys in kinds if all(k in entry for k in (*all_keys, "step"))), "")

    def parameters(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return {name: tuple(tensor.shape) for name, tensor in self._weights.items()}

    def elements(self, parameter: str, key: str, start: int, stop: int) -> Tensor | None:  # noqa: D102
        if key == "weight":
            found = self._read(self._weights, parameter)
        elif key in self._states.get(parameter, {}):
            found = self._state(parameter, key)
        else:
            found = None
        return None if found is None else found.reshape(-1)[start:stop]

    def counter(self, parameter: str) -> float | None:  # noqa: D102
        key = self._moment(parameter)
        if not key:
            return None
        # Another optimizer may keep something else under AdamW's names.
        weight = self._weights.get(parameter)
        if weight is not None and self._states[parameter][key].shape != weight.shape:
            return None
        return float(self._state(parameter, "step"))

    def rows(self, matrix: str, key: str, start: int, stop: int) -> Tensor:  # noqa: D102
        saved = self.matrices[matrix]
        whole = self._state(saved.parameter, key)
        return (whole if saved.index is None else whole[saved.index])[start:stop]

    def numbers(self, matrix: str) -> dict[str, Any]:  # noqa: D102
        saved = self.matrices[matrix]
        whole = {key: self._state(saved.parameter, key) for key in NUMBERS}
        found = {key: value if saved.index is None else value[saved.index] for key, value in whole.items()}
        return {**found, "step": int(found["step"]), "refreshes": int(found["refreshes"])}

    def _state(self, parameter: str, key: str) -> Tensor:
        found = self._read(self._states[parameter], key)
        assert found is not None
        return found

    def _read(self, table: Mapping[str, Any], key: str) -> Tensor | None:
        """A tensor, the last one remembered: it is asked for in pieces."""
        if key not in table:
            return None
        if self._last[0] != (id(table), key):
            value = table[key]
            self._last = ((id(table), key), value if isinstance(value, Tensor) else value.read())
        return self._last[1]


class ZeroSource:
    """A checkpoint of DeepSpeed's stages 1–3 in which our optimizer has said what lies where.

    Args:
        folder: with the ``*_optim_states.pt`` of all ranks.
        files: path, flat masters and packed state of each, in rank order.
        others: see :class:`Source`.
        outside: gives, of every rank, the weights that are in no flat master, 1-D by name; it is told how many.

    Raises:
        ValueError: see :func:`ds_lowrank.checkpoint.rank_files.check_rank_files`.
    """

    def __init__(
        self,
        folder: Path,
        files: list[tuple[Path, list[Tensor], dict[str, Any]]],
        others: Mapping[str, Tensor],
        outside: Callable[[Sequence[Mapping[str, int]]], Sequence[Mapping[str, Tensor]]] | None = None,
    ):
        check_rank_files(folder, files)
        self.folder, self.others = folder, others
        self._masters = [masters for _, masters, _ in files]
        self._packed = [packed["state"] for _, _, packed in files]
        self._about = [packed[DESCRIPTION_KEY] for _, _, packed in files]
        sizes = [
            {n: p["stop"] - p["start"] for n, p in about["parameters"].items() if "outside" in p}
            for about in self._about
        ]
        self._outside = outside(sizes) if outside is not None and any(sizes) else [{} for _ in sizes]
        self.layout, self.ranks = self._about[0]["layout"], self._about[0]["ranks"]
        self._shapes = {name: tuple(p["shape"]) for name, p in self._about[0]["parameters"].items()}
        self.matrices = {}
        entries = [(name, e) for k in range(self.ranks) for name, e in self._low_rank(k).items() if "row" in e]
        kept = common_layout(entries)
        for name, m in self._about[0]["matrices"].items():
            assert kept is not None  # the files were checked
            index = None if m["index"] < 0 else m["index"]
            long, short = reversed(m["shape"]) if m["left"] else m["shape"]
            left = bool(m["left"])
            wide = wide_dtype(next(e for of, e in entries if of == name))
            self.matrices[name] = SavedMatrix(m["parameter"], index, long, short, m["rank"], left, kept, wide)

    def probe(self, share: int, shares: int) -> None:  # noqa: D102
        pass  # memory-mapped as a whole, and looked at when it was opened

    def _low_rank(self, rank: int) -> dict[str, Any]:
        return self._packed[rank].get(STATE_KEY, {})

    def full_rank(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        projected = {saved.parameter for saved in self.matrices.values()}
        return {n: shape for n, shape in self._shapes.items() if n not in projected and self.counter(n) is not None}

    def moment_dtype(self, parameter: str) -> torch.dtype:  # noqa: D102
        found = self.elements(parameter, "exp_avg_codes", 0, 1)
        if found is None:
            found = self.elements(parameter, "exp_avg", 0, 1)
        assert found is not None
        return found.dtype

    def parameters(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return dict(self._shapes)

    def elements(self, parameter: str, key: str, start: int, stop: int) -> Tensor | None:  # noqa: D102
        found: Tensor | None = None
        per = BLOCK if key.endswith("_scale") else 1
        covered = torch.zeros(stop - start, dtype=torch.bool)  # a scale may be on several ranks
        for rank, about in enumerate(self._about):
            piece = about["parameters"].get(parameter, {})
            first = piece.get("start", 0) // per
            a, b = max(start, first), min(stop, -(-piece.get("stop", 0) // per))
            if a >= b:
                continue
            flat, offset = self._flat(rank, parameter, piece, key)
            if flat is None:
                return None
            at = offset + a - first
            if found is None:
                found = torch.empty(stop - start, dtype=flat.dtype)
            found[a - start : b - start] = flat[at : at + b - a]
            covered[a - start : b - start] = True
        if not covered.all():
            missing = int((~covered).sum())
            raise ValueError(f"{self.folder} lacks {missing} elements of {key} of {parameter}: a file is damaged")
        return found

    def _flat(self, rank: int, parameter: str, piece: Mapping[str, Any], key: str) -> tuple[Tensor | None, int]:
        """What a rank has under ``key``, 1-D, and where in it its piece of a parameter begins."""
        own = self._eight_bit(rank, parameter)
        if key in own:
            return own[key], 0
        if key == "weight" and "outside" in piece:
            return self._outside[rank][parameter], 0
        if "outside" in piece:
            return None, 0
        if key == "weight":
            return self._masters[rank][piece["unit"]], piece["offset"]
        return self._packed[rank].get(piece["state"], {}).get(key), piece["offset"]

    def _eight_bit(self, rank: int, parameter: str) -> Mapping[str, Any]:
        return self._packed[rank].get(EIGHT_BIT_KEY, {}).get(parameter, {})

    def counter(self, parameter: str) -> float | None:  # noqa: D102
        for rank, about in enumerate(self._about):
            flat = self._packed[rank].get(about["parameters"].get(parameter, {}).get("state"), {})
            for state in (self._eight_bit(rank, parameter), flat):
                if "step" in state:
                    return float(state["step"])
        return None

    def rows(self, matrix: str, key: str, start: int, stop: int) -> Tensor:  # noqa: D102
        found: Tensor | None = None
        covered = torch.zeros(stop - start, dtype=torch.bool)  # a basis may be on several ranks
        saved = self.matrices[matrix]
        at = FIRST_ROW[saved.states.tensors(saved.rank, saved.dtype)[key].axis]
        for rank in range(self.ranks):
            state = self._low_rank(rank).get(matrix, {})
            if key not in state:
                continue
            tensor, first = state[key], 0 if at is None else state[at]
            a, b = max(start, first), min(stop, first + tensor.shape[0])
            if found is None:
                found = torch.empty(stop - start, tensor.shape[1], dtype=tensor.dtype)
            if a < b:
                found[a - start : b - start] = tensor[a - first : b - first]
                covered[a - start : b - start] = True
        if found is None or not covered.all():
            raise ValueError(f"{self.folder} lacks rows of {key} of {matrix}: the files of a rank are damaged")
        return found

    def numbers(self, matrix: str) -> dict[str, Any]:  # noqa: D102
        for rank in range(self.ranks):
            state = self._low_rank(rank).get(matrix, {})
            if "overlaps" in state:
                return {key: state[key] for key in NUMBERS}
        raise ValueError(f"{self.folder} has no counters of {matrix}: the files of a rank are damaged")
