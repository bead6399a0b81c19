"""Holds the ranks of a run until each has got a signal: one of 14 steps may be over before slurm has sent it.

``launch/pretrain.py --import`` this file. ``HELD`` in the environment says where: ``step``, between steps 6 and 7, or
``end``, in the evaluation behind the last step. A job that was queued again is not held.
"""

from __future__ import annotations

import os
import signal

from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Held(TrainerCallback):
    """Waits for one of ``SIGNALS``, which the handlers that are there get as ever."""

    def on_step_begin(self, args, state, control, **kwargs):
        if os.environ["HELD"] == "step" and state.global_step == 6:
            _hold()

    def on_evaluate(self, args, state, control, **kwargs):
        if os.environ["HELD"] == "end" and state.global_step == state.max_steps:
            _hold()


def _hold() -> None:
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:  # which would wake nobody
            signal.signal(number, lambda *_: None)
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    print(f"rank {os.environ['RANK']}: held until a signal comes", flush=True)
    while os.read(told, 1)[0] not in SIGNALS:
        pass
    signal.set_wakeup_fd(-1)
    os.close(told)
    os.close(tell)


DEFAULT_CALLBACKS.append(Held)
