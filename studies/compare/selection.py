"""Some of the runs of a comparison, to train or repeat these only (`prime-v2 compare --run --shape --seed`)."""

import dataclasses
from collections.abc import Iterable, Sequence

from prime_v2.studies.compare.config import Comparison, slug
from prime_v2.validation_keywords_prime_v2 import did_you_mean


def selected(
    comparison: Comparison, runs: Sequence[str] = (), shapes: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Comparison:
    """The comparison with the runs of these names (or labels), shapes and seeds; of what is not given, with all.

    They have the steps that they have in the whole comparison. Where the search seed and several shapes are left, the
    other seeds are trained at the best of these; otherwise all seeds at all shapes that are left. ValueError for what
    the comparison has not, and for names, shapes and seeds that have no run in common.
    """
    if not (runs or shapes or seeds):
        return comparison
    names = {_run_named(name, comparison) for name in runs}
    wanted = {_shape_named(shape, comparison) for shape in shapes}
    for seed in seeds:
        if seed not in comparison.values("seed"):
            raise ValueError(_not_there("--seed", seed, comparison.values("seed")))
    of_names = [run for run in comparison.runs if not names or run.name in names]
    left = tuple(run for run in of_names if (not wanted or run.shape in wanted) and (not seeds or run.seed in seeds))
    if not left:
        there = dict.fromkeys((run.shape, run.seed) for run in of_names)
        raise ValueError(
            "no run has this --run, --shape and --seed at once; those that --run leaves have "
            + ", ".join(f"--shape {shape} --seed {seed}" for shape, seed in there)
        )
    searches = len({run.shape for run in left}) > 1 and any(run.seed == comparison.search_seed for run in left)
    return dataclasses.replace(comparison, runs=left, search_seed=comparison.search_seed if searches else None)


def _run_named(given: str, comparison: Comparison) -> str:
    """The name of the run that is called so: by its name, else its label, else its folder."""
    for called in ({run.name: run.name for run in comparison.runs}, {run.label: run.name for run in comparison.runs}):
        if given in called:
            return called[given]
    folders = {slug(run.name): run.name for run in comparison.runs}
    if slug(given) in folders:
        return folders[slug(given)]
    raise ValueError(_not_there("--run", given, comparison.values("label")))


def _shape_named(given: str, comparison: Comparison) -> str:
    shapes = comparison.values("shape")
    if shapes == [""]:
        raise ValueError(f"--shape {given}: the comparison has one size, which has no name; leave --shape out")
    if slug(given) not in shapes:
        raise ValueError(_not_there("--shape", given, shapes))
    return slug(given)


def _not_there(option: str, given: object, known: Iterable[object]) -> str:
    names = [str(each) for each in known]
    listed = ", ".join(f"{each!r}" if "," in each else each for each in names)
    return f"{option} {given!r} is not in the comparison{did_you_mean(str(given), names)}; there are {listed}"
