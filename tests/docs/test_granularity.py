"""The figure of bounds against the number of digits shows what the record says."""

import pytest

from docs import granularity
from prime_v2.output import figures

NAMES = ("S = 1", "S = 4", "S = 4, shuffled", "S = 11, shuffled", "S = 11")


def results_of(names=NAMES) -> dict:
    best = [
        {
            "name": name,
            "bound": {"nats_per_token": 6.0 + place / 10, "interval_95": [5.9 + place / 10, 6.2 + place / 10]},
            "paper_loss": {"nats_per_token": 5.0 - place / 10},
            "unigram_entropy": 6.3,
        }
        for place, name in enumerate(names)
    ]
    return {"best": best}


def test_every_point_of_the_figure_is_the_records(tmp_path, monkeypatch):
    drawn = []

    def kept(*arguments, **options):
        drawn.append(figures.new_figure(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(granularity, "new_figure", kept)
    granularity.draw(results_of(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    losses = {
        form: lines[f"paper's loss, {form} (no bound)"].get_xydata().tolist() for form in ("unshuffled", "shuffled")
    }
    assert losses["unshuffled"] == [[1, 5.0], [4, 4.9], [11, 4.6]]
    assert losses["shuffled"] == [[1, 5.0], [4, 4.8], [11, 4.7]]
    bars = {each.get_label(): each for each in axes.containers}
    curve, _, (segments,) = bars["bound, digits shuffled"]
    assert curve.get_xydata().tolist() == [[1, 6.0], [4, 6.2], [11, 6.3]]
    assert segments.get_segments()[1].ravel().tolist() == pytest.approx([4, 6.1, 4, 6.4])


def test_a_run_of_another_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the run MDM is not named as in granularity"):
        granularity.draw(results_of(["MDM"]), tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()
