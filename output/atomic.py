"""Files that are written whole or not at all: beside their place, synced, then moved there.

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


def write_text(path: str | Path, text: str) -> Path:
    """Write text as UTF-8, line ends as they are."""
    with written_whole(path) as file:
        file.write(text.encode())
    return Path(path)


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON with an indent of 1 and a line end; ValueError for a number that is not finite."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["sync_folder", "write_json", "write_text", "written_whole"]
