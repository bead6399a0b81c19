"""How a run is sharded and fed: from the framework's own file to the numbers that memory depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ds_lowrank.config import LowRankConfig
from ds_lowrank.integrations.deepspeed_config import BATCH_KEYS, read_deepspeed_config
from ds_lowrank.integrations.deepspeed_reading import offload_device
from ds_lowrank.integrations.fsdp import read_fsdp_config
from ds_lowrank.methods import Method, make_method
from ds_lowrank.planner import passed_over
from ds_lowrank.planner.accelerate_files import deepspeed_file, fsdp_block, is_accelerates
from ds_lowrank.states.formats import BASIS_DTYPES, STATE_DTYPES

_OF_THE_BLOCK = (
    "rule",
    "rule_options",
    "selection",
    "selection_options",
    "state_dtype",
    "basis_dtype",
    "layerwise",
    "gradients",
    "accumulator_dtype",
)
KINDS = ("zero1", "zero2", "zero3", "fsdp2", "ddp", "one")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASTERS = ("fp32", "bf16")
# A plan looks at every rank: this many take a few seconds.
MOST_RANKS = 4096


@dataclass(frozen=True)
class Setup:
    """Everything beside the model.

    Attributes:
        kind: ``zero1``, ``zero2``, ``zero3``, ``fsdp2``, ``ddp`` or ``one``.
        ranks: how many share the model.
        seq, micro_batch: tokens of a sequence, sequences of a micro-step.
        accumulation: micro-steps a step.
        checkpointing: whether layers keep their input alone and are computed again in the backward pass.
        dtype: ``bf16``, ``fp16`` or ``fp32``: of what the model computes with.
        master: ``fp32``, or ``bf16``: no fp32 copy of the weights. Under DeepSpeed without offload, which takes no
            optimizer but its own there.
        state_dtype, basis_dtype: formats of low-rank moments and of bases.
        rule, rule_options, selection, selection_options: the method, as in :class:`ds_lowrank.LowRankConfig`.
        layerwise, gradients, accumulator_dtype: when gradients are used and what is kept of them, as there.
        copies: of the model, FSDP2 alone: more than one is HSDP, sharded among ranks / copies and replicated.
        no_sync: FSDP2's micro-steps but the last leave gradients whole where they were made, as the Trainer's do
            without ``sync_each_batch``. DDP's always do, DeepSpeed's never.
        offload: ZeRO's optimizer on the CPU.
        accumulation_dtype, communication_dtype: of gradients, in DeepSpeed.
        reduce_bucket, prefetch_bucket, max_live, max_reuse, persistence, sub_group: DeepSpeed's sizes, in elements.
        overlap: ``overlap_comm``.
        reshard: FSDP2's ``reshard_after_forward``.
        units: FSDP2's units: ``accelerate`` (layers, the embedding, norm and head together) or ``layers`` (the rest
            in one).
        device: ``cuda`` or ``cpu``: what ``gram_dtype`` ``auto`` means.
        passed_over: keys of the framework's file that change memory and are not planned.
    """

    kind: str
    ranks: int
    seq: int = 1024
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: bool = False
    dtype: str = "bf16"
    master: str = "fp32"
    state_dtype: str = "fp32"
    basis_dtype: str = "fp32"
    rule: str = "adamw"
    rule_options: Mapping[str, float] = field(default_factory=dict, hash=False)
    selection: str = "importance"
    selection_options: Mapping[str, float] = field(default_factory=dict, hash=False)
    layerwise: bool = False
    gradients: str = "full"
    accumulator_dtype: str = "fp32"
    copies: int = 1
    no_sync: bool = False
    offload: bool = False
    accumulation_dtype: str = "bf16"
    communication_dtype: str = "bf16"
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    persistence: int = 100_000
    sub_group: int = 1_000_000_000
    overlap: bool = False
    reshard: bool = True
    units: str = "accelerate"
    device: str = "cuda"
    passed_over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, allowed in (
            ("kind", KINDS),
            ("dtype", tuple(DTYPES)),
            ("master", MASTERS),
            ("state_dtype", STATE_DTYPES),
            ("basis_dtype", BASIS_DTYPES),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}")
        for option in ("ranks", "seq", "micro_batch", "accumulation", "copies"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{option} must be an integer >= 1, got {value!r}")
        if self.ranks > MOST_RANKS:
            raise ValueError(f"ranks must be at most {MOST_RANKS}, which is what a plan goes through, got {self.ranks}")
        if self.kind == "one" and self.ranks != 1:
            raise ValueError(f"one process has one rank, got {self.ranks}")
        if self.kind == "zero1" and self.dtype == "bf16" and self.accumulation_dtype == "fp32":
            raise ValueError("BF16_Optimizer (stage 1, bf16, fp32 accumulation) is not planned: use stage 2")
        if self.master == "bf16" and self.kind.startswith("zero") and (self.offload or self.dtype != "bf16"):
            raise ValueError("master bf16 under DeepSpeed needs dtype bf16, and no offload_optimizer")
        if self.copies > 1 and (self.kind != "fsdp2" or self.ranks % self.copies):
            raise ValueError(f"{self.copies} copies of a model are for FSDP2 and divide its ranks, got {self.ranks}")
        if self.layerwise and self.kind.startswith("zero"):
            raise ValueError("layerwise is not to be had under DeepSpeed: use gradients projected, or another layout")
        if self.gradients == "projected" and self.offload:
            raise ValueError("gradients projected is not to be had with offload_optimizer: leave one of them out")
        _ = self.method  # refuses what does not go together

    @property
    def width(self) -> int:
        """Bytes of a number that the model computes with."""
        return DTYPES[self.dtype]

    @property
    def master_width(self) -> int:
        """Bytes of a weight that the optimizer steps, and of its gradient there."""
        return DTYPES[self.master]

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return self.ranks // self.copies

    @property
    def projected(self) -> bool:
        """Whether gradients are projected where they are made."""
        return self.gradients == "projected"

    @property
    def replicated(self) -> bool:
        """Whether projected matrices lie whole on every rank: of ZeRO-1 and 2 those that DeepSpeed is not given."""
        return self.kind in ("ddp", "one") or (self.projected and self.kind in ("zero1", "zero2"))

    @property
    def local_passes(self) -> bool:
        """Whether the backward passes but the last of a step leave gradients on the rank that made them."""
        return self.accumulation > 1 and (self.kind in ("ddp", "one") or (self.kind == "fsdp2" and self.no_sync))

    @property
    def weight_dtype(self) -> str:
        """Of a projected matrix as it is stepped: DeepSpeed's masters are not in ``projected``'s reach."""
        return self.dtype if self.projected and self.kind.startswith("zero") else self.master

    @property
    def tokens(self) -> int:
        """Of a micro-step."""
        return self.seq * self.micro_batch

    @cached_property
    def method(self) -> Method:
        """What is computed, and what is kept of it.

        Raises:
            ValueError: rule, selection and formats do not go together.
        """
        return make_method(LowRankConfig.from_dict({name: getattr(self, name) for name in _OF_THE_BLOCK}))

    def of(self, config: LowRankConfig) -> Setup:
        """This setup with the method and the formats of a configuration."""
        return self.replace(**{name: getattr(config, name) for name in _OF_THE_BLOCK})

    def replace(self, **changes: Any) -> Setup:
        """Copy with some attributes changed, checked again."""
        return dataclasses.replace(self, **changes)


def from_deepspeed(
    config: str | Path | Mapping[str, Any], ranks: int, hidden: int, **given: Any
) -> tuple[Setup, dict[str, Any]]:
    """A setup from a DeepSpeed file, as DeepSpeed reads it, and the options of its ``"lowrank"`` block.

    Args:
        config: path or content; ``"auto"`` as the HF Trainer fills it in. Or the path of accelerate's YAML file, which
            names one.
        ranks: data-parallel ranks.
        hidden: the model's hidden size, which the Trainer's ``"auto"`` sizes depend on.
        given: attributes of :class:`Setup` that the file does not decide; ``master`` where it leaves DeepSpeed its fp32
            copy; ``micro_batch`` and ``accumulation`` win over the file's.

    Raises:
        ValueError: ``master`` contradicts the file, or the batch sizes each other; see also
            :func:`ds_lowrank.check_deepspeed_config`. What only a GPU can do is planned without one.
        FileNotFoundError: no such file.
    """
    asked = None
    for fsdp in ("copies", "no_sync"):
        if given.get(fsdp) is None:
            given.pop(fsdp, None)
    if is_accelerates(config):
        config, asked = deepspeed_file(config)  # type: ignore[arg-type]
    settings = read_deepspeed_config(config, here=False)
    zero, block = settings.zero, settings.content["zero_optimization"]
    dtype = given.pop("dtype", None) or asked or "bf16"
    if settings.dtype != "auto":
        dtype = settings.dtype
    # What the Trainer fills in where a size is "auto", by both names of the key.
    automatic = {
        "reduce_bucket_size": hidden * hidden,
        "prefetch_bucket_size": int(0.9 * hidden * hidden),
        "param_persistence_threshold": 10 * hidden,
    }

    def size(key: str) -> int:
        return automatic[key] if "auto" in (block.get(key), block.get(f"stage3_{key}")) else int(getattr(zero, key))

    master = given.pop("master", None) or ("bf16" if settings.bf16_master else "fp32")
    if settings.bf16_master and master != "bf16":
        raise ValueError(f"master {master} contradicts bf16.bf16_master_weights_and_grads = true in the DeepSpeed file")
    batch = _batch(settings.content, ranks, given.pop("micro_batch", None), given.pop("accumulation", None))
    setup = Setup(
        kind=f"zero{zero.stage}",
        ranks=ranks,
        dtype=dtype,
        master=master,
        accumulation_dtype=_NAMES[settings.accumulation_dtype] if settings.accumulation_dtype else dtype,
        communication_dtype=_dtype(settings.content.get("communication_data_type"), dtype),
        offload=offload_device(zero) != "none",
        reduce_bucket=size("reduce_bucket_size"),
        prefetch_bucket=size("prefetch_bucket_size"),
        max_live=int(zero.max_live_parameters),
        max_reuse=int(zero.max_reuse_distance),
        persistence=size("param_persistence_threshold"),
        sub_group=int(zero.sub_group_size),
        overlap=bool(zero.overlap_comm),
        passed_over=passed_over.of_deepspeed(settings.content, zero),
        **batch,
        **given,
    )
    return setup, dict(settings.content.get("lowrank", {}))


def _batch(content: Mapping[str, Any], ranks: int, asked: int | None, asked_steps: int | None) -> dict[str, Any]:
    """Sequences and number of the micro-steps: as DeepSpeed completes its three sizes, of which two say the third."""
    whole, micro, steps = (None if content.get(key) == "auto" else content.get(key) for key in BATCH_KEYS)
    micro, steps = micro if asked is None else asked, steps if asked_steps is None else asked_steps
    if whole is not None:
        if steps is None:
            steps = whole // (ranks * micro) if micro else 1
        if micro is None:
            micro = whole // (ranks * steps) if steps else 1
        if (asked, asked_steps) == (None, None) and whole != micro * steps * ranks:
            raise ValueError(
                f"train_batch_size = {whole} cannot be had by {ranks} ranks with a micro-batch of {micro} and {steps} "
                "accumulation steps, and DeepSpeed refuses it: correct one of them"
            )
    return {"micro_batch": 1 if micro is None else micro, "accumulation": 1 if steps is None else steps}


def from_fsdp(config: str | Path | Mapping[str, Any], ranks: int, **given: Any) -> tuple[Setup, dict[str, Any]]:
    """A setup from the Trainer's FSDP2 file, or accelerate's YAML, and the options of its ``"lowrank"`` block.

    Raises:
        ValueError: parameters are offloaded, which is not planned; see also
            :func:`ds_lowrank.integrations.fsdp.check_fsdp_config`.
        FileNotFoundError: no such file.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if is_accelerates(config):
        config, asked = fsdp_block(config)  # type: ignore[arg-type]
        given.setdefault("dtype", asked or "bf16")
    settings = read_fsdp_config(config)
    if settings.offload:
        raise ValueError(
            "offload_params (cpu_offload) = true of the FSDP configuration is not planned: set it to false, or use "
            "DeepSpeed's offload_optimizer"
        )
    given.setdefault("no_sync", True)
    given["checkpointing"] = settings.checkpointing or given.get("checkpointing", False)
    named = passed_over.of_fsdp(settings.keys)
    setup = Setup(kind="fsdp2", ranks=ranks, reshard=settings.reshard, passed_over=named, **given)
    return setup, dict(settings.content.get("lowrank", {}))


def low_rank_config(options: Mapping[str, Any], rank: int | None) -> LowRankConfig:
    """The options of the run.

    Raises:
        ValueError: neither the block nor the caller sets a rank, or an option is unknown or out of range.
    """
    options = dict(options)
    if rank is not None:
        options["rank"] = rank
    if "rank" not in options:
        raise ValueError(
            'no rank: set "rank" in the "lowrank" block, or --rank (launch/pretrain.py takes a quarter of the hidden '
            "size where nothing is set)"
        )
    return LowRankConfig.from_dict(options)


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _dtype(value: Any, default: str) -> str:
    return default if value in (None, "auto") else str(value).lower()
