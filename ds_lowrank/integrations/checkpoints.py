"""Crash-safe checkpoints for any HF Trainer: marked when complete, written when the run is preempted, kept by number.

The Trainer writes the files; :class:`CheckpointCallback` decides when they count
(:mod:`ds_lowrank.manifest`).
"""

from __future__ import annotations

import datetime
import json
import math
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import TrainerCallback

from ds_lowrank import manifest
from ds_lowrank.integrations.full_disk import LastLine, full_disk
from ds_lowrank.integrations.signals import Signals, Vote, ignore_termination_in_workers
from ds_lowrank.report import unwrap

T = TypeVar("T")
# EX_TEMPFAIL of sysexits.h: "try again". What a preempted run ends with, so that a scheduler can start it again.
PREEMPTED_EXIT_CODE = 75
# Arguments that are changed while training, and put back at its end.
_TAKEN = ("save_total_limit", "save_only_model", "load_best_model_at_end")


class CheckpointCallback(TrainerCallback):
    """Marks checkpoints as complete, writes one when the run is told to end, and keeps ``save_total_limit`` of them.

    Works with any Trainer (one process, DeepSpeed, FSDP2, DDP); give it to the Trainer as the last of the callbacks,
    because it has to see what the others decided. The checkpoints have to lie on a filesystem that all ranks see.

    - Before a save: what lies in the folder is removed, marker first, and ``before_save`` is called on all ranks.
    - After a save: the ranks bring the files to the disk and hash a share of them each, and rank 0 writes the marker.
      An error on one rank is raised on all of them.
    - SIGTERM and SIGUSR1: a checkpoint is written and training stops, on all ranks at the same step, whichever of them
      got the signal: at the end of the step in one process, of the step after it on several ranks. Rank 0 then writes
      the checkpoint's path into the file that the environment variable ``DS_LOWRANK_PREEMPTED_FILE`` names: batch
      scripts cannot go by the exit code, of which torchrun makes 1.
    - A full disk: when the error ends the process, the last line says so, with the path, the rank and the checkpoint
      that is whole; :meth:`explain` gives it to a script that catches the error.
    - ``save_total_limit`` is taken over from the Trainer while it trains, whose own rotation runs before a checkpoint
      is complete.

    A run may start below checkpoints that an earlier one has left in its output directory, from scratch or from an
    earlier step. As with the Trainer alone, they stay until the run saves at the same step; with a warning, they are
    marked so that :func:`ds_lowrank.newest_complete` and ``save_total_limit`` pass over them.

    Args:
        before_save: called on all ranks just before a save, with the optimizer that the Trainer holds; may be
            collective. ``consolidate_state_dict()`` of a :class:`LowRankAdamW` is called by itself.

    Attributes:
        preempted: name of the signal that ended this training, or ``None``.
        saved: the last complete checkpoint that this training wrote, or ``None``.

    Raises, on all ranks: ``ValueError`` before the first step (ranks resume at different steps, or from a checkpoint
    that is passed over), ``RuntimeError`` when a checkpoint could not be completed.
    """

    def __init__(self, before_save: Sequence[Callable[[Any], None]] = ()) -> None:
        self.before_save = list(before_save)
        self.preempted: str | None = None
        self.saved: Path | None = None
        self._signals = Signals(signal.SIGTERM, signal.SIGUSR1)
        self._vote: Vote | None = None
        self._taken: dict[str, Any] | None = None  # of the arguments, while training
        self._prepared_step = self._saved_step = -1
        self._output: Path | None = None
        self._step = 0  # at which the Trainer writes, if it does
        self._last_line = LastLine(self.explain)

    def explain(self, error: BaseException) -> str | None:
        """One line about an error that came out of the training, where a full disk is its cause; else ``None``."""
        return None if self._output is None else full_disk(error, self._output, self._step, _rank())

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):  # noqa: D102
        _check_course(args, state)
        with suppress(ValueError):  # another optimizer
            unwrap(kwargs.get("optimizer")).reminded = True  # states are consolidated here
        self.preempted, self.saved = None, None
        self._prepared_step = self._saved_step = -1
        if self._taken is None:  # otherwise an exception ended the training before
            self._taken = {name: getattr(args, name) for name in _TAKEN}
        args.save_total_limit = None
        self._vote = Vote(args.device) if _ranks() > 1 else None
        ignore_termination_in_workers(train_dataloader)
        self._output, self._step = Path(args.output_dir), state.global_step
        self._last_line.install()
        self._signals.install()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):  # noqa: D102
        told = self._told(last=state.global_step >= state.max_steps)
        if told:
            self._preempt(told, args, state, control)
        if control.should_save:
            self._prepare(args, state, optimizer)

    def on_epoch_end(self, args, state, control, optimizer=None, **kwargs):  # noqa: D102
        if self.preempted:
            control.should_evaluate = False
        if self._saved_step == state.global_step:
            control.should_save = False  # the end of the epoch's last step has written the same
        if control.should_save:
            self._prepare(args, state, optimizer)

    def on_evaluate(self, args, state, control, metrics=None, optimizer=None, **kwargs):  # noqa: D102
        training, fresh = self._taken is not None, self._saved_step != state.global_step
        if training and fresh and args.save_strategy == "best" and _is_new_best(args, state, metrics or {}):
            self._prepare(args, state, optimizer)

    def on_save(self, args, state, control, optimizer=None, **kwargs):  # noqa: D102
        if self._prepared_step != state.global_step:
            warnings.warn(
                "a checkpoint was written that CheckpointCallback could not prepare: make it the last of the Trainer's "
                "callbacks",
                stacklevel=2,
            )
        folder = _folder(args, state)
        complete(folder, _facts(args, state, optimizer))
        keep = self._taken["save_total_limit"] if self._taken else args.save_total_limit
        protected = [folder, *([state.best_model_checkpoint] if state.best_model_checkpoint else [])]
        on_rank_0(lambda: manifest.retain(args.output_dir, keep, protected), "deleting old checkpoints")
        self.saved, self._saved_step = folder, state.global_step

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        if self._vote is not None:
            self._vote.answer()
            self._vote = None
        for name, value in (self._taken or {}).items():
            setattr(args, name, value)
        self._taken = None
        self._last_line.remove()
        told = os.environ.get("DS_LOWRANK_PREEMPTED_FILE")
        if told and self.preempted and _rank() == 0:
            Path(told).write_text(f"{self.saved}\n")
        got = self._signals.restore()
        if got and not self.preempted:  # too late for a checkpoint of ours: what it does without us
            signal.raise_signal(got)

    def _told(self, last: bool) -> int:
        """The signal that ends the run at this step, the same on every rank, or 0.

        The ranks' answer to the question of one step is read at the end of the next, when it has long been there; at
        the last step there is no next one.
        """
        if self._vote is None:
            return self._signals.got
        told = self._vote.answer()
        if not told:
            self._vote.ask(self._signals.got)
            if last:
                told = self._vote.answer()
        return told

    def _preempt(self, told: int, args: Any, state: Any, control: Any) -> None:
        self.preempted = signal.Signals(told).name
        args.save_only_model = False  # it is there to be resumed from
        args.load_best_model_at_end = False  # nobody will use it
        control.should_save = control.should_training_stop = True
        # There is no time for it, and with save_strategy "best" its result would decide about the save.
        control.should_evaluate = False
        if state.is_world_process_zero:
            print(f"{self.preempted}: writing a checkpoint at step {state.global_step} and stopping", flush=True)

    def _prepare(self, args: Any, state: Any, optimizer: Any) -> None:
        """Clear the folder on rank 0 while the others wait, and have the optimizer made ready, on all ranks."""
        folder = _folder(args, state)
        self._step = state.global_step

        def clear() -> None:
            if folder.is_dir():  # files of a crashed attempt, perhaps of more ranks, would be taken for this one's
                manifest.remove(folder)

        on_rank_0(clear, f"clearing {folder}")
        for hook in (_consolidate, *self.before_save):
            together(partial(hook, optimizer), "making the optimizer's states ready to be saved")
        self._prepared_step = state.global_step


def complete(folder: str | Path, facts: dict[str, Any]) -> None:
    """Hash a checkpoint that all ranks have finished writing, and mark it. Collective over all ranks.

    Args:
        folder: the checkpoint, which all ranks see.
        facts: what the marker says about it; rank 0's count.

    Raises:
        RuntimeError: on all ranks, when one of them could not read, hash or mark; the checkpoint stays incomplete.
    """
    together(lambda: None, "writing a checkpoint")  # every rank has written
    what = f"completing {folder}"
    sizes = on_rank_0(lambda: manifest.file_sizes(folder), what)
    share = manifest.share_out(sizes, _ranks())[_rank()]
    parts = together(lambda: manifest.digests(folder, share, sync=True), what)
    files = {name: digest for part in parts for name, digest in part.items()}
    on_rank_0(lambda: manifest.write_marker(folder, files, facts), what)


def together(work: Callable[[], T], what: str) -> list[T]:
    """Do something on all ranks. Collective.

    Args:
        work: what this rank does.
        what: its name in an error.

    Returns:
        Every rank's result, in rank order.

    Raises:
        RuntimeError: on all ranks, when one of them failed; says which and why.
    """
    result: T | None = None
    trouble: Exception | None = None
    try:
        result = work()
    except Exception as error:
        trouble = error
    answers = _gather((result, None if trouble is None else f"{type(trouble).__name__}: {trouble}"))
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text is not None]
    if failed:
        raise RuntimeError(f"{what} failed on {'; '.join(failed)}") from trouble
    return [value for value, _ in answers]


def on_rank_0(work: Callable[[], T], what: str) -> T:
    """Do something on rank 0 while the others wait, and give all ranks its result; see :func:`together`."""
    return together(lambda: work() if _rank() == 0 else None, what)[0]  # type: ignore[return-value]


def _check_course(args: Any, state: Any) -> None:
    """Have a later resume take up this course of the run, and refuse one that an earlier run has left.

    As with the Trainer alone, what lies in the output directory stays until this run comes to the same step. But the
    highest step is then no longer the newest: checkpoints of later steps are marked as superseded.
    """
    steps = together(lambda: state.global_step, "starting")
    if len(set(steps)) > 1:
        raise ValueError(
            f"the ranks start at different steps ({', '.join(map(str, steps))}): they do not see the same checkpoints "
            f"in {args.output_dir}. Put it on a filesystem that all of them see"
        )

    def settle() -> tuple[bool, list[str]]:
        folder = _folder(args, state)
        if manifest.is_superseded(folder) and _resumed_from(folder, state):
            return True, []
        beyond = manifest.complete_beyond(args.output_dir, state.global_step)
        for later in beyond:
            manifest.supersede(later, state.global_step)
        return False, [later.name for later in beyond]

    left_behind, beyond = on_rank_0(settle, "looking for checkpoints")
    if left_behind:
        raise ValueError(
            f"this run resumes from {_folder(args, state)}, which an earlier run has left: a later one started at a "
            "lower step. resume_from_checkpoint=str(ds_lowrank.newest_complete(output_dir)) goes on with the later "
            f"one; python -m ds_lowrank.manifest {_folder(args, state)} makes the earlier one count again"
        )
    if beyond and _rank() == 0:
        warnings.warn(
            f"this run starts at step {state.global_step} and {args.output_dir} has checkpoints of later steps "
            f"({', '.join(beyond)}): they stay until this run saves at the same step, save_total_limit passes over "
            "them, and so does a resume (newest_complete). Another output_dir keeps the runs apart",
            stacklevel=2,
        )


def _resumed_from(folder: Path, state: Any) -> bool:
    """Whether this state was read from a checkpoint: one of another directory may have as many steps."""
    path = folder / "trainer_state.json"
    return path.is_file() and json.loads(path.read_text())["log_history"] == state.log_history


def _is_new_best(args: Any, state: Any, metrics: dict[str, float]) -> bool:
    """Whether the Trainer will save after this evaluation: its own rule, which it applies after the callbacks."""
    name = args.metric_for_best_model
    if name is None:
        return False
    value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
    if value is None:
        return False
    best = state.best_metric
    if args.greater_is_better:
        return value > (-math.inf if best is None else best)
    return value < (math.inf if best is None else best)


def _consolidate(optimizer: Any) -> None:
    try:
        inner = unwrap(optimizer)
    except ValueError:
        return  # another optimizer's states are the Trainer's affair
    consolidate = getattr(inner, "consolidate_state_dict", None)
    if consolidate is not None:
        consolidate()


def _facts(args: Any, state: Any, optimizer: Any) -> dict[str, Any]:
    import ds_lowrank  # not before the package is loaded, of which this is a part

    try:
        layout = unwrap(optimizer).layout.kind
    except ValueError:
        layout = None
    return {
        "step": state.global_step,
        "world_size": _ranks(),
        "layout": layout,
        "model_only": bool(args.save_only_model),
        "ds_lowrank": ds_lowrank.__version__,
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _ranks() > 1 else 0


def _gather(value: Any) -> list[Any]:
    if _ranks() == 1:
        return [value]
    gathered: list[Any] = [None] * _ranks()
    dist.all_gather_object(gathered, value)  # on the current device, which accelerate has made this rank's
    return gathered
