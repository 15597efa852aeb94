"""Files and folders that are written whole or not at all: beside their place, then moved there.

A crash or a full disk leaves no torn file, and an earlier file stays until the new one is complete.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MODE = 0o644  # tempfile makes files that only their owner reads


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Yields a binary file that is at `path` once the block ends without an error; folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, MODE)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yields an empty folder that is at `path`, new or an empty one before, once the block ends without an error."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as aside:
        folder = Path(aside) / path.name
        folder.mkdir()
        yield folder
        os.replace(folder, path)


def write_text(path: str | Path, text: str) -> Path:
    """Write text as UTF-8, line ends as they are."""
    with written_whole(path) as file:
        file.write(text.encode())
    return Path(path)


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON as `json_text` has it; ValueError for a number that is not finite."""
    return write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """JSON with a line for each key of a dictionary and for each row of a table, which is a list of containers.

    Rows and lists of numbers or strings are one line however long, so that a record is short and a row is found.
    """
    return _layout(content, "\n") + "\n"


def _layout(value: Any, line_end: str) -> str:
    """line_end: a line end and the indentation of the line that the value begins on."""
    deeper = line_end + " "
    if isinstance(value, dict) and value:
        # Keys as json writes them, which makes strings of numbers.
        keys = [
            json.dumps({key: 0}, ensure_ascii=False, allow_nan=False).removeprefix("{").removesuffix("0}")
            for key in value
        ]
        lines = [key + _layout(each, deeper) for key, each in zip(keys, value.values(), strict=True)]
        return f"{{{deeper}{f',{deeper}'.join(lines)}{line_end}}}"
    if isinstance(value, list | tuple) and any(isinstance(each, dict | list | tuple) for each in value):
        return f"[{deeper}{f',{deeper}'.join(map(_one_line, value))}{line_end}]"
    return _one_line(value)


def _one_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
