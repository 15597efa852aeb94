"""Folders whose files are known to be as they were written: a seal lists the SHA-256 of each, and of itself.

What has been tampered with or has lost a part is found before it is read; so is a file of a kind that runs code.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prime_v2.output.atomic import sync_folder, write_json

ITSELF = "."  # in a seal, the digest of the lines above it
MOST_JSON_BYTES = 2**28
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Damaged(ValueError):
    """A clause that begins with the name of a file: what is wrong with it."""


def write_seal(folder: Path, name: str, parts: Iterable[str] = (".",)) -> None:
    """Sync the files of a folder, or of these parts of it, then write their digests to `name`, then sync folders."""
    digests = {}
    found = {path for part in parts for path in (folder / part, *(folder / part).rglob("*")) if path.is_file()}
    for path in sorted(found - {folder / name}):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[path.relative_to(folder).as_posix()] = sha256_of(path)
    write_json(folder / name, {**digests, ITSELF: _digest_of(digests)})
    for each in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_folder(each)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def check_seal(folder: Path, name: str, *, only_listed: bool) -> None:
    """`Damaged` unless every listed file is as it was written; with `only_listed`, unless there is no other one.

    Links are damage: what they point to can change behind the seal.
    """
    folder_status = os.lstat(folder)
    if not stat.S_ISDIR(folder_status.st_mode):
        raise Damaged(f"it is {'a link' if stat.S_ISLNK(folder_status.st_mode) else 'no folder'}")
    digests = read_json(folder / name)
    if not isinstance(digests, dict) or digests.pop(ITSELF, None) != _digest_of(digests):
        raise Damaged(f"{name} is damaged")
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    found.pop(name, None)
    for each, expected in digests.items():
        if each not in found:
            raise Damaged(f"{_shown(each)} is missing")
        if not stat.S_ISREG(os.lstat(found[each]).st_mode):
            raise Damaged(f"{each} is no plain file")
        try:
            digest = sha256_of(found[each])
        except OSError as error:
            raise Damaged(f"{each}: {error.strerror}") from None
        if digest != expected:
            raise Damaged(f"{each} is not as it was written")
    if only_listed:
        for each, path in found.items():
            mode = os.lstat(path).st_mode
            if each not in digests and not (stat.S_ISDIR(mode) and any(key.startswith(f"{each}/") for key in digests)):
                raise Damaged(f"{_shown(each)} is not part of it")


def _shown(name: str) -> str:
    """A file's name as a sentence has it: line ends and the like are escaped."""
    return name if name.isprintable() else repr(name)


def read_json(path: Path) -> Any:
    """The content of a JSON file; `Damaged` for a file that is missing, is no plain one, or holds something else."""
    try:
        if path.is_symlink() or not path.is_file():
            raise Damaged(f"{path.name} is no plain file" if os.path.lexists(path) else f"{path.name} is missing")
        if path.stat().st_size > MOST_JSON_BYTES:
            raise Damaged(f"{path.name} is damaged")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from None
    except Damaged:
        raise
    except (ValueError, RecursionError):  # also of a number with more digits than Python reads
        raise Damaged(f"{path.name} is damaged") from None


def check_no_pickles(folder: Path) -> None:
    """`Damaged` for a file that torch.load or pickle would read, by its name or by its first bytes.

    A .safetensors file is read as nothing else, and begins with a length whose bytes may be those of a pickle.
    """
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        with open(path, "rb") as file:
            first = b"" if path.suffix == ".safetensors" else file.read(4)
        if path.suffix in PICKLES or first == b"PK\3\4" or first[:1] == b"\x80":
            raise Damaged(f"{path.relative_to(folder).as_posix()} is a pickle")


def disk_trouble(error: BaseException) -> str | None:
    """What a writer says of a full or failing disk, each in an exception of its own; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in FULL else None
    # safetensors has an error of its own; tokenizers raises Exception itself: "No space left on device (os error 28)".
    if type(error).__name__ == "SafetensorError" or (type(error) is Exception and "(os error" in str(error)):
        return str(error)
    return None


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Errors of a disk, of whatever writer, as a ValueError with a sentence about `what`."""
    try:
        yield
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        raise ValueError(f"{what} could not be written ({trouble}); make room and start the same command again") from (
            error
        )
