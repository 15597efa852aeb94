"""The pictures of `prime-v2 analyze`, drawn only from its results (docs/analysis.md)."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from prime_v2.output.figures import new_figure, save_figure
from prime_v2.studies.analysis.spectra import KINDS, shown_ranks

MARGINS = (1.05, 0.15, 0.5, 0.4)  # of a figure, inches: left, right, bottom, top without the legend
LEGEND_ENTRY = (2.4, 0.24)  # inches: width, height
COLORS = ("tab:blue", "tab:orange")
MARKERS = ("o", "s")
LAYER_SHADES = (0.35, 1.0)  # opacity of the curves of the first and the last layer
LOWEST_VALUE = 1e-3  # of the largest singular value, where the curves are cut off
LOWEST_RANK = 3e-3  # stable rank / n at the foot of its axis, where no point is lower
EXPONENTS = (1.3, 30.0)  # ends of their axis; a tail steeper than that is that of a random matrix
EXPONENT_TICKS = (2, 3, 5, 10, 20)
GLOBAL = ("embedding", "head")  # no layers: two places on one axis
SPECTRUM_ROWS = ("stable_rank", "effective_rank", "tail")
STATISTIC_LABELS = {
    "first_position_mass": "on the first\nposition",
    "top_position_mass": "on the top\nposition",
    "top_in_window_mass": "on the top of\neach window",
    "neighbour_mass": "on itself ± 1",
    "relative_entropy": "entropy /\nuniform",
    "mean_distance": "mean distance\n(tokens)",
}


def plot_spectra(results: dict[str, Any], path: Path) -> Path:
    """Save a PNG: singular values of each matrix, then stable and effective rank and tail exponent by layer.

    results: of `prime-v2 analyze`; one or two models, told apart by colour, with Gaussian matrices of the same shapes.
    """
    models = results["models"]
    kinds = [kind for kind in KINDS if kind not in GLOBAL and any(_of_kind(each, kind) for each in models)]
    handles = _handles(models, "Gaussian, same shape (dotted, dashes)")
    figure, axes = _panels(handles, 1 + len(SPECTRUM_ROWS), len(kinds) + 1, (1.4, 1.35), (0.18, 0.5))
    references = {(each["rows"], each["columns"]): each for each in results["gaussian"]}
    for column, kind in enumerate([*kinds, None]):
        axes[0][column].set_title(kind or "embedding, head", fontsize=10)
        for number, model in enumerate(models):
            found = _of_kind(model, kind)
            _draw_curves(axes[0][column], found, references, COLORS[number])
            for number_row, name in enumerate(SPECTRUM_ROWS, 1):
                _draw_numbers(axes[number_row][column], found, references, name, number)
        for number, panels in enumerate(axes):
            _finish_spectrum_panel(panels[column], number, column, kind, models)
    _scale_numbers(axes)
    labels = ("singular value /\nlargest", "stable rank / n", "effective rank / n", "tail exponent")
    for row, label in zip(axes, labels, strict=True):
        row[0].set_ylabel(label)
    return save_figure(figure, path)


def _of_kind(model: dict[str, Any], kind: str | None) -> list[dict[str, Any]]:
    """Its matrices of a kind, by layer; None: embedding and head."""
    return [each for each in model["matrices"] if each["kind"] == kind or (kind is None and each["kind"] in GLOBAL)]


def _draw_curves(axes: Any, found: list[dict[str, Any]], references: dict[Any, Any], color: str) -> None:
    for number, each in enumerate(found):
        size = min(each["rows"], each["columns"])
        shade = np.interp(number, (0, max(1, len(found) - 1)), LAYER_SHADES)
        style = "--" if each["kind"] == "head" else "-"
        axes.plot(*_curve(each, size), color=color, alpha=shade, linewidth=1.1, linestyle=style)
    for shape in {(each["rows"], each["columns"]) for each in found}:
        axes.plot(*_curve(references[shape], min(shape)), color="0.3", linewidth=1, linestyle=":")


def _curve(matrix: dict[str, Any], size: int) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(matrix["singular_values"])
    return np.array(shown_ranks(size)) / size, values / (values[0] or 1.0)


def _draw_numbers(axes: Any, found: list[dict[str, Any]], references: dict[Any, Any], name: str, number: int) -> None:
    """A number of each matrix over its layer, or over `GLOBAL`; beside it, small, that of the Gaussian matrix."""
    places = [GLOBAL.index(each["kind"]) if each["layer"] is None else each["layer"] for each in found]
    offset = 0.12 * (2 * number - 1)
    for reference in (False, True):
        shown = [references[each["rows"], each["columns"]] if reference else each for each in found]
        points = [(place + offset, *_number(each, name)) for place, each in zip(places, shown, strict=True)]
        points = [each for each in points if each[1] is not None]
        if not points:
            continue
        x, y, error = (np.array(each, dtype=float) for each in zip(*points, strict=True))
        style: dict[str, Any] = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": "none"}
        if reference:
            style = {"color": "0.3", "marker": "_", "markersize": 7, "linestyle": "none"}
        errors = error if name == "tail" and not reference else None
        axes.errorbar(x, y, yerr=errors, **{"markersize": 4, "linewidth": 1.1, "capsize": 2, **style})


def _number(matrix: dict[str, Any], name: str) -> tuple[float | None, float]:
    """(value, standard error) of a row of the figure; ranks as a share of n."""
    if name == "tail":
        tail = matrix["tail"]
        return (tail["exponent"], tail["stderr"]) if tail else (None, 0.0)
    value = matrix[name]
    return None if value is None else value / min(matrix["rows"], matrix["columns"]), 0.0


def _finish_spectrum_panel(axes: Any, row: int, column: int, kind: str | None, models: list[dict[str, Any]]) -> None:
    if row == 0:
        axes.set(yscale="log", ylim=(LOWEST_VALUE, 1.5), xlim=(0, 1.02), xticks=[0, 0.5, 1], xlabel="rank / n")
        axes.set_xticklabels(["0", "0.5", "1"])
    elif kind is None:
        axes.set(xlim=(-0.5, 1.5), xticks=[0, 1], xticklabels=GLOBAL)
    else:
        _layer_axis(axes, models)
    if row == len(SPECTRUM_ROWS) and kind is not None:
        axes.set_xlabel("layer")
    if row == 0 and kind is None:
        axes.text(0.05, 0.05, "head: dashed", transform=axes.transAxes, fontsize=8)
    if column > 0:
        axes.tick_params(labelleft=False)
    axes.grid(alpha=0.25)


def _scale_numbers(axes: list[list[Any]]) -> None:
    """One scale for all panels of a row."""
    stable, effective, tail = axes[1:]
    lowest = min([LOWEST_RANK, *(each.dataLim.y0 / 1.5 for each in stable if each.has_data() and each.dataLim.y0 > 0)])
    for each in stable:
        each.set(yscale="log", ylim=(lowest, 1.3))
    for each in effective:
        each.set_ylim(0, 1.05)
    for each in tail:
        each.set(yscale="log", ylim=EXPONENTS)
        each.set_yticks(EXPONENT_TICKS, map(str, EXPONENT_TICKS))
        each.set_yticks([], minor=True)


def plot_attention(results: dict[str, Any], path: Path) -> Path:
    """Save a PNG: each head's attention by layer, a row for each statistic, a column for each state of the text."""
    models = results["models"]
    # A causal model stands beside the clean state of a masked one.
    columns = sorted({state["masked_share"] or 0.0 for model in models for state in model["attention"]})
    handles = _handles(models, "uniform over what a query sees", "mean over heads")
    figure, axes = _panels(handles, len(STATISTIC_LABELS), len(columns), (2.6, 1.1), (0.55, 0.35))
    for column, share in enumerate(columns):
        axes[0][column].set_title(f"masked share {share:g}" if share else "clean text", fontsize=10)
        for row, (name, label) in enumerate(STATISTIC_LABELS.items()):
            states = {
                number: state
                for number, model in enumerate(models)
                for state in model["attention"]
                if (state["masked_share"] or 0.0) == share
            }
            several = len({state["uniform"][name] for state in states.values()}) > 1
            for number, state in states.items():
                _draw_heads(axes[row][column], state, name, number)
                color = COLORS[number] if several else "0.3"
                axes[row][column].axhline(state["uniform"][name], color=color, linewidth=1, linestyle=":")
            if column == 0:
                axes[row][0].set_ylabel(label)
        axes[-1][column].set_xlabel("layer")
    for panels in axes:
        _share_limits(panels)
        for each in panels:
            _layer_axis(each, models)
            each.grid(alpha=0.25)
    return save_figure(figure, path)


def _draw_heads(axes: Any, state: dict[str, Any], name: str, number: int) -> None:
    offset = 0.12 * (2 * number - 1)
    layers = np.array(state["layers"]) + offset
    heads = np.array(state["statistics"][name]["mean"])  # (layers, heads)
    x = np.repeat(layers, heads.shape[1])
    axes.scatter(x, heads.flatten(), s=11, color=COLORS[number], marker=MARKERS[number], alpha=0.55, linewidths=0)
    axes.plot(layers, heads.mean(1), color=COLORS[number], linewidth=1.3)


def _share_limits(panels: list[Any]) -> None:
    high = 1.06 * max(each.dataLim.y1 for each in panels)
    for each in panels:
        each.set_ylim(0, high)


def _layer_axis(axes: Any, models: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(layer for model in models for layer in model["attention"][0]["layers"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlim(-0.5, last + 0.5)


def _panels(
    handles: list[Any], rows: int, columns: int, size: tuple[float, float], gap: tuple[float, float]
) -> tuple[Any, list[Any]]:
    """An empty figure with a legend, and its axes by rows; inches: size of a panel, gaps between two."""
    left, right, bottom, top = MARGINS
    width = left + right + columns * size[0] + (columns - 1) * gap[0]
    entry = max(LEGEND_ENTRY[0], 0.6 + 0.058 * max(len(each.get_label()) for each in handles))
    in_a_row = max(1, min(len(handles), int(width // entry)))
    top += LEGEND_ENTRY[1] * math.ceil(len(handles) / in_a_row)
    height = bottom + top + rows * size[1] + (rows - 1) * gap[1]
    # Measured out, not "constrained", which takes seconds for this many panels.
    figure = new_figure(width, height, dpi=120, layout=None)
    figure.legend(handles=handles, loc="upper center", ncols=in_a_row, frameon=False)
    space = {"wspace": gap[0] / size[0], "hspace": gap[1] / size[1]}
    edges = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=space | edges)
    figure.align_ylabels(axes[:, 0])
    return figure, axes.tolist()


def _handles(models: list[dict[str, Any]], reference: str, line: str | None = None) -> list[Any]:
    """Entries of the legend: the models, what is dotted, and what a line is."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLORS[number], marker=MARKERS[number], linestyle="none", label=model["name"])
        for number, model in enumerate(models)
    ]
    handles.append(Line2D([], [], color="0.3", linestyle=":", label=reference))
    return handles if line is None else [*handles, Line2D([], [], color="0.3", label=line)]
