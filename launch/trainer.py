"""The Trainer of the launch scripts: throughput and subspace figures in its logs, one line a log on the console."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from position import StreamPosition
from record import RunRecord, override_schedule
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

import ds_lowrank
from ds_lowrank.layouts import LayoutError


class PretrainTrainer(ds_lowrank.ResumeAnywhere, Trainer):
    """``Trainer`` that logs tokens per second and the low-rank optimizer's figures, and reads streams per rank.

    Args:
        sequence_length: tokens in a row of the training set.
        low_rank: whether the optimizer is ours, with figures of its own.
        record: keeps what the run was told.
        checkpoints: what completes checkpoints and watches for preemption.
        position: keeps that of a stream.
        kwargs: of ``Trainer``.
    """

    def __init__(
        self,
        *,
        sequence_length: int,
        low_rank: bool,
        record: RunRecord,
        checkpoints: ds_lowrank.CheckpointCallback,
        position: StreamPosition | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.low_rank = low_rank
        args = self.args
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.tokens_per_step = sequences * args.world_size * sequence_length
        self._clock = (0, time.perf_counter())
        if not args.disable_tqdm:
            for default in (ProgressCallback, PrinterCallback):
                self.remove_callback(default)
            self.add_callback(ConsoleCallback())
        self.position = position
        if position is not None:
            self.add_callback(position)
        self.record = record
        self.add_callback(record)
        self.checkpoints = checkpoints
        self.add_callback(checkpoints)
        self._starts = _Starts()
        self.add_callback(self._starts)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """The Trainer's; a run that is resumed after its last step makes no further one (the Trainer makes one).

        Raises:
            NotStarted: something was refused before the first step.
        """
        self._starts.has_started = False
        try:
            return super().train(*args, **kwargs)
        except (ValueError, LayoutError) as error:
            if self._starts.has_started:
                raise
            raise NotStarted(str(error)) from error
        except _NothingLeft:
            self.is_in_train = False
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            metrics = {"train_loss": losses[-1] if losses else None, "train_runtime": 0.0}
            return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What the checkpoint has, or the command line's schedule where that was asked for."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.override_lr:
            override_schedule(self.lr_scheduler, self.record.record["arguments"]["learning_rate"])

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, except that every rank reads its own share of a stream (accelerate reads all on one)."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # Otherwise making an iterator draws from the global one, in a resumed run where the other did not.
            generator=torch.Generator(),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's; at the end of a run the whole model under FSDP2 too, whose checkpoints are in shards."""
        whole = not self.is_fsdp_enabled or "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if whole or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's; its time does not count against training throughput."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        step, then = self._clock
        self._clock = (step, then + time.perf_counter() - start)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput and subspace figures to a training log; every rank comes here at the same steps."""
        if "loss" in logs:
            logs.update(self._throughput())
            if self.low_rank:
                logs.update(ds_lowrank.metrics(self.optimizer))
        super().log(logs, start_time)

    def _throughput(self) -> dict[str, float]:
        step, then = self._clock
        now = time.perf_counter()
        self._clock = (self.state.global_step, now)
        if not step:  # the first interval holds the start of the engine as well
            return {}
        tokens = (self.state.global_step - step) * self.tokens_per_step
        return {"tokens_per_second": tokens / (now - then)}


class NotStarted(ValueError):
    """Refused before the first step: a user's error, of which the text says all."""


class _NothingLeft(Exception):
    """The checkpoint that was resumed is the last of its run."""


class _Starts(TrainerCallback):
    """Ends training before its first step where the steps have all been made; the last to hear that it begins.

    How often a resumed run logs, evaluates and saves is the command line's: the Trainer takes the checkpoint's.
    """

    has_started = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise on all ranks, whose steps have been compared."""
        self.has_started = True
        state.compute_steps(args, state.max_steps)
        if state.global_step >= state.max_steps:
            raise _NothingLeft


# Key in the logs, label on the console, format.
_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("eval_loss", "validation loss", "{:.4f}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad norm", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("lowrank/refresh_seconds", "refresh s", "{:.3f}"),
    ("lowrank/overlap", "overlap", "{:.2f}"),
)


class ConsoleCallback(ProgressCallback):
    """Progress bar, and above it one line a log instead of a printed dictionary."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar; in a log file, where it cannot overwrite itself, it moves twice a minute only."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.mininterval = 30

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the figures of ``logs`` that have a column; others are for TensorBoard."""
        if self.training_bar is None or not state.is_world_process_zero or logs is None:
            return
        parts = [f"{label} {form.format(logs[key])}" for key, label, form in _COLUMNS if key in logs]
        if parts:
            self.training_bar.write(f"step {state.global_step:>6}  " + "  ".join(parts))
