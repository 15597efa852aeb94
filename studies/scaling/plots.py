"""Pictures of scaling fits: for each family the loss envelope, the isoFLOP curves and the isoloss contours."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prime_v2.eval.intervals import half_width
from prime_v2.output.figures import new_figure, save_figure
from prime_v2.studies.scaling.families import FamilyFit
from prime_v2.studies.scaling.isoflop import group_budgets
from prime_v2.studies.scaling.points import Point

WIDER = 1.6  # factor by which axes and curves reach past the points
CONTOURS = 22
FRONTIER = {"color": "black", "linewidth": 1.6}
MINIMUM = {"color": "black", "marker": "*", "linestyle": "none", "markersize": 9}


def plot_families(families: Sequence[tuple[FamilyFit, Sequence[Point]]], path: str | os.PathLike[str]) -> Path:
    """Save a figure with one row of three panels a family: fits with the points that they were made from.

    The format is that of the suffix. Error bars are 95% intervals of points whose standard error is known.
    """
    if not families:
        raise ValueError("there is no family to draw")
    figure = new_figure(16, 4.9 * len(families), dpi=85)
    rows = figure.subplots(len(families), 3, squeeze=False)
    for (fit, points), (envelope, isoflop, isoloss) in zip(families, rows, strict=True):
        _draw_envelope(envelope, fit, points)
        _draw_isoflop(isoflop, fit, points)
        _draw_isoloss(isoloss, fit, points)
        for axes in (envelope, isoflop, isoloss):
            axes.grid(alpha=0.25)
    return save_figure(figure, path)


def _loss_label(fit: FamilyFit) -> str:
    return "nats per token" if fit.is_bound else "nats per token (not a bound)"


def _span(values: Sequence[float] | tuple[float, float]) -> np.ndarray:
    """200 values from a little below the smallest to a little above the largest, evenly in the log."""
    return np.geomspace(min(values) / WIDER, max(values) * WIDER, 200)


def _column(points: Sequence[Point], name: str) -> np.ndarray:
    return np.array([getattr(point, name) for point in points], dtype=float)


def _error_bars(axes: Any, points: Sequence[Point], x: str) -> None:
    known = [point for point in points if point.stderr is not None]
    if known:
        degrees = [math.inf if point.degrees is None else point.degrees for point in known]
        errors = half_width(_column(known, "stderr"), np.array(degrees))
        axes.errorbar(
            _column(known, x), _column(known, "loss"), yerr=errors, fmt="none", ecolor="0.4", capsize=2, zorder=2
        )


def _draw_envelope(axes: Any, fit: FamilyFit, points: Sequence[Point]) -> None:
    """Loss against FLOPs, points coloured by size, with the frontiers of both approaches."""
    from matplotlib.colors import LogNorm

    sizes = _column(points, "parameters")
    norm = LogNorm(sizes.min(), sizes.max())
    _error_bars(axes, points, "flops")
    dots = axes.scatter(
        _column(points, "flops"), _column(points, "loss"), c=sizes, norm=norm, cmap="viridis", s=22, zorder=3
    )
    axes.figure.colorbar(dots, ax=axes, label="N", pad=0.01)
    flops = _span(fit.flops)
    if fit.law is not None:
        axes.plot(flops, fit.law.law.frontier(flops), label="frontier, approach 3", zorder=4, **FRONTIER)
    if fit.isoflop is not None and "loss" in fit.isoflop.power_laws:
        line = fit.isoflop.power_laws["loss"].at(flops)
        axes.plot(flops, line, label="isoFLOP minima, approach 2", color="tab:red", linestyle="--", zorder=4)
    axes.set_xscale("log")
    axes.set(title=f"{fit.label}: loss envelope", xlabel="training FLOPs C", ylabel=_loss_label(fit))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=9)


def _draw_isoflop(axes: Any, fit: FamilyFit, points: Sequence[Point]) -> None:
    """Loss against size at each budget, with the parabolas and their minima."""
    from matplotlib import colormaps

    groups = group_budgets(_column(points, "flops"))
    curves = {} if fit.isoflop is None else {each.flops: each for each in fit.isoflop.parabolas}
    colours = colormaps["plasma"](np.linspace(0.0, 0.85, len(groups)))
    _error_bars(axes, points, "parameters")
    for group, colour in zip(groups, colours, strict=True):
        chosen = [points[i] for i in group]
        budget = float(np.median(_column(chosen, "flops")))
        sizes, loss = _column(chosen, "parameters"), _column(chosen, "loss")
        axes.plot(
            sizes, loss, linestyle="none", marker="o", markersize=4, color=colour, label=f"{budget:.3g}", zorder=3
        )
        curve = curves.get(budget)
        if curve is not None:
            reach = np.geomspace(sizes.min() / 1.15, sizes.max() * 1.15, 200)
            axes.plot(reach, curve.at(reach), color=colour, linewidth=1.2)
            if curve.inside:
                axes.plot(curve.parameters, curve.loss, zorder=4, **MINIMUM)
    axes.set_xscale("log")
    xlabel = "non-embedding parameters N"
    axes.set(title=f"{fit.label}: isoFLOP curves", xlabel=xlabel, ylabel=_loss_label(fit))
    # The curves of the larger budgets lie lower and further right: the upper right corner is the empty one.
    axes.set_xlim(right=_column(points, "parameters").max() * 4)
    axes.legend(title="FLOPs", loc="upper right", fontsize=9)


def _draw_isoloss(axes: Any, fit: FamilyFit, points: Sequence[Point]) -> None:
    """Contours of the fitted loss over FLOPs and size, the efficient frontier, and the isoFLOP minima."""
    flops, sizes = _span(fit.flops), _span(fit.parameters)
    if fit.law is not None:
        law = fit.law.law
        grid_c, grid_n = np.meshgrid(flops, sizes)
        loss = law.loss(grid_n, grid_c / (law.k * grid_n))
        # Losses of the frontier, so that along it the contours are evenly spaced.
        levels = np.sort(law.frontier(np.geomspace(flops[0] / 30, flops[-1], CONTOURS)))
        lines = axes.contour(grid_c, grid_n, loss, levels=levels, cmap="viridis", linewidths=1.0)
        for text in axes.clabel(lines, levels=levels[::2], fmt="%.2f", fontsize=8, colors="black", inline=False):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        axes.plot(flops, law.allocate(flops)[0], label="efficient frontier, approach 3", **FRONTIER)
    axes.plot(_column(points, "flops"), _column(points, "parameters"), ".", color="0.55", markersize=4, label="points")
    if fit.isoflop is not None:
        found = [each for each in fit.isoflop.parabolas if each.inside]
        axes.plot(
            [each.flops for each in found], [each.parameters for each in found], label="isoFLOP minima", **MINIMUM
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlim=(flops[0], flops[-1]), ylim=(sizes[0], sizes[-1]))
    axes.set(title=f"{fit.label}: isoloss contours", xlabel="training FLOPs C", ylabel="non-embedding parameters N")
    axes.legend(loc="lower right", fontsize=9, framealpha=1.0)
