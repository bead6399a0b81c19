"""README and docs/: what their commands and code name exists, and the recipes do what they say."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from arguments import DataArguments, LowRankArguments, ModelArguments, PretrainArguments
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

import ds_lowrank
from ds_lowrank import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a reader puts a file of their own in the place of.
THEIRS = {"script.py", "my_train.py", "sweep.txt", "hostfile", "corpus.jsonl", "lowrank_plugin.py", "train.bin"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, " ".join(line.split())) for line in lines if line.strip() and line.strip()[0] != "#"]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_names_files_and_flags_that_exist(page, command):
    words = shlex.split(command, comments=True)
    paths = [w for w in words if re.fullmatch(r"[\w./]+\.(py|json|yaml|sbatch|sh|md)", w) and w not in THEIRS]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    if "launch/pretrain.py" in words or any(word.endswith(".sbatch") for word in words):
        ours = next(i for i, word in enumerate(words) if word == "launch/pretrain.py" or word.endswith(".sbatch"))
        parser = HfArgumentParser(
            (ModelArguments, DataArguments, LowRankArguments, PretrainArguments), allow_abbrev=False
        )
        known = {*parser._option_string_actions, "--dry-run"}
        flags = [word.split("=")[0] for word in words[ours + 1 :] if word.startswith("--")]
        assert [flag for flag in flags if flag not in known] == []
    if words[0] == "ds-lowrank" and words[1] == "plan":
        assert cli.main(words[1:]) in (0, None)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_there_is_something_to_test():
    assert len(commands()) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_python_and_names_what_there_is(page):
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ds_lowrank":
                assert hasattr(ds_lowrank, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


# ---- recipes ----


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(256, 200)

    def forward(self, x):
        return {"loss": self.inner(x).square().mean()}


class _AsksForAnOptimizer(Trainer):
    """As LLaMA-Factory's Trainers do; axolotl's do not ask."""

    ask = None

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and type(self).ask is not None:
            self.optimizer = type(self).ask(self)
        return super().create_optimizer(*args, **kwargs)


def _trained(tmp_path, ask, callbacks, created=lambda trainer: None) -> Trainer:
    kind = type("Framework", (_AsksForAnOptimizer,), {"ask": ask and staticmethod(ask)})
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], learning_rate=0.1, save_steps=2, disable_tqdm=True
    )
    data = [{"x": torch.randn(256)} for _ in range(16)]
    trainer = kind(model=_Model(), args=args, train_dataset=data, callbacks=callbacks)
    created(trainer)
    trainer.train()
    return trainer


def _recipe(number: int, monkeypatch, modules: dict[str, types.ModuleType]) -> dict:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    namespace: dict = {"__name__": "recipe"}
    exec(compile(blocks(ROOT / "docs" / "integrations.md", "python")[number], "integrations.md", "exec"), namespace)
    return namespace


def test_the_axolotl_plugin(tmp_path, monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    names = ("axolotl", "axolotl.integrations")
    modules = {name: types.ModuleType(name) for name in names}
    plugin = _recipe(0, monkeypatch, {**modules, "axolotl.integrations.base": base})["LowRank"]()
    callbacks = plugin.add_callbacks_post_trainer(None, None)
    # After the Trainer's construction, as axolotl 0.19's train.py does; its Trainer would make AdamW.
    trainer = _trained(tmp_path, None, callbacks, created=lambda trainer: plugin.post_trainer_create(None, trainer))
    _check(trainer, tmp_path)


def test_the_llama_factory_script(tmp_path, monkeypatch):
    names = ["llamafactory", "llamafactory.train", "llamafactory.train.tuner"]
    names += [f"llamafactory.train.{stage}{rest}" for stage in ("pt", "sft") for rest in ("", ".trainer")]
    modules = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    _recipe(1, monkeypatch, modules)
    hook = modules["llamafactory.train.sft.trainer"].create_custom_optimizer
    assert modules["llamafactory.train.pt.trainer"].create_custom_optimizer is hook
    callbacks = [ds_lowrank.LowRankCallback(), ds_lowrank.CheckpointCallback()]
    trainer = _trained(tmp_path, lambda trainer: hook(trainer.model, trainer.args, None), callbacks)
    _check(trainer, tmp_path)


def _check(trainer: Trainer, folder: Path) -> None:
    optimizer = trainer.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, ds_lowrank.LowRankAdamW)
    assert [plan.name for plan in inner.plans] == ["inner.weight"]
    assert inner.param_groups[0]["initial_lr"] == 0.1
    assert (folder / "checkpoint-2" / "complete.json").is_file()


def test_the_table_of_hardware_is_the_planners(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import hardware

    page = (ROOT / "docs" / "hardware.md").read_text()
    rows = hardware.rows()
    assert len(rows) == len(re.findall(r"^\| llama_", page, re.MULTILINE))
    assert [row for row in rows if row not in page] == []


def _strings() -> list[str]:
    """Texts in the code, with a blank in the place of what is filled in."""
    found = []
    for path in [*(ROOT / "ds_lowrank").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\*\*`([^`]+)`", page, re.MULTILINE)
    strings = _strings()
    assert len(messages) > 8
    for message in messages:
        for piece in message.split("..."):
            assert any(piece.strip() in string for string in strings), message
