"""Turn the ``--json`` of a benchmark into a Markdown table on stdout.

python benchmarks/markdown.py FILE.json "Title" "command that made it"
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
from pathlib import Path

import torch
from table import format_value


def main() -> None:
    source, title, command = sys.argv[1:4]
    rows = json.loads(Path(source).read_text())
    columns = list(rows[0])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    made = f"{datetime.date.today()}, {device} ({platform.machine()}), torch {torch.__version__}"
    print(f"# {title}\n\n`{command}`, {made}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "|".join("---" if isinstance(rows[0][c], str) else "--:" for c in columns) + "|")
    for row in rows:
        print("| " + " | ".join(format_value(row.get(c)) for c in columns) + " |")


if __name__ == "__main__":
    main()
