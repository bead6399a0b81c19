"""Which parameters are projected: what patterns name, and what ``all-linear`` means."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ds_lowrank.config import LowRankConfig
from ds_lowrank.layouts import bare_model, whole_shape
from ds_lowrank.plan.geometry import matrix_shape
from ds_lowrank.targets.heads import is_linear, protected_modules
from ds_lowrank.targets.names import clean_name, named_parameters

AUTOMATIC = "all-linear"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What PEFT calls the two factors of a LoRA.
_LORA = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Target:
    """A parameter that is trained in a subspace.

    Attributes:
        name: name in ``model.named_parameters()``, without what wrappers put into it.
        parameter: the weight.
        rank: r, clamped to min(m, n).
        stacked: whether it is several matrices stacked along the first dimension.
    """

    name: str
    parameter: nn.Parameter
    rank: int
    stacked: bool


@dataclass(frozen=True)
class Targets:
    """What a configuration means for a model.

    Attributes:
        projected: the projected parameters, in the model's parameter order.
        narrow: names of those that ``all-linear`` means and whose short side does not exceed r, in the same order. They
            are trained full-rank: a subspace of r dimensions is all of theirs.
    """

    projected: list[Target]
    narrow: list[str]


@dataclass(frozen=True)
class _Candidate:
    """A parameter that a pattern may name.

    Attributes:
        name: what patterns are matched with: the module's name, or the parameter's where a module has several.
        parameter: the weight.
        stacked: see :class:`Target`.
        linear: whether ``all-linear`` means it.
        words: of an embedding or an output head: a pattern reaches it only if it holds one of them.
        loose: a matrix of another module than a linear layer (packed attention, a GRU), which only the name of the
            parameter reaches, with or without its ``_weight``.
        refused: why it cannot be projected, if so.
    """

    name: str
    parameter: nn.Parameter
    stacked: bool = False
    linear: bool = True
    words: frozenset[str] = frozenset()
    loose: bool = False
    refused: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix, or of each of the stacked ones."""
        return matrix_shape(whole_shape(self.parameter), self.stacked)


def find_targets(model: nn.Module, config: LowRankConfig) -> Targets:
    """What is projected. See :func:`list_targets`.

    Raises:
        ValueError: nothing is left to project, and what :func:`list_targets` refuses.
    """
    found = list_targets(model, config)
    if found.projected:
        return found
    if not found.narrow:
        raise ValueError(
            "nothing is projected: 'all-linear' matches no trainable linear layer here but heads. Name what else is to "
            "be projected in optim_target_modules, convolutions for example"
        )
    shapes = {name: matrix_shape(whole_shape(p), len(whole_shape(p)) > 2) for name, p in named_parameters(model)}
    widest = max(found.narrow, key=lambda name: min(shapes[name]))
    raise ValueError(
        "nothing is projected: no matrix that all-linear means here has a short side above the rank. The largest short "
        f"side is {min(shapes[widest])}, of {widest} {shapes[widest]}, at rank {config.rank_of(widest)}: set a smaller "
        "rank, or name matrices in optim_target_modules"
    )


def list_targets(model: nn.Module, config: LowRankConfig) -> Targets:
    """What is projected, if anything is.

    ``all-linear`` means the two-dimensional weights of linear layers and the stacked weights of experts (E × m × n,
    each of the E matrices projected by itself), where their short side exceeds the rank: others gain nothing.
    Embeddings, output heads (:func:`ds_lowrank.targets.heads.protected_modules`), convolutions (as out × (in · k · k))
    and matrices that are not larger than the rank are projected only where ``optim_target_modules`` names them; frozen
    parameters never are.

    Raises:
        ValueError: a pattern of ``optim_target_modules`` or ``rank_pattern`` matches nothing, or something that is no
            matrix, or a rank is larger than both sides of a weight that is named.
    """
    model = bare_model(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is projected: every parameter of the model is frozen")
    patterns = _patterns(config)
    used: set[str] = set()
    chosen: dict[int, tuple[_Candidate, bool]] = {}  # and whether a pattern names it
    for candidate in _candidates(model):
        # Of what has no elements nothing can move, under whatever name.
        trained = candidate.parameter.requires_grad and 0 not in whole_shape(candidate.parameter)
        hits = [p for p in patterns if trained and _matches(p, candidate)]
        if not hits:
            continue
        if candidate.refused:
            raise ValueError(
                f"optim_target_modules: {hits[0]!r} matches {candidate.name} {whole_shape(candidate.parameter)}, "
                f"{candidate.refused}: name other modules, and it is trained full-rank"
            )
        used.update(hits)
        chosen[id(candidate.parameter)] = (candidate, hits != [AUTOMATIC])
    unused = [p for p in patterns if p not in used]
    if unused and patterns != [AUTOMATIC]:
        names = [c.name for c in _candidates(model) if c.linear and not c.words]
        raise ValueError(
            f"optim_target_modules: {', '.join(map(repr, unused))} matches no trainable linear layer. "
            f"Linear layers here: {_shorten(names)}"
        )
    matched = {name: chosen[id(p)] for name, p in named_parameters(model) if id(p) in chosen}
    for pattern in config.rank_pattern:
        if not any(re.search(pattern, name) for name in matched):
            raise ValueError(
                f"rank_pattern: {pattern!r} matches no projected parameter. Projected: {_shorten(list(matched))}"
            )
    narrow = [n for n, (c, named) in matched.items() if not named and min(c.shape) <= config.rank_of(n)]
    left = set(narrow)
    targets = [
        Target(name, candidate.parameter, _clamped_rank(name, candidate, config), candidate.stacked)
        for name, (candidate, _) in matched.items()
        if name not in left
    ]
    _warn_of_lora(targets)
    return Targets(targets, narrow)


def module_of(matrix: str) -> str:
    """What a pattern has to match to name a matrix: the module, or the parameter where a module has several.

    Args:
        matrix: name of the parameter, or of one of several stacked matrices, ``name[e]``.
    """
    return re.sub(r"(\.weight)?(\[\d+\])?$", "", matrix)


def advise_naming(matrices: Sequence[str]) -> str:
    """What to set so that matrices are projected which are not: a checkpoint has states of them.

    Args:
        matrices: names of their parameters, or those of stacked matrices, ``name[e]``.
    """
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "[0-9]+", module_of(name)) for name in matrices))
    return (
        "use the same optim_target_modules. all-linear leaves out heads and what is not larger than the rank: name "
        f"what was projected, optim_target_modules = {json.dumps([AUTOMATIC, *patterns])}"
    )


def _warn_of_lora(targets: Sequence[Target]) -> None:
    factors = [t.name for t in targets if any(part in _LORA for part in t.name.split("."))]
    if factors:
        warnings.warn(
            f"factors of LoRA are projected, which gains nothing, they are small already: {_shorten(factors, 2)}. "
            "Train them with AdamW, or the whole matrices without LoRA",
            stacklevel=4,
        )


def _patterns(config: LowRankConfig) -> list[str]:
    targets = config.optim_target_modules
    return [targets] if isinstance(targets, str) else list(targets)


def _matches(pattern: str, candidate: _Candidate) -> bool:
    """The HF Trainer's reading: a name, a part of it, or a regular expression for the whole of it."""
    if pattern == AUTOMATIC:
        return candidate.linear and not candidate.words
    if candidate.loose:
        own = re.escape(candidate.name.rsplit(".", 1)[-1].removesuffix("_weight"))
        if not re.search(rf"(?<!\w){own}(_weight)?(?!\w)", pattern):
            return False
        if re.fullmatch(pattern, candidate.name.removesuffix("_weight")):
            return True
    if candidate.words and not any(word in pattern for word in candidate.words):
        return False
    return pattern in candidate.name or re.fullmatch(pattern, candidate.name) is not None


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Weights of linear layers (GPT-2's Conv1D is one), embeddings and convolutions, and every other parameter of
    two or more dimensions, which is taken for stacked matrices if it has three.
    """
    protected = protected_modules(model)
    for module_name, module in model.named_modules():
        module_name = clean_name(module_name)
        words = protected.get(module, frozenset())
        linear = is_linear(module) or isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            dimensions = len(whole_shape(parameter))
            own = f"{module_name}.{name}" if module_name else name
            unfit = None if parameter.is_floating_point() else f"which is {parameter.dtype}"
            if linear and name == "weight" and dimensions == 2:
                yield _Candidate(module_name, parameter, linear=not unfit, words=words, refused=unfit)
            elif isinstance(module, _CONVOLUTIONS) and name == "weight":
                yield _Candidate(module_name, parameter, linear=False, words=words, refused=unfit)
            elif dimensions == 3 and "conv" not in type(module).__name__.lower():
                experts = "expert" in own.lower() or hasattr(module, "num_experts")
                yield _Candidate(own, parameter, stacked=True, linear=experts and not unfit, words=words, refused=unfit)
            elif dimensions > 2:
                reason = f"a {dimensions}-dimensional parameter of a {type(module).__name__}, which is no matrix"
                yield _Candidate(own, parameter, linear=False, words=words, refused=reason)
            elif dimensions == 2:
                yield _Candidate(own, parameter, linear=False, words=words, loose=True, refused=unfit)


def _clamped_rank(name: str, candidate: _Candidate, config: LowRankConfig) -> int:
    rank, shape = config.rank_of(name), candidate.shape
    if rank > max(shape):
        raise ValueError(
            f"rank {rank} is larger than both sides of {name} {shape}: choose a rank up to {min(shape)}, set "
            "rank_pattern for this parameter, or leave it out of optim_target_modules"
        )
    if rank > min(shape):
        warnings.warn(
            f"rank {rank} is larger than the shorter side of {name} {shape}: clamped to {min(shape)}", stacklevel=2
        )
    return min(rank, *shape)


def _shorten(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown + (f", … ({len(names)} in all)" if len(names) > most else "")
