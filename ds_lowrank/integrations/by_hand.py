"""An optimizer made by hand that a Trainer under DeepSpeed would drop is refused when it is made.

Apart from the rest of what serves the Trainer, because it has to be there before Transformers is imported, and must not
import it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_trainer_builds: ContextVar[bool] = ContextVar("_trainer_builds", default=False)


@contextmanager
def built_by_trainer() -> Iterator[None]:
    """What is made within reaches the Trainer."""
    token = _trainer_builds.set(True)
    try:
        yield
    finally:
        _trainer_builds.reset(token)


def refuse_what_a_trainer_would_drop() -> None:
    """Under DeepSpeed the Trainer replaces ``optimizers=(optimizer, None)`` by AdamW without a word: stop here.

    Raises:
        ValueError: ``TrainingArguments`` have set up DeepSpeed, and no Trainer is building the optimizer.
    """
    integration = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    if reference is None or _trainer_builds.get():
        return
    if type(reference()).__name__ == "HfTrainerDeepSpeedConfig":
        raise ValueError(
            "a LowRankAdamW made by hand does not reach a Trainer that runs DeepSpeed: it silently replaces "
            "optimizers=(optimizer, None) by AdamW. Use "
            "Trainer(..., optimizer_cls_and_kwargs=ds_lowrank.trainer_optimizer(config))"
        )
