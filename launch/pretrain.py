"""Pretrain a LLaMA from scratch with a low-rank optimizer on the Hugging Face Trainer.

    deepspeed launch/pretrain.py --deepspeed configs/zero2.json
    torchrun --nproc-per-node 2 launch/pretrain.py --fsdp_config configs/fsdp2.json
    torchrun --nproc-per-node 2 launch/pretrain.py
    python launch/pretrain.py

train a small model on the source text of Python's standard library, on the GPUs or, without one, on the CPU (where FSDP
is not to be had, and ``deepspeed --num_accelerators 2`` starts two ranks): the same trajectory each. They print the
validation perplexity and leave the model, its tokenizer, ``metrics.json`` and a TensorBoard log in ``runs/pretrain``.
``--help`` lists the flags.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from arguments import DataArguments, ModelArguments, PretrainArguments, parse_arguments
from data import Collator, PackedData, load_data
from position import StreamPosition
from record import RunRecord, compare, compare_data, describe_data, make_record, read_record, take_up
from sharding import check_trainer
from stream import PackedStream
from torch import Tensor
from torch.utils.data import Subset
from trainer import NotStarted, PretrainTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state

import ds_lowrank
from ds_lowrank.comm.gloo import await_gloo
from ds_lowrank.integrations.full_disk import say_last
from ds_lowrank.integrations.projected import check_projected
from ds_lowrank.integrations.transformers import check_layerwise
from ds_lowrank.layouts import whole_shape
from ds_lowrank.targets.keeping import keep_projected
from ds_lowrank.targets.patterns import find_targets


def main(argv: list[str]) -> int:
    """Run the script; returns its exit code.

    It is 2 when the command line, the data or the checkpoint cannot be used, 1 when the disk is full, and
    ``PREEMPTED_EXIT_CODE`` when a signal ended the run and it can be resumed.
    """
    _quieten()
    try:
        trainer, config = set_up(argv)
    except (ValueError, OSError) as error:
        return _refuse(error)
    try:
        result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        if trainer.checkpoints.preempted:
            _say_preempted(trainer)
        else:
            _say_finished(trainer, finish(trainer, result.metrics, config))
    except NotStarted as error:
        return _refuse(error)
    except Exception as error:
        full = trainer.checkpoints.explain(error)
        if full is None:
            raise
        say_last(full)
        return 1
    # A launcher ends all ranks after the first.
    trainer.accelerator.wait_for_everyone()
    # Gloo's thread may not have let go of the barrier yet, for which it needs the interpreter. A destroyed group lives
    # as long as DDP's reducer, which at this function's end keeps the interpreter and joins the thread.
    await_gloo()
    trainer.accelerator.end_training()
    return ds_lowrank.PREEMPTED_EXIT_CODE if trainer.checkpoints.preempted else 0


def set_up(argv: list[str]) -> tuple[PretrainTrainer, ds_lowrank.LowRankConfig]:
    """Everything before training: arguments, data, model and Trainer.

    Raises:
        ValueError: a bad argument, an unsupported setting, or nothing to project.
        OSError: a file, dataset or tokenizer that is not there.
    """
    model_args, data_args, low_rank_options, args = parse_arguments(argv)
    before = read_record(args.resume_from_checkpoint)
    low_rank_options = take_up(before, args, low_rank_options)
    shape = AutoConfig.from_pretrained(model_args.model_config)
    config = low_rank_config(low_rank_options, args, shape)
    record = make_record(args, config, shape, data_args)
    compare(before, record, args)
    if config.layerwise:
        check_layerwise(args)
    if config.gradients == "projected" and args.optimizer == "lowrank":
        check_projected(args)
    data = load_data(
        data_args,
        rank=args.process_index,
        world_size=args.world_size,
        first=partial(args.main_process_first, desc="tokenizing"),
    )
    record["data"] |= describe_data(data)
    compare_data(before, record, args)
    data.train = _whole_steps(data.train, args)
    model = build_model(model_args, data_args, data.tokenizer, args.seed)
    config = keep_projected(config, model, args.resume_from_checkpoint)
    projected = [target.name for target in find_targets(model, config).projected]
    if args.optimizer == "frozen":
        freeze(model, projected)
    trainer = build_trainer(model, config, data, data_args, args, record)
    if trainer.position is not None:
        trainer.position.resume(args.resume_from_checkpoint, args)
    return trainer, config


def build_model(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Model with fresh weights from its configuration; vocabulary and special tokens are the tokenizer's."""
    config = AutoConfig.from_pretrained(model_args.model_config)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    # GaLore's files say -1, which is an index out of range for an embedding.
    config.pad_token_id = tokenizer.pad_token_id
    config.max_position_embeddings = max(config.max_position_embeddings, data_args.max_length)
    transformers.set_seed(seed)  # the same weights on every rank
    chosen = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    with _default_dtype(getattr(torch, model_args.dtype)):
        model = AutoModelForCausalLM.from_config(config, **chosen)
    if is_deepspeed_zero3_enabled():
        _initialise_as_elsewhere(model, config, seed)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make weights in ``dtype``: converted afterwards they would be there twice, and rotary frequencies be rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _initialise_as_elsewhere(model: PreTrainedModel, config: PretrainedConfig, seed: int) -> None:
    """Give a model that stage 3 partitioned at its construction the weights that it has everywhere else.

    ``zero.Init`` draws them from other random numbers. Rank 0 makes the whole model once on the host.
    """
    import deepspeed

    whole: dict[str, Tensor] = {}
    if deepspeed.comm.get_rank() == 0:
        transformers.set_seed(seed)
        with set_zero3_state():  # construct without partitioning
            whole = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if whole:
                parameter.data.copy_(whole[name])


def low_rank_config(
    options: dict[str, Any], args: PretrainArguments, shape: PretrainedConfig
) -> ds_lowrank.LowRankConfig:
    """Options of the block and the flags, completed for this model.

    Where no rank is given it is a quarter of the hidden size (GaLore's ranks for 60M, 350M, 1B and 7B); where no gap
    is given it is that of ``configs/``; where no seed of the sampler is given it is ``--seed``.
    """
    defaults = {"rank": max(1, shape.hidden_size // 4), "update_proj_gap": 50, "seed": args.seed}
    return ds_lowrank.LowRankConfig.from_dict({**defaults, **options})


def freeze(model: PreTrainedModel, names: list[str]) -> None:
    """Keep the named parameters as they are: the control that shows what their training is worth."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)


def build_collator(model: PreTrainedModel, data: PackedData, data_args: DataArguments) -> Collator:
    """What makes batches; with ``--document_attention`` it says which tokens are of one document.

    Raises:
        ValueError: the model's attention cannot be kept inside documents.
    """
    if not data_args.document_attention:
        return Collator()
    attention = model.config._attn_implementation
    if attention != "sdpa":  # which takes a mask of who sees whom as it is
        raise ValueError(
            f"--document_attention needs sdpa attention, and that of {type(model).__name__} is {attention}: add "
            "--attn_implementation sdpa, where the model has it"
        )
    return Collator(data.tokenizer.eos_token_id)


def build_trainer(
    model: PreTrainedModel,
    config: ds_lowrank.LowRankConfig,
    data: PackedData,
    data_args: DataArguments,
    args: PretrainArguments,
    record: dict[str, Any],
) -> PretrainTrainer:
    """Trainer with our optimizer, or with the Trainer's own AdamW for ``adamw`` and ``frozen``."""
    low_rank = args.optimizer == "lowrank"
    trainer = PretrainTrainer(
        sequence_length=data_args.max_length,
        low_rank=low_rank,
        model=model,
        args=args,
        data_collator=build_collator(model, data, data_args),
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        callbacks=[ds_lowrank.LowRankCallback()] if low_rank else None,
        position=StreamPosition(data.train) if isinstance(data.train, PackedStream) else None,
        record=RunRecord(record),
        checkpoints=ds_lowrank.CheckpointCallback(),
        optimizer_cls_and_kwargs=(ds_lowrank.trainer_optimizer(config, args=args) if low_rank else None),
    )
    check_trainer(trainer, low_rank)
    return trainer


def finish(
    trainer: PretrainTrainer, train_metrics: dict[str, float], config: ds_lowrank.LowRankConfig
) -> dict[str, Any]:
    """Save model and tokenizer, evaluate, write ``metrics.json``; returns its content."""
    args = trainer.args
    trainer.save_model(args.output_dir)  # first: an evaluation may fail
    eval_loss = trainer.evaluate()["eval_loss"]
    tokens = trainer.state.global_step * trainer.tokens_per_step
    made_here = tokens - args.resumed_step * trainer.tokens_per_step
    metrics = {
        "optimizer": args.optimizer,
        "perplexity": math.exp(eval_loss) if eval_loss < 700 else math.inf,
        "eval_loss": eval_loss,
        "train_loss": train_metrics["train_loss"],
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "train_seconds": train_metrics["train_runtime"],
        "tokens_per_second": made_here / train_metrics["train_runtime"] if made_here else None,
        "world_size": args.world_size,
        "learning_rate": config.lr if trainer.low_rank and config.lr is not None else args.learning_rate,
        "seed": args.seed,
        "skipped_shards": None if trainer.position is None else trainer.position.all_skipped(),
        "parameters": sum(math.prod(whole_shape(p)) for p in trainer.model.parameters()),
        "lowrank": config.to_dict() if trainer.low_rank else None,
    }
    if trainer.is_world_process_zero():
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _say_finished(trainer: PretrainTrainer, metrics: dict[str, Any]) -> None:
    """Say which shards were not read to their ends, where the model is, and its perplexity."""
    if not trainer.is_world_process_zero():
        return
    if skipped := metrics["skipped_shards"]:
        count, ends = (len(skipped), "their ends") if len(skipped) > 1 else (1, "its end")
        print(
            f"{count} shard{'s' if count > 1 else ''} could not be read to {ends}: {next(iter(skipped))}, ... "
            "(skipped_shards in metrics.json)"
        )
    print(f"saved to {trainer.args.output_dir}")
    print(f"validation perplexity: {metrics['perplexity']:.3f}", flush=True)


def _say_preempted(trainer: PretrainTrainer) -> None:
    """Say what was saved, and nothing that would take time."""
    # Another signal, such as a launcher's to the ranks that are left, must not change the exit code any more.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if trainer.is_world_process_zero():
        saved, name = trainer.checkpoints.saved, trainer.checkpoints.preempted
        print(f"preempted by {name}: saved {saved}; the same command with --resume goes on with it", flush=True)


def _whole_steps(train: Any, args: PretrainArguments) -> Any:
    """Leave out the few sequences that would make a smaller last step, so that every step counts the same tokens."""
    if isinstance(train, PackedStream):
        return train
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if len(train) < batch:
        raise ValueError(
            f"the training split has {len(train)} sequences, less than one step of {batch} over all ranks: give more "
            "text, or a smaller --batch_size, --gradient_accumulation or --max_length"
        )
    whole = range(len(train) // batch * batch)
    return train.select(whole) if isinstance(train, datasets.Dataset) else Subset(train, whole)


def _quieten() -> None:
    """Leave the console to what a user wants to read."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("DeepSpeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch 2.13 renames collectives that DeepSpeed still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning)


def _refuse(error: Exception) -> int:
    """Report a user's error once: the other ranks meet it too, and the launcher ends them after the first."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(3)
    print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
