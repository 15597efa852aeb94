"""What follows from the cells of a study: the best sampler, what digit-wise rules save, generative frontiers."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prime_v2.studies.quality.plan import parsed
from prime_v2.studies.quality.statistics import RESAMPLES, percentiles, resampled
from prime_v2.studies.quality.texts import HeldOut

Rows = Sequence[dict[str, Any]]


def findings(cells: Rows, text: HeldOut, reference: dict[str, Any] | None) -> dict[str, Any]:
    """The parts of a record that are worked out of its cells; each is a list of flat rows."""
    return {
        "best": best_at_equal_passes(cells, text),
        "digits": passes_of_digits(cells, text),
        "frontiers": frontiers(cells, reference, text.units),
    }


def laws_by_model(cells: Rows) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """(model, tokens given, its cells with the law of a sampler) for each; bounds of another law are left out."""
    rows = [row for row in cells if row["law"] is not None and row["law"]["mean_passes"] is not None]
    for model, prompt in dict.fromkeys((row["model"], row["prompt"]) for row in rows):
        yield model, prompt, [row for row in rows if (row["model"], row["prompt"]) == (model, prompt)]


def best_at_equal_passes(cells: Rows, text: HeldOut) -> list[dict[str, Any]]:
    """The sampler with the lowest nats per token of each model at each number of passes, and what others add to it.

    A row for each other sampler: `difference` in nats per token on the same windows, with its Student's t interval
    over clusters of documents. A bound (of the ancestral sampler) is above its law by an unknown amount.
    """
    found = []
    for model, prompt, rows in laws_by_model(cells):
        tokens = np.full(len(text.windows), text.windows.shape[1] - prompt)
        for passes in dict.fromkeys(row["passes"] for row in rows):
            there = sorted(
                (row for row in rows if row["passes"] == passes), key=lambda row: row["law"]["nats_per_token"]
            )
            best, *others = there
            for row in others:
                nats = [np.array(each["law"]["nats_of_sequences"]) for each in (row, best)]
                estimate = text.clusters.ratio(nats[0] - nats[1], tokens)
                found.append(
                    {
                        "model": model,
                        "prompt": prompt,
                        "passes": passes,
                        "best": best["sampler"],
                        "best_nats_per_token": best["law"]["nats_per_token"],
                        "sampler": row["sampler"],
                        "is_exact": row["law"]["is_exact"],
                        "difference": estimate.value,
                        "interval_95": estimate.interval(),
                    }
                )
    return found


def passes_of_digits(cells: Rows, text: HeldOut) -> list[dict[str, Any]]:
    """How many passes a digit-wise rule takes to reach the exact nats per token of the token-wise rule of that name.

    A row for each model, rule and number of token-wise passes: `share`, digit-wise passes over token-wise ones, read
    off lines through the measured points over log passes, with its bootstrap interval over clusters of documents.
    `reached`: "yes"; "at once" where the fewest measured passes are enough (share is then the most it can be); or "no"
    where the most are not (share None). An end of an interval is None where the rule did not reach it.
    """
    found = []
    for model, prompt, rows in laws_by_model(cells):
        exact = [row for row in rows if row["law"]["is_exact"]]
        rules: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in exact:
            name, options = parsed(row["sampler"])
            unit = options.pop("unit", "token")
            rule = ",".join([name, *(f"{key}={value}" for key, value in options.items())])
            rules.setdefault(rule, {}).setdefault(unit, []).append(row)
        for rule, units in rules.items():
            if "token" in units and "digit" in units:
                about = {"model": model, "prompt": prompt, "rule": rule}
                found += [about | each for each in _shares(units["token"], units["digit"], text, prompt)]
    return found


def _shares(token: Rows, digit: Rows, text: HeldOut, prompt: int) -> Iterator[dict[str, Any]]:
    tokens = np.full(len(text.windows), text.windows.shape[1] - prompt)
    rng = np.random.default_rng(0)
    both = [sorted(rows, key=lambda row: row["law"]["mean_passes"]) for rows in (token, digit)]
    passes = [np.array([row["law"]["mean_passes"] for row in rows]) for rows in both]
    nats = np.array([row["law"]["nats_of_sequences"] for rows in both for row in rows]).T  # (N, both curves)
    drawn = resampled(nats, tokens, text.units, rng)  # (RESAMPLES, both curves)
    curves = np.concatenate([nats.sum(0, keepdims=True) / tokens.sum(), drawn])
    for place, own in enumerate(passes[0]):
        needed = np.array([first_passes(each[len(token) :], passes[1], each[place]) for each in curves]) / own
        value, lowest = needed[0], passes[1][0] / own
        reached = "no" if not np.isfinite(value) else "at once" if value <= lowest else "yes"
        yield {
            "passes": float(own),
            "nats_per_token": float(curves[0, place]),
            "share": float(value) if np.isfinite(value) else None,
            "reached": reached,
            "interval_95": percentiles(needed[1:]),
        }


def first_passes(nats: np.ndarray, passes: np.ndarray, target: float) -> float:
    """The fewest passes at which a curve (P,) over rising passes (P,), linear in their logarithm, is at the target.

    The first of `passes` where it already is there, infinity where it never is.
    """
    if nats[0] <= target:
        return float(passes[0])
    for i in range(1, len(nats)):
        if nats[i] <= target:
            share = (nats[i - 1] - target) / (nats[i - 1] - nats[i])
            return float(np.exp(np.log(passes[i - 1]) + share * np.log(passes[i] / passes[i - 1])))
    return float("inf")


def frontiers(cells: Rows, reference: dict[str, Any] | None, units: np.ndarray) -> list[dict[str, Any]]:
    """The generative frontier (arXiv:2604.02718) of each sampler, and where it passes the entropy of real text.

    `at_real_entropy`: generative perplexity there, log-linear in entropy between the two temperatures around it; None
    where no two of the temperatures are around it. `interval_95`: samples and real texts are both resampled, the texts
    by the units (N,) that they are of; None too where over a twentieth of the resamples have no such temperatures.
    """
    if reference is None:
        return []
    found = []
    real = np.array(reference["0"]["entropy_of_samples"])
    drawn = resampled(real, np.ones(len(real)), units, np.random.default_rng(len(cells)))
    targets = np.concatenate([[reference["0"]["entropy"]["value"]], drawn])
    rows = [row for row in cells if row["samples"] is not None and row["prompt"] == 0]
    for model, sampler in dict.fromkeys((row["model"], row["sampler"]) for row in rows):
        own = [row for row in rows if (row["model"], row["sampler"]) == (model, sampler)]
        swept = {row["passes"] for row in own if row["temperature"] != 1}
        points = sorted((row for row in own if row["passes"] in swept), key=lambda row: row["temperature"])
        if len(points) < 2:
            continue
        values = [_resampled_point(row["samples"], place) for place, row in enumerate(points)]
        entropy, nats = (np.stack(each, axis=1) for each in zip(*values, strict=True))  # (1 + RESAMPLES, P)
        at = np.array([_crossing(*each) for each in zip(entropy, nats, targets, strict=True)])
        is_there = np.isfinite(at[0])
        usable = at[1:][np.isfinite(at[1:])]
        found.append(
            {
                "model": model,
                "sampler": sampler,
                "passes": points[0]["passes"],
                "temperatures": [row["temperature"] for row in points],
                "entropy": [row["samples"]["entropy"]["value"] for row in points],
                "generative_perplexity": [row["samples"]["generative_perplexity"]["value"] for row in points],
                "at_real_entropy": float(np.exp(at[0])) if is_there else None,
                "interval_95": np.exp(percentiles(usable)).tolist()
                if is_there and len(usable) >= 0.95 * RESAMPLES
                else None,
            }
        )
    return found


def _resampled_point(samples: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(entropy, judge's nats per token) of a set, (1 + RESAMPLES,) each: as it is, then resampled."""
    nats, entropies = (np.array(samples[f"{name}_of_samples"]) for name in ("nats", "entropy"))
    units, ones = np.arange(len(nats)), np.ones(len(nats))
    sizes = ones * samples["tokens_of_samples"]
    found = []
    for over, under in ((entropies, ones), (nats, sizes)):  # the same draws for both
        drawn = resampled(over, under, units, np.random.default_rng(seed))
        found.append(np.concatenate([[over.sum() / under.sum()], drawn]))
    return found[0], found[1]


def _crossing(entropy: np.ndarray, nats: np.ndarray, target: float) -> float:
    """nats where the polyline (entropy, nats) first crosses the entropy `target`; NaN where it does not."""
    for (e0, n0), (e1, n1) in itertools.pairwise(zip(entropy, nats, strict=True)):
        if min(e0, e1) <= target <= max(e0, e1) and e0 != e1:
            return float(n0 + (n1 - n0) * (target - e0) / (e1 - e0))
    return float("nan")
