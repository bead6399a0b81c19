"""Checkpoints as what is in them by name: weights, AdamW's moments and low-rank rows, whoever wrote them.

Read from memory-mapped files, one parameter at a time; only the weights of a DeepSpeed checkpoint of another optimizer
are put together as a whole, by DeepSpeed's own tool.

    DeepSpeed               <tag>/*_optim_states.pt of all ranks (what lies where: pieces.py)
    FSDP2, sharded          pytorch_model_fsdp_0/ and optimizer_0/, in torch's distributed checkpoint format
    FSDP2 full, DDP,
    one process             pytorch_model_fsdp.bin or model.safetensors, optimizer.bin or optimizer.pt
    another optimizer       the weights of any of these
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_lowrank.layouts import Piece
from ds_lowrank.layouts.zero_files import packed_state
from ds_lowrank.pieces import DESCRIPTION_KEY, EIGHT_BIT_KEY, STATE_KEY
from ds_lowrank.states.blocks import BLOCK
from ds_lowrank.states.formats import ROW_KEYS, Formats, saved_formats

NUMBERS = ("step", "refreshes", "indices", "overlaps")


@dataclass(frozen=True)
class SavedMatrix:
    """A matrix with a low-rank state in a checkpoint.

    Attributes:
        parameter: name of its parameter.
        index: which of the matrices stacked in it; ``None``: it is one.
        long, short, rank: of the moments (long × r) and the basis (short × r).
        left: whether A = Wᵀ.
        formats: how moments and basis are kept.
        dtype: that they are computed with.
    """

    parameter: str
    index: int | None
    long: int
    short: int
    rank: int
    left: bool
    formats: Formats
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of moments and basis."""
        return self.formats.bytes(self.long, self.short, self.rank, self.dtype)


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
        """Rows of what its formats keep under ``key``."""
        ...

    def numbers(self, matrix: str) -> dict[str, Any]:
        """``step``, ``refreshes``, ``indices`` (r), ``overlaps``."""
        ...


def read_piece(source: Source, name: str, key: str, piece: Piece, shape: tuple[int, ...]) -> Tensor:
    """1-D elements of a piece of a parameter, see :meth:`Source.elements`.

    Raises:
        ValueError: the checkpoint lacks them.
    """
    start, stop = (piece.start, piece.stop) if piece.dim is None else (0, torch.Size(shape).numel())
    found = source.elements(name, key, start, stop)
    if found is None:
        raise ValueError(f"{source.folder} has no {key} of {name}: a file is incomplete")
    if piece.dim is None:
        return found
    return found.view(shape).narrow(piece.dim, piece.start, piece.stop - piece.start).reshape(-1)


def load_file(path: Path) -> Any:
    """A file that ``torch.save`` wrote, memory-mapped.

    Raises:
        ValueError: it is damaged, or holds more than tensors and numbers (another optimizer's objects).
    """
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)})") from error


def _deepspeed_classes() -> list[Any]:
    """What DeepSpeed puts into its files beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage(kind: Any, name: str) -> Any:
        if kind is not ZeroStageEnum:
            raise ValueError(f"getattr of {kind!r}")
        return ZeroStageEnum[name]

    # Before 3.11.4 Python pickles a member of an enumeration as getattr, which would reach anything if it were allowed.
    named = [(stage, "builtins.getattr"), (stage, "__builtin__.getattr")]
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, *named]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _saved_formats(entry: Mapping[str, Any]) -> tuple[Formats, torch.dtype] | None:
    """Formats of a matrix's state, and the dtype that it is computed with; ``None``: another optimizer's."""
    dtypes = {key: entry[key].dtype for key in ROW_KEYS if key in entry}
    names = saved_formats(dtypes)
    if names is None:
        return None
    return Formats(*names), torch.float64 if torch.float64 in dtypes.values() else torch.float32


class WholeSource:
    """A checkpoint whose tensors have global shapes: FSDP2, DDP, one process.

    Args:
        folder: of the checkpoint.
        layout, ranks: see :class:`Source`.
        weights: name -> tensor, or what reads it when indexed.
        states: name -> key -> tensor; the same.
    """

    def __init__(
        self,
        folder: Path,
        layout: str,
        weights: Mapping[str, Any],
        states: Mapping[str, Mapping[str, Any]],
        ranks: int | None = None,
    ):
        self.folder, self.layout, self.ranks = folder, layout, ranks
        self._weights, self._states = weights, states
        self._last: tuple[Any, Tensor] = (None, torch.empty(0))
        self.others: Mapping[str, Tensor] = {}
        self.matrices: dict[str, SavedMatrix] = {}
        for parameter, entry in states.items():
            found = _saved_formats(entry)
            if found is None or not all(key in entry for key in NUMBERS):
                continue
            formats, dtype = found
            *stack, long, r = entry[formats.exp_avg.keys("exp_avg")[0]].shape
            short = entry[formats.basis.keys("basis")[0]].shape[-2]
            left = bool(self._state(parameter, "left").flatten()[0])
            for e in range(stack[0]) if stack else [None]:
                name = parameter if e is None else f"{parameter}[{e}]"
                self.matrices[name] = SavedMatrix(parameter, e, long, short, r, left, formats, dtype)

    def full_rank(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        projected = {saved.parameter for saved in self.matrices.values()}
        kept = ((n, key) for n in self._states if n not in projected and (key := self._moment(n)))
        return {name: tuple(self._states[name][key].shape) for name, key in kept}

    def moment_dtype(self, parameter: str) -> torch.dtype:  # noqa: D102
        return self._states[parameter][self._moment(parameter)].dtype

    def _moment(self, parameter: str) -> str:
        """Key of M; empty: there is none."""
        return next((key for key in ("exp_avg", "exp_avg_codes") if key in self._states[parameter]), "")

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
        return float(self._state(parameter, "step")) if "step" in self._states.get(parameter, {}) else None

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
        files: their contents, in rank order.
        others: see :class:`Source`.

    Raises:
        ValueError: files of some ranks are missing.
    """

    def __init__(self, folder: Path, files: list[dict[str, Any]], others: Mapping[str, Tensor]):
        self.folder, self.others = folder, others
        parts = [packed_state(content) for content in files]
        self._masters = [masters for masters, _ in parts]
        self._packed = [packed["state"] for _, packed in parts]
        self._about = [packed[DESCRIPTION_KEY] for _, packed in parts]
        self.layout, self.ranks = self._about[0]["layout"], self._about[0]["ranks"]
        if [a["rank"] for a in self._about] != list(range(self.ranks)):
            raise ValueError(
                f"{folder} has the files of {len(files)} ranks, and {self.ranks} wrote it: some are missing, "
                "or left over from another run"
            )
        self._shapes = {name: tuple(p["shape"]) for name, p in self._about[0]["parameters"].items()}
        self.matrices = {}
        for name, m in self._about[0]["matrices"].items():
            kept = [s for k in range(self.ranks) if "row" in (s := self._low_rank(k).get(name, {}))]
            found = _saved_formats(kept[0]) if kept else None
            if found is not None:
                index = None if m["index"] < 0 else m["index"]
                long, short = reversed(m["shape"]) if m["left"] else m["shape"]
                left = bool(m["left"])
                self.matrices[name] = SavedMatrix(m["parameter"], index, long, short, m["rank"], left, *found)

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
        at = "basis_row" if key.startswith("basis") else "row"
        for rank in range(self.ranks):
            state = self._low_rank(rank).get(matrix, {})
            if key not in state:
                continue
            tensor, first = state[key], state[at]
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
