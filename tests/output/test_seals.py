"""Seals of folders: nothing changed, cut, added, removed or linked passes; what the disk says becomes a sentence."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prime_v2.output.seals import (
    Damaged,
    check_no_pickles,
    check_seal,
    disk_trouble,
    read_json,
    write_seal,
    writing,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "sealed"
    (made / "sub").mkdir(parents=True)
    (made / "a.json").write_text("{}")
    (made / "b").write_bytes(bytes(range(200)))
    (made / "sub" / "c").write_text("c")
    write_seal(made, "seal.json")
    check_seal(made, "seal.json", only_listed=True)
    return made


def cut(folder: Path) -> None:
    """One line of the listing left, with a seal of its own as whoever cuts by hand would not make it."""
    digests = json.loads((folder / "seal.json").read_text())
    (folder / "seal.json").write_text(json.dumps({"a.json": digests["a.json"]}))


def linked(path: Path) -> None:
    copy = path.with_name("elsewhere")
    os.replace(path, copy)
    shutil.move(copy, path.parents[1] / copy.name)
    path.symlink_to(path.parents[1] / copy.name)


def listed(name: str):
    def change(folder: Path) -> None:
        digests = json.loads((folder / "seal.json").read_text())
        (folder / "seal.json").write_text(json.dumps({name: digests["b"], **digests}))

    return change


DAMAGES = {
    "a cut listing": (cut, "seal.json is damaged"),
    "a listing with a name more": (listed("x\0y"), "seal.json is damaged"),
    "a file that is not listed": (lambda f: (f / "sub" / "new").touch(), "sub/new is not part of it"),
    "a folder that is not listed": (lambda f: (f / "more").mkdir(), "more is not part of it"),
    "a name with a line end": (lambda f: (f / "a\nb").touch(), r"'a\\nb' is not part of it"),
    "a listed file that is gone": (lambda f: (f / "b").unlink(), "b is missing"),
    "a folder in place of a file": (lambda f: [(f / "b").unlink(), (f / "b").mkdir()], "b is no plain file"),
    "a link in place of a file": (lambda f: linked(f / "b"), "b is no plain file"),
    "a folder in place of the seal": (
        lambda f: [(f / "seal.json").unlink(), (f / "seal.json").mkdir()],
        "seal.json is no plain file",
    ),
    "a list in place of the listing": (lambda f: (f / "seal.json").write_text("[]"), "seal.json is damaged"),
    "a deep list": (lambda f: (f / "seal.json").write_text("[" * 100_000), "seal.json is damaged"),
    "another type of digest": (lambda f: (f / "seal.json").write_text('{"b": 1}'), "seal.json is damaged"),
    "a flipped bit": (lambda f: (f / "b").write_bytes(bytes([1, *range(1, 200)])), "b is not as it was written"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(name, folder):
    change, message = DAMAGES[name]
    change(folder)
    with pytest.raises(Damaged, match=f"^{message}$"):
        check_seal(folder, "seal.json", only_listed=True)


def test_a_file_or_a_link_in_place_of_the_folder_is_damage(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for name, message in (("link", "it is a link"), ("file", "it is no folder")):
        with pytest.raises(Damaged, match=message):
            check_seal(tmp_path / name, "seal.json", only_listed=True)


def test_a_seal_of_some_parts_says_nothing_of_the_others(folder):
    write_seal(folder, "part", ("b", "sub"))
    (folder / "a.json").write_text("[]")
    (folder / "new").touch()
    check_seal(folder, "part", only_listed=False)
    (folder / "sub" / "c").write_text("d")
    with pytest.raises(Damaged, match="sub/c is not as it was written"):
        check_seal(folder, "part", only_listed=False)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_damage_and_no_traceback(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Damaged, match="^x.json is damaged$"):
        read_json(tmp_path / "x.json")


def test_a_pickle_is_found_by_its_name_and_by_its_first_bytes(folder):
    check_no_pickles(folder)
    for name, legacy in (("weights.bin", False), ("tensors", False), ("old", True)):
        torch.save(torch.ones(2), folder / name, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(Damaged, match=f"^{name} is a pickle$"):
            check_no_pickles(folder)
        (folder / name).unlink()
    (folder / "empty.pt").touch()
    with pytest.raises(Damaged, match="empty.pt is a pickle"):
        check_no_pickles(folder)


def test_weights_whose_header_begins_like_a_pickle_are_none(folder):
    """A safetensors file begins with the length of its header, of which one in 32 has the first byte of pickles."""
    for padding in range(256):
        save_file({"x": torch.ones(2)}, folder / "x.safetensors", metadata={"a": "b" * padding})
        if (folder / "x.safetensors").read_bytes()[0] == 0x80:
            break
    assert (folder / "x.safetensors").read_bytes()[0] == 0x80
    check_no_pickles(folder)


def test_what_writers_say_of_a_full_disk_is_a_sentence_and_other_errors_are_left_alone():
    full = [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")]
    for error in full:
        expected = r"the text could not be written \(No space left on device.*make room"
        with pytest.raises(ValueError, match=expected), writing("the text"):
            raise error
    for error in (Exception("no rule"), FileNotFoundError(errno.ENOENT, "No such file"), KeyError("x")):
        assert disk_trouble(error) is None
        with pytest.raises(type(error)) as raised, writing("the text"):
            raise error
        assert raised.value is error
