"""The best shape of each run of a comparison, by the dev split, and the runs that a search by one seed leaves.

With `search_seed` all shapes are trained at that seed, and the other seeds only at the best of each run and budget.
"""

import dataclasses
from collections.abc import Collection, Sequence
from statistics import fmean
from typing import Any

from prime_v2.studies.compare.config import Comparison, Run

Trained = tuple[Run, dict[str, Any]]  # a run and the record of it that train.py wrote


def searched(comparison: Comparison) -> Comparison:
    """The comparison with the runs that are trained before a shape is chosen."""
    if comparison.search_seed is None:
        return comparison
    return dataclasses.replace(
        comparison, runs=tuple(run for run in comparison.runs if run.seed == comparison.search_seed)
    )


def narrowed(comparison: Comparison, trained: Sequence[Trained]) -> Comparison:
    """The comparison with the runs of the search and those of other seeds at the best shapes.

    trained: all runs of `searched`. ValueError for a run that was not evaluated on the dev split.
    """
    best = best_shapes(comparison, trained)
    for run, _ in trained:
        if (run.name, run.budget) not in best:
            raise ValueError(f"{run} has no dev bound to choose a shape by; leave search_seed out, or train it longer")
    order = [run for run in comparison.runs if run.seed == comparison.search_seed]  # first, as they were trained
    order += [
        run
        for run in comparison.runs
        if run.seed != comparison.search_seed and best[run.name, run.budget] == run.shape
    ]
    return dataclasses.replace(comparison, runs=tuple(order))


def number_of_runs(comparison: Comparison) -> int:
    """How many runs are trained in all, whichever shapes are the best."""
    if comparison.search_seed is None:
        return len(comparison.runs)
    cells = {(run.name, run.budget, run.seed) for run in comparison.runs if run.seed != comparison.search_seed}
    return len(searched(comparison).runs) + len(cells)


def number_done(comparison: Comparison, finished: Collection[Run]) -> int:
    """How many of `number_of_runs` are finished; of other seeds than that of the search one shape of each counts."""
    first = set(searched(comparison).runs)
    others = {(run.name, run.budget, run.seed) for run in finished if run not in first}
    return len(first.intersection(finished)) + len(others)


def best_shapes(comparison: Comparison, trained: Sequence[Trained]) -> dict[tuple[str, float], str]:
    """By (run name, budget) the shape whose last dev bound is the lowest: at the search seed, or over all seeds."""
    last: dict[tuple[str, float], dict[str, list[float]]] = {}
    for run, record in trained:
        bounds = [entry["eval_bound"] for entry in record["results"]["history"] if "eval_bound" in entry]
        if bounds and comparison.search_seed in (None, run.seed):
            last.setdefault((run.name, run.budget), {}).setdefault(run.shape, []).append(bounds[-1])
    return {key: min(found, key=lambda shape: fmean(found[shape])) for key, found in last.items()}
