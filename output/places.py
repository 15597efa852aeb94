"""Places that results are written to: tried before the work, and written when the result is already printed."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prime_v2.output.atomic import write_json


def check_new_file(path: Path, option: str = "--output", suffixes: Sequence[str] = ()) -> None:
    """ValueError unless a new file can be written at `path`, with one of these suffixes where there are any."""
    if _exists(path, option):
        raise ValueError(f"{option} {path} exists; give another name, or delete it first")
    check_file(path, option)
    if suffixes:
        check_suffix(path, option, suffixes)


def check_file(path: Path, option: str = "--output") -> None:
    """ValueError unless a file can be written at `path`, which may be there."""
    if _exists(path, option) and path.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    _try(path, path.parent, option)


def check_suffix(path: Path, option: str, suffixes: Sequence[str]) -> None:
    """ValueError unless the name says one of the formats that the file can have."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path} must end with {' or '.join(suffixes)}; use e.g. out{suffixes[0]}")


def check_new_folder(path: Path, option: str = "--export") -> None:
    """ValueError unless a new folder can be made at `path`."""
    if _exists(path, option):
        raise ValueError(f"{option} {path} exists; give the name of a new folder")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.absolute().parent} does not exist; make it first")
    _try(path, path.absolute().parent, option)


def check_folder(path: Path, option: str = "--out") -> None:
    """ValueError unless files can be written in the folder `path`, which may be new."""
    if _exists(path, option) and not path.is_dir():
        raise ValueError(f"{option} {path} is not a folder; give a folder, which may be new")
    above = path.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{option} {path}: {above} is not a folder; give another place")
    _try(path, above, option)


def print_and_record(text: str, output: Path | None, record: Callable[[], dict[str, Any]]) -> None:
    """Print the result, then write its record at `output`, if any: neither failing loses the other.

    record: called only where there is an `output`: it asks for the machine, which loads torch.
    """
    try:
        if text:
            print(text, flush=True)
    finally:
        if output is not None:
            write_json(output, record())


def _exists(path: Path, option: str) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long, a folder that must not be read
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}); give another place") from None


def _try(path: Path, folder: Path, option: str) -> None:
    """ValueError unless a file named like that of `write_json` can be made and filled in `folder`."""
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
        try:
            os.write(handle, b"{}")
        finally:
            os.close(handle)
            os.unlink(name)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{option} {path} cannot be written ({reason}); give another place") from None
