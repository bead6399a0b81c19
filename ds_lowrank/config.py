"""One validated set of options <-> the ``"lowrank"`` block of a DeepSpeed JSON <-> command-line flags."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_lowrank.methods import make_method
from ds_lowrank.states.formats import BASIS_DTYPES, STATE_DTYPES
from ds_lowrank.subspace.sides import PROJ_TYPES

BLOCK = "lowrank"
GRAM_DTYPES = ("auto", "float32", "float64")
GRADIENT_DTYPES = ("auto", "float32", "bfloat16", "float16")
GRADIENTS = ("full", "projected")
ACCUMULATOR_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class LowRankConfig:
    """Options of the low-rank optimizer, checked at construction.

    Attributes:
        rank: r, dimension of the subspace of each projected matrix.
        rank_pattern: regular expression on the parameter's name -> its own rank; the first match wins.
        update_proj_gap: τ, optimizer steps between two refreshes of a matrix.
        scale: α, factor on the low-rank update (GaLore's scale).
        proj_type: ``std`` (project the shorter dimension), ``reverse_std``, ``right``, ``left``.
        rule: how projected gradients become a direction: ``adamw``, or another of :data:`ds_lowrank.rules.RULES`.
        rule_options: the rule's own hyper-parameters; those that are not given have the rule's defaults.
        selection: ``importance`` (SARA), ``dominant`` (GaLore), ``uniform``, ``random``, or another of
            :data:`ds_lowrank.selections.SELECTIONS`.
        selection_options: the selection's own hyper-parameters.
        moments: at a refresh, ``keep`` the moments as they are (GaLore) or ``project`` the first onto the new basis.
        optim_target_modules: which modules' weights are projected, in the HF Trainer's form: ``all-linear``, one
            regular expression on the module's whole name, or a list of names or parts of names.
        seed: key of the sampler, beside the parameter's name and the refresh index.
        stagger: spread the refreshes over the period in waves (True), or all at once as the papers do (False).
        wave_size: matrices in a wave.
        shard_projection: ranks that share a matrix keep a part of its basis each and join it ahead of each use
            (True), or all of it (False).
        gram_dtype: ``float32``, ``float64``, or ``auto``: float64 on a CPU, float32 elsewhere.
        gradient_dtype: in which the model computes gradients, which decides what counts as their rounding where they
            have fewer directions than r: ``float32``, ``bfloat16``, ``float16``, or ``auto``: that of the model, or of
            FSDP2's or the Trainer's mixed precision. Of ``torch.autocast`` in a loop of one's own nothing else tells.
        state_dtype: how moments are kept: ``fp32`` (float64 for float64 weights), ``bf16``, or ``int8``: codes in
            blocks of 64 within a row, with a scale each; of parameters that are not projected, in blocks of 64
            elements.
        basis_dtype: how bases are kept: ``fp32``, ``bf16``, ``int8``, or ``int4``.
        stochastic_rounding: of weights that are bf16 without an fp32 master copy (FSDP2, DDP, one process, DeepSpeed
            with ``bf16_master_weights_and_grads``), where updates smaller than half a step would be lost.
        layerwise: step in the backward pass and free each gradient at once (FSDP2, DDP, one process; no clipping of
            the gradient norm, which would need all gradients).
        accumulation_steps: backward passes a step, read by ``layerwise`` only; the Trainer's are taken there.
        gradients: ``full``, or ``projected``: every rank projects its own gradient of a matrix as soon as the backward
            pass has made it, and frees it; what is accumulated, averaged over the ranks and clipped is R = ∇A B. Clip
            by :meth:`ds_lowrank.LowRankAdamW.clip_grad_norm_` then.
        accumulator_dtype: in which projected gradients are added up: ``fp32`` (float64 for float64 weights), or
            ``bf16``, rounded stochastically.
        lr, betas, eps, weight_decay: of AdamW; ``None`` leaves them to ``TrainingArguments`` or the optimizer's
            defaults.

    Raises:
        ValueError: naming the option, the value and what is allowed.
    """

    rank: int = 128
    rank_pattern: dict[str, int] = field(default_factory=dict)
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    rule: str = "adamw"
    rule_options: dict[str, float] = field(default_factory=dict)
    selection: str = "importance"
    selection_options: dict[str, float] = field(default_factory=dict)
    moments: str = "keep"
    optim_target_modules: str | list[str] = "all-linear"
    seed: int = 0
    stagger: bool = True
    wave_size: int = 8
    shard_projection: bool = True
    gram_dtype: str = "auto"
    gradient_dtype: str = "auto"
    state_dtype: str = "fp32"
    basis_dtype: str = "fp32"
    stochastic_rounding: bool = False
    layerwise: bool = False
    accumulation_steps: int = 1
    gradients: str = "full"
    accumulator_dtype: str = "fp32"
    lr: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for option in ("rank", "update_proj_gap", "wave_size", "accumulation_steps"):
            _require_positive_int(option, getattr(self, option))
        if not isinstance(self.rank_pattern, Mapping):
            raise ValueError(f"lowrank.rank_pattern must map patterns to ranks, got {self.rank_pattern!r}")
        for pattern, rank in self.rank_pattern.items():
            _require_pattern("rank_pattern", pattern)
            _require_positive_int(f"rank_pattern[{pattern!r}]", rank)
        for option, allowed in (
            ("proj_type", PROJ_TYPES),
            ("gram_dtype", GRAM_DTYPES),
            ("gradient_dtype", GRADIENT_DTYPES),
            ("gradients", GRADIENTS),
            ("accumulator_dtype", ACCUMULATOR_DTYPES),
            ("state_dtype", STATE_DTYPES),
            ("basis_dtype", BASIS_DTYPES),
        ):
            _require_choice(option, getattr(self, option), allowed)
        for option in ("stagger", "shard_projection", "layerwise", "stochastic_rounding"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"lowrank.{option} must be true or false, got {getattr(self, option)!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"lowrank.seed must be an integer, got {self.seed!r}")
        if not _is_number(self.scale) or self.scale <= 0:
            raise ValueError(f"lowrank.scale must be a number above 0, got {self.scale!r}")
        for option in ("rule_options", "selection_options"):
            if not isinstance(getattr(self, option), Mapping):
                raise ValueError(f"lowrank.{option} must map options to numbers, got {getattr(self, option)!r}")
        if self.layerwise and self.gradients == "projected":
            raise ValueError(
                "lowrank.layerwise steps in the backward pass, and lowrank.gradients 'projected' adds projected "
                "gradients up for step(): use one of them (layerwise where nothing is accumulated or clipped)"
            )
        make_method(self)  # refuses unknown names, and what does not go together
        self._check_targets()
        self._check_adamw()

    def _check_targets(self) -> None:
        targets = self.optim_target_modules
        if isinstance(targets, str):
            if not targets:
                raise ValueError("lowrank.optim_target_modules is empty: name modules, or use 'all-linear'")
            if targets != "all-linear":
                _require_pattern("optim_target_modules", targets)
        elif not (isinstance(targets, (list, tuple)) and targets and all(isinstance(t, str) and t for t in targets)):
            raise ValueError(
                "lowrank.optim_target_modules must be 'all-linear', a regular expression or a non-empty list of "
                f"module names, got {targets!r}"
            )
        else:
            for target in targets:
                if target != "all-linear":
                    _require_pattern("optim_target_modules", target)

    def _check_adamw(self) -> None:
        check_adamw(self.lr, self.betas, self.eps, self.weight_decay, where="lowrank.", tensors=False)
        if self.betas is not None:  # JSON has lists; a tuple compares and hashes
            object.__setattr__(self, "betas", tuple(self.betas))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LowRankConfig:
        """Build from a plain mapping. An unknown key is refused, with the nearest known one in the message."""
        if not isinstance(options, Mapping):
            raise ValueError(f'the "{BLOCK}" block must be a mapping of options, got {options!r}')
        known = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown option lowrank.{key}{hint} Known options: {', '.join(known)}")
        return cls(**options)

    @classmethod
    def from_deepspeed(cls, config: str | Path | Mapping[str, Any]) -> LowRankConfig:
        """Read the ``"lowrank"`` block of a DeepSpeed configuration (path of a JSON file, or its content).

        DeepSpeed ignores top-level blocks that it does not know, so the block may live in its file. A missing block
        means the defaults.
        """
        content = load_json(config)
        for key in content:
            if key != BLOCK and difflib.get_close_matches(str(key).lower(), [BLOCK], cutoff=0.8):
                raise ValueError(f'unknown block "{key}" in the configuration: did you mean "{BLOCK}"?')
        return cls.from_dict(content.get(BLOCK, {}))

    def replace(self, **overrides: Any) -> LowRankConfig:
        """Copy with some options replaced, checked again; unknown names are refused as in :meth:`from_dict`."""
        return self.from_dict({**self.to_dict(), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping that :meth:`from_dict` reads back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def rank_of(self, name: str) -> int:
        """Configured rank of the parameter called ``name``, before it is clamped to the parameter's shape."""
        for pattern, rank in self.rank_pattern.items():
            if re.search(pattern, name):
                return rank
        return self.rank


def load_json(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Content of a configuration given as a mapping or as the path of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a JSON object.
    """
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {str(path)!r} does not exist")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # bytes that are no text are one too
        raise ValueError(f"configuration {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"configuration {str(path)!r} must hold a JSON object")
    return content


def check_adamw(lr: Any, betas: Any, eps: Any, weight_decay: Any, where: str = "", *, tensors: bool = True) -> None:
    """Check AdamW's hyper-parameters; ``None`` stands for "not set" and passes.

    Args:
        lr, betas, eps, weight_decay: of AdamW.
        where: what the option's name begins with in an error.
        tensors: whether ``lr`` may be a tensor of one number, as torch's optimizers take it.

    Raises:
        ValueError: naming the option, the value and what is allowed.
    """
    rate = lr.item() if tensors and isinstance(lr, Tensor) and lr.numel() == 1 else lr
    if rate is not None and not (_is_number(rate) and rate >= 0):
        raise ValueError(f"{where}lr must be a number >= 0, got {lr!r}")
    if betas is not None and not (
        isinstance(betas, (list, tuple)) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
    ):
        raise ValueError(f"{where}betas must be two numbers in [0, 1), got {betas!r}")
    if eps is not None and not (_is_number(eps) and eps > 0):
        raise ValueError(f"{where}eps must be a number above 0, got {eps!r}")
    if weight_decay is not None and not (_is_number(weight_decay) and weight_decay >= 0):
        raise ValueError(f"{where}weight_decay must be a number >= 0, got {weight_decay!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_positive_int(option: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"lowrank.{option} must be an integer >= 1, got {value!r}")


def _require_choice(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"lowrank.{option} must be one of {', '.join(allowed)}, got {value!r}")


def _require_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"lowrank.{option}: {pattern!r} is not a regular expression: {error}") from error
