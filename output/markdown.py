"""Markdown tables, and the line below one that says where its numbers are from."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first aligned right."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


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
