"""A stream of packed sequences: without an end, past broken shards, and resumed exactly where it was."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

_TOGETHER = 16  # documents that the tokenizer gets at once: its threads take one each
_EVERY, _KEPT = 64, 64  # rows between two states that are kept, and how many: a data loader reads ahead


def readable(documents: datasets.Dataset | datasets.IterableDataset, names: Sequence[str] = ()) -> Iterator[str]:
    """Texts of all shards in order, as far as each can be read.

    Args:
        documents: rows with a ``text``; those without one are left out.
        names: of the shards, for warnings.
    """
    if isinstance(documents, datasets.Dataset):
        yield from (row["text"] for row in documents if isinstance(row["text"], str))
        return
    for index in range(documents.n_shards):
        name = names[index] if names else f"shard {index} of {documents.n_shards}"

        def warn(error: Exception, name: str = name) -> None:
            warnings.warn(f"{name} cannot be read any further: {_short(error)}", stacklevel=2)

        yield from _texts(documents.shard(documents.n_shards, index), warn)


def _texts(shard: datasets.IterableDataset, broken: Callable[[Exception], None]) -> Iterator[str]:
    """Texts of a shard as far as it can be read; where that is not its end, ``broken`` is called."""
    reader = iter(shard)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except Exception as error:  # whatever a format's reader or a file system makes of broken bytes
            broken(error)
            return
        if isinstance(row["text"], str):
            yield row["text"]


class PackedStream(IterableDataset):
    """This rank's rows ``input_ids`` (int32, ``length``) of documents that are read, shuffled and packed as needed.

    Shards are read in another order in each pass, and documents shuffled in a buffer. Where the ranks divide the shards
    each rank reads its own, elsewhere every N-th document (``datasets.distributed.split_dataset_by_node``). What cannot
    be read of a shard is passed over, counted and warned about; documents without a text are left out. A rank of whose
    shards none can be read goes on with every N-th document of all of them.

    Args:
        documents: rows with a ``text``.
        tokenizer: encodes them; its end-of-sequence token stands after each.
        length: tokens in a row.
        rank, world_size: whose share is read.
        seed: of the order.
        buffer: documents that are shuffled with one another.
        names: of the shards, for warnings.

    Attributes:
        identity: what a position is good for: numbers, strings and lists of them.
        skipped: shards that could not be read to their end, with the error, in all passes so far.
    """

    skipped: dict[str, str]
    _rows: int
    _tokens: np.ndarray
    _shard_state: dict[str, Any] | None
    _current: datasets.IterableDataset | None

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        buffer: int = 1000,
        names: Sequence[str] = (),
    ) -> None:
        count = documents.n_shards
        self._corpus, self._count = documents, count
        self._names = list(names) or [f"shard {index} of {count}" for index in range(count)]
        self._rank, self._world_size = rank, world_size
        end = tokenizer.eos_token_id
        self.identity: list[Any] = [self._names, len(tokenizer), end, length, seed, buffer, world_size]
        self._tokenizer, self._length, self._seed, self._size = tokenizer, length, seed, buffer
        self._start: dict[str, Any] = {
            "whole_shards": count % world_size == 0,
            "epoch": 0,
            "place": 0,
            "shard": None,
            "documents": 0,
            "draining": False,
            "buffer": [],
            "random": None,
            "tokens": torch.zeros(0, dtype=torch.int32),
            "rows": 0,
            "skipped": {},
        }
        self._ahead = 0  # rows to leave out at first
        self._begin(self._start)
        self._states: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    @property
    def first_row(self) -> int:
        """Rows of the stream that were given out before this object's first."""
        return self._start["rows"] + self._ahead

    def state_at(self, row: int) -> dict[str, Any]:
        """All that is needed to go on behind a row: numbers, strings, lists and a tensor.

        Args:
            row: how many of the stream's rows have been used; a data loader may have read some more.

        Raises:
            ValueError: the row has not been given out yet, or was long before the position that was loaded.
        """
        if row > max(self._rows, self.first_row):
            raise ValueError(f"row {row} of the stream has not been given out: {self._rows} rows have")
        # Where the last states reach back less far than that, rows are read again from the beginning of this run.
        for state in reversed([self._start, *self._states]):
            if state["rows"] <= row:
                return {**state, "ahead": row - state["rows"], "identity": self.identity}
        raise ValueError(f"row {row} of the stream lies before what is known of it, row {self._start['rows']}")

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_at` was.

        Raises:
            ValueError: it is a position in another stream.
        """
        if state["identity"] != self.identity:
            differ = [f"{a!r} there, {b!r} here" for a, b in zip(state["identity"], self.identity) if a != b]
            raise ValueError(
                f"the position was kept in another stream ({'; '.join(differ)[:500]}): its files, their order, the "
                "tokenizer, --max_length, --text_column and --validation_share have to be the same"
            )
        self._start = {key: value for key, value in state.items() if key not in ("ahead", "identity")}
        self._ahead, self._rows = state["ahead"], state["rows"]
        self._states.clear()
        self.skipped = dict(state["skipped"])

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Rows, beginning at the state that was loaded, or at the first."""
        if get_worker_info() is not None:
            raise ValueError(
                "a stream knows its position only in the process that trains: leave --dataloader_num_workers at 0"
            )
        self._states.clear()
        ahead, length = self._ahead, self._length
        self._begin(self._start)
        texts = self._shuffled()
        while True:
            batch = [next(texts) for _ in range(_TOGETHER)]
            # verbose=False: a document longer than the tokenizer's model_max_length is what packing is for.
            encoded = self._tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            end = [self._tokenizer.eos_token_id]
            self._tokens = np.concatenate([self._tokens, *(np.asarray(ids + end, np.int32) for ids in encoded)])
            while len(self._tokens) >= length:
                row, self._tokens = self._tokens[:length], self._tokens[length:]
                self._rows += 1
                if self._rows % _EVERY == 0:
                    self._states.append(self._state())
                if ahead:
                    ahead -= 1
                    continue
                yield {"input_ids": row}

    # ---- reading ----

    def _begin(self, state: dict[str, Any]) -> None:
        self._whole_shards: bool = state["whole_shards"]
        self._epoch, self._place, self._documents = state["epoch"], state["place"], state["documents"]
        self._shard_state, self._current = state["shard"], None
        self._buffer, self._draining = list(state["buffer"]), state["draining"]
        self._random = np.random.default_rng([self._seed, self._epoch])
        if state["random"] is not None:
            self._random.bit_generator.state = state["random"]
        self._tokens, self._rows = state["tokens"].numpy(), state["rows"]
        self.skipped = dict(state["skipped"])

    def _state(self) -> dict[str, Any]:
        """Where reading stands while a row is given out."""
        return {
            "whole_shards": self._whole_shards,
            "epoch": self._epoch,
            "place": self._place,
            "shard": self._shard_state if self._current is None else self._current.state_dict(),
            "documents": self._documents,
            "draining": self._draining,
            "buffer": list(self._buffer),
            "random": self._random.bit_generator.state,
            "tokens": torch.from_numpy(self._tokens.copy()),
            "rows": self._rows,
            "skipped": dict(self.skipped),
        }

    def _shuffled(self) -> Iterator[str]:
        """Documents without end: each drawn from a buffer, in whose place the next one goes."""
        while True:
            if not self._draining:
                for text in self._pass():
                    if len(self._buffer) < self._size:
                        self._buffer.append(text)
                        continue
                    drawn = int(self._random.integers(self._size))
                    text, self._buffer[drawn] = self._buffer[drawn], text
                    yield text
                self._draining = True
                self._random.shuffle(self._buffer)
            while self._buffer:
                yield self._buffer.pop()
            self._begin_pass(self._epoch + 1)

    def _begin_pass(self, epoch: int) -> None:
        self._epoch, self._place, self._documents, self._draining = epoch, 0, 0, False
        self._shard_state, self._current = None, None
        self._random = np.random.default_rng([self._seed, epoch])

    def _pass(self) -> Iterator[str]:
        """Documents of one pass over this rank's shards, from where it stands."""
        # Drawn apart from the buffer, so that a pass that is resumed has the same order.
        mine = range(self._rank, self._count, self._world_size) if self._whole_shards else range(self._count)
        order = np.random.default_rng([self._seed, self._epoch, 1]).permutation(list(mine))
        while self._place < len(order):
            index = int(order[self._place])
            # Made when it is read: of ten thousand files each takes a while. And a copy in depth: what a shard was told
            # of its beginning stays with it, in every later pass (datasets 5.2).
            shard = deepcopy(self._corpus.shard(self._count, index) if self._count > 1 else self._corpus)
            if not self._whole_shards:
                shard = split_dataset_by_node(shard, self._rank, self._world_size)
            self._current = shard
            if self._shard_state is not None:
                shard.load_state_dict(self._shard_state)
            for text in _texts(shard, partial(self._skip, index)):
                self._documents += 1
                yield text
            self._place, self._shard_state, self._current = self._place + 1, None, None
        if not self._documents and self._whole_shards and self._world_size > 1:
            warnings.warn(f"rank {self._rank} can read none of its {len(order)} shards: it reads of all", stacklevel=2)
            self._whole_shards, self._place = False, 0
            yield from self._pass()
        elif not self._documents:
            raise ValueError(
                f"no document could be read in a whole pass over {len(order)} shards"
                + "".join(f"; {name}: {error}" for name, error in [*self.skipped.items()][:1])
                + ". Look at the files of --train_file (or at the connection) and at --text_column"
            )

    def _skip(self, index: int, error: Exception) -> None:
        name = self._names[index]
        if name not in self.skipped:
            warnings.warn(f"{name} cannot be read any further and is passed over: {_short(error)}", stacklevel=2)
        self.skipped[name] = _short(error)


def _short(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"[:300]
