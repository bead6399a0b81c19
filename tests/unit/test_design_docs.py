"""docs/design.md and the code use the same words for the same files, and every path that a page names is there."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ROOT / "ds_lowrank"
DESIGN = ROOT / "docs" / "design.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SOURCES = [*sorted(CODE.rglob("*.py")), *sorted((ROOT / "launch").rglob("*.py"))]
# Files of other packages, and what a reader puts one of their own in the place of.
THEIRS = {
    *("complete_nlp_example.py", "dpo.py", "run_clm.py", "run_glue.py", "run_translation.py", "sft.py", "train.py"),
    *("modeling_llama.py", "torchrun_main.py", "zero_to_fp32.py", "_fsdp_collectives.py"),
    *("partitioned_param_coordinator.py", "stage_1_and_2.py", "stage3.py"),
    *("script.py", "my_train.py", "lowrank_plugin.py", "lowrank_train.py"),
}


def section(title: str) -> str:
    return DESIGN.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def named_files(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w./*<>-])(?:\.\./)?[\w./-]*\w\.py\b", text))


def lost(files: set[str], *folders: Path) -> list[str]:
    return sorted(f for f in files - THEIRS if not any((folder / f).is_file() for folder in (ROOT, CODE, *folders)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    if page == DESIGN:  # the map of the house names files by folder, see below
        text = text.replace(section("The house"), "")
    assert lost(named_files(text), page.parent) == []


def test_files_that_docstrings_name_are_there():
    named = {path: named_files("\n".join(docstrings(path))) for path in SOURCES}
    assert {path.name: found for path, files in named.items() if (found := lost(files, path.parent))} == {}
    assert sum(map(len, named.values())) > 5


def test_names_that_docstrings_refer_to_are_there():
    names = {
        name
        for path in SOURCES
        for name in re.findall(r":(?:mod|class|func|meth|data|attr):`(ds_lowrank[\w.]*)`", path.read_text())
    }
    assert len(names) > 20
    assert [name for name in sorted(names) if not resolves(name)] == []


def test_the_map_of_the_house_has_every_folder_and_what_it_names_is_there():
    lines = [line for line in section("The house").splitlines() if line.startswith("    ")]
    folders: list[str] = []
    seen: set[str] = set()
    for line in lines:
        if line[4] != " ":
            folders = re.findall(r"^(?:    |\s)((?:[\w]+/ ?)+)", line)[0].split() if "/" in line.split()[0] else [""]
            seen.update(folders)
        for file in named_files(line):
            assert any((CODE / folder / file).is_file() for folder in folders), file
            seen.update(folder + file for folder in folders)
    modules = {path.name for path in CODE.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.name}/" for path in CODE.glob("*/__init__.py")}
    assert sorted((modules | packages) - seen) == []


# ---- words ----


def glossary() -> list[tuple[list[str], str | None]]:
    found = []
    for bullet in re.findall(r"^- (.*?)(?=^- |\Z)", section("Words"), re.MULTILINE | re.DOTALL):
        head = bullet.split(":")[0]
        defined = re.search(r"\(`([\w.]+)`\)", head)
        found.append((re.findall(r"\*\*([\w ]+)\*\*", head), defined and defined[1]))
    return found


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node, clean=False))]


@functools.cache
def words() -> set[str]:
    """In identifiers, whole and in their parts, and in docstrings, in lower case, each with and without a plural s."""
    found: set[str] = set()
    for path in CODE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for field in ("id", "attr", "arg", "name"):
                if isinstance(name := getattr(node, field, None), str):
                    found.update([name.strip("_").lower(), *name.lower().split("_")])
        for text in docstrings(path):
            found.update(re.findall(r"\w+", text.lower()))
    return found | {word.removesuffix("s") for word in found}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one: an attribute, or a field of a class."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
            if not (hasattr(found, part) or part in fields):
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_every_word_of_the_glossary_is_one_of_the_code():
    entries = glossary()
    assert len(entries) > 20
    for terms, defined in entries:
        assert terms
        for term in terms:
            assert term.replace(" ", "_") in words(), term
        if defined is not None:
            assert resolves(f"ds_lowrank.{defined}"), defined


def test_the_mathematics_never_imports_torch_distributed():
    folders = [CODE / name for name in ("subspace", "rules", "selections", "states")]
    for path in [path for folder in folders for path in folder.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            base = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in names:
                whole = f"{base}.{name}".lstrip(".")
                assert not whole.startswith("torch.distributed"), path
                assert not re.match(r"ds_lowrank\.(engine|comm|layouts|plan|integrations|planner)\b", whole), path
