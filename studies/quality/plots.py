"""The picture of `prime-v2 quality`, drawn only from its results: quality against passes and time, and frontiers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prime_v2.output.figures import new_figure, save_figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H")
PANEL = (5.4, 4.0)  # inches
LEGEND_WIDTH = 3.0


def plot_quality(results: dict[str, Any], path: Path) -> Path:
    """Save a PNG. Colours are models and markers samplers; a bound has a hollow marker; bars are 95% intervals.

    Panels: exact nats per token of held-out text against passes; where texts were sampled also against seconds for
    1,000 tokens, generative perplexity against passes, and generative perplexity against entropy (temperature swept).
    """
    sampled = results["reference"] is not None
    draws = [_draw_law_by_passes, *([_draw_law_by_time, _draw_judged, _draw_frontiers] if sampled else [])]
    columns = min(2, len(draws))
    height = -(-len(draws) // columns) * PANEL[1] + 0.4
    figure = new_figure(columns * PANEL[0] + LEGEND_WIDTH, height, dpi=130)
    panels = figure.subplots(-(-len(draws) // columns), columns, squeeze=False).flatten().tolist()
    style = _Style(results)
    for axes, draw in zip(panels, draws, strict=True):
        draw(axes, results, style)
        axes.grid(alpha=0.25)
    figure.legend(handles=style.handles(sampled), loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(f"texts of {results['length']} tokens, {results['samples']} a set", fontsize=12, x=0.02, ha="left")
    return save_figure(figure, path)


class _Style:
    """Colours by model (by sampler where there is one model) and markers by sampler."""

    def __init__(self, results: dict[str, Any]):
        from matplotlib import colormaps

        self.models = [each["name"] for each in results["models"]]
        self.samplers = list(dict.fromkeys(each["sampler"] for each in results["cells"]))
        named = self.models if len(self.models) > 1 else self.samplers
        palette = colormaps["tab10" if len(named) <= 10 else "tab20"]
        self.colors = {name: palette(place % palette.N) for place, name in enumerate(named)}

    def of(self, model: str, sampler: str) -> dict[str, Any]:
        color = self.colors[model if len(self.models) > 1 else sampler]
        return {"color": color, "marker": MARKERS[self.samplers.index(sampler) % len(MARKERS)]}

    def handles(self, sampled: bool) -> list[Any]:
        from matplotlib.lines import Line2D

        single = len(self.models) == 1
        found = [] if single else [Line2D([], [], label=name, color=self.colors[name]) for name in self.models]
        for name in self.samplers:
            look = self.of(self.models[0], name) if single else {**self.of(self.models[0], name), "color": "0.3"}
            found.append(Line2D([], [], label=name, linestyle="-" if single else "none", **look))
        found.append(Line2D([], [], label="a bound", color="0.3", marker="o", fillstyle="none", linestyle="none"))
        return found + ([Line2D([], [], label="real text", color="0.2", linestyle="--")] if sampled else [])


def _lines(results: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(model, sampler, its cells at temperature 1 without a prompt, fewest passes first)."""
    cells = [each for each in results["cells"] if each["temperature"] == 1 and not each["prompt"]]
    return [
        (model, sampler, sorted((c for c in cells if (c["model"], c["sampler"]) == (model, sampler)), key=_passes_of))
        for model, sampler in dict.fromkeys((each["model"], each["sampler"]) for each in cells)
    ]


def _passes_of(cell: dict[str, Any]) -> float:
    for place in ("law", "samples"):
        if cell[place] is not None and cell[place]["mean_passes"] is not None:
            return float(cell[place]["mean_passes"])
    return float(cell["passes"])


def _draw_law_by_passes(axes: Any, results: dict[str, Any], style: _Style) -> None:
    for model, sampler, cells in _lines_with_law(results):
        _law_line(axes, [_passes_of(each) for each in cells], cells, style.of(model, sampler))
    axes.set(xlabel="passes a text", ylabel="nats per token of held-out text", xscale="log")
    _plain_powers(axes)


def _draw_law_by_time(axes: Any, results: dict[str, Any], style: _Style) -> None:
    for model, sampler, cells in _lines_with_law(results):
        seconds = [1000 / each["samples"]["tokens_per_second"] for each in cells]
        _law_line(axes, seconds, cells, style.of(model, sampler))
    axes.set(xlabel="seconds for 1,000 sampled tokens", ylabel="nats per token of held-out text", xscale="log")
    _plain_numbers(axes.xaxis)


def _lines_with_law(results: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Of the lines those of samplers that have a law: not of a top_p that excludes tokens."""
    for model, sampler, cells in _lines(results):
        if all(each["law"] is not None for each in cells):
            yield model, sampler, cells


def _law_line(axes: Any, x: Sequence[float], cells: Sequence[dict[str, Any]], look: dict[str, Any]) -> None:
    shown = [each["law"] for each in cells]
    values = [each["nats_per_token"] for each in shown]
    hollow = {} if shown[0]["is_exact"] else {"markerfacecolor": "none", "linestyle": ":"}
    axes.plot(x, values, markersize=5, linewidth=1.3, **look, **hollow)


def _draw_judged(axes: Any, results: dict[str, Any], style: _Style) -> None:
    for model, sampler, cells in _lines(results):
        found = [each["samples"]["generative_perplexity"] for each in cells]
        x = [each["samples"]["mean_passes"] for each in cells]
        values = [each["value"] for each in found]
        ends = [each["interval_95"] or [value, value] for each, value in zip(found, values, strict=True)]
        bars = [[v - low for v, (low, _) in zip(values, ends, strict=True)],
                [high - v for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
        axes.errorbar(x, values, yerr=bars, markersize=5, linewidth=1.3, capsize=2, **style.of(model, sampler))
    real = results["reference"]["0"]["generative_perplexity"]["value"]
    axes.axhline(real, color="0.2", linestyle="--", linewidth=1.2)
    axes.set(xlabel="passes a text", ylabel="generative perplexity (of the judge)", xscale="log", yscale="log")
    _plain_powers(axes)
    _plain_numbers(axes.yaxis)


def _draw_frontiers(axes: Any, results: dict[str, Any], style: _Style) -> None:
    for each in results["frontiers"]:
        look = style.of(each["model"], each["sampler"])
        axes.plot(each["entropy"], each["generative_perplexity"], markersize=4, linewidth=1.3, **look)
    real = results["reference"]["0"]
    at = (real["entropy"]["value"], real["generative_perplexity"]["value"])
    axes.axvline(at[0], color="0.2", linestyle="--", linewidth=1.2)
    axes.plot(*at, marker="*", color="0.2", markersize=13, linestyle="none")
    axes.set(xlabel="unigram entropy of a text, nats", ylabel="generative perplexity (of the judge)", yscale="log")
    _plain_numbers(axes.yaxis)


def _plain_powers(axes: Any) -> None:
    """Powers of two that lie within the x axis as its labels."""
    from matplotlib.ticker import NullFormatter, NullLocator

    low, high = axes.get_xlim()
    ticks = [2**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
