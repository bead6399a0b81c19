"""A DeepSpeed configuration as DeepSpeed reads it, and what of it is not supported: all reasons at once.

DeepSpeed's own classes parse it: they know the aliases, the defaults and the deprecated keys of their version. What the
HF Trainer is to fill in, ``"auto"``, counts as absent, as it does for DeepSpeed's classes.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_lowrank.config import BLOCK, LowRankConfig, load_json
from ds_lowrank.integrations.deepspeed_reading import (
    bf16_block,
    is_on,
    mapping,
    offload_device,
    read_bf16,
    read_zero,
    refused,
    without_auto,
)
from ds_lowrank.layouts import BF16_MASTER

OLDEST, TOO_NEW = (0, 16), (0, 20)
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Between these, DeepSpeed mistakes stage 1 with bf16 and fp32 accumulation for stage 0 (seen in 0.17.6 and 0.18.0).
_NO_BF16_OPTIMIZER = ((0, 17), (0, 19))
# Without offload these keep, of a step's micro-batches, the gradients of the last alone (deepspeedai/DeepSpeed#7718).
_DROP_MICRO_BATCHES = ("0.17.6", "0.18.0", "0.18.1", "0.18.2")


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What a configuration means to the DeepSpeed that is installed.

    Attributes:
        content: the file's.
        zero: its ``DeepSpeedZeroConfig``.
        dtype: of what the model computes with: ``bf16``, ``fp16``, ``fp32``, or ``auto``: the Trainer says.
        bf16_master: whether bf16 weights are to have no fp32 master copy.
        accumulation_dtype: of gradients that are added up; ``None``: the model's.
        clipping: norm at which gradients are clipped, 0 for not at all; ``None``: the Trainer says.
        notes: what the run should be told.
    """

    content: dict[str, Any]
    zero: Any
    dtype: str
    bf16_master: bool
    accumulation_dtype: torch.dtype | None
    clipping: float | None
    notes: list[str]


def check_deepspeed_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what is not supported before anything is started, and warn of a clip that nobody asked for.

    Args:
        config: path of a DeepSpeed JSON file, or its content. ``"auto"`` values of the HF Trainer pass.

    Returns:
        The content.

    Raises:
        ValueError: every setting that cannot be used and what to change, one a line; also for what DeepSpeed itself
            would refuse, for an unknown option in the ``"lowrank"`` block and for a DeepSpeed outside the supported
            range.
        FileNotFoundError: no such file.
    """
    settings = read_deepspeed_config(config)
    for note in settings.notes:
        warnings.warn(note, stacklevel=2)
    return settings.content


def read_deepspeed_config(config: str | Path | Mapping[str, Any], here: bool = True) -> DeepSpeedSettings:
    """A configuration as DeepSpeed reads it.

    Args:
        config: see :func:`check_deepspeed_config`.
        here: whether the run is to start on this machine: what only a GPU can do is refused where there is none.

    Raises:
        ValueError, FileNotFoundError: see :func:`check_deepspeed_config`.
    """
    if isinstance(config, (str, Path)) and Path(config).suffix in (".yaml", ".yml"):
        raise ValueError(
            f"{str(config)!r} is accelerate's configuration: give it to `accelerate launch --config_file`, and here "
            "the file that its deepspeed_config_file names"
        )
    content = load_json(config)
    with _silent():
        reader = _Reader(content, importlib.metadata.version("deepspeed").split("+")[0], here)
        faults = list(dict.fromkeys(reader.faults()))
        if faults:
            raise ValueError("\n".join(faults))
        return reader.settings()


def autocast_dtype(content: Mapping[str, Any]) -> str:
    """``gradient_dtype`` under DeepSpeed's own autocast, whose weights are wider; ``auto`` without it."""
    block = mapping(content.get("torch_autocast"))
    narrow = is_on(block.get("enabled")) and block.get("dtype") in (None, "auto", "bfloat16", "bf16")
    return "bfloat16" if narrow else "auto"


def bf16_master(content: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration asks for bf16 weights without an fp32 master copy."""
    return bool(bf16_block(content).get("bf16_master_weights_and_grads"))


@contextmanager
def _silent() -> Iterator[None]:
    """DeepSpeed logs to stdout what it thinks of a configuration; it will again when the run starts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Reader:
    """One configuration. Blocks that cannot be read count as empty once they are reported."""

    def __init__(self, content: dict[str, Any], installed: str, here: bool):
        self.content, self.installed, self.here = content, installed, here
        self.release = tuple(int(part) for part in installed.split(".")[:2])
        block = content.get("zero_optimization", {})
        self.raw_zero = block if isinstance(block, Mapping) else {}
        self.zero, self.zero_faults = read_zero(self.raw_zero, installed)
        self.bf16 = read_bf16(content)
        fp16 = self._block("fp16").get("enabled")
        self.fp16 = is_on(fp16)
        self.automatic = "auto" in (fp16, mapping(content.get("bf16")).get("enabled"))

    def settings(self) -> DeepSpeedSettings:
        from deepspeed.runtime.config import get_gradient_clipping

        given = self.content.get("gradient_clipping")
        clipping = None if given == "auto" else float(get_gradient_clipping(without_auto(self.content)))
        notes = []
        if given is None and clipping:
            notes.append(
                f"gradients are clipped at a norm of {clipping}: the configuration has no gradient_clipping, and that "
                f'is the default of DeepSpeed {self.installed}. Set "gradient_clipping" to what is meant, 0 for none'
            )
        plain = "auto" if self.automatic else "fp32"
        return DeepSpeedSettings(
            content=self.content,
            zero=self.zero,
            dtype="bf16" if self.bf16.enabled else "fp16" if self.fp16 else plain,
            bf16_master=bool(self.bf16.bf16_master_weights_and_grads),
            accumulation_dtype=self._accumulation_dtype(),
            clipping=clipping,
            notes=notes,
        )

    def faults(self) -> Iterator[str]:
        if not OLDEST <= self.release < TOO_NEW:
            yield (
                f"DeepSpeed {self.installed} is outside the supported range: install deepspeed>={_dotted(OLDEST)},"
                f"<{_dotted(TOO_NEW)}"
            )
        if self.content.get("optimizer") is not None:
            yield (
                'the DeepSpeed configuration has an "optimizer" block beside the low-rank optimizer: remove the block; '
                'lr, betas, eps and weight_decay go into the "lowrank" block or the Trainer\'s arguments'
            )
        yield from self._stage()
        yield from self._offload()
        yield from self._zero()
        yield from self._parallelism()
        yield from self._precision()
        yield from self._bf16_master()
        yield from self._lowrank()
        yield from self._deepspeeds_own()

    def _block(self, key: str) -> Mapping[str, Any]:
        return mapping(self.content.get(key))

    def _accumulation_dtype(self) -> torch.dtype | None:
        from deepspeed.runtime.config import DtypeEnum

        value = self._block("data_types").get("grad_accum_dtype")
        if value in (None, "auto"):
            return None
        try:
            return DtypeEnum(value).value
        except (ValueError, KeyError, TypeError):
            return None

    def _stage(self) -> Iterator[str]:
        if not isinstance(self.content.get("zero_optimization", {}), Mapping):
            yield '"zero_optimization" must be a block with a "stage"'
            return
        if "stage" not in self.raw_zero:
            yield 'the DeepSpeed configuration sets no zero_optimization.stage: add {"stage": 2}, or 1 or 3'
            return
        stage = self.raw_zero["stage"]
        if stage not in (1, 2, 3):
            yield f"zero_optimization.stage = {stage!r} is not supported: set it to 1, 2 or 3"
        if self.raw_zero.get("mics_shard_size", -1) not in (-1, 0):
            yield "zero_optimization.mics_shard_size is not supported: leave it out, or use FSDP2 on a 2-D mesh"
        first, last = _NO_BF16_OPTIMIZER
        wide = self._accumulation_dtype() == torch.float32
        if stage == 1 and self.bf16.enabled and wide and first <= self.release < last:
            yield (
                f"DeepSpeed {_dotted(self.release)} does not shard stage 1 with bf16 and data_types.grad_accum_dtype = "
                "fp32: use stage 2, or another DeepSpeed"
            )

    def _offload(self) -> Iterator[str]:
        parameters, device = self.zero.offload_param, offload_device(self.zero)
        if mapping(self.raw_zero.get("offload_optimizer")).get("ratio", 1.0) != 1.0:
            yield (
                "offload_optimizer.ratio < 1 is not supported: DeepSpeed steps the rest with an AdamW of its own. "
                "Remove it"
            )
        if parameters is not None and str(parameters.device) == "nvme":
            yield 'zero_optimization.offload_param.device = "nvme" is not supported: use "cpu"'
        if device == "nvme":
            yield 'zero_optimization.offload_optimizer.device = "nvme" is not supported: use "cpu"'
        if device != "none" and self.content.get("zero_force_ds_cpu_optimizer", True) is not False:
            yield (
                "offload_optimizer with another optimizer than DeepSpeed's own needs "
                '"zero_force_ds_cpu_optimizer": false at the top level of the configuration'
            )

    def _zero(self) -> Iterator[str]:
        zero = self.zero
        if zero.stage == 2 and self.installed in _DROP_MICRO_BATCHES and offload_device(zero) == "none":
            yield (
                f"DeepSpeed {self.installed} drops, in stage 2, the gradients of all micro-batches of a step but the "
                "last (its issue 7718): install deepspeed<0.17.6 or >=0.18.3, or use stage 1 or 3"
            )
        for key, what in (
            ("round_robin_gradients", "links fragments in another order than it stores them"),
            ("elastic_checkpoint", "cannot save the state of a foreign optimizer"),
        ):
            if getattr(zero, key, False):
                yield f"zero_optimization.{key} = true is not supported: it {what}. Set it to false"
        if self.raw_zero.get("zenflow") is not None:
            yield "zero_optimization.zenflow is not supported: it needs its own optimizer. Remove the block"
        if self.here and not torch.cuda.is_available():
            for key in ("zero_quantized_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights"):
                if getattr(zero, key, False) and (zero.stage == 3 or key == "zero_quantized_gradients"):
                    yield f"zero_optimization.{key} = true needs a GPU, which there is not here. Remove it"
        yield from self.zero_faults

    def _parallelism(self) -> Iterator[str]:
        for name, degree in (
            ("tensor_parallel", "autotp_size"),
            ("expert_parallel", "autoep_size"),
            ("pipeline", "stages"),
        ):
            size = self._block(name).get(degree, 1)
            if isinstance(size, int) and size > 1:
                yield f"{name}.{degree} = {size} is not supported: it cuts matrices before ZeRO does. Remove the block"
        size = self.content.get("sequence_parallel_size", 1)
        if size not in (1, "auto"):
            yield (
                f"sequence_parallel_size = {size!r} is not supported: ranks that share a sequence are no data-parallel "
                "ranks, and gradients are averaged over both. Remove it"
            )
        if self._block("compile").get("deepcompile"):
            yield "compile.deepcompile = true is not supported: it replaces ZeRO's gradient handling"
        if self._block("checkpoint").get("load_universal"):
            yield (
                "checkpoint.load_universal = true is not supported, and not needed: ds_lowrank.load_checkpoint (in the "
                "HF Trainer ds_lowrank.ResumeAnywhere) goes on with a checkpoint of any stage on any number of ranks"
            )

    def _precision(self) -> Iterator[str]:
        autocast = self._block("torch_autocast")
        if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16", "half", "torch.float16"):
            yield (
                "torch_autocast with float16 is not supported: its scaler may skip a step on one rank only. Use "
                "bfloat16"
            )
        if self.fp16 and self.bf16.enabled:
            yield "fp16 and bf16 are both enabled: enable one of them"
        if self.fp16 and self.here and not torch.cuda.is_available():
            yield "fp16 needs a GPU: DeepSpeed refuses it on a CPU. Use bf16 or fp32"
        if self._block("fp16").get("fp16_master_weights_and_grads"):
            yield (
                "fp16.fp16_master_weights_and_grads = true is not supported: DeepSpeed takes no optimizer but its own "
                "DeepSpeedCPUAdam there. Remove it"
            )
        value = self._block("data_types").get("grad_accum_dtype")
        if value not in (None, "auto") and self._accumulation_dtype() is None:
            yield f"data_types.grad_accum_dtype = {value!r} is unknown to DeepSpeed: use fp32, bf16 or fp16"

    def _bf16_master(self) -> Iterator[str]:
        block = bf16_block(self.content)
        if not bf16_master(self.content):
            rounding = self._block(BLOCK).get("stochastic_rounding") is True
            # Of projected gradients the matrices have no master copy, whatever DeepSpeed keeps of the rest.
            bare = self._block(BLOCK).get("gradients") == "projected" and (self.bf16.enabled or self.automatic)
            if rounding and not bare:
                yield (
                    "lowrank.stochastic_rounding = true is for bf16 weights without an fp32 master copy, which "
                    f"DeepSpeed keeps unless told otherwise: set {BF16_MASTER}, or remove it"
                )
            return
        option = "bf16.bf16_master_weights_and_grads = true"
        if not self.bf16.enabled and block.get("enabled") != "auto":
            yield f"{option} rounds what the model computes with: set bf16.enabled to true as well"
        if not block.get("bf16_optimizer_states"):
            yield (
                f"{option} without bf16.bf16_optimizer_states = true is for DeepSpeed's own CPU optimizer: set both. "
                "How moments are kept remains lowrank.state_dtype's affair"
            )
        if offload_device(self.zero) != "none":
            yield (
                f"{option} with offload_optimizer is not supported: DeepSpeed takes no optimizer but its own "
                "DeepSpeedCPUAdam there. Remove one of the two"
            )
        if self.zero.stage == 1 and self._accumulation_dtype() == torch.float32:
            yield (
                f"{option} has no effect in stage 1 with data_types.grad_accum_dtype = fp32, whose BF16_Optimizer "
                "keeps an fp32 master copy: use stage 2"
            )
        try:
            from deepspeed.runtime.precision_config import DeepSpeedBF16Config

            known = DeepSpeedBF16Config.model_fields
        except ImportError:  # its configuration was no class then, and passed over what it did not know
            known = {}
        if "bf16_optimizer_states" not in known:
            yield (
                f"DeepSpeed {self.installed} cannot do without an fp32 master copy: it knows no "
                "bf16.bf16_optimizer_states. Install a newer one (0.19.8 does), or remove both"
            )

    def _lowrank(self) -> Iterator[str]:
        try:
            config = LowRankConfig.from_deepspeed(self.content)
        except ValueError as error:
            yield str(error)
            return
        if config.gradients == "projected":
            yield from self._projected()
        if config.layerwise:
            yield (
                "lowrank.layerwise = true is not supported under DeepSpeed: its engine collects the gradients of a "
                "backward pass and steps when it is over. Remove it, or use FSDP2"
            )

    def _projected(self) -> Iterator[str]:
        """What does not go with matrices that DeepSpeed's optimizer is not given."""
        option = 'lowrank.gradients = "projected"'
        if self.fp16:
            yield f"{option} with fp16 is not supported: its losses are scaled. Use bf16"
        if offload_device(self.zero) != "none" or self.zero.offload_param is not None:
            yield f"{option} with offload_optimizer or offload_param is not supported yet: remove one of the two"
        if self.zero.stage == 1 and self.bf16.enabled and self._accumulation_dtype() == torch.float32:
            yield (
                f"{option} in stage 1 with bf16 and data_types.grad_accum_dtype = fp32 is not supported: DeepSpeed "
                "uses its BF16_Optimizer there. Use stage 2, or leave grad_accum_dtype out"
            )
        if getattr(self.zero, "compute_grad_norm", True) is False:
            yield f"{option} needs the gradients' norm: remove zero_optimization.compute_grad_norm = false"
        if getattr(self.zero, "zero_hpz_partition_size", 1) > 1:
            yield f"{option} with zero_optimization.zero_hpz_partition_size > 1 is not supported: remove it"
        if self.content.get("gradient_allreduce_op", "mean") not in ("mean", "auto"):
            yield f"{option} averages gradients over the ranks: remove gradient_allreduce_op"

    def _deepspeeds_own(self) -> Iterator[str]:
        """What DeepSpeed would refuse when the run starts: key by key, so that all of it is found."""
        for key in BATCH_KEYS:
            size = self.content.get(key, "auto")
            if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                yield f"{key} must be an integer >= 1, got {size!r}"
        clipping = self.content.get("gradient_clipping")
        if clipping not in (None, "auto") and not (_is_number(clipping) and clipping >= 0):
            yield f"gradient_clipping must be a number >= 0, 0 for none, got {clipping!r}"
        stage = self.zero.stage if self.zero.stage in (1, 2, 3) else 2
        base = {BATCH_KEYS[1]: 1, "zero_optimization": {"stage": stage}}
        passed_over = ("zero_optimization", "optimizer", BLOCK, "sequence_parallel_size", *BATCH_KEYS)
        rest = {k: v for k, v in without_auto(self.content).items() if k not in passed_over}
        found = [fault for key, value in rest.items() for fault in refused(base, {key: value}, self.installed)]
        yield from found
        if not found:
            yield from refused(base, rest, self.installed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
