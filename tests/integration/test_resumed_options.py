"""launch/pretrain.py resumed with other options: taken from the checkpoint, from the command line, or refused."""

from __future__ import annotations

import json
import shutil

import pretrain
import pytest
from launching import ROOT, flags

from ds_lowrank import manifest

OPTIONS = {"max_steps": 4, "save_every": 2, "lr": 0.01, "batch_size": 2, "report_to": "none", "disable_tqdm": True}


@pytest.fixture(scope="module")
def whole(workplace):
    """Four steps in this process, with checkpoints of steps 2 and 4."""
    assert pretrain.main(flags(workplace, "options", **OPTIONS)) == 0
    return workplace / "options"


@pytest.fixture
def run(whole, workplace, tmp_path, capfd):
    """Resume from step 2 with other options: exit code, lines of ``--resume`` and of an error, ``metrics.json``."""

    def resume(step=2, checkpoint=None, **options):
        capfd.readouterr()
        argv = {**OPTIONS, "resume_from_checkpoint": checkpoint or whole / f"checkpoint-{step}", **options}
        given = [flag for flag in flags(workplace, output_dir=tmp_path / "out", **argv) if not flag.endswith("=None")]
        code = pretrain.main(given)
        printed = capfd.readouterr()
        said = [line for line in printed.out.splitlines() if line.startswith("--resume: ")]
        metrics = tmp_path / "out" / "metrics.json"
        return code, said, printed.err.splitlines()[-1:], json.loads(metrics.read_text()) if metrics.exists() else {}

    return resume


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 4}, "written with lowrank.rank = 8 and this run has 4"),
        ({"proj_type": "right"}, "lowrank.proj_type = 'std' and this run has 'right'"),
        ({"state_dtype": "bf16"}, "lowrank.state_dtype = 'fp32' and this run has 'bf16'"),
        ({"basis_dtype": "int8"}, "lowrank.basis_dtype = 'fp32' and this run has 'int8'"),
        ({"optim_target_modules": "q_proj"}, "lowrank.optim_target_modules = 'all-linear'"),
        ({"optimizer": "adamw", "rank": None}, "--optimizer lowrank and this run has --optimizer adamw"),
        ({"optimizer": "frozen"}, "--optimizer lowrank and this run has --optimizer frozen"),
        ({"model_config": ROOT / "configs" / "llama_60m.json"}, "model.hidden_size = 128"),
        ({"max_length": 32}, "trained on other data (--max_length 64, and here 32)"),
        ({"optim": "galore_adamw", "optim_args": "rank=4"}, "two values of one option"),
    ],
)
def test_what_the_states_do_not_fit_is_refused_before_any_text_is_read(run, monkeypatch, options, text):
    monkeypatch.setattr(pretrain, "load_data", lambda *a, **k: pytest.fail("the text was read"))
    code, _, error, _ = run(**options)
    assert (code, error[0][:7]) == (2, "error: ")
    assert text in error[0]


def test_the_schedule_goes_on_and_what_was_used_is_recorded(run):
    code, said, _, metrics = run(lr=0.05, seed=9, weight_decay=0.3, update_proj_gap=3, max_steps=5, min_lr_ratio=0.5)
    assert code == 0
    assert said == [
        "--resume: --learning_rate 0.01 as in the checkpoint, not 0.05; --override_lr takes the command line's",
        "--resume: --lr_scheduler_kwargs {'min_lr_rate': 0.1} as in the checkpoint, not {'min_lr_rate': 0.5}; "
        "--override_lr takes the command line's",
        "--resume: --weight_decay 0.0 as in the checkpoint, not 0.3",
        "--resume: --seed 7 as in the checkpoint, not 9",
        "--resume: max_steps 5, and 4 before",
        "--resume: lowrank.update_proj_gap 3, and 50 before",
    ]
    assert (metrics["learning_rate"], metrics["seed"], metrics["steps"]) == (0.01, 7, 5)
    assert metrics["lowrank"]["seed"] == 7


def test_the_same_command_has_nothing_to_say(run):
    code, said, _, metrics = run()
    assert (code, said, metrics["steps"]) == (0, [], 4)


def test_override_lr_takes_the_schedule_of_the_command_line_at_this_step(run, tmp_path):
    options = {"lr": 0.05, "override_lr": True, "scheduler": "linear", "warmup_steps": 0, "max_steps": 8}
    options["save_every"] = 3  # the Trainer by itself goes on saving every 2 steps, as the checkpoint says
    code, said, _, metrics = run(**options)
    assert code == 0
    assert not any("learning_rate" in line for line in said)
    assert metrics["learning_rate"] == 0.05
    assert [step for step, _ in manifest.checkpoints(tmp_path / "out")] == [3, 6, 8]
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry][2:]
    assert rates == pytest.approx([0.05 * (8 - step) / 8 for step in range(2, 8)])


def test_other_data_are_refused_or_begin_anew(run, workplace, tmp_path):
    text = (workplace / "corpus.txt").read_text(encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[len(text) // 2 :] + text[: len(text) // 2], encoding="utf-8")
    code, _, error, _ = run(train_file=tmp_path / "other.txt")
    assert code == 2
    assert "another tokenizer" in error[0] or "trained on other data" in error[0]
    code, _, error, _ = run(vocab_size=400)
    assert code == 2
    assert "another tokenizer" in error[0]
    code, said, _, _ = run(max_length=32, ignore_data_skip=True)
    assert code == 0
    assert said == [
        "--resume: other data (--max_length 64 before, and here 32), from their beginning (--ignore_data_skip)"
    ]


@pytest.mark.parametrize("options", [{"rank": 4}, {"proj_type": "right"}, {"optimizer": "adamw", "rank": None}])
def test_a_checkpoint_without_a_record_is_refused_by_its_states(run, whole, tmp_path, options):
    """An earlier version's, or another program's."""
    old = tmp_path / "old" / "checkpoint-2"
    shutil.copytree(whole / "checkpoint-2", old)
    (old / "run.json").unlink()
    manifest.mark(old, {})
    code, said, error, _ = run(checkpoint=old, lr=0.05, **options)
    assert (code, error[0][:7]) == (2, "error: "), error
    assert any("--learning_rate 0.01 as in the checkpoint, not 0.05" in line for line in said)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"arguments": 1, "lowrank": {}, "model": {}, "data": {}}'])
def test_a_damaged_record_is_named(run, whole, tmp_path, content):
    bad = tmp_path / "bad" / "checkpoint-2"
    bad.mkdir(parents=True)
    (bad / "trainer_state.json").write_text('{"global_step": 2}')
    (bad / "run.json").write_text(content)
    manifest.mark(bad, {})
    code, _, error, _ = run(checkpoint=bad)
    assert code == 2
    assert f"{bad / 'run.json'} is damaged" in error[0]


def test_what_the_run_was_told_is_part_of_a_checkpoint(whole):
    found = manifest.verify(whole / "checkpoint-4")
    assert "run.json" in found.files
    record = json.loads((whole / "checkpoint-4" / "run.json").read_text())
    assert record["arguments"]["learning_rate"] == 0.01
    assert record["lowrank"]["rank"] == 8
