"""How launch/pretrain.py ends on several ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pretrain


def test_gloo_lets_go_of_the_last_collective_before_the_group_is_destroyed(monkeypatch):
    """DDP's reducer frees the group at the end of main(), holds the interpreter and joins gloo's thread."""
    called: list[str] = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(resume_from_checkpoint=None),
        checkpoints=SimpleNamespace(preempted=None),
        train=lambda **_: SimpleNamespace(metrics={}),
        accelerator=SimpleNamespace(
            wait_for_everyone=lambda: called.append("barrier"), end_training=lambda: called.append("destroyed")
        ),
    )
    for name in ("_quieten", "_say_finished", "finish"):
        monkeypatch.setattr(pretrain, name, lambda *_: None)
    monkeypatch.setattr(pretrain, "set_up", lambda argv: (trainer, None))
    monkeypatch.setattr(pretrain, "await_gloo", lambda: called.append("gloo"))
    assert pretrain.main([]) == 0
    assert called == ["barrier", "gloo", "destroyed"]
