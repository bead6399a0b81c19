"""One call that brings the low-rank optimizer to any HF Trainer that has been made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ds_lowrank.config import LowRankConfig
from ds_lowrank.integrations.checkpoints import CheckpointCallback
from ds_lowrank.integrations.projected import check_projected
from ds_lowrank.integrations.resume import ResumeAnywhere
from ds_lowrank.integrations.transformers import (
    LowRankCallback,
    _Factory,
    check_trainer,
    resolve_config,
    trainer_optimizer,
)
from ds_lowrank.report import unwrap


def attach(trainer: Any, config: LowRankConfig | Mapping[str, Any] | None = None) -> None:
    """Have a Trainer train with the low-rank optimizer: any HF Trainer, also those that take no optimizer class.

    ::

        trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        ds_lowrank.attach(trainer, {"rank": 128})
        trainer.train()

    Does what ``optimizer_cls_and_kwargs=trainer_optimizer(config)``, :class:`LowRankCallback`, where the Trainer saves
    checkpoints :class:`CheckpointCallback` as the last of the callbacks, and :class:`ResumeAnywhere` do. Under every
    layout: the optimizer is made where the Trainer makes its own. Changes the Trainer in place, whose class becomes a
    subclass of the same name.

    Args:
        trainer: a ``Trainer`` or an object of a subclass (``Seq2SeqTrainer``, TRL's), constructed and not yet training.
        config: see :func:`ds_lowrank.trainer_optimizer`.

    Raises:
        TypeError: it is no Trainer.
        ValueError: it has an optimizer or an optimizer class already, or a second call; an option, the DeepSpeed or
            the FSDP configuration is not supported, or does not go with ``gradients="projected"``; or what accelerate
            chose is not what was asked for.
    """
    kind = type(trainer)
    if not all(hasattr(trainer, name) for name in ("args", "model", "create_optimizer", "add_callback", "accelerator")):
        raise TypeError(f"attach takes a Trainer that has been constructed, got {kind.__name__}")
    chosen = getattr(trainer, "optimizer_cls_and_kwargs", None)
    if chosen is not None and chosen[0] is _Factory:
        raise ValueError(
            f"this {kind.__name__} has the low-rank optimizer already: attach once, and pass no "
            "optimizer_cls_and_kwargs beside it"
        )
    if chosen is not None:
        name = getattr(chosen[0], "__name__", chosen[0])
        raise ValueError(f"this {kind.__name__} was given optimizer_cls_and_kwargs with {name}: leave it out")
    if trainer.optimizer is not None:
        raise ValueError(
            f"this {kind.__name__} has an optimizer already ({type(trainer.optimizer).__name__}): attach before "
            "train(), and pass no optimizers=(...). A Trainer that makes its optimizer while it is constructed (TRL's "
            "PPOTrainer) cannot be attached to"
        )
    choice = trainer_optimizer(config, args=trainer.args)
    if resolve_config(config, trainer.args).gradients == "projected":
        check_projected(trainer.args, trainer.accelerator.mixed_precision)
    callbacks: list[TrainerCallback] = [LowRankCallback()]
    if trainer.args.save_strategy != "no":
        callbacks.append(CheckpointCallback())
    there = trainer.callback_handler.callbacks
    added = [new for new in callbacks if not any(isinstance(old, type(new)) for old in there)]
    for callback in added:
        trainer.add_callback(callback)
    try:
        check_trainer(trainer)
    except ValueError:
        for callback in added:
            trainer.remove_callback(callback)
        raise
    trainer.optimizer_cls_and_kwargs = choice
    bases = (_Attached, kind) if isinstance(trainer, ResumeAnywhere) else (_Attached, ResumeAnywhere, kind)
    # TRL and the Trainer's model cards go by the name.
    trainer.__class__ = type(kind.__name__, bases, {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _Attached:
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own, which makes what was attached unless a subclass makes something else."""
        trainer: Any = super()
        optimizer = trainer.create_optimizer() if model is None else trainer.create_optimizer(model)
        made: Any = self.optimizer  # type: ignore[attr-defined]
        try:
            unwrap(made)
        except ValueError as error:
            raise ValueError(
                f"{type(self).__name__}.create_optimizer makes {type(made).__name__} and passes over the optimizer "
                "that was attached: remove the method from the class, or return super().create_optimizer() from it"
            ) from error
        return optimizer
