"""What the matrices of LLaMA-60M and 130M put on the wire in a step, gradients one way and updates the other.

``gradients`` is the option of ours (``whole bases``: with ``shard_projection`` false); ``AdamW`` is torch's, and beside
it under DDP are torch's own hooks that send less: PowerSGD at the same rank (after a tenth of the steps, with error
feedback and a warm start, every matrix compressed) and bf16. Everything travels in fp32, but for the bf16 hook.

Bytes are those that the kernel counted on the ranks' sockets, all ranks together, a step's mean over the last
``update_proj_gap`` steps of the run: whatever is sent counts, whoever sends it. What the matrices send is that less
what the same run sends with the matrices frozen (``rest_bytes``): embeddings, head and norms, and under FSDP2 the
weights that are gathered for the passes. ``gradient_bytes`` went out before the optimizer's ``step()``,
``update_bytes`` in it and after it; a refresh is among the first with ``projected`` and the second with ``full``.

``required`` is 1.05 (r / short + 1 / update_proj_gap), the bound on ``ratio_to_full``; ``ratio_to_adamw`` is to AdamW
under the same layout. ``loss`` is that of held-out text after the same steps on the same batches. Tokens are the bytes
of Python's standard library, so that embeddings are small; the layers are those of the models.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from harness import ZERO_STAGE, deepspeed_config, shard, start
from llama import Llama, Setting
from rank_pool import RankPool
from sockets import sent_bytes
from table import Row
from text import batch, held_out
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

OURS: dict[str, dict[str, Any]] = {
    "full": {},
    "projected": {"gradients": "projected"},
    "projected, whole bases": {"gradients": "projected", "shard_projection": False},
}
HOOKS = ("PowerSGD", "bf16 hook")
CONTENDERS = {
    "ddp": (*OURS, "AdamW", *HOOKS),
    "zero2": (*OURS, "AdamW"),
    "fsdp2": (*OURS, "AdamW"),
}
LEARNING_RATE = {"ours": 5e-3, "others": 2e-3}  # as tuned for the default run, see results/first_run.md
COLUMNS = (
    *("layout", "ranks", "model", "rank", "gradients", "gap", "gradient_bytes", "update_bytes"),
    *("ratio_to_full", "required", "ratio_to_adamw", "rest_bytes", "steps", "loss"),
)
ROWS, LENGTH = 1, 128
VOCABULARY = 256  # tokens are bytes, and what embeddings send is not looked at
WARM_UP = 10  # steps


@dataclass(frozen=True)
class Traffic:
    """One run.

    Attributes:
        layout: one of ``CONTENDERS``.
        model: of ``configs``.
        rank: r.
        gradients: one of the layout's ``CONTENDERS``.
        gap: steps between two refreshes of a matrix.
        steps: of the run.
        frozen: the matrices stand still, and only what is not projected is sent.
    """

    layout: str
    model: str
    rank: int
    gradients: str
    gap: int
    steps: int
    frozen: bool = False


def cases(
    layouts: Sequence[str],
    models: Mapping[str, Sequence[int]],
    gap: int,
    steps: int,
    wanted: Sequence[str] | None = None,
) -> list[Traffic]:
    """All runs: every layout, model, each of the model's ranks r, and contender or those that are wanted."""
    return [
        Traffic(layout, model, rank, gradients, gap, steps)
        for layout in layouts
        for model, ranks in models.items()
        for rank in ranks
        for gradients in CONTENDERS[layout]
        if wanted is None or gradients in wanted
    ]


def wire_rows(cases: Sequence[Traffic], ranks: int) -> Iterator[Row]:
    """A row for each run on so many ranks, a layout's, model's and rank's together."""
    for _, group in itertools.groupby(cases, lambda case: (case.layout, case.model, case.rank)):
        rows: list[Row] = []
        for case in group:
            rows.append(_row(case, ranks))
            print(*rows[-1].values(), flush=True)
        sent = {row["gradients"]: row["gradient_bytes"] + row["update_bytes"] for row in rows}
        for row in rows:
            for column, other in (("ratio_to_full", "full"), ("ratio_to_adamw", "AdamW")):
                row[column] = sent[row["gradients"]] / sent[other] if other in sent else None
            yield {key: row[key] for key in COLUMNS}


def _row(case: Traffic, ranks: int) -> Row:
    whole = _together(case, ranks)
    # What is not projected is DeepSpeed's own under ZeRO, whose flat buffers want something in every group.
    same = replace(case, gradients="AdamW") if case.layout in ZERO_STAGE else case
    rest = _together(replace(same, frozen=True, steps=4), ranks)
    return {
        "layout": case.layout,
        "ranks": ranks,
        "model": case.model,
        "rank": case.rank,
        "gradients": case.gradients,
        "gap": case.gap,
        "gradient_bytes": round(whole["gradient"] - rest["gradient"]),
        "update_bytes": round(whole["update"] - rest["update"]),
        "required": 1.05 * whole["share"] if case.gradients.startswith("projected") else None,
        "rest_bytes": round(rest["gradient"] + rest["update"]),
        "steps": case.steps,
        "loss": whole["loss"],
    }


def beyond(rows: Sequence[Row]) -> list[Row]:
    """Rows under DDP and ZeRO that send more than is required."""
    return [
        row
        for row in rows
        if row["layout"] != "fsdp2" and row["required"] is not None and row["ratio_to_full"] is not None
        if row["ratio_to_full"] > row["required"]
    ]


def _together(case: Traffic, size: int) -> dict[str, float]:
    """What all ranks have sent, and the first one's loss. Ranks of their own: what a run leaves behind is not sent."""
    pool = RankPool(size, timeout=1800)
    answers = pool.run(measure, case)
    pool.close()
    sums = {key: sum(answer[key] for answer in answers) for key in ("gradient", "update")}
    return {**sums, "loss": answers[0]["loss"], "share": answers[0]["share"]}


def measure(case: Traffic) -> dict[str, float]:
    """Train on all ranks; bytes that this one sends in a step, the loss, and r / short + 1 / gap. Collective."""
    model = Llama(case.model, vocab_size=VOCABULARY)
    short = model.llama.config.hidden_size
    still = freeze if case.frozen else lambda model: None
    run = start_run(case, model, still)
    meter = Meter(run)
    rate = LEARNING_RATE["ours" if case.gradients in OURS else "others"]
    rank, size = dist.get_rank(), dist.get_world_size()
    gradient = update = 0
    counted = 2 if case.frozen else case.gap
    for step in range(case.steps):
        for group in run.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP)
        one, other = meter.step([{"tokens": batch(step, rank, size, ROWS, LENGTH)}])
        if step >= case.steps - counted:
            gradient, update = gradient + one, update + other
    loss = _loss(run.model)
    run.close()
    del run, meter, model
    gc.collect()
    share = case.rank / short + 1 / case.gap
    return {"gradient": gradient / counted, "update": update / counted, "loss": loss, "share": share}


def freeze(model: nn.Module) -> None:
    """Let the matrices of the layers stand still."""
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.ndim == 2:
            parameter.requires_grad_(False)


def start_run(case: Traffic, model: nn.Module, built: Callable[[nn.Module], None] = lambda model: None) -> Any:
    """The model under the layout, with what sends its gradients and updates."""
    options = {"rank": case.rank, "update_proj_gap": case.gap, "gram_dtype": "float32", "lr": LEARNING_RATE["ours"]}
    setting = Setting(case.layout, {**options, **OURS.get(case.gradients, {})})
    if case.gradients in OURS:
        return start(setting, model, built)
    if case.layout in ZERO_STAGE:
        return DeepSpeedAdamW(setting, model, built)
    return AdamWRun(case, setting, model, built)


@torch.no_grad()
def _loss(model: nn.Module) -> float:
    return float(model(tokens=held_out(8, LENGTH)))


class Meter:
    """Bytes that a run's steps send: those before the updates begin and those after it."""

    def __init__(self, run: Any):
        self._run = run
        self._began: int | None = None
        run.optimizer.register_step_pre_hook(self._updates_begin)

    def step(self, losses: list[dict[str, Any]]) -> tuple[int, int]:
        """One step of the run. Collective."""
        self._began = None
        start = _all_sent()
        self._run.step(losses)
        assert self._began is not None, "the optimizer's step() was not called"
        return self._began - start, _all_sent() - self._began

    def _updates_begin(self, *_: Any) -> None:
        if self._began is None:  # DeepSpeed steps group by group
            self._began = _all_sent()


def _all_sent() -> int:
    """What this rank has sent when every rank has what it waits for, and what is still on its way has arrived."""
    dist.barrier()
    before, now = -1, sent_bytes()
    while now != before:
        time.sleep(0.05)
        before, now = now, sent_bytes()
    return now


@functools.wraps(powerSGD_hook.powerSGD_hook)  # DDP looks at a hook's annotations
def power_sgd(state: Any, bucket: Any) -> Any:
    """torch's hook, one bucket after the other.

    It starts collectives in callbacks, which gloo's threads run in an order of their own on each rank: with several
    buckets on their way ranks would be in different collectives.
    """
    future = powerSGD_hook.powerSGD_hook(state, bucket)
    future.wait()
    return future


@functools.wraps(default_hooks.bf16_compress_hook, assigned=("__annotations__",))
def bf16_compress(state: Any, bucket: Any) -> Any:
    """torch's hook. Under its own name DDP takes it with NCCL alone; gloo adds up bf16 as well."""
    return default_hooks.bf16_compress_hook(state, bucket)


class AdamWRun:
    """torch's AdamW under FSDP2, or under DistributedDataParallel with one of torch's hooks on gradients or none."""

    def __init__(self, case: Traffic, setting: Setting, model: nn.Module, built: Callable[[nn.Module], None]):
        if case.layout == "fsdp2":
            shard(setting, model)
        built(model)
        self.model = self._wrapped = model
        self.optimizer: Any = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        if case.layout == "ddp":
            self._wrapped = nn.parallel.DistributedDataParallel(model)
            self._hook(case)

    def _hook(self, case: Traffic) -> None:
        wrapped: Any = self._wrapped
        if case.gradients == "bf16 hook":
            wrapped.register_comm_hook(None, bf16_compress)
        elif case.gradients == "PowerSGD":
            state = powerSGD_hook.PowerSGDState(
                None,
                matrix_approximation_rank=case.rank,
                start_powerSGD_iter=max(2, case.steps // 10),
                min_compression_rate=1,
            )
            wrapped.register_comm_hook(state, power_sgd)

    def step(self, losses: list[dict[str, Any]]) -> None:
        for arguments in losses:
            self._wrapped(**arguments).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        self._wrapped = self.model


class DeepSpeedAdamW:
    """torch's AdamW under ZeRO."""

    def __init__(self, setting: Setting, model: nn.Module, built: Callable[[nn.Module], None]):
        import deepspeed

        built(model)
        config = deepspeed_config(setting)
        del config["lowrank"]
        self.model = model
        self.optimizer: Any = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)

    def step(self, losses: list[dict[str, Any]]) -> None:
        for arguments in losses:
            self._engine.backward(self._engine(**arguments))
            self._engine.step()

    def close(self) -> None:
        self._engine.destroy()
