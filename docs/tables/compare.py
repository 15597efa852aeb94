"""Tables of docs/compare.md and docs/findings.md, from records of `prime-v2 compare` (see study.py too)."""

import argparse
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown
from prime_v2.studies.compare.config import KIND, number, read_comparison
from prime_v2.studies.compare.recorded import run_of
from prime_v2.studies.compare.report import markdown_text, notes, with_interval
from prime_v2.studies.compare.search import number_done, number_of_runs
from prime_v2.studies.compare.selection import selected
from prime_v2.training.recipes import recipe_names

RECORDS = (
    "families", "isoflop", "levers", "levers_seeds", "winners", "study_1e12_first", "study_orders", "study_levers",
    "study_gpt2", "study_3e13", "largest_1e14",
)  # fmt: skip


# Recipes of records that were made from copies: what trains the same.
REPEATED_BY = {
    "runs/seed0/study_1e13.yaml": "study_1e13 --seed 0",
    "runs/study_trees.yaml": "study_trees",
}


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
    made = f"`{record['command']}` ({where}; PyTorch {record['versions']['torch']}; seed{plural} {seeds})."
    again = next((given for copy, given in REPEATED_BY.items() if copy in record["command"]), None)
    if again is not None:
        made += f" `prime-v2 compare {again}` trains the same."
    elif not is_of_its_recipe(record):
        made += f" The recipe has changed since; that of this record is at commit {record['commit'][:10]}."
    return f"{made}\n"


def is_of_its_recipe(record: dict[str, Any]) -> bool:
    """Whether the command of the record, or what repeats it, trains its rows from today's recipe, option by option.

    ValueError for a record of `prime-v2 compare` whose recipe is not in configs/compare/.
    """
    command = record["command"]
    for copy, again in REPEATED_BY.items():
        command = command.replace(copy, again)
    parser = argparse.ArgumentParser()
    for option in ("--run", "--shape", "--seed"):
        parser.add_argument(option, action="append", default=[])
    *program, recipe = shlex.split(command)[:3]
    if program != ["prime-v2", "compare"]:
        return True  # made up, for a test
    if recipe not in recipe_names(KIND):
        raise ValueError(f"{record['command']}: {recipe} is no recipe of configs/compare/; add what repeats it")
    given, _ = parser.parse_known_args(shlex.split(command)[3:])
    comparison = selected(read_comparison(recipe), given.run, given.shape, [int(seed) for seed in given.seed])
    results, runs = record["results"], {(run.label, run.shape, run.budget, run.seed): run for run in comparison.runs}
    try:
        trained = {run_of(row, runs, Path(recipe)) for row in results["rows"]}
    except ValueError:
        return False
    same = (results["count"], results["baseline"]) == (comparison.count, comparison.baseline_label)
    return same and number_done(comparison, trained) == number_of_runs(comparison)


TABLES: dict[str, Callable[[Path], str]] = {
    **{f"compare_{name}": partial(record_table, name) for name in RECORDS},
    "isoflop": best_table,
}
