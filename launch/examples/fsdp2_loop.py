"""A training loop without a Trainer: FSDP2, a low-rank optimizer, and checkpoints that any number of ranks resumes.

    torchrun --nproc-per-node 2 launch/examples/fsdp2_loop.py --steps 20

Started again with the same --folder it goes on with the newest checkpoint there. The text is random; put your own in
`batches`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import ds_lowrank


def batches(rank: int, first: int, stop: int) -> Iterator[torch.Tensor]:
    """Token ids of this rank, 4 × 64, a batch a step."""
    for step in range(first, stop):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        yield torch.randint(512, (4, 64), generator=generator)


def main() -> None:
    """Train, and leave a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2_loop"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    model = LlamaForCausalLM(shape).to(device)
    # Wide matrices by columns: nothing of them travels in an ordinary step.
    place = ds_lowrank.long_side_placement(mesh.size())
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    optimizer = ds_lowrank.build_optimizer(model, {"rank": 32, "update_proj_gap": 50}, lr=0.01)
    ds_lowrank.describe(optimizer)

    done = 0
    # A checkpoint is whole when it has its metadata, which are written last.
    whole = {int(path.parent.name.split("-")[1]): path.parent for path in args.folder.glob("step-*/.metadata")}
    if whole:
        weights, states = get_state_dict(model, optimizer)
        saved: dict[str, Any] = {"model": weights, "optimizer": states, "step": torch.zeros((), dtype=torch.int64)}
        dcp.load(saved, checkpoint_id=whole[max(whole)])
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        done = int(saved["step"])
    if done >= args.steps:
        raise SystemExit(f"{args.folder} has a checkpoint of step {done}: there is nothing left to do")
    for step, ids in enumerate(batches(dist.get_rank(), done, args.steps), done + 1):
        ids = ids.to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
    weights, states = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": states, "step": torch.tensor(args.steps)}
    dcp.save(saved, checkpoint_id=args.folder / f"step-{args.steps}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
