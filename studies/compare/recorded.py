"""Runs of a comparison as its record keeps them, so that a study can go on on another machine (docs/compare.md).

A row of the record has what a comparison needs of a run: options, costs, the curve of the dev bound and, of each
score, the sums over clusters of sequences that paired differences are made of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prime_v2.output.paths import without_places
from prime_v2.output.records import read_record
from prime_v2.studies.compare.config import Comparison, Run
from prime_v2.studies.compare.search import Trained


def cluster_sums(scored: dict[str, Any]) -> list[float] | None:
    """The nats of each cluster of a score with `keep_sequences`, or as a record keeps them; None: neither is there."""
    if "nats_of_clusters" in scored:
        return scored["nats_of_clusters"]
    clusters, nats = scored.get("clusters"), scored.get("nats_of_sequences")
    if clusters is None or nats is None:
        return None
    ends = [sum(clusters["sequences"][: i + 1]) for i in range(len(clusters["sequences"]))]
    return [sum(nats[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def clusters_of(trained: Sequence[Trained]) -> dict[str, dict[str, Any]]:
    """By seed, the clusters of the sequences that bounds and laws of samplers are scored on, the same for all runs."""
    found: dict[str, dict[str, Any]] = {}
    for run, record in trained:
        evaluation = record["results"]["evaluation"]
        scores = {"bound": evaluation["bound"], "sampler": next(iter(evaluation.get("sampler", {}).values()), {})}
        for name, score in scores.items():
            if score.get("clusters") is not None:
                found.setdefault(str(run.seed), {}).setdefault(name, score["clusters"])
    return found


def read_recorded(paths: Sequence[Path], comparison: Comparison) -> list[Trained]:
    """The runs of the comparison that these records of `prime-v2 compare` hold, in the comparison's order.

    Raises ValueError for a file that is no such record, for one of another comparison, and for a run that was trained
    with other options than the comparison gives it.
    """
    runs = {(run.label, run.shape, run.budget, run.seed): run for run in comparison.runs}
    found: dict[Run, dict[str, Any]] = {}
    for path in paths:
        record = read_record(path)
        results = record.get("results", {})
        if record.get("name") != "compare" or results.get("comparison") != comparison.name:
            what = results.get("comparison", record.get("name"))
            raise ValueError(f"--recorded {path} is a record of {what}, not of the comparison {comparison.name}")
        try:
            found |= _runs_of(results, runs, path)
        except (KeyError, TypeError) as error:
            raise ValueError(f"--recorded {path} is damaged, it lacks {error}; give the whole record") from None
    return [(run, found[run]) for run in comparison.runs if run in found]


def _runs_of(results: dict[str, Any], runs: dict[Any, Run], path: Path) -> dict[Run, dict[str, Any]]:
    """The runs of one record. runs: those of the comparison by label, shape, budget and seed."""
    found = {}
    for row in results["rows"]:
        run = runs.get((row["name"], row["shape"], row["budget"], row["seed"]))
        if run is None:
            raise ValueError(f"--recorded {path}: its run {row['folder']} is not of this comparison; leave it out")
        _check_options(row, run, path)
        found[run] = _record_of(row, results)
    return found


def _check_options(row: dict[str, Any], run: Run, path: Path) -> None:
    for name, value in without_places(run.options).items():
        kept = row["options"].get(name, value)  # how many sequences a step takes at once is not kept
        if kept != value:
            raise ValueError(
                f"--recorded {path}: {run} was trained with {name}={kept}, the comparison has {value}; leave the "
                f"record out to train it again"
            )


def _record_of(row: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """What `report.summarise` reads of a run's own record, from its row."""
    clusters = results.get("clusters", {}).get(str(row["seed"]), {})
    differences = _differences(row, results)
    evaluation = row["evaluation"]
    bound = evaluation["bound"] | {"clusters": clusters.get("bound"), "run": row["folder"]}
    bound["differences"] = {other: found["bound"] for other, found in differences.items()}
    laws = {}
    for passes, law in row.get("sampler", {}).items():
        laws[passes] = {name: value for name, value in law.items() if name != "difference"}
        laws[passes] |= {"clusters": clusters.get("sampler"), "run": row["folder"]}
        laws[passes]["differences"] = {other: found["sampler"].get(passes) for other, found in differences.items()}
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
        **{name: row[name] for name in ("command", "commit", "uncommitted_changes", "time_utc")},
        "results": {
            **{name: row[name] for name in ("family", "config", "options", "training")},
            "data": results["data"][str(row["seed"])] | row["data"],
            "evaluation": {
                "bound": bound,
                **({} if evaluation["paper_loss"] is None else {"paper_loss": evaluation["paper_loss"]}),
                **({"sampler": laws} if laws else {}),
            },
            "history": history,
        },
    }


def _differences(row: dict[str, Any], results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a record that keeps no sums, the differences that it has of a run, by the folder of the run that they are to.

    They are those to the baseline of the same shape, and of a record of one seed those between best shapes.
    """
    if str(row["seed"]) in results.get("clusters", {}):
        return {}
    key = (row["shape"], row["budget"], row["seed"])
    folders = {(each["name"], each["shape"], each["budget"], each["seed"]): each["folder"] for each in results["rows"]}
    found = {}
    if row["difference"] is not None:
        found[folders[results["baseline"], *key]] = _as_kept(row)
    best = {(each["name"], each["budget"]): each for each in results["best"]}
    mine, other = best.get((row["name"], row["budget"])), best.get((results["baseline"], row["budget"]))
    if mine and other and mine["shape"] == row["shape"] and mine["seeds"] == [row["seed"]] and mine["difference"]:
        found[folders[results["baseline"], other["shape"], row["budget"], row["seed"]]] = _as_kept(mine)
    return found


def _as_kept(scored: dict[str, Any]) -> dict[str, Any]:
    laws = {passes: law["difference"] for passes, law in scored.get("sampler", {}).items()}
    return {"bound": scored["difference"], "sampler": laws}
