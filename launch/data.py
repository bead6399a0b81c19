"""From text to packed sequences: corpus, held-out documents, tokenizer, packing, cache.

A corpus is two sets of documents, for training and for validation. Documents are tokenized, joined with the
end-of-sequence token between them and cut into sequences of equal length: no padding, the remainder is dropped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from arguments import FILE_FORMATS, DataArguments
from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Part of every cache key: raise it when the code below would make other sequences from the same text.
CODE_VERSION = 1
# Text that a new tokenizer is trained on: more than this changes the merges very little.
BPE_CHARACTERS = 100_000_000
SHUFFLE_SEED = 0
Documents: TypeAlias = Dataset | IterableDataset


@dataclass
class Corpus:
    """Documents of both splits, each with a ``text`` column, and what tells this corpus from any other."""

    train: Documents
    validation: Documents
    identity: Any


@dataclass
class PackedData:
    """What the Trainer needs; the sequences are rows ``input_ids`` of exactly ``max_length`` token ids."""

    tokenizer: PreTrainedTokenizerBase
    train: Documents
    validation: Dataset


def load_data(
    args: DataArguments,
    rank: int = 0,
    world_size: int = 1,
    first: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> PackedData:
    """Tokenizer and packed sequences of both splits.

    Args:
        args: which corpus and tokenizer.
        rank: this process's rank, which takes its share of a streamed corpus.
        world_size: number of ranks.
        first: context manager that lets one rank through before the others, which then find the cache filled
            (``TrainingArguments.main_process_first``).

    Raises:
        ValueError: a missing column, or too little text for one sequence.
    """
    with first():
        if args.streaming:
            return _stream_packed(args, rank, world_size)
        return _load_packed(args)


# ---- corpora ----


def load_corpus(args: DataArguments) -> Corpus:
    """Open the corpus that the arguments name: the standard library, a local file or a dataset on the Hub."""
    if args.train_file:
        corpus = _file_corpus(args)
    elif args.dataset_name:
        corpus = _hub_corpus(args)
    else:
        return stdlib_corpus(Path(sysconfig.get_path("stdlib")), args.validation_share)
    return Corpus(
        _text_only(corpus.train, args.text_column),
        _text_only(corpus.validation, args.text_column),
        corpus.identity,
    )


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


def held_out(key: str, share: float) -> bool:
    """Whether the document known by ``key`` is for validation: the same answer on every machine and in any order."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _file_corpus(args: DataArguments) -> Corpus:
    assert args.train_file is not None
    train, validation = (
        _read_file(path, args.streaming) if path else None for path in (args.train_file, args.validation_file)
    )
    files = [_file_identity(p) for p in (args.train_file, args.validation_file) if p]
    return _with_validation(train, validation, args, ["file", files])


def _read_file(path: str, streaming: bool) -> Documents:
    kind = FILE_FORMATS[Path(path).suffix]
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    return load_dataset(kind, data_files=path, split="train", streaming=streaming, **options)


def _file_identity(path: str) -> list[Any]:
    status = os.stat(path)
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns]


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
        validation = train.filter(lambda row: held_out(row[column], share))
        train = train.filter(lambda row: not held_out(row[column], share))
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


# ---- tokenizer ----


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with ``<s>``, ``</s>`` and ``<pad>``; any text can be encoded, no token is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def _sample_texts(documents: Documents) -> Iterator[str]:
    """Documents from the beginning, about ``BPE_CHARACTERS`` of them."""
    characters = 0
    for row in documents:
        yield row["text"]
        characters += len(row["text"])
        if characters > BPE_CHARACTERS:
            return


def _tokenizer(corpus: Corpus, args: DataArguments) -> PreTrainedTokenizerBase:
    """The named tokenizer, or the corpus's own: trained once, then read by all ranks from the cache."""
    if args.tokenizer_name:
        return _open_tokenizer(args.tokenizer_name)
    folder = _cache_folder(args, corpus.identity, args.vocab_size)
    if not folder.is_dir():
        print(f"training a byte-level BPE of {args.vocab_size} tokens on the corpus", flush=True)
        tokenizer = train_tokenizer(_sample_texts(corpus.train), args.vocab_size)
        with _published(folder) as building:
            tokenizer.save_pretrained(building)
    return _open_tokenizer(str(folder))


def _open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer_name {name}: it has no token to end a document with")
    return tokenizer


# ---- packing ----


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list[Any]]:
    """Tokenize documents and cut them, end-of-sequence after each, into rows of ``length``; drop the remainder."""
    # verbose=False: a document longer than the tokenizer's model_max_length is what packing is for.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.fromiter(itertools.chain.from_iterable((*ids, tokenizer.eos_token_id) for ids in encoded), np.int32)
    whole = len(stream) // length * length
    return {"input_ids": list(stream[:whole].reshape(-1, length))}


def _packed(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int) -> Documents:
    """Sequences of the documents; what is left over is dropped once in a thousand documents."""
    return documents.map(
        lambda batch: pack(batch["text"], tokenizer, length),
        batched=True,
        batch_size=1000,
        remove_columns=["text"],
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Batch of sequences, int64, batch × length; the model itself shifts the labels by one."""
    input_ids = torch.from_numpy(np.asarray([row["input_ids"] for row in rows], dtype=np.int64))
    return {"input_ids": input_ids, "labels": input_ids.clone()}


# ---- the cache ----


def _cache_folder(args: DataArguments, *parts: Any) -> Path:
    """Folder for what ``parts`` and the choice of documents determine."""
    if args.cache_dir:
        root = Path(args.cache_dir).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        root = Path(base).expanduser() / "ds_lowrank"
    key = json.dumps([CODE_VERSION, args.text_column, args.validation_share, *parts])
    return root / hashlib.sha256(key.encode()).hexdigest()[:20]


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then becomes ``folder`` in one piece, or not at all when filling it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
        building = Path(scratch) / "content"
        building.mkdir()
        yield building
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another node on this file system was faster
                raise


# ---- sequences ----


def _load_packed(args: DataArguments) -> PackedData:
    """Tokenize and pack once; later runs and other ranks map the result from the cache."""
    corpus = load_corpus(args)
    tokenizer = _tokenizer(corpus, args)
    name = args.tokenizer_name or args.vocab_size
    folder = _cache_folder(args, corpus.identity, name, args.max_length)
    if not folder.is_dir():
        print(f"tokenizing and packing the corpus; kept in {folder}", flush=True)
        with _published(folder) as building:
            for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
                packed = _packed(documents, tokenizer, args.max_length)
                _require_sequences(len(packed), split, args)
                packed.save_to_disk(str(building / split))
    train, validation = (load_from_disk(str(folder / s)) for s in ("train", "validation"))
    validation = validation.shuffle(seed=SHUFFLE_SEED)
    validation = validation.select(range(min(args.eval_sequences, len(validation))))
    return PackedData(tokenizer, train.with_format("numpy"), validation.with_format("numpy"))


def _stream_packed(args: DataArguments, rank: int, world_size: int) -> PackedData:
    """Pack the training text as it is read; the few validation sequences are read at once."""
    corpus = load_corpus(args)
    tokenizer = _tokenizer(corpus, args)
    sequences = _packed(corpus.validation, tokenizer, args.max_length)
    validation = Dataset.from_list(list(itertools.islice(sequences, args.eval_sequences)))
    _require_sequences(len(validation), "validation", args)
    shuffled = corpus.train.shuffle(seed=SHUFFLE_SEED, buffer_size=1000)
    train = _packed(shuffled, tokenizer, args.max_length)
    _require_sequences(len(list(itertools.islice(train, 1))), "train", args)
    # Without an end: the ranks' shares may differ in length, and no rank may stop before another.
    train = split_dataset_by_node(train.repeat(None), rank=rank, world_size=world_size)
    return PackedData(tokenizer, train, validation.with_format("numpy"))


def _require_sequences(count: int, split: str, args: DataArguments) -> None:
    if count == 0:
        raise ValueError(
            f"the {split} split has too little text for one sequence of {args.max_length} tokens: give more text, "
            + ("a --validation_file, a larger --validation_share, " if split == "validation" else "")
            + "or a smaller --max_length"
        )
