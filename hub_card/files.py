"""The files that loading a model takes, and their hashes."""

import os
import re
from pathlib import Path
from typing import Any

from prime_v2.output.seals import sha256_of
from prime_v2.validation_config_prime_v2 import read_mapping

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("generation_config.json", "code_table.json", "special_tokens_map.json", "chat_template.jinja", "loss.png")
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)  # how Transformers finds what code needs


def hub_files(model_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the files that loading the model takes, its plot included and its card not, in alphabetical order.

    Weights are safetensors, code is what config.json and tokenizer_config.json name with all that it imports. Raises
    ValueError where one of them is missing.
    """
    folder = Path(model_dir)
    names = {*REQUIRED, *(name for name in OPTIONAL if (folder / name).is_file())}
    if (folder / INDEX).is_file():
        names |= {INDEX, *read_mapping(folder / INDEX).get("weight_map", {}).values()}
    else:
        names.add(WEIGHTS)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            names |= _code(folder, read_mapping(folder / name).get("auto_map", {}))
    outside = sorted(name for name in names if Path(name).name != name)
    if outside:
        raise ValueError(
            f"{folder} asks for {outside[0]!r}, which is no file of the folder itself; save the model again"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}; give the folder of a saved model with its tokenizer")
    return sorted(names)


def file_hashes(folder: str | os.PathLike[str], names: list[str]) -> dict[str, str]:
    """SHA-256 of each file, in hexadecimal."""
    return {name: sha256_of(Path(folder) / name) for name in names}


def _code(folder: Path, auto_map: dict[str, Any]) -> set[str]:
    """Files of the classes of an auto_map, and those that they import from beside them."""
    classes = [each for value in auto_map.values() for each in (value if isinstance(value, list) else [value])]
    waiting = [f"{each.rsplit('.', 1)[0]}.py" for each in classes if each]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found and (folder / name).is_file() and Path(name).name == name:
            waiting += [f"{each}.py" for each in RELATIVE_IMPORT.findall((folder / name).read_text(encoding="utf-8"))]
        found.add(name)
    return found
