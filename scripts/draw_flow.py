"""The pictures of docs/design.md: how one gradient flows through a step in each layout, and through a refresh.

python scripts/draw_flow.py

What lies where, who computes which rows and how much moves is read off the plans that the package makes of small
matrices on three ranks, so a picture shows what the code does. tests/unit/test_pictures.py draws them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_lowrank.layouts.base import Piece
from ds_lowrank.layouts.cuts import chunk_piece, flat_pieces, flat_size, slice_piece
from ds_lowrank.plan.geometry import Box
from ds_lowrank.plan.matrices import MatrixPlan, plan_matrices
from ds_lowrank.plan.specs import MatrixSpec

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
RANKS, R = 3, 2
TIMES = "\u00d7"
TALL, WIDE = (8, 5), (5, 8)
WIDTH, CELL, GAP = 912, 13, 16
# Centres of the columns of a step, left to right.
HELD, ROWS, BASIS, PROJECTED, MOMENT_1, MOMENT_2, DIRECTION = 68, 300, 369, 421, 470, 500, 550
UPDATE, WEIGHTS = 652, 844
STYLE = """
.back { fill: #ffffff }
.r0 { fill: #1f6fb4 } .r1 { fill: #eda83a } .r2 { fill: #2a9d78 } .none { fill: #d5d9de }
.view { fill: none; stroke: #24292f; stroke-width: 1.2 }
.buffer { fill: none; stroke: #24292f; stroke-width: 1.2; stroke-dasharray: 3 2 }
.way { fill: none; stroke: #57606a; stroke-width: 1.4 }
.still { fill: none; stroke: #8c959f; stroke-width: 1.2; stroke-dasharray: 2 3 }
.tip { fill: #57606a }
text { font-family: "DejaVu Sans", Verdana, sans-serif; font-size: 11px; fill: #24292f }
.title { font-size: 14px; font-weight: bold }
.head { font-weight: bold }
.quiet { fill: #57606a; font-size: 10.5px }
.on { fill: #ffffff; font-weight: bold }
.on1 { fill: #24292f; font-weight: bold }
"""
DARK = """
.back { fill: #0d1117 }
.r0 { fill: #4a9be0 } .r1 { fill: #e3b04b } .r2 { fill: #3fb68e } .none { fill: #444c56 }
.view, .buffer { stroke: #e6edf3 }
.way { stroke: #9da7b3 }
.still { stroke: #6e7681 }
.tip { fill: #9da7b3 }
text { fill: #e6edf3 }
.quiet { fill: #9da7b3 }
.on, .on1 { fill: #0d1117 }
"""


# ---- plans ----


def plans(
    shapes: Mapping[str, tuple[int, int]], pieces: Sequence[Mapping[str, Piece]], replicated: bool = False
) -> list[MatrixPlan]:
    """The package's own plans of some matrices.

    Args:
        shapes: name -> (m, n).
        pieces: for each rank, what it holds, as the layout cuts it (``layouts/cuts.py``).
        replicated: every rank holds everything.
    """
    specs = [MatrixSpec(name, name, shape, None, shape, 0, R, 200, "std") for name, shape in shapes.items()]
    return plan_matrices(
        specs,
        pieces,
        copy=(0,) * len(pieces),
        replicated=replicated,
        dtype=lambda name: torch.float32,
        gradient_dtype=lambda name: torch.float32,
        unit=lambda name: 0,
        stagger=True,
        wave_size=8,
        shard_projection=True,
    )


def plan_of(shape: tuple[int, int], piece: Callable[[int], Piece], ranks: int = RANKS, **given: bool) -> MatrixPlan:
    """The plan of one matrix W of which rank k holds ``piece(k)``."""
    held = [{"W": found} if (found := piece(k)).start < found.stop else {} for k in range(ranks)]
    return plans({"W": shape}, held, **given)[0]


def in_w(plan: MatrixPlan, row: int, column: int) -> tuple[int, int]:
    """Where in W an element of A is."""
    return (row, column) if plan.side == "right" else (column, row)


def inside(box: Box | None, at: tuple[int, int]) -> bool:
    """Whether an element of W lies in a box of it."""
    return box is not None and box.top <= at[0] < box.bottom and box.left <= at[1] < box.right


def computer(plan: MatrixPlan, at: tuple[int, int]) -> int:
    """The rank that computes an element of W."""
    row = at[0] if plan.side == "right" else at[1]
    return next(k for k, share in enumerate(plan.shares) if share is not None and share.start <= row < share.stop)


def holder(plan: MatrixPlan, at: tuple[int, int]) -> int:
    """The rank that holds an element of W; where all do, the one that computes it."""
    if plan.replicated:
        return computer(plan, at)
    return next(k for k, part in enumerate(plan.parts) if part is not None and any(inside(b, at) for b in part.boxes))


def brought(plan: MatrixPlan) -> int:
    """Numbers of the gradient that travel to where their rows are computed, and of updates that travel back."""
    buffers = [share.buffer if share is not None else None for share in plan.shares]
    cells = [(i, j) for i in range(plan.shape[0]) for j in range(plan.shape[1])]
    return sum(inside(box, at) and holder(plan, at) != k for k, box in enumerate(buffers) for at in cells)


def all_gathered(sizes: Sequence[int]) -> int:
    """Numbers that ranks send in an all-gather of parts of these sizes, all padded to the longest (comm/)."""
    return len(sizes) * (len(sizes) - 1) * max(sizes)


def handed_round(plan: MatrixPlan) -> int:
    """Numbers of new weights that ranks get from those who computed them, where every rank holds the whole."""
    return all_gathered([plan.rows_of(k) * plan.short for k in range(len(plan.shares))]) if plan.replicated else 0


def joined(plan: MatrixPlan) -> int:
    """Numbers of the basis that ranks get from each other ahead of its use: all of them, or those few who compute."""
    if not plan.basis_sharded:
        return 0
    sizes = [plan.kept(k) * plan.r for k in range(len(plan.shares))]
    return all_gathered(sizes) if all(plan.shares) else sum(sizes) * (len(plan.computing) - 1)


def keeper(plan: MatrixPlan, row: int) -> int:
    """The rank that keeps a row of the basis."""
    return next(k for k, rows in enumerate(plan.slices) if rows is not None and rows[0] <= row < rows[1])


# ---- SVG ----


@dataclass
class Picture:
    """Lines of an SVG file, from top to bottom."""

    name: str
    height: float = 0
    lines: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """One line of text around, or from, ``x``."""
        mark = f' class="{kind}"' if kind else ""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.lines.append(f'<text x="{x:g}" y="{y:g}"{mark}{place}>{text}</text>')

    def cells(
        self, x: float, y: float, rows: int, columns: int, rank: Callable[[int, int], int], cell: float = CELL
    ) -> None:
        """A matrix, each element in the colour of ``rank(row, column)``; the top left corner at (x, y)."""
        paths: dict[int, list[str]] = {}
        for i in range(rows):
            for j in range(columns):
                step = f"M{x + j * cell + 0.75:g} {y + i * cell + 0.75:g}h{cell - 1.5:g}v{cell - 1.5:g}h{1.5 - cell:g}z"
                paths.setdefault(rank(i, j), []).append(step)
        for k, steps in sorted(paths.items()):
            self.lines.append(f'<path class="r{k}" d="{"".join(steps)}"/>')

    def frame(self, x: float, y: float, width: float, height: float, kind: str = "view") -> None:
        """An outline."""
        self.lines.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')

    def arrow(self, start: float, stop: float, y: float, above: Sequence[str] = (), below: str = "") -> None:
        """From left to right; broken where there is nothing ``below`` to say how much moves."""
        still = below in ("", "nothing moves")
        self.lines.append(f'<path class="{"still" if still else "way"}" d="M{start:g} {y:g}H{stop - 6:g}"/>')
        self.lines.append(f'<path class="tip" d="M{stop:g} {y:g}l-7 -3.5v7z"/>')
        for line, words in enumerate(reversed(above)):
            self.text((start + stop) / 2, y - 8 - 13 * line, words)
        self.text((start + stop) / 2, y + 17, below, "quiet")

    def svg(self) -> str:
        """The file."""
        size = f'width="{WIDTH}" height="{self.height:g}"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" {size} role="img">'
        style = f"<style>{STYLE}@media (prefers-color-scheme: dark) {{{DARK}}}\n</style>"
        ground = f'<rect class="back" {size} rx="6"/>'
        return "\n".join([start, f"<title>{self.name}</title>", style, ground, *self.lines, "</svg>\n"])


def numbers(count: int) -> str:
    """How many numbers, in words."""
    return f"{count} number{'s' * (count != 1)}"


def listed(words: Sequence[object]) -> str:
    """a, b and c."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


# ---- a step ----


def heads(picture: Picture, y: float) -> None:
    """What the columns of a step are."""
    names = {
        HELD: "∇W, as it lies",
        ROWS: "G, rows of ∇A",
        BASIS: "B",
        PROJECTED: "R = GB",
        (MOMENT_1 + MOMENT_2) / 2: "rule: M, V",
        DIRECTION: "N",
        UPDATE: "update, N Bᵀ",
        WEIGHTS: "W, as it lies",
    }
    for x, name in names.items():
        picture.text(x, y, name, "head")


def sheets(picture: Picture, plan: MatrixPlan, centre: float, middle: float, after: bool) -> None:
    """W as the ranks hold it: one matrix of which each holds some, or a whole one on every rank."""
    m, n = plan.shape
    x, y = centre - n * CELL / 2, middle - m * CELL / 2
    count = len(plan.parts) if plan.replicated else 1
    for k in reversed(range(count)):
        left, top = x + 7 * (k - (count - 1) / 2), y - 7 * (k - (count - 1) / 2)
        if count > 1:
            picture.lines.append(
                f'<rect class="back" x="{left:g}" y="{top:g}" width="{n * CELL:g}" height="{m * CELL:g}"/>'
            )
        picture.cells(left, top, m, n, lambda i, j, k=k: k if count > 1 and not after else holder(plan, (i, j)))  # type: ignore[misc]
        picture.frame(left, top, n * CELL, m * CELL)


def step(picture: Picture, plan: MatrixPlan, top: float) -> float:
    """One matrix through a step, from ``top`` down; returns the height that it took."""
    lanes = {k: plan.rows_of(k) * CELL for k in plan.computing}
    height = max(sum(lanes.values()) + GAP * (len(lanes) - 1), plan.shape[0] * CELL + 14 * plan.replicated)
    middle = top + height / 2
    sheets(picture, plan, HELD, middle, after=False)
    sheets(picture, plan, WEIGHTS, middle, after=True)
    if plan.replicated:
        there = ["each reads", "its own rows"], "nothing moves"
        back = ["new weights,", "all-gathered"], numbers(handed_round(plan))
    elif brought(plan):
        whole = all(share is None or share.view is None for share in plan.shares)
        much = numbers(brought(plan))
        there = (["all-to-all:", "rows of A"] if whole else ["rows that a", "boundary cuts"], much)
        back = (["all-to-all:", "updates"] if whole else ["their updates"], much)
    else:
        there, back = (["read where", "they lie"], "nothing moves"), (["written where", "they lie"], "nothing moves")
    picture.arrow(128, 214, middle, *there)
    picture.arrow(694, 782, middle, *back)
    x, y = BASIS - R * CELL / 2, middle - plan.short * CELL / 2
    picture.cells(x, y, plan.short, R, lambda i, j: keeper(plan, i))
    picture.frame(x, y, R * CELL, plan.short * CELL)
    if joined(plan):
        for place, words in enumerate(["slices", "joined:", numbers(joined(plan))]):
            picture.text(BASIS, y + plan.short * CELL + 14 + 12 * place, words, "quiet")
    picture.text(BASIS - 24, middle + 4, "·")
    picture.text(BASIS + 26, middle + 4, "=")
    picture.text((DIRECTION + UPDATE) / 2 - 5, middle + 4, "· Bᵀ =")
    at: float = top + (height - sum(lanes.values()) - GAP * (len(lanes) - 1)) / 2
    for k, tall in lanes.items():
        lane(picture, plan, k, at, tall)
        at += tall + GAP
    return max(height, height / 2 + plan.short * CELL / 2 + 42 * (joined(plan) > 0))


def lane(picture: Picture, plan: MatrixPlan, rank: int, y: float, tall: float) -> None:
    """What one rank computes of a matrix."""
    share = plan.shares[rank]
    assert share is not None
    rows, short = share.rows, plan.short
    picture.text(ROWS - short * CELL / 2 - 6, y + tall / 2 + 4, f"rank {rank}", "head", "end")
    picture.cells(ROWS - short * CELL / 2, y, rows, short, lambda i, j: holder(plan, in_w(plan, share.start + i, j)))
    for x in (PROJECTED, MOMENT_1, MOMENT_2, DIRECTION):
        picture.cells(x - R * CELL / 2, y, rows, R, lambda i, j: rank)
        picture.frame(x - R * CELL / 2, y, R * CELL, tall)
    picture.cells(UPDATE - short * CELL / 2, y, rows, short, lambda i, j: rank)
    picture.arrow(PROJECTED + 16, MOMENT_1 - 15, y + tall / 2)
    picture.arrow(MOMENT_2 + 16, DIRECTION - 15, y + tall / 2)
    # The view first, then the buffer.
    view = sum(inside(share.view, in_w(plan, share.start + i, 0)) for i in range(rows))
    for left in (ROWS - short * CELL / 2, UPDATE - short * CELL / 2):
        if view:
            picture.frame(left, y, short * CELL, view * CELL)
        if view < rows:
            picture.frame(left, y + view * CELL, short * CELL, (rows - view) * CELL, "buffer")


def told(plan: MatrixPlan) -> list[str]:
    """What a step and a refresh send, in words."""
    sent = {
        "of gradient rows": brought(plan),
        "of updates": brought(plan),
        "of new weights": handed_round(plan),
        "of the basis": joined(plan),
    }
    parts = [f"{numbers(count)} {what}" for what, count in sent.items() if count]
    sends = f"all ranks together send {listed(parts)}" if parts else "nothing is sent"
    if not plan.shared:
        return [f"A step: {sends}. A refresh: rank {plan.owner} decomposes the Gram of its own rows; nothing is sent."]
    sizes = [plan.kept(k) for k in plan.computing]
    return [
        f"A step: {sends}.",
        f"A refresh: ranks {listed(plan.contributors)} have a Gram ({plan.short} {TIMES} {plan.short}) each; rank "
        f"{plan.owner}, the owner, gets their sum and sends the basis back in slices of {listed(sizes)} rows.",
    ]


def titled(text: str, shape: tuple[int, int]) -> Picture:
    """A picture with its title, and what W is in it."""
    picture = Picture(text)
    m, n = shape
    kind = f"W {m} {TIMES} {n} is " + ("tall: A = W" if m >= n else "wide: A = Wᵀ")
    picture.text(16, 25, text, "title", "start")
    picture.text(WIDTH - 16, 25, f"{kind}, r = {R}", "quiet", "end")
    return picture


def words_below(picture: Picture, y: float, lines: Sequence[str]) -> None:
    """Sentences under a picture, which end it."""
    for number, line in enumerate(lines):
        picture.text(16, y + 16 * number, line, "quiet", "start")
    picture.height = y + 16 * len(lines)


def flow(text: str, plan: MatrixPlan) -> Picture:
    """One matrix in one layout."""
    picture = titled(text, plan.shape)
    heads(picture, 52)
    height = step(picture, plan, 64)
    words_below(picture, 64 + height + 26, told(plan))
    return picture


def flow_of_flat_buffer() -> Picture:
    """ZeRO-1 and ZeRO-2: matrices one after the other in a group's flat buffer, whole ones and one that is cut."""
    shapes: dict[str, tuple[int, int]] = dict.fromkeys("abcd", TALL)
    found = {p.name: p for p in plans(shapes, flat_pieces(shapes, RANKS))}
    size, numel = flat_size(sum(map(math.prod, shapes.values())), RANKS), math.prod(TALL)
    picture = titled("ZeRO-1 and ZeRO-2: a third of the group's flat buffer each", TALL)
    left, scale = 120, (WIDTH - 136) / size
    picture.text(16, 59, "flat buffer", "head", "start")
    for k in range(RANKS):
        part = size // RANKS * scale
        picture.lines.append(f'<rect class="r{k}" x="{left + k * part:g}" y="46" width="{part:g}" height="19"/>')
        picture.text(left + (k + 0.5) * part, 81, f"rank {k}", "quiet")
    for number, name in enumerate(shapes):
        picture.frame(left + number * numel * scale, 46, numel * scale, 19)
        here = (number + 0.5) * numel
        rank = int(here // (size // RANKS))
        picture.text(left + here * scale, 60, name, "on1" if rank == 1 else "on")
    pad = (size - len(shapes) * numel) * scale
    picture.lines.append(f'<rect class="none" x="{WIDTH - 16 - pad:g}" y="46" width="{pad:g}" height="19"/>')
    picture.text(WIDTH - 16, 81, "padding", "quiet", "end")
    heads(picture, 108)
    top = 120.0
    for name, words in (("a", "lies whole"), ("b", "is cut")):
        picture.text(16, top + 8, name, "head", "start")
        top += step(picture, found[name], top) + 14
        for line in told(found[name]):
            picture.text(
                16, top + 4, f"{name} {words}. {line}" if line.startswith("A step") else line, "quiet", "start"
            )
            top += 16
        top += 14
    picture.height = top - 14
    return picture


# ---- a refresh ----


def refresh(text: str, plan: MatrixPlan) -> Picture:
    """Grams to the owner, and the basis back."""
    picture = titled(text, plan.shape)
    small, tall, gap = 8, 44, 14
    lanes = plan.computing
    height = tall * len(lanes) + gap * (len(lanes) - 1)
    top, middle = 66, 66 + height / 2
    rows, grams, total, basis, slices = 100, 260, 470, 652, 800
    names = {
        rows: "G, rows of ∇A",
        grams: "Gram, GᵀG",
        total: f"sum, on rank {plan.owner}",
        basis: f"B, on rank {plan.owner}",
        slices: "what is kept of B",
    }
    for x, name in names.items():
        picture.text(x, 52, name, "head")
    for place, k in enumerate(lanes):
        y = top + place * (tall + gap)
        centre, count = y + tall / 2, plan.rows_of(k)
        picture.text(16, centre + 4, f"rank {k}", "head", "start")
        for x, m, n, cell in (
            (rows, count, plan.short, CELL),
            (grams, plan.short, plan.short, small),
            (slices, plan.kept(k), R, CELL),
        ):
            picture.cells(x - n * cell / 2, centre - m * cell / 2, m, n, lambda i, j, k=k: k, cell)  # type: ignore[misc]
            picture.frame(x - n * cell / 2, centre - m * cell / 2, n * cell, m * cell)
        picture.text(slices + 24, centre + 4, f"rank {k}", "head", "start")
        picture.arrow(rows + plan.short * CELL / 2 + 10, grams - plan.short * small / 2 - 10, centre)
    short = plan.short
    for x, n, above, below, start in (
        (total, short, ["added up", "on the owner"], f"{numbers(short**2)} each", grams),
        (basis, R, ["eigenvectors,", "r of them chosen"], "", total),
    ):
        picture.cells(x - n * CELL / 2, middle - short * CELL / 2, short, n, lambda i, j: plan.owner)
        picture.frame(x - n * CELL / 2, middle - short * CELL / 2, n * CELL, short * CELL)
        before = short * (small if start == grams else CELL) / 2
        picture.arrow(start + before + 12, x - n * CELL / 2 - 10, middle, above, below)
    sent = sum(plan.kept(k) * R for k in lanes if k != plan.owner)
    picture.arrow(
        basis + R * CELL / 2 + 12, slices - R * CELL / 2 - 10, middle, ["a slice to", "each rank"], numbers(sent)
    )
    words_below(
        picture,
        top + height + 28,
        [
            "No rank decomposes what another decomposes, and none gathers the gradient. Whether there is a new basis, "
            "and of which directions,",
            "every rank is told, so that the counters agree. A matrix that lies whole on one rank is refreshed there, "
            "and nothing moves.",
        ],
    )
    return picture


def pictures() -> dict[str, str]:
    """File name -> content."""
    numel = math.prod(TALL)
    zero3 = plan_of(TALL, lambda k: slice_piece(numel, -(-numel // RANKS), k))
    found = {
        "one_process": flow("One process", plan_of(TALL, lambda k: Piece(0, numel), ranks=1)),
        "ddp": flow(
            "DDP: everything on every rank, the rows dealt out",
            plan_of(TALL, lambda k: Piece(0, numel), replicated=True),
        ),
        "zero12": flow_of_flat_buffer(),
        "zero3": flow("ZeRO-3: a run of every parameter", zero3),
        "fsdp2_rows": flow("FSDP2, Shard(0): rows", plan_of(TALL, lambda k: chunk_piece(TALL, 0, RANKS, k))),
        "fsdp2_wide": flow(
            "FSDP2, Shard(0) of a wide matrix: rows of W are columns of A",
            plan_of(WIDE, lambda k: chunk_piece(WIDE, 0, RANKS, k)),
        ),
        "fsdp2_columns": flow(
            "FSDP2, Shard(1) of a wide matrix: columns of W are rows of A",
            plan_of(WIDE, lambda k: chunk_piece(WIDE, 1, RANKS, k)),
        ),
        "refresh": refresh("A refresh where several ranks compute a matrix (ZeRO-3)", zero3),
    }
    return {f"flow_{name}.svg": picture.svg() for name, picture in found.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in pictures().items():
        (FOLDER / name).write_text(content)
