"""launch/stream.py: the share of a rank, the order, broken shards, and the position."""

from __future__ import annotations

import gzip
import json
import sys
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from data import train_tokenizer
from position import StreamPosition
from stream import PackedStream

DOCUMENTS, SHARDS, LENGTH = 20, 4, 16


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["word and number 0123456789"], vocab_size=300)


@pytest.fixture
def files(tmp_path):
    """Shards as C4 has them."""
    paths = []
    for shard in range(SHARDS):
        path = tmp_path / f"c4-train.{shard:05d}-of-{SHARDS:05d}.json.gz"
        with gzip.open(path, "wt") as file:
            for i in range(DOCUMENTS):
                file.write(json.dumps({"text": f"word {shard} number {i} " * (1 + i % 5), "url": "x"}) + "\n")
        paths.append(str(path))
    return paths


def stream(files, tokenizer, filtered=False, **options):
    documents = load_dataset("json", data_files=files, split="train", streaming=True)
    if filtered:
        documents = documents.filter(lambda row: len(row["text"]) % 7)
    return PackedStream(documents, tokenizer, LENGTH, **{"buffer": 8, **options})


def rows(one, count):
    return [tuple(row["input_ids"]) for row in islice(one, count)]


def test_a_position_is_one_that_was_reached(files, tokenizer):
    one = stream(files, tokenizer)
    rows(one, 10)
    again = stream(files, tokenizer)
    again.load_state(one.state_at(10))
    for reader in (one, again):
        with pytest.raises(ValueError, match="row 1000 of the stream has not been given out"):
            reader.state_at(1000)
    again.load_state({**one.state_at(10), "rows": 8, "ahead": 2})
    with pytest.raises(ValueError, match="lies before what is known of it, row 8"):
        again.state_at(5)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 200, 333])
def test_it_goes_on_behind_any_row(files, tokenizer, tmp_path, at, filtered):
    whole = rows(stream(files, tokenizer, filtered), 600)
    first = stream(files, tokenizer, filtered)
    reader = iter(first)
    for _ in range(at + 3):  # a data loader reads ahead
        next(reader)
    torch.save(first.state_at(at), tmp_path / "state.pt")
    again = stream(files, tokenizer, filtered)
    again.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.first_row == at
    assert rows(again, 600 - at) == whole[at:]
    # And once more, from what was itself resumed, before and after it has kept a state of its own.
    for more in (5, 90):
        reader = iter(again)
        for _ in range(more):
            next(reader)
        third = stream(files, tokenizer, filtered)
        third.load_state(again.state_at(at + more))
        assert rows(third, 50) == whole[at + more : at + more + 50]


def test_a_pass_has_every_document_once_and_another_order_than_the_next(files, tokenizer):
    one = stream(files, tokenizer)
    per_pass = SHARDS * DOCUMENTS
    text = tokenizer.decode([i for row in rows(one, 600) for i in row]).split(tokenizer.eos_token)
    first, second = text[:per_pass], text[per_pass : 2 * per_pass]
    assert len(set(first)) == per_pass
    assert set(first) == set(second)
    assert first != second
    shards = [document.split()[1] for document in first]
    assert shards != sorted(shards)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_a_pass_out(files, tokenizer, ranks):
    """Two and four ranks have shards of their own, three every third document."""
    found = []
    for rank in range(ranks):
        one = stream(files, tokenizer, rank=rank, world_size=ranks)
        text = tokenizer.decode([i for row in rows(one, 400) for i in row]).split(tokenizer.eos_token)
        mine = text[: text.index(text[0], 1)] if ranks == 1 else text
        pass_length = len(dict.fromkeys(mine[:-1]))
        found.append(list(dict.fromkeys(mine[:-1])))
        assert pass_length >= SHARDS * DOCUMENTS // ranks - SHARDS
    together = [document for mine in found for document in mine]
    assert len(together) == len(set(together)) == SHARDS * DOCUMENTS


@pytest.mark.parametrize("how", ["not gzip", "cut", "not json"])
def test_a_broken_shard_is_passed_over_counted_and_told_once(files, tokenizer, how):
    path = Path(files[2])
    content = path.read_bytes()
    path.write_bytes(
        {
            "not gzip": b"\x00" * 50,
            "cut": content[: len(content) // 2],
            "not json": gzip.compress(b'{"text": "a"}\n{"te'),
        }[how]
    )
    one = stream(files, tokenizer, names=[Path(file).name for file in files])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        text = tokenizer.decode([i for row in rows(one, 500) for i in row]).split(tokenizer.eos_token)
    assert list(one.skipped) == [path.name]
    assert len([w for w in told if f"{path.name} cannot be read any further" in str(w.message)]) == 1
    intact = {f"word {shard} number {i} " * (1 + i % 5) for shard in (0, 1, 3) for i in range(DOCUMENTS)}
    assert intact <= set(text)
    assert one.state_at(300)["skipped"] == one.skipped


def test_nothing_to_read_is_an_error(files, tokenizer):
    documents = load_dataset("json", data_files=files, split="train", streaming=True)
    for file in files:
        Path(file).write_bytes(b"\x00")
    with pytest.raises(
        ValueError, match=r"no document could be read in a whole pass over 4 shards; shard \d of 4: BadGzipFile"
    ):
        next(iter(PackedStream(documents, tokenizer, LENGTH)))


def test_workers_are_refused(files, tokenizer):
    loader = torch.utils.data.DataLoader(stream(files, tokenizer), num_workers=1, batch_size=None)
    with pytest.raises(ValueError, match="leave --dataloader_num_workers at 0"):
        next(iter(loader))


def test_a_rank_whose_shards_are_all_broken_reads_of_the_others(files, tokenizer):
    Path(files[2]).write_bytes(b"\x00" * 50)
    one = stream(files, tokenizer, rank=2, world_size=4)
    with pytest.warns(UserWarning, match="rank 2 can read none of its 1 shards: it reads of all"):
        first = rows(one, 100)
    again = stream(files, tokenizer, rank=2, world_size=4)
    again.load_state(one.state_at(70))
    assert rows(again, 30) == first[70:]


def test_documents_without_a_text_are_left_out(tmp_path, tokenizer):
    path = tmp_path / "some.jsonl"
    texts = [None if i % 3 == 0 else f"word {i}" for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    one = stream([str(path)], tokenizer, names=["some"])
    found = tokenizer.decode([i for row in rows(one, 40) for i in row]).split(tokenizer.eos_token)
    assert {text for text in texts if text} <= set(found)
    assert not one.skipped


def test_a_position_in_another_stream_is_refused(files, tokenizer):
    one = stream(files, tokenizer)
    next(iter(one))
    state = one.state_at(1)
    fewer = stream(files[:3], tokenizer, names=files[:3])
    with pytest.raises(ValueError, match=r"kept in another stream .* have to be the same"):
        fewer.load_state(state)
    documents = load_dataset("json", data_files=files, split="train", streaming=True)
    longer = PackedStream(documents, tokenizer, LENGTH + 1, buffer=8)
    with pytest.raises(ValueError, match="16 there, 17 here"):
        longer.load_state(state)


def training_arguments(folder, **given):
    """What a position reads of the Trainer's arguments: two sequences a micro-step, on one rank."""
    ordinary = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "process_index": 0,
        "world_size": 1,
        "save_only_model": False,
        "ignore_data_skip": False,
    }
    return SimpleNamespace(**{**ordinary, **given})


def test_the_trainers_steps_are_rows_of_the_stream(files, tokenizer, tmp_path):
    """Twice resumed, with accumulation, and a loader that reads ahead."""
    whole = rows(stream(files, tokenizer), 200)
    args = training_arguments(tmp_path, gradient_accumulation_steps=3)
    folder = None
    for step in (4, 7, 20):
        args.ignore_data_skip = False  # a run has flags of its own
        one = stream(files, tokenizer)
        position = StreamPosition(one)
        position.resume(folder, args)
        assert args.ignore_data_skip == (folder is not None)
        reader = iter(one)
        for _ in range(6 * 20 + 5 - one.first_row):
            next(reader)
        (tmp_path / f"checkpoint-{step}").mkdir()
        position.on_save(args, SimpleNamespace(global_step=step), None)
        folder = str(tmp_path / f"checkpoint-{step}")
        again = stream(files, tokenizer)
        args.ignore_data_skip = False
        StreamPosition(again).resume(folder, args)
        assert again.first_row == 6 * step
        assert rows(again, 20) == whole[6 * step : 6 * step + 20]
    args.world_size, args.ignore_data_skip = 2, False
    StreamPosition(stream(files, tokenizer)).resume(folder, args)
    assert not args.ignore_data_skip


def test_a_stream_that_begins_anew_has_positions_of_its_own(files, tokenizer, tmp_path, capsys):
    """--ignore_data_skip on another number of ranks: the Trainer counts on, and the stream begins at its first row."""
    args = training_arguments(tmp_path, world_size=2, ignore_data_skip=True, resumed_step=100)
    whole = rows(stream(files, tokenizer), 40)
    one = stream(files, tokenizer)
    position = StreamPosition(one)
    (tmp_path / "checkpoint-100").mkdir()
    position.resume(str(tmp_path / "checkpoint-100"), args)
    assert "begins anew (--ignore_data_skip)" in capsys.readouterr().err
    rows(one, 10)
    position.on_save(args, SimpleNamespace(global_step=105), None)
    again, other = (stream(kept, tokenizer) for kept in (files, files[1:]))
    StreamPosition(again).resume(str(tmp_path / "checkpoint-105"), args)  # with the same flags, as a job queued again
    assert rows(again, 30) == whole[10:]
    StreamPosition(other).resume(str(tmp_path / "checkpoint-105"), args)
    assert other.first_row == 0
    args.ignore_data_skip = False
    with pytest.raises(ValueError, match=r"kept in another stream .*, or the stream begin anew, --ignore_data_skip"):
        StreamPosition(other).resume(str(tmp_path / "checkpoint-105"), args)
