"""Tables of README.md and docs/, generated from the records in results/.

    python -m docs.tables README.md docs/results.md        # rewrite the tables in place
    python -m docs.tables --check README.md                # exit status 1 when a table is out of date

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from docs.tables.benchmarks import TABLES as BENCHMARK_TABLES
from docs.tables.compare import TABLES as COMPARE_TABLES
from docs.tables.files import TABLES as FILE_TABLES
from docs.tables.quality import TABLES as QUALITY_TABLES
from docs.tables.scaling import TABLES as SCALING_TABLES
from docs.tables.study import TABLES as STUDY_TABLES
from prime_v2.commands.demo import report
from prime_v2.eval.intervals import NOT_CLUSTERED, UPPER_END, plus_minus
from prime_v2.eval.plugin import DEMO
from prime_v2.output.records import read_record
from prime_v2.output.tables import markdown, origin, with_origin
from prime_v2.studies.compare.differences import paired
from prime_v2.studies.compare.report import with_interval

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def about_intervals(scores: Iterable[dict[str, Any]]) -> str:
    """The line below a table of bounds that says how to read them."""
    clustered = all("interval_over" in score for score in scores)
    return f"{UPPER_END}\n" + ("" if clustered else f"{NOT_CLUSTERED}\n")


def demo_text(results: Path) -> str:
    """What `make demo` prints."""
    record = read_record(results / "demo.json")
    return f"```text\n{report(record['results'], DEMO).strip()}\n```\n\n{origin(record)}"


def training_table(results: Path) -> str:
    """The tiny runs side by side: the valid bound, and the paper's loss, labelled."""
    rows, bounds = [], []
    for name, label in (("tiny", "MDM-Prime-v2 (binary, shuffled)"), ("tiny_mdm", "MDM (`num_subtokens=1`)")):
        record = read_record(results / f"{name}.json")
        training, evaluation = record["results"]["training"], record["results"]["evaluation"]
        bound, loss = evaluation["bound"], evaluation["paper_loss"]
        low, high = bound["perplexity_interval_95"]
        bounds.append(bound)
        rows.append(
            [
                label,
                f"{bound['nats_per_token']:.3f}{plus_minus(bound)}",
                f"{bound['perplexity']:.0f} [{low:.0f}, {high:.0f}]",
                f"{bound['bits_per_byte']:.3f}",
                f"{loss['nats_per_token']:.3f}{plus_minus(loss)}"
                + (" (the same bound)" if loss["is_bound"] else " (no bound)"),
                f"{bound['unigram_entropy']:.3f}",
                f"{training['tokens'] / 1e6:.1f} M",
                f"{training['flops_measured']:.1e}",
                f"{training['seconds'] / 60:.1f} min",
            ]
        )
    heads = [
        "model",
        "bound, nats/token",
        "perplexity ≤",
        "bits/byte",
        "paper's loss, nats/token",
        "unigram entropy",
        "tokens",
        "FLOPs",
        "training",
    ]
    below = about_intervals(bounds) + _distances(results)
    return markdown(heads, rows) + f"\n{below}\n{origin(read_record(results / 'tiny.json'))}"


def _distances(results: Path) -> str:
    """The table in words: how far each bound is below the unigram entropy, and the paper's loss below the bound."""
    prime, mdm = (read_record(results / f"{name}.json")["results"]["evaluation"] for name in ("tiny", "tiny_mdm"))
    below = [each["bound"]["unigram_entropy"] - each["bound"]["nats_per_token"] for each in (prime, mdm)]
    hidden = prime["bound"]["nats_per_token"] - prime["paper_loss"]["nats_per_token"]
    return (
        f"Below the unigram entropy: {below[0]:.2f} nats/token for MDM-Prime-v2, {below[1]:.2f} for MDM. The paper's "
        f"loss of MDM-Prime-v2 is {hidden:.2f} nats/token below its bound.\n"
    )


def entropy_table(results: Path) -> str:
    """Sub-token entropy in units of log b (the paper's Table 1)."""
    record = read_record(results / "entropy.json")
    rows = [
        [
            f"{row['num_subtokens']}",
            f"{row['base']}",
            *(
                f"{row[column]:.4f}"
                for column in ("unshuffled", "shuffled_25_percent", "shuffled", "joint_per_subtoken")
            ),
        ]
        for row in record["results"]["rows"]
    ]
    heads = ["sub-tokens S", "base b", "unshuffled", "25% shuffled", "shuffled", "joint entropy / S"]
    return with_origin(heads, rows, record)


def paper_loss_table(results: Path) -> str:
    """Entropy, bounds and the paper's loss of the optimal denoiser (docs/paper_loss.py), unshuffled and shuffled."""
    record = read_record(results / "paper_loss.json")
    names = {"two_tokens": "two tokens, k = {}", "zipf": "Zipf, 4,096 tokens", "sequences": "three tokens of 16"}
    forms: dict[tuple, list[dict[str, Any]]] = {}  # a law with a base, one line of the table each
    for row in record["results"]["rows"]:
        if row["differing_digits"] in (None, 1, 2, 6, 12):  # the others are in the figure
            forms.setdefault((row["law"], row["differing_digits"], row["base"]), []).append(row)
    rows = []
    for (law, k, base), form in forms.items():
        loss = {row["shuffle_ratio"]: row for row in form if row["method"] == "paper_loss"}
        bounds = [row["nats_per_token"] for row in form if row["is_bound"] and row["method"] != "paper_loss"]
        note = " (a bound here)" if loss[0.0]["is_bound"] else ""
        shuffled = "–" if 1.0 not in loss else "{nats_per_token:.4f} [{lowest:.4f}, {highest:.4f}]".format(**loss[1.0])
        rows.append(
            [
                names[law].format(k),
                str(base),
                str(form[0]["num_subtokens"]),
                f"{form[0]['entropy']:.4f}",
                " to ".join(sorted({f"{nats:.4f}" for nats in bounds})),
                f"{loss[0.0]['nats_per_token']:.4f}{note}",
                shuffled,
            ]
        )
    shuffles = max(row["shuffles"] for row in record["results"]["rows"])
    heads = ["law", "b", "S", "entropy", "every bound", "paper's loss", f"shuffled, mean [range] of {shuffles}"]
    return with_origin(heads, rows, record)


def settings_table(results: Path) -> str:
    """Settings of the likelihoods of answers on training splits (benchmarks/likelihood_settings.py)."""
    record = read_record(results / "likelihood_settings.json")
    found = record["results"]
    rows = [
        [
            f"**{row['setting']}**" if row["setting"] == found["chosen"] else row["setting"],
            f"{row['accuracy']:.3f}",
            f"{row['accuracy_below_best']:.3f} ± {row['accuracy_below_best_stderr']:.3f}",
            f"{row['token_passes_per_question']:,.0f}",
            f"{row['mean_stderr_of_lead']:.2f}",
            f"{row['seconds']:,.0f}",
        ]
        for row in found["rows"]
    ]
    heads = [
        "setting",
        "accuracy",
        "below the best ± stderr",
        "token passes a question",
        "stderr of the lead, nats",
        "seconds",
    ]
    return with_origin(heads, rows, record)


def sciq_table(results: Path) -> str:
    """Cost of SciQ beside the published protocol, and what each part brings (benchmarks/sciq_protocol.py)."""
    record = read_record(results / "sciq_protocol.json")
    found = record["results"]
    first = found["rows"][0]
    rows = []
    for row in found["rows"]:
        equal = row["token_passes_at_equal_stderr"]
        rows.append(
            [
                row["setting"],
                f"{row['draws']:.0f}",
                f"{row['stderr']:.2f}",
                f"{row['token_passes']:,.0f}",
                f"{row['seconds']:.2f}",
                f"{equal:,.0f}",
                f"{first['token_passes'] / equal:,.0f} x",
            ]
        )
    heads = [
        "setting",
        "draws a choice",
        "stderr of the lead, nats",
        "token passes a question",
        "seconds a question",
        "passes at equal stderr",
        "fewer",
    ]
    full = found["all_questions"]
    metrics = ", ".join(f"{name} {each['value']:.3f} ± {each['stderr']:.3f}" for name, each in full["metrics"].items())
    batching = "; ".join(f"{each['rows of a pass']}: {each['seconds']:.0f} s" for each in found["batching"])
    return (
        markdown(heads, rows)
        + f"\nAll {full['questions']:,} questions by lm-eval with the default, `is_greedy` included: "
        f"{full['token_passes']:,.0f} token passes and {full['seconds']:.2f} s a question, "
        f"{found['ratio_token_passes']:.0f} and {found['ratio_seconds']:.0f} times fewer than the published protocol "
        f"({metrics}).\nAdaptive draws chose the same answer as all 128 in {found['adaptive_same_best_share']:.0%} of "
        f"{found['questions']} questions. A million token passes, rows of a pass {batching}.\n\n{origin(record)}"
    )


def tasks_table(pattern: str, results: Path) -> str:
    """lm-eval's tasks, with standard errors, a column for each record of this name (`prime-v2 eval --output`)."""
    records = [read_record(path) for path in sorted(results.glob(pattern))]
    names = [record["results"]["config"]["model_args"]["pretrained"].split("/")[-1] for record in records]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for name, record in zip(names, records, strict=True):
        for row in record["results"]["scores"]:
            stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
            place = (row["task"], row["metric"], row["scored_split"], f"{row['n']:,}")
            cells.setdefault(place, {})[name] = f"{row['value']:.3f}{stderr}"
    rows = [[*place, *(found.get(name, "–") for name in names)] for place, found in cells.items()]
    commands = "\n".join(origin(record) for record in records)
    return markdown(["task", "metric", "split", "questions", *names], rows) + f"\n{commands}"


def gsm8k_table(results: Path) -> str:
    """Models fine-tuned on GSM8K (records of train.py), with the answers that they generate (`prime-v2 eval`)."""
    rows, commands = [], []
    for path in sorted(results.glob("largest_sft_*.json")):
        name = path.stem.removeprefix("largest_sft_")
        tuned, answered = read_record(path), read_record(results / f"largest_gsm8k_{name}.json")
        bound, scores = tuned["results"]["evaluation"]["bound"], answered["results"]["scores"]
        sign = "=" if bound["is_exact"] else "≤"
        rows.append(
            [
                name,
                f"{tuned['results']['training']['steps']:,}",
                f"{sign} {bound['nats_per_token']:.3f}{plus_minus(bound)}",
                f"{sign} {bound['nats_per_answer']:.0f}",
                *(f"{row['value']:.3f} ± {row['stderr']:.3f}" for row in scores),
                f"{scores[0]['n']:,}",
            ]
        )
        commands += [origin(tuned), origin(answered)]
    filters = [row["filter"] for row in scores]
    heads = ["model", "steps", "nats/token of an answer", "nats/answer", *filters, "questions"]
    return markdown(heads, rows) + "\n" + "\n".join(commands)


def perplexity_table(name: str, results: Path, baseline: str | None = None) -> str:
    """Texts and models of a record of `prime-v2 ppl`, bounds as bounds.

    baseline: how the model's name begins that all others of a text are set against, in a column more.
    """
    record = read_record(results / f"{name}.json")
    rows = []
    for row in record["results"]["rows"]:
        difference = [] if baseline is None else [_minus(row, baseline, record["results"]["rows"])]
        low, high = row["perplexity_interval_95"]
        sign = "" if row["is_exact"] else "≤ "
        rows.append(
            [
                row["set"],
                row["model"],
                f"`{row['method']}`",
                f"{sign}{row['nats_per_token']:.3f}{plus_minus(row)}",
                *difference,
                f"{sign}{row['perplexity']:,.0f} [{low:,.0f}, {high:,.0f}]",
                f"{sign}{row['bits_per_byte']:.3f}" if "bits_per_byte" in row else "–",
                f"{row['num_tokens']:,}",
                f"{row['num_samples']}",
            ]
        )
    minus = [] if baseline is None else [f"minus {baseline}"]
    heads = ["set", "model", "method", "nats/token", *minus, "perplexity", "bits/byte", "tokens", "draws"]
    return markdown(heads, rows) + f"\n{about_intervals(record['results']['rows'])}\n{origin(record)}"


def _minus(row: dict[str, Any], baseline: str, rows: list[dict[str, Any]]) -> str:
    """What a model is above the baseline on the same windows, paired."""
    (other,) = (each for each in rows if each["set"] == row["set"] and each["model"].startswith(baseline))
    return "–" if other is row else with_interval(paired(row, other), "+.3f")


TABLES: dict[str, Callable[[Path], str]] = {
    "demo": demo_text,
    "training": training_table,
    "entropy": entropy_table,
    "paper_loss": paper_loss_table,
    "likelihood_settings": settings_table,
    "sciq_protocol": sciq_table,
    "tasks": partial(tasks_table, "tasks_*.json"),
    "largest_tasks": partial(tasks_table, "largest_tasks_*.json"),
    "largest_gsm8k": gsm8k_table,
    "perplexity": partial(perplexity_table, "ppl_suite"),
    **{f"zero_shot_{name}": partial(perplexity_table, f"zero_shot_{name}") for name in ("wikitext", "speeches")},
    **{
        f"largest_{name}": partial(perplexity_table, f"largest_{name}", baseline="MDM_tree_embedding")
        for name in ("wikitext", "speeches")
    },
    **BENCHMARK_TABLES,
    **FILE_TABLES,
    **COMPARE_TABLES,
    **QUALITY_TABLES,
    **STUDY_TABLES,
    **SCALING_TABLES,
}


def rewrite(text: str, results: Path) -> str:
    """The text with each of its tables made anew; ValueError for a table that does not exist."""

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]}; there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](results)}{match[3]}"

    return BLOCK.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when out of date")
    options = parser.parse_args(arguments)
    stale = 0
    for path in options.files:
        text = path.read_text(encoding="utf-8")
        new = rewrite(text, options.results)
        if new != text:
            stale += 1
            if not options.check:
                path.write_text(new, encoding="utf-8")
            print(f"{path}: {'out of date' if options.check else 'rewritten'}")
    return int(options.check and stale > 0)
