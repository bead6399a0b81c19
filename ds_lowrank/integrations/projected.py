"""``gradients="projected"`` in the HF Trainer and with accelerate: what does not go with it, and who clips.

Projected gradients are in no ``.grad``. What clips gradients there looks at ``.grad`` alone, so it is led to
:meth:`ds_lowrank.LowRankAdamW.clip_grad_norm_`, on one object and for parameters of that optimizer only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ds_lowrank.optimizer import LowRankAdamW
from ds_lowrank.report import unwrap

# Under which a norm that has projected gradients in it is logged, beside the Trainer's ``grad_norm``.
NORM = "lowrank/projected_grad_norm"

_REENTRANT = (
    "reentrant checkpointing makes gradients in pieces, and gradients 'projected' would project the first: set "
    "gradient_checkpointing_kwargs={'use_reentrant': False} (--gradient_checkpointing_kwargs '{\"use_reentrant\": "
    "false}'), or use gradients 'full'"
)


def check_projected(args: Any, mixed_precision: str | None = None) -> None:
    """Refuse ``TrainingArguments`` that do not go with projected gradients.

    Args:
        args: the ``TrainingArguments``.
        mixed_precision: what accelerate has chosen, ``fp16`` for instance; ``None``: what ``args`` say.

    Raises:
        ValueError: every fault, one a line.
    """
    faults = []
    if mixed_precision == "fp16" or args.fp16:
        faults.append(
            "fp16 = true scales the loss, and gradients 'projected', which are in no .grad, would not be unscaled: "
            "use bf16 (--bf16), or gradients 'full'"
        )
    if args.n_gpu > 1:
        faults.append(
            f"one process with {args.n_gpu} GPUs is DataParallel, which copies the model, and gradients 'projected' "
            "are those of one model: start one process a GPU (torchrun), or set CUDA_VISIBLE_DEVICES"
        )
    for kind in ("activation", "gradient"):
        options = getattr(args, f"{kind}_checkpointing_kwargs", None)
        reentrant = isinstance(options, Mapping) and bool(options.get("use_reentrant"))
        if getattr(args, f"{kind}_checkpointing", False) and reentrant:
            faults.append(_REENTRANT)
            break
    if getattr(args, "auto_find_batch_size", False) and args.world_size > 1:
        faults.append(
            "auto_find_batch_size = true on several ranks leaves those that have memory waiting for projected "
            "gradients of one that has none: set per_device_train_batch_size"
        )
    if faults:
        raise ValueError("\n".join(faults))


def check_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant checkpointing that a model has been set up for, as transformers 4 does where nothing is said.

    Raises:
        ValueError: see above.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant")
        if getattr(module, "gradient_checkpointing", False) and reentrant:
            raise ValueError(_REENTRANT)


def begin_training(model: Any, optimizer: LowRankAdamW) -> None:
    """Make hooks ahead of the first backward pass, and drop what an earlier training has left. Collective.

    Args:
        model: that is trained, if it is known.
        optimizer: of any kind; it is left alone where no gradient is used in the backward pass.

    Raises:
        ValueError: the model has reentrant checkpointing.
        ds_lowrank.LayoutError: the sharding is not supported.
    """
    projected = optimizer.config.gradients == "projected"
    if not (projected or optimizer.config.layerwise):
        return
    if projected and isinstance(model, nn.Module):
        check_checkpointing(model)
    optimizer.ensure_state()
    if optimizer.layout.by_parameter:
        optimizer.zero_grad()


def route_clipping(accelerator: Any, optimizer: Any) -> None:
    """Have an ``Accelerator``'s ``clip_grad_norm_`` clip projected gradients along with the others.

    ::

        model, optimizer = accelerator.prepare(model, optimizer)
        ds_lowrank.route_clipping(accelerator, optimizer)

    From then on ``accelerator.clip_grad_norm_(model.parameters(), max_norm)`` is
    :meth:`ds_lowrank.LowRankAdamW.clip_grad_norm_` where the parameters are this optimizer's; of others it is what it
    was. The HF Trainer clips by it. Nothing changes with gradients ``full``, nor under DeepSpeed, whose engine clips.

    Args:
        accelerator: an ``accelerate.Accelerator``; only this object is changed.
        optimizer: a :class:`ds_lowrank.LowRankAdamW`, or what ``prepare`` made of it.

    Raises:
        ValueError: it is another optimizer.
    """
    inner = unwrap(optimizer)
    if inner.config.gradients != "projected" or accelerator.distributed_type.value == "DEEPSPEED":
        return
    clip = accelerator.clip_grad_norm_
    if not isinstance(clip, _Clip):
        clip = accelerator.clip_grad_norm_ = _Clip(clip)
    clip.add(inner)


def route_trainer(trainer: Any, optimizer: LowRankAdamW) -> None:
    """Have a Trainer's ``max_grad_norm`` clip by an optimizer, and its logs say what kind of norm that is.

    Args:
        trainer: with an ``accelerator``; only this object is changed.
        optimizer: that it trains with.
    """
    route_clipping(trainer.accelerator, optimizer)
    if not isinstance(trainer.log, _Log):
        trainer.log = _Log(trainer, trainer.log)


class _Clip:
    """``Accelerator.clip_grad_norm_`` that knows optimizers with projected gradients.

    Args:
        original: the method that it stands for.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original
        self._optimizers: list[weakref.ref[LowRankAdamW]] = []  # the newest first

    def add(self, optimizer: LowRankAdamW) -> None:
        """Clip by an optimizer what is its own."""
        others = [known for known in self._optimizers if known() not in (None, optimizer)]
        self._optimizers = [weakref.ref(optimizer), *others]

    def __call__(self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        """See ``Accelerator.clip_grad_norm_``.

        Raises:
            ValueError: the parameters are an optimizer's in part, or another ``norm_type``.
        """
        given = {id(p): p for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        for known in self._optimizers:
            optimizer = known()
            own = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
            if optimizer is None or not any(id(p) in given for p in own):
                continue
            missing = [p for p in own if p.requires_grad and id(p) not in given]
            inside = {id(p) for p in own}
            foreign = [p for key, p in given.items() if key not in inside and p.grad is not None]
            if missing or foreign:
                parts = [f"{len(missing)} of its own are missing"] * bool(missing)
                parts += [f"{len(foreign)} are of another"] * bool(foreign)
                raise ValueError(
                    "gradients 'projected' are clipped together, all parameters of an optimizer and no others; here "
                    f"{' and '.join(parts)}: give clip_grad_norm_ the parameters of one optimizer"
                )
            return optimizer.clip_grad_norm_(max_norm, norm_type)
        return self._original(list(given.values()), max_norm, norm_type=norm_type)


class _Log:
    """``Trainer.log`` that gives a norm of projected gradients its own name too.

    Args:
        trainer: whose optimizer is asked.
        original: the method that it stands for.
    """

    def __init__(self, trainer: Any, original: Callable[..., Any]) -> None:
        self._trainer, self._original = trainer, original

    def __call__(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer.log``."""
        norm = logs.get("grad_norm")
        if norm is not None and self._is_projected():
            logs[NORM] = norm
        return self._original(logs, *args, **kwargs)

    def _is_projected(self) -> bool:
        try:
            return unwrap(self._trainer.optimizer).config.gradients == "projected"
        except ValueError:
            return False
