"""The picture of a training run: its loss and the held-out bound against the tokens read."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime_v2.eval.intervals import half_width
from prime_v2.output.figures import new_figure, save_figure

SMOOTHED_SHARE = 0.03  # of the logged steps, the width of the moving average


def plot_training(
    history: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    unigram_entropy: float,
    title: str,
    loss_is_bound: bool = False,
) -> Path:
    """Save a PNG of the training loss (raw and smoothed) and the held-out bound, in nats per token, against tokens.

    history: as the Trainer's `state.log_history`; entries with `loss` and `tokens`, and entries with `eval_bound`,
        `eval_bound_stderr`, `eval_bound_degrees` (or None) and `tokens`; others are left out.
    unigram_entropy: of the held-out tokens, in nats, drawn as the line that a model without context cannot go below.
    loss_is_bound: whether the training loss is one; the label says so.
    Raises ValueError where nothing can be drawn, or an entry to be drawn has no `tokens`.
    """
    losses = _points(history, "loss")
    bounds = _points(history, "eval_bound")
    if not losses and not bounds:
        raise ValueError("the history has neither a loss nor an eval_bound to draw; log at least one step")

    figure = new_figure(8, 6.5, dpi=150)
    # Two panels: a loss that is no bound may lie far from the bound, and one scale would hide the bound's course.
    upper, lower = figure.subplots(2, 1, sharex=True)
    unit, name = _unit(max(entry["tokens"] for entry in [*losses, *bounds]))
    if bounds:
        _draw_bounds(upper, bounds, unit)
    upper.axhline(
        unigram_entropy,
        color="0.25",
        linestyle="--",
        linewidth=1.2,
        label=f"unigram entropy of the held-out tokens ({unigram_entropy:.2f})",
    )
    if losses:
        tokens = np.array([entry["tokens"] for entry in losses]) / unit
        values = np.array([entry["loss"] for entry in losses], dtype=float)
        kind = "a bound" if loss_is_bound else "not a bound"
        lower.plot(tokens, values, color="tab:blue", alpha=0.25, linewidth=0.8, label=f"training loss ({kind})")
        lower.plot(tokens, _smooth(values), color="tab:blue", linewidth=1.8, label="training loss, smoothed")
        lower.set_ylim(*_limits(values))
        lower.legend(loc="upper right", framealpha=0.9)
    upper.set(title=title, ylabel="nats per token")
    lower.set(xlabel=f"training tokens ({name})", ylabel="nats per token")
    lower.set_xlim(left=0)
    upper.legend(loc="upper right", framealpha=0.9)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    return save_figure(figure, path)


def _draw_bounds(axes: Any, bounds: list[dict[str, Any]], unit: float) -> None:
    axes.errorbar(
        [entry["tokens"] / unit for entry in bounds],
        [entry["eval_bound"] for entry in bounds],
        yerr=[half_width(entry.get("eval_bound_stderr"), entry.get("eval_bound_degrees")) for entry in bounds],
        color="tab:orange",
        marker="o",
        markersize=4,
        linewidth=1.4,
        capsize=3,
        label="held-out bound on -log p (95% interval)",
    )


def _points(history: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    points = [entry for entry in history if key in entry and math.isfinite(entry[key])]
    for entry in points:
        if "tokens" not in entry:
            raise ValueError(f"the history entry of step {entry.get('step')} has {key} but no tokens")
    return sorted(points, key=lambda entry: entry["tokens"])


def _unit(tokens: float) -> tuple[float, str]:
    """The divisor and its name for an axis that ends at `tokens`."""
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if tokens >= unit:
            return unit, name
    return 1.0, "number"


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average, centred. At the start, where a loss falls fast, it narrows; at the end it is one-sided."""
    half = round(SMOOTHED_SHARE * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    start, end = index - reach, np.minimum(index + reach + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def _limits(losses: np.ndarray) -> tuple[float, float]:
    """Limits of the y axis that show the smoothed loss and all but the outermost percent of the raw one."""
    smooth = _smooth(losses)
    low, high = min(np.percentile(losses, 0.5), smooth.min()), max(np.percentile(losses, 99.5), smooth.max())
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin
