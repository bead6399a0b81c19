"""launch/: corpora that are tokens already, patterns of files, attention inside documents."""

from __future__ import annotations

import gzip
import json
import sys
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from arguments import DataArguments
from data import Collator, load_data, train_tokenizer

DOCUMENTS = [[5 + (7 * i + j) % 200 for j in range(3 + i % 9)] for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    one = train_tokenizer(["word and number 0123456789"], vocab_size=300)
    one.save_pretrained(folder)
    return one, str(folder)


def arguments(tmp_path, tokenizer, **options):
    cache = {"cache_dir": str(tmp_path / "cache"), "max_length": 16, "validation_share": 0.2}
    return DataArguments(tokenizer_name=tokenizer[1], **{**cache, **options})


def tokens_of(rows):
    return [int(i) for row in rows for i in row["input_ids"]]


def documents_of(rows, end):
    found, document = set(), []
    for token in tokens_of(rows):
        if token == end:
            found.add(tuple(document))
            document = []
        else:
            document.append(token)
    return found


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_a_flat_file_is_cut_at_the_end_of_a_document(tmp_path, tokenizer, dtype):
    end = tokenizer[0].eos_token_id
    flat = np.concatenate([np.array([*ids, end]) for ids in DOCUMENTS])
    flat.astype(dtype).tofile(tmp_path / "train.bin")
    packed = load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "train.bin"), token_dtype=dtype))
    train = tokens_of(packed.train[i] for i in range(len(packed.train)))
    assert train == flat[: len(train)].tolist()
    whole = packed.validation.dataset
    start = len(packed.train.tokens)
    assert flat[start - 1] == end, "a document is in both splits"
    assert 0.15 * len(flat) < len(whole.tokens) < 0.2 * len(flat) + 20
    assert tokens_of(whole[i] for i in range(len(whole))) == flat[start : start + 16 * len(whole)].tolist()
    assert {row["input_ids"].dtype for row in islice(packed.train, 3)} == {np.dtype("int32")}


@pytest.mark.parametrize("kind", ["folder", "dict", "arrow"])
def test_arrow_documents_are_joined_cut_and_held_out(tmp_path, tokenizer, kind):
    end = tokenizer[0].eos_token_id
    ids = [[*document, end] if i % 2 else document for i, document in enumerate(DOCUMENTS)]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]})
    if kind == "dict":
        DatasetDict({"train": data.select(range(150)), "validation": data.select(range(150, 200))}).save_to_disk(
            tmp_path / "data"
        )
    else:
        data.save_to_disk(tmp_path / "data")
    path = tmp_path / "data"
    if kind == "arrow":
        path = next(path.glob("*.arrow"))
    packed = load_data(arguments(tmp_path, tokenizer, train_file=str(path)))
    assert {len(row["input_ids"]) for row in packed.train} == {16}
    assert list((tmp_path / "data").rglob("cache-*")) == [], "written into the user's folder"
    train, validation = (documents_of(split, end) for split in (packed.train, packed.validation))
    known = {tuple(document) for document in DOCUMENTS}
    assert len(train & known) > 80
    assert len(validation & known) > 5
    if kind != "dict":
        assert not (train & known) & (validation & known)


def test_rows_that_have_the_length_stay_as_they_are(tmp_path, tokenizer):
    rows = [[(i + j) % 200 for j in range(16)] for i in range(40)]
    DatasetDict(
        {"train": Dataset.from_dict({"input_ids": rows}), "validation": Dataset.from_dict({"input_ids": rows})}
    ).save_to_disk(tmp_path / "data")
    packed = load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "data")))
    assert [row["input_ids"].tolist() for row in packed.train] == rows
    assert not (tmp_path / "cache").exists(), "they were copied"
    assert list((tmp_path / "data").rglob("cache-*")) == []


def test_rows_without_tokens_are_refused(tmp_path, tokenizer):
    """One would shift which of the rows behind it are held out."""
    rows = [list(range(5, 21))] * 3 + [None] + [list(range(30, 46))] * 3
    Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"--train_file .*tokens has 1 rows without input_ids: filter them out"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "tokens")))


def test_foreign_tokens_are_refused(tmp_path, tokenizer):
    np.array([1, 2, 60000, 4] * 40, "uint16").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin has the token 60000, and --tokenizer_name's are 0 to 280"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "a.bin")))
    np.array([1, 2, -3, 4] * 40, "int32").tofile(tmp_path / "n.bin")
    with pytest.raises(ValueError, match=r"has the token -3"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "n.bin"), token_dtype="int32"))
    np.array([7, 8, 9, 4] * 40, "uint32").tofile(tmp_path / "wide.bin")
    with pytest.raises(ValueError, match="every second token is 0, as of --token_dtype uint32"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "wide.bin")))
    Dataset.from_dict({"input_ids": [[1, 60000]] * 50}).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match="has the token 60000"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "b")))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="3 bytes are no tokens of uint16: give another --token_dtype"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "odd.bin")))
    with pytest.raises(ValueError, match=r"--token_dtype is for --train_file tokens\.bin"):
        DataArguments(train_file=str(tmp_path / "b"), tokenizer_name="t5-base", token_dtype="uint32")
    with pytest.raises(ValueError, match="is tokens: say of which tokenizer"):
        DataArguments(train_file=str(tmp_path / "a.bin"))
    Dataset.from_dict({"ids": [[1]]}).save_to_disk(tmp_path / "c")
    with pytest.raises(ValueError, match="has no column input_ids"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "c")))


# ---- patterns, as data sets lie on disk ----


def write_shards(folder, count=4, broken=None):
    folder.mkdir()
    for shard in range(count):
        text = "".join(json.dumps({"text": f"word {shard} number {i}"}) + "\n" for i in range(60))
        path = folder / f"c4-train.{shard:05d}-of-{count:05d}.json.gz"
        path.write_bytes(b"\x00" * 20 if shard == broken else gzip.compress(text.encode()))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_and_a_pattern_name_the_same_files(tmp_path, tokenizer, streaming):
    write_shards(tmp_path / "c4")
    (tmp_path / "c4" / "README.md").write_text("not a corpus")
    found = []
    for train in (tmp_path / "c4", tmp_path / "c4" / "c4-train.*.json.gz"):
        packed = load_data(arguments(tmp_path, tokenizer, train_file=str(train), streaming=streaming))
        found.append(tokens_of(islice(packed.train, 30)))
    assert found[0] == found[1]


@pytest.mark.parametrize("broken", [0, 2])
def test_a_stream_does_without_a_broken_shard_and_a_corpus_that_is_kept_does_not(tmp_path, tokenizer, broken):
    write_shards(tmp_path / "c4", broken=broken)
    args = {"train_file": str(tmp_path / "c4")}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        packed = load_data(arguments(tmp_path, tokenizer, streaming=True, **args))
        train = documents_of(islice(packed.train, 300), tokenizer[0].eos_token_id)
    assert any("Not a gzipped file" in str(warning.message) for warning in told)
    validation = documents_of(packed.validation, tokenizer[0].eos_token_id)
    assert [Path(name).name for name in packed.train.skipped] == [f"c4-train.{broken:05d}-of-00004.json.gz"]
    assert len(train) > 100
    assert len(validation) > 10
    assert not train & validation
    with pytest.raises(ValueError, match=r"one of 4 files, .* cannot be read"):
        load_data(arguments(tmp_path, tokenizer, **args))


def test_a_first_shard_that_does_not_decompress_is_passed_over(tmp_path, tokenizer):
    write_shards(tmp_path / "c4")
    path = tmp_path / "c4" / "c4-train.00000-of-00004.json.gz"
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = load_data(arguments(tmp_path, tokenizer, train_file=str(tmp_path / "c4"), streaming=True))
        list(islice(packed.train, 300))
    assert list(packed.train.skipped) == [str(path)]


def test_nothing_readable_and_several_formats_are_refused(tmp_path, tokenizer):
    write_shards(tmp_path / "c4", count=1, broken=0)
    path = tmp_path / "c4" / "c4-train.00000-of-00001.json.gz"
    with pytest.raises(ValueError, match=f"{path} cannot be read: BadGzipFile"):
        load_data(arguments(tmp_path, tokenizer, train_file=str(path), streaming=True))
    (tmp_path / "c4" / "more.txt").write_text("x")
    with pytest.raises(ValueError, match="has files of several formats: json, text"):
        arguments(tmp_path, tokenizer, train_file=str(tmp_path / "c4"))
    with pytest.raises(ValueError, match="is none of"):
        arguments(tmp_path, tokenizer, train_file=str(tmp_path / "*.md"))


# ---- attention inside documents ----


def test_a_document_is_computed_as_if_it_were_alone():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    rows = [{"input_ids": [3, 4, 1, 5, 6, 7, 1, 8]}, {"input_ids": [9, 1, 1, 10, 11, 12, 13, 14]}]
    batch = Collator(end=1)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[3, 4, 1, -100, 6, 7, 1, -100], [9, 1, -100, -100, 11, 12, 13, 14]]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    for row, (start, stop) in [(0, (0, 3)), (0, (3, 7)), (0, (7, 8)), (1, (0, 2)), (1, (2, 3)), (1, (3, 8))]:
        alone = model(batch["input_ids"][row : row + 1, start:stop]).logits[0]
        torch.testing.assert_close(logits[row, start:stop], alone)
    without = model(batch["input_ids"]).logits
    assert (without[0, 3:7] - logits[0, 3:7]).abs().max() > 1e-3, "this model could not tell"
    loss, again = (
        model(**batch).loss,
        torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 32), batch["labels"][:, 1:].reshape(-1)),
    )
    torch.testing.assert_close(loss, again)
