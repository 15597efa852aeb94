"""What somebody may do to the folder of a run between two starts: one random change, told in a few words."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prime_v2.training.checkpoints import CHECKSUMS, checkpoints_in, seal

JSON_CONTENT = ("", "[]", "null", "0", '"x"', "{}", '{"a": [1]}', "[" * 50_000, '{"$tensor": 1}', "\0")


def flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def make_a_folder_of_it(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def make_a_link_of_it(path: Path, draw: random.Random) -> None:
    elsewhere = path.with_name(f"{path.name}.elsewhere")
    os.replace(path, elsewhere)
    path.symlink_to(elsewhere.name)


def write_other_json(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice(JSON_CONTENT), encoding="utf-8")


def remove_a_tensor(path: Path, draw: random.Random) -> None:
    tensors = load_file(path)
    tensors.pop(draw.choice(sorted(tensors)))
    save_file(tensors, path)


def reshape_a_tensor(path: Path, draw: random.Random) -> None:
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensors[name] = torch.zeros(draw.randrange(1, 40), 3, dtype=tensors[name].dtype)
    save_file(tensors, path)


def change_a_type(path: Path, draw: random.Random) -> None:
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensors[name] = tensors[name].to(torch.float16)
    save_file(tensors, path)


def pickle_it(path: Path, draw: random.Random) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


ANY: tuple[Callable, ...] = (flip_a_bit, cut, delete, make_a_folder_of_it, make_a_link_of_it)
# What is done before a checkpoint is sealed again, by the ending of the file. Numbers of the right form in place of
# others are not among it: no check can know them.
SEALED: dict[str, tuple[Callable, ...]] = {
    ".safetensors": (remove_a_tensor, reshape_a_tensor, change_a_type, pickle_it, delete, cut, make_a_folder_of_it),
    ".json": (write_other_json, delete, make_a_folder_of_it),
}
STATES = ("model.safetensors", "optimizer", "scheduler", "random_0", "trainer_state", "stream")


def tamper(folder: Path, draw: random.Random) -> str:
    """Change one thing in the folder of a run, and say which."""
    checkpoints = checkpoints_in(folder)
    if not checkpoints or not draw.randrange(5):
        files = [path for path in [folder / "run.json", *(folder / "data").rglob("*")] if path.is_file()]
        files = [path for path in files if path.stat().st_size]
        if not files:
            return "nothing yet"
        path, way = draw.choice(files), draw.choice((flip_a_bit, cut, delete))
        way(path, draw)
        return f"{way.__name__}: {path.relative_to(folder)}"
    checkpoint = draw.choice(checkpoints)
    if not draw.randrange(8):
        way_of_folder = draw.choice(("a file", "no files", "a name more"))
        if way_of_folder == "a name more":
            (checkpoint / "pytorch_model.bin").write_bytes(b"PK\3\4")
        else:
            shutil.rmtree(checkpoint)
            checkpoint.write_text("x") if way_of_folder == "a file" else checkpoint.mkdir()
        return f"{checkpoint.name} is {way_of_folder}"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    states = [each for each in files if each.name.startswith(STATES) and each.suffix in SEALED]
    if not states:
        return "nothing left"
    if draw.randrange(2):
        path = draw.choice(files)
        way = draw.choice((*ANY, write_other_json) if path.suffix == ".json" else ANY)
        way(path, draw)
        return f"{way.__name__}: {checkpoint.name}/{path.name}"
    path = draw.choice(states)
    way = draw.choice(SEALED[path.suffix])
    way(path, draw)
    if not draw.randrange(4):  # the list without that file, by hand
        listing = json.loads((checkpoint / CHECKSUMS).read_text())
        listing.pop(path.name, None)
        (checkpoint / CHECKSUMS).write_text(json.dumps(listing))
        return f"{way.__name__}, off the list: {checkpoint.name}/{path.name}"
    seal(checkpoint)
    return f"{way.__name__}, sealed again: {checkpoint.name}/{path.name}"
