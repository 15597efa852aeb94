"""Tables of docs/scaling.md, from the records of `prime-v2 scaling fit`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prime_v2.output.numbers import interval, quantity, three_digits
from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown

PUBLISHED, PUBLISHED_PRIME, OWN = "scaling_published.json", "scaling_published_prime_v2.json", "scaling_isoflop.json"
STUDY = "scaling_study.json"
Pairs = tuple[tuple[str, str], ...]


def law_table(file: str, results: Path) -> str:
    """Approach 3."""
    return _laws(read_record(results / file))


def minima_table(file: str, results: Path) -> str:
    """Approach 2."""
    return _minima(read_record(results / file))


def efficiency_table(file: str, pairs: Pairs, results: Path) -> str:
    """FLOPs that the second family of each pair needs for the loss of the first, at budgets that both have."""
    from prime_v2.studies.scaling.families import common_budgets, compare
    from prime_v2.studies.scaling.fit_records import from_json

    record = read_record(results / file)
    fits = {name: from_json(each) for name, each in record["results"]["families"].items()}
    rows = []
    for names in pairs:
        for row in compare(fits, names, common_budgets(*(fits[name] for name in names))):
            factor = "infinite" if row["factor"] is None else three_digits(row["factor"])
            rows.append(
                [
                    f"{names[0]} at {row['flops']:.3g} FLOPs",
                    f"{row['approach']}",
                    f"{row['loss']:.3f}",
                    f"{names[1]}: {factor} {interval(row['factor_interval_95'])}",
                    "yes" if row["extrapolated"] else "no",
                ]
            )
    heads = ["loss to reach", "approach", "nats/token", "times the FLOPs [95%]", "extrapolated"]
    return markdown(heads, rows) + f"\n{_conditions(record)}"


def not_a_bound_table(results: Path) -> str:
    """Both approaches for the published training loss of MDM-Prime-v2, marked as no bound."""
    record = read_record(results / PUBLISHED_PRIME)
    return f"{_laws(record)}\n{_minima(record)}"


def _laws(record: dict[str, Any]) -> str:
    rows = []
    for family in record["results"]["families"].values():
        law = family["approach_3"]
        cells = [
            f"{three_digits(law[name]['value'])} {interval(law[name]['interval_95'])}"
            for name in ("E", "A", "B", "a", "b", "parameters_exponent", "tokens_exponent")
        ]
        rows.append([family["label"], *cells, f"{law['residual_rms_log']:.4f}", f"{family['points']}"])
    heads = ["family", "E", "A", "B", "a", "b", "N* ~ C^", "D* ~ C^", "rms of log L", "points"]
    return markdown(heads, rows) + f"\n{_conditions(record)}"


def _minima(record: dict[str, Any]) -> str:
    rows = []
    for family in record["results"]["families"].values():
        for budget in family["approach_2"]["budgets"]:
            cells = ["no minimum", "–", "–"]
            if budget["parameters"] is not None:
                cells = [
                    f"{form(budget[name])} {interval(budget[f'{name}_interval_95'], form)}"
                    for name, form in (("parameters", quantity), ("tokens", quantity), ("loss", "{:.3f}".format))
                ]
            rows.append([family["label"], f"{budget['flops']:.3g}", f"{budget['sizes']}", *cells])
        power = family["approach_2"]["power_laws"]
        if not power:
            continue
        laws = [
            f"C^{power[name]['exponent']:.3f} {interval(power[name]['exponent_interval_95'], '{:.3f}'.format)}"
            for name in ("parameters", "tokens", "loss")
        ]
        rows.append([family["label"], "power law", "", *laws])
    heads = ["family", "FLOPs", "sizes", "N* [95%]", "D* [95%]", "loss, nats/token [95%]"]
    return markdown(heads, rows) + f"\n{_conditions(record)}"


def _conditions(record: dict[str, Any]) -> str:
    samples = record["results"]["bootstrap"]
    return f"`{record['command']}` ({samples:,} bootstrap samples, seed {record['seed']}).\n"


TABLES: dict[str, Callable[[Path], str]] = {
    "scaling_law": partial(law_table, PUBLISHED),
    "scaling_minima": partial(minima_table, PUBLISHED),
    "scaling_efficiency": partial(efficiency_table, PUBLISHED, (("MDM", "ARM"), ("ARM", "MDM"))),
    "isoflop_law": partial(law_table, OWN),
    "isoflop_minima": partial(minima_table, OWN),
    "isoflop_efficiency": partial(efficiency_table, OWN, (("MDM", "ARM"), ("MDM-Prime-v2", "ARM"))),
    "study_minima": partial(minima_table, STUDY),
    "scaling_not_a_bound": not_a_bound_table,
}
