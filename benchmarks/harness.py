"""One training loop for every framework: what a case is trained with, layout by layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_lowrank
from ds_lowrank.optimizer import LowRankAdamW

ZERO_STAGE = {"zero1": 1, "zero2": 2, "zero3": 3}
LAYOUTS = ("one", "ddp", *ZERO_STAGE, "fsdp2", "hsdp")


class Case(Protocol):
    """What of a case the loops need; see :class:`cases.Case`."""

    @property
    def layout(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def clip(self) -> float: ...
    @property
    def wide_on_columns(self) -> bool: ...
    @property
    def offload(self) -> bool: ...
    @property
    def layerwise(self) -> bool: ...
    @property
    def zero(self) -> dict[str, Any]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def options(self) -> dict[str, Any]: ...


class Run(Protocol):
    """A model in training under one framework."""

    optimizer: LowRankAdamW
    model: nn.Module

    def step(self, losses: list[dict[str, Any]]) -> None:
        """One optimizer step; a mapping of the model's keyword arguments for each micro-step."""
        ...

    def close(self) -> None: ...


def start(case: Case, model: nn.Module) -> Run:
    """Put a model under the case's framework, on all ranks together."""
    with warnings.catch_warnings():
        # In models this small clamping the rank is what a case is about; the warning has a test of its own.
        warnings.filterwarnings("ignore", message=".*clamped to.*")
        if case.layout in ZERO_STAGE:
            return DeepSpeedRun(case, model)
        return TorchRun(case, model)


class DeepSpeedRun:
    """ZeRO-1, 2 and 3."""

    def __init__(self, case: Case, model: nn.Module):
        import deepspeed

        config = deepspeed_config(case)
        self.model = model
        self.optimizer = ds_lowrank.deepspeed_optimizer(model, config)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)

    def step(self, losses: list[dict[str, Any]]) -> None:
        for arguments in losses:
            self.engine.backward(self.engine(**arguments))
            self.engine.step()

    def close(self) -> None:
        self.engine.destroy()


def deepspeed_config(case: Case) -> dict[str, Any]:
    """The DeepSpeed configuration of a case, with its ``"lowrank"`` block."""
    zero: dict[str, Any] = {"stage": ZERO_STAGE[case.layout], "reduce_bucket_size": 100_000}
    if case.layout == "zero3":  # every parameter is partitioned, however small; several sub-groups
        zero.update(stage3_param_persistence_threshold=0, sub_group_size=1_500, stage3_prefetch_bucket_size=0)
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_optimization": {**zero, **case.zero},
        "lowrank": case.options,
        **case.config,
    }


class TorchRun:
    """One process, DistributedDataParallel, FSDP2 and HSDP: an ordinary loop, bf16 by autocast or mixed precision."""

    def __init__(self, case: Case, model: nn.Module):
        self._case = case
        self._autocast = case.dtype == "bf16" and case.layout in ("one", "ddp")
        if case.layout in ("fsdp2", "hsdp"):
            shard(case, model)
        self.model = model
        self.optimizer = ds_lowrank.build_optimizer(model, case.options)
        if case.layerwise and case.layout == "ddp":
            ds_lowrank.exclude_from_ddp(model, self.optimizer)
        self._wrapped = nn.parallel.DistributedDataParallel(model) if case.layout == "ddp" else model
        if case.layerwise:
            self.optimizer.ensure_state()  # the hooks have to be there before the first backward pass

    def step(self, losses: list[dict[str, Any]]) -> None:
        for micro, arguments in enumerate(losses):
            with self._synchronised(micro + 1 == len(losses)), self._precision():
                loss = self._wrapped(**arguments)
                (loss / len(losses)).backward()
        if self._case.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        self._wrapped = self.model

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        last = last or self._case.layerwise  # then every micro-step's gradient is used up at once
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and not last:
            with self._wrapped.no_sync():
                yield
        else:
            if hasattr(self.model, "set_requires_gradient_sync"):
                self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def _precision(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self._autocast else nullcontext()


def shard(case: Case, model: nn.Module) -> None:
    """``fully_shard`` every layer and the root, on a 1-D mesh or a 2-D one of two copies (one for an odd number)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    size = dist.get_world_size()
    shards = size
    if case.layout == "hsdp":
        copies = 2 if size % 2 == 0 else 1
        shards = size // copies
        mesh = init_device_mesh("cpu", (copies, shards), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    options: dict[str, Any] = {"mesh": mesh}
    if case.dtype == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if case.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if case.wide_on_columns:
        options["shard_placement_fn"] = ds_lowrank.long_side_placement(shards, min_numel=0)
    layers: Any = model.get_submodule("layers")
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def whole(tensor: Tensor) -> Tensor:
    """A parameter as one process has it. Collective for DTensors and for ZeRO-3's."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()
