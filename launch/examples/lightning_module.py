"""A low-rank optimizer in Lightning: `configure_optimizers` makes it, and nothing else changes.

    pip install lightning
    python launch/examples/lightning_module.py --devices 2 --steps 20
    python launch/examples/lightning_module.py --devices 2 --steps 20 --gradients projected

The other three methods are for gradients `projected`, which DDP is not to average and Lightning cannot clip by itself.
Under DDP every rank keeps a part of the states; Lightning calls `consolidate_state_dict` before it saves them.
The text is random; put your own in `batches`.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import ds_lowrank


class LowRankModule(lightning.LightningModule):
    """A language model trained in low rank.

    Args:
        options: see "Options of the lowrank block" in the README; `lr` and AdamW's others too.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.projected = options.get("gradients") == "projected"
        self.optimizer: ds_lowrank.LowRankAdamW | None = None
        shape = LlamaConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
        )
        self.model = LlamaForCausalLM(shape)

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        """Loss of a batch of token ids."""
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_model(self) -> None:
        """Called before DDP wraps the model."""
        if self.projected and self.optimizer is None:
            self.optimizer = ds_lowrank.build_optimizer(self, self.options)
            ds_lowrank.exclude_from_ddp(self, self.optimizer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called when the model lies on its device."""
        return self.optimizer or ds_lowrank.build_optimizer(self, self.options)

    def on_train_start(self) -> None:
        """Called before the first backward pass, ahead of which projected gradients need their hooks."""
        if self.projected:
            ds_lowrank.describe(self.optimizers())

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning would clip what is in `.grad`, where projected gradients are not."""
        if self.projected and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            optimizer.clip_grad_norm_(gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def batches(count: int) -> DataLoader:
    """Random token ids, 4 × 64; Lightning deals them to the ranks."""
    ids = torch.randint(512, (count, 64), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(ids), batch_size=4, collate_fn=lambda rows: torch.stack([row[0] for row in rows]))


def main() -> None:
    """Train; a checkpoint lies in --folder, and --checkpoint goes on with one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="runs/lightning")
    parser.add_argument("--checkpoint")
    parser.add_argument("--gradients", default="full", choices=("full", "projected"))
    args = parser.parse_args()
    lightning.seed_everything(0)
    module = LowRankModule({"rank": 32, "update_proj_gap": 50, "lr": 0.01, "gradients": args.gradients})
    trainer = lightning.Trainer(
        max_steps=args.steps,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        default_root_dir=args.folder,
        gradient_clip_val=1.0,
        logger=False,
    )
    trainer.fit(module, batches(8 * args.devices * args.steps), ckpt_path=args.checkpoint)
    if trainer.is_global_zero:
        print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss']:.6f}")


if __name__ == "__main__":
    main()
