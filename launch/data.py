"""From text to packed sequences: corpus, held-out documents, tokenizer, packing, cache.

A corpus is two sets of documents, for training and for validation. Documents are tokenized, joined with the
end-of-sequence token between them and cut into sequences of equal length: no padding, the remainder is dropped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import DataArguments
from corpora import Corpus, Documents, load_corpus
from datasets import Dataset, load_from_disk
from files import file_identity, is_tokens
from stream import PackedStream, readable
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokens import TokenFile, all_long, arrow_files, held_rows, join_documents, open_arrow, open_bin
from torch.utils.data import Subset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Part of every cache key: raise it when the code below would make other sequences from the same text.
CODE_VERSION = 2
# Text that a new tokenizer is trained on: more than this changes the merges very little.
BPE_CHARACTERS = 100_000_000
SHUFFLE_SEED = 0


@dataclass
class PackedData:
    """What the Trainer needs; the sequences are rows ``input_ids`` of exactly ``max_length`` token ids."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset | TokenFile | Subset | PackedStream
    validation: Dataset | Subset


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
        if args.train_file and is_tokens(args.train_file):
            return _load_tokens(args)
        if args.streaming:
            return _stream_packed(args, rank, world_size)
        return _load_packed(args)


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
    for text in readable(documents):
        yield text
        characters += len(text)
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


def cut(documents: Iterable[Sequence[int]], length: int) -> dict[str, list[Any]]:
    """Join documents of tokens and cut them into rows of ``length``; drop the remainder."""
    stream = np.fromiter(itertools.chain.from_iterable(documents), np.int32)
    whole = len(stream) // length * length
    return {"input_ids": list(stream[:whole].reshape(-1, length))}


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list[Any]]:
    """Tokenize documents and cut them, end-of-sequence after each, into rows of ``length``; drop the remainder."""
    texts = [text for text in texts if isinstance(text, str)]  # rows without one
    if not texts:
        return {"input_ids": []}
    # verbose=False: a document longer than the tokenizer's model_max_length is what packing is for.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return cut(((*ids, tokenizer.eos_token_id) for ids in encoded), length)


def _packed(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Sequences of the documents; what is left over is dropped once in a thousand documents."""
    return documents.map(
        lambda batch: pack(batch["text"], tokenizer, length),
        batched=True,
        batch_size=1000,
        remove_columns=["text"],
    )


class Collator:
    """Batches of sequences: ``input_ids`` and ``labels``, int64, batch × length; the model shifts the labels by one.

    Args:
        end: the token behind a document, where attention is to be kept inside documents: ``position_ids`` (batch ×
            length, int64) begin anew behind it, an ``attention_mask`` (batch × 1 × length × length, bool) is true where
            a token sees another, and no label crosses it. ``None``: a sequence is one document.
    """

    def __init__(self, end: int | None = None) -> None:
        self.end = end

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch of rows ``input_ids``."""
        input_ids = torch.from_numpy(np.asarray([row["input_ids"] for row in rows], dtype=np.int64))
        batch = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.end is None:
            return batch
        begins = torch.zeros_like(input_ids, dtype=torch.bool)
        begins[:, 1:] = input_ids[:, :-1] == self.end
        batch["labels"][begins] = -100
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        batch["position_ids"] = place - torch.where(begins, place, 0).cummax(1).values
        document = begins.cumsum(1)
        same = document[:, None, :, None] == document[:, None, None, :]
        batch["attention_mask"] = same & (place[:1, None, :, None] >= place[:1, None, None, :])
        return batch


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
    # Held out of the training files, or of files of their own.
    names = corpus.shards if args.train_file and not args.validation_file else []
    validation = Dataset.from_list(_first_rows(corpus.validation, tokenizer, args, names))
    _require_sequences(len(validation), "validation", args)
    train = PackedStream(
        corpus.train, tokenizer, args.max_length, rank, world_size, seed=SHUFFLE_SEED, names=corpus.shards
    )
    train.identity += [args.text_column, args.validation_share, args.dataset_name, args.dataset_config]
    return PackedData(tokenizer, train, validation.with_format("numpy"))


def _first_rows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, args: DataArguments, names: Sequence[str]
) -> list[dict[str, Any]]:
    """As many rows as an evaluation uses."""
    texts = readable(documents, names)
    rows: list[Any] = []
    while len(rows) < args.eval_sequences and (batch := list(itertools.islice(texts, 1000))):
        rows += pack(batch, tokenizer, args.max_length)["input_ids"]
    return [{"input_ids": row} for row in rows[: args.eval_sequences]]


def _load_tokens(args: DataArguments) -> PackedData:
    """Rows of a corpus that is tokens already."""
    assert args.train_file is not None
    assert args.tokenizer_name is not None
    tokenizer = _open_tokenizer(args.tokenizer_name)
    size, end = len(tokenizer), tokenizer.eos_token_id
    train: Any
    validation: Any
    if args.train_file.endswith(".bin"):
        train, validation = open_bin(args, size, end)
    else:
        train, validation = open_arrow(args)
        if validation is None:
            held = _held_rows(args, train)
            train, validation = (train.select(np.flatnonzero(rows)) for rows in (~held, held))
        if not (all_long(train, args.max_length) and all_long(validation, args.max_length)):
            train, validation = _load_joined(args, train, validation, end, size)
    for split, rows in (("train", train), ("validation", validation)):
        _require_sequences(len(rows), split, args)
    some = np.random.default_rng(SHUFFLE_SEED).permutation(len(validation))[: args.eval_sequences].tolist()
    if isinstance(train, TokenFile):
        return PackedData(tokenizer, train, Subset(validation, some))
    return PackedData(tokenizer, train.with_format("numpy"), validation.select(some).with_format("numpy"))


def _held_rows(args: DataArguments, documents: Dataset) -> np.ndarray:
    """See :func:`tokens.held_rows`; kept in the cache, as every process needs them at every start."""
    folder = _cache_folder(args, _arrow_identity(args), "held out")
    if not folder.is_dir():
        print(f"holding rows out of the corpus; kept in {folder}", flush=True)
        with _published(folder) as building:
            np.save(building / "held.npy", held_rows(documents, args.validation_share))
    return np.load(folder / "held.npy")


def _arrow_identity(args: DataArguments) -> list[Any]:
    files = [arrow_files(path) for path in (args.train_file, args.validation_file) if path]
    return ["arrow", [[file_identity(f) for f in group] for group in files]]


def _load_joined(args: DataArguments, train: Dataset, validation: Dataset, end: int, size: int) -> list[Dataset]:
    """Documents of tokens, joined and cut; kept in the cache."""
    folder = _cache_folder(args, [*_arrow_identity(args), end, size], args.max_length)
    if not folder.is_dir():
        print(f"joining and cutting the corpus; kept in {folder}", flush=True)
        with _published(folder) as building:
            for split, documents in (("train", train), ("validation", validation)):
                scratch = building / f"{split}.arrow"
                joined = join_documents(documents, args.max_length, end, size, cut, scratch)
                joined.save_to_disk(str(building / split))
                scratch.unlink(missing_ok=True)
    return [load_from_disk(str(folder / split)) for split in ("train", "validation")]


def _require_sequences(count: int, split: str, args: DataArguments) -> None:
    if count == 0:
        raise ValueError(
            f"the {split} split has too little text for one sequence of {args.max_length} tokens: give more text, "
            + ("a --validation_file, a larger --validation_share, " if split == "validation" else "")
            + "or a smaller --max_length"
        )
