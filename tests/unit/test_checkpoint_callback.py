"""CheckpointCallback in a Trainer on one process: markers, preemption, retention, and what it puts back."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ds_lowrank import CheckpointCallback, manifest
from ds_lowrank.integrations.signals import ignore_termination_in_workers


class Line(torch.nn.Module):
    """A model whose loss falls with every step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x.mean()).square().sum()}


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, step, do, event="on_step_begin"):
        self.step, self.do = step, do
        setattr(self, event, self._act)

    def _act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do(state)


def trainer(output, callback, *others, **options):
    settings = {
        "use_cpu": True,
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "learning_rate": 0.1,
    }
    data = Dataset.from_dict({"x": torch.ones(12, 2).tolist(), "labels": [0] * 12}).with_format("torch")
    args = TrainingArguments(output_dir=str(output), **{**settings, **options})
    return Trainer(Line(), args, train_dataset=data, eval_dataset=data, callbacks=[*others, callback])


def kill(number=signal.SIGTERM):
    return lambda _: os.kill(os.getpid(), number)


def complete(output):
    return [step for step, folder in manifest.checkpoints(output) if manifest.is_complete(folder)]


def test_every_checkpoint_of_a_trainer_is_marked(tmp_path):
    callback = CheckpointCallback()
    trainer(tmp_path, callback).train()
    assert complete(tmp_path) == [2, 4, 6]
    found = manifest.verify(tmp_path / "checkpoint-4")
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(found.files)
    assert (found.facts["step"], found.facts["world_size"], found.facts["layout"]) == (4, 1, None)
    assert callback.saved == tmp_path / "checkpoint-6"
    assert callback.preempted is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [2, 3])  # a signal at step_begin of 3 ends with a step that saves anyway
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_same_step(tmp_path, number, step):
    callback = CheckpointCallback()
    saves = []
    before = signal.getsignal(number)
    run = trainer(tmp_path, callback, At(step, kill(number)), At(step + 1, saves.append, "on_save"))
    run.train()
    assert callback.preempted == number.name
    assert run.state.global_step == step + 1
    assert complete(tmp_path)[-1] == step + 1
    assert len(saves) == 1
    manifest.verify(callback.saved)
    assert signal.getsignal(number) == before


def test_a_batch_script_is_told_where_the_checkpoint_of_a_preempted_run_lies(tmp_path, monkeypatch):
    told = tmp_path / "told"
    monkeypatch.setenv("DS_LOWRANK_PREEMPTED_FILE", str(told))
    trainer(tmp_path / "whole", CheckpointCallback()).train()
    assert not told.exists(), "nobody preempted it"
    trainer(tmp_path / "run", CheckpointCallback(), At(2, kill())).train()
    assert told.read_text() == f"{tmp_path / 'run' / 'checkpoint-3'}\n"


@pytest.mark.parametrize("options", [{"save_strategy": "no"}, {"save_strategy": "no", "save_only_model": True}])
def test_a_preempted_run_can_be_resumed_whatever_it_saves_otherwise(tmp_path, options):
    callback = CheckpointCallback()
    run = trainer(tmp_path, callback, At(2, kill()), **options)
    run.train()
    assert complete(tmp_path) == [3]
    found = manifest.verify(tmp_path / "checkpoint-3")
    assert "optimizer.pt" in found.files
    assert found.facts["model_only"] is False
    assert run.args.save_only_model is options.get("save_only_model", False)
    again = trainer(tmp_path, CheckpointCallback(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 6
    other = trainer(tmp_path / "other", CheckpointCallback())
    other.train()
    assert torch.equal(again.model.weight, other.model.weight)


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_preempted_at_the_end_of_an_epoch_it_saves_once_and_evaluates_nothing(tmp_path, strategy):
    evaluations, saves = [], []
    options = {"save_strategy": strategy, "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    options |= {"max_steps": -1, "num_train_epochs": 2}
    callback = CheckpointCallback()
    run = trainer(
        tmp_path,
        callback,
        At(11, kill()),
        At(12, evaluations.append, "on_evaluate"),
        At(12, saves.append, "on_save"),
        **options,
    )
    run.train()
    assert callback.preempted == "SIGTERM"
    assert complete(tmp_path) == [12]
    assert (len(evaluations), len(saves)) == (0, 1)


def test_preempted_where_it_would_evaluate_it_saves_although_it_is_not_the_best(tmp_path):
    """With save_strategy "best" the Trainer lets the evaluation decide about the save."""
    evaluations = []
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    counter = At(3, evaluations.append, "on_evaluate")
    trainer(tmp_path, CheckpointCallback(), At(2, kill()), counter, greater_is_better=True, **options).train()
    assert complete(tmp_path) == [1, 3]
    assert not evaluations


def test_a_signal_after_the_last_step_does_what_it_does_without_us(tmp_path):
    """Nothing of it is left to be saved, and it must not be swallowed."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("ours"))
    try:
        trainer(tmp_path, CheckpointCallback(), At(6, kill(), "on_epoch_end")).train()
        # Once by the chain as it came, once more when the handlers were put back.
        assert came == ["ours", "ours"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_trains_in_a_thread_without_handlers(tmp_path):
    run = trainer(tmp_path, CheckpointCallback())
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert complete(tmp_path) == [2, 4, 6]


def test_retention_is_ours_while_training_and_the_trainers_afterwards(tmp_path):
    run = trainer(tmp_path, CheckpointCallback(), save_total_limit=2)
    run.train()
    assert complete(tmp_path) == [4, 6]
    assert run.args.save_total_limit == 2


def test_a_checkpoint_that_is_not_complete_costs_no_other(tmp_path):
    """The Trainer's rotation would count the broken one and delete a whole one for it."""
    saved = []

    def crash(state):
        saved.extend(complete(tmp_path))
        raise KeyboardInterrupt

    class Crash(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                crash(state)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, CheckpointCallback(), Crash(), save_total_limit=1).train()
    assert saved == [4]
    with pytest.warns(UserWarning, match="checkpoint-6 passed over"):
        assert manifest.newest_complete(tmp_path) == tmp_path / "checkpoint-4"


def test_the_best_model_is_kept(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    run = trainer(tmp_path, CheckpointCallback(), metric_for_best_model="loss", greater_is_better=True, **options)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert complete(tmp_path) == [2, 6]


def test_a_preempted_run_does_not_load_the_best_model(tmp_path, monkeypatch):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(tmp_path, CheckpointCallback(), At(4, kill()), **options)
    monkeypatch.setattr(run, "_load_best_model", lambda: pytest.fail("it takes time"))
    run.train()
    assert complete(tmp_path) == [2, 4, 5]
    assert run.args.load_best_model_at_end


@pytest.mark.parametrize(("greater", "expected"), [(False, [2, 4, 6]), (True, [2])])
def test_with_save_strategy_best_it_prepares_exactly_the_saves(tmp_path, greater, expected):
    prepared = []
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "save_strategy": "best"}
    callback = CheckpointCallback(before_save=[lambda optimizer: prepared.append(run.state.global_step)])
    run = trainer(tmp_path, callback, greater_is_better=greater, **options)
    run.train()
    assert complete(tmp_path) == expected
    assert prepared == expected


def test_the_optimizer_is_prepared_before_anything_is_written(tmp_path):
    seen = []

    def hook(optimizer):
        assert hasattr(optimizer, "state_dict")
        seen.append([folder.name for _, folder in manifest.checkpoints(tmp_path)])

    trainer(tmp_path, CheckpointCallback(before_save=[hook])).train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]


def test_what_a_crashed_attempt_left_is_gone_before_it_is_written_over(tmp_path):
    ruin = tmp_path / "checkpoint-2"
    (ruin / "global_step2").mkdir(parents=True)
    (ruin / "global_step2" / "zero_pp_rank_7_optim_states.pt").write_bytes(b"x")
    trainer(tmp_path, CheckpointCallback()).train()
    assert not (ruin / "global_step2").exists()
    manifest.verify(ruin)


def test_an_error_before_the_save_is_told_by_name(tmp_path):
    def hook(optimizer):
        raise OSError("disk full")

    with pytest.raises(RuntimeError, match="states ready to be saved failed on rank 0: OSError: disk full"):
        trainer(tmp_path, CheckpointCallback(before_save=[hook])).train()


def test_a_callback_that_asks_for_a_save_after_ours_is_warned_of(tmp_path):
    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 3

    run = trainer(tmp_path, CheckpointCallback(), save_strategy="no")
    run.add_callback(Late())
    with pytest.warns(UserWarning, match="make it the last of the Trainer's callbacks"):
        run.train()
    assert complete(tmp_path) == [3]


def counted(output):
    """The steps of the checkpoints that count, and the newest; whatever is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = manifest.newest_complete(output)
    steps = [step for step, folder in manifest.checkpoints(output) if not manifest.is_superseded(folder)]
    return steps, newest and newest.name


def test_a_second_run_into_one_directory_is_the_one_that_a_resume_goes_on_with(tmp_path):
    trainer(tmp_path, CheckpointCallback()).train()
    first = (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes()
    second = trainer(tmp_path, CheckpointCallback(), At(3, kill()), learning_rate=0.2)
    with pytest.warns(UserWarning, match=r"starts at step 0 and .*\(checkpoint-2, checkpoint-4, checkpoint-6\)"):
        second.train()
    assert counted(tmp_path) == ([2, 4], "checkpoint-4")
    assert (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes() == first, "it is left as it was"
    third = trainer(tmp_path, CheckpointCallback(), learning_rate=0.2)
    third.train(resume_from_checkpoint=str(manifest.newest_complete(tmp_path)))
    assert counted(tmp_path) == ([2, 4, 6], "checkpoint-6")
    assert (tmp_path / "checkpoint-6" / "model.safetensors").read_bytes() != first


def test_a_second_run_that_saved_nothing_leaves_nothing_of_the_first_to_be_taken_for_it(tmp_path):
    trainer(tmp_path, CheckpointCallback()).train()

    def crash(_):
        raise KeyboardInterrupt

    for resume, left in (("checkpoint-4", ([2, 4], "checkpoint-4")), (None, ([], None))):
        run = trainer(tmp_path, CheckpointCallback(), At(4 if resume else 0, crash))
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="checkpoints of later steps"):
            run.train(resume_from_checkpoint=str(tmp_path / resume) if resume else None)
        assert counted(tmp_path) == left
    assert complete(tmp_path) == [2, 4, 6]


def test_the_limit_counts_the_checkpoints_of_this_run(tmp_path):
    trainer(tmp_path, CheckpointCallback(), max_steps=12, save_steps=3).train()
    with pytest.warns(UserWarning, match="checkpoints of later steps"):
        trainer(tmp_path, CheckpointCallback(), save_total_limit=1).train()
    assert counted(tmp_path) == ([6], "checkpoint-6")
    assert complete(tmp_path) == [3, 6, 9, 12], "what an earlier run left is not deleted, but written over"


def test_what_an_earlier_run_left_is_resumed_on_purpose_only(tmp_path):
    trainer(tmp_path, CheckpointCallback(), logging_strategy="steps", logging_steps=1).train()
    with pytest.warns(UserWarning, match="checkpoints of later steps"):
        trainer(tmp_path, CheckpointCallback(), At(1, kill())).train()
    handler = signal.getsignal(signal.SIGTERM)
    run = trainer(tmp_path, CheckpointCallback(), max_steps=8)
    last = get_last_checkpoint(tmp_path)  # what resume_from_checkpoint=True takes
    with pytest.raises(ValueError, match=r"checkpoint-6, which an earlier run has left.*ds_lowrank\.manifest"):
        run.train(resume_from_checkpoint=last)
    assert signal.getsignal(signal.SIGTERM) == handler
    manifest.mark(last, {})
    run.train(resume_from_checkpoint=last)
    assert counted(tmp_path)[1] == "checkpoint-8"


def test_a_checkpoint_of_elsewhere_with_as_many_steps_is_not_taken_for_the_earlier_runs(tmp_path):
    logged = {"logging_strategy": "steps", "logging_steps": 1}
    trainer(tmp_path / "one", CheckpointCallback(), **logged).train()
    trainer(tmp_path / "other", CheckpointCallback(), learning_rate=0.3, **logged).train()
    with pytest.warns(UserWarning, match="checkpoints of later steps"):
        trainer(tmp_path / "one", CheckpointCallback(), At(1, kill())).train()
    run = trainer(tmp_path / "one", CheckpointCallback(), max_steps=8, **logged)
    run.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-6"))
    assert counted(tmp_path / "one")[1] == "checkpoint-8"


def test_workers_of_a_data_loader_outlive_the_signal():
    loader = torch.utils.data.DataLoader(_Suicidal(), num_workers=1)
    ignore_termination_in_workers(loader)
    ignore_termination_in_workers(loader)
    assert [int(x) for x in loader] == [0, 1]
    untouched = torch.utils.data.DataLoader(_Suicidal())
    ignore_termination_in_workers(untouched)
    assert untouched.worker_init_fn is None


class _Suicidal(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, k):
        os.kill(os.getpid(), signal.SIGTERM)
        return k
