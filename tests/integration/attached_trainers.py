"""Trainers with the low-rank optimizer attached: tiny models and data, made here. Each rank leaves KIND-RANK.json.

python tests/integration/attached_trainers.py FOLDER [--deepspeed FILE] [--kinds KIND ...]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import ds_lowrank

ds_lowrank.prepare_cpu()

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    set_seed,
)

RANK = os.environ.get("RANK", "0")
LOW_RANK = 4
KINDS = {
    "trainer": "Trainer",
    "seq2seq": "Seq2SeqTrainer",
    "sft": "SFTTrainer",
    "dpo": "DPOTrainer",
    "grpo": "GRPOTrainer",
}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def make_model(folder: Path) -> str:
    """A folder to load it from, as DPO loads its reference."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def make_trainer(kind: str, model: str, folder: Path, **options: Any) -> Any:
    """A Trainer as its documentation makes it: no argument says what the optimizer is."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
        **options,
    }
    words, tokenizer = WORDS[4:], make_tokenizer()
    prompts = [" ".join(words[i : i + 4]) for i in range(16)]
    if kind in ("trainer", "seq2seq"):
        rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(prompts)["input_ids"]]
        trainer, arguments = (
            (Trainer, TrainingArguments) if kind == "trainer" else (Seq2SeqTrainer, Seq2SeqTrainingArguments)
        )
        args = arguments(**settings)  # first: stage 3 then partitions the model as it is loaded
        return trainer(AutoModelForCausalLM.from_pretrained(model), args, train_dataset=rows)

    import trl

    data = {
        "sft": {"text": prompts},
        "dpo": {"prompt": prompts, "chosen": [f" {words[i]}" for i in range(16)], "rejected": [" w50"] * 16},
        "grpo": {"prompt": prompts},
    }[kind]
    common = {"train_dataset": Dataset.from_dict(data), "processing_class": tokenizer}
    if kind == "sft":
        return trl.SFTTrainer(model, args=trl.SFTConfig(max_length=16, **settings), **common)
    if kind == "dpo":
        return trl.DPOTrainer(model, args=trl.DPOConfig(max_length=16, **settings), **common)
    args = trl.GRPOConfig(num_generations=2, max_completion_length=4, **settings)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        # Of one group some differ whatever is sampled: otherwise there is nothing to learn and no gradient.
        return [float(place % 2) for place in range(len(completions))]

    return trl.GRPOTrainer(model, reward_funcs=reward, args=args, **common)


def train(kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What became of a run."""
    model = make_model(folder / f"model{RANK}")  # on each rank, the same
    trainer = make_trainer(kind, model, folder / kind, **options)
    ds_lowrank.attach(trainer, {"rank": LOW_RANK})

    def weights() -> dict[str, Any]:
        # Stage 3 keeps this rank's part there.
        return {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in trainer.model.named_parameters()}

    before = weights()
    trainer.train()
    optimizer = trainer.optimizer
    while not isinstance(optimizer, ds_lowrank.LowRankAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    moved = [name for name, weight in weights().items() if not weight.equal(before[name])]
    newest = ds_lowrank.newest_complete(folder / kind)
    return {
        "trainer": type(trainer).__name__,
        "optimizer": type(optimizer).__name__,
        "layout": optimizer.layout.kind,
        "ranks": trainer.args.world_size,
        "matrices": len(optimizer.matrix_specs),
        "moved": sum(name.endswith("_proj.weight") for name in moved),
        "checkpoint": newest.name if newest else None,
    }


def main() -> None:
    """Train with each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deepspeed")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--local_rank", help="given by the deepspeed launcher, not needed")
    args = parser.parse_args()
    options = {"deepspeed": args.deepspeed} if args.deepspeed else {}
    for kind in args.kinds:
        found = train(kind, args.folder, **options)
        (args.folder / f"{kind}-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
