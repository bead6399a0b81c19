"""launch/resuming.py: which checkpoint a run goes on with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from resuming import resolve_resume

from ds_lowrank import manifest


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    manifest.mark(path, {})
    return path


def resolved(output: Path, **flags) -> tuple[str | None, int]:
    args = SimpleNamespace(**{"output_dir": str(output), "resume": False, "resume_from_checkpoint": None, **flags})
    resolve_resume(args)
    return args.resume_from_checkpoint, args.resumed_step


def test_a_run_that_began_at_another_ones_checkpoint_goes_on_with_its_own(tmp_path, capsys):
    """The flags of a job that is queued again stay the same."""
    other, output = checkpoint(tmp_path / "other", 100), tmp_path / "job"
    both = {"resume": True, "resume_from_checkpoint": str(other)}
    assert resolved(output, **both) == (str(other), 100)
    assert f"--resume: going on with {other}, step 100" in capsys.readouterr().out
    own = checkpoint(output, 120)
    assert resolved(output, **both) == (str(own), 120)


def test_nothing_there(tmp_path):
    assert resolved(tmp_path, resume=True) == (None, 0)
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*nowhere"):
        resolved(tmp_path, resume=True, resume_from_checkpoint=str(tmp_path / "nowhere"))
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"there is no checkpoint in .* that is complete"):
            resolved(tmp_path, resume=resume, resume_from_checkpoint="true")


def test_a_later_step_of_ones_own_is_not_passed_over(tmp_path):
    checkpoint(tmp_path, 50)
    earlier = checkpoint(tmp_path / "other", 20)
    with pytest.raises(ValueError, match="starts at step 20"):
        resolved(tmp_path, resume_from_checkpoint=str(earlier))
