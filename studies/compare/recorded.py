"""Runs of a comparison taken from its record, to continue a study on another machine (docs/compare.md).

A row of the record has what a comparison needs of a run: options, costs, the curve of the dev bound and, of each
score, the sums over clusters of sequences that paired differences are made of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prime_v2.output.paths import without_places
from prime_v2.output.records import read_record
from prime_v2.studies.compare.config import Comparison, Run
from prime_v2.studies.compare.plan import all_options, parsed
from prime_v2.studies.compare.search import Trained
from prime_v2.training.course import course_of, differences


def read_recorded(paths: Sequence[Path], comparison: Comparison) -> list[Trained]:
    """The runs of the comparison that these records of `prime-v2 compare` hold, in the comparison's order.

    Raises ValueError for a file that is no whole record of this comparison, for a run of two files, and for one that
    was trained with other options than the comparison gives it.
    """
    runs = {(run.label, run.shape, run.budget, run.seed): run for run in comparison.runs}
    found: dict[Run, dict[str, Any]] = {}
    for path in paths:
        record = read_record(path)
        _check_record(record, comparison, path)
        try:
            new = {run_of(row, runs, path): _as_record(row, record) for row in record["results"]["rows"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--recorded {path} is no whole record of a comparison ({error!r})") from None
        for run in new:
            if run in found:
                raise ValueError(f"--recorded {path}: {run} is in another of the records, too; give one of them")
        found |= new
    return [(run, found[run]) for run in comparison.runs if run in found]


def _check_record(record: dict[str, Any], comparison: Comparison, path: Path) -> None:
    results = record["results"] if isinstance(record["results"], dict) else {}
    name = results.get("comparison", record["name"])
    if record["name"] != "compare" or name != comparison.name:
        raise ValueError(f"--recorded {path} is a record of {name}, not of the comparison {comparison.name}")
    if results.get("count") != comparison.count:
        raise ValueError(
            f"--recorded {path} has budgets by count={results.get('count')}, the comparison has {comparison.count}; "
            f"leave the record out"
        )
    if "clusters" not in results:
        raise ValueError(
            f"--recorded {path} was made by an earlier version, which kept no sums that differences are made of; "
            f"leave it out to train its runs again"
        )


def run_of(row: dict[str, Any], runs: dict[Any, Run], path: Path) -> Run:
    """The run of the comparison that a row is of; ValueError where there is none or it has other options."""
    run = runs.get((row["name"], row["shape"], row["budget"], row["seed"]))
    if run is None:
        raise ValueError(
            f"--recorded {path}: its run {row['folder']} is not in the comparison; leave the record out or add it"
        )
    options, *_ = parsed(run.options | {"max_steps": 1}, f"run {run.name}")
    expected = without_places(all_options(run, options, row["training"]["steps"], Path()))
    differing = differences(row["options"], course_of(*parsed(expected, f"run {run.name}")))
    if differing:
        raise ValueError(
            f"--recorded {path}: {run} was trained with another {differing[0]} than the comparison gives it "
            f"({row['options'].get(differing[0])}); leave the record out to train it again"
        )
    return run


def _as_record(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What `report.summarise` reads of the record that train.py wrote, from the row of a comparison's record."""
    results, evaluation = record["results"], row["evaluation"]
    clusters = results["clusters"][str(row["seed"])]
    laws = {
        passes: {name: value for name, value in law.items() if name != "difference"}
        | {"clusters": clusters["sampler"]}
        for passes, law in row["sampler"].items()
    }
    bound = evaluation["bound"] | {"clusters": clusters["bound"]}
    for scored in (bound, *laws.values()):
        if len(scored["nats_of_clusters"]) != len(scored["clusters"]["tokens"]):
            raise KeyError("nats_of_clusters")
    loss = {} if evaluation["paper_loss"] is None else {"paper_loss": evaluation["paper_loss"]}
    history = [
        {
            "tokens": point["tokens"],
            "eval_bound": point["bound"],
            "eval_bound_stderr": point["stderr"],
            "eval_bound_degrees": point["degrees"],
            "eval_unigram_entropy": row["dev_unigram_entropy"],
        }
        for point in row["curve"]
    ]
    return {
        **{name: row[name] for name in ("command", "commit", "uncommitted_changes", "time_utc", "trained_on")},
        "results": {
            **{name: row[name] for name in ("family", "config", "options", "training")},
            "data": results["data"][str(row["seed"])],
            "evaluation": {"bound": bound, **loss, **({"sampler": laws} if laws else {})},
            "history": history,
        },
    }
