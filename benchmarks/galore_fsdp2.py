"""What does the same model cost under FSDP2 with galore-torch, which runs there on DTensors, and with ours?

    python benchmarks/galore_fsdp2.py --json out.json

The matrices of LLaMA-60M with random gradients, sharded by ``fully_shard``: each parameter along dimension 0 as FSDP2
does by default, or wide ones along dimension 1 (``long side``). All figures are the largest of a rank. Of both
optimizers the collectives are those that really ran, seen by one dispatch mode that knows neither; ours are checked
against what ``optimizer.comm`` counted. A rank is taken to send, as rings and direct exchanges do,

    all-gather       (N-1)/N of the result          all-reduce   2(N-1)/N of the tensor
    reduce-scatter   (N-1)/N of the tensor          all-to-all   what is not for itself
    reduce           the tensor, nothing on the rank that gets the sum

``step_*`` is an ordinary step, ``refresh_*`` one in which every matrix refreshes (ours all at once too, to compare),
``mean_bytes`` a step's share over a period of 200 steps, the default of both; ``decompositions`` are those of a period.
``state_bytes`` are unique storages, so a view counts as all that it keeps alive; ``tensor_bytes`` the tensors alone.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from harness import shard
from llama import LAYER, Matrices, Setting
from rank_pool import RankPool
from storage import state_bytes
from table import Row, json_argument, show
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import ds_lowrank

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
GAP = 2
PERIOD = 200
PLACEMENTS = ("default", "long side")
OURS = {"ours": True, "ours, whole bases": False}  # shard_projection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rank", type=int, default=128, help="r")
    parser.add_argument("--layers", type=int, default=8)
    json_argument(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    for ranks in args.ranks:
        pool = RankPool(ranks, timeout=600)
        for placement in PLACEMENTS:
            for optimizer in ("galore-torch", *OURS):
                answers = pool.run(measure, optimizer, placement, args.layers, args.rank)
                rows.append({"optimizer": optimizer, "placement": placement, "ranks": ranks, **largest(answers)})
                print(*rows[-1].values(), flush=True)
        pool.close()
    title = f"FSDP2, the matrices of {args.layers} layers of LLaMA-60M, r = {args.rank}: the largest of a rank"
    show(rows, title, args.json)


def largest(answers: Sequence[dict[str, int]]) -> dict[str, int]:
    """The largest figure of a rank, key by key."""
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def measure(optimizer: str, placement: str, layers: int, rank: int) -> dict[str, int]:
    """State, and what an ordinary step and one that refreshes everything send, on this rank. Collective.

    Raises:
        AssertionError: our own count of sent bytes is not what ran.
    """
    model = Matrices([LAYER] * layers)
    shard(Setting("fsdp2", {}, wide_on_columns=placement == "long side"), model)
    chosen = _galore(model, rank) if optimizer == "galore-torch" else _ours(model, rank, OURS[optimizer])
    model(0).backward()
    chosen.step()
    step, refresh = (tapped_step(model, chosen, seed) for seed in (1, 2))
    return {
        "state_bytes": state_bytes(chosen.state),
        "tensor_bytes": _tensor_bytes(chosen.state),
        "step_bytes": step.sent.total(),
        "step_collectives": step.calls.total(),
        "refresh_bytes": refresh.sent.total(),
        "mean_bytes": step.sent.total() + (refresh.sent.total() - step.sent.total()) // PERIOD,
        "decompositions": refresh.decompositions,
    }


def tapped_step(model: Matrices, optimizer: torch.optim.Optimizer, seed: int) -> Wiretap:
    """One step, what ran in it, and our own count of it checked. Collective."""
    optimizer.zero_grad()
    model(seed).backward()
    if isinstance(optimizer, ds_lowrank.LowRankAdamW):
        optimizer.comm.reset()
    with Wiretap() as tap:
        optimizer.step()
    if isinstance(optimizer, ds_lowrank.LowRankAdamW):
        counted = optimizer.comm.sent_bytes
        assert counted.total() == tap.sent.total(), f"counted {counted}, ran {tap.sent}"
    return tap


def _galore(model: Matrices, rank: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    group = {"params": list(model.parameters()), "rank": rank, "update_proj_gap": GAP, "scale": 0.25}
    return GaLoreAdamW([{**group, "proj_type": "std"}], no_deprecation_warning=True, **ADAMW)


def _ours(model: Matrices, rank: int, shard_projection: bool) -> ds_lowrank.LowRankAdamW:
    options = {"rank": rank, "update_proj_gap": GAP, "stagger": False, "gram_dtype": "float32", **ADAMW}
    return ds_lowrank.build_optimizer(model, {**options, "shard_projection": shard_projection})


class Wiretap(TorchDispatchMode):
    """Counts the collectives over all ranks, and the decompositions, that run on this rank inside it.

    Attributes:
        sent: bytes by collective, by the convention above.
        calls: how often each ran.
        decompositions: singular value and eigenvalue decompositions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.decompositions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes again as what runs on this rank
        # With fake tensors DTensor finds out shapes, without running anything.
        if not any(issubclass(t, FakeTensor) for t in types):
            name = func._schema.name
            if name in ("aten::_linalg_svd", "aten::_linalg_eigh"):
                self.decompositions += 1
            elif name.split("::")[0] in ("c10d", "_c10d_functional", "_dtensor"):
                self._count(name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("wait_tensor", "_wrap_tensor_autograd"):
            return
        ranks, rank = dist.get_world_size(), dist.get_rank()
        if name == "all_reduce":  # torch.distributed._functional_collectives, used by DTensors
            sent = 2 * (ranks - 1) * _bytes(args[0]) // ranks
        elif name == "all_gather_into_tensor":
            sent = (ranks - 1) * _bytes(args[0])
        elif name == "reduce_scatter_tensor":
            sent = (ranks - 1) * _bytes(args[0]) // ranks
        elif name == "allreduce_":  # torch.distributed, used by ours
            sent = sum(2 * (ranks - 1) * _bytes(t) // ranks for t in args[0])
        elif name == "_allgather_base_":
            sent = (ranks - 1) * _bytes(args[1])
        elif name == "alltoall_base_":
            sent = _bytes(args[1]) - args[4][rank] * args[1].element_size()
        elif name == "reduce_":
            sent = 0 if args[3] == rank else sum(map(_bytes, args[0]))
        else:
            raise NotImplementedError(f"{name}: say what a rank sends in it")
        self.sent[name] += sent
        self.calls[name] += 1


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensor_bytes(state: Any) -> int:
    """Bytes of the tensors of a state, without what their storages hold beside them."""
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, Tensor):
        return _bytes(state)
    if type(state).__name__ == "GaLoreProjector":
        state = vars(state)
    return sum(map(_tensor_bytes, state.values())) if isinstance(state, dict) else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main()
