"""When a checkpoint counts: a marker, written last, that lists every file with its size and digest.

Knows folders and files, no ranks and no mathematics. The order of what reaches the disk is the whole point: data files,
then their directories, then the marker in one atomic rename. Removal goes the other way round, marker first. So a crash
at any moment leaves a folder with a marker, which is whole, or one without, which is passed over.

``python -m ds_lowrank.manifest FOLDER`` marks a checkpoint that something else wrote and whose owner knows
it is whole.

A run may start below checkpoints that an earlier one has left. Those stay, whole, with a second file beside the marker
that says so: they are passed over until they are written anew or marked again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.checkpoint.folders import check_links, member

MARKER = "complete.json"
SUPERSEDED = "superseded.json"
_UNFINISHED = MARKER + ".tmp"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
_CHUNK = 1 << 22
_MOST_NAMED = 5
_WHAT_TO_DO = "Delete the folder, or resume from another checkpoint"


@dataclass(frozen=True)
class FileDigest:
    """What a file must be.

    Attributes:
        size: in bytes.
        sha256: hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of a marker.

    Attributes:
        files: what every file must be, by its path within the folder.
        facts: what the writer said about the checkpoint.
    """

    files: dict[str, FileDigest]
    facts: dict[str, Any]


def file_sizes(folder: str | Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint, by its path within the folder; markers are none of them."""
    root = Path(folder)
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name not in (MARKER, SUPERSEDED, _UNFINISHED):
            found[name] = path.stat().st_size
    return found


def share_out(sizes: Mapping[str, int], shares: int) -> list[list[str]]:
    """Share files out so that every share has about as many bytes. The same on every rank.

    Args:
        sizes: bytes of each file.
        shares: number of ranks.

    Returns:
        The names of each share.
    """
    found: list[list[str]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        found[lightest].append(name)
        loads[lightest] += sizes[name]
    return found


def digests(folder: str | Path, names: Iterable[str], sync: bool = False) -> dict[str, FileDigest]:
    """Read files and say what they are.

    Args:
        folder: the checkpoint.
        names: paths within it.
        sync: also make sure that what was read is on the disk and not in the machine's memory alone.

    Raises:
        OSError: a file cannot be read.
    """
    return {name: _digest(Path(folder) / name, sync) for name in names}


def write_marker(folder: str | Path, files: Mapping[str, FileDigest], facts: Mapping[str, Any]) -> None:
    """Declare a checkpoint complete. Its files have to be on the disk already (``digests(..., sync=True)``).

    Args:
        folder: the checkpoint.
        files: what every file of it is.
        facts: what else to write down; JSON values.

    Raises:
        OSError: the marker could not be written; the checkpoint is then as incomplete as before.
    """
    root = Path(folder)
    for directory in {root.parent, root, *((root / name).parent for name in files)}:
        _sync_directory(directory)
    content = {"format": _FORMAT, "facts": dict(facts), "files": {name: asdict(files[name]) for name in sorted(files)}}
    _write_in_one_piece(root, MARKER, content)


def supersede(folder: str | Path, step: int) -> None:
    """Say that a later run has started below a checkpoint, whose course has ended with it.

    Args:
        folder: the checkpoint.
        step: where that run started.

    Raises:
        OSError: it could not be written.
    """
    _write_in_one_piece(Path(folder), SUPERSEDED, {"a_later_run_started_at_step": step})


def is_superseded(folder: str | Path) -> bool:
    """Whether a later run has started below a checkpoint; see :func:`supersede`."""
    return (Path(folder) / SUPERSEDED).is_file()


def _write_in_one_piece(root: Path, name: str, content: Mapping[str, Any]) -> None:
    unfinished = root / _UNFINISHED
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, root / name)
    _sync_directory(root)


def mark(folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Hash all files of a checkpoint and declare it complete, in one process; it is superseded no longer."""
    write_marker(folder, digests(folder, file_sizes(folder), sync=True), facts)
    (Path(folder) / SUPERSEDED).unlink(missing_ok=True)


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint was written to its end. Says nothing about what became of its files since."""
    return (Path(folder) / MARKER).is_file()


def read_marker(folder: str | Path) -> Manifest:
    """What a checkpoint's marker says.

    Raises:
        ValueError: there is none, it cannot be read, or it names a file outside of the folder.
    """
    path = Path(folder) / MARKER
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MARKER}: it was not written to its end, or by another program. {_WHAT_TO_DO}; if you "
            f"know that it is whole, python -m {_module()} {folder} marks it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written_by = content["format"]
        files = {name: FileDigest(int(f["size"]), str(f["sha256"])) for name, f in content["files"].items()}
        facts = dict(content["facts"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). {_WHAT_TO_DO}") from error
    for name in files:
        member(Path(folder), name, path)
    if written_by != _FORMAT:
        raise ValueError(f"{path} has format {written_by} and this version reads {_FORMAT}: use the version of then")
    return Manifest(files, facts)


def verify(folder: str | Path, share: tuple[int, int] = (0, 1)) -> Manifest:
    """Check a checkpoint's files against its marker. Files that the marker does not list are left alone.

    Args:
        folder: the checkpoint.
        share: (rank, ranks): whether files are there and as long as they were is looked at on every rank, their
            digests are computed of this rank's share only.

    Returns:
        What the marker says.

    Raises:
        ValueError: there is no marker, a file is missing, truncated or changed, or a link leads out of the folder;
            names the folder and the files.
    """
    root = Path(folder)
    manifest = read_marker(root)
    check_links(root)
    rank, ranks = share
    mine = set(share_out({name: file.size for name, file in manifest.files.items()}, ranks)[rank])
    problems = []
    for name, file in manifest.files.items():
        problem = _compare(root / name, file, with_digest=name in mine)
        if problem is not None:
            problems.append(f"{name} {problem}")
    if problems:
        more = len(problems) - _MOST_NAMED
        listed = "; ".join(problems[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"the checkpoint {folder} is damaged: {listed}. {_WHAT_TO_DO}")
    return manifest


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Step and folder of every ``checkpoint-N``, complete or not, oldest step first."""
    root = Path(output_dir)
    if not root.is_dir():
        return []
    found = [(match, path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found)


def newest_complete(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step, or ``None``. Warns of newer ones that do not count.

    What an earlier run has left above the step that a later one started at does not count.
    """
    passed_over: list[str] = []
    left_behind: list[str] = []
    newest = None
    for _, folder in reversed(checkpoints(output_dir)):
        if is_superseded(folder):
            left_behind.append(folder.name)
        elif is_complete(folder):
            newest = folder
            break
        else:
            passed_over.append(folder.name)
    if passed_over:
        warnings.warn(
            f"{output_dir}: {', '.join(passed_over)} passed over: without {MARKER} a checkpoint was not written to its "
            "end",
            stacklevel=2,
        )
    if left_behind:
        warnings.warn(
            f"{output_dir}: {', '.join(left_behind)} passed over: an earlier run left them, and a later one started at "
            f"a lower step ({SUPERSEDED})",
            stacklevel=2,
        )
    return newest


def complete_beyond(output_dir: str | Path, step: int) -> list[Path]:
    """Complete checkpoints of later steps than ``step``: of another course of the run, where one starts from there.

    Those that are superseded already are none of them.
    """
    later = [folder for at, folder in checkpoints(output_dir) if at > step]
    return [folder for folder in later if is_complete(folder) and not is_superseded(folder)]


def remove(folder: str | Path) -> None:
    """Delete a checkpoint, its marker first, so that an interrupted deletion leaves no marked ruin.

    Raises:
        OSError: something could not be deleted.
    """
    root = Path(folder)
    (root / MARKER).unlink(missing_ok=True)
    _sync_directory(root)
    shutil.rmtree(root)
    _sync_directory(root.parent)


def retain(output_dir: str | Path, keep: int | None, protected: Sequence[str | Path] = ()) -> list[Path]:
    """Delete the oldest complete checkpoints beyond ``keep``, and incomplete ones that a newer complete one outdates.

    The newest complete one is never deleted, nor what is protected; both count among the ones kept. What an earlier run
    has left (:func:`supersede`) is neither counted nor deleted. A folder that
    cannot be deleted is warned of: the run shall not end because of it.

    Args:
        output_dir: where the checkpoints are.
        keep: how many complete ones may stay; ``None`` or less than one: nothing is deleted, incomplete or not.
        protected: folders that stay, such as the best model's.

    Returns:
        The folders that were deleted.
    """
    if keep is None or keep < 1:
        return []
    found = [(f, is_complete(f)) for _, f in checkpoints(output_dir) if not is_superseded(f)]
    complete = [folder for folder, whole in found if whole]
    if not complete:
        return []
    newest = complete[-1]
    stay = {Path(folder).resolve() for folder in (newest, *protected)}
    outdated = found[: found.index((newest, True))]
    doomed = [folder for folder, whole in outdated if not whole and folder.resolve() not in stay]
    spare = [folder for folder in complete if folder.resolve() not in stay]
    doomed += spare[: max(0, len(complete) - keep)]
    deleted = []
    for folder in doomed:
        if folder.is_symlink():  # what it leads to is somebody else's
            continue
        try:
            remove(folder)
            deleted.append(folder)
        except OSError as error:
            warnings.warn(f"the old checkpoint {folder} could not be deleted: {error}", stacklevel=2)
    return deleted


def _digest(path: Path, sync: bool) -> FileDigest:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileDigest(size, digest.hexdigest())


def _compare(path: Path, expected: FileDigest, with_digest: bool) -> str | None:
    """What is wrong with a file, or ``None``."""
    try:
        size = path.stat().st_size
        if size < expected.size:
            return f"is truncated ({size} of {expected.size} bytes)"
        if size > expected.size:
            return f"has grown ({size} bytes instead of {expected.size})"
        if with_digest and _digest(path, sync=False) != expected:
            return "is corrupted (its bytes are not those that were written)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def _sync_directory(directory: Path) -> None:
    """Make sure that a directory's entries are on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems know no such thing
            raise
    finally:
        os.close(handle)


def _module() -> str:
    return __spec__.name if __spec__ is not None else __name__


def _main(argv: Sequence[str]) -> int:
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        print(f"usage: python -m {_module()} FOLDER", file=sys.stderr)
        return 2
    mark(argv[0], {"marked": "by hand"})
    print(f"{argv[0]}: {len(read_marker(argv[0]).files)} files marked as complete")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
