"""The position in a stream, kept in every checkpoint: a file for each rank, written before the checkpoint counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import PretrainArguments
from stream import PackedStream
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_lowrank.integrations.checkpoints import together


class StreamPosition(TrainerCallback):
    """Writes where each rank's stream stands, and goes on there.

    On another number of ranks, whose shares are others, it leaves the stream to the Trainer, which reads as many
    batches as were used and passes over them, or begins it anew with ``--ignore_data_skip``.

    Args:
        stream: what the Trainer trains on.
    """

    def __init__(self, stream: PackedStream) -> None:
        self.stream = stream
        self._first_step = 0

    def resume(self, folder: str | None, args: PretrainArguments) -> None:
        """Before training: take up what this rank has left in a checkpoint. Sets ``args.ignore_data_skip``.

        Raises:
            ValueError: the stream is another one than the checkpoint's.
        """
        if folder is None:
            return
        path = _file(Path(folder), args.process_index)
        saved = torch.load(path, weights_only=True) if path.is_file() else None
        if saved is None or saved["world_size"] != args.world_size:
            again = "as much is read again and passed over, and of other ranks' shares some documents may come twice"
            if args.ignore_data_skip:
                self._first_step = args.resumed_step
                again = "the stream begins anew (--ignore_data_skip), with documents that were read before"
            if args.process_index == 0:
                before = "no position of the stream" if saved is None else f"positions of {saved['world_size']} ranks"
                print(f"{folder} has {before}: on {args.world_size} ranks {again}", file=sys.stderr, flush=True)
            return
        try:
            self.stream.load_state(saved["stream"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self._first_step = saved["step"]
        args.ignore_data_skip = True

    def on_save(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_only_model:
            return
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        used = self.stream.first_row + (state.global_step - self._first_step) * rows
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

        def write() -> None:
            position = {"step": state.global_step, "world_size": args.world_size, "stream": self.stream.state_at(used)}
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(position, _file(folder, args.process_index))

        together(write, "writing the position in the stream")

    def all_skipped(self) -> dict[str, str]:
        """Shards that some rank could not read, with the error. Collective."""
        if not dist.is_initialized():
            return dict(self.stream.skipped)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, dict(self.stream.skipped))
        return {name: error for skipped in found for name, error in skipped.items()}


def _file(folder: Path, rank: int) -> Path:
    return folder / f"stream_{rank}.pt"
