"""scripts/mutants.py in short: that every fault can still be put in, and that the tests it asks are there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_text_of_every_fault_is_in_its_file_once(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutants

    texts = {m.file: (ROOT / "ds_lowrank" / m.file).read_text() for m in mutants.MUTANTS}
    assert [(m.file, m.breaks) for m in mutants.MUTANTS if texts[m.file].count(m.old) != 1] == []
    assert [m.breaks for m in mutants.MUTANTS if m.old == m.new] == []
    asked = {f"tests/{m.first.split(maxsplit=1)[0]}" for m in mutants.MUTANTS}
    assert [path for path in sorted(asked | {*mutants.TESTS}) if not (ROOT / path).is_file()] == []
