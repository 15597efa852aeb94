"""Tables as Markdown and as text, and the line below one that says where its numbers are from."""

import io
from collections.abc import Iterable, Sequence
from typing import Any


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first aligned right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def aligned(rows: Iterable[Sequence[str]], *, right: bool = False, indent: str = "") -> str:
    """Columns of text, two spaces apart: a line for each row (the headings are one), none after the last.

    right: whether cells are aligned right. indent: what each line begins with. Raises ValueError for rows of unequal
    length. Cells are printed as they are: no markup, no colour, no wrapping.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"rows have {sorted({len(row) for row in rows})} cells; give each row as many as the first")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in rows[0] if rows else ():
        table.add_column(no_wrap=True, justify="right" if right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    text = io.StringIO()
    # Wider than any line, since rich fits a table to its console.
    Console(file=text, width=10**6, color_system=None, legacy_windows=False).print(table)
    return "\n".join((indent + line).rstrip() for line in text.getvalue().splitlines())


def origin(record: dict[str, Any]) -> str:
    """The command behind a record and where it ran."""
    machine = record["machine"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    where = machine["accelerator"] or f"{machine['processor']}, {threads}"
    seed = "" if record["seed"] is None else f", seed {record['seed']}"
    return f"`{record['command']}` ({where}; PyTorch {record['versions']['torch']}{seed}).\n"


def with_origin(heads: Sequence[str], rows: Iterable[Sequence[str]], record: dict[str, Any]) -> str:
    """A table and where its numbers are from."""
    return f"{markdown(heads, rows)}\n{origin(record)}"
