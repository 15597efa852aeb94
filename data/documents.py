"""Documents to train and evaluate on: from files, from hub data sets, or from the corpus `docs`.

A document is a non-empty string. The same files give the same documents in the same order on every machine.

Local JSON and text are read here, not by `datasets`, whose readers change documents: its `json` infers types (the text
"2020-01-01" becomes a time, a number may become text, a field that is missing None), and its `text` turns every
carriage return into a line end.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prime_v2.data.docs_corpus import docs_documents, is_encodable

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")

# A .txt file up to the first size is one document; a larger one is cut at blank lines into documents of at least the
# second size, so that a split between documents is possible, and at any line end where none has come by the first.
WHOLE_TEXT_FILE_BYTES = 64 * 1024
MIN_TEXT_PIECE_BYTES = 4 * 1024


def read_documents(
    source: str | Path,
    *,
    text_field: str = "text",
    split: str = "train",
    streaming: bool = False,
    max_documents: int | None = None,
) -> Iterator[str]:
    """The documents of a source, in a fixed order, without those that are empty or only whitespace.

    source: "docs" (see `docs_documents`; a folder of that name is "./docs"); a .txt, .jsonl or .parquet file; a
    folder, whose files of these kinds are read in the order of their paths, sub-folders included, hidden ones not; or
    the name of a data set on the Hugging Face hub, "name" or "name:config", of which `split` is read, downloaded
    whole unless `streaming`.
    text_field: the field or column that holds the text (.jsonl, .parquet, hub).
    max_documents: stop after so many.

    A .txt file is UTF-8 and one document; if larger than 64 KiB it is cut at blank lines into documents of at least
    4 KiB (the last may be shorter), or at a line end where 64 KiB have no blank line. Line ends become "\\n", and a
    byte-order mark is dropped.

    Raises ValueError, one sentence. At once: a missing path, an unknown suffix, max_documents < 1. While iterating: an
    empty or binary file, a line or row without text in `text_field`, a hub name that cannot be loaded. Files of a
    folder are no exception: which of them were read decides what a number is about.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents={max_documents} must be at least 1, or None for all documents")
    if source == "docs":
        documents = docs_documents()
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            documents = itertools.chain.from_iterable(_file_documents(file, text_field) for file in folder_files(path))
        elif path.exists():
            _check_suffix(path)
            documents = _file_documents(path, text_field)
        elif path.suffix.lower() in FILE_SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^/]+)?", str(source)):
            raise ValueError(f"{source} does not exist; give a file, a folder, a hub data set name, or docs")
        else:
            documents = _hub_documents(str(source), text_field, split, streaming)
    return itertools.islice((text for text in documents if text.strip()), max_documents)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise ValueError(f"{path} has the suffix {path.suffix!r}, but only {', '.join(FILE_SUFFIXES)} can be read")


def folder_files(folder: Path) -> list[Path]:
    """The files of a folder that are read, in this order; ValueError when there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FILE_SUFFIXES and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"the folder {folder} holds no file that ends in {', '.join(FILE_SUFFIXES)}")
    return files


def _file_documents(path: Path, text_field: str) -> Iterator[str]:
    reader = {".txt": _text_file, ".jsonl": _jsonl_file, ".parquet": _parquet_file}[path.suffix.lower()]
    is_empty = True
    for text in reader(path, text_field):
        is_empty = is_empty and not text.strip()
        yield text
    if is_empty:
        raise ValueError(f"{path} is empty: it holds no text")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, each with its "\\n"; ValueError with the byte offset where it is not text."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            bad = line.find(b"\0")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                bad = error.start if bad < 0 else min(bad, error.start)
            if bad >= 0:
                raise ValueError(
                    f"{path} is not a UTF-8 text file: byte {offset + bad} is {line[bad]:#04x}; convert it to UTF-8, "
                    f"or move it out of its folder, of which all {', '.join(FILE_SUFFIXES)} files are read"
                )
            yield (text if offset else text.removeprefix("\ufeff")).replace("\r\n", "\n")
            offset += len(line)


def _text_file(path: Path, _text_field: str) -> Iterator[str]:
    can_cut = path.stat().st_size > WHOLE_TEXT_FILE_BYTES
    piece: list[str] = []
    size = 0
    for line in _lines(path):
        piece.append(line)
        size += len(line.encode())
        if can_cut and size >= (WHOLE_TEXT_FILE_BYTES if line.strip() else MIN_TEXT_PIECE_BYTES):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _jsonl_file(path: Path, text_field: str) -> Iterator[str]:
    return (text for (text,) in _jsonl_rows(path, (text_field,)))


def _jsonl_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object with the field {fields[0]!r}")
        yield tuple(_text_of(row, field, f"{path} line {number}") for field in fields)


def read_rows(source: str | Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The texts of these fields of every line of a .jsonl file; ValueError for anything else, naming the line."""
    path = Path(source).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        raise ValueError(f"{source} is no .jsonl file; give one with the fields {', '.join(fields)} on every line")
    return _jsonl_rows(path, fields)


def _parquet_file(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    with table:
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise ValueError(f"{path} has no column {text_field!r}; its columns are {', '.join(columns)}")
        number = 0
        for batch in table.iter_batches(columns=[text_field], batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield _text_of(row, text_field, f"{path} row {number}")


def _text_of(row: dict, text_field: str, place: str) -> str:
    if text_field not in row:
        raise ValueError(f"{place} has no field {text_field!r}; its fields are {', '.join(row) or 'none'}")
    if not isinstance(row[text_field], str):
        raise ValueError(f"{place}: the field {text_field!r} is {type(row[text_field]).__name__}, not text")
    if not is_encodable(row[text_field]):
        raise ValueError(f"{place}: the field {text_field!r} holds half of a surrogate pair, which is no character")
    return row[text_field]


class NotOnHub(ValueError):
    """A data set that the hub does not give now; the text says why, in one line."""


def hub_texts(name: str, config: str | None, field: str, **options: Any) -> Iterator[str]:
    """The texts of a hub data set. options: of `datasets.load_dataset`, which is called at once.

    Raises `NotOnHub` where it cannot be loaded and, while iterating, ValueError for a row without text in `field`.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise NotOnHub(f"{type(error).__name__}: {reason}") from error
    place = name if config is None else f"{name}:{config}"
    return (_text_of(row, field, f"{place} row {number}") for number, row in enumerate(rows, 1))


def _hub_documents(source: str, text_field: str, split: str, streaming: bool) -> Iterator[str]:
    name, _, config = source.partition(":")
    try:
        yield from hub_texts(name, config or None, text_field, split=split, streaming=streaming)
    except NotOnHub as error:
        raise ValueError(
            f"{source!r} is neither a file nor a hub data set that can be loaded ({error}); without a network use a "
            f"local file or docs"
        ) from error
