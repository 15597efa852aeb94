"""PEP 517 and 660 build backend: setuptools, with one file more in the wheels, `prime_v2_lm_eval.pth`.

lm-eval up to 0.4.13 knows only its own models, so `lm_eval --model prime_v2` needs something of ours to run in its
process. Python runs the line of a .pth file in site-packages when it starts; this one does nothing unless the command
line names lm-eval. docs/lm_eval.md says what it costs and how to switch it off. setuptools puts no such file into an
editable wheel, so it is added to the finished wheel, as the wheel format describes.
"""

import base64
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # the hooks that need no change; the front end looks for them here
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

HOOK_FILE = "prime_v2_lm_eval.pth"
# `os` and `sys` are loaded by then. An error is swallowed: a broken install of ours must not trouble other programs.
HOOK = (
    "import os, sys; "
    'exec("try:\\n from prime_v2.eval.startup import install\\n install()\\nexcept Exception: pass") '
    'if "lm_eval" in "\\n".join(sys.orig_argv).replace("-", "_") '
    'and os.environ.get("PRIME_V2_LM_EVAL_HOOK") != "0" else None\n'
)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build a wheel into `wheel_directory`; returns its file name."""
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    add_file(Path(wheel_directory) / name, HOOK_FILE, HOOK.encode())
    return name


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build an editable wheel into `wheel_directory`; returns its file name."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    add_file(Path(wheel_directory) / name, HOOK_FILE, HOOK.encode())
    return name


def add_file(wheel: Path, name: str, content: bytes) -> None:
    """Add a file to a wheel, at the top of what it puts into site-packages, and enter it in the wheel's RECORD.

    Raises ValueError where the wheel holds a file of that name, or not one RECORD.
    """
    with zipfile.ZipFile(wheel) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    records = [info for info, _ in entries if info.filename.endswith(".dist-info/RECORD")]
    if len(records) != 1 or any(info.filename == name for info, _ in entries):
        raise ValueError(f"{wheel.name} must hold one RECORD and no {name}")
    (record,) = records
    added = zipfile.ZipInfo(name, record.date_time)
    added.compress_type, added.external_attr = record.compress_type, record.external_attr
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    row = f"{name},sha256={digest},{len(content)}\n".encode()

    handle, temporary = tempfile.mkstemp(dir=wheel.parent, prefix=f".{wheel.name}.")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr(added, content)
            for info, data in entries:
                archive.writestr(info, row + data if info is record else data)
        os.chmod(temporary, wheel.stat().st_mode)
        os.replace(temporary, wheel)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
