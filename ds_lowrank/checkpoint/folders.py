"""What lies in a checkpoint's folder. Names and texts in it are not trusted: damaged, or meant to harm."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def member(folder: Path, name: Any, teller: Path) -> Path:
    """Path of something in ``folder`` that a file of a checkpoint names.

    Args:
        folder: of the checkpoint, or a part of it.
        name: as it was read; anything.
        teller: the file that names it.

    Raises:
        ValueError: it is no name, or one of something elsewhere.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{teller} is damaged: where the name of a file belongs it has {_short(name)}")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive or pure == PurePosixPath("."):
        raise ValueError(f"{teller} names {_short(name)}, which is not inside {folder}: it is not read")
    return folder / pure


def check_links(folder: Path) -> None:
    """Refuse a folder from which a symbolic link leads out.

    Raises:
        ValueError: there is one; names it.
    """
    root = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ValueError(
                    f"{path} is a link to {os.readlink(path)}, outside of {folder}: a checkpoint is read from its own "
                    "folder only. Put a copy of the file there"
                )


def read_text(path: Path) -> str:
    """A text file, without white space at its ends.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not a text ({error})") from error


def read_object(path: Path, **expected: type) -> dict[str, Any]:
    """A file with a JSON object.

    Args:
        path: the file.
        expected: keys that it must have, and of which type their values are.

    Raises:
        ValueError: it is something else, or lacks a key; names the file.
        OSError: it cannot be read.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds {_short(content)} where an object belongs")
    for key, kind in expected.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            has = f"{key} {_short(value)}" if key in content else f"no {key}"
            raise ValueError(f"{path} is damaged: it has {has} where {kind.__name__} {key} belongs")
    return content


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
