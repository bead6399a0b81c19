"""How a run is sharded and fed: from the framework's own file to the numbers that memory depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.config import LowRankConfig
from ds_lowrank.integrations.deepspeed import bf16_master, check_deepspeed_config
from ds_lowrank.integrations.fsdp import check_fsdp_config
from ds_lowrank.states.formats import BASIS_DTYPES, STATE_DTYPES

KINDS = ("zero1", "zero2", "zero3", "fsdp2", "ddp", "one")
DTYPES = {"bf16": 2, "fp32": 4}
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
        dtype: ``bf16`` or ``fp32``: of what the model computes with.
        master: ``fp32``, or ``bf16``: no fp32 copy of the weights. Under DeepSpeed without offload, which takes no
            optimizer but its own there.
        state_dtype, basis_dtype: formats of low-rank moments and of bases.
        offload: ZeRO's optimizer on the CPU.
        accumulation_dtype, communication_dtype: of gradients, in DeepSpeed.
        reduce_bucket, prefetch_bucket, max_live, max_reuse, persistence, sub_group: DeepSpeed's sizes, in elements.
        overlap: ``overlap_comm``.
        reshard: FSDP2's ``reshard_after_forward``.
        units: FSDP2's units: ``accelerate`` (layers, the embedding, norm and head together) or ``layers`` (the rest
            in one).
        device: ``cuda`` or ``cpu``: what ``gram_dtype`` ``auto`` means.
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

    def __post_init__(self) -> None:
        for option, allowed in (
            ("kind", KINDS),
            ("dtype", tuple(DTYPES)),
            ("master", tuple(DTYPES)),
            ("state_dtype", STATE_DTYPES),
            ("basis_dtype", BASIS_DTYPES),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}")
        for option in ("ranks", "seq", "micro_batch", "accumulation"):
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

    @property
    def width(self) -> int:
        """Bytes of a number that the model computes with."""
        return DTYPES[self.dtype]

    @property
    def master_width(self) -> int:
        """Bytes of a weight that the optimizer steps, and of its gradient there."""
        return DTYPES[self.master]

    @property
    def tokens(self) -> int:
        """Of a micro-step."""
        return self.seq * self.micro_batch

    def replace(self, **changes: Any) -> Setup:
        """Copy with some attributes changed, checked again."""
        return dataclasses.replace(self, **changes)


def from_deepspeed(
    config: str | Path | Mapping[str, Any], ranks: int, hidden: int, **given: Any
) -> tuple[Setup, dict[str, Any]]:
    """A setup from a DeepSpeed file, and the options of its ``"lowrank"`` block.

    Args:
        config: path or content; ``"auto"`` as the HF Trainer fills it in.
        ranks: data-parallel ranks.
        hidden: the model's hidden size, which the Trainer's ``"auto"`` sizes depend on.
        given: attributes of :class:`Setup` that the file does not decide; ``master`` where it leaves DeepSpeed its fp32
            copy.

    Raises:
        ValueError: ``master`` contradicts the file; see also
            :func:`ds_lowrank.integrations.deepspeed.check_deepspeed_config`.
        FileNotFoundError: no such file.
    """
    content = check_deepspeed_config(config)
    zero = content["zero_optimization"]
    enabled = (content.get("bf16") or {}).get("enabled", False)
    dtype = given.pop("dtype", None) or "bf16"
    if enabled != "auto":
        dtype = "bf16" if enabled else "fp32"
    accumulation_dtype = _dtype((content.get("data_types") or {}).get("grad_accum_dtype"), dtype)
    automatic = {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }

    def size(key: str, default: int) -> int:
        value = zero.get(key, default)
        return automatic.get(key, default) if value == "auto" else int(value)

    stage = zero["stage"]
    offload = zero.get("offload_optimizer") or {}
    master = given.pop("master", None) or ("bf16" if bf16_master(content) else "fp32")
    if bf16_master(content) and master != "bf16":
        raise ValueError(f"master {master} contradicts bf16.bf16_master_weights_and_grads = true in the DeepSpeed file")
    steps = content.get("gradient_accumulation_steps", "auto")
    accumulation = given.pop("accumulation", None)
    setup = Setup(
        kind=f"zero{stage}",
        ranks=ranks,
        dtype=dtype,
        master=master,
        accumulation=accumulation or (1 if steps == "auto" else int(steps)),
        accumulation_dtype=accumulation_dtype,
        communication_dtype=_dtype(content.get("communication_data_type"), dtype),
        offload=offload.get("device", "none") != "none",
        reduce_bucket=size("reduce_bucket_size", 500_000_000),
        prefetch_bucket=size("stage3_prefetch_bucket_size", 50_000_000),
        max_live=size("stage3_max_live_parameters", 1_000_000_000),
        max_reuse=size("stage3_max_reuse_distance", 1_000_000_000),
        persistence=size("stage3_param_persistence_threshold", 100_000),
        sub_group=size("sub_group_size", 1_000_000_000),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        **given,
    )
    return setup, dict(content.get("lowrank", {}))


def from_fsdp(config: str | Path | Mapping[str, Any], ranks: int, **given: Any) -> tuple[Setup, dict[str, Any]]:
    """A setup from the Trainer's FSDP2 file, and the options of its ``"lowrank"`` block.

    Raises:
        ValueError, FileNotFoundError: see :func:`ds_lowrank.integrations.fsdp.check_fsdp_config`.
    """
    content = check_fsdp_config(config)
    reshard = content.get("reshard_after_forward", content.get("fsdp_reshard_after_forward", True))
    given = {key: value for key, value in given.items() if value is not None}
    return Setup(kind="fsdp2", ranks=ranks, reshard=bool(reshard), **given), dict(content.get("lowrank", {}))


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


def _dtype(value: Any, default: str) -> str:
    names = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "bfp16": "bf16"}
    return default if value in (None, "auto") else names.get(str(value), default)
