"""The plan: every optimizer's bytes on the rank that needs most, moment by moment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ds_lowrank.config import BLOCK, LowRankConfig, load_json
from ds_lowrank.engine.evidence import gram_dtype_on
from ds_lowrank.full_rank.dealt import FLYING, portion_numbers
from ds_lowrank.layouts import BF16_MASTER
from ds_lowrank.planner.activations import Activations, activations
from ds_lowrank.planner.arrangement import Arrangement, arrange
from ds_lowrank.planner.frameworks import Frame, frames
from ds_lowrank.planner.in_backward import Passes, base_terms
from ds_lowrank.planner.model import Model, read_model
from ds_lowrank.planner.setup import Setup, from_deepspeed, from_fsdp, low_rank_config
from ds_lowrank.planner.states import OPTIMIZERS, States, states_of
from ds_lowrank.planner.temporaries import temporaries

TERMS = ("weights", "master", "states", "bases", "gradients", "accumulators", "buckets", "activations", "temporaries")
GIB = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class RankMemory:
    """One optimizer on one rank.

    Attributes:
        optimizer: one of ``OPTIMIZERS``.
        rank: the rank.
        moments: name of a moment -> term -> bytes on the device: ``resident`` between steps; ``forward``, ``loss``,
            ``head``, ``layer`` and ``embedding`` in forward and backward; ``norm``, ``step`` and ``refresh`` (a step in
            which matrices are due); where gradients are used in the backward pass, ``wave``, a layer's with matrices
            that are due.
        solver: bytes of the workspace of ``eigh`` in ``refresh``, counted among its temporaries.
        host: bytes on the CPU.
    """

    optimizer: str
    rank: int
    moments: dict[str, dict[str, int]]
    solver: int
    host: int

    @property
    def peak_moment(self) -> str:
        """The moment with most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at that moment."""
        return sum(self.moments[self.peak_moment].values())

    @property
    def resident(self) -> int:
        """Bytes between steps."""
        return sum(self.moments["resident"].values())


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run on the rank that needs most.

    Attributes:
        model, weights: name and number of weights of the model.
        setup, config: what was planned.
        optimizers: name -> the rank with the highest peak.
        notes: what the figures leave out, and what can be planned but not yet run.
    """

    model: str
    weights: int
    setup: Setup
    config: LowRankConfig
    optimizers: dict[str, RankMemory]
    notes: list[str]

    @property
    def ours(self) -> RankMemory:
        """Of ds_lowrank."""
        return self.optimizers[OPTIMIZERS[-1]]

    def fits(self, gpu_memory: float, optimizer: str = OPTIMIZERS[-1], margin: float = 0.0) -> bool:
        """Whether the peak and ``margin`` stay within ``gpu_memory``, both in GiB."""
        return self.optimizers[optimizer].peak <= (gpu_memory - margin) * GIB

    def to_dict(self) -> dict[str, Any]:
        """Numbers ready for JSON; bytes."""
        return {
            "model": self.model,
            "weights": self.weights,
            "setup": dataclasses.asdict(self.setup),
            "lowrank": self.config.to_dict(),
            "optimizers": {
                name: {
                    "rank": m.rank,
                    "peak": m.peak,
                    "peak_moment": m.peak_moment,
                    "resident": m.resident,
                    "host": m.host,
                    "moments": m.moments,
                }
                for name, m in self.optimizers.items()
            },
            "notes": self.notes,
        }


def check_gpu_memory(gpu_memory: float, margin: float = 0.0) -> None:
    """Refuse what is no memory of a GPU.

    Args:
        gpu_memory, margin: GiB of a GPU, and what is to stay free of it.

    Raises:
        ValueError: see above.
    """
    if not (math.isfinite(gpu_memory) and gpu_memory > 0):
        raise ValueError(f"gpu_memory must be a number of GiB above 0, got {gpu_memory}")
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin must be a number of GiB >= 0, got {margin}")


def plan_memory(
    model: str | Path | Mapping[str, Any] | nn.Module,
    gpus: int,
    *,
    deepspeed: str | Path | Mapping[str, Any] | None = None,
    fsdp_config: str | Path | Mapping[str, Any] | None = None,
    lowrank_config: str | Path | Mapping[str, Any] | None = None,
    rank: int | None = None,
    lowrank: Mapping[str, Any] | None = None,
    **given: Any,
) -> MemoryPlan:
    """Plan the memory of a run.

    Args:
        model: Hugging Face configuration of a causal language model (path or content), or a model.
        gpus: data-parallel ranks.
        deepspeed, fsdp_config: the framework's configuration, path or content, or accelerate's YAML file; neither: DDP
            (one process on one GPU).
        lowrank_config: for DDP and one process: JSON with a ``"lowrank"`` block, path or content.
        rank: r; ``None``: the configuration's.
        lowrank: options that win over the configuration's ``"lowrank"`` block, from which formats are taken too.
        given: attributes of :class:`Setup`: ``seq``, ``micro_batch``, ``accumulation``, ``checkpointing``, ``dtype``,
            ``master``, ``state_dtype``, ``basis_dtype``, ``device``, ``units``, ``copies``, ``no_sync``. Rule,
            selection, ``gradients``, ``accumulator_dtype`` and ``layerwise`` are the block's.

    Raises:
        ValueError: an option is unknown or out of range, no rank is set, the framework's configuration is not
            supported, or transformers cannot build the model.
        FileNotFoundError: no such file.
    """
    if deepspeed is not None and fsdp_config is not None:
        raise ValueError("give one of a DeepSpeed and an FSDP configuration, not both")
    if lowrank_config is not None and (deepspeed is not None or fsdp_config is not None):
        raise ValueError(
            "lowrank_config is for DDP and one process: DeepSpeed's and FSDP's files have a block themselves"
        )
    known = read_model(model)
    formats = {key: given.pop(key, None) for key in ("state_dtype", "basis_dtype")}
    if deepspeed is not None:
        hidden = known.decoder.hidden if known.decoder else 0
        setup, options = from_deepspeed(deepspeed, gpus, hidden, **given)
    elif fsdp_config is not None:
        setup, options = from_fsdp(fsdp_config, gpus, **given)
    else:
        chosen = {key: value for key, value in given.items() if value is not None}
        setup = Setup(kind="ddp" if gpus > 1 else "one", ranks=gpus, **chosen)
        options = {} if lowrank_config is None else dict(load_json(lowrank_config).get(BLOCK, {}))
    asked = {key: value for key, value in formats.items() if value is not None}
    config = low_rank_config({**options, **(lowrank or {}), **asked}, rank)
    return plan_setup(known, config, setup.of(config))


def plan_setup(model: Model, config: LowRankConfig, setup: Setup, arrangement: Arrangement | None = None) -> MemoryPlan:
    """Plan a run that has been described already; see :func:`plan_memory`.

    Args:
        model, config, setup: the run.
        arrangement: what lies where in it, which ``kind``, ``ranks``, ``copies``, ``master``, ``dtype``, ``gradients``
            and ``sub_group`` decide; found where ``None``.
    """
    arrangement = arrangement or arrange(model, config, setup)
    a = Activations(0, 0, 0, 0, 0, 0)
    if model.decoder is not None:
        a = activations(model.decoder, setup.tokens, setup.width, setup.checkpointing)
    gram_width = gram_dtype_on(config.gram_dtype, torch.device(setup.device)).itemsize
    # Other optimizers are given whole gradients, and all of them.
    usual = setup.replace(gradients="full", layerwise=False)
    whole = arrangement if setup.projected is False else arrange(model, config, usual)
    held = frames(model, whole, usual)
    found = {}
    for optimizer in OPTIMIZERS:
        ours = optimizer == OPTIMIZERS[-1]
        if ours and (setup.projected or setup.layerwise):
            states = states_of(optimizer, arrangement, setup)
            made = Passes(model, arrangement, setup, config, gram_width, a).of_ranks(states)
            memories = [_memory(optimizer, k, *moments) for k, moments in _different(made)]
        else:
            states = states_of(optimizer, whole, usual)
            steps = _steps(optimizer, whole, usual, held, states, gram_width)
            ranks = _different(list(zip(map(id, held), states, steps)))
            memories = [on_rank(optimizer, usual, held[k], a, k, states[k], steps[k]) for k, _ in ranks]
        found[optimizer] = max(memories, key=lambda m: m.peak)
    return MemoryPlan(model.name, model.numel, setup, config, found, _notes(model, setup))


def _different(of_ranks: Sequence[T]) -> list[tuple[int, T]]:
    """Many ranks hold the same: the first of each kind."""
    kinds: dict[Any, int] = {}
    for k, held in enumerate(of_ranks):
        key = id(held[0]) if isinstance(held, tuple) and isinstance(held[0], dict) else held
        kinds.setdefault(key, k)
    return [(k, of_ranks[k]) for k in kinds.values()]


def _memory(optimizer: str, rank: int, moments: dict[str, dict[str, int]], solver: int, host: int = 0) -> RankMemory:
    filled = {name: {term: terms.get(term, 0) for term in TERMS} for name, terms in moments.items()}
    return RankMemory(optimizer, rank, filled, solver, host)


def on_rank(
    optimizer: str,
    setup: Setup,
    held: Frame,
    a: Activations,
    rank: int,
    states: States,
    steps: tuple[int, int, int],
) -> RankMemory:
    """Moments of an optimizer that is given whole gradients.

    Args:
        optimizer, setup, rank: its name, the run, the rank.
        held: of the framework.
        a: activations; zeros where they are not known.
        states: of the optimizer.
        steps: the most in a step, in one with refreshes, and of that the solver's workspace.
    """
    host = held.host
    if setup.offload:
        host += states.moments + states.bases
        states = States(0)
    base = base_terms(held, states)
    before = max(held.local, held.gradients if held.gradients_stay or setup.accumulation > 1 else 0)
    reduced = {**base, "gradients": max(held.local, held.gradients), "buckets": held.buckets}
    # The backward pass lets go of activations layer by layer, and may have most parameters at its end.
    last = max(held.by_layer, default=0)
    kept_then, whole_then = max(
        ((a.layer - (last - layer) * a.each, whole) for layer, whole in (held.by_layer or {0: 0}).items()), key=sum
    )
    moments = {
        "resident": base,
        "forward": {**base, "gradients": before, "activations": a.forward, "temporaries": held.forward},
        "loss": {**base, "gradients": before, "activations": a.loss, "temporaries": held.loss},
        "head": {**base, "gradients": before, "activations": a.head, "temporaries": held.head},
        "layer": {**reduced, "activations": kept_then, "temporaries": held.backward + whole_then},
        "embedding": {**reduced, "activations": a.embedding, "temporaries": held.embedding},
        "norm": {**base, "gradients": held.gradients, "temporaries": held.norm},
    }
    step, refresh, solver = steps
    moments["step"] = {**base, "gradients": held.gradients, "temporaries": step}
    moments["refresh"] = {**base, "gradients": held.gradients, "temporaries": refresh}
    return _memory(optimizer, rank, moments, solver, host)


def _steps(
    optimizer: str, arrangement: Arrangement, setup: Setup, held: list[Frame], states: list[States], gram_width: int
) -> list[tuple[int, int, int]]:
    """The most in a call of ``step()`` on each rank: an ordinary one, one with refreshes, and of that the solver's
    workspace."""
    ours = optimizer == OPTIMIZERS[-1]
    found = [(0, 0, 0)] * setup.ranks
    handed = _handed(arrangement, setup) if ours and setup.kind == "ddp" else 0
    for unit in arrangement.units():
        ahead = [(0, 0, 0)] * setup.ranks if ours else [(s.temporaries, s.temporaries, 0) for s in states]
        matrices = [h for h in arrangement.holdings if h.plan.unit == unit] if ours else []
        if matrices:
            made = temporaries(
                matrices, method=setup.method, gram_width=gram_width, offload=setup.offload, device=setup.device
            )
            ahead = list(zip(made.step, made.refresh, made.solver))
        if handed:
            ahead = [(inside + handed, due + handed, work) for inside, due, work in ahead]
        for rank, (inside, due, work) in enumerate(ahead):
            start, during = held[rank].copies.get(unit, (0, 0))
            step, refresh, solver = found[rank]
            if max(start, during + due) > refresh:
                refresh, solver = max(start, during + due), work if during + due > start else 0
            found[rank] = (max(step, start, during + inside), refresh, solver)
    return found


def _handed(arrangement: Arrangement, setup: Setup) -> int:
    """Weights that are not projected on their way while matrices step (DDP): what each rank sends, and all of that."""
    found = 0
    for group in arrangement.groups:
        parts = (sum(p.stop - p.start for n, p in kept.items() if n in group) for kept in arrangement.kept)
        sent = min(max(parts), FLYING * portion_numbers(setup.ranks))
        found += sent * (setup.ranks + 1) * setup.master_width
    return found


def _notes(model: Model, setup: Setup) -> list[str]:
    notes = ["not in the figures: the CUDA context, NCCL's buffers, the allocator's fragmentation"]
    if setup.passed_over:
        notes.append(f"set in the configuration, and not in the figures: {', '.join(setup.passed_over)}")
    if model.decoder is None:
        notes.append("activations are not planned: the model's configuration is not that of a LLaMA-like decoder")
    if setup.master == "bf16" and setup.kind.startswith("zero"):
        notes.append(f"no fp32 master: DeepSpeed needs {BF16_MASTER}")
    if setup.offload:
        notes.append("offload: states and masters are on the CPU, and one matrix at a time visits the device")
    if setup.kind.startswith("zero"):
        notes.append("galore-torch does not run under ZeRO: its column is what it would hold, laid out as on FSDP2")
    return notes
