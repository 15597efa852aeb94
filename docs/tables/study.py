"""Tables of the study of docs/protocol.md, in README.md and docs/findings.md: settings, sizes, families, verdict."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from docs.tables.compare import origin
from prime_v2.eval.intervals import half_width
from prime_v2.output import tables
from prime_v2.output.numbers import quantity
from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown
from prime_v2.studies.compare.config import number
from prime_v2.studies.compare.differences import paired
from prime_v2.studies.compare.report import SAMPLED, notes, sampler_table, with_interval

BUDGETS = (
    "study_1e12",
    "study_1e13_seeds",
    "study_3e13_seeds",
)  # of the protocol's three budgets, the records with three seeds
ALL_ARMS = "study_1e12"  # the largest of these that has every arm
SETTINGS = (
    "tuning", "tuning_arm", "study_left_to_right", "study_permuted", "study_trees", "study_1e12", "study_1e13",
    "study_1e13_seeds", "study_3e13_seeds", "study_3e13_rates", "study_parts", "arm_subtokens", "largest",
)  # fmt: skip
# Whose question the paper answers by its loss: a column more.
OF_THE_PAPERS_LOSS = ("granularity", "shuffle_ratio", "shuffle_seeds")
WHOLE_TOKENS = ("MDM", "MDM, tree embedding")  # the arms of which the better one is to be beaten
DIGITS = ("MDM-Prime-v2", "nested 6-11", "coarse-first 6-11")  # the arms that diffuse digits
ORDERS = {  # text: its records
    "manuals, test split": ("order_test", "order_test_own"),
    "WikiText-2": ("order_wikitext", "zero_shot_wikitext"),
    "speeches": ("order_speeches", "zero_shot_speeches"),
}
COMPARISONS = 9  # of the protocol: three arms at three budgets
PASSES = 3  # numbers of passes, in the other question of the protocol


def settings_table(name: str, results: Path, papers_loss: bool = False) -> str:
    """A line a run, a column a shape: the last dev bounds, the lowest in bold, with its test bound, cost and laws.

    The record has one budget. papers_loss: a column of the paper's loss, beside the test bound.
    """
    record = read_record(results / f"compare_{name}.json")
    found = record["results"]
    best, lines = _arms(found), []
    for arm in found["names"]:
        cells = [_dev_cell(found, arm, shape, best[arm]["shape"]) for shape in found["shapes"]]
        bound, difference = best[arm]["bound"], best[arm]["difference"]
        score = f"{_sign(bound)} {with_interval(bound)}"
        loss = [_papers_loss(best[arm], "{:.3f}")] if papers_loss else []
        delta = "–" if difference is None else with_interval(difference, "+.3f")
        costs = [quantity(best[arm]["tokens"]), f"{best[arm]['flops_6nd']:.2e}"]
        lines.append([arm, *cells, score, *loss, delta, *costs])
    heads = [
        "run",
        *found["shapes"],
        "test ± 95%, of the one in bold",
        *(["the paper's loss"] if papers_loss else []),
        f"minus {found['baseline']} ± 95%",
        "D",
        "6 N D",
    ]
    parts = [markdown(heads, lines)]
    if laws := sampler_table(found):
        parts.append(f"{SAMPLED}:\n\n{markdown(*laws)}")
    return "\n".join([*parts, "\n".join(notes(found)) + f"\n\n{origin(record)}"])


def _arms(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each arm of a record of one budget at its best shape, or at the one that there is."""
    return {each["name"]: each for each in found["best"] or found["groups"]}


def _dev_cell(found: dict[str, Any], name: str, shape: str, best: str) -> str:
    """The last dev bound, of the seed at which shapes were chosen or over all seeds."""
    rows = [row for row in found["rows"] if (row["name"], row["shape"]) == (name, shape)]
    if found.get("search_seed") is not None:
        rows = [row for row in rows if row["seed"] == found["search_seed"]]
    if not rows:
        return "–"
    value = f"{fmean(row['curve'][-1]['bound'] for row in rows):.3f}"
    return f"**{value}**" if shape == best else value


def _papers_loss(best: dict[str, Any], form: str) -> str:
    """No bound for digits that are hidden separately, and said to be one where it is."""
    loss = best["paper_loss"]
    if loss is None:
        return "–"
    return form.format(loss["nats_per_token"]) + (" (the same bound)" if loss["is_bound"] else "")


def families_table(results: Path) -> str:
    """All arms with three seeds, each at its best size: bound, distance, the paper's loss."""
    record = read_record(results / f"compare_{ALL_ARMS}.json")
    found, lines = record["results"], []
    for each in found["best"]:
        bound, difference = each["bound"], each["difference"]
        lines.append(
            [
                each["name"],
                "yes" if each["name"] in DIGITS else "no",
                f"{_sign(bound)} {with_interval(bound, '.2f', 2)}",
                "–" if difference is None else with_interval(difference, "+.2f", 2),
                _papers_loss(each, "{:.2f}"),
            ]
        )
    heads = ["model", "diffuses digits", "bound, nats/token ± 95%", f"minus {found['baseline']}", "the paper's loss"]
    return f"{markdown(heads, lines)}\n{origin(record)}"


def verdict_table(results: Path) -> str:
    """A line an arm that diffuses digits and a number, a column a budget: its distance to the best over whole tokens.

    That is the baseline of the records, and must be the one with the lower dev bound, as the protocol demands, where a
    record has both. "–" where a record lacks the arm.
    """
    records = [read_record(results / f"compare_{name}.json") for name in BUDGETS]
    lines: dict[tuple[str, str], list[str]] = {}
    for column, record in enumerate(records):
        found = record["results"]
        best = _arms(found)
        _check_baseline(found, best)
        for name in filter(best.__contains__, DIGITS):
            seeds = len(best[name]["seeds"])
            differences = {"bound": best[name]["difference"]}
            differences |= {f"{passes} passes": law["difference"] for passes, law in best[name]["sampler"].items()}
            for what, difference in differences.items():
                comparisons = COMPARISONS * (1 if what == "bound" else PASSES)
                cells = lines.setdefault((name, what), ["–"] * len(records))
                cells[column] = _verdict(difference, seeds, comparisons)
    heads = ["arm", "of", *(f"{number(record['results']['budgets'][0])} FLOPs" for record in records)]
    return markdown(heads, [[*key, *cells] for key, cells in lines.items()]) + "\n" + "\n".join(map(origin, records))


def seeds_table(name: str, results: Path) -> str:
    """A line a seed: the bound of each arm; its distance to the baseline over the clusters of the test text; the mean.

    ValueError for a record of several budgets, or that lacks a seed of an arm at its best shape.
    """
    record = read_record(results / f"compare_{name}.json")
    found = record["results"]
    best, baseline = _arms(found), found["baseline"]
    arms = [baseline, *(arm for arm in found["names"] if arm != baseline)]
    lines = [[str(seed), *_of_seed(found, seed, arms, best)] for seed in found["seeds"]]
    means = [f"{_sign(best[arm]['bound'])} {with_interval(best[arm]['bound'])}" for arm in arms]
    differences = [f"; {with_interval(best[arm]['difference'], '+.3f')}" for arm in arms[1:]]
    mean = [score + difference for score, difference in zip(means, ["", *differences], strict=True)]
    lines.append(["mean", *mean, f"{len(found['seeds'])} seeds"])
    heads = ["seed", baseline, *(f"{arm}; difference ± 95%" for arm in arms[1:]), "interval over"]
    return f"{markdown(heads, lines)}\n{origin(record)}"


def _of_seed(found: dict[str, Any], seed: int, arms: list[str], best: dict[str, Any]) -> list[str]:
    """The cells of a line of `seeds_table`, and what the intervals are over."""
    clusters = {"clusters": found["clusters"][str(seed)]["bound"]}
    rows = [row for row in found["rows"] if row["seed"] == seed and row["shape"] == best[row["name"]]["shape"]]
    bounds = {row["name"]: row["evaluation"]["bound"] | clusters for row in rows}
    if len(rows) != len(arms) or set(bounds) != set(arms):
        raise ValueError(f"{found['comparison']} has not one run of each arm at seed {seed}; use another table")
    scores = [f"{_sign(bounds[arm])} {bounds[arm]['nats_per_token']:.3f}" for arm in arms]
    differences = [f"; {with_interval(paired(bounds[arm], bounds[arms[0]]), '+.3f')}" for arm in arms[1:]]
    cells = [score + difference for score, difference in zip(scores, ["", *differences], strict=True)]
    return [*cells, f"{bounds[arms[0]]['interval_over']} and draws"]


def _sign(bound: dict[str, Any]) -> str:
    return "=" if bound["is_exact"] else "≤"


def ends_table(results: Path) -> str:
    """The arms of `study_ends`: the last dev bounds by size, with those of the study that has the other sizes."""
    record = read_record(results / "compare_study_ends.json")
    lines, scores = [], {(each["name"], each["shape"]): each["bound"] for each in record["results"]["best"]}
    for row in sorted(record["results"]["rows"], key=lambda row: row["budget"]):
        study = read_record(results / f"compare_study_{number(row['budget'])}.json")["results"]
        same = [each for each in study["rows"] if (each["name"], each["seed"]) == (row["name"], row["seed"])]
        sizes = sorted([*same, row], key=lambda each: each["training"]["parameters_non_embedding"])
        dev = {each["shape"]: each["curve"][-1]["bound"] for each in sizes}
        best, bound = min(dev, key=dev.__getitem__), scores[row["name"], row["shape"]]
        cells = [f"**{shape} {dev[shape]:.3f}**" if shape == best else f"{shape} {dev[shape]:.3f}" for shape in dev]
        score = f"{_sign(bound)} {with_interval(bound)}"
        lines.append([row["name"], number(row["budget"]), row["shape"], ", ".join(cells), score])
    heads = ["run", "FLOPs", "added", "dev bounds by size", "test ± 95%, of the one added"]
    return f"{markdown(heads, lines)}\n{origin(record)}"


def orders_table(results: Path) -> str:
    """A line a model and order of reveal, a column a text: the bound, and its paired distance to MDM with a tree."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    records = []
    for text, names in ORDERS.items():
        read = [read_record(results / f"{name}.json") for name in names]
        rows = {(row["model"], row["method"]): row for record in read for row in record["results"]["rows"]}
        baseline = next((row for (model, _), row in rows.items() if model.startswith("MDM_tree")), None)
        if baseline is None:
            raise ValueError(f"{', '.join(names)}: no model is named MDM_tree...; score one beside the others")
        for (model, method), row in rows.items():
            if model.startswith(("MDM_tree", "nested", "coarse_first")):
                bound = with_interval({**row, "interval_95": row["nats_per_token_interval_95"]})
                distance = "–" if row is baseline else with_interval(paired(row, baseline), "+.3f")
                cells.setdefault((model, method), {})[text] = f"≤ {bound}; {distance}"
        records += [record for name, record in zip(names, read, strict=True) if name.startswith("order")]
    lines = [[*key, *(found.get(text, "–") for text in ORDERS)] for key, found in sorted(cells.items())]
    return markdown(["model", "revealed", *ORDERS], lines) + "\n" + "\n".join(map(tables.origin, records))


def overlap_table(results: Path) -> str:
    """A line a text that was not trained on: what it shares with the training text all the same."""
    records = [read_record(results / f"overlap_{name}.json") for name in ("wikitext", "speeches")]
    lines = []
    for record in records:
        found = record["results"]
        shares = [f"{each['share']:.1%} of {each['ngrams']:,}" for each in found["ngrams_in_train"]]
        lines.append([found["source"], f"{found['documents']}", f"{found['tokens']:,}", *shares])
    lengths = [f"runs of {each['length']} tokens" for each in records[0]["results"]["ngrams_in_train"]]
    return markdown(["text", "documents", "tokens", *lengths], lines) + "\n" + "\n".join(map(tables.origin, records))


def learned_order_table(results: Path) -> str:
    """A line a setting of the learned orders (code: at the record's commit): bounds, distances, rates."""
    record = read_record(results / "learned_order.json")
    lines = []
    for name, row in record["results"]["settings"].items():
        rates = row["rates"]
        spans = zip(*(rates[end] for end in ("least", "most")), strict=True) if rates else ()
        lines.append(
            [
                name,
                f"{row['dev']['nats_per_token']:.3f}",
                f"≤ {with_interval(row['test'])}",
                with_interval(row["minus_first"], "+.3f") if lines else "–",
                with_interval(row["minus_as_begun"], "+.3f") if rates else "–",
                ", ".join(f"{low:.2f} to {high:.2f}" for low, high in spans) or "given",
                quantity(row["tokens"]),
            ]
        )
    heads = [
        "order",
        "dev",
        "test ± 95%",
        f"minus {lines[0][0]} ± 95%",
        "minus same network, rates given",
        "rates",
        "D",
    ]
    return f"{markdown(heads, lines)}\n{tables.origin(record)}"


def _verdict(difference: dict[str, Any], seeds: int, comparisons: int) -> str:
    """A difference with its 95% interval, what that says, and the half width at the level of all comparisons.

    ValueError for one seed, whose interval says nothing about another.
    """
    if seeds < 2:
        raise ValueError(f"a verdict over {seeds} seed is none; record at least 2")
    low, high = difference["interval_95"]
    said = "below" if high < 0 else "above" if low > 0 else "level"
    wide = half_width(difference["stderr"], seeds - 1, 1 - 0.05 / comparisons)
    return f"{with_interval(difference, '+.3f')}, {said} (± {wide:.3f} for {comparisons} comparisons)"


def _check_baseline(found: dict[str, Any], best: dict[str, Any]) -> None:
    """ValueError unless the baseline is the best on the dev split of the arms over whole tokens that there are."""
    there = filter(best.__contains__, WHOLE_TOKENS)
    dev = {name: float(_dev_cell(found, name, best[name]["shape"], "")) for name in there}
    if min(dev, key=dev.__getitem__) != found["baseline"]:
        raise ValueError(f"the baseline {found['baseline']} of {found['comparison']} is not the best on dev: {dev}")


TABLES: dict[str, Callable[[Path], str]] = {
    **{name: partial(settings_table, name) for name in SETTINGS},
    **{name: partial(settings_table, name, papers_loss=True) for name in OF_THE_PAPERS_LOSS},
    "families": families_table,
    "verdict": verdict_table,
    "ends": ends_table,
    "orders": orders_table,
    "learned_order": learned_order_table,
    "overlap": overlap_table,
    "largest_seeds": partial(seeds_table, "largest_seeds"),
    "seeds_1e13": partial(seeds_table, "study_1e13_seeds"),
    "seeds_3e13": partial(seeds_table, "study_3e13_seeds"),
}
