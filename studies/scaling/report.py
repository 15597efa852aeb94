"""Scaling fits, plans and efficiencies as text, for `prime-v2 scaling`."""

from operator import attrgetter
from typing import Any

from prime_v2.output.numbers import interval, quantity, three_digits
from prime_v2.output.tables import aligned
from prime_v2.studies.scaling.families import NOT_A_BOUND, FamilyFit
from prime_v2.studies.scaling.fit import PARAMETERS
from prime_v2.studies.scaling.isoflop import POWER_LAWS

THREE_DECIMALS, FOUR_DECIMALS = "{:.3f}".format, "{:.4f}".format


def render_fit(fit: FamilyFit) -> str:
    """A family's fits as text."""
    lines = [
        f"{fit.label}: {fit.points} points, {fit.flops[0]:.3g} to {fit.flops[1]:.3g} FLOPs, "
        f"N {quantity(fit.parameters[0])} to {quantity(fit.parameters[1])}, D {quantity(fit.tokens[0])} to "
        f"{quantity(fit.tokens[1])}; C = {fit.k:.3g} N D"
    ]
    if fit.law is not None:
        lines += _render_law(fit)
    if fit.isoflop is not None:
        lines += _render_isoflop(fit)
    return "\n".join([*lines, *(f"  note: {note}" for note in fit.notes)])


def _render_law(fit: FamilyFit) -> list[str]:
    law = fit.law
    samples = f", 95% intervals from {len(law.replicates):,} bootstrap samples" if len(law.replicates) else ""
    rows = [
        [name, three_digits(getattr(law.law, name)), interval(law.interval(attrgetter(name)))] for name in PARAMETERS
    ]
    of_n, of_d = law.law.exponents
    rows.append([f"N* ~ C^{of_n:.3f}", "", interval(law.interval(lambda each: each.exponents[0]), THREE_DECIMALS)])
    rows.append([f"D* ~ C^{of_d:.3f}", "", interval(law.interval(lambda each: each.exponents[1]), THREE_DECIMALS)])
    return [
        f"approach 3: L = E + A / N^a + B / D^b, nats per token{_mark(fit)}{samples}",
        aligned(rows, indent="  "),
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
        row += [quantity(each.parameters), interval(each.parameters_interval_95, quantity)]
        row += [quantity(each.tokens), interval(each.tokens_interval_95, quantity)]
        rows.append([*row, f"{each.loss:.3f}", interval(each.loss_interval_95, THREE_DECIMALS)])
    powers = []
    for name, law in fit.isoflop.power_laws.items():
        ends = interval(law.interval(lambda each: each.exponent), FOUR_DECIMALS)
        powers.append(f"{POWER_LAWS[name]} ~ C^{law.exponent:.4f} {ends}")
    return [
        "approach 2: minimum of a parabola in log N at each budget",
        aligned(rows, indent="  "),
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
        ("parameters", "N*, parameters", quantity),
        ("tokens", "D*, tokens", quantity),
        ("loss", "loss, nats/token", THREE_DECIMALS),
    ):
        row = [title, form(found[name]), interval(found[f"{name}_interval_95"], form)]
        if found["isoflop"]:
            other = found["isoflop"][name]
            row += [form(other["value"]), interval(other["interval_95"], form)]
        rows.append(row)
    return "\n".join(
        [
            f"{found['label']} at {found['flops']:.3g} FLOPs",
            aligned(rows, indent="  "),
            f"  nearest published shape: {shape['layers']} layers, hidden {shape['hidden_size']}, "
            f"{shape['heads']} heads, ffn {shape['intermediate_size']} ({quantity(shape['parameters'])}, N counted as "
            f"{shape['weights_per_layer']} hidden^2 layers)",
            f"  which this budget gives {quantity(shape['tokens'])} tokens, {shape['steps']:,} steps of "
            f"{shape['batch_sequences']} x {shape['sequence_length']}, to a loss of {shape['loss']:.3f} "
            f"{interval(shape['loss_interval_95'], THREE_DECIMALS)}".rstrip(),
            *(f"  note: {note}" for note in found["notes"]),
        ]
    )


def render_efficiency(results: dict[str, Any]) -> str:
    """The factors as text."""
    rows = [["FLOPs", "approach", f"loss of {results['family']}", "times the FLOPs", "", ""]]
    for row in results["rows"]:
        notes = "extrapolated: " + ", ".join(row["extrapolated"]) if row["extrapolated"] else ""
        factor = "infinite" if row["factor"] is None else three_digits(row["factor"])
        ends = interval(row["factor_interval_95"])
        rows.append([f"{row['flops']:.3g}", str(row["approach"]), f"{row['loss']:.3f}", factor, ends, notes])
    return "\n".join(
        [
            f"times the FLOPs that {results['other']} needs to reach the loss of {results['family']}, each at its "
            f"compute-optimal frontier, with 95% intervals",
            aligned(rows, indent="  "),
        ]
    )
