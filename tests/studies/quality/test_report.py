"""Tables and pictures of a study, from results made by hand."""

import pytest

from prime_v2.studies.quality.plots import plot_quality
from prime_v2.studies.quality.report import (
    digit_rows,
    frontier_rows,
    law_rows,
    notes,
    render,
    set_rows,
    shown_passes,
    with_ends,
)

NAMES = ("generative_perplexity", "entropy", "distinct_2", "self_bleu", "repetition")


def cell(sampler: str, passes: int, value: float, method: str = "sampler", is_exact: bool = True) -> dict:
    mean_passes = passes - 0.5 if method == "sampler" else None
    law = {"method": method, "is_exact": is_exact, "draws": 0, "mean_passes": mean_passes}
    law |= {"nats_per_token": value, "interval_95": [value - 0.1, value + 0.1]}
    samples = {name: {"value": 2.0, "interval_95": [1.5, 2.5]} for name in NAMES}
    samples |= {"mean_passes": float(passes), "network_seconds": 1.0, "tokens_per_second": 1234.5}
    return {"model": "m", "sampler": sampler, "passes": passes, "temperature": 1.0, "prompt": 0, "law": law} | {
        "samples": samples
    }


@pytest.fixture
def results() -> dict:
    best = {"model": "m", "prompt": 0, "passes": 8, "best": "margin", "best_nats_per_token": 3.0, "is_exact": True}
    digits = {"model": "m", "prompt": 0, "rule": "margin", "passes": 8.0, "nats_per_token": 3.0}
    frontier = {"model": "m", "sampler": "margin", "passes": 8, "temperatures": [0.5, 1.0], "entropy": [1.0, 2.0]}
    frontier |= {"generative_perplexity": [3.0, 4.0]}
    return {
        "length": 8,
        "samples": 17,
        "prompt": None,
        "text": {"source": "docs, test side", "num_clusters": 9, "over": "documents"},
        "judge": {"name": "ARM", "family": "ARM", "chosen": "", "notes": ["The judge is one."]},
        "models": [{"name": "m", "family": "MDM", "parameters": 1000, "without": ["threshold: no"]}],
        "reference": {"0": {name: {"value": 1.0, "interval_95": None} for name in NAMES}},
        "best": [best | {"sampler": "entropy", "difference": 0.25, "interval_95": [0.125, 0.375]}],
        "digits": [
            digits | {"share": 0.5, "reached": "yes", "interval_95": [0.25, None]},
            digits | {"share": 0.5, "reached": "at once", "interval_95": [0.5, 0.5]},
            digits | {"share": None, "reached": "no", "interval_95": [None, None]},
        ],
        "frontiers": [
            frontier | {"at_real_entropy": 3.5, "interval_95": [3.0, 4.0]},
            frontier | {"at_real_entropy": None, "interval_95": None},
        ],
        "cells": [
            cell("margin", 8, 3.0),
            cell("entropy", 8, 3.25),
            cell("remasking", 8, 4.0, "subtoken", is_exact=False),
            cell("remasking", 4, 4.0, "subtoken", is_exact=False),
        ],
    }


def test_laws_are_exact_or_bounds_beside_their_difference_to_the_best(results):
    assert law_rows(results, 0) == [
        ["m", "margin", "7.5 of 8", "= 3.000 [2.900, 3.100]", "best"],
        ["m", "entropy", "7.5 of 8", "= 3.250 [3.150, 3.350]", "+0.250 [+0.125, +0.375]"],
        ["m", "remasking", "any (the model's own bound)", "≤ 4.000 [3.900, 4.100]", "–"],
    ], "a bound that does not depend on the passes stands once"
    assert law_rows(results, 4) == []


def test_passes_beyond_the_number_that_was_asked_for_say_what_it_counts():
    """Interpolating diffusion counts the steps of its first phase only."""
    shown = [shown_passes(8, mean) for mean in (None, 8.0, 7.5, 72.44)]
    assert shown == ["8", "8", "7.5 of 8", "72.4 (8 diffusion steps)"]


def test_sets_stand_below_real_text_and_nothing_is_shown_that_was_not_measured(results):
    real, first, *others = set_rows(results, 0)
    assert real == ["real text", "–", "–", "1", "1.00", "1.000", "1.000", "1.000", "–", "–", "–"]
    assert first[:4] == ["m", "margin", "8", "2 [1.5, 2.5]"] and first[-3:] == ["–", "1", "1,234"]
    assert len(others) == 3


def test_what_is_not_reached_is_said(results):
    assert [row[-1] for row in digit_rows(results)] == [
        "0.50 [0.25, never]",
        "at most 0.50 [0.50, 0.50]",
        "not reached",
    ]
    assert [row[-1] for row in frontier_rows(results)] == ["3.5 [3, 4]", "entropy 1.00 to 2.00 only"]
    assert with_ends(1.0, None, "{:.1f}".format) == "1.0"


def test_the_notes_name_the_judge_what_its_number_is_and_what_a_model_has_not(results):
    text = "\n".join(notes(results))
    for words in (
        "Judge: ARM (ARM)",
        "it is a perplexity of the judge",
        "The judge is one.",
        "m has no threshold: no",
    ):
        assert words in text
    assert text in render(results)
    assert "Judge" not in "\n".join(notes(results | {"judge": None}))


def test_a_sampler_without_a_law_is_in_no_panel_of_laws(results, tmp_path, monkeypatch):
    """As of a top_p that excludes tokens: real text has probability 0."""
    from prime_v2.studies.quality import plots

    seen = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: seen.append(figure) or path)
    without = {(row["model"], row["sampler"]) for row in results["cells"][:1]}
    cells = [row | {"law": None} if (row["model"], row["sampler"]) in without else row for row in results["cells"]]
    for some in (cells, [row | {"law": None} for row in cells]):
        plot_quality(results | {"cells": some}, tmp_path / "quality.png")
    assert len(seen[0].axes[0].lines) < 3 and not seen[1].axes[0].lines


@pytest.mark.parametrize("sampled", [True, False])
def test_the_picture_has_a_panel_for_each_comparison(results, sampled, tmp_path, monkeypatch):
    from prime_v2.studies.quality import plots

    seen = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: seen.append(figure) or path)
    changes = {} if sampled else {"reference": None, "frontiers": [], "judge": None}
    plot_quality(results | changes, tmp_path / "quality.png")
    (figure,) = seen
    assert len(figure.axes) == (4 if sampled else 1)
    law = figure.axes[0]
    assert [list(line.get_ydata()) for line in law.lines] == [[3.0], [3.25], [4.0, 4.0]]
    assert [list(line.get_xdata()) for line in law.lines] == [[7.5], [7.5], [4, 8]], "passes that were taken"
    if sampled:
        assert [line.get_ydata()[0] for line in figure.axes[2].lines if line.get_linestyle() == "--"] == [1.0]
