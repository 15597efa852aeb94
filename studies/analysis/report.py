"""The results of `prime-v2 analyze` as text."""

from statistics import fmean
from typing import Any

from prime_v2.output.tables import aligned
from prime_v2.studies.analysis.spectra import KINDS

COLUMNS = (  # of the printed table: heading, statistic, format
    ("first", "first_position_mass", "{:.3f}"),
    ("top", "top_position_mass", "{:.3f}"),
    ("top in window", "top_in_window_mass", "{:.3f}"),
    ("self", "self_mass", "{:.3f}"),
    ("self ± 1", "neighbour_mass", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("relative", "relative_entropy", "{:.3f}"),
    ("distance", "mean_distance", "{:.1f}"),
)


def render(results: dict[str, Any]) -> str:
    """Two tables: spectra, means over layers, and attention, means over layers and heads."""
    text = results["text"]
    return "\n".join(
        [
            "spectra, means over layers; gaussian: a random matrix of the same shape",
            aligned(_spectra_rows(results)),
            "",
            f"attention, means over layers and heads, on windows of {text['window']:,} tokens of {text['source']}; "
            f"uniform: over all positions that a query sees",
            aligned(_attention_rows(results)),
        ]
    )


def _spectra_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = [["matrix", "model", "shape", "stable rank", "effective rank", "tail exponent"]]
    references = {(each["rows"], each["columns"]): each for each in results["gaussian"]}
    for kind in KINDS:
        shapes = []
        for model in results["models"]:
            found = [each for each in model["matrices"] if each["kind"] == kind]
            if found:
                shapes.append((found[0]["rows"], found[0]["columns"]))
                rows.append([kind, model["name"], *_spectrum_cells(found)])
        rows += [[kind, "gaussian", *_spectrum_cells([references[shape]])] for shape in sorted(set(shapes))]
    return rows


def _spectrum_cells(found: list[dict[str, Any]]) -> list[str]:
    exponents = [each["tail"]["exponent"] for each in found if each["tail"]]
    cells = [f"{found[0]['rows']} x {found[0]['columns']}"]
    for name in ("stable_rank", "effective_rank"):
        values = [each[name] for each in found if each[name] is not None]
        cells.append(f"{fmean(values):.1f}" if values else "-")
    return [*cells, f"{fmean(exponents):.2f}" if exponents else "-"]


def _attention_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = [["masked", "model", "windows", *(heading for heading, _, _ in COLUMNS)]]
    references: dict[str, dict[str, float]] = {}
    kinds = {model["name"]: model["model_type"] for model in results["models"]}
    states = [(state, model["name"]) for model in results["models"] for state in model["attention"]]
    for state, name in sorted(states, key=lambda each: each[0]["masked_share"] or 0.0):
        means = {each: fmean(map(fmean, state["statistics"][each]["mean"])) for _, each, _ in COLUMNS}
        share = state["masked_share"]
        shown = [form.format(means[each]) for _, each, form in COLUMNS]
        rows.append(["causal" if share is None else f"{share:g}", name, str(state["num_windows"]), *shown])
        kind = "uniform, causal" if share is None else "uniform"
        if kinds[name] == "prime_v2_interpolating":  # whose queries see what is known
            kind += f", {share:g} masked"
        references[kind] = state["uniform"]
    for name, each in references.items():
        rows.append(["", name, "", *(form.format(each[statistic]) for _, statistic, form in COLUMNS)])
    return rows
