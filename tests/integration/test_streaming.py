"""launch/pretrain.py on a stream of shards, one of them broken: counted, and resumed where it was, bit by bit."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from launching import EIGHT_STEPS, config, flags, launch, start
from safetensors.torch import load_file

from ds_lowrank import manifest

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
BROKEN = "corpus-train-00001-of-00004.json.gz"


@pytest.fixture(scope="module")
def shards(workplace):
    """The corpus as C4 lies on disk."""
    folder = workplace / "shards"
    folder.mkdir()
    documents = (workplace / "corpus.txt").read_text().split("\n\n")
    for shard in range(4):
        lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents[shard::4])
        content = gzip.compress(lines.encode())
        path = folder / f"corpus-train-{shard:05d}-of-00004.json.gz"
        path.write_bytes(content[: len(content) // 2] if path.name == BROKEN else content)
    return folder


def test_a_stream_goes_on_bit_by_bit_and_counts_what_is_broken(workplace, shards):
    options = {
        **EIGHT_STEPS,
        "train_file": shards / "*.json.gz",
        "streaming": True,
        "document_attention": True,
        "save_every": 4,
        "report_to": "none",
    }
    printed = launch(workplace, "deepspeed", *config("zero2"), *flags(workplace, "streamed", **options))
    whole = workplace / "streamed"
    metrics = json.loads((whole / "metrics.json").read_text())
    assert list(metrics["skipped_shards"]) == [str(shards / BROKEN)]
    assert "EOFError" in metrics["skipped_shards"][str(shards / BROKEN)]
    assert "1 shard could not be read to its end" in printed

    checkpoint = whole / "checkpoint-4"
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*")}
    assert {"stream_0.pt", "stream_1.pt"} <= names
    manifest.verify(checkpoint)
    again = flags(workplace, "streamed_again", **options, resume_from_checkpoint=checkpoint)
    done = start(workplace, "deepspeed", *config("zero2"), *again)
    assert done.returncode == 0, done.stderr[-4000:]
    # The Trainer would come to the same batches by reading all before them again.
    assert "read again" not in done.stderr
    assert "1 shard could not be read to its end" in done.stdout, "it is known from the position"
    here, there = (load_file(folder / "model.safetensors") for folder in (workplace / "streamed_again", whole))
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())

    for path in (whole / "checkpoint-8").glob("stream_*.pt"):
        state = torch.load(path, weights_only=True)
        assert (state["step"], state["world_size"]) == (8, 2)
        assert state["stream"]["rows"] + state["stream"]["ahead"] == 8 * 2 * 2
