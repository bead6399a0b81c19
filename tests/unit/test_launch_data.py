"""launch/: corpus, held-out documents, tokenizer, packing, cache, streaming, and bad command lines."""

import json
import sys
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import data as launch_data
from arguments import DataArguments, parse_arguments
from corpora import held_out, stdlib_corpus
from data import Collator, load_data, pack, train_tokenizer
from pretrain import build_model

ZERO2 = str(Path(__file__).resolve().parents[2] / "configs" / "zero2.json")
TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" * 4 for i in range(80)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def arguments(tmp_path, **options):
    return DataArguments(
        **{
            "cache_dir": str(tmp_path / "cache"),
            "vocab_size": 320,
            "max_length": 32,
            "validation_share": 0.2,
            **options,
        }
    )


def documents_of(sequences, tokenizer):
    """The whole documents inside packed rows: what stands between two end tokens."""
    ids = [i for row in sequences for i in row["input_ids"]]
    return set(tokenizer.decode(ids).split(tokenizer.eos_token)[1:-1])


# ---- which documents ----


def test_held_out_is_a_fixed_share():
    # A hash that changes with the process (str.__hash__) would leak validation text into a resumed run.
    assert [held_out(name, 0.5) for name in ("os.py", "re.py", "ast.py", "json/decoder.py")] == [
        False,
        False,
        False,
        True,
    ]
    share = sum(held_out(f"module_{i}.py", 0.05) for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.05, abs=0.006)


def test_stdlib_corpus_takes_source_files_only(tmp_path):
    for path, content in {
        "b.py": b"b = 1",
        "a.py": b"a = 1",
        "package/c.py": "c = 'ä'".encode(),
        "package/latin.py": b"# \xe4",  # not UTF-8: skipped, not fatal
        "site-packages/installed.py": b"no",
        "__pycache__/d.py": b"no",
        "notes.txt": b"no",
    }.items():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    corpus = stdlib_corpus(tmp_path, share=1e-9)
    assert corpus.train["text"][:] == ["a = 1", "b = 1", "c = 'ä'"]
    assert len(corpus.validation) == 0


def test_no_held_out_document_is_trained_on(tmp_path, jsonl):
    packed = load_data(arguments(tmp_path, train_file=str(jsonl)))
    train = documents_of(packed.train, packed.tokenizer)
    validation = documents_of(packed.validation, packed.tokenizer)
    assert train <= {t for t in TEXTS if not held_out(t, 0.2)}
    assert len(train) > 40
    assert not train & validation


# ---- tokenizer and packing ----


def test_tokenizer_encodes_any_text(tokenizer):
    text = "def f(x):\n\treturn 'ß→é🐍' \x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_pack_loses_only_the_remainder(tokenizer):
    stream = []
    for text in TEXTS[:5]:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    rows = pack(TEXTS[:5], tokenizer, 16)["input_ids"]
    assert [i for row in rows for i in row] == stream[: len(stream) // 16 * 16]
    assert {len(row) for row in rows} == {16}
    assert pack(["x"], tokenizer, 16)["input_ids"] == []


def test_collate_gives_int64_labels_of_their_own(tokenizer):
    batch = Collator()([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    batch["labels"][0, 0] = -100  # a shared buffer would reach the embedding
    assert batch["input_ids"][0, 0] == 1


# ---- files ----


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_formats_give_the_same_sequences(tmp_path, jsonl, kind):
    path = tmp_path / f"train.{kind}"
    texts = [text.strip() for text in TEXTS]
    if kind == "txt":
        path.write_text("\n\n".join(texts))
    else:
        dataset = launch_data.Dataset.from_dict({"body": texts})
        dataset.to_json(path) if kind == "jsonl" else dataset.to_parquet(path)
    column = {} if kind == "txt" else {"text_column": "body"}
    packed = load_data(
        arguments(tmp_path, train_file=str(path), validation_file=str(path), **column), rank=0, world_size=1
    )
    rows = pack(texts, packed.tokenizer, 32)["input_ids"]
    assert [row["input_ids"].tolist() for row in packed.train] == [row.tolist() for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "bz2"])
def test_compressed_files_in_a_folder_with_any_name(tmp_path, compression, streaming):
    folder = tmp_path / "c4 [v2]*"
    folder.mkdir()
    ending = {"gzip": "gz", "zstd": "zst"}.get(compression, compression)
    for shard in range(2):
        with fsspec.open(
            f"file://{folder}/{shard}.jsonl.{ending}", "wt", compression=compression, expand=False
        ) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[shard::2])
    packed = load_data(arguments(tmp_path, train_file=str(folder), streaming=streaming))
    rows = list(islice(packed.train, 5))
    assert len(rows) == 5
    assert documents_of(rows, packed.tokenizer) <= set(TEXTS)


def test_second_load_reads_the_cache(tmp_path, jsonl, monkeypatch):
    args = arguments(tmp_path, train_file=str(jsonl))
    first = load_data(args)
    monkeypatch.setattr(launch_data, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(launch_data, "pack", lambda *_: pytest.fail("packed again"))
    second = load_data(args)
    assert [r["input_ids"].tolist() for r in first.train] == [r["input_ids"].tolist() for r in second.train]
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def test_a_failed_build_leaves_nothing_behind(tmp_path, jsonl, monkeypatch):
    # A half-written folder would be taken for a finished one by the next run.
    args = arguments(tmp_path, train_file=str(jsonl))
    with monkeypatch.context() as patch:
        patch.setattr(launch_data, "pack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_data(args)
    folders = list((tmp_path / "cache").iterdir())
    assert [f for f in folders if not (f / "tokenizer.json").is_file()] == []
    assert len(load_data(args).train) > 0


def test_a_file_that_moves_to_the_validation_split_is_packed_again(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, texts in (("train", TEXTS[:60]), ("valid", TEXTS[60:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    both = load_data(arguments(tmp_path, train_file=str(folder)))
    train, valid = str(folder / "train.jsonl"), str(folder / "valid.jsonl")
    one = load_data(arguments(tmp_path, train_file=train, validation_file=valid))
    theirs = set(TEXTS[60:])
    assert documents_of(both.train, both.tokenizer) & theirs, "this could not tell"
    assert not documents_of(one.train, one.tokenizer) & theirs


def test_a_changed_file_is_packed_again(tmp_path, jsonl):
    args = arguments(tmp_path, train_file=str(jsonl))
    before = len(load_data(args).train)
    with jsonl.open("a") as file:
        file.writelines(json.dumps({"text": text[::-1], "id": 0}) + "\n" for text in TEXTS)
    assert len(load_data(args).train) > before


# ---- streams ----


def test_stream_deals_the_text_to_ranks_without_end(tmp_path, jsonl):
    args = arguments(tmp_path, train_file=str(jsonl), streaming=True)
    whole = len(load_data(arguments(tmp_path, train_file=str(jsonl))).train)
    ranks = [load_data(args, rank=rank, world_size=2) for rank in (0, 1)]
    rows = [[tuple(row["input_ids"]) for row in islice(r.train, 2 * whole)] for r in ranks]
    assert [len(r) for r in rows] == [2 * whole] * 2, "a stream that ends early stalls the other rank"
    one_pass = [set(r[: whole // 2]) for r in rows]
    assert not one_pass[0] & one_pass[1]
    assert {len(row) for row in rows[0]} == {32}
    same = [[row["input_ids"].tolist() for row in r.validation] for r in ranks]
    assert same[0] == same[1]


# ---- bad input ----


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_column_is_named(tmp_path, jsonl, streaming):
    args = arguments(tmp_path, train_file=str(jsonl), text_column="content", streaming=streaming)
    with pytest.raises(ValueError, match="--text_column content: no such column; give one of text, id"):
        load_data(args)


def test_arguments_of_galore_in_the_trainer_count_as_flags_of_ours(tmp_path):
    argv = f"--optim galore_adamw_8bit --optim_args rank=128,scale=0.5 --output_dir {tmp_path} --report_to none"
    options = parse_arguments(argv.split())[2]
    assert options == {"rank": 128, "scale": 0.5, "state_dtype": "int8", "selection": "dominant"}
    several = parse_arguments([*argv.split(), "--optim_target_modules", "q_proj", "k_proj"])[2]
    assert several["optim_target_modules"] == ["q_proj", "k_proj"]


def test_a_file_with_a_block_alone_and_weights_without_a_master(tmp_path):
    block = {"rank": 8, "gradients": "projected", "accumulator_dtype": "bf16"}
    (tmp_path / "block.json").write_text(json.dumps({"lowrank": block}))
    argv = f"--lowrank_config {tmp_path}/block.json --dtype bfloat16 --accumulator_dtype fp32 --output_dir {tmp_path}"
    model, _, options, args = parse_arguments([*argv.split(), "--report_to", "none"])
    assert options == {**block, "accumulator_dtype": "fp32"}
    assert args.bf16 is False  # accelerate would make the weights fp32 again
    data = DataArguments()
    built = build_model(model, data, train_tokenizer(TEXTS, vocab_size=320), seed=0)
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in built.buffers()} == {torch.float32}  # frequencies of the rotary embedding
    assert torch.get_default_dtype() == torch.float32


def test_too_little_text(tmp_path, jsonl):
    with pytest.raises(ValueError, match="the train split has too little text for one sequence of 100000 tokens"):
        load_data(arguments(tmp_path, train_file=str(jsonl), max_length=100_000))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--galore_skale", "1"], "unknown argument --galore_skale; did you mean --galore_scale?"),
        (["--train_file", "nowhere.txt"], "--train_file: no such file: nowhere.txt"),
        (["--train_file", "table.csv"], "--train_file: table.csv is none of .txt"),
        (["--model_config", "nowhere.json"], "--model_config: no such file"),
        (["--deepspeed", "nowhere.json"], "'nowhere.json' does not exist"),
        (["--streaming"], "--streaming needs --dataset_name or --train_file"),
        (["--dataset_name", "a", "--train_file", "b"], "exclude each other"),
        (["--rank", "0"], "lowrank.rank must be an integer >= 1, got 0"),
        (["--rank", "many"], "argument --rank: invalid int value: 'many'"),
        (["--optimizer", "galore"], "invalid choice: 'galore'"),
        (["--total_batch_size", "12"], "--total_batch_size 12 is no multiple of --batch_size 8 x 1 ranks"),
        (["--validation_share", "1.5"], "--validation_share must lie between 0 and 1"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--per_device_eval_batch_size", "-2"], "--per_device_eval_batch_size must be at least 1, got -2"),
        (["--gradient_accumulation", "0"], "--gradient_accumulation must be at least 1, got 0"),
        (["--lr", "nan"], "--lr must be a number >= 0, got nan"),
        (["--lr", "-1"], "--lr must be a number >= 0, got -1.0"),
        (["--lr", "inf"], "--lr must be a number >= 0, got inf"),
        (["--max_steps", "0"], "--max_steps must be at least 1, or -1, got 0"),
        (["--weight_decay", "-0.1"], "--weight_decay must be a number >= 0"),
        (["--grad_clipping", "nan"], "--grad_clipping must be a number >= 0"),
        (["--beta1", "1"], "--beta1 must be a number in [0, 1)"),
        (["--adam_epsilon", "0"], "--adam_epsilon must be a number above 0"),
        (["--min_lr_ratio", "2"], "--min_lr_ratio must be a number from 0 to 1"),
        (["--warmup_steps", "-3"], "--warmup_steps must be a number >= 0"),
        (["--eval_every", "0"], "--eval_every must be above 0"),
        (["--seed", "-1"], "--seed must be from 0 to 2**32 - 1"),
        (["--override_lr"], "--override_lr is for --resume"),
        (["--optim", "adafactor"], "asks for another optimizer"),
        (["--dtype", "bfloat16", "--bf16", "true"], "--bf16 keeps an fp32 master copy beside --dtype bfloat16"),
        (["--dtype", "bfloat16", "--deepspeed", ZERO2], "set bf16_master_weights_and_grads in DeepSpeed's file"),
        (["--lowrank_config", "nowhere.json"], "'nowhere.json' does not exist"),
        (["--lowrank_config", ZERO2, "--deepspeed", ZERO2], "the other file has a lowrank block itself"),
    ],
)
def test_bad_command_line(argv, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parse_arguments([*argv, *([] if "--total_batch_size" not in argv else ["--batch_size", "8"])])
    assert message in str(caught.value)


@pytest.mark.parametrize(("given", "steps"), [("0", 0), ("7", 7), ("0.25", 10)])
def test_warmup_is_in_whole_steps_as_transformers_4_wants_them(tmp_path, given, steps):
    args = parse_arguments(f"--warmup_steps {given} --max_steps 40 --output_dir {tmp_path} --report_to none".split())[3]
    assert type(args.warmup_steps) is int
    assert args.warmup_steps == steps


def test_galore_names_are_understood(tmp_path):
    argv = (
        "--batch_size 2 --gradient_accumulation 3 --lr 0.5 --scheduler cosine --min_lr_ratio 0.2 --warmup_steps 7 "
        "--eval_every 10 --num_training_steps 40 --save_every 20 --workers 1 --name x --grad_clipping 0.5 --beta1 0.8 "
        f"--save_dir {tmp_path} --rank 8 --update_proj_gap 5 --galore_scale 0.5 --proj_type right --seed 3 "
        "--activation_checkpointing --max_length 64 --weight_decay 0.1 --report_to none"
    )
    _, data, options, args = parse_arguments(argv.split())
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 3)
    assert (args.learning_rate, args.warmup_steps, args.max_steps) == (0.5, 7, 40)
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert (args.eval_strategy, args.eval_steps, args.save_strategy, args.save_steps) == ("steps", 10, "steps", 20)
    assert (args.max_grad_norm, args.adam_beta1, args.seed) == (0.5, 0.8, 3)
    assert args.gradient_checkpointing
    assert data.max_length == 64
    assert options == {"rank": 8, "update_proj_gap": 5, "scale": 0.5, "proj_type": "right"}
