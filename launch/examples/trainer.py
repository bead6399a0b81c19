"""A Hugging Face Trainer with a low-rank optimizer, which goes on with its newest checkpoint.

    deepspeed launch/examples/trainer.py --deepspeed configs/zero2.json --steps 20

Other stages by another file, DDP with `torchrun` and without `--deepspeed`, one process with `python`; started again it
goes on with its newest checkpoint that is whole, whichever of them wrote it. Without GPUs: `deepspeed
--num_accelerators 2`. The text is random; put your own in `data`.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import ds_lowrank


class ResumingTrainer(ds_lowrank.ResumeAnywhere, Trainer):
    """A Trainer that resumes from a checkpoint of any layout on any number of ranks."""


def main() -> None:
    """Train, and leave a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed", help="one of configs/zero*.json")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="runs/trainer")
    parser.add_argument("--local_rank", help="given by the deepspeed launcher, not needed")
    args = parser.parse_args()
    gpus = torch.cuda.is_available()
    if not gpus:
        ds_lowrank.prepare_cpu()
    arguments = TrainingArguments(
        args.folder,
        deepspeed=args.deepspeed,
        max_steps=args.steps,
        save_steps=10,
        save_total_limit=2,
        learning_rate=0.01,
        bf16=gpus,
        use_cpu=not gpus,
        logging_steps=5,
        report_to="none",
    )
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    model = AutoModelForCausalLM.from_config(shape)  # in parts from the beginning under ZeRO-3
    rows = torch.randint(512, (512, 64), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = {"rank": 32, "update_proj_gap": 50}  # in the place of the "lowrank" block of the DeepSpeed file
    checkpoints = ds_lowrank.CheckpointCallback()
    trainer = ResumingTrainer(
        model,
        arguments,
        train_dataset=data,
        optimizer_cls_and_kwargs=ds_lowrank.trainer_optimizer(options, args=arguments),
        callbacks=[ds_lowrank.LowRankCallback(), checkpoints],
    )
    newest = ds_lowrank.newest_complete(args.folder)
    if newest and int(newest.name.split("-")[1]) >= args.steps:
        return  # the Trainer would make one step more
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    trainer.accelerator.end_training()
    if checkpoints.preempted:  # by SIGTERM or SIGUSR1, with a checkpoint: whoever started this may start it again
        sys.exit(ds_lowrank.PREEMPTED_EXIT_CODE)


if __name__ == "__main__":
    main()
