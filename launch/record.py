"""What a run was told, kept in every checkpoint, and what a run that goes on with one takes of it.

The tuples below are the rule, and a table in docs/checkpoints.md has it in words. Every rank reads the same file and
comes to the same verdict; rank 0 says it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import DataArguments, PretrainArguments
from data import PackedData
from sharding import world_size
from stream import PackedStream
from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_lowrank import LowRankConfig
from ds_lowrank.checkpoint.opening import has_low_rank
from ds_lowrank.integrations.checkpoints import on_rank_0
from ds_lowrank.rules import RULES
from ds_lowrank.selections import SELECTIONS

FILE = "run.json"
# Of the checkpoint: the schedule that has begun goes on, unless --override_lr takes the command line's.
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
# Of the checkpoint: AdamW's options are in its state, and with another seed the data would be dealt anew.
KEPT = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed")
# Of the command line: how long, in which steps and with which clip it goes on.
FREE = ("max_steps", "num_train_epochs", "max_grad_norm", "sequences_per_step", "document_attention")
# Refused where they differ: the states have these shapes and formats. Other options are of the command line, another
# rule or selection too where it keeps the same.
STATE = ("rank", "rank_pattern", "proj_type", "optim_target_modules", "state_dtype", "basis_dtype")
MODEL = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_BLOCK = {"learning_rate": "lr", "weight_decay": "weight_decay", "adam_epsilon": "eps"}  # their names in "lowrank"


def read_record(folder: str | None) -> dict[str, Any]:
    """What the run was told that wrote a checkpoint; of one that has no record the learning rate, if anything.

    Raises:
        ValueError: the record is damaged.
    """
    if folder is None:
        return {}
    path = Path(folder) / FILE
    if not path.is_file():
        return _learning_rate(Path(folder) / "scheduler.pt")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        damage = [part for part in ("arguments", "lowrank", "model", "data") if not isinstance(record[part], dict)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): resume from another checkpoint") from error
    if damage:
        raise ValueError(f"{path} is damaged ({damage[0]}): resume from another checkpoint")
    return record


def _learning_rate(schedule: Path) -> dict[str, Any]:
    try:
        rates = torch.load(schedule, weights_only=True)["base_lrs"]
        return {"arguments": {"learning_rate": float(rates[0])}}
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, IndexError, TypeError, ValueError):
        return {}  # another kind of schedule, or none: the Trainer has more to say about it


def take_up(record: dict[str, Any], args: PretrainArguments, options: dict[str, Any]) -> dict[str, Any]:
    """Set the arguments that go on as the checkpoint has them, and say which were others.

    Args:
        record: of the checkpoint.
        args: the training arguments, changed in place.
        options: of the ``"lowrank"`` block.

    Returns:
        The options, without those of AdamW that the checkpoint has.
    """
    before = record.get("arguments", {})
    asked = _arguments(args, options)
    options = dict(options)
    for name in KEPT if args.override_lr else (*SCHEDULE, *KEPT):
        if name not in before or name not in asked:
            continue
        if before[name] != asked[name]:
            how = "; --override_lr takes the command line's" if name in SCHEDULE else ""
            _say(args, f"--{name} {before[name]} as in the checkpoint, not {asked[name]}{how}")
        setattr(args, name, before[name])
        options.pop(_BLOCK.get(name, name), None)
    if "adam_beta1" in before:
        options.pop("betas", None)
    return options


def make_record(
    args: PretrainArguments, config: LowRankConfig, model: PretrainedConfig, data: DataArguments
) -> dict[str, Any]:
    """What this run is told: JSON values."""
    lowrank = config.to_dict()
    told = {
        "optimizer": args.optimizer,
        **_arguments(args, lowrank),
        **{name: getattr(args, name) for name in FREE if hasattr(args, name)},
        "sequences_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size(),
        "document_attention": data.document_attention,
    }
    shape = {name: getattr(model, name) for name in MODEL if hasattr(model, name)}
    record = {"arguments": told, "lowrank": lowrank, "model": shape, "data": {"max_length": data.max_length}}
    return json.loads(json.dumps(record))


def describe_data(data: PackedData) -> dict[str, Any]:
    """What tells one set of packed sequences and one tokenizer from another; a stream has a position of its own."""
    words = json.dumps(sorted(data.tokenizer.get_vocab().items()))
    found: dict[str, Any] = {"tokenizer": hashlib.sha256(words.encode()).hexdigest()}
    if not isinstance(data.train, PackedStream):
        rows = {0, len(data.train) // 2, len(data.train) - 1}
        some = [np.asarray(data.train[row]["input_ids"], dtype=np.int64).tobytes() for row in sorted(rows)]
        found |= {"sequences": len(data.train), "tokens": hashlib.sha256(b"".join(some)).hexdigest()}
    return found


def compare(before: dict[str, Any], here: dict[str, Any], args: PretrainArguments) -> None:
    """Refuse what the states of a checkpoint do not fit, and say what else is different from then on.

    Args:
        before: record of the checkpoint.
        here: of this run.
        args: the training arguments.

    Raises:
        ValueError: the optimizer, the model, or an option that decides about the states is another.
    """
    if not args.resume_from_checkpoint:
        return
    _compare_optimizers(before, args)
    was, now = before.get("arguments", {}), here["arguments"]
    parts: list[tuple[str, tuple[str, ...]]] = [("model", MODEL)]
    if now["optimizer"] == was.get("optimizer") == "lowrank":
        parts.append(("lowrank", STATE))
    for part, names in parts:
        old = before.get(part, {})
        for name in names:
            if name in old and old[name] != here[part].get(name):
                raise _Refusal(args, f"{part}.{name} = {old[name]!r}", f"{here[part].get(name)!r}")
    if parts[1:]:
        _compare_slots(before.get("lowrank", {}), here["lowrank"], args)
    length = before.get("data", {}).get("max_length", here["data"]["max_length"])
    if length != here["data"]["max_length"]:
        _other_data(args, f"--max_length {length}", f"{here['data']['max_length']}")
    for name in FREE:
        if name in was and was[name] != now.get(name):
            more = "; the position in the data counts steps" if name == "sequences_per_step" else ""
            _say(args, f"{name} {now.get(name)}, and {was[name]} before{more}")
    hyper = {"lr", "betas", "eps", "weight_decay", "accumulation_steps"}
    for name, value in here["lowrank"].items() if parts[1:] else ():
        old = before["lowrank"].get(name, value)
        if old != value and name not in hyper:
            _say(args, f"lowrank.{name} {value!r}, and {old!r} before")


def _compare_slots(before: dict[str, Any], here: dict[str, Any], args: PretrainArguments) -> None:
    """Refuse a rule or a selection that keeps something else than the one that wrote the states.

    Args:
        before, here: options; a record of then may not have them all.
        args: the training arguments.

    Raises:
        ValueError: see above; or the one of then is not registered here.
    """
    methods = []
    for options in (before, here):
        asked = {**{f.name: f.default for f in fields(LowRankConfig) if f.name in ("rule", "selection")}, **options}
        rule, selection = RULES.make(asked["rule"]), SELECTIONS.make(asked["selection"])
        kept = [slot.name for slot in (*rule.slots, *selection.kept_slots())]
        methods.append((set(kept), f"rule {rule.name!r} and selection {selection.name!r} ({', '.join(kept)})"))
    if methods[0][0] != methods[1][0]:
        raise _Refusal(args, methods[0][1], methods[1][1])


def compare_data(before: dict[str, Any], here: dict[str, Any], args: PretrainArguments) -> None:
    """Refuse other data than a checkpoint's, whose position they do not have, unless they are to begin anew.

    Raises:
        ValueError: see above; or the tokenizer is another.
    """
    if not args.resume_from_checkpoint:
        return
    was, now = before.get("data", {}), here["data"]
    if was.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
        raise _Refusal(args, "another tokenizer", "its own: give the same --tokenizer_name, or --train_file")
    if "tokens" in was and was["max_length"] == now["max_length"]:
        if "tokens" not in now:
            _other_data(args, f"{was['sequences']} sequences", "a stream")
        elif was["tokens"] != now["tokens"]:
            _other_data(args, f"{was['sequences']} sequences of other tokens", f"{now['sequences']}")


class RunRecord(TrainerCallback):
    """Writes what a run was told into each of its checkpoints, before they count.

    Args:
        record: JSON values.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record

    def on_save(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE).write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

        on_rank_0(write, "writing what the run was told")


def override_schedule(scheduler: Any, rate: float) -> None:
    """Go on with the command line's schedule where a checkpoint's was loaded, at the same step of it.

    Args:
        scheduler: the Trainer's, which has loaded the checkpoint's.
        rate: the peak learning rate.

    Raises:
        ValueError: the schedule depends on more than the step.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(f"--override_lr: a {type(scheduler).__name__} depends on more than the step: leave it out")
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [rate] * len(groups)
    for group, share in zip(groups, scheduler.lr_lambdas):
        group["initial_lr"], group["lr"] = rate, rate * share(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


class _Refusal(ValueError):
    """What a checkpoint has and this run has not."""

    def __init__(self, args: PretrainArguments, there: str, here: str) -> None:
        super().__init__(
            f"--resume: {args.resume_from_checkpoint} was written with {there} and this run has {here}: resume as it "
            "was, or start a new run"
        )


def _compare_optimizers(before: dict[str, Any], args: PretrainArguments) -> None:
    was = before.get("arguments", {}).get("optimizer")
    if was is None and args.optimizer != "lowrank" and has_low_rank(str(args.resume_from_checkpoint)):
        was = "lowrank"
    if was in (None, args.optimizer):
        return
    if args.optimizer != "lowrank":
        raise _Refusal(args, f"--optimizer {was}", f"--optimizer {args.optimizer}")
    _say(args, f"--optimizer lowrank, and {was} before: its weights, with fresh moments and subspaces")


def _other_data(args: PretrainArguments, there: str, here: str) -> None:
    if not args.ignore_data_skip:
        raise ValueError(
            f"--resume: {args.resume_from_checkpoint} was trained on other data ({there}, and here {here}), in which "
            "its position means nothing: give the same data, or begin these at their beginning, --ignore_data_skip"
        )
    _say(args, f"other data ({there} before, and here {here}), from their beginning (--ignore_data_skip)")


def _arguments(args: PretrainArguments, options: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer and its schedule get: the block's options stand before the arguments."""
    told = {name: getattr(args, name) for name in (*SCHEDULE, *KEPT) if hasattr(args, name)}
    told["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if args.optimizer == "lowrank":
        own = {name: options.get(key) for name, key in _BLOCK.items()}
        own["adam_beta1"], own["adam_beta2"] = options.get("betas") or (None, None)
        told |= {name: value for name, value in own.items() if value is not None}
    return told


def _say(args: PretrainArguments, text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"--resume: {text}", flush=True)
