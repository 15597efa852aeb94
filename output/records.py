"""Records: each reported number with the command, commit, versions, machine and seed that produced it, as JSON.

A record is made to be passed on, so it names files and folders and never says where on the machine they lie.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prime_v2.output.paths import without_places

HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
PACKAGES = ("prime-v2", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
# Earlier name: present name, of a method, a family and runs of the recipes, and of the values of a configuration's
# `objective`.
PRESENT_NAMES = {
    "token_objective": "paper_loss",
    "sub-tokens, token order": "MDM, tree embedding",
    "token order": "MDM, tree embedding",
    "token order, random codes": "MDM, tree embedding, random codes",
    "token order, two levels": "MDM, tree embedding, two levels",
}
# As configuration_prime_v2.py has them for saved models: neither imports the other.
PRESENT_OBJECTIVES = {"token": "joint", "subtoken": "marginal"}


def make_record(
    name: str,
    results: dict[str, Any],
    *,
    seed: int | None,
    code: dict[str, Any],
    command: str | None = None,
) -> dict[str, Any]:
    """A JSON-ready record. `results` holds the numbers; `command` defaults to this process's command line.

    Paths in command and results are cut to their last part (`without_places`).

    seed: None where nothing is drawn.

    code: `code_version()`, taken when the work began: the checkout may be another one when it ends.
    """
    return {
        "name": name,
        "command": without_places(command or command_line()),
        **code,
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": machine(),
        "seed": seed,
        "results": without_places(results),
    }


def code_version() -> dict[str, Any]:
    """The commit of this code, and whether the checkout differs from it; of an installed package its release."""
    file = Path(__file__).resolve()
    if not git("ls-files", file.name, folder=file.parent):  # another repository may hold the environment
        installed = {"site-packages", "dist-packages"} & set(file.parts)
        commit = f"release {_version(PACKAGES[0])}" if installed else "not a git checkout"
        return {"commit": commit, "uncommitted_changes": False}
    changes = git("status", "--porcelain", "--untracked-files=no", folder=file.parent)
    commit = git("rev-parse", "HEAD", folder=file.parent)
    if changes is None or commit is None:
        raise ValueError(f"git does not say which commit {file.parent} is of; see what `git status` says there")
    return {"commit": commit, "uncommitted_changes": bool(changes)}


def code_of(record: dict[str, Any], digits: int | None = None) -> str:
    """The code of a record, or of `code_version()`: its commit, in so many digits, and whether there were changes."""
    changed, commit = (
        " with uncommitted changes" if record.get("uncommitted_changes") else "",
        str(record.get("commit")),
    )
    return f"{commit[:digits] if HASH.fullmatch(commit) else commit}{changed}"


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record; ValueError when the file is missing, no JSON, or no record."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a record that train.py or prime-v2 wrote") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give a record that train.py or prime-v2 wrote") from None
    content = content if isinstance(content, dict) else {}
    missing = [key for key in ("name", "command", "commit", "results") if key not in content]
    if missing:
        raise ValueError(f"{path} is no record: it lacks {', '.join(missing)}")
    if not isinstance(content["results"], dict):
        raise ValueError(f"{path} is no record: its results are no object; give one that train.py or prime-v2 wrote")
    return content | {"results": _with_present_names(content["results"])}


def _with_present_names(value: Any) -> Any:
    """The results of a record with the names that methods and objectives have now."""
    if isinstance(value, list):
        return [_with_present_names(each) for each in value]
    if not isinstance(value, dict):
        return PRESENT_NAMES.get(value, value) if isinstance(value, str) else value
    renamed = {PRESENT_NAMES.get(name, name): _with_present_names(each) for name, each in value.items()}
    if isinstance(renamed.get("objective"), str):
        renamed["objective"] = PRESENT_OBJECTIVES.get(renamed["objective"], renamed["objective"])
    return renamed


def command_line() -> str:
    """This process's command line; a script is named from the root of the checkout, any other program by its name."""
    program, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent.parent
    if program.suffix == ".py":
        name = program.relative_to(root) if program.is_relative_to(root) else Path(program.name)
        return shlex.join(["python", str(name), *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator of this machine."""
    import torch

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def git(*arguments: str, folder: Path) -> str | None:
    """What git prints in a folder; None where there is no git or no repository, or git refuses to answer."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
