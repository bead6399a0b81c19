"""The HF Trainer, resuming from what any layout has saved on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.trainer

from ds_lowrank.checkpoint.load import load_checkpoint
from ds_lowrank.checkpoint.opening import check_checkpoint, has_low_rank
from ds_lowrank.checkpoint.safe_load import load_file
from ds_lowrank.integrations.checkpoints import together
from ds_lowrank.integrations.transformers import _Factory
from ds_lowrank.layouts.zero_files import optimizer_files, saved_by_stage3, tag_folder
from ds_lowrank.manifest import newest_complete
from ds_lowrank.report import unwrap


class ResumeAnywhere:
    """Mixin for a ``Trainer``: ``train(resume_from_checkpoint=...)`` takes checkpoints of every layout.

    ::

        class MyTrainer(ds_lowrank.ResumeAnywhere, Trainer): ...

    What the Trainer can load by itself it loads; else (another number of DeepSpeed ranks, another stage, another
    framework, another optimizer's checkpoint) :func:`ds_lowrank.load_checkpoint` brings model and optimizer to where
    the checkpoint left off, and the Trainer the rest: its step, the position in the data, the learning-rate schedule
    and the random states of those ranks that there were.

    Whoever loads it, a checkpoint is looked at before: see :func:`ds_lowrank.checkpoint.opening.check_checkpoint`.
    ``resume_from_checkpoint=True`` takes :func:`ds_lowrank.newest_complete`, where there is one. What a checkpoint has
    projected stays so (:func:`ds_lowrank.targets.keeping.keep_projected`).
    """

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer.train``."""
        trainer: Any = super()
        if resume_from_checkpoint is True:  # the Trainer takes the highest step, broken or an earlier run's
            newest = newest_complete(self.args.output_dir)  # type: ignore[attr-defined]
            resume_from_checkpoint = True if newest is None else str(newest)
        self._resumed = False
        self.goes_on_with = resume_from_checkpoint if isinstance(resume_from_checkpoint, (str, Path)) else None
        with self._engine_left_alone():
            return trainer.train(resume_from_checkpoint, *args, **kwargs)

    goes_on_with: str | Path | None = None  # read where the optimizer is made
    _resumed = True
    _checked: frozenset[str] = frozenset()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer's, which is asked for the weights first."""
        if not self._is_foreign(resume_from_checkpoint):
            trainer: Any = super()
            trainer._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's, or all there is where the Trainer cannot."""
        this: Any = self
        self._resumed = True
        if checkpoint is None or not self._is_foreign(checkpoint):
            trainer: Any = super()
            trainer._load_optimizer_and_scheduler(checkpoint)
            return
        loaded = load_checkpoint(checkpoint, this.model_wrapped, this.optimizer)
        step = _count_as(this, checkpoint)
        scheduler = Path(checkpoint) / "scheduler.pt"
        if not scheduler.is_file():
            raise ValueError(
                f'{checkpoint} has no scheduler.pt to go on with (with a DeepSpeed "scheduler" block the schedule is '
                "in DeepSpeed's own files): resume with as many ranks and the same stage, or leave the block out and "
                "let the Trainer make the schedule"
            )
        groups = unwrap(this.optimizer).param_groups
        this.lr_scheduler.load_state_dict(_fit_schedule(load_file(scheduler), len(groups)))
        # A scheduler sets rates when it steps; until then they are in the optimizer's saved state elsewhere.
        for group, rate in zip(groups, this.lr_scheduler.get_last_lr()):
            group["lr"] = rate
        if this.is_world_process_zero():
            ranks = "" if loaded.ranks is None else f" on {loaded.ranks} rank{'s' * (loaded.ranks > 1)}"
            print(
                f"step {step}: going on with what {loaded.layout}{ranks} has saved; low-rank states of "
                f"{loaded.matrices} matrices taken over, {loaded.fresh} fresh",
                flush=True,
            )

    def _load_best_model(self) -> None:
        """The Trainer's, which takes the folder's name from a checkpoint."""
        this: Any = self
        if this.state.best_model_checkpoint is not None:
            self._check(this.state.best_model_checkpoint)
        trainer: Any = super()
        trainer._load_best_model()

    def _check(self, checkpoint: str) -> None:
        """Refuse on all ranks what could run when it is loaded. Collective at the first call for a folder."""
        if checkpoint in self._checked:
            return

        def fault() -> str | None:
            try:
                check_checkpoint(checkpoint)
            except ValueError as error:
                return str(error)
            return None

        for rank, found in enumerate(together(fault, f"reading {checkpoint}")):
            if found:
                raise ValueError(f"the checkpoint cannot be continued (rank {rank}): {found}")
        self._checked |= {checkpoint}

    def _is_foreign(self, checkpoint: str) -> bool:
        """Whether the Trainer cannot load a checkpoint here, or would load another optimizer's states."""
        self._check(checkpoint)
        return self._has_low_rank() and not _is_native(Path(checkpoint), self)

    def _has_low_rank(self) -> bool:
        this: Any = self
        if this.optimizer is None:  # it is made later, and asked for weights before
            chosen = this.optimizer_cls_and_kwargs
            return chosen is not None and chosen[0] is _Factory
        try:
            unwrap(this.optimizer)
        except ValueError:
            return False
        return True

    @contextmanager
    def _engine_left_alone(self) -> Iterator[None]:
        """While training, the Trainer's load of a DeepSpeed engine passes over what is none of its own."""
        this: Any = self
        original = transformers.trainer.deepspeed_load_checkpoint

        def load(engine: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
            if not self._is_foreign(checkpoint):
                original(engine, checkpoint, *args, **kwargs)
            elif self._resumed:  # the best model, at the end: nobody comes after this
                load_checkpoint(checkpoint, engine, this.optimizer)

        transformers.trainer.deepspeed_load_checkpoint = load
        try:
            yield
        finally:
            transformers.trainer.deepspeed_load_checkpoint = original


def _is_native(folder: Path, trainer: Any) -> bool:
    tag = tag_folder(folder)
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        if tag is None or saved_by_stage3(tag) != (stage == 3):
            return False
        if len(optimizer_files(tag)) != trainer.args.world_size:
            return False
    elif trainer.is_fsdp_enabled:
        full = "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        if not (folder / ("optimizer.bin" if full else "optimizer_0")).exists():
            return False
    elif not (folder / "optimizer.pt").is_file():
        return False
    # Another optimizer's states would be loaded for AdamW's: galore-torch's are objects, AdamW's of other shapes.
    return has_low_rank(folder)


def _fit_schedule(saved: dict[str, Any], groups: int) -> dict[str, Any]:
    """A scheduler's state for another number of parameter groups, which under ZeRO depends on the number of ranks.

    Elsewhere there is one group of matrices.

    Raises:
        ValueError: the groups had rates of their own: which of them a group here is to have is not known.
    """
    before = len(saved.get("base_lrs", []))
    if before in (0, groups):
        return saved
    fitted = dict(saved)
    for key, value in saved.items():
        if key in ("base_lrs", "_last_lr", "lr_lambdas") and isinstance(value, list):
            if any(one != value[0] for one in value):
                raise ValueError(
                    f"the checkpoint's schedule has {before} parameter groups with different {key} and this run "
                    f"{groups}: give all groups one learning rate, or resume with as many ranks and the same stage"
                )
            fitted[key] = value[:1] * groups
    return fitted


def _count_as(trainer: Any, checkpoint: str) -> int:
    """Set a DeepSpeed engine's counters to those of the Trainer, which has read its own."""
    step = transformers.TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
    engine = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        engine.global_steps = step
        engine.micro_steps = step * engine.gradient_accumulation_steps()
        engine.global_samples = step * engine.train_batch_size()
    return step
