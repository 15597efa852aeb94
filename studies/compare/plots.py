"""The pictures of `prime-v2 compare`, drawn only from its results. All that they show are bounds or exact values."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prime_v2.eval.intervals import half_width
from prime_v2.output.figures import new_figure, save_figure
from prime_v2.output.numbers import quantity
from prime_v2.studies.compare.config import number

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SETTLED_SHARE = 0.25  # of a run, after which all of its points are within the axes; earlier ones may lie above them
ASIDE = 1.03  # factor between the places of two runs of the same size
LEGEND_ROWS = 24  # entries of a column of the legend
COUNT_LABELS = {"6nd": "training FLOPs (6 N D)", "measured": "training FLOPs (measured)"}
BOUND_LABEL = "nats per token (bound, or exact)"


def plot_comparison(results: dict[str, Any], folder: Path) -> list[Path]:
    """Save PNGs and return their paths: `curves.png`, and with several shapes `sizes.png`, else `bounds.png`.

    results: of `summarise`. Error bars are 95% intervals.
    """
    last = ("sizes.png", plot_sizes) if len(results["shapes"]) > 1 else ("bounds.png", plot_bounds)
    return [draw(results, folder / name) for name, draw in (("curves.png", plot_curves), last)]


def plot_curves(results: dict[str, Any], path: Path) -> Path:
    """The dev bound in the course of training against FLOPs and tokens, one line a run, one row of panels a shape."""
    shapes, budgets = results["shapes"], results["budgets"]
    figure, panels = _panels(len(shapes), 2, (5.2, 3.6))
    colors = _colors(results)
    for shape, pair in zip(shapes, panels, strict=True):
        rows = [row for row in results["rows"] if row["shape"] == shape and row["curve"]]
        for axes, x in zip(pair, ("flops", "tokens"), strict=True):
            for row in rows:
                marker = MARKERS[budgets.index(row["budget"]) % len(MARKERS)]
                _error_line(axes, row["curve"], x, "bound", color=colors[row["name"]], marker=marker)
            entropies = [row["dev_unigram_entropy"] for row in rows if row["dev_unigram_entropy"] is not None]
            if entropies:
                axes.axhline(entropies[0], color="0.3", linestyle=":", linewidth=1.2)
            axes.set(ylim=_settled_limits(rows, entropies[:1]))
            axes.set_xlabel(COUNT_LABELS[results["count"]] if x == "flops" else "training tokens")
            _log_axis(axes, number if x == "flops" else quantity)
        pair[0].set_ylabel(f"dev split, {BOUND_LABEL}" if len(shapes) == 1 else f"{shape}\nnats per token")
    handles = (
        _name_handles(results) + _budget_handles(budgets) + [_line("unigram entropy", color="0.3", linestyle=":")]
    )
    title = f"{results['comparison']}: held-out bound while training" + ("" if len(shapes) == 1 else " (dev split)")
    return _save(figure, handles, title, path)


def plot_sizes(results: dict[str, Any], path: Path) -> Path:
    """The test bound against the size of the network, one panel a budget."""
    budgets = results["budgets"]
    columns = min(3, len(budgets))
    figure, panels = _panels(-(-len(budgets) // columns), columns, (4.2, 3.6))
    colors = _colors(results)
    flat = [axes for row in panels for axes in row]
    for axes, budget in zip(flat, budgets, strict=False):
        groups = [group for group in results["groups"] if group["budget"] == budget]
        for place, name in enumerate(results["names"]):
            points = sorted(
                (each for each in groups if each["name"] == name), key=lambda each: each["parameters_non_embedding"]
            )
            aside = ASIDE ** (place - (len(results["names"]) - 1) / 2)  # so that intervals do not hide each other
            shown = [{"N": aside * each["parameters_non_embedding"], **_estimate(each["bound"])} for each in points]
            _error_line(axes, shown, "N", "value", color=colors[name], marker="o")
        axes.set(title=f"{number(budget)} FLOPs", xlabel="non-embedding parameters N")
        _log_axis(axes, quantity)
    for axes in flat[len(budgets) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_ylabel(f"test split,\n{BOUND_LABEL}")
    return _save(figure, _name_handles(results), f"{results['comparison']}: bound against size", path)


def plot_bounds(results: dict[str, Any], path: Path) -> Path:
    """The test bound of each run and its difference to the baseline, one row of panels a budget."""
    budgets, names = results["budgets"], results["names"]
    figure, panels = _panels(len(budgets), 2, (4.6, 0.9 + 0.32 * len(names)))
    colors = _colors(results)
    for budget, pair in zip(budgets, panels, strict=True):
        groups = {group["name"]: group for group in results["groups"] if group["budget"] == budget}
        for place, name in enumerate(names):
            group = groups.get(name)
            for axes, key in zip(pair, ("bound", "difference"), strict=True):
                if group is not None and group[key] is not None:
                    point = _estimate(group[key])
                    axes.errorbar(point["value"], place, xerr=point["half"], color=colors[name], marker="o", capsize=3)
        for axes in pair:
            axes.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
            axes.grid(alpha=0.25)
        pair[0].set_yticklabels(names)
        pair[1].tick_params(labelleft=False)
        pair[1].axvline(0, color="0.3", linestyle=":", linewidth=1.2)
        pair[0].set_xlabel(f"test split, {BOUND_LABEL}")
        pair[1].set_xlabel(f"minus {results['baseline']}, same sequences")
        if len(budgets) > 1:
            pair[0].set_title(f"{number(budget)} FLOPs", loc="left", fontsize=10)
    return _save(figure, [], f"{results['comparison']}: bounds with 95% intervals", path)


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[list[Any]]]:
    """An empty figure and its axes by rows; size: inches of a panel."""
    figure = new_figure(columns * size[0] + 2.2, rows * size[1] + 0.5, dpi=130)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _save(figure: Any, handles: list[Any], title: str, path: Path) -> Path:
    if handles:
        figure.legend(
            handles=handles,
            loc="outside right upper",
            frameon=False,
            ncols=-(-len(handles) // LEGEND_ROWS),
            fontsize=9,
        )
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")  # clear of the legend
    return save_figure(figure, path)


def _error_line(axes: Any, points: Sequence[dict[str, Any]], x: str, y: str, color: Any, marker: str) -> None:
    """A solid line of bounds with 95% intervals, from `half` or `stderr` of the points."""
    halves = [_half(each) for each in points]
    axes.errorbar(
        [each[x] for each in points],
        [each[y] for each in points],
        yerr=halves,
        color=color,
        marker=marker,
        markersize=3.5,
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
    )


def _half(point: dict[str, Any]) -> float:
    """Half of the 95% interval of a point: its `half`, or from its `stderr` and `degrees`."""
    return point["half"] if "half" in point else float(half_width(point["stderr"], point.get("degrees")))


def _log_axis(axes: Any, name: Callable[[float], str]) -> None:
    """A logarithmic x axis over what is drawn, with as many labels as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    labelled = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 2.7 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=labelled))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="both")


def _estimate(estimate: dict[str, Any]) -> dict[str, float]:
    """{"value", "half"}: an estimate and half of its 95% interval, 0 without one."""
    interval = estimate["interval_95"]
    half = 0.0 if interval is None else (interval[1] - interval[0]) / 2
    return {"value": estimate["nats_per_token"], "half": half}


def _settled_limits(rows: Sequence[dict[str, Any]], more: Sequence[float]) -> tuple[float, float]:
    """Limits of the y axis that hold all points but those of the beginning, where a bound may be far above."""
    values = list(more)
    for row in rows:
        end = row["curve"][-1]["tokens"]
        kept = [each for each in row["curve"] if each["tokens"] >= SETTLED_SHARE * end]
        values += [each["bound"] + sign * _half(each) for each in kept for sign in (-1, 1)]
    if not values:  # a run of so few steps that it was not evaluated
        return 0.0, 1.0
    margin = 0.05 * (max(values) - min(values)) or 0.5
    return min(values) - margin, max(values) + margin


def _colors(results: dict[str, Any]) -> dict[str, Any]:
    from matplotlib import colormaps

    names = results["names"]
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(place % palette.N) for place, name in enumerate(names)}


def _name_handles(results: dict[str, Any]) -> list[Any]:
    colors = _colors(results)
    return [_line(name, color=colors[name], marker="o", markersize=4) for name in results["names"]]


def _budget_handles(budgets: Sequence[float]) -> list[Any]:
    if len(budgets) == 1:
        return []
    return [
        _line(f"{number(budget)} FLOPs", color="0.3", linestyle="none", marker=MARKERS[place % len(MARKERS)])
        for place, budget in enumerate(budgets)
    ]


def _line(label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)
