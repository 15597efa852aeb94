"""Tables of docs/compare.md and docs/findings.md, from records of `prime-v2 compare` (see study.py too)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown
from prime_v2.studies.compare.config import number
from prime_v2.studies.compare.report import markdown_text, notes, with_interval

RECORDS = (
    "families", "isoflop", "levers", "levers_seeds", "winners", "study_1e12_first", "study_orders", "study_levers",
    "study_gpt2", "study_1e13_seeds",
)  # fmt: skip


def record_table(name: str, results: Path) -> str:
    """Tables, notes and origin of results/compare_NAME.json."""
    record = read_record(results / f"compare_{name}.json")
    return f"{markdown_text(record['results'])}\n{origin(record)}"


def best_table(results: Path) -> str:
    """A line a run and a column a budget: the bound of the size with the lowest dev bound, and that size."""
    record = read_record(results / "compare_isoflop.json")
    found = record["results"]
    best = {(each["name"], each["budget"]): each for each in found["best"]}
    lines = [[name, *(_best_cell(best.get((name, budget))) for budget in found["budgets"])] for name in found["names"]]
    heads = ["run", *(f"{number(budget)} FLOPs" for budget in found["budgets"])]
    return f"{markdown(heads, lines)}\n" + "\n".join(notes(found)) + f"\n\n{origin(record)}"


def _best_cell(best: dict[str, Any] | None) -> str:
    if best is None:
        return "–"
    return f"{'=' if best['bound']['is_exact'] else '≤'} {with_interval(best['bound'])} ({best['shape']})"


def origin(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores"
    seeds = ", ".join(map(str, record["results"]["seeds"]))
    plural = "" if len(record["results"]["seeds"]) == 1 else "s"
    return f"`{record['command']}` ({where}; PyTorch {record['versions']['torch']}; seed{plural} {seeds}).\n"


TABLES: dict[str, Callable[[Path], str]] = {
    **{f"compare_{name}": partial(record_table, name) for name in RECORDS},
    "isoflop": best_table,
}
