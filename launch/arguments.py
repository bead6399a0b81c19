"""Command line of the launch scripts: model, data, training and low-rank arguments.

GaLore's ``torchrun_main.py`` names are kept as aliases where they mean the same. A dataclass refuses bad values when
it is made; the ones that cost nothing to check come first, so that a wrong path never waits for a process group.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from files import is_tokens, text_files
from resuming import resolve_resume
from sharding import accelerates_deepspeed_file, check_checkpoints, check_launch, read_config, world_size
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

import ds_lowrank
from ds_lowrank.integrations.galore_arguments import complete_options
from ds_lowrank.registry import import_methods

ROOT = Path(__file__).resolve().parents[1]
TOKEN_DTYPES = ("uint16", "uint32", "int32")
WEIGHT_DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("lowrank", "adamw", "frozen")
# Peak learning rates of the default run, tuned for each by benchmarks/first_run.py.
LEARNING_RATES = {"lowrank": 0.005, "adamw": 0.002, "frozen": 0.005}
# Flag, field, what it must be, and whether a number is that.
_RANGES: tuple[tuple[str, str, str, Callable[[float], bool]], ...] = (
    ("batch_size", "per_device_train_batch_size", "at least 1", lambda x: x >= 1),
    ("per_device_eval_batch_size", "per_device_eval_batch_size", "at least 1", lambda x: x >= 1),
    ("gradient_accumulation", "gradient_accumulation_steps", "at least 1", lambda x: x >= 1),
    ("max_steps", "max_steps", "at least 1, or -1", lambda x: x >= 1 or x == -1),
    ("num_train_epochs", "num_train_epochs", "above 0", lambda x: x > 0),
    ("lr", "learning_rate", "a number >= 0", lambda x: x >= 0),
    ("min_lr_ratio", "min_lr_ratio", "a number from 0 to 1", lambda x: 0 <= x <= 1),
    ("warmup_steps", "warmup_steps", "a number >= 0", lambda x: x >= 0),
    ("weight_decay", "weight_decay", "a number >= 0", lambda x: x >= 0),
    ("grad_clipping", "max_grad_norm", "a number >= 0", lambda x: x >= 0),
    ("beta1", "adam_beta1", "a number in [0, 1)", lambda x: 0 <= x < 1),
    ("adam_beta2", "adam_beta2", "a number in [0, 1)", lambda x: 0 <= x < 1),
    ("adam_epsilon", "adam_epsilon", "a number above 0", lambda x: x > 0),
    ("eval_every", "eval_steps", "above 0", lambda x: x > 0),
    ("save_every", "save_steps", "at least 0", lambda x: x >= 0),
    ("logging_steps", "logging_steps", "above 0", lambda x: x > 0),
    ("workers", "dataloader_num_workers", "at least 0", lambda x: x >= 0),
    ("seed", "seed", "from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
)
_BASE_FIELDS = {f.name for f in fields(TrainingArguments)}


@dataclass
class ModelArguments:
    """The model, which is trained from scratch."""

    model_config: str = HfArg(
        default=str(ROOT / "configs" / "llama_9m.json"),
        help="model configuration: a JSON file (configs/llama_*.json) or a name on the Hugging Face Hub; its "
        "vocabulary size is replaced by the tokenizer's",
    )
    attn_implementation: str | None = HfArg(
        default=None, help="sdpa, flash_attention_2, eager, ...; default: what transformers takes for the model"
    )
    dtype: str = HfArg(
        default="float32",
        help="of the weights: float32, or bfloat16 without an fp32 master copy, which wants --stochastic_rounding true "
        "(one process, DDP, FSDP2; DeepSpeed's file says it there)",
        metadata={"choices": WEIGHT_DTYPES},
    )

    def __post_init__(self) -> None:
        if self.model_config.endswith(".json") and not Path(self.model_config).is_file():
            raise FileNotFoundError(f"--model_config: no such file: {self.model_config}")


@dataclass
class DataArguments:
    """The text, the tokenizer and the packed sequences."""

    dataset_name: str | None = HfArg(
        default=None,
        help="dataset on the Hugging Face Hub, e.g. allenai/c4. Without it and without --train_file the corpus is "
        "the source text of the running Python's standard library",
    )
    dataset_config: str | None = HfArg(default=None, help="configuration of --dataset_name, e.g. en")
    train_file: str | None = HfArg(
        default=None,
        help="local corpus: .txt (a document is a paragraph), .jsonl or .parquet (a document is a row), compressed or "
        "not, a folder of them or a pattern in quotes, 'c4/en/c4-train.*.json.gz'; or tokens (which need "
        "--tokenizer_name): a .bin, an .arrow file or a folder of Dataset.save_to_disk with input_ids",
    )
    validation_file: str | None = HfArg(
        default=None, help="local validation corpus; default: a share of --train_file is held out"
    )
    token_dtype: str | None = HfArg(
        default=None, help="of a token in a .bin file; default: uint16", metadata={"choices": TOKEN_DTYPES}
    )
    text_column: str = HfArg(default="text", help="column that holds the text of a document")
    validation_share: float = HfArg(
        default=0.05, help="share of the documents held out where there is no validation split"
    )
    streaming: bool = HfArg(default=False, help="read and pack the training text as it is needed; needs --max_steps")
    tokenizer_name: str | None = HfArg(
        default=None,
        help="tokenizer on the Hub or in a folder, e.g. t5-base; default: a byte-level BPE is trained on the corpus",
    )
    vocab_size: int = HfArg(default=1024, help="vocabulary of the BPE that is trained")
    max_length: int = HfArg(default=256, aliases=["--block_size"], help="tokens in a packed sequence")
    document_attention: bool = HfArg(
        default=False,
        help="keep attention inside each document of a packed sequence, and positions counted from its beginning",
    )
    eval_sequences: int = HfArg(default=1024, help="most validation sequences used in an evaluation")
    cache_dir: str | None = HfArg(default=None, help="where tokenized corpora are kept; default: ~/.cache/ds_lowrank")

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_file:
            raise ValueError("--dataset_name and --train_file exclude each other: give one of them")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs --train_file")
        if self.dataset_config and not self.dataset_name:
            raise ValueError("--dataset_config needs --dataset_name")
        if self.streaming and not (self.dataset_name or self.train_file):
            raise ValueError("--streaming needs --dataset_name or --train_file")
        for flag in ("train_file", "validation_file"):
            path = getattr(self, flag)
            if path is not None and not is_tokens(path):
                text_files(flag, path)
        if self.train_file and self.validation_file and is_tokens(self.train_file) != is_tokens(self.validation_file):
            raise ValueError("--validation_file: give tokens for both splits, or text for both")
        if self.train_file and is_tokens(self.train_file):
            self._check_tokens()
        if self.token_dtype and not (self.train_file or "").endswith(".bin"):
            raise ValueError("--token_dtype is for --train_file tokens.bin: leave it out")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation_share must lie between 0 and 1, got {self.validation_share}")
        for flag, least in (("vocab_size", 300), ("max_length", 2), ("eval_sequences", 1)):
            if getattr(self, flag) < least:
                raise ValueError(f"--{flag} must be at least {least}, got {getattr(self, flag)}")

    def _check_tokens(self) -> None:
        assert self.train_file is not None
        if not Path(self.train_file).exists():
            raise FileNotFoundError(f"--train_file: no such file: {self.train_file}")
        if not self.tokenizer_name:
            raise ValueError(f"--train_file {self.train_file} is tokens: say of which tokenizer, --tokenizer_name")
        if self.streaming:
            raise ValueError("--streaming is for text: leave it out, files of tokens are mapped and not read")
        if self.validation_file and self.train_file.endswith(".bin") != self.validation_file.endswith(".bin"):
            raise ValueError("--validation_file: give Arrow data for both splits, or .bin files for both")


@dataclass
class LowRankArguments:
    """Overrides of the ``"lowrank"`` block of the DeepSpeed or FSDP file; unset ones leave the block as it is."""

    lowrank_config: str | None = HfArg(
        default=None, help="JSON file with a lowrank block, for one process and DDP; the others' files have one"
    )
    rank: int | None = HfArg(
        default=None,
        help="rank of the projected weights; default: the block's, else a quarter of the model's hidden size",
    )
    update_proj_gap: int | None = HfArg(default=None, help="steps between two refreshes of a basis")
    scale: float | None = HfArg(default=None, aliases=["--galore_scale"], help="factor on the low-rank update")
    proj_type: str | None = HfArg(default=None, help="side that is projected: std, reverse_std, ...")
    methods: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--import"],
            "action": "extend",  # it may be given again, as to ds-lowrank
            "help": "files.py or modules that register rules and selections of your own, imported on every rank; may "
            "be given again",
        },
    )
    rule: str | None = HfArg(
        default=None, help="how gradients become a direction: adamw, grams, fira, apollo, apollo_mini"
    )
    rule_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON mapping of the rule's own options"}
    )
    selection: str | None = HfArg(
        default=None, help="importance (SARA), dominant (GaLore), uniform, random, gaussian (APOLLO) or online_pca"
    )
    selection_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON mapping of the selection's own options"}
    )
    moments: str | None = HfArg(default=None, help="moments at a refresh: keep or project")
    shard_projection: bool | None = HfArg(
        default=None, help="ranks that share a matrix keep a part of its basis each (true), or all of it (false)"
    )
    state_dtype: str | None = HfArg(default=None, help="how moments are kept: fp32, bf16 or int8")
    basis_dtype: str | None = HfArg(default=None, help="how bases are kept: fp32, bf16, int8 or int4")
    stochastic_rounding: bool | None = HfArg(default=None, help="of bf16 weights without an fp32 master copy")
    layerwise: bool | None = HfArg(
        default=None, help="step in the backward pass and free each gradient at once; needs --grad_clipping 0"
    )
    gradients: str | None = HfArg(
        default=None,
        help="full; projected: project each gradient in the backward pass and free it, so that what is accumulated, "
        "sent and clipped is its projection",
    )
    accumulator_dtype: str | None = HfArg(
        default=None, help="in which projected gradients are added up: fp32, or bf16, rounded stochastically"
    )

    def options(self, block: dict[str, Any], targets: list[str] | None) -> dict[str, Any]:
        """``block`` with the options and target modules that were given over it."""
        import_methods(self.methods or ())
        known = (f.name for f in fields(self) if f.name not in ("methods", "lowrank_config"))
        given = {name: value for name in known if (value := getattr(self, name)) is not None}
        for name in ("rule_options", "selection_options"):
            if isinstance(given.get(name), str):
                try:
                    given[name] = json.loads(given[name])
                except ValueError as error:
                    raise ValueError(f"--{name} {given[name]!r} is not JSON: {error}") from error
        if targets:  # one is "all-linear" or a regular expression, several are names
            given["optim_target_modules"] = targets[0] if len(targets) == 1 else targets
        return {**block, **given}


@dataclass
class PretrainArguments(TrainingArguments):
    """``TrainingArguments`` with defaults for pretraining, and GaLore's flag names.

    Without an accelerator it trains on the CPU in fp32 by itself; with one, in bf16 where the device supports it.
    """

    optimizer: str = HfArg(
        default="lowrank",
        help="lowrank; adamw: full rank, the peer; frozen: the weights that lowrank projects stay as they are and "
        "AdamW trains the rest, the control",
        metadata={"choices": OPTIMIZERS},
    )
    output_dir: str | None = HfArg(default=None, aliases=["--save_dir"], help="default: runs/<run_name>")
    run_name: str | None = HfArg(default="pretrain", aliases=["--name"])
    max_steps: int = HfArg(
        default=1600,
        aliases=["--num_training_steps"],
        help="optimizer steps; -1: train for --num_train_epochs",
    )
    per_device_train_batch_size: int = HfArg(
        default=2, aliases=["--batch_size"], help="sequences per rank and micro-step"
    )
    per_device_eval_batch_size: int | None = HfArg(
        default=None, help="default: --batch_size, with which an evaluation needs no more memory than training"
    )
    gradient_accumulation_steps: int = HfArg(default=1, aliases=["--gradient_accumulation"])
    total_batch_size: int | None = HfArg(
        default=None, help="sequences per step over all ranks; sets the accumulation steps"
    )
    learning_rate: float | None = HfArg(
        default=None,
        aliases=["--lr"],
        help="peak learning rate; default: " + ", ".join(f"{lr} for {name}" for name, lr in LEARNING_RATES.items()),
    )
    lr_scheduler_type: str = HfArg(
        default="cosine",
        aliases=["--scheduler"],
        help="cosine decays to --min_lr_ratio; the Trainer's other schedules are taken as they are",
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON mapping of options of the schedule"}
    )
    min_lr_ratio: float = HfArg(default=0.1, help="last learning rate as a share of the peak")
    warmup_steps: float | None = HfArg(default=None, help="steps, or a share of all steps when below 1; default: 0.1")
    max_grad_norm: float = HfArg(default=1.0, aliases=["--grad_clipping"])
    adam_beta1: float = HfArg(default=0.9, aliases=["--beta1"])
    # The Trainer's default searches every graph for parameters that a model like these does not have.
    ddp_find_unused_parameters: bool | None = HfArg(default=False)
    optim: str = HfArg(
        default="adamw_torch",
        help="of --optimizer adamw and frozen; with lowrank galore_adamw and its kin are taken for the options that "
        "they stand for, and others are refused",
    )
    optim_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "overrides the block: all-linear, a regular expression on module names, or names"},
    )
    eval_steps: float | None = HfArg(
        default=None, aliases=["--eval_every"], help="steps between evaluations; default: at the end"
    )
    save_steps: float = HfArg(default=0, aliases=["--save_every"], help="steps between checkpoints; default: none")
    save_strategy: str = HfArg(default="no")
    eval_strategy: str = HfArg(default="no")
    logging_steps: float = HfArg(default=20)
    # Not None: the base class would hide the bar because transformers' log level is "error" here.
    disable_tqdm: bool | None = HfArg(default=False)
    report_to: str | None = HfArg(default="tensorboard", help="tensorboard, wandb, none, ... (the Trainer's flag)")
    dataloader_num_workers: int = HfArg(default=0, aliases=["--workers"])
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="folder of a checkpoint, or true for the newest complete one in --output_dir",
    )
    resume: bool = HfArg(
        default=False,
        help="go on with the newest complete checkpoint in --output_dir, or start where there is none: the same "
        "command the first time and after every crash or preemption; with --resume_from_checkpoint it starts there",
    )
    override_lr: bool = HfArg(
        default=False,
        help="resume with the learning rate and the schedule of the command line, at the checkpoint's step of it; "
        "default: the checkpoint's",
    )
    resumed_step: int = field(default=0, init=False)  # the step that this run starts at
    save_total_limit: int | None = HfArg(default=None, help="checkpoints that are kept; default: all")
    bf16: bool | None = HfArg(default=None, help="default: on an accelerator that supports it")
    if "activation_checkpointing" not in _BASE_FIELDS:  # transformers < 5 has the older name only
        gradient_checkpointing: bool = HfArg(default=False, aliases=["--activation_checkpointing"])

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.fsdp_config:
            self.fsdp = True  # without it the Trainer passes over the file
        self._choose_device()
        check_launch(self)
        self._resolve_batch()
        self._resolve_schedule()
        if self.output_dir is None:
            self.output_dir = str(Path("runs") / (self.run_name or "pretrain"))
        if self.eval_steps and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        if self.save_steps and self.save_strategy == "no":
            self.save_strategy = "steps"
        resolve_resume(self)
        check_checkpoints(self, self.optimizer == "lowrank")
        super().__post_init__()

    def _check_numbers(self) -> None:
        """Refuse what would end a run much later, in an error of somebody else's."""
        for flag, name, what, allowed in _RANGES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and allowed(value)):
                raise ValueError(f"--{flag} must be {what}, got {value}")

    def _choose_device(self) -> None:
        if not torch.cuda.is_available():
            self.use_cpu = True
        if self.use_cpu:
            # Has to come before anything initialises torch.distributed, which the base class does.
            ds_lowrank.prepare_cpu()
        if self.bf16 is None:
            self.bf16 = not (self.use_cpu or self.fp16) and torch.cuda.is_bf16_supported()

    def _resolve_batch(self) -> None:
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.total_batch_size is None:
            return
        micro = self.per_device_train_batch_size * world_size()
        if self.total_batch_size < 1 or self.total_batch_size % micro:
            raise ValueError(
                f"--total_batch_size {self.total_batch_size} is no multiple of --batch_size "
                f"{self.per_device_train_batch_size} x {world_size()} ranks"
            )
        self.gradient_accumulation_steps = self.total_batch_size // micro

    def _resolve_schedule(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.optimizer]
        if self.lr_scheduler_type == "cosine":
            self.lr_scheduler_type = "cosine_with_min_lr"
            self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or {"min_lr_rate": self.min_lr_ratio}
        warmup = 0.1 if self.warmup_steps is None else self.warmup_steps
        if 0 < warmup < 1 and self.max_steps > 0:
            warmup = max(1, round(warmup * self.max_steps))
        if 0 < warmup < 1 and "warmup_ratio" in _BASE_FIELDS:  # transformers < 5: steps are whole
            self.warmup_ratio, warmup = warmup, 0
        self.warmup_steps = int(warmup) if warmup == int(warmup) else warmup  # transformers 4 refuses 0.0


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        """Raise instead of printing the whole usage once per rank."""
        raise ValueError(message)


def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, dict[str, Any], PretrainArguments]:
    """Read the command line.

    Args:
        argv: arguments without the program's name.

    Returns:
        model arguments, data arguments, low-rank options (the file's block, the flags over it) and training
        arguments.

    Raises:
        ValueError: unknown flag (with the nearest known one), a bad value, flags that contradict each other, or a
            launcher or setting that is not supported.
        FileNotFoundError: a file that is named does not exist.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, LowRankArguments, PretrainArguments),
        prog="pretrain.py",
        description="Pretrain a LLaMA from scratch with low-rank optimizers under DeepSpeed ZeRO, FSDP2 or DDP.",
        allow_abbrev=False,
    )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = sorted(parser._option_string_actions)
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        hint = f"; did you mean {near[0]}?" if near else " (--help lists the flags)"
        raise ValueError(f"unknown argument {unknown[0]}{hint}")
    values = vars(given)
    values["deepspeed"] = values["deepspeed"] or accelerates_deepspeed_file()

    def make(kind: Any) -> Any:
        return kind(**{f.name: values[f.name] for f in fields(kind) if f.init})

    model, data = make(ModelArguments), make(DataArguments)
    options = _low_rank_options(make(LowRankArguments), values)
    if model.dtype == "bfloat16":
        _compute_plainly(values)
    # Last, because it starts the process group.
    training = make(PretrainArguments)
    if training.optimizer == "adamw" and (ignored := make(LowRankArguments).options({}, None)):
        raise ValueError(f"--optimizer adamw has no subspaces: leave --{' --'.join(ignored)} out")
    if training.override_lr and not (training.resume or training.resume_from_checkpoint):
        raise ValueError("--override_lr is for --resume and --resume_from_checkpoint: leave it out")
    if training.optimizer == "lowrank":
        if training.optim_target_modules:
            training.optim_target_modules = options["optim_target_modules"]
        options = complete_options(options, training)
    if data.streaming and training.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: a stream has no length")
    if data.streaming and training.dataloader_num_workers:
        raise ValueError(
            "--streaming: a stream knows its position in the process that trains: leave --dataloader_num_workers at 0"
        )
    return model, data, options, training


def _compute_plainly(values: dict[str, Any]) -> None:
    """Leave mixed precision out: accelerate makes bf16 weights fp32 for it.

    Raises:
        ValueError: it is asked for, or DeepSpeed's file says what the weights are.
    """
    if values["deepspeed"]:
        raise ValueError(
            "--dtype bfloat16 is for one process, DDP and FSDP2: leave it out, and set bf16_master_weights_and_grads "
            "in DeepSpeed's file"
        )
    if values["bf16"]:
        raise ValueError("--bf16 keeps an fp32 master copy beside --dtype bfloat16, which has none: leave --bf16 out")
    values["bf16"] = False


def _low_rank_options(args: LowRankArguments, values: dict[str, Any]) -> dict[str, Any]:
    """Block and flags together, checked as far as they can be without the model."""
    block = read_config(values["deepspeed"], values["fsdp_config"], args.lowrank_config).get("lowrank", {})
    options = args.options(block, values["optim_target_modules"])
    ds_lowrank.LowRankConfig.from_dict(options)
    return options
