"""docs/pictures are what scripts/draw_flow.py draws of the plans that the code makes today."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def draw_flow(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import draw_flow

    return draw_flow


def test_the_pictures_are_those_of_the_code(draw_flow):
    drawn = draw_flow.pictures()
    assert sorted(drawn) == sorted(path.name for path in FOLDER.glob("*"))
    different = [name for name, content in drawn.items() if (FOLDER / name).read_text() != content]
    assert different == [], "python scripts/draw_flow.py draws them anew"


def test_every_picture_is_shown_and_can_be_read_in_the_dark():
    page = (ROOT / "docs" / "design.md").read_text()
    for path in FOLDER.glob("*.svg"):
        assert f"](pictures/{path.name})" in page
        root = ET.parse(path).getroot()
        style = root.findtext(f"{SVG}style") or ""
        light, dark = style.split("@media (prefers-color-scheme: dark)")
        used = {name for node in root.iter() for name in node.get("class", "").split()}
        assert used <= set(re.findall(r"\.(\w+)", light)), path.name
        assert {"back", "r0", "view", "quiet"} <= set(re.findall(r"\.(\w+)", dark)), path.name


def test_nothing_is_drawn_outside_of_the_picture_or_over_other_words(draw_flow):
    for path in FOLDER.glob("*.svg"):
        root = ET.parse(path).getroot()
        _, _, width, height = (float(x) for x in root.attrib["viewBox"].split())
        taken: list[tuple[float, float, float, float]] = []
        for node in root.iter(f"{SVG}text"):
            x, y, kind = float(node.attrib["x"]), float(node.attrib["y"]), node.get("class", "")
            # DejaVu Sans, the widest of the fonts that STYLE names: 0.50 of its size a letter on average, bold 0.58.
            size = {"title": 14.0, "quiet": 10.5}.get(kind, 11.0)
            wide = len(node.text or "") * size * (0.62 if kind in ("title", "head") else 0.54)
            left = x - wide * {"middle": 0.5, "end": 1.0}.get(node.get("text-anchor", ""), 0.0)
            assert left >= 0, node.text
            assert left + wide <= width, node.text
            assert y + 4 <= height, node.text
            box = (left, left + wide, y - size * 0.8, y + 2)
            others = [o for o in taken if box[0] < o[1] and o[0] < box[1] and box[2] < o[3] and o[2] < box[3]]
            assert others == [], f"{path.name}: {node.text}"
            taken.append(box)


def test_what_moves_by_hand(draw_flow):
    tall, wide, ranks = draw_flow.TALL, draw_flow.WIDE, draw_flow.RANKS
    assert (tall, wide, ranks, draw_flow.R) == ((8, 5), (5, 8), 3, 2)
    cut = draw_flow.plan_of(tall, lambda k: draw_flow.slice_piece(40, 14, k))
    # Row 2 is elements 10 to 14, of which 14 is on rank 1; row 5 is 25 to 29, of which 28 and 29 are on rank 2.
    assert (draw_flow.brought(cut), draw_flow.handed_round(cut)) == (3, 0)
    columns = draw_flow.plan_of(wide, lambda k: draw_flow.chunk_piece(wide, 0, ranks, k))
    # Ranks hold 2, 2 and 1 of the 5 columns of A, and compute 3, 3 and 2 of its rows.
    assert draw_flow.brought(columns) == 3 * 3 + 3 * 3 + 2 * 4
    rows = draw_flow.plan_of(wide, lambda k: draw_flow.chunk_piece(wide, 1, ranks, k))
    assert draw_flow.brought(rows) == 0
    # 2, 3 and 3 rows of 5 weights, slices of 2, 2 and 1 rows of B: each goes to two others, as long as the longest.
    whole = draw_flow.plan_of(tall, lambda k: draw_flow.Piece(0, 40), replicated=True)
    assert (draw_flow.brought(whole), draw_flow.handed_round(whole)) == (0, 3 * 2 * 15)
    assert draw_flow.joined(whole) == draw_flow.joined(rows) == 3 * 2 * (2 * 2)
