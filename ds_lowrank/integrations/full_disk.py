"""What to say when a checkpoint could not be written because the disk is full: the last line of the run."""

from __future__ import annotations

import errno
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from ds_lowrank import manifest

_ERRORS = (errno.ENOSPC, errno.EDQUOT)
# How others put it: safetensors, torch's CheckpointException, our own errors of several ranks.
_TEXT = re.compile(r"No space left on device|Disk quota exceeded|StorageFull|os error 28")
# torch's zip writer does not say why it failed. What it has written so far fills the disk still.
_ZIP = re.compile(r"PytorchStreamWriter failed|unexpected pos|file write failed|iostream error")
# A rank that waits for the one whose disk is full loses it.
_LOST = re.compile(r"Connection (closed|reset) by|Broken pipe|remote process exited")
_FULL = 1 << 26  # bytes


def full_disk(error: BaseException | None, output: Path, step: int, rank: int) -> str | None:
    """One line about an error that a full disk has caused, or ``None``: it has another cause.

    Args:
        error: that came out of the training.
        output: folder of the run's checkpoints.
        step: of the checkpoint that was being written.
        rank: this one.
    """
    folder = output / f"checkpoint-{step}"
    for cause in _causes(error):
        text, path = str(cause), folder if folder.is_dir() else output
        lost = _LOST.search(text) is not None
        if isinstance(cause, OSError) and cause.errno in _ERRORS:
            path = Path(cause.filename or path)
        elif not _TEXT.search(text) and not ((lost or _ZIP.search(text)) and _is_full(output)):
            continue
        told = re.search(r"failed on rank (\d+)|\(RANK (\d+)\)", text)
        where = next(filter(None, told.groups())) if told else rank
        who = f"a rank that rank {rank} was waiting for" if lost else f"rank {where}"
        what = "Disk quota exceeded" if "quota" in text and "No space" not in text else "No space left on device"
        return f"{what}: {path} ({who}); {_whole(output)}"
    return None


class LastLine:
    """Says it when an exception ends the process: the Trainer's save raises where no callback can catch it.

    Args:
        explain: what to say of an error, if anything.
    """

    def __init__(self, explain: Callable[[BaseException], str | None]):
        self._explain = explain
        self._before: Callable[..., Any] | None = None

    def install(self) -> None:
        """From now on; once."""
        if self._before is None:
            self._before, sys.excepthook = sys.excepthook, self._hook

    def remove(self) -> None:
        """Put the hook of before back, unless somebody has put another in its place."""
        if self._before is not None and sys.excepthook == self._hook:
            sys.excepthook = self._before
            self._before = None

    def _hook(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        (self._before or sys.__excepthook__)(kind, error, trace)
        text = self._explain(error)
        if text is not None:
            say_last(text)


def say_last(text: str) -> None:
    """Print a line on the error console after which a process that ends prints nothing."""
    # A progress bar that is open then is drawn once more as it is deleted.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(text, file=sys.stderr, flush=True)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of: a file object's error may hide behind one of the writer that was using it."""
    seen: set[int] = set()
    found: list[BaseException] = []
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found.append(error)
        error = error.__cause__ or error.__context__
    # The system's own errors know the path.
    return iter(sorted(found, key=lambda e: not (isinstance(e, OSError) and e.errno in _ERRORS)))


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL
    except OSError:
        return False


def _whole(output: Path) -> str:
    steps = [step for step, folder in manifest.checkpoints(output) if manifest.is_complete(folder)]
    return f"the checkpoint of step {steps[-1]} is whole" if steps else "no checkpoint is whole"
