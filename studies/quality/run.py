"""Runs the cells of a study; each finished one is saved, so that the same command goes on where it was stopped."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from prime_v2.families import label_of
from prime_v2.output.atomic import write_json
from prime_v2.output.numbers import duration, perplexity, three_digits
from prime_v2.output.progress import progress_bar, say
from prime_v2.studies.quality.judge import Judge, mauve_of
from prime_v2.studies.quality.plan import Cell, Plan, cells_of, identity, key_of, samplers_of
from prime_v2.studies.quality.samples import law, write
from prime_v2.studies.quality.statistics import NgramIndex, describe, entropy, mean
from prime_v2.studies.quality.texts import HeldOut

Bar = Callable[[str], AbstractContextManager[Callable[[int, int | None], None]]]
CELL = "cell"  # what a saved part says it is of


@dataclass(frozen=True)
class Bench:
    """What all cells are measured with. judge and training: None where there is none; folder: of the saved cells."""

    plan: Plan
    text: HeldOut
    judge: Judge | None
    training: NgramIndex | None
    mauve: bool
    folder: Path
    about: dict[str, Any]  # what decides on the numbers beside plan, cell and model: judge, training text, code
    bar: Bar = progress_bar
    say: Callable[[str], None] = say


def run_model(bench: Bench, model: Any, label: str) -> dict[str, Any]:
    """All cells of a model: {"about", "cells"}, both JSON-ready.

    Those with the fewest passes are run first, so that there are finished ones soon.
    """
    plan = bench.plan
    samplers, missing = samplers_of(model, plan.samplers)
    cells = cells_of(plan, model, samplers)
    about = bench.about | identity(model)
    paths = {cell: bench.folder / f"{key_of(cell, plan, about)}.json" for cell in cells}
    waiting = sorted((cell for cell in cells if not paths[cell].exists()), key=lambda cell: cell.passes)
    finished = len(cells) - len(waiting)
    bench.say(f"{label}: {len(cells)} parts" + (f", {finished} of them finished before" if finished else ""))
    for number, cell in enumerate(waiting, finished + 1):
        name, started = f"[{number}/{len(cells)}] {label}: {cell}", time.monotonic()
        with bench.bar(name) as show:
            found = run_cell(bench, model, cell, _counted(show, cell, plan))
        write_json(paths[cell], {CELL: {"model": label, **asdict(cell)}, **found})
        bench.say(f"{name}: {_in_short(found)}, {duration(time.monotonic() - started)}")
    rows = []
    for cell in cells:
        found = json.loads(paths[cell].read_text(encoding="utf-8"))
        found.pop(CELL, None)  # parts of earlier versions have none
        rows.append({"model": label, **vars(cell), **found})
    about = {
        "name": label,
        "family": label_of(model.config),
        "model_type": model.config.model_type,
        "parameters": sum(each.numel() for each in model.parameters()),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "samplers": samplers,
        "without": missing,
    }
    return {"about": about, "cells": rows}


def _counted(show: Callable[[int, int | None], None], cell: Cell, plan: Plan) -> Callable[[int, int], None]:
    """Shows how many of the texts of a cell, real and sampled, are done, as they are counted up."""
    done, total = 0, plan.samples * (cell.has_law + (not plan.law_only))

    def progress(count: int, _: int) -> None:
        nonlocal done
        done += count
        show(done, total)

    return progress


def _in_short(found: dict[str, Any]) -> str:
    law, samples = found["law"], found["samples"]
    shown = [] if law is None else [f"{'=' if law['is_exact'] else '≤'} {law['nats_per_token']:.3f} nats/token"]
    if samples is not None:
        shown.append(f"generative perplexity {three_digits(samples['generative_perplexity']['value'])}")
    return ", ".join(shown)


def run_cell(bench: Bench, model: Any, cell: Cell, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """{"law", "samples"}, each None where it is not measured."""
    plan, found = bench.plan, dict[str, Any](law=None, samples=None)
    windows = bench.text.windows
    if cell.has_law:
        found["law"] = law(model, cell, plan, windows, progress) | {"nats_per_token": None}
        found["law"] |= nats_per_token(found["law"]["nats_of_sequences"], bench.text, plan.length - cell.prompt)
    if not plan.law_only:
        ids, costs = write(model, cell, plan, windows, progress)
        found["samples"] = costs | judged(bench, ids, cell.prompt, np.arange(len(ids)))
    return found


def nats_per_token(nats: list[float], text: HeldOut, tokens: int) -> dict[str, Any]:
    """Nats of each window as nats per token, with Student's t interval over clusters of documents."""
    estimate = text.clusters.ratio(nats, np.full(len(nats), tokens))
    return {"nats_per_token": estimate.value, "interval_95": estimate.interval()}


def judged(bench: Bench, ids: Tensor, prompt: int, units: np.ndarray) -> dict[str, Any]:
    """The numbers of a set of texts (N, L) given their first `prompt` tokens; units (N,) as in `statistics`."""
    assert bench.judge is not None
    judge = bench.judge
    read = judge.read(ids, prompt)
    sizes = [len(each) for each in read.texts]
    found: dict[str, Any] = {"generative_perplexity": mean(read.nats, sizes, units, perplexity)}
    found |= describe(read.texts, units, bench.training)
    found["nats_of_samples"] = [round(float(each), 2) for each in read.nats]
    found["tokens_of_samples"] = sizes[0] if len(set(sizes)) == 1 else sizes
    found["entropy_of_samples"] = [round(entropy(each), 4) for each in read.texts]
    if bench.mauve:
        real = judge.features(judge.read(bench.text.windows, prompt).texts)
        found["mauve"] = {"value": mauve_of(judge.features(read.texts), real, bench.plan.seed), "interval_95": None}
    return found | ({"cut": read.cut} if read.cut else {})


def reference(bench: Bench) -> dict[str, Any] | None:
    """The held-out text judged as the samples are; by the tokens that are given."""
    if bench.plan.law_only:
        return None
    prompts = dict.fromkeys([0, bench.plan.prompt or 0])
    return {str(each): judged(bench, bench.text.windows, each, bench.text.units) for each in prompts}
