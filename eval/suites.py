"""Suites of texts for `prime-v2 ppl --suite`: which set, which split, which field, and how each is read.

A suite is data; nothing here scores. Sets come from the hub, or from local copies (docs/perplexity.md).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_v2.data.documents import FILE_SUFFIXES, NotOnHub, hub_texts, read_documents
from prime_v2.data.splits import corpus_fingerprint
from prime_v2.validation_keywords_prime_v2 import one_of

# Rows of the hub's data sets that only a script reads, as the hub itself has converted them: no script is run.
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class TextSet:
    """A text set of a suite. A document is a row of the hub's data set, as the hub has it: nothing is detokenised.

    name: of the set, and of its local copy. hub, config, split, field: of `datasets.load_dataset`; a split with a
    range, such as "train[-100000:]", makes it download the data set whole, any other is streamed. revision, data_dir:
    where the rows are, if not where `load_dataset` looks.
    published: what the published zero-shot protocol (MDLM, arXiv:2406.07524, and its code) reads here.
    line_end: of a local .txt, each line that is not blank is a document. "" strips it, "\\n" keeps it with its end,
    None: lines are not documents, and a .txt is read as `read_documents` says.
    """

    name: str
    hub: str
    split: str
    field: str
    published: str
    config: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    line_end: str | None = None

    @property
    def hub_source(self) -> str:
        return ":".join(filter(None, [self.hub, self.config or self.data_dir])) + f", {self.split}"


ZERO_SHOT = (
    TextSet(
        "openwebtext",
        "Skylion007/openwebtext",
        "train[-100000:]",
        "text",
        "the last 100,000 documents, there being no test split",
    ),
    TextSet("lambada", "EleutherAI/lambada_openai", "test", "text", "OpenAI's version; quotes and ends normalised"),
    TextSet(
        "wikitext",
        "Salesforce/wikitext",
        "validation",
        "text",
        "WikiText-103, detokenised",
        config="wikitext-103-raw-v1",
        line_end="\n",
    ),
    TextSet(
        "ptb",
        "ptb-text-only/ptb_text_only",
        "validation",
        "sentence",
        "validation, detokenised, <unk> made ?",
        revision=CONVERTED,
        data_dir="penn_treebank",
        line_end="",
    ),
    TextSet("lm1b", "dvruette/lm1b", "test", "text", "test, detokenised", line_end=""),
    TextSet("ag_news", "fancyzhx/ag_news", "test", "text", "test, as it is", line_end=""),
    TextSet(
        "arxiv",
        "ccdv/arxiv-summarization",
        "validation",
        "article",
        "the same papers from scientific_papers, which only a script reads; validation, detokenised",
        config="document",
    ),
)
SUITES = {"zero-shot": ZERO_SHOT}


@dataclass(frozen=True)
class SetOfDocuments:
    """A set that has been read: where from (`source`, without folders), its documents."""

    name: str
    source: str
    documents: list[str]

    def description(self) -> dict[str, Any]:
        """JSON-ready: what was read, with a fingerprint of the documents and their order."""
        return {
            "name": self.name,
            "source": self.source,
            "num_documents": len(self.documents),
            "text_bytes": sum(len(text.encode()) for text in self.documents),
            "fingerprint": corpus_fingerprint(self.documents),
        }


class SetNotThere(ValueError):
    """A set that cannot be reached; the others of its suite can still be scored."""


def read_suite(
    suite: str,
    data: Path | None = None,
    *,
    only: Sequence[str] = (),
    max_documents: int | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> tuple[list[SetOfDocuments], list[dict[str, str]]]:
    """(sets read, sets skipped as {"name", "reason"}) of a suite, in its order; from the hub, or all from `data`.

    data: a folder of local copies (`local_source`). only: names of sets, none for all. max_documents: the first so
    many of each set. progress: called with (documents of the set so far, None).
    Raises ValueError for unknown names, a folder that is not there, a set that is damaged or has no text, and where no
    set at all can be reached.
    """
    sets = SUITES[one_of(f"--suite {suite}", suite, SUITES)]
    chosen = {one_of(f"--only {each}", each, [text_set.name for text_set in sets]) for each in only}
    if data is not None and not data.is_dir():
        raise ValueError(f"--data {data} is not a folder; give the folder that holds the sets")
    found, skipped = [], []
    for text_set in sets:
        if chosen and text_set.name not in chosen:
            continue
        try:
            source, documents = _hub(text_set) if data is None else _local(text_set, data)
        except SetNotThere as error:
            skipped.append({"name": text_set.name, "reason": str(error)})
            continue
        kept = []
        for number, text in enumerate(itertools.islice(filter(str.strip, documents), max_documents), 1):
            kept.append(text)
            progress(number, None)
        if not kept:
            raise ValueError(f"{source} ({text_set.name}) holds no text; give a set that does, or leave it out")
        found.append(SetOfDocuments(text_set.name, source, kept))
    if not found:
        reasons = "; ".join(f"{each['name']}: {each['reason']}" for each in skipped[:2])
        advice = "copies of them in a folder, with --data" if data is None else "at least one of them"
        raise ValueError(f"no set of {suite} can be read ({reasons}{', ...' * (len(skipped) > 2)}); give {advice}")
    return found, skipped


def sets_trained_on(suite: str, run: dict[str, Any]) -> list[str]:
    """Names of the sets whose rows a run of train.py read; run: its run.json.

    Its dev and test documents come from all over what it read, so to hold a set out it must read another split, such
    as "train[:-100000]".
    """
    name, _, config = str(run.get("data")).partition(":")
    return [
        text_set.name
        for text_set in SUITES[suite]
        if (text_set.hub, text_set.config or "") == (name, config)
        and text_set.split.partition("[")[0] == run.get("data_split")
    ]


def local_source(data: Path, name: str) -> Path:
    """data/NAME.txt, .jsonl or .parquet, or the folder data/NAME of such files.

    Raises SetNotThere without one, ValueError for several.
    """
    places = [data / f"{name}{suffix}" for suffix in FILE_SUFFIXES]
    there = [place for place in places if place.is_file()] + [data / name] * (data / name).is_dir()
    if not there:
        raise SetNotThere(f"neither {name}{', '.join(FILE_SUFFIXES)} nor a folder {name} is in {data.name or data}")
    if len(there) > 1:
        raise ValueError(f"{data} holds {' and '.join(place.name for place in there)}; leave one for the set {name}")
    return there[0]


def _local(text_set: TextSet, data: Path) -> tuple[str, Iterator[str]]:
    """(name of the local copy, its documents)."""
    place = local_source(data, text_set.name)
    if place.is_file():
        return place.name, _file_documents(text_set, place)
    files = sorted(file for file in place.iterdir() if file.suffix in FILE_SUFFIXES and not file.name.startswith("."))
    if not files:
        raise ValueError(f"the folder {place} holds no file that ends in {', '.join(FILE_SUFFIXES)}")
    return f"{place.name}/", itertools.chain.from_iterable(_file_documents(text_set, file) for file in files)


def _file_documents(text_set: TextSet, file: Path) -> Iterator[str]:
    if file.suffix != ".txt":
        return read_documents(file, text_field=_field(text_set, file))
    pieces = read_documents(file)
    if text_set.line_end is None:
        return pieces
    # Pieces of a .txt end at line ends. Not splitlines, which also cuts at characters inside a line.
    lines = (line for piece in pieces for line in piece.split("\n") if line.strip())
    return (line + text_set.line_end if text_set.line_end else line.strip() for line in lines)


def _field(text_set: TextSet, file: Path) -> str:
    """The first of the hub's field and "text" that the file's first row has; where it has neither, the hub's."""
    for field in (text_set.field, "text"):
        try:
            next(read_documents(file, text_field=field), None)
        except ValueError:
            continue
        return field
    return text_set.field


def _hub(text_set: TextSet) -> tuple[str, Iterator[str]]:
    """(name on the hub, its documents); SetNotThere where the hub cannot be reached or has no such data set."""
    options = {"split": text_set.split, "revision": text_set.revision, "data_dir": text_set.data_dir}
    try:
        texts = hub_texts(
            text_set.hub, text_set.config, text_set.field, streaming="[" not in text_set.split, **options
        )
    except NotOnHub as error:
        raise SetNotThere(f"{text_set.hub} cannot be loaded from the hub ({error})") from error
    return text_set.hub_source, texts
