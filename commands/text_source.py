"""The text that `prime-v2 ppl`, `entropy`, `overlap`, `analyze` and `quality` read, as the command line names it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_v2.output.progress import progress_bar

SIDES = ("train", "dev", "test")
RUN_FILE = "run.json"  # of train.py


@dataclass
class TextSource:
    """A source of text, with the split, field and number of documents that are asked for."""

    source: str
    split: str | None
    text_field: str
    max_documents: int | None = None

    def documents(
        self, hub_split: str, run_folder: str | None = None, shares: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Its documents. hub_split: of a hub data set, where no split is asked for.

        run_folder: a run of train.py, whose seed and shares decide which side a document of another source is on;
        shares: these themselves, as `split_of` takes them.
        """
        from prime_v2.data.documents import read_documents
        from prime_v2.data.splits import deduplicate, split_of

        is_hub = self.source != "docs" and not Path(self.source).expanduser().exists()
        documents = read_documents(self.source, text_field=self.text_field, split=self.split or hub_split)
        if self.split is not None and not is_hub:
            if self.split not in SIDES:
                raise ValueError(f"--split {self.split} of {self.source} must be one of {', '.join(SIDES)}")
            shares = shares_of(run_folder) if shares is None else shares
            documents = (text for text in deduplicate(documents) if split_of(text, **shares) == self.split)
        return itertools.islice(documents, self.max_documents)

    def read(self, hub_split: str, run_folder: str | None = None) -> list[str]:
        """All of `documents`, with a progress bar."""
        with progress_bar("reading documents") as show:
            return list(counted(self.documents(hub_split, run_folder), show))

    def about(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"source": self.source, "split": self.split, "max_documents": self.max_documents}


def counted(documents: Iterator[str], show: Any) -> Iterator[str]:
    """The documents, their number shown as they pass."""
    for number, document in enumerate(documents, 1):
        show(number, None)
        yield document


def run_options(run_folder: str) -> dict[str, Any]:
    """The options that train.py wrote beside a model; none where it did not."""
    from prime_v2.validation_config_prime_v2 import read_mapping

    path = Path(run_folder) / RUN_FILE
    return read_mapping(path, "put a copy of it back, or move it away") if path.is_file() else {}


def shares_of(run_folder: str | None) -> dict[str, Any]:
    """Arguments of `split_of` from the run.json of a run; without a run, none: its defaults."""
    if run_folder is None:
        return {}
    options = run_options(run_folder)
    if not options:
        path = Path(run_folder) / RUN_FILE
        raise ValueError(
            f"--split needs {path}, which says what {run_folder} was trained on; give the folder that train.py wrote, "
            f"or leave --split out"
        )
    shares: dict[str, Any] = {name: options[name] for name in ("seed", "dev_share", "test_share") if name in options}
    if not all(isinstance(each, int | float) for each in shares.values()) or isinstance(shares.get("seed"), float):
        raise ValueError(f"{Path(run_folder) / RUN_FILE} has {shares}, which are no seed and shares; put a copy back")
    return shares
