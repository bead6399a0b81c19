"""One training loop for every framework: what a case is trained with, layout by layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

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
    def master(self) -> bool: ...
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

    def save(self, folder: Path, full: bool = False) -> None:
        """A checkpoint as the framework and the Trainer write it; FSDP2 in shards or, ``full``, in whole tensors."""
        ...

    def load(self, folder: Path, full: bool = False) -> None:
        """Go on with what the same layout has saved, by the framework's own means."""
        ...

    def close(self) -> None: ...


def start(case: Case, model: nn.Module, built: Callable[[nn.Module], None] = lambda model: None) -> Run:
    """Put a model under the case's framework, on all ranks together.

    Args:
        case: what it is trained with.
        model: whole, and the same on all ranks.
        built: called with the model when the optimizer is made and DDP or DeepSpeed has not seen it.
    """
    with warnings.catch_warnings():
        # In models this small clamping the rank is what a case is about; the warning has a test of its own.
        warnings.filterwarnings("ignore", message=".*clamped to.*")
        if case.layout in ZERO_STAGE:
            return DeepSpeedRun(case, model, built)
        return TorchRun(case, model, built)


class DeepSpeedRun:
    """ZeRO-1, 2 and 3."""

    def __init__(self, case: Case, model: nn.Module, built: Callable[[nn.Module], None]):
        import deepspeed

        config = deepspeed_config(case)
        self.model = model
        self.optimizer = ds_lowrank.deepspeed_optimizer(model, config)
        built(model)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)

    def step(self, losses: list[dict[str, Any]]) -> None:
        for arguments in losses:
            self.engine.backward(self.engine(**arguments))
            self.engine.step()

    def save(self, folder: Path, full: bool = False) -> None:
        self.engine.save_checkpoint(str(folder))

    def load(self, folder: Path, full: bool = False) -> None:
        path, _ = self.engine.load_checkpoint(str(folder))
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}"

    def close(self) -> None:
        self.engine.destroy()


def deepspeed_config(case: Case) -> dict[str, Any]:
    """The DeepSpeed configuration of a case, with its ``"lowrank"`` block."""
    zero: dict[str, Any] = {"stage": ZERO_STAGE[case.layout], "reduce_bucket_size": 100_000}
    if case.layout == "zero3":  # every parameter is partitioned, however small; several sub-groups
        zero.update(stage3_param_persistence_threshold=0, sub_group_size=1_500, stage3_prefetch_bucket_size=0)
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    bf16: dict[str, Any] = {"enabled": case.dtype == "bf16"}
    if not case.master:
        bf16.update(bf16_master_weights_and_grads=True, bf16_optimizer_states=True)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": bf16,
        "zero_optimization": {**zero, **case.zero},
        "lowrank": case.options,
        **case.config,
    }


class TorchRun:
    """One process, DistributedDataParallel, FSDP2 and HSDP: an ordinary loop, bf16 by autocast or mixed precision."""

    def __init__(self, case: Case, model: nn.Module, built: Callable[[nn.Module], None]):
        self._case = case
        self._autocast = case.dtype == "bf16" and case.layout in ("one", "ddp")
        if case.layout in ("fsdp2", "hsdp"):
            shard(case, model)
        self.model = model
        self.optimizer = ds_lowrank.build_optimizer(model, case.options)
        built(model)
        self.norm: Tensor | None = None  # of the last step's gradients, before they were clipped
        self._projects = case.options.get("gradients") == "projected"
        hooked = case.layerwise or self._projects
        if hooked and case.layout == "ddp":
            ds_lowrank.exclude_from_ddp(model, self.optimizer)
        self._wrapped = model
        if case.layout == "ddp":
            # Otherwise DDP puts its buckets into another order after its first backward pass: a resumed run adds up
            # three or more ranks in another order in that one step.
            self._wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        if hooked:
            self.optimizer.ensure_state()  # the hooks have to be there before the first backward pass

    def step(self, losses: list[dict[str, Any]]) -> None:
        for micro, arguments in enumerate(losses):
            with self._synchronised(micro + 1 == len(losses)), self._precision():
                loss = self._wrapped(**arguments)
                (loss / len(losses)).backward()
        if self._case.clip and self._projects:
            self.norm = self.optimizer.clip_grad_norm_(self._case.clip)
        elif self._case.clip:
            self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, full: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._case.layout in ("fsdp2", "hsdp"):
            model, optimizer = self._states(full)
            if not full:
                dcp.save({"model": model}, checkpoint_id=folder / "pytorch_model_fsdp_0")
                dcp.save({"optimizer": optimizer}, checkpoint_id=folder / "optimizer_0")
            elif dist.get_rank() == 0:
                torch.save(model, folder / "pytorch_model_fsdp.bin")
                torch.save(optimizer, folder / "optimizer.bin")
            return
        self.optimizer.consolidate_state_dict()
        if dist.get_rank() == 0:
            save_file(self.model.state_dict(), folder / "model.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        dist.barrier()

    def load(self, folder: Path, full: bool = False) -> None:
        if self._case.layout not in ("fsdp2", "hsdp"):
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
            self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            return
        options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
        if full:
            first = dist.get_rank() == 0
            model = torch.load(folder / "pytorch_model_fsdp.bin", weights_only=True) if first else {}
            optimizer = torch.load(folder / "optimizer.bin", weights_only=True) if first else {}
        else:
            model, optimizer = self._states(full)
            dcp.load({"model": model}, checkpoint_id=folder / "pytorch_model_fsdp_0")
            dcp.load({"optimizer": optimizer}, checkpoint_id=folder / "optimizer_0")
        set_model_state_dict(self.model, model, options=options)
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=options)

    def _states(self, full: bool) -> tuple[dict[str, Any], Any]:
        options = StateDictOptions(full_state_dict=full, cpu_offload=full)
        model = get_model_state_dict(self.model, options=options)
        return model, get_optimizer_state_dict(self.model, self.optimizer, options=options)

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
