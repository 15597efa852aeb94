"""Tables of docs/compare.md and docs/findings.md, from the records of `prime-v2 compare`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown
from prime_v2.studies.compare.config import number
from prime_v2.studies.compare.report import markdown_text, notes, with_interval

RECORDS = ("families", "isoflop", "levers", "levers_seeds", "winners")


def record_table(name: str, results: Path) -> str:
    """Tables, notes and origin of results/compare_NAME.json."""
    record = read_record(results / f"compare_{name}.json")
    return f"{markdown_text(record['results'])}\n{_origin(record)}"


def best_table(results: Path) -> str:
    """A line a run and a column a budget: the bound of the size with the lowest dev bound, and that size."""
    record = read_record(results / "compare_isoflop.json")
    found = record["results"]
    best = {(each["name"], each["budget"]): each for each in found["best"]}
    lines = [[name, *(_best_cell(best.get((name, budget))) for budget in found["budgets"])] for name in found["names"]]
    heads = ["run", *(f"{number(budget)} FLOPs" for budget in found["budgets"])]
    return f"{markdown(heads, lines)}\n" + "\n".join(notes(found)) + f"\n\n{_origin(record)}"


def settings_table(name: str, results: Path) -> str:
    """A line a run, a column a setting (the record's shapes): the last dev bounds, the lowest in bold, and its test.

    The record has one budget.
    """
    record = read_record(results / f"compare_{name}.json")
    found = record["results"]
    best, lines = {each["name"]: each for each in found["best"]}, []
    for arm in found["names"]:
        cells = [_dev_cell(found, arm, shape, best[arm]["shape"]) for shape in found["shapes"]]
        bound, difference = best[arm]["bound"], best[arm]["difference"]
        score = f"{'=' if bound['is_exact'] else '≤'} {with_interval(bound)}"
        lines.append([arm, *cells, score, "–" if difference is None else with_interval(difference, "+.3f")])
    heads = ["run", *found["shapes"], "test ± 95%, of the setting in bold", f"minus {found['baseline']} ± 95%"]
    return f"{markdown(heads, lines)}\n" + "\n".join(notes(found)) + f"\n\n{_origin(record)}"


def _dev_cell(found: dict[str, Any], name: str, shape: str, best: str) -> str:
    rows = [row for row in found["rows"] if (row["name"], row["shape"]) == (name, shape)]
    value = f"{fmean(row['curve'][-1]['bound'] for row in rows):.3f}"
    return f"**{value}**" if shape == best else value


def _best_cell(best: dict[str, Any] | None) -> str:
    if best is None:
        return "–"
    return f"{'=' if best['bound']['is_exact'] else '≤'} {with_interval(best['bound'])} ({best['shape']})"


def _origin(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores"
    seeds = ", ".join(map(str, record["results"]["seeds"]))
    plural = "" if len(record["results"]["seeds"]) == 1 else "s"
    return f"`{record['command']}` ({where}; PyTorch {record['versions']['torch']}; seed{plural} {seeds}).\n"


TABLES: dict[str, Callable[[Path], str]] = {
    **{f"compare_{name}": partial(record_table, name) for name in RECORDS},
    "isoflop": best_table,
    "tuning": partial(settings_table, "tuning"),
}
