"""Some of the runs of a comparison, to train or repeat these alone (`prime-v2 compare --run --shape --seed`)."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NoReturn

from prime_v2.studies.compare.config import Comparison, slug
from prime_v2.validation_keywords_prime_v2 import did_you_mean


def selected(
    comparison: Comparison, runs: Sequence[str] = (), shapes: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Comparison:
    """The comparison with the runs of these names (or labels), shapes and seeds; of what is not given, with all.

    They have the steps that they have in the whole comparison. Shapes are searched among those that are left, if the
    search seed is. ValueError for what the comparison has not, and for names, shapes and seeds that have no run in
    common.
    """
    known = {slug(name): run.name for run in comparison.runs for name in (run.name, run.label)}
    labels = {run.name: run.label for run in comparison.runs}
    names = {known.get(slug(name)) or _refuse("--run", name, labels.values()) for name in runs}
    for shape in shapes:
        if slug(shape) not in comparison.values("shape"):
            _refuse("--shape", shape, comparison.values("shape"))
    for seed in seeds:
        if seed not in comparison.values("seed"):
            _refuse("--seed", seed, comparison.values("seed"))
    wanted = {slug(shape) for shape in shapes}
    left = tuple(
        run
        for run in comparison.runs
        if (not names or run.name in names)
        and (not wanted or run.shape in wanted)
        and (not seeds or run.seed in seeds)
    )
    if not left:
        raise ValueError(
            f"no run of {comparison.name} is one of --run {', '.join(runs) or '(any)'}, --shape "
            f"{', '.join(shapes) or '(any)'} and --seed {', '.join(map(str, seeds)) or '(any)'} at once; "
            f"--dry-run without them lists all"
        )
    searches = len({run.shape for run in left}) > 1 and any(run.seed == comparison.search_seed for run in left)
    return dataclasses.replace(comparison, runs=left, search_seed=comparison.search_seed if searches else None)


def _refuse(option: str, given: object, known: Iterable[object]) -> NoReturn:
    names = [str(each) for each in known if str(each)]
    raise ValueError(
        f"{option} {given} is not in the comparison{did_you_mean(str(given), names)}; there are {', '.join(names)}"
    )
