"""Tables of docs/quality.md, from the records of `prime-v2 quality`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown, origin
from prime_v2.studies.quality.findings import frontiers
from prime_v2.studies.quality.report import about_models, notes, sections, with_ends

PARTS = ("cells", "best", "digits")  # of a record of `prime-v2 quality`, each entry of one model


def families_table(name: str, results: Path) -> str:
    """All tables of a record of several models, its notes and its origin."""
    record = read_record(results / f"{name}.json")
    found = record["results"]
    units = np.array(found["text"]["cluster_of_window"])
    found["frontiers"] = frontiers(found["cells"], found["reference"], units)  # of earlier records, too
    parts = [about_models(found, markdown)]
    parts += [f"{title[0].upper()}{title[1:]}:\n\n{table}" for title, table in sections(found, markdown)]
    return "\n".join(parts) + "\n" + "\n".join(notes(found)) + f"\n\n{origin(record)}"


def samplers_table(name: str, results: Path) -> str:
    """For each model its samplers by passes, with differences to the best of a column; then passes of digits."""
    record = read_record(results / f"{name}.json")
    found = record["results"]
    several = len(found["models"]) > 1
    parts = [about_models(found, markdown)]
    parts.append(
        "Nats per token of held-out text, in brackets what a sampler is above the best of its column; and digit-wise "
        "passes over the token-wise passes whose nats per token they reach.\n"
    )
    for model in found["models"]:
        own = {part: [each for each in found[part] if each["model"] == model["name"]] for part in PARTS}
        parts += [f"**{model['family']}**\n"] * several
        parts += [table for table in (_laws(own), _shares(own)) if table]
    return "\n".join(parts) + "\n" + "\n".join(notes(found)) + f"\n\n{origin(record)}"


def _laws(own: dict[str, list[dict[str, Any]]]) -> str:
    differences = {(row["passes"], row["sampler"]): row for row in own["best"]}
    rows: dict[str, list[str]] = {}
    for cell in own["cells"]:
        law, row = cell["law"], differences.get((cell["passes"], cell["sampler"]))
        text = f"{'=' if law['is_exact'] else '≤'} {law['nats_per_token']:.3f}"
        if row is not None:
            half = (row["interval_95"][1] - row["interval_95"][0]) / 2
            text += f" ({row['difference']:+.3f} ± {half:.3f})"
        rows.setdefault(cell["sampler"], []).append(text)
    return markdown(["sampler", *_heads(own)], [[name, *cells] for name, cells in rows.items()])


def _shares(own: dict[str, list[dict[str, Any]]]) -> str:
    """ "" for a model without digits."""
    shares: dict[str, dict[int, str]] = {}
    for each in own["digits"]:
        shares.setdefault(each["rule"], {})[round(each["passes"])] = _share(each)
    passes = list(dict.fromkeys(cell["passes"] for cell in own["cells"]))
    lines = [[name, *(cells.get(each, "–") for each in passes)] for name, cells in shares.items()]
    return markdown(["rule", *_heads(own)], lines) if lines else ""


def _heads(own: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [f"{each} passes" for each in dict.fromkeys(cell["passes"] for cell in own["cells"])]


def _share(each: dict[str, Any]) -> str:
    if each["share"] is None:
        return "not reached"
    share = with_ends(each["share"], each["interval_95"], "{:.2f}".format)
    return f"at most {share}" if each["reached"] == "at once" else share


TABLES: dict[str, Callable[[Path], str]] = {
    **{name: partial(families_table, name) for name in ("quality", "largest_quality")},
    "quality_samplers": partial(samplers_table, "quality_samplers"),
    "quality_stage_passes": partial(samplers_table, "quality_stage_passes"),
}
