"""The picture of a run shows what the history holds."""

import struct

import numpy as np
import pytest
from matplotlib.figure import Figure

from prime_v2.training.loss_plot import _smooth, plot_training

HISTORY = [
    {"step": 10, "loss": 7.0, "tokens": 1_000_000, "epoch": 0.1},
    {"step": 20, "loss": 6.5, "tokens": 2_000_000},
    {"step": 20, "eval_bound": 6.8, "eval_bound_stderr": 0.1, "tokens": 2_000_000},
    {"step": 30, "loss": 6.2, "tokens": 3_000_000},
    {"step": 30, "eval_bound": 6.0, "eval_bound_stderr": None, "tokens": 3_000_000},
    {"train_runtime": 12.0, "step": 30},
]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure saved, which is still written."""
    saved, save = [], Figure.savefig

    def spy(figure, *arguments, **options):
        saved.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def test_picture_shows_loss_bound_and_unigram_entropy(tmp_path, figures):
    path = plot_training(HISTORY, tmp_path / "new" / "loss.png", unigram_entropy=6.5, title="tiny")
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (width, height) == (1200, 975)
    upper, lower = figures[0].axes
    assert (lower.get_xlabel(), lower.get_ylabel()) == ("training tokens (millions)", "nats per token")
    assert (upper.get_title(), upper.get_ylabel()) == ("tiny", "nats per token")
    lines = {line.get_label(): line.get_xydata() for axes in (upper, lower) for line in axes.lines}
    np.testing.assert_allclose(lines["training loss (not a bound)"], [[1, 7.0], [2, 6.5], [3, 6.2]])
    np.testing.assert_allclose(lines["unigram entropy of the held-out tokens (6.50)"][:, 1], 6.5)
    (bound,) = upper.containers
    np.testing.assert_allclose(bound[0].get_xydata(), [[2, 6.8], [3, 6.0]])
    np.testing.assert_allclose(np.diff(bound[2][0].get_segments()[0][:, 1]), 2 * 1.959964 * 0.1, rtol=1e-6)
    assert upper.get_ylim()[0] < 6.0 < 6.8 < upper.get_ylim()[1]
    assert lower.get_ylim()[0] < 6.2 < 7.0 < lower.get_ylim()[1]


@pytest.mark.parametrize("kept", ["loss", "eval_bound"])
def test_half_a_history_can_be_drawn(tmp_path, figures, kept):
    history = [entry for entry in HISTORY if kept in entry]
    path = plot_training(history, tmp_path / "loss.png", unigram_entropy=6.5, title="tiny", loss_is_bound=True)
    assert path.stat().st_size > 5000
    legends = [axes.get_legend() for axes in figures[0].axes]
    labels = {text.get_text() for legend in legends if legend for text in legend.get_texts()}
    assert ("training loss (a bound)" in labels) == (kept == "loss")


def test_smoothing_is_a_moving_average_that_narrows_at_the_start():
    values = np.random.default_rng(0).normal(size=200)
    half = 3  # 3% of 200, halved
    expected = [values[i - min(half, i) : i + min(half, i) + 1].mean() for i in range(200)]
    np.testing.assert_allclose(_smooth(values), expected)
    np.testing.assert_array_equal(_smooth(values[:1]), values[:1])


def test_nothing_to_draw_is_refused(tmp_path):
    path = tmp_path / "loss.png"
    for history in ([], [{"step": 1, "train_runtime": 3.0}], [{"step": 1, "loss": float("nan"), "tokens": 1}]):
        with pytest.raises(ValueError, match="neither a loss nor an eval_bound"):
            plot_training(history, path, unigram_entropy=6.5, title="tiny")
    with pytest.raises(ValueError, match="the history entry of step 4 has loss but no tokens"):
        plot_training([{"step": 4, "loss": 1.0}], path, unigram_entropy=6.5, title="tiny")
    assert not path.exists()
