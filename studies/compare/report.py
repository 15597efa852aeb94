"""The results of a comparison: a row for each run, differences to the baseline, and tables (docs/compare.md).

Differences are paired: two runs of one seed are scored on the same sequences with the same draws, so what these share
drops out. Over several seeds, a mean and its error are taken of the seeds' values, each of which has a test text, a
tokenizer, a data order, weights and noise of its own.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from prime_v2.eval.intervals import NOT_CLUSTERED, UPPER_END
from prime_v2.output.numbers import duration, perplexity, quantity
from prime_v2.output.records import code_of
from prime_v2.output.tables import aligned, markdown
from prime_v2.studies.compare.config import COMMON, COUNTS, Comparison, Run, number
from prime_v2.studies.compare.differences import clusters_of, over_seeds, paired, with_sums, without_sequences
from prime_v2.studies.compare.search import Trained, best_shapes

SAMPLED = "Nats/token of the law of ancestral sampling at so many passes, a bound"
TRAINING_FIELDS = (
    "parameters", "parameters_non_embedding", "steps", "tokens", "flops_6nd", "flops_measured", "seconds", "device",
)  # fmt: skip


def check_one_experiment(trained: Sequence[Trained], allow_mixed: bool) -> None:
    """ValueError unless the records are of one code (or allow_mixed) and those of a seed of one text and order."""
    first_run, first = trained[0]
    firsts: dict[int, Trained] = {}
    for run, record in trained:
        if code_of(record) != code_of(first) and not allow_mixed:
            raise ValueError(
                f"the runs are of different code: {first_run} of commit {code_of(first, 12)}, {run} of "
                f"{code_of(record, 12)}; train them with one, or add --allow-mixed"
            )
        other_run, other = firsts.setdefault(run.seed, (run, record))
        mine, theirs = (_identity(each) for each in (record, other))
        for name, value in mine.items():
            if value != theirs[name]:
                raise ValueError(
                    f"{run} and {other_run} differ in data order: {name} is {value} and {theirs[name]}; train them "
                    f"again in a new folder"
                )


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What decides which text a run reads in which order under which noise, and where it is scored."""
    results = record["results"]
    found = {name: results["options"].get(name) for name in (*COMMON, "seed")}
    prints = results["data"]["fingerprints"]
    found |= {f"the fingerprint of {split}": str(prints.get(split))[:12] for split in ("train", "dev", "test")}
    bound = results["evaluation"]["bound"]
    return found | {"the number of scored sequences": bound["num_sequences"], "that of tokens": bound["num_tokens"]}


def summarise(comparison: Comparison, trained: Sequence[Trained], allow_mixed: bool = False) -> dict[str, Any]:
    """The results of a comparison, JSON-ready; ValueError for records that cannot stand side by side.

    rows: one for each run; groups: one for each name, shape and budget, over the seeds; best: for each name and budget
    the shape with the lowest dev bound (`search.best_shapes`), where there are several shapes.
    """
    check_one_experiment(trained, allow_mixed)
    records = dict(trained)
    baselines = {(run.shape, run.budget, run.seed): run for run in records if run.name == comparison.baseline}
    rows = []
    for run, record in trained:
        other = baselines.get((run.shape, run.budget, run.seed))
        theirs = None if other in (None, run) else records[other]
        difference = None if theirs is None else paired(_bound_of(record), _bound_of(theirs))
        rows.append(_row(run, record, comparison.count, difference) | {"sampler": _sampler(record, theirs)})
    groups = [_group(rows, key) for key in dict.fromkeys((row["name"], row["shape"], row["budget"]) for row in rows)]
    return {
        "comparison": comparison.name,
        "count": comparison.count,
        "baseline": _baseline(comparison),
        "names": comparison.values("label"),
        **{f"{name}s": comparison.values(name) for name in ("shape", "budget", "seed")},
        "search_seed": comparison.search_seed,
        "commits": sorted({code_of(record) for _, record in trained}),
        "data": {str(run.seed): record["results"]["data"] for run, record in trained},
        "clusters": clusters_of(trained),
        "rows": rows,
        "groups": groups,
        "best": _best(comparison, rows, trained) if len(comparison.values("shape")) > 1 else [],
    }


def _baseline(comparison: Comparison) -> str:
    """The label of the baseline."""
    if comparison.baseline_label is not None:
        return comparison.baseline_label
    return next(run.label for run in comparison.runs if run.name == comparison.baseline)


def _bound_of(record: dict[str, Any]) -> dict[str, Any]:
    return record["results"]["evaluation"]["bound"]


def _sampler(record: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    """By passes, the law of the ancestral sampler and its difference to the other run's at as many passes."""
    mine, theirs = (
        {} if each is None else each["results"]["evaluation"].get("sampler", {}) for each in (record, other)
    )
    return {
        passes: with_sums(law) | {"difference": paired(law, theirs[passes]) if passes in theirs else None}
        for passes, law in mine.items()
    }


def _row(run: Run, record: dict[str, Any], count: str, difference: dict[str, Any] | None) -> dict[str, Any]:
    """A run in the summary. Its parts training, evaluation, options, data and config are as in the run's record."""
    results = record["results"]
    training, evaluation = results["training"], results["evaluation"]
    loss = evaluation.get("paper_loss")
    flops_per_token = training[COUNTS[count]] / training["tokens"]
    return {
        "name": run.label,
        "family": results["family"],
        "shape": run.shape,
        "budget": run.budget,
        "seed": run.seed,
        "folder": run.folder,
        "command": record["command"],
        "commit": record["commit"],
        "uncommitted_changes": record["uncommitted_changes"],
        "time_utc": record["time_utc"],
        "trained_on": record["trained_on"] if "trained_on" in record else _place(record),
        "config": results["config"],
        "options": results["options"],
        "data": {"fingerprints": results["data"]["fingerprints"]},
        "training": {name: training[name] for name in TRAINING_FIELDS}
        | {"made_from_text": training.get("made_from_text")},
        "evaluation": {
            "bound": with_sums(evaluation["bound"]),
            "paper_loss": None if loss is None else without_sequences(loss),
        },
        "difference": difference,
        "curve": [
            {
                "tokens": entry["tokens"],
                "flops": entry["tokens"] * flops_per_token,
                "bound": entry["eval_bound"],
                "stderr": entry.get("eval_bound_stderr"),
                "degrees": entry.get("eval_bound_degrees"),
            }
            for entry in results["history"]
            if "eval_bound" in entry
        ],
        "dev_unigram_entropy": next(
            (entry["eval_unigram_entropy"] for entry in results["history"] if "eval_unigram_entropy" in entry), None
        ),
    }


def _place(record: dict[str, Any]) -> str:
    """Machine and PyTorch of a run's record."""
    machine = record["machine"]
    return f"{machine['accelerator'] or machine['processor']}, PyTorch {record['versions']['torch']}"


def _group(rows: Sequence[dict[str, Any]], key: tuple[str, str, float]) -> dict[str, Any]:
    """The runs of one name, shape and budget, over their seeds."""
    chosen = [row for row in rows if (row["name"], row["shape"], row["budget"]) == key]
    first = chosen[0]
    bounds = [row["evaluation"]["bound"] for row in chosen]
    losses = [row["evaluation"]["paper_loss"] for row in chosen]
    differences = [row["difference"] for row in chosen]
    name, shape, budget = key
    return {
        "name": name,
        "family": first["family"],
        "shape": shape,
        "budget": budget,
        "seeds": [row["seed"] for row in chosen],
        **{field: fmean(row["training"][field] for row in chosen) for field in TRAINING_FIELDS if field != "device"},
        "bound": over_seeds(bounds) | {name: bounds[0][name] for name in ("is_bound", "is_exact", "method")},
        "unigram_entropy": fmean(each["unigram_entropy"] for each in bounds),
        "paper_loss": None if losses[0] is None else over_seeds(losses) | {"is_bound": losses[0]["is_bound"]},
        "difference": None if None in differences else over_seeds(differences),
        "sampler": {passes: _sampler_group([row["sampler"][passes] for row in chosen]) for passes in first["sampler"]},
    }


def _sampler_group(laws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one number of passes, over the seeds."""
    differences = [each["difference"] for each in laws]
    return over_seeds(laws) | {"difference": None if None in differences else over_seeds(differences)}


def _best(comparison: Comparison, rows: Sequence[dict[str, Any]], trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """For each name and budget its best shape with the test bound; differences are to the baseline's best shape."""
    records = {(run.name, run.shape, run.budget, run.seed): record for run, record in trained}
    labels = {run.name: run.label for run, _ in trained}
    shapes = best_shapes(comparison, trained)
    best = []
    for (run_name, budget), shape in shapes.items():
        name, other = labels[run_name], shapes.get((comparison.baseline, budget))
        chosen = [dict(row) for row in rows if (row["name"], row["shape"], row["budget"]) == (name, shape, budget)]
        for row in chosen:
            mine = records[run_name, shape, budget, row["seed"]]
            theirs = None
            if run_name != comparison.baseline and other is not None:
                theirs = records[comparison.baseline, other, budget, row["seed"]]
            row["difference"] = None if theirs is None else paired(_bound_of(mine), _bound_of(theirs))
            row["sampler"] = _sampler(mine, theirs)
        group = _group(chosen, (name, shape, budget))
        sizes = {row["training"]["parameters_non_embedding"] for row in rows if row["name"] == name}
        edges = (min(sizes), max(sizes)) if len(sizes) > 1 else ()  # shapes may differ in their settings only
        best.append(group | {"at_the_edge": group["parameters_non_embedding"] in edges})
    return best


def score_table(
    results: dict[str, Any], groups: Sequence[dict[str, Any]] | None = None
) -> tuple[list[str], list[list[str]]]:
    """(headings, lines) of the bounds of all groups: perplexity only of bounds, the paper's loss with its label."""
    groups = results["groups"] if groups is None else groups
    heads = ["nats/token ± 95%", "perplexity", "paper's loss"]
    paired_with_baseline = any(group["difference"] is not None for group in groups)
    if paired_with_baseline:
        heads.append(f"minus {results['baseline']} ± 95%")
    lines = []
    for group in groups:
        bound, loss, difference = group["bound"], group["paper_loss"], group["difference"]
        sign = "=" if bound["is_exact"] else "≤"
        label = "–"
        if loss is not None:
            label = f"{with_interval(loss)} ({'the same bound' if loss['is_bound'] else 'no bound'})"
        delta = "–" if difference is None else with_interval(difference, "+.3f")
        line = [f"{sign} {with_interval(bound)}", f"{sign} {_perplexity(bound)}", label]
        lines.append([*line, delta] if paired_with_baseline else line)
    return _labelled(results, groups, heads, lines)


def sampler_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """(headings, lines) of the laws of ancestral sampling at few passes; None where no run has one.

    Of the best shapes, where there are several.
    """
    groups = [group for group in results["best"] or results["groups"] if group.get("sampler")]
    if not groups:
        return None
    heads: list[str] = []
    lines: list[list[str]] = [[] for _ in groups]
    for passes in groups[0]["sampler"]:
        laws = [group["sampler"][passes] for group in groups]
        paired_with_baseline = any(law["difference"] is not None for law in laws)
        heads += [f"{passes} passes ± 95%"] + [f"minus {results['baseline']}"] * paired_with_baseline
        for line, law in zip(lines, laws, strict=True):
            difference = "–" if law["difference"] is None else with_interval(law["difference"], "+.3f")
            line += [f"≤ {with_interval(law)}"] + [difference] * paired_with_baseline
    return _labelled(results, groups, heads, lines)


def cost_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, lines) of what the runs of all groups cost, mean over the seeds."""
    heads = ["N", "D", "steps", "FLOPs, 6ND", "FLOPs, measured", "time"]
    lines = [
        [
            quantity(group["parameters_non_embedding"]),
            quantity(group["tokens"]),
            f"{group['steps']:,.0f}",
            f"{group['flops_6nd']:.2e}",
            f"{group['flops_measured']:.2e}",
            duration(group["seconds"]),
        ]
        for group in results["groups"]
    ]
    return _labelled(results, results["groups"], heads, lines)


def whole_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, lines) with the columns of both tables, for `prime_v2.output.tables.markdown`."""
    scores, costs = score_table(results), cost_table(results)
    shared = scores[0].index("nats/token ± 95%")  # the columns that name a group
    lines = [first + second[shared:] for first, second in zip(scores[1], costs[1], strict=True)]
    return scores[0] + costs[0][shared:], lines


def _labelled(
    results: dict[str, Any], groups: Sequence[dict[str, Any]], heads: list[str], lines: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Columns in front that name the groups, as far as these differ."""
    columns: list[tuple[str, list[str]]] = [("run", [group["name"] for group in groups])]
    if any(group["family"] != group["name"] for group in groups):
        columns.append(("family", [group["family"] for group in groups]))
    if len(results["shapes"]) > 1:
        columns.append(("size", [group["shape"] for group in groups]))
    if len(results["budgets"]) > 1:
        columns.append(("budget", [number(group["budget"]) for group in groups]))
    names = [head for head, _ in columns]
    labels = zip(*(cells for _, cells in columns), strict=True)
    return names + heads, [[*label, *line] for label, line in zip(labels, lines, strict=True)]


def notes(results: dict[str, Any]) -> list[str]:
    """Sentences below the tables: what the signs and intervals mean, and on which text."""
    seeds = len(results["seeds"])
    bound = results["rows"][0]["evaluation"]["bound"]
    entropy = fmean(group["unigram_entropy"] for group in results["groups"])
    over = bound.get("interval_over", "sequences")
    searched = results.get("search_seed") is not None
    differ = any(group["difference"] is not None for group in results["groups"] + results["best"])
    intervals = (
        f"over {seeds} seeds (Student t), each with its own text, tokenizer, order, weights and noise"
        f"{'; where a size has one seed only, over ' + over + ' and draws' if searched else ''}"
        if seeds > 1
        else f"over {over} and draws; one seed, so another training run may differ by more"
    )
    found = [
        f"Test split, {bound['num_tokens']:,} tokens; their unigram entropy is {entropy:.3f} nats/token. = exact, ≤ "
        f"bound; intervals are 95%, {intervals}. {UPPER_END}",
        (f"Differences to {results['baseline']} are of the same sequences; below zero is better. " if differ else "")
        + f"Budgets count {'6 N D' if results['count'] == '6nd' else 'measured FLOPs'}, N without embedding and head.",
    ]
    if "interval_over" not in bound and seeds == 1:
        found.append(NOT_CLUSTERED)
    if any(group["paper_loss"] and not group["paper_loss"]["is_bound"] for group in results["groups"]):
        found.append("The paper's loss is no bound on the likelihood: it says nothing about which run is better.")
    whole = [row for row in results["rows"] if not row["options"].get("streaming")]  # a stream counts what was read
    read = [row["training"]["tokens"] / results["data"][str(row["seed"])]["train_tokens"] for row in whole]
    if max(read, default=0) > 1:
        found.append(
            f"{sum(each > 1 for each in read)} of {len(read)} runs read the training text more than once, up to "
            f"{max(read):.1f} times."
        )
    found += [*_text_notes(results), *_made_notes(results)]
    places = Counter(row["trained_on"] for row in results["rows"] if "trained_on" in row)
    if len(places) > 1:
        found.append(f"Trained on {'; '.join(f'{place} ({count} runs)' for place, count in places.items())}.")
    if len(results["commits"]) > 1:
        found.append(
            f"The runs are of {len(results['commits'])} versions of the code: {', '.join(results['commits'])}."
        )
    return found


def _text_notes(results: dict[str, Any]) -> list[str]:
    """What the splits share, where it was counted when the text was prepared."""
    counted = [each for each in results["data"].values() if each.get("test_ngrams_in_train")]
    if not counted:
        return []
    shares = [
        f"{fmean(each['share'] or 0 for each in parts):.1%} of its runs of {parts[0]['length']} tokens"
        for parts in zip(*(each["test_ngrams_in_train"] for each in counted), strict=True)
    ]
    dropped = fmean(each["repeated_documents"] for each in counted)
    return [
        f"Of the test text, {' and '.join(shares)} are also in the training text; {dropped:,.0f} documents equal to "
        f"an earlier one were left out before the split."
    ]


def _made_notes(results: dict[str, Any]) -> list[str]:
    """What codes and initial vectors cost beside the training, where the records say it."""
    costs = []
    for row in results["rows"]:
        parts = (row["training"].get("made_from_text") or {}).values()
        flops, seconds = (sum(each[name] for each in parts) for name in ("flops", "seconds"))
        if parts:
            costs.append((flops / row["training"]["flops_measured"], flops, seconds))
    if not costs:
        return []
    share, flops, seconds = (max(each) for each in zip(*costs, strict=True))
    return [
        f"Codes and initial vectors come beside the FLOPs of training: {len(costs)} of {len(results['rows'])} runs "
        f"made them from their text, in up to {duration(seconds)} and {flops:.1e} FLOPs, at most {share:.2%} of those "
        f"of training."
    ]


def render(results: dict[str, Any]) -> str:
    """Tables and notes as plain text."""
    parts = [_text(score_table(results)), _text(cost_table(results))]
    if laws := sampler_table(results):
        parts.append(f"{SAMPLED}:\n{_text(laws)}")
    if results["best"]:
        edge = _edge(results)
        parts.append("the size with the lowest dev bound:\n" + _text(score_table(results, results["best"])))
        parts += [edge] if edge else []
    return "\n\n".join([*parts, "\n".join(notes(results))])


def _edge(results: dict[str, Any]) -> str:
    """What says of which runs the best size is the smallest or the largest; "" where it is of none."""
    edge = [f"{each['name']} at {number(each['budget'])}" for each in results["best"] if each["at_the_edge"]]
    return f"At the edge of the sizes, so a better one may lie beyond: {', '.join(edge)}." if edge else ""


def _text(table: tuple[list[str], list[list[str]]]) -> str:
    heads, lines = table
    return aligned([heads, *lines])


def markdown_text(results: dict[str, Any]) -> str:
    """Tables and notes as Markdown."""
    parts = [markdown(*whole_table(results))]
    if laws := sampler_table(results):
        parts.append(f"{SAMPLED}:\n\n{markdown(*laws)}")
    if results["best"]:
        parts.append("The size with the lowest dev bound:\n\n" + markdown(*score_table(results, results["best"])))
        edge = _edge(results)
        parts += [f"{edge}\n"] if edge else []
    return "\n".join([*parts, "\n".join(notes(results)) + "\n"])


def with_interval(estimate: dict[str, Any], form: str = ".3f", digits: int = 3) -> str:
    """Nats per token of an estimate, "2.345 ± 0.012" where it has an interval, of so many digits."""
    interval = estimate["interval_95"]
    value = f"{estimate['nats_per_token']:{form}}"
    return value if interval is None else f"{value} ± {(interval[1] - interval[0]) / 2:.{digits}f}"


def _perplexity(bound: dict[str, Any]) -> str:
    assert bound["is_bound"], "only a bound has a perplexity"
    value, *ends = (perplexity(each) for each in (bound["nats_per_token"], *(bound["interval_95"] or ())))
    digits = 0 if value >= 100 else 1
    return f"{value:,.{digits}f}" + (f" [{ends[0]:,.{digits}f}, {ends[1]:,.{digits}f}]" if ends else "")
