"""Checkpoints that outlive a kill at any moment, and hold no pickle.

A checkpoint is written aside, synced to the disk, sealed by `checksums.json` with the SHA-256 of each of its files,
and renamed into place. Before a run continues, the newest checkpoint is read against its seal; a damaged one is set
aside, and the one before it is taken.

States (optimizer, scheduler, random numbers) are NAME.json, their tensors NAME.safetensors, bit for bit.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from prime_v2.eval.records import write_json

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
    sums = {}
    for path in sorted(each for each in checkpoint.rglob("*") if each.is_file() and each.name != CHECKSUMS):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            sums[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    write_json(checkpoint / CHECKSUMS, sums)
    for folder in [*(each for each in checkpoint.rglob("*") if each.is_dir()), checkpoint]:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, a clause that begins with the name of the file; None when it is whole."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError):
        sums = None
    if not isinstance(sums, dict) or TRAINER_STATE_NAME not in sums:
        return f"{CHECKSUMS} is damaged"
    for name, expected in sums.items():
        try:
            with open(checkpoint / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        if found != expected:
            return f"{name} is not as it was written"
    return None


def publish(aside: Path, final: Path, keep: int | None) -> None:
    """Seal the finished checkpoints and move them into place; only then drop the oldest beyond `keep`."""
    for folder in checkpoints_in(aside):
        seal(folder)
        os.replace(folder, final / folder.name)
    _sync_folder(final)
    for folder in checkpoints_in(final)[: -keep if keep else 0]:
        os.replace(folder, aside / folder.name)  # at once: a kill leaves no half of a checkpoint behind
    shutil.rmtree(aside)


def set_damaged_aside(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; newer, damaged ones are renamed, with a message that names the file.

    Without any checkpoint None. ValueError when there are some, but none is whole: then all is left as it is.
    """
    shutil.rmtree(folder / ASIDE, ignore_errors=True)  # what a kill has left
    found: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        problem = damage(checkpoint)
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
        shutil.rmtree(renamed, ignore_errors=True)
        os.replace(each, renamed)
        print(f"{each} is damaged ({problem}); it is now {renamed.name}", file=sys.stderr, flush=True)
    return checkpoint


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
    """What `save_state` wrote, tensors on the CPU."""
    path = folder / f"{name}.safetensors"
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return _unpack(content, load_file(path) if path.exists() else {})


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
        f"{place} is of type {type(value).__name__}, but checkpoints hold tensors, numbers and text alone; "
        f"use e.g. --optim adamw_torch"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]].clone()  # memory of its own: the file may be deleted
    if "$tuple" in value:
        return tuple(_unpack(each, tensors) for each in value["$tuple"])
    items = value["$dict"] if "$dict" in value else value.items()
    return {key: _unpack(each, tensors) for key, each in items}


def random_state() -> dict[str, Any]:
    """The generators of Python, NumPy and PyTorch, of this process and its device."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
