"""Which checkpoints count, which are refused and by which name, and what is left of them at every moment of a crash."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from ds_lowrank import manifest

FILES = {"model.bin": b"w" * 1000, "trainer_state.json": b"{}", "global_step3/rank_0.pt": b"s" * 400, "empty": b""}


def write(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def complete(output, step):
    folder = write(output / f"checkpoint-{step}")
    manifest.mark(folder, {"step": step})
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return complete(tmp_path, 3)


def refusal(folder, share):
    try:
        manifest.verify(folder, share)
    except ValueError as error:
        return str(error)
    return ""


def steps(output):
    return [step for step, _ in manifest.checkpoints(output)]


def test_a_marked_checkpoint_is_accepted_with_its_facts(checkpoint):
    read = manifest.verify(checkpoint)
    assert set(read.files) == set(FILES)
    assert read.files["model.bin"].size == 1000
    assert read.facts == {"step": 3}


def test_files_that_are_not_listed_are_left_alone(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    manifest.verify(checkpoint)


@pytest.mark.parametrize("name", [*FILES][:3])
@pytest.mark.parametrize("share", [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_a_missing_or_truncated_file_is_named_on_every_rank(checkpoint, name, share):
    path = checkpoint / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"3 is damaged: {name} is truncated .*Delete the folder, or resume"):
        manifest.verify(checkpoint, share)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        manifest.verify(checkpoint, share)


@pytest.mark.parametrize("name", [*FILES][:3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_one_changed_byte_is_found_by_exactly_one_rank(checkpoint, name, ranks):
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)
    refusals = [refusal(checkpoint, (rank, ranks)) for rank in range(ranks)]
    assert sum(f"{name} is corrupted" in text for text in refusals) == 1
    assert refusals.count("") == ranks - 1


def test_a_file_that_has_grown_is_named(checkpoint):
    with open(checkpoint / "empty", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="empty has grown"):
        manifest.verify(checkpoint)


def test_all_damaged_files_are_named(checkpoint):
    for name in ("model.bin", "global_step3/rank_0.pt"):
        (checkpoint / name).unlink()
    with pytest.raises(ValueError, match="damaged") as error:
        manifest.verify(checkpoint)
    assert "model.bin is missing" in str(error.value)
    assert "rank_0.pt is missing" in str(error.value)


def test_without_a_marker_it_is_refused_and_can_be_marked_by_hand(tmp_path, capsys):
    folder = write(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint-1 has no complete\.json"):
        manifest.verify(folder)
    assert manifest._main([str(folder)]) == 0
    assert "4 files" in capsys.readouterr().out
    manifest.verify(folder)
    assert manifest._main([str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "facts": {}, "files": {"a": {}}}'])
def test_a_damaged_marker_is_named(checkpoint, content):
    (checkpoint / manifest.MARKER).write_text(content)
    with pytest.raises(ValueError, match=r"complete\.json is damaged"):
        manifest.verify(checkpoint)


def test_a_marker_of_another_format_is_refused(checkpoint):
    path = checkpoint / manifest.MARKER
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        manifest.verify(checkpoint)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_file_is_dealt_once_and_evenly_by_size(ranks):
    sizes = {f"{k}.pt": 10 + k % 7 for k in range(40)}
    dealt = manifest.share_out(sizes, ranks)
    assert sorted(name for share in dealt for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in dealt]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert manifest.share_out({"a": 1, "b": 1, "c": 1, "d": 1, "large": 4}, 2) == [["large"], ["a", "b", "c", "d"]]


def test_the_marker_is_written_after_the_files_and_in_one_piece(tmp_path, monkeypatch):
    """What reaches the disk, in which order: files, directories, the unfinished marker, its rename, the directory."""
    folder = write(tmp_path / "checkpoint-1")
    events = []

    def fsync(handle):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))

    def replace(source, target):
        assert json.loads(Path(source).read_text())["facts"] == {"step": 1}
        events.append(("rename", os.path.basename(target)))
        os.rename(source, target)

    monkeypatch.setattr(manifest.os, "fsync", fsync)
    monkeypatch.setattr(manifest.os, "replace", replace)
    manifest.mark(folder, {"step": 1})
    files = {("sync", os.path.basename(name)) for name in FILES}
    directories = {("sync", tmp_path.name), ("sync", "checkpoint-1"), ("sync", "global_step3")}
    assert set(events[:4]) == files
    assert set(events[4:7]) == directories
    assert events[7:] == [("sync", "complete.json.tmp"), ("rename", "complete.json"), ("sync", "checkpoint-1")]


def test_a_crash_while_the_marker_is_written_leaves_it_incomplete(tmp_path, monkeypatch):
    folder = write(tmp_path / "checkpoint-1")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        manifest.mark(folder, {})
    monkeypatch.undo()
    assert not manifest.is_complete(folder)
    manifest.mark(folder, {})
    assert set(manifest.verify(folder).files) == set(FILES)  # what was left of the marker is no file of it


def test_the_newest_is_by_step_and_complete(tmp_path):
    assert manifest.newest_complete(tmp_path) is None
    assert manifest.newest_complete(tmp_path / "nothing") is None
    complete(tmp_path, 9)
    newest = complete(tmp_path, 10)  # by number and not by name
    complete(tmp_path, 2)
    write(tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-99").write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert manifest.newest_complete(tmp_path) == newest
    write(tmp_path / "checkpoint-11")
    write(tmp_path / "checkpoint-12")
    with pytest.warns(UserWarning, match="checkpoint-12, checkpoint-11 passed over"):
        assert manifest.newest_complete(tmp_path) == newest


def test_what_lies_beyond_a_step(tmp_path):
    for step in (2, 5, 7):
        complete(tmp_path, step)
    write(tmp_path / "checkpoint-9")
    assert [f.name for f in manifest.complete_beyond(tmp_path, 2)] == ["checkpoint-5", "checkpoint-7"]
    assert manifest.complete_beyond(tmp_path, 7) == []


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5]), (1, [4, 5]), (2, [3, 4, 5]), (9, [2, 3, 4, 5])]
)
def test_retention_keeps_the_newest_and_deletes_outdated_ruins(tmp_path, keep, left):
    write(tmp_path / "checkpoint-1")
    for step in (2, 3, 4):
        complete(tmp_path, step)
    write(tmp_path / "checkpoint-5")  # newer than every complete one: it may be being written
    deleted = manifest.retain(tmp_path, keep)
    assert steps(tmp_path) == left
    assert sorted(f.name for f in deleted) == [f"checkpoint-{k}" for k in range(1, 6) if k not in left]


def test_retention_never_deletes_what_is_protected(tmp_path):
    for step in (1, 2, 3, 4):
        complete(tmp_path, step)
    manifest.retain(tmp_path, 2, [tmp_path / "checkpoint-1"])
    assert steps(tmp_path) == [1, 4]  # the best one counts among the two
    manifest.retain(tmp_path, 1, [str(tmp_path / "x" / ".." / "checkpoint-1")])
    assert steps(tmp_path) == [1, 4]


def test_retention_without_a_complete_one_deletes_nothing(tmp_path):
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}")
    assert manifest.retain(tmp_path, 1) == []
    assert steps(tmp_path) == [1, 2]


def test_a_crash_in_the_middle_of_a_deletion_leaves_no_marked_ruin(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        complete(tmp_path, step)
    whole = shutil.rmtree

    def crash(folder):
        assert not manifest.is_complete(folder), "the marker goes first"
        (folder / "model.bin").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest.shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        manifest.retain(tmp_path, 1)
    assert not manifest.is_complete(tmp_path / "checkpoint-1")
    assert manifest.newest_complete(tmp_path).name == "checkpoint-3"
    manifest.verify(tmp_path / "checkpoint-3")
    monkeypatch.setattr(manifest.shutil, "rmtree", whole)
    manifest.retain(tmp_path, 1)
    assert steps(tmp_path) == [3]


def test_a_folder_that_cannot_be_deleted_is_warned_of(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        complete(tmp_path, step)
    whole = shutil.rmtree

    def stubborn(folder):
        if folder.name == "checkpoint-1":
            raise PermissionError("not yours")
        whole(folder)

    monkeypatch.setattr(manifest.shutil, "rmtree", stubborn)
    with pytest.warns(UserWarning, match="checkpoint-1 could not be deleted: not yours"):
        assert [f.name for f in manifest.retain(tmp_path, 1)] == ["checkpoint-2"]
    assert steps(tmp_path) == [1, 3]


def test_a_linked_checkpoint_is_not_deleted(tmp_path):
    complete(tmp_path / "elsewhere", 1)
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    complete(tmp_path, 2)
    manifest.retain(tmp_path, 1)
    manifest.verify(tmp_path / "elsewhere" / "checkpoint-1")
