"""`prime-v2 card`: the model card of a run, from its record."""

import json
from pathlib import Path
from typing import Annotated

import typer

from prime_v2.commands.options import NEW_FOLDER, Json


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run or of a saved model.")],
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record of the run.", show_default="DIR/results/train.json"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Copy what the Hub needs into the new folder OUT, and write the card there.",
            callback=NEW_FOLDER,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model's card from the record of its run.

    Every number of the card (README.md) is read from the record; the files are named with their hashes.
    """
    from prime_v2.hub_card.card import find_record, write_card
    from prime_v2.hub_card.export import export_model
    from prime_v2.output.records import read_record

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a run or of a saved model")
    content = read_record(record or find_record(folder))
    path = write_card(folder, content) if export is None else export_model(folder, export, content) / "README.md"
    print(json.dumps({"card": str(path)}) if as_json else f"wrote {path}")
