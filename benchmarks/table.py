"""Flat rows as a table on the terminal and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def json_argument(parser: argparse.ArgumentParser) -> None:
    """Add the ``--json FILE`` that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")


def show(rows: Sequence[Row], title: str, json_file: Path | None = None) -> None:
    """Print rows that share their keys; write them to ``json_file`` if given."""
    table = Table(title=title)
    columns = list(rows[0]) if rows else []
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(format_value(row.get(column)) for column in columns))
    Console(width=200, highlight=False).print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(list(rows), indent=1) + "\n")


def format_value(value: Any) -> str:
    """A cell: small and huge numbers in powers of ten, missing ones as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e7) else f"{value:.3f}"
    return str(value)
