"""Corpora: sets of documents for training and for validation, of which none is in both."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from arguments import DataArguments
from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset
from files import file_identity, text_files

Documents: TypeAlias = Dataset | IterableDataset


@dataclass
class Corpus:
    """Documents of both splits, each with a ``text`` column, and what tells this corpus from any other.

    Attributes:
        shards: names of the training documents' shards, where they are known.
    """

    train: Documents
    validation: Documents
    identity: Any
    shards: list[str] = field(default_factory=list)


def load_corpus(args: DataArguments) -> Corpus:
    """Open the corpus that the arguments name: the standard library, local files or a dataset on the Hub.

    Raises:
        ValueError: a missing column, no training split, or a file that cannot be read (of streamed ones: none can).
    """
    if args.train_file:
        corpus = _file_corpus(args)
    elif args.dataset_name:
        corpus = _hub_corpus(args)
    else:
        return stdlib_corpus(Path(sysconfig.get_path("stdlib")), args.validation_share)
    corpus.train = _text_only(corpus.train, args.text_column)
    corpus.validation = _text_only(corpus.validation, args.text_column)
    return corpus


def stdlib_corpus(root: Path, share: float) -> Corpus:
    """Python source files below ``root``, a document each; ``share`` of the files are held out, by their paths."""
    sources = list(_python_sources(root))
    splits: dict[bool, list[str]] = {False: [], True: []}
    identity = []
    for path, text in sources:
        splits[held_out(path, share)].append(text)
        identity.append((path, len(text)))
    train, validation = (Dataset.from_dict({"text": splits[key]}) for key in (False, True))
    return Corpus(train, validation, ["stdlib", identity])


def _python_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) in a fixed order; installed packages, caches and undecodable files are left out."""
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    paths = [p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts)]
    for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()):
        try:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # test data in odd encodings, dangling links
            continue


def held_out(key: str | bytes, share: float) -> bool:
    """Whether the document known by ``key`` is for validation: the same answer on every machine and in any order."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _file_corpus(args: DataArguments) -> Corpus:
    assert args.train_file is not None
    kind, files = text_files("train_file", args.train_file)
    train = _read_files("train_file", kind, files, args.streaming)
    validation: Documents | None = None
    others: list[str] = []
    if args.validation_file:
        kind, others = text_files("validation_file", args.validation_file)
        validation = _read_files("validation_file", kind, others, args.streaming)
    identity = ["file", [file_identity(f) for f in files], [file_identity(f) for f in others]]
    corpus = _with_validation(train, validation, args, identity)
    corpus.shards = files
    return corpus


def _read_files(flag: str, kind: str, files: list[str], streaming: bool) -> Documents:
    """Documents of files, each of which is a shard.

    A stream's first file tells its columns: where it is broken another one does, and the stream passes over it later.
    """
    files, names = [glob.escape(file) for file in files], files  # they are names here, and patterns there
    options: dict[str, Any] = {"sample_by": "paragraph"} if kind == "text" else {}
    options.update(split="train", streaming=streaming)
    first: BaseException | None = None
    for number in range(len(files) if streaming else 1):
        try:
            if number:
                options["features"] = load_dataset(kind, data_files=files[number], **options).features
            return load_dataset(kind, data_files=files, **options)
        except Exception as error:  # whatever a format's reader or a decompressor makes of broken bytes
            first = first or error.__cause__ or error
    told = names[0] if len(names) == 1 else f"{'all' if streaming else 'one'} of {len(names)} files, {names[0]} and on,"
    why = f"{type(first).__name__}: {first}"
    raise ValueError(f"--{flag}: {told} cannot be read: {why}. Replace or leave out broken files") from first


def _hub_corpus(args: DataArguments) -> Corpus:
    assert args.dataset_name is not None
    source = (args.dataset_name, args.dataset_config)
    splits = get_dataset_split_names(*source)
    if "train" not in splits:
        raise ValueError(f"--dataset_name {args.dataset_name} has no split 'train', only {splits}")
    train = load_dataset(*source, split="train", streaming=args.streaming)
    validation = None
    if "validation" in splits:
        validation = load_dataset(*source, split="validation", streaming=args.streaming)
    # The names of the files in the datasets library's own cache carry the revision that was downloaded.
    files = [] if args.streaming else sorted(file["filename"] for file in train.cache_files)
    return _with_validation(train, validation, args, ["hub", source, files])


def _with_validation(train: Documents, validation: Documents | None, args: DataArguments, identity: Any) -> Corpus:
    """Hold documents out by their text (so that copies stay on one side) where there is no validation split."""
    if validation is None:
        column, share = args.text_column, args.validation_share
        _require_column(train, column)
        # What has no text is dropped where texts are read: it must not end a shard here.
        validation = train.filter(lambda row: isinstance(row[column], str) and held_out(row[column], share))
        train = train.filter(lambda row: isinstance(row[column], str) and not held_out(row[column], share))
    return Corpus(train, validation, identity)


def _text_only(documents: Documents, column: str) -> Documents:
    _require_column(documents, column)
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def _require_column(documents: Documents, column: str) -> None:
    names = documents.column_names
    if names is None:  # a stream's columns are known once a row has been read
        names = list(next(iter(documents), {column: ""}))
    if column not in names:
        raise ValueError(f"--text_column {column}: no such column; give one of {', '.join(names)}")
