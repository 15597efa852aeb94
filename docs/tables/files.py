"""Lists of the files of each room for docs/architecture.md, from the first sentences of their docstrings."""

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from docs.map import ROOMS, ROOT
from prime_v2.output.tables import markdown


def files_table(room: str, results: Path) -> str:
    """The files of a room, without those that hold nothing but a docstring."""
    rows = []
    for path in sorted((ROOT / room).rglob("*.py"), key=lambda path: (len(path.relative_to(ROOT).parts), str(path))):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "__init__.py" or len(module.body) > 1:
            rows.append([f"`{path.relative_to(ROOT / room)}`", first_sentence(ast.get_docstring(module) or "")])
    return markdown(["file", "what it holds"], rows).replace("---:", "---", 1)  # sentences, not numbers


def first_sentence(docstring: str) -> str:
    """Up to the first full stop at a word's end, in one line, as the cell of a table."""
    text = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[\w`)\"])\. |\.$", text)[0]
    return sentence.replace("|", "\\|")


TABLES: dict[str, Callable[[Path], str]] = {f"files_{room}": partial(files_table, room) for room in ROOMS}
