"""A folder of what the Hub needs of a model, and nothing else."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from prime_v2.hub_card.card import write_card
from prime_v2.hub_card.files import hub_files


def export_model(model_dir: str | os.PathLike[str], out: str | os.PathLike[str], record: dict[str, Any]) -> Path:
    """Copy `hub_files` into the new folder `out`, with a card that has their hashes; it is there whole or not at all.

    Raises ValueError for an `out` that exists and for what `hub_files` and `write_card` refuse.
    """
    target = Path(out)
    if target.exists():
        raise ValueError(f"{target} exists; give the name of a new folder")
    names = hub_files(model_dir)
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target.absolute().parent} does not exist; make it first")
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as aside:
        whole = Path(aside) / target.name
        whole.mkdir()
        for name in names:
            shutil.copyfile(Path(model_dir) / name, whole / name)
        write_card(whole, record)
        os.replace(whole, target)
    return target


__all__ = ["export_model"]
