"""Corpora that are tokens already: flat ``.bin`` files and Arrow data sets with ``input_ids``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import DataArguments
from corpora import held_out
from datasets import Dataset, DatasetDict, load_from_disk
from torch.utils.data import Dataset as TorchDataset


class TokenFile(TorchDataset):
    """Rows of ``length`` tokens of a flat file, which is mapped and not read.

    Args:
        path: of the tokens, one after the other, without a header, in the machine's byte order.
        dtype: of one: ``uint16``, ``uint32`` or ``int32``.
        length: tokens in a row.
        vocabulary: ids are below it.
        start, stop: of the tokens that count; ``None``: the file's end.

    Raises:
        ValueError: a file that is no whole number of tokens; when a row is read, an id beyond the vocabulary.
    """

    def __init__(
        self, path: str, dtype: str, length: int, vocabulary: int, start: int = 0, stop: int | None = None
    ) -> None:
        size = Path(path).stat().st_size
        if size == 0 or size % np.dtype(dtype).itemsize:
            raise ValueError(f"{path}: {size} bytes are no tokens of {dtype}: give another --token_dtype")
        self.path, self.length, self.vocabulary = path, length, vocabulary
        self.tokens = np.memmap(path, dtype=dtype, mode="r")[start:stop]

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row ``index``, int32."""
        row = np.asarray(self.tokens[index * self.length : (index + 1) * self.length], dtype=np.int64)
        if int(row.max()) >= self.vocabulary or int(row.min()) < 0:
            raise ValueError(
                f"{self.path}: row {index} has the token {int(row.max())}, and --tokenizer_name's are below "
                f"{self.vocabulary}: it is another tokenizer's, or of another --token_dtype"
            )
        return {"input_ids": row.astype(np.int32)}


def open_bin(args: DataArguments, vocabulary: int, end: int) -> tuple[TokenFile, TokenFile]:
    """Training and validation rows; without a ``--validation_file`` the last documents are held out.

    Args:
        args: which files.
        vocabulary: of the tokenizer.
        end: the token behind a document, at which a file is cut in two.
    """
    assert args.train_file is not None
    one = (args.token_dtype, args.max_length, vocabulary)
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


def open_arrow(args: DataArguments) -> tuple[Dataset, Dataset]:
    """Documents or rows ``input_ids`` of both splits, held out by their tokens where there is no validation split."""
    assert args.train_file is not None
    train = _open("train_file", args.train_file)
    validation: Any = None
    if args.validation_file:
        validation = _open("validation_file", args.validation_file)
    elif isinstance(train, DatasetDict):
        if "train" not in train:
            raise ValueError(f"--train_file {args.train_file} has no split 'train', only {', '.join(train)}")
        train, validation = train["train"], train.get("validation")
    for split in (train, validation):
        if split is not None and "input_ids" not in split.column_names:
            raise ValueError(f"--train_file {args.train_file} has no column input_ids, only {split.column_names}")
    if validation is None:
        share = args.validation_share

        def is_held_out(row: dict[str, Any]) -> bool:
            return held_out(np.asarray(row["input_ids"], np.int64).tobytes(), share)

        return train.filter(lambda row: not is_held_out(row)), train.filter(is_held_out)
    return train, validation


def packed_arrow(
    documents: Dataset, length: int, end: int, vocabulary: int, cut: Callable[[list[Any], int], dict[str, list[Any]]]
) -> Dataset:
    """Rows of ``length``: as they are where all have it already, else joined and cut.

    Args:
        documents: with ``input_ids``.
        length: tokens in a row.
        end: the token behind a document, added where it is missing.
        vocabulary: ids are below it.
        cut: see :func:`data.cut`.
    """
    documents = documents.select_columns(["input_ids"])

    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = [np.asarray(ids, np.int64) for ids in batch["input_ids"] if len(ids)]
        largest = max((int(ids.max()) for ids in found), default=0)
        if largest >= vocabulary:
            raise ValueError(
                f"the corpus has the token {largest}, and --tokenizer_name's are below {vocabulary}: it is another "
                "tokenizer's"
            )
        if all(len(ids) == length for ids in found):
            return {"input_ids": [ids.astype(np.int32) for ids in found]}
        return cut([ids if ids[-1] == end else np.append(ids, end) for ids in found], length)

    return documents.map(join, batched=True, batch_size=1000)


def _open(flag: str, path: str) -> Any:
    if Path(path).suffix == ".bin":
        raise ValueError(f"--{flag} {path}: give Arrow data for both splits, or .bin files for both")
    return Dataset.from_file(path) if Path(path).is_file() else load_from_disk(path)
