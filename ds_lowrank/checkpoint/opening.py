"""Opening a checkpoint of any layout: which files its folder has, and that none of them runs or leads elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_lowrank.checkpoint.folders import check_links, read_object
from ds_lowrank.checkpoint.rank_files import common_layout
from ds_lowrank.checkpoint.safe_load import HoldsObjects, load_file
from ds_lowrank.checkpoint.sources import Source, WholeSource, ZeroSource
from ds_lowrank.checkpoint.torch_files import model_tensors
from ds_lowrank.layouts.dcp_files import DistributedFiles
from ds_lowrank.layouts.zero_files import model_files, optimizer_files, outside_weights, packed_state, tag_folder
from ds_lowrank.param_groups import clean_name
from ds_lowrank.state_dict.pieces import DESCRIPTION_KEY, STATE_KEY

logger = logging.getLogger(__name__)

# A folder with one of these is a run's checkpoint, and not weights alone.
_OF_A_RUN = ("complete.json", "trainer_state.json", "latest", "optimizer_0", "optimizer.bin", "optimizer.pt")


def open_checkpoint(folder: str | Path) -> Source:
    """A checkpoint of DeepSpeed, FSDP2, DDP or one process, by the Trainer, accelerate or ``engine.save_checkpoint``.

    Args:
        folder: of the checkpoint: ``checkpoint-1000`` of a Trainer, or what ``save_checkpoint`` was given (or the
            folder of a tag in it).

    Raises:
        FileNotFoundError: there is no such folder, or no weights in it.
        ValueError: a file is damaged, is missing, or holds what could run; a link leads out of the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {folder}")
    if any((folder / name).exists() for name in _OF_A_RUN):  # weights alone may be links, as in a hub's cache
        check_links(folder)
    tag = tag_folder(folder)
    if tag is not None:
        files = [(path, *packed_state(load_file(path), path)) for path in optimizer_files(tag)]
        ours = [isinstance(packed, Mapping) and DESCRIPTION_KEY in packed for _, _, packed in files]
        if any(ours):
            if not all(ours):
                raise ValueError(
                    f"{files[ours.index(False)][0]} lacks {DESCRIPTION_KEY}, which other ranks' files have"
                )
            return ZeroSource(tag, files, model_tensors(folder, tag), partial(_outside_weights, tag))
        return WholeSource(folder, "DeepSpeed with another optimizer", model_tensors(folder, tag), {})
    ranks = _ranks_that_wrote(folder)
    if (folder / "optimizer_0" / ".metadata").is_file():
        sharded = DistributedFiles(folder / "optimizer_0")
        return WholeSource(
            folder,
            "FSDP2",
            model_tensors(folder),
            _by_parameter(sharded.tensors),
            ranks,
            _projected(sharded),
            folder / "optimizer_0",
        )
    for name, layout in (("optimizer.bin", "FSDP2 or accelerate"), ("optimizer.pt", "DDP or one process")):
        if (folder / name).is_file():
            states, projected = _whole_states(folder / name)
            return WholeSource(folder, layout, model_tensors(folder), states, ranks, projected, folder / name)
    return WholeSource(folder, "weights only", model_tensors(folder), {}, ranks)


def _outside_weights(tag: Path, sizes: Sequence[Mapping[str, int]]) -> list[dict[str, Tensor]]:
    """Of every rank, the weights that are in no flat master: name -> 1-D; ``sizes`` says of every rank how many."""
    known: dict[Path, Any] = {}
    found = []
    for path, own in zip(model_files(tag, len(sizes)), sizes):
        if own and path not in known:
            if not path.is_file():
                raise ValueError(f"{path} is missing, which has weights that no other file has")
            known = {path: load_file(path)}
        found.append(outside_weights(known.get(path), path, own) if own else {})
    return found


def check_checkpoint(folder: str | Path) -> None:
    """Refuse what could run, or lead elsewhere, when a framework loads a checkpoint by its own means.

    DeepSpeed unpickles its files, and torch ``.metadata`` and the objects in ``*.distcp``, without restriction. What
    they read is read here before, with lists of what it may hold. States of a method that is not registered here are
    refused too: a framework would say of them that keys are missing.

    Args:
        folder: see :func:`open_checkpoint`.

    Raises:
        ValueError: a file is damaged, or holds what it has no need of; a link leads out of the folder; a low-rank state
            keeps what no registered rule or selection does.
    """
    folder = Path(folder)
    check_links(folder)
    tag = tag_folder(folder)
    for path in sorted(tag.glob("*.pt")) if tag is not None else ():
        content = load_file(path)
        if path.name.endswith("_optim_states.pt"):
            try:
                _, packed = packed_state(content, path)
            except ValueError:
                continue  # another optimizer's
            _check_methods(path, packed.get("state") if isinstance(packed, Mapping) else None, STATE_KEY)
    for path in sorted((*folder.glob("*.metadata"), *folder.glob("*/*.metadata"))):
        files = DistributedFiles(path.parent, path.name)
        files.check_objects()
        _check_methods(path.parent, _by_parameter(files.tensors))
    for path in [folder / name for name in ("optimizer.bin", "optimizer.pt") if (folder / name).is_file()]:
        try:
            content = load_file(path)
        except HoldsObjects:
            continue  # galore-torch's, which torch refuses by itself
        _check_methods(path, content.get("state") if isinstance(content, Mapping) else None)


def _check_methods(teller: Path, states: Any, key: str | None = None) -> None:
    """Refuse states of methods that are not known here.

    Args:
        teller: file or folder of the states.
        states: name -> state, or a mapping that has that under ``key``; anything else is passed over.
    """
    entries = states.get(key) if key is not None and isinstance(states, Mapping) else states
    for name, entry in entries.items() if isinstance(entries, Mapping) else ():
        if isinstance(entry, Mapping) and "indices" in entry and "refreshes" in entry:
            common_layout([(f"{teller}: the state of {name}", entry)])


def has_low_rank(folder: str | Path) -> bool:
    """Whether a checkpoint holds states of this optimizer; see :func:`open_checkpoint`."""
    return bool(open_checkpoint(folder).matrices)


def _whole_states(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Parameter -> key -> tensor, and the parameters of projected groups."""
    try:
        content = load_file(path)
    except HoldsObjects as error:
        if error.acts:
            raise
        # galore-torch keeps objects in its state.
        logger.warning("%s; its weights are used, its optimizer is not", error)
        return {}, []
    state, groups = (content.get(key) if isinstance(content, Mapping) else None for key in ("state", "param_groups"))
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise ValueError(f"{path} is damaged: it has no state and param_groups, as an optimizer's file does")
    well_formed = (
        all(isinstance(entry, Mapping) for entry in state.values())
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
        and all(isinstance(key, (int, str)) for g in groups for key in g["params"])
        and all(isinstance(name, str) for g in groups for name in _names(g))
    )
    if not well_formed:
        raise ValueError(f"{path} is damaged: state and param_groups in it are not those of an optimizer")
    states: dict[str, dict[str, Any]] = {}
    projected: list[str] = []
    for group in groups:
        names = _names(group)
        for key, name in zip(group["params"], names if len(names) == len(group["params"]) else group["params"]):
            known = clean_name(str(name))
            if group.get("rank") is not None:
                projected.append(known)
            if key in state:
                states[known] = {k: v for k, v in state[key].items() if isinstance(v, Tensor)}
    return states, projected


def _names(group: Mapping[str, Any]) -> list[Any]:
    names = group.get("param_names", [])
    return list(names) if isinstance(names, (list, tuple)) else [None]


def _projected(files: DistributedFiles) -> list[str]:
    """Parameters of groups with a rank, of which a distributed checkpoint keeps every option by itself."""
    found: list[str] = []
    for name in files.objects:
        group, _, key = name.rpartition(".")
        if key == "rank" and ".param_groups." in f".{group}" and f"{group}.params" in files.objects:
            names = files.objects[f"{group}.params"].load()
            rank = files.objects[name].load()
            found += [clean_name(n) for n in names if isinstance(n, str)] if rank and isinstance(names, list) else []
    return found


def _by_parameter(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``optimizer.state.<parameter>.<key>`` -> parameter -> key."""
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition("state.")
        if start in ("", "optimizer.") and rest:
            parameter, _, key = rest.rpartition(".")
            states.setdefault(clean_name(parameter), {})[key] = tensor
    return states


def _ranks_that_wrote(folder: Path) -> int | None:
    """The Trainer leaves a file of random states for every rank."""
    found = len(list(folder.glob("rng_state_*.pth"))) or int((folder / "rng_state.pth").is_file())
    return found or None


def trainer_step(folder: str | Path) -> int | None:
    """Step of a Trainer's checkpoint; ``None`` where there is no ``trainer_state.json``.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(folder) / "trainer_state.json"
    return read_object(path, global_step=int)["global_step"] if path.is_file() else None
