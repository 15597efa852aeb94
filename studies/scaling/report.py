"""The work of `prime-v2 scaling`: read points or a record, fit, print, and perhaps record."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from prime_v2.output.places import print_and_record
from prime_v2.output.progress import progress_bar
from prime_v2.output.records import code_version, make_record, read_record
from prime_v2.studies.scaling.families import (
    NOT_A_BOUND,
    POWER_LAWS,
    FamilyFit,
    choose_families,
    common_budgets,
    compare,
    fit_families,
    from_json,
    plan,
    require_bounds,
    to_json,
)
from prime_v2.studies.scaling.fit import PARAMETERS
from prime_v2.studies.scaling.points import PUBLISHED, Point, read_points

FIT = "scaling_fit"
APPROACHES = {"both": (2, 3), "2": (2,), "3": (3,)}
FIGURES = (".png", ".pdf", ".svg")


@dataclass
class Selection:
    """What is fitted and how, as the command line names it. fit: a record of `scaling fit` instead of points."""

    sources: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    loss: str = "bound"
    count: str = "6nd"
    approach: str = "both"
    bootstrap: int = 1000
    seed: int = 0
    allow_mixed: bool = False
    fit: Path | None = None

    def points(self) -> list[Point]:
        return read_points(self.sources or [PUBLISHED], loss=self.loss, count=self.count)

    def fits(self) -> tuple[dict[str, FamilyFit], list[str]]:
        """The fits, made or read, and sentences about families that are left out."""
        if self.fit is not None:
            return self._recorded(), []
        points = self.points()
        with progress_bar("bootstrap samples") as show:
            return fit_families(
                points,
                self.families,
                approaches=APPROACHES[self.approach],
                bootstrap=self.bootstrap,
                seed=self.seed,
                allow_mixed=self.allow_mixed,
                progress=show,
            )

    def _recorded(self) -> dict[str, FamilyFit]:
        if self.sources:
            raise ValueError("--fit and SOURCE both say what to use; leave one out")
        record = read_record(self.fit)
        try:
            found = {name: from_json(each) for name, each in record["results"]["families"].items()}
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(
                f"{self.fit} is no record of prime-v2 scaling fit; give one that its --output wrote"
            ) from None
        names = {name.casefold(): name for name in found}
        unknown = [each for each in self.families if each.casefold() not in names]
        if unknown:
            raise ValueError(f"{self.fit} has no fit of {unknown[0]}; it has {', '.join(found)}")
        kept = [names[each.casefold()] for each in self.families] or list(found)
        return {name: found[name] for name in kept}


def run_fit(selection: Selection, as_json: bool, output: Path | None) -> None:
    """`prime-v2 scaling fit`."""
    code = code_version()
    fits, left_out = selection.fits()
    results = {
        "loss": selection.loss,
        "count": selection.count,
        "bootstrap": selection.bootstrap,
        "allow_mixed": selection.allow_mixed,
        "left_out": left_out,
        "families": {name: to_json(fit) for name, fit in fits.items()},
    }
    if not as_json:
        _say(left_out)
    text = "\n\n".join(render_fit(fit) for fit in fits.values())
    record = partial(make_record, FIT, results, seed=selection.seed, code=code)
    print_and_record(_json(results) if as_json else text, output, record)


def run_plot(selection: Selection, figure: Path, as_json: bool) -> None:
    """`prime-v2 scaling plot`."""
    from prime_v2.studies.scaling.plots import plot_families

    if figure.suffix not in FIGURES:
        raise ValueError(f"--figure {figure} must end with {', '.join(FIGURES)}")
    points = selection.points()
    chosen, _ = choose_families(points, selection.families)
    fits, left_out = selection.fits()
    plot_families([(fits[name], chosen[name]) for name in fits], figure)
    if as_json:
        print(json.dumps({"figure": str(figure), "families": [fit.label for fit in fits.values()]}))
    else:
        _say(left_out)
        print(f"wrote {figure}: {', '.join(fit.label for fit in fits.values())}")


def run_plan(selection: Selection, budgets: list[float], as_json: bool, output: Path | None) -> None:
    """`prime-v2 scaling plan`."""
    _check_budgets(budgets)
    code = code_version()
    fits, left_out = selection.fits()
    plans = [plan(fit, flops) for fit in fits.values() for flops in budgets]
    results = {"left_out": left_out, "plans": plans}
    if not as_json:
        _say(left_out)
    text = "\n\n".join(render_plan(each) for each in plans)
    record = partial(make_record, "scaling_plan", results, seed=selection.seed, code=code)
    print_and_record(_json(results) if as_json else text, output, record)


def run_efficiency(
    selection: Selection, names: tuple[str, str], budgets: list[float], as_json: bool, output: Path | None
) -> None:
    """`prime-v2 scaling efficiency`."""
    _check_budgets(budgets)
    if names[0].casefold() == names[1].casefold():
        raise ValueError(f"{names[0]} and {names[1]} are one family; give two")
    code = code_version()
    selection.families = list(names)
    if selection.fit is None:  # before the fits: which of them is a bound decides whether there is anything to do
        kinds = {point.family.casefold(): point.is_bound for point in selection.points()}
        require_bounds((name, kinds.get(name.casefold(), True)) for name in names)
    fits, _ = selection.fits()
    first, second = fits
    rows = compare(fits, (first, second), budgets or common_budgets(fits[first], fits[second]))
    results = {"family": first, "other": second, "rows": rows}
    record = partial(make_record, "scaling_efficiency", results, seed=selection.seed, code=code)
    print_and_record(_json(results) if as_json else render_efficiency(results), output, record)


def _check_budgets(budgets: list[float]) -> None:
    for each in budgets:
        if not (math.isfinite(each) and each > 0):
            raise ValueError(f"--flops {each} must be a number above 0, such as 3e20")


def _json(results: dict[str, Any]) -> str:
    return json.dumps(results, ensure_ascii=False, allow_nan=False)


def _say(sentences: list[str]) -> None:
    for each in sentences:
        print(each, file=sys.stderr)


# ------------------------------------------------------------------------------------------------- text


def short(value: float) -> str:
    """A count in three digits: 25M, 1.23B, 40.6B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit * 0.9995:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def number(value: float) -> str:
    """Three digits, without an exponent: 0.0395, 12.3, 17800."""
    return f"{value:.3g}" if value < 100 else f"{float(f'{value:.3g}'):.0f}"


def between(interval: list[float | None] | None, form: Callable[[float], str] = number) -> str:
    """[low, high]; nothing without an interval, "inf" for an infinite end."""
    if interval is None:
        return ""
    return "[{}, {}]".format(*("inf" if end is None else form(end) for end in interval))


def columns(rows: list[list[str]], indent: str = "  ") -> list[str]:
    """Lines of left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [indent + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def render_fit(fit: FamilyFit) -> str:
    """A family's fits as text."""
    lines = [
        f"{fit.label}: {fit.points} points, {fit.flops[0]:.3g} to {fit.flops[1]:.3g} FLOPs, "
        f"N {short(fit.parameters[0])} to {short(fit.parameters[1])}, D {short(fit.tokens[0])} to "
        f"{short(fit.tokens[1])}; C = {fit.k:.3g} N D"
    ]
    if fit.law is not None:
        lines += _render_law(fit)
    if fit.isoflop is not None:
        lines += _render_isoflop(fit)
    return "\n".join([*lines, *(f"  note: {note}" for note in fit.notes)])


def _render_law(fit: FamilyFit) -> list[str]:
    law = fit.law
    samples = f", 95% intervals from {len(law.replicates):,} bootstrap samples" if len(law.replicates) else ""
    rows = [[name, number(getattr(law.law, name)), between(law.interval(attrgetter(name)))] for name in PARAMETERS]
    of_n, of_d = law.law.exponents
    rows.append([f"N* ~ C^{of_n:.3f}", "", between(law.interval(lambda each: each.exponents[0]), "{:.3f}".format)])
    rows.append([f"D* ~ C^{of_d:.3f}", "", between(law.interval(lambda each: each.exponents[1]), "{:.3f}".format)])
    return [
        f"approach 3: L = E + A / N^a + B / D^b, nats per token{_mark(fit)}{samples}",
        *columns(rows),
        f"  residuals of log L: rms {law.rms:.4f}, largest {law.largest:.4f}; {law.starts_at_optimum} of {law.starts} "
        f"starts end in this optimum",
        *(f"  note: {note}" for note in law.notes),
    ]


def _render_isoflop(fit: FamilyFit) -> list[str]:
    rows = [["FLOPs", "sizes", "N*", "", "D*", "", f"loss{_mark(fit)}", ""]]
    for each in fit.isoflop.parabolas:
        row = [f"{each.flops:.3g}", str(each.sizes)]
        if each.parameters is None:
            rows.append([*row, "no minimum", "", "", "", "", ""])
            continue
        row += [short(each.parameters), between(each.parameters_interval_95, short)]
        row += [short(each.tokens), between(each.tokens_interval_95, short)]
        rows.append([*row, f"{each.loss:.3f}", between(each.loss_interval_95, "{:.3f}".format)])
    powers = []
    for name, law in fit.isoflop.power_laws.items():
        ends = between(law.interval(lambda each: each.exponent), "{:.4f}".format)
        powers.append(f"{POWER_LAWS[name]} ~ C^{law.exponent:.4f} {ends}")
    return [
        "approach 2: minimum of a parabola in log N at each budget",
        *columns(rows),
        *(f"  {power.rstrip()}" for power in powers),
        *(f"  note: {note}" for note in fit.isoflop.notes),
    ]


def _mark(fit: FamilyFit) -> str:
    return "" if fit.is_bound else f" ({NOT_A_BOUND})"


def render_plan(found: dict[str, Any]) -> str:
    """A plan as text."""
    shape = found["shape"]
    rows = [["", "approach 3", "", "approach 2", ""]] if found["isoflop"] else []
    for name, title, form in (
        ("parameters", "N*, parameters", short),
        ("tokens", "D*, tokens", short),
        ("loss", "loss, nats/token", "{:.3f}".format),
    ):
        row = [title, form(found[name]), between(found[f"{name}_interval_95"], form)]
        if found["isoflop"]:
            other = found["isoflop"][name]
            row += [form(other["value"]), between(other["interval_95"], form)]
        rows.append(row)
    return "\n".join(
        [
            f"{found['label']} at {found['flops']:.3g} FLOPs",
            *columns(rows),
            f"  nearest published shape: {shape['layers']} layers, hidden {shape['hidden_size']}, "
            f"{shape['heads']} heads, ffn {shape['intermediate_size']} ({short(shape['parameters'])}, N counted as "
            f"{shape['weights_per_layer']} hidden^2 layers)",
            f"  which this budget gives {short(shape['tokens'])} tokens, {shape['steps']:,} steps of "
            f"{shape['batch_sequences']} x {shape['sequence_length']}, to a loss of {shape['loss']:.3f} "
            f"{between(shape['loss_interval_95'], '{:.3f}'.format)}".rstrip(),
            *(f"  note: {note}" for note in found["notes"]),
        ]
    )


def render_efficiency(results: dict[str, Any]) -> str:
    """The factors as text."""
    rows = [["FLOPs", "approach", f"loss of {results['family']}", "times the FLOPs", "", ""]]
    for row in results["rows"]:
        notes = "extrapolated: " + ", ".join(row["extrapolated"]) if row["extrapolated"] else ""
        factor = "infinite" if row["factor"] is None else number(row["factor"])
        ends = between(row["factor_interval_95"])
        rows.append([f"{row['flops']:.3g}", str(row["approach"]), f"{row['loss']:.3f}", factor, ends, notes])
    return "\n".join(
        [
            f"times the FLOPs that {results['other']} needs to reach the loss of {results['family']}, each at its "
            f"compute-optimal frontier, with 95% intervals",
            *columns(rows),
        ]
    )


__all__ = ["Selection", "run_efficiency", "run_fit", "run_plan", "run_plot"]
