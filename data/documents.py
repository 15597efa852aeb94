"""Documents to train and evaluate on: from files, from hub data sets, or from the installed packages' documentation.

A document is a non-empty string. Everything here is a pure function of its input: the same files, or the same package
versions, give the same documents in the same order on every machine.
"""

import ast
import gc
import hashlib
import importlib.metadata
import itertools
import json
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")

# A .txt file up to the first size is one document; a larger one is cut at blank lines into documents of at least the
# second size, so that a split between documents is possible, and at any line end where none has come by the first.
WHOLE_TEXT_FILE_BYTES = 64 * 1024
MIN_TEXT_PIECE_BYTES = 4 * 1024

# What the source "docs" reads beside the standard library: dependencies of this package, direct and indirect, that
# have much documentation. "python" stands for the standard library.
DOCS_SOURCES = (
    "python",
    "accelerate",
    "aiohttp",
    "click",
    "datasets",
    "evaluate",
    "fsspec",
    "huggingface-hub",
    "jinja2",
    "lm-eval",
    "matplotlib",
    "mpmath",
    "networkx",
    "nltk",
    "numpy",
    "pandas",
    "peft",
    "pillow",
    "rich",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
)
SKIPPED_FOLDERS = {"..", "test", "tests", "testing", "_testing", "idle_test"}
MIN_DOCSTRING_CHARACTERS = 200
# Share of letters among what is not whitespace, chosen by reading what falls on either side.
MIN_PROSE_SHARE = 0.8
# With these two, 0.01% of the runs of 13 words on the test side of `split_of` occur on the training side; with a share
# of 0.5 it is 1.7%, without looking at runs 7%, and without any removal 17%.
RUN_WORDS = 8
MAX_SEEN_SHARE = 0.1


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
    empty or binary file, a line or row without text in `text_field`, a hub name that cannot be loaded.
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
                raise ValueError(f"{path} is not a UTF-8 text file: byte {offset + bad} is {line[bad]:#04x}")
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
        yield tuple(_field(row, field, f"{path} line {number}") for field in fields)


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
                yield _field(row, text_field, f"{path} row {number}")


def _field(row: dict, text_field: str, place: str) -> str:
    if text_field not in row:
        raise ValueError(f"{place} has no field {text_field!r}; its fields are {', '.join(row) or 'none'}")
    if not isinstance(row[text_field], str):
        raise ValueError(f"{place}: the field {text_field!r} is {type(row[text_field]).__name__}, not text")
    if not _is_encodable(row[text_field]):
        raise ValueError(f"{place}: the field {text_field!r} holds half of a surrogate pair, which is no character")
    return row[text_field]


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hub_documents(source: str, text_field: str, split: str, streaming: bool) -> Iterator[str]:
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source!r} is neither a file nor a hub data set that can be loaded ({type(error).__name__}: {reason}); "
            "without a network use a local file or docs"
        ) from error
    for number, row in enumerate(rows, 1):
        yield _field(row, text_field, f"{source} row {number}")


def docs_documents(sources: Iterable[str] = DOCS_SOURCES) -> Iterator[str]:
    """English from the documentation strings of installed packages: one document per module file.

    Docstrings of modules, classes and methods (`ast`, nothing is imported) of at least 200 characters, dedented, in
    the order of (source, path, position). Of these the paragraphs of prose are kept; doctests, tables and print-outs
    are not. Packages repeat themselves (`transformers` documents the same arguments in hundreds of models), which
    would carry training text over into the held-out text: a paragraph is kept only if it is new, see `_Novelty`.

    sources: "python" for the standard library, or names of distributions; those not installed are skipped.
    """
    novelty = _Novelty()
    for source in sources:
        for path in _module_files(source):
            paragraphs = [text for docstring in _docstrings(path) for text in _prose(docstring) if novelty.add(text)]
            document = "\n\n".join(paragraphs)
            if len(document) >= MIN_DOCSTRING_CHARACTERS:
                yield document


def docs_versions(sources: Iterable[str] = DOCS_SOURCES) -> dict[str, str]:
    """Version of each source that `docs_documents` can read here, for the record; those not installed are left out."""
    versions = {}
    for source in sources:
        if source == "python":
            versions[source] = platform.python_version()
        elif (distribution := _distribution(source)) is not None:
            versions[source] = distribution.version
    return versions


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module_files(source: str) -> list[Path]:
    """The .py files of a source that belong to the release itself, sorted by path; no tests."""
    if source == "python":
        root = Path(sysconfig.get_path("stdlib"))
        # By name: this folder also has site-packages and a distributor's additions, which differ between machines.
        folders = [root / name for name in sys.stdlib_module_names]
        found = [path for folder in folders for path in (folder.with_suffix(".py"), *folder.rglob("*.py"))]
        paths = {path.relative_to(root).as_posix(): path for path in found}
    else:
        distribution = _distribution(source)
        files = (distribution.files or []) if distribution else []
        paths = {file.as_posix(): Path(file.locate()) for file in files if file.suffix == ".py"}
    names = sorted(name for name in paths if not SKIPPED_FOLDERS & set(PurePosixPath(name).parts))
    return [paths[name] for name in names if paths[name].is_file()]


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(path: Path) -> Iterator[str]:
    """Dedented docstrings of the module, its classes and their methods, in the order of the file."""
    source = path.read_bytes()
    # Parsing takes nearly all the time: leave out what has no long triple-quoted string.
    if all(match.end() - match.start() < MIN_DOCSTRING_CHARACTERS for match in _TRIPLE_QUOTED.finditer(source)):
        return
    tree = _parse(source)
    nodes: list[_Documented] = [] if tree is None else [tree]
    while nodes:
        node = nodes.pop()
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= MIN_DOCSTRING_CHARACTERS and _is_encodable(docstring):
            yield docstring
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += [child for child in reversed(node.body) if isinstance(child, _Documented)]


def _parse(source: bytes) -> ast.Module | None:
    was_collecting = gc.isenabled()
    # A syntax tree has no cycles; looking for them while it grows doubles the time.
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None  # templates and files for other versions of Python
    finally:
        if was_collecting:
            gc.enable()


_TRIPLE_QUOTED = re.compile(rb"\"\"\".*?\"\"\"|'''.*?'''", re.DOTALL)


def _prose(docstring: str) -> list[str]:
    """The paragraphs that read as English."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        num_letters = len(re.sub(r"[\W\d_]", "", paragraph))
        num_characters = len(re.sub(r"\s", "", paragraph))
        if ">>>" not in paragraph and num_letters >= MIN_PROSE_SHARE * num_characters > 0:
            paragraphs.append(paragraph.strip("\n").rstrip())
    return paragraphs


class _Novelty:
    """What of a text has been seen: paragraphs, up to case, digits and punctuation, and their runs of 8 words."""

    def __init__(self) -> None:
        self._word_numbers: dict[str, int] = {}
        self._paragraphs: set[int] = set()
        self._runs: set[int] = set()

    def add(self, paragraph: str) -> bool:
        """Whether a paragraph is new: not equal to an earlier one, and at most a tenth of its runs seen. Remembers it.

        Of two equal paragraphs the second is thus refused, and so is one that only renames things in an earlier one.
        """
        words = [
            self._word_numbers.setdefault(word, len(self._word_numbers))
            for word in re.findall("[a-z]+", paragraph.lower())
        ]
        # The hash of a tuple of integers is the same in every process, that of a string is not.
        key = hash(tuple(words))
        if key in self._paragraphs:
            return False
        self._paragraphs.add(key)
        runs = {hash(tuple(words[i : i + RUN_WORDS])) for i in range(len(words) - RUN_WORDS + 1)}
        is_new = len(runs & self._runs) <= MAX_SEEN_SHARE * len(runs)
        self._runs |= runs
        return is_new


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _normalised(document: str) -> str:
    return " ".join(document.casefold().split())


def deduplicate(documents: Iterable[str]) -> Iterator[str]:
    """The documents without those equal to an earlier one up to case and whitespace; in order, 16 bytes each held."""
    seen = set()
    for document in documents:
        key = _digest(_normalised(document))
        if key not in seen:
            seen.add(key)
            yield document


def split_of(document: str, *, seed: int = 0, dev_share: float = 0.02, test_share: float = 0.02) -> str:
    """The side of a document: "train", "dev" or "test", with these probabilities over documents.

    A pure function of the seed and of the text up to case and whitespace, so that equal documents are on one side on
    every machine. The test side does not depend on `dev_share`. ValueError for shares outside [0, 1) or a sum >= 1.
    """
    if not (0 <= dev_share < 1 and 0 <= test_share < 1 and dev_share + test_share < 1):
        raise ValueError(
            f"dev_share={dev_share} and test_share={test_share} must be at least 0 and leave a share for training, "
            "e.g. 0.02 and 0.02"
        )
    position = int.from_bytes(_digest(f"{seed}\n{_normalised(document)}")[:8], "big") / 2**64
    if position < test_share:
        return "test"
    return "dev" if position >= 1 - dev_share else "train"


class Fingerprint:
    """SHA-256 over a sequence of documents, added one by one; it depends on their order and boundaries."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: str) -> None:
        data = document.encode()
        self._hash.update(len(data).to_bytes(8, "big") + data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def corpus_fingerprint(documents: Iterable[str]) -> str:
    """64 hexadecimal digits that name a sequence of documents, for the record of a run."""
    fingerprint = Fingerprint()
    for document in documents:
        fingerprint.add(document)
    return fingerprint.hexdigest()
