"""The corpus `docs`: English from the documentation strings of the installed packages, which every machine has.

The same package versions give the same documents in the same order on every machine.
"""

import ast
import gc
import importlib.metadata
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

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


def docs_documents(sources: Iterable[str] = DOCS_SOURCES) -> Iterator[str]:
    """English from the documentation strings of installed packages: one document per module file.

    Docstrings of modules, classes and methods (`ast`, nothing is imported) of at least 200 characters, dedented, in
    the order of (source, path, position). Their paragraphs of prose are kept; doctests, tables and print-outs
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
        if docstring and len(docstring) >= MIN_DOCSTRING_CHARACTERS and is_encodable(docstring):
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

        The second of two equal paragraphs is thus refused, and so is one that only renames things in an earlier one.
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


def is_encodable(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
