"""Checkpoints that outlive a kill at any moment, and hold no pickle.

A checkpoint is written aside, synced to the disk, sealed by `checksums.json` with the SHA-256 of each of its files,
and renamed into place. Before a run continues, the newest checkpoint is read against its seal; a damaged one is set
aside, and the one before it is taken.

States (optimizer, scheduler, random numbers) are NAME.json, their tensors NAME.safetensors, bit for bit.
"""

import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prime_v2.output.atomic import sync_folder
from prime_v2.output.seals import Damaged, check_seal, read_json, write_seal

CHECKSUMS = "checksums.json"
ASIDE = ".incomplete"  # folder of a run in which checkpoints are written, and from which old ones are deleted
DAMAGED = "damaged-"  # put before the name of a checkpoint that is set aside


def step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rsplit("-", 1)[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((each for each in folder.glob("*") if re.fullmatch(r"checkpoint-\d+", each.name)), key=step_of)


def seal(checkpoint: Path) -> None:
    """Sync all files to the disk, then write their checksums, then sync the folders."""
    write_seal(checkpoint, CHECKSUMS)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, a clause that begins with a name; None for nothing."""
    try:
        check_seal(checkpoint, CHECKSUMS, only_listed=True)
    except Damaged as error:
        return str(error)
    return None


def publish(aside: Path, final: Path, keep: int | None) -> None:
    """Seal the finished checkpoints and move them into place; only then drop the oldest beyond `keep`."""
    for folder in checkpoints_in(aside):
        seal(folder)
        os.replace(folder, final / folder.name)
    sync_folder(final)
    for folder in checkpoints_in(final)[: -keep if keep else 0]:
        os.replace(folder, aside / folder.name)  # at once: a kill leaves no half of a checkpoint behind
    shutil.rmtree(aside)


def set_damaged_aside(folder: Path, problem_of: Callable[[Path], str | None] = damage) -> Path | None:
    """The newest whole checkpoint of a run; newer, damaged ones are renamed, with a message that names the file.

    problem_of: what is wrong with a checkpoint, a clause, or None. Without any checkpoint None. ValueError when there
    are some, but none is whole: then all is left as it is.
    """
    shutil.rmtree(folder / ASIDE, ignore_errors=True)  # what a kill has left
    found: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        problem = problem_of(checkpoint)
        if problem is None:
            break
        found.append((checkpoint, problem))
    else:
        if not found:
            return None
        problems = ", ".join(f"{each.name} ({problem})" for each, problem in found)
        raise ValueError(
            f"{folder} holds no whole checkpoint: {problems}; put a copy of one back, or move them away to start from "
            f"the beginning"
        )
    for each, problem in found:
        renamed = each.with_name(DAMAGED + each.name)
        _remove(renamed)
        os.replace(each, renamed)
        print(f"{each} is damaged ({problem}); it is now {renamed.name}", file=sys.stderr, flush=True)
    return checkpoint


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_state(state: Any, folder: Path, name: str) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers and text; ValueError for anything else in them."""
    tensors: dict[str, Tensor] = {}
    content = _pack(state, name, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        storages = Counter(each.untyped_storage().data_ptr() for each in tensors.values())
        shared = {key: each for key, each in tensors.items() if storages[each.untyped_storage().data_ptr()] > 1}
        tensors |= {key: each.clone() for key, each in shared.items()}  # such as the learning rate of all groups
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def load_state(folder: Path, name: str) -> Any:
    """What `save_state` wrote, tensors on the CPU; `Damaged` for anything else."""
    content = read_json(folder / f"{name}.json")
    path = folder / f"{name}.safetensors"
    try:
        tensors = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from None
    used: list[str] = []
    try:
        state = _unpack(content, tensors, used)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise Damaged(f"{name}.json is no state that can be read") from None
    if len(used) != len(set(used)) or set(used) != tensors.keys():
        raise Damaged(f"{name}.json and {path.name} do not hold the same tensors")
    return state


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value.detach().contiguous()
        return {"$tensor": place}
    if isinstance(value, dict):
        items = [(key, _pack(each, f"{place}.{key}", tensors)) for key, each in value.items()]
        return dict(items) if all(isinstance(key, str) for key in value) else {"$dict": items}
    if isinstance(value, list | tuple):
        packed = [_pack(each, f"{place}.{number}", tensors) for number, each in enumerate(value)]
        return packed if isinstance(value, list) else {"$tuple": packed}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{place} is of type {type(value).__name__}, but checkpoints hold only tensors, numbers and text; "
        f"use e.g. --optim adamw_torch"
    )


def _unpack(value: Any, tensors: dict[str, Tensor], used: list[str]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, tensors, used) for each in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        used.append(value["$tensor"])
        return tensors[value["$tensor"]].clone()  # memory of its own: the file may be deleted
    for kind in {"$tuple", "$dict"} & value.keys():
        if len(value) > 1 or not isinstance(value[kind], list):
            raise ValueError(f"{kind} does not stand by itself with a list")
    if "$tuple" in value:
        return tuple(_unpack(each, tensors, used) for each in value["$tuple"])
    items = value["$dict"] if "$dict" in value else value.items()
    return {key: _unpack(each, tensors, used) for key, each in items}


def random_state(processes: int = 1) -> dict[str, Any]:
    """The generators of Python, NumPy and PyTorch, of this process and its device; one of so many processes."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "processes": processes,
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
