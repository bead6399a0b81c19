"""launch/resuming.py: which checkpoint a run goes on with."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from arguments import parse_arguments
from record import compare, take_up
from resuming import resolve_resume
from toy_methods import SELECTIONS

from ds_lowrank import LowRankConfig, manifest


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


def test_what_an_earlier_run_left_is_taken_on_purpose_only(tmp_path):
    """Other Trainers let a run start below later checkpoints."""
    own, left = checkpoint(tmp_path, 20), checkpoint(tmp_path, 50)
    manifest.supersede(left, 10)
    with pytest.warns(UserWarning, match="checkpoint-50 passed over: an earlier run left"):
        assert resolved(tmp_path, resume=True) == (str(own), 20)
    with pytest.raises(ValueError, match=r"an earlier run left .*checkpoint-50.*ds_lowrank\.manifest"):
        resolved(tmp_path, resume_from_checkpoint=str(left))
    manifest.mark(left, {})
    assert resolved(tmp_path, resume_from_checkpoint=str(left)) == (str(left), 50)


def test_the_checkpoints_rate_stands_before_that_of_the_block(tmp_path, capsys):
    args = parse_arguments(["--output_dir", str(tmp_path), "--report_to", "none", "--lr", "0.2"])[3]
    block = {"lr": 0.3, "betas": [0.8, 0.9], "rank": 4}
    record = {"arguments": {"learning_rate": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.6}}
    assert take_up(record, args, block) == {"rank": 4}
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (0.1, 0.5, 0.6)
    assert "--learning_rate 0.1 as in the checkpoint, not 0.3" in capsys.readouterr().out
    args.override_lr = True
    assert take_up(record, args, block) == {"lr": 0.3, "rank": 4}
    assert take_up({}, args, block) == block


def compared(capsys, before: dict, here: dict) -> str:
    """What is said of other options of the method."""
    args = SimpleNamespace(resume_from_checkpoint="old", optimizer="lowrank")
    records = []
    for options in (before, here):
        lowrank = {**LowRankConfig().to_dict(), **options}
        records.append({"arguments": {"optimizer": "lowrank"}, "model": {}, "data": {}, "lowrank": lowrank})
    for name in [n for n, value in before.items() if value is None]:  # an earlier version's has none
        del records[0]["lowrank"][name]
    records[1]["data"]["max_length"] = 8
    compare(*records, args)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "here", "text"),
    [
        ({}, {"selection": SELECTIONS[0]}, "'adamw' and selection 'importance' (exp_avg, exp_avg_sq, basis)"),
        ({"rule": "toy"}, {}, "rule 'toy' and selection 'importance' (toy_m, toy_v, toy_norm, toy_mean, basis)"),
        ({"rule": None, "selection": None}, {"rule": "toy"}, "written with rule 'adamw' and selection 'importance'"),
        ({"rule": "of_nobody"}, {}, "got 'of_nobody'"),
    ],
)
def test_a_method_that_keeps_something_else_is_refused(capsys, before, here, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        compared(capsys, before, here)


def test_a_method_that_keeps_the_same_is_the_command_lines(capsys):
    said = compared(capsys, {}, {"selection": "random", "selection_options": {"a": 1.0}})
    assert "--resume: lowrank.selection 'random', and 'importance' before" in said
    assert "--resume: lowrank.selection_options {'a': 1.0}, and {} before" in said
    assert compared(capsys, {"rule": None, "rule_options": None}, {}) == ""


def test_options_of_methods_are_json(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--report_to", "none", "--rule", "adamw", "--rule_options"]
    options = parse_arguments([*flags, "{}"])[2]
    assert (options["rule"], options["rule_options"]) == ("adamw", {})
    with pytest.raises(ValueError, match="'adamw' has no option 'speed'"):
        parse_arguments([*flags, '{"speed": 2}'])
    with pytest.raises(ValueError, match=r"--rule_options 'speed=2' is not JSON"):
        parse_arguments([*flags, "speed=2"])
