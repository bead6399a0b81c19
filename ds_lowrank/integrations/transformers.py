"""The HF Trainer: one argument, one callback, and figures for its logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ds_lowrank.config import BLOCK, LowRankConfig
from ds_lowrank.integrations.by_hand import built_by_trainer as _built_by_trainer
from ds_lowrank.integrations.checkpoints import CheckpointCallback
from ds_lowrank.integrations.ddp import exclude_from_ddp
from ds_lowrank.integrations.deepspeed import build_optimizer, keep_from_deepspeed
from ds_lowrank.integrations.deepspeed_config import autocast_dtype, read_deepspeed_config
from ds_lowrank.integrations.fsdp import check_fsdp_config
from ds_lowrank.integrations.galore_arguments import with_galore_arguments
from ds_lowrank.integrations.projected import begin_training, check_projected, route_trainer
from ds_lowrank.optimizer import LowRankAdamW
from ds_lowrank.report import describe, unwrap
from ds_lowrank.targets.keeping import keep_projected


def trainer_optimizer(
    config: LowRankConfig | Mapping[str, Any] | None = None, args: Any = None
) -> tuple[type, dict[str, Any]]:
    """Value for ``Trainer(..., optimizer_cls_and_kwargs=ds_lowrank.trainer_optimizer(...))``.

    Args:
        config: the options, as a configuration or as a mapping of its fields; they stand instead of a ``"lowrank"``
            block, which is then not read. ``None`` reads the block of the DeepSpeed JSON or of the ``fsdp_config``
            that the Trainer was given, or takes the defaults without one.
        args: the ``TrainingArguments``. ``None`` takes those of the Trainer that builds the optimizer.

    Learning rate, weight decay, betas and eps come from the ``TrainingArguments`` unless the configuration sets them,
    and so do the options of ``optim="galore_adamw"`` (:func:`with_galore_arguments`). For a Trainer that takes no
    ``optimizer_cls_and_kwargs`` there is :func:`ds_lowrank.attach`.

    Raises:
        ValueError: an option is unknown or out of range. What depends on the model, on the ``TrainingArguments``, on
            DeepSpeed or on FSDP is checked when the Trainer builds the optimizer, before the first step.
    """
    if config is not None and not isinstance(config, LowRankConfig):
        LowRankConfig.from_dict(config)  # what it does not name may come from elsewhere later
        config = dict(config)
    return _Factory, {"config": config, "args": args}


class _Factory:
    """What the Trainer instantiates and calls with the model, before any sharding, with the real names.

    A Trainer of transformers < 5 knows no factories: it calls this as if it were an optimizer class, with groups of
    its own, and gets the optimizer for its model.
    """

    def __new__(cls, *groups: Any, **kwargs: Any) -> Any:
        factory = super().__new__(cls)
        if not groups:
            return factory
        trainer = _calling_trainer()
        assert trainer is not None, "groups come from a Trainer of transformers < 5"
        return factory(trainer.model, **kwargs)

    def __call__(self, model: nn.Module, config: LowRankConfig | Mapping[str, Any] | None, args: Any) -> LowRankAdamW:
        trainer = _calling_trainer()
        if args is None and trainer is None:
            raise ValueError(
                "the TrainingArguments cannot be found from here: pass them, "
                "ds_lowrank.trainer_optimizer(config, args=training_args)"
            )
        args = args or trainer.args
        deepspeed_config = _deepspeed_config(args)
        notes = [] if deepspeed_config is None else read_deepspeed_config(deepspeed_config).notes
        config = resolve_config(config, args)
        config = keep_projected(config, model, getattr(trainer, "goes_on_with", None))
        if hasattr(trainer, "accelerator"):
            check_trainer(trainer)
        adamw: dict[str, Any] = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
        if config.gradient_dtype == "auto":
            cast = _autocast(trainer, args) if deepspeed_config is None else autocast_dtype(deepspeed_config)
            config = config.replace(gradient_dtype=cast)
        if config.layerwise:
            check_layerwise(args)
            config = config.replace(accumulation_steps=args.gradient_accumulation_steps)
        projected = config.gradients == "projected"
        if projected:
            check_projected(args, getattr(getattr(trainer, "accelerator", None), "mixed_precision", None))
        with _built_by_trainer():
            ranks = args.world_size if deepspeed_config is not None else None
            optimizer = build_optimizer(model, config, **adamw, ranks=ranks)
        optimizer.notes = notes
        if config.gradients == "projected" and deepspeed_config is not None:
            keep_from_deepspeed(optimizer)
        in_backward = config.layerwise or projected
        if in_backward and deepspeed_config is None and not wants_fsdp(args) and args.world_size > 1:
            exclude_from_ddp(model, optimizer)
        if wants_fsdp(args):
            optimizer.release_parameters()
        callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
        if in_backward and callbacks is not None and not any(isinstance(c, _BEGINNING) for c in callbacks):
            trainer.add_callback(_BeginTraining())
        if projected and hasattr(trainer, "accelerator"):
            route_trainer(trainer, optimizer)
        return optimizer


def resolve_config(config: LowRankConfig | Mapping[str, Any] | None, args: Any) -> LowRankConfig:
    """All options of a run: the given ones or the block's, and what ``TrainingArguments`` say about GaLore.

    Args:
        config: as for :func:`trainer_optimizer`.
        args: the ``TrainingArguments``.

    Raises:
        ValueError: an option, the DeepSpeed or the FSDP configuration is not supported; or two sources differ.
    """
    deepspeed_config, fsdp_config = _deepspeed_config(args), getattr(args, "fsdp_config", None)
    content: dict[str, Any] = {}
    if deepspeed_config is not None:
        content = read_deepspeed_config(deepspeed_config).content
    elif config is None and args.fsdp and fsdp_config:
        content = check_fsdp_config(fsdp_config)
    if config is None:
        LowRankConfig.from_deepspeed(content)  # refuses a misspelt block
        config = content.get(BLOCK, {})
    return with_galore_arguments(config, args)


def wants_fsdp(args: Any) -> bool:
    """Whether these ``TrainingArguments``, or ``accelerate launch``, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_trainer(trainer: Any, checkpoints: bool = True) -> None:
    """Refuse a Trainer that would do something else than it was told. No communication.

    Args:
        trainer: a ``Trainer``, constructed and not yet training.
        checkpoints: whether to refuse checkpoints that could not be resumed from exactly.

    Raises:
        ValueError: accelerate dropped DeepSpeed or FSDP, the run has FSDP1, or see :func:`check_saving`.
    """
    args, chosen = trainer.args, trainer.accelerator.distributed_type.value
    if _deepspeed_config(args) is not None and not trainer.is_deepspeed_enabled:
        raise ValueError(
            f"DeepSpeed was asked for, but accelerate chose {chosen}: accelerate launch --cpu drops DeepSpeed. Start "
            "the script with `deepspeed` or torchrun"
        )
    if wants_fsdp(args) and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"FSDP was asked for, but accelerate chose {chosen}: on a CPU it never selects FSDP, and the run would be "
            "plain data parallel. Use GPUs, or ask for DDP (leave fsdp and fsdp_config out) or DeepSpeed"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            'FSDP1 flattens parameters across matrices and is not supported: set "version": 2 in fsdp_config '
            "(accelerate launch: --fsdp_version 2)"
        )
    if checkpoints and not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
        check_saving(args, args.world_size, trainer.callback_handler.callbacks)


def check_layerwise(args: Any) -> None:
    """Refuse a clip of the gradient norm beside ``layerwise``.

    Args:
        args: the ``TrainingArguments``.

    Raises:
        ValueError: see above.
    """
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm = {args.max_grad_norm} cannot go with layerwise: the norm is known when the last gradient "
            "has arrived, and by then the first are used and freed. Set max_grad_norm (--grad_clipping) to 0, or "
            "leave layerwise out"
        )


def check_saving(args: Any, ranks: int, callbacks: Sequence[Any]) -> None:
    """Refuse checkpoints under DDP that nobody prepares: every rank keeps a part of the states, and rank 0 saves.

    Args:
        args: the ``TrainingArguments``.
        ranks: number of processes.
        callbacks: of the Trainer.

    Raises:
        ValueError: see above.
    """
    saves = args.save_strategy != "no" and not args.save_only_model
    if saves and ranks > 1 and not any(isinstance(c, CheckpointCallback) for c in callbacks):
        raise ValueError(
            "under DDP every rank keeps a part of the states and the Trainer saves rank 0's: add "
            "ds_lowrank.CheckpointCallback() to the Trainer's callbacks, which brings them together before each save "
            '(or set save_strategy to "no", or save_only_model)'
        )


class LowRankCallback(TrainerCallback):
    """Finds and verifies the layout before the first step and prints what is projected and what it costs.

    Raises, on all ranks: ``ValueError`` when nothing is projected, when the Trainer runs another optimizer, or when
    something does not go with ``gradients="projected"``; ``LayoutError`` when the sharding is not supported.
    """

    def on_train_begin(self, args, state, control, optimizer=None, model=None, **kwargs):  # noqa: D102
        inner, trainer = unwrap(optimizer), _calling_trainer()
        if inner.config.gradients == "projected" and hasattr(trainer, "accelerator"):
            # An optimizer that was given to the Trainer by optimizers=(...) has come by nobody else.
            check_projected(args, trainer.accelerator.mixed_precision)
            route_trainer(trainer, inner)
        begin_training(model, inner)
        describe(optimizer)


class _BeginTraining(TrainerCallback):
    """The part of :class:`LowRankCallback` that no run can do without that uses gradients in the backward pass."""

    def on_train_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
        begin_training(model, unwrap(optimizer))


_BEGINNING = (LowRankCallback, _BeginTraining)


def metrics(optimizer: Any) -> dict[str, float]:
    """What the refreshes since the last call did, over all ranks. Collective: every rank calls it at the same step.

    Args:
        optimizer: a :class:`LowRankAdamW` or what accelerate or DeepSpeed wrapped it in.

    Returns:
        ``lowrank/refreshes`` (matrices refreshed), ``lowrank/refresh_seconds`` (of the slowest rank),
        ``lowrank/captured_energy`` (mean share of ‖G‖² inside the new subspaces) and ``lowrank/overlap`` (mean
        ‖BᵀB'‖²/r with the subspaces before); keys are absent where nothing happened.
    """
    inner = unwrap(optimizer)
    stats = inner.take_stats()
    comm = inner.comm
    refreshed, captured, captures, overlap, overlaps = comm.sum(
        [stats.refreshed, stats.captured, stats.captures, stats.overlap, stats.overlaps]
    )
    seconds = max(comm.gather_objects(stats.seconds))
    found: dict[str, float] = {}
    if refreshed:
        found["lowrank/refreshes"] = refreshed
        found["lowrank/refresh_seconds"] = round(seconds, 4)
    if captures:
        found["lowrank/captured_energy"] = round(captured / captures, 4)
    if overlaps:
        found["lowrank/overlap"] = round(overlap / overlaps, 4)
    return found


def _calling_trainer() -> Any:
    """The Trainer that is building the optimizer, or ``None``.

    It hands a factory the model and nothing else, so it is looked up among the frames that called.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if hasattr(getattr(owner, "args", None), "learning_rate") and hasattr(owner, "model"):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _autocast(trainer: Any, args: Any) -> str:
    """What a Trainer's autocast computes in, ``auto`` without one."""
    chosen = getattr(getattr(trainer, "accelerator", None), "mixed_precision", None)
    if chosen is None:
        chosen = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    return {"bf16": "bfloat16", "fp16": "float16"}.get(chosen, "auto")


def _deepspeed_config(args: Any) -> dict[str, Any] | None:
    """DeepSpeed configuration of these arguments; transformers' global one may be another Trainer's."""
    wrapped = getattr(args, "hf_deepspeed_config", None)
    if wrapped is None:  # what accelerate launch brings
        wrapped = getattr(getattr(args, "deepspeed_plugin", None), "hf_ds_config", None)
    return None if wrapped is None else wrapped.config
