"""Corpora that are tokens already: flat ``.bin`` files and Arrow data sets with ``input_ids``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from arguments import DataArguments
from corpora import held_out
from datasets import Dataset, DatasetDict, load_from_disk
from torch.utils.data import Dataset as TorchDataset

_PIECE, _PIECES = 65536, 64  # of a flat file, that are looked at before a run


class TokenFile(TorchDataset):
    """Rows of ``length`` tokens of a flat file, which is mapped and not read.

    Args:
        path: of the tokens, one after the other, without a header, in the machine's byte order.
        dtype: of one: ``uint16``, ``uint32`` or ``int32``.
        length: tokens in a row.
        vocabulary: ids are below it.
        start, stop: of the tokens that count; ``None``: the file's end.

    Raises:
        ValueError: a file that is no whole number of tokens; an id beyond the vocabulary, in a sample of the file or
            when a row is read.
    """

    def __init__(
        self, path: str, dtype: str, length: int, vocabulary: int, start: int = 0, stop: int | None = None
    ) -> None:
        size = Path(path).stat().st_size
        if size == 0 or size % np.dtype(dtype).itemsize:
            raise ValueError(f"{path}: {size} bytes are no tokens of {dtype}: give another --token_dtype")
        self.path, self.length, self.vocabulary = path, length, vocabulary
        self.tokens = np.memmap(path, dtype=dtype, mode="r")[start:stop]
        self._look(dtype)

    def _look(self, dtype: str) -> None:
        """Refuse before a run what can be seen in a sample; a row is checked when it is read."""
        pieces = np.linspace(0, max(0, len(self.tokens) - _PIECE), _PIECES, dtype=np.int64)
        for first in pieces.tolist():
            piece = np.asarray(self.tokens[first : first + _PIECE], np.int64)
            if not len(piece):
                continue
            _check_ids(piece, self.vocabulary, self.path)
            if (
                dtype == "uint16"
                and len(piece) > 8
                and not (piece[first % 2 :: 2].any() and piece[1 - first % 2 :: 2].any())
            ):
                raise ValueError(f"{self.path}: every second token is 0, as of --token_dtype uint32 or int32")

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row ``index``, int32."""
        row = np.asarray(self.tokens[index * self.length : (index + 1) * self.length], dtype=np.int64)
        _check_ids(row, self.vocabulary, f"row {index} of {self.path}")
        return {"input_ids": row.astype(np.int32)}


def open_bin(args: DataArguments, vocabulary: int, end: int) -> tuple[TokenFile, TokenFile]:
    """Training and validation rows; without a ``--validation_file`` the last documents are held out.

    Args:
        args: which files.
        vocabulary: of the tokenizer.
        end: the token behind a document, at which a file is cut in two.
    """
    assert args.train_file is not None
    one = (args.token_dtype or "uint16", args.max_length, vocabulary)
    if args.validation_file:
        return TokenFile(args.train_file, *one), TokenFile(args.validation_file, *one)
    whole = TokenFile(args.train_file, *one).tokens
    wanted = len(whole) - round(len(whole) * args.validation_share)
    cut = wanted
    for first in range(wanted, len(whole), 1 << 20):
        found = np.flatnonzero(whole[first : first + (1 << 20)] == end)
        if len(found):
            cut = first + int(found[0]) + 1
            break
    return TokenFile(args.train_file, *one, stop=cut), TokenFile(args.train_file, *one, start=cut)


def open_arrow(args: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Documents or rows ``input_ids`` of both splits, not copied; ``None`` where there is no validation split."""
    documents, validation = _open("train_file", args.train_file, "train")
    if args.validation_file:
        return documents, _open("validation_file", args.validation_file, "validation")[0]
    return documents, validation


def held_rows(documents: Dataset, share: float) -> np.ndarray:
    """Which rows are held out by their tokens, bool."""
    held: list[bool] = []
    # In Arrow's own batches: row by row it takes six times as long.
    for batch in documents.with_format("arrow").iter(batch_size=1000):
        rows = batch["input_ids"]
        tokens = np.asarray(pc.list_flatten(rows), np.int64)
        ends = np.cumsum(np.asarray(pc.list_value_length(rows), np.int64))
        held.extend(held_out(row.tobytes(), share) for row in np.split(tokens, ends[:-1]))
    return np.asarray(held, bool)


def all_long(documents: Dataset, length: int) -> bool:
    """Whether every row of a data set's file has the length; such rows are taken as they are."""
    column = documents.data.column("input_ids")
    return all(pc.all(pc.equal(pc.list_value_length(chunk), length)).as_py() for chunk in column.chunks)


def join_documents(
    documents: Dataset,
    length: int,
    end: int,
    vocabulary: int,
    cut: Callable[[list[Any], int], dict[str, list[Any]]],
    file: Path,
) -> Dataset:
    """Rows of ``length``: documents joined and cut.

    Args:
        documents: with ``input_ids``.
        length: tokens in a row.
        end: the token behind a document, added where it is missing.
        vocabulary: ids are below it.
        cut: see :func:`data.cut`.
        file: where the rows are written.

    Raises:
        ValueError: an id beyond the vocabulary.
    """

    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = [np.asarray(ids, np.int64) for ids in batch["input_ids"] if len(ids)]
        for ids in found:
            _check_ids(ids, vocabulary, "the corpus")
        return cut([ids if ids[-1] == end else np.append(ids, end) for ids in found], length)

    return documents.map(join, batched=True, batch_size=1000, cache_file_name=str(file))


def arrow_files(path: str) -> list[str]:
    """The files of an Arrow data set."""
    return [path] if Path(path).is_file() else sorted(str(file) for file in Path(path).rglob("*.arrow"))


def _open(flag: str, path: str | None, split: str) -> tuple[Dataset, Dataset | None]:
    """A split, and the validation split that lies beside it."""
    assert path is not None
    data = Dataset.from_file(path) if Path(path).is_file() else load_from_disk(path)
    splits = data if isinstance(data, DatasetDict) else {split: data}
    if split not in splits:
        raise ValueError(f"--{flag} {path} has no split {split!r}, only {', '.join(splits)}")
    found = [splits[split], splits.get("validation") if split == "train" else None]
    for one in found:
        if one is not None and "input_ids" not in one.column_names:
            raise ValueError(f"--{flag} {path} has no column input_ids, only {', '.join(one.column_names)}")
        if one is not None and (nulls := one.data.column("input_ids").null_count):
            raise ValueError(f"--{flag} {path} has {nulls} rows without input_ids: filter them out and save it again")
    first, beside = (None if one is None else one.select_columns(["input_ids"]) for one in found)
    assert first is not None
    return first, beside


def _check_ids(ids: np.ndarray, vocabulary: int, where: str) -> None:
    for token in (int(ids.max()), int(ids.min())):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{where} has the token {token}, and --tokenizer_name's are 0 to {vocabulary - 1}: it is another "
                "tokenizer's, or (.bin) of another --token_dtype"
            )
