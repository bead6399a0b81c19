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

from ds_lowrank.checkpoint.safe_load import load_file
from ds_lowrank.integrations.checkpoints import together


class StreamPosition(TrainerCallback):
    """Writes where each rank's stream stands, and goes on there.

    On another number of ranks, whose shares are others, it leaves the stream to the Trainer, which reads as many
    batches as were used and passes over them. With ``--ignore_data_skip`` it begins anew where it cannot go on.

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
        saved = load_file(path) if path.is_file() else None
        known = saved if saved is not None and saved["world_size"] == args.world_size else None
        if known is not None:
            try:
                self.stream.load_state(known["stream"])
            except ValueError as error:
                if not args.ignore_data_skip:
                    raise ValueError(f"{path}: {error}, or the stream begin anew, --ignore_data_skip") from error
                known = None
        if known is not None:
            self._first_step = known["step"]
            args.ignore_data_skip = True
        elif args.ignore_data_skip:
            self._first_step = args.resumed_step
            self._say(args, f"the stream begins anew (--ignore_data_skip): it cannot go on where {folder} was")
        else:
            before = "no position of the stream" if saved is None else f"positions of {saved['world_size']} ranks"
            self._say(
                args,
                f"{folder} has {before}: on {args.world_size} ranks as much is read again and passed over, and of "
                "other ranks' shares some documents may come twice; --ignore_data_skip begins the stream anew",
            )

    @staticmethod
    def _say(args: PretrainArguments, text: str) -> None:
        if args.process_index == 0:
            print(text, file=sys.stderr, flush=True)

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
