"""A folder of what the Hub needs of a model, and nothing else."""

import os
import shutil
from pathlib import Path
from typing import Any

from prime_v2.hub_card.card import write_card
from prime_v2.hub_card.files import hub_files
from prime_v2.output.atomic import folder_written_whole
from prime_v2.output.places import check_new_folder


def export_model(model_dir: str | os.PathLike[str], out: str | os.PathLike[str], record: dict[str, Any]) -> Path:
    """Copy `hub_files` into the new folder `out`, with a card that has their hashes; it is there whole or not at all.

    Raises ValueError for an `out` that exists and for what `hub_files` and `write_card` refuse.
    """
    target = Path(out)
    check_new_folder(target)
    names = hub_files(model_dir)
    with folder_written_whole(target) as folder:
        for name in names:
            shutil.copyfile(Path(model_dir) / name, folder / name)
        write_card(folder, record)
    return target
