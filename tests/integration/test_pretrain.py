"""launch/pretrain.py by the ``deepspeed`` launcher on two CPU ranks: the update, the table, the artefacts, refusals.

A start costs about 15 s, so one run serves several tests, and bad input is tried in this process where it can be.
"""

import json
import math
import re

import pretrain
import pytest
import torch
from launching import RANK, ROOT, config, flags, launch, start
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

PROJECTED = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")


@pytest.fixture(scope="module")
def one_step(workplace):
    argv = flags(workplace, max_steps=1, warmup_steps=0, weight_decay=0, lr=0.01)
    return workplace / "model", launch(workplace, "deepspeed", *config("zero1"), *argv)


@pytest.mark.launcher
@pytest.mark.slow
def test_a_step_moves_every_projected_weight_by_a_low_rank_update(one_step):
    folder, _ = one_step
    after = load_file(folder / "model.safetensors")
    set_seed(7)
    before = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    assert set(after) == set(before)
    projected = [name for name in after if PROJECTED.search(name)]
    assert len(projected) == 28
    for name, weight in after.items():
        moved = (weight - before[name]).double()
        assert moved.abs().max() > 0, f"{name} did not move"
        if name in projected:
            values = torch.linalg.svdvals(moved)
            # Beyond the rank there is only the rounding of an fp32 weight.
            assert values[RANK] < 1e-3 * values[0], f"{name} moved by more than rank {RANK}: {values[: RANK + 2]}"
            assert values[RANK - 1] > 1e-2 * values[0], f"{name} moved by less than rank {RANK}"


@pytest.mark.launcher
def test_prints_what_is_projected_before_the_first_step(zero2_run):
    _, printed = zero2_run
    table = printed[: printed.index("step      1")]
    for shape, count in (("128 x 128", 16), ("352 x 128", 8), ("128 x 352", 4)):
        assert re.search(rf"{shape}\D+{count}\D+{RANK}\D", table), table
    assert "not projected" in table
    assert "model.embed_tokens.weight" in table
    assert re.search(r"optimizer state per rank.*AdamW", table)
    assert "2 ranks" in table


@pytest.mark.launcher
def test_leaves_a_model_a_tokenizer_and_metrics(zero2_run):
    folder, printed = zero2_run
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert 1 < metrics["perplexity"] < 1000
    assert (metrics["steps"], metrics["tokens"], metrics["world_size"]) == (8, 8 * 2 * 2 * 2 * 64, 2)
    assert metrics["lowrank"]["rank"] == RANK
    assert f"validation perplexity: {metrics['perplexity']:.3f}" in printed


@pytest.mark.launcher
def test_logs_training_and_subspaces(zero2_run):
    folder, printed = zero2_run
    scalars = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    for tag in ("loss", "learning_rate", "grad_norm"):
        assert len(scalars[f"train/{tag}"]) == 8
    assert scalars["train/loss"][-1] < scalars["train/loss"][0]
    assert len(scalars["train/tokens_per_second"]) == 7
    assert "eval/loss" in scalars
    lowrank = {tag.split("/", 1)[1] for tag in scalars if "lowrank" in tag}
    assert {"lowrank/refresh_seconds", "lowrank/overlap"} <= lowrank, scalars.keys()
    overlap = next(values for tag, values in scalars.items() if tag.endswith("lowrank/overlap"))
    assert all(0 <= value <= 1 for value in overlap)
    assert re.search(r"step +8 +loss [\d.]+ +lr \S+ +grad norm \S+ +tokens/s [\d,]+", printed)


@pytest.mark.launcher
@pytest.mark.slow
def test_a_bad_option_ends_all_ranks_before_training(workplace):
    content = json.loads((ROOT / "configs" / "zero2.json").read_text())
    content["lowrank"]["update_gap"] = 10
    path = workplace / "bad.json"
    path.write_text(json.dumps(content))
    argv = ["--deepspeed", str(path), *flags(workplace, "bad", max_steps=1)]
    done = start(workplace, "deepspeed", *argv)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "error: unknown option lowrank.update_gap; did you mean 'update_proj_gap'?" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (workplace / "bad").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_target_modules": "nothing_like_this"}, "'nothing_like_this' matches no trainable linear layer"),
        ({"rank": 0}, "lowrank.rank must be an integer >= 1, got 0"),
        ({"rank": 1000}, "1000"),
        ({"train_file": "missing.jsonl"}, "--train_file: no such file: missing.jsonl"),
        ({"deepspeed": "missing.json"}, "'missing.json' does not exist"),
        ({"model_config": "missing.json"}, "--model_config: no such file: missing.json"),
        ({"batch_size": 100_000}, "less than one step of 100000"),
        ({"tokenizer_name": "./no/such/tokenizer"}, "no/such/tokenizer"),
        ({"deepspeed": ROOT / "configs" / "zero2.json"}, "--deepspeed needs a launcher"),
        ({"fsdp_config": ROOT / "configs" / "fsdp2.json"}, "--fsdp_config needs a launcher"),
        ({"fsdp_config": "missing.json"}, "'missing.json' does not exist"),
        ({"optimizer": "adamw"}, "--optimizer adamw has no subspaces: leave --rank out"),
        ({"resume_from_checkpoint": "true"}, "there is no checkpoint in"),
        ({"no_such_flag": 1}, "unknown argument --no_such_flag"),
    ],
)
def test_bad_input_is_refused(workplace, capfd, options, message):
    assert pretrain.main(flags(workplace, "refused", max_steps=1, **options)) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (workplace / "refused").exists()
