"""Local files of a corpus: which there are, and what is in them by their names."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

FILE_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


def text_files(flag: str, pattern: str) -> tuple[str, list[str]]:
    """Format (as ``datasets`` names it) and files, sorted, of a file, a folder or a pattern.

    Raises:
        ValueError: a file of another format, or of several.
        FileNotFoundError: there is none.
    """
    if Path(pattern).is_dir():
        found = sorted(str(path) for path in Path(pattern).iterdir() if _format(path) is not None)
    else:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        wrong = [path for path in found or [pattern] if _format(Path(path)) is None]
        if wrong:
            known = ", ".join(FILE_FORMATS)
            raise ValueError(
                f"--{flag}: {wrong[0]} is none of {known} (compressed, too, as .json.gz), nor tokens: .bin, .arrow or "
                "a folder of Dataset.save_to_disk"
            )
    if not found:
        raise FileNotFoundError(f"--{flag}: no such file: {pattern}")
    kinds = {_format(Path(path)) for path in found}
    if len(kinds) > 1:
        raise ValueError(f"--{flag}: {pattern} has files of several formats: {', '.join(sorted(map(str, kinds)))}")
    return str(kinds.pop()), found


def _format(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return FILE_FORMATS.get(suffixes[-1]) if suffixes else None


def is_tokens(path: str) -> bool:
    """Whether a corpus is tokens already: ``.bin``, ``.arrow``, or a folder of ``Dataset.save_to_disk``."""
    folder = Path(path)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return folder.suffix in (".bin", ".arrow") or saved


def file_identity(path: str) -> list[Any]:
    """What changes when a file does."""
    status = os.stat(path)
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns]
