"""Tables of docs/findings.md about the study of docs/protocol.md: settings and sizes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from docs.tables.compare import origin
from prime_v2.output.numbers import quantity
from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown
from prime_v2.studies.compare.report import SAMPLED, notes, sampler_table, with_interval

SETTINGS = ("tuning",)  # records with a choice on the dev split


def settings_table(name: str, results: Path) -> str:
    """A line a run, a column a shape: the last dev bounds, the lowest in bold, with its test bound, cost and laws.

    The record has one budget.
    """
    record = read_record(results / f"compare_{name}.json")
    found = record["results"]
    best, lines = {each["name"]: each for each in found["best"]}, []
    for arm in found["names"]:
        cells = [_dev_cell(found, arm, shape, best[arm]["shape"]) for shape in found["shapes"]]
        bound, difference = best[arm]["bound"], best[arm]["difference"]
        score = f"{'=' if bound['is_exact'] else '≤'} {with_interval(bound)}"
        delta = "–" if difference is None else with_interval(difference, "+.3f")
        costs = [quantity(best[arm]["tokens"]), f"{best[arm]['flops_6nd']:.2e}"]
        lines.append([arm, *cells, score, delta, *costs])
    heads = [
        "run",
        *found["shapes"],
        "test ± 95%, of the one in bold",
        f"minus {found['baseline']} ± 95%",
        "D",
        "6 N D",
    ]
    parts = [markdown(heads, lines)]
    if laws := sampler_table(found):
        parts.append(f"{SAMPLED}:\n\n{markdown(*laws)}")
    return "\n".join([*parts, "\n".join(notes(found)) + f"\n\n{origin(record)}"])


def _dev_cell(found: dict[str, Any], name: str, shape: str, best: str) -> str:
    """The last dev bound, of the seed at which shapes were chosen or over all seeds."""
    rows = [row for row in found["rows"] if (row["name"], row["shape"]) == (name, shape)]
    if found.get("search_seed") is not None:
        rows = [row for row in rows if row["seed"] == found["search_seed"]]
    if not rows:
        return "–"
    value = f"{fmean(row['curve'][-1]['bound'] for row in rows):.3f}"
    return f"**{value}**" if shape == best else value


TABLES: dict[str, Callable[[Path], str]] = {
    **{name: partial(settings_table, name) for name in SETTINGS},
}
