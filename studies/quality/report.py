"""The results of a study as tables: the law of each sampler, its sets, and what follows (docs/quality.md)."""

from collections.abc import Callable, Sequence
from typing import Any

from prime_v2.output.numbers import quantity, three_digits
from prime_v2.output.tables import aligned
from prime_v2.studies.quality.plan import excludes

Rows = list[list[str]]
Layout = Callable[[Sequence[str], Rows], str]
LAW_HEADS = ["model", "sampler", "passes", "nats/token", "minus the best at these passes"]
SET_HEADS = [
    "model", "sampler", "passes", "generative perplexity", "entropy", "distinct-2", "self-BLEU", "repeated 4-grams",
    "copied 8-grams", "network s", "tokens/s",
]  # fmt: skip
REAL = "real text"
JUDGED = (
    "Generative perplexity: exp of the judge's exact nats per token of the samples; it is a perplexity of the judge, "
    "and text that repeats itself has a low one: read it beside the entropy (unigram, of one text, nats)."
)


def text_table(heads: Sequence[str], rows: Rows) -> str:
    """A table for the terminal."""
    return aligned([heads, *rows])


def render(results: dict[str, Any]) -> str:
    """All tables and notes for the terminal."""
    return "\n".join(f"{title}\n{body}\n" for title, body in sections(results, text_table)) + "\n".join(notes(results))


def sections(results: dict[str, Any], layout: Layout) -> list[tuple[str, str]]:
    """(title, table) of each part that the results have."""
    found = []
    for prompt in [0, *([results["prompt"]] if results["prompt"] else [])]:
        given = f", {prompt} tokens given" if prompt else ""
        rows = law_rows(results, prompt)
        if rows:
            found.append((f"held-out text under what each sampler writes{given}", layout(LAW_HEADS, rows)))
        rows = set_rows(results, prompt)
        if rows:
            heads = SET_HEADS + (["MAUVE"] if has_mauve(results) else [])
            found.append((f"sampled texts{given}", layout(heads, rows)))
    if results["frontiers"]:
        heads = ["model", "sampler", "passes", "temperatures", "generative perplexity at the entropy of real text"]
        found.append(("generative frontier", layout(heads, frontier_rows(results))))
    if results["digits"]:
        heads = ["model", "rule", "token-wise passes", "nats/token", "digit-wise passes / token-wise"]
        found.append(("passes that digits take to reach the nats of tokens", layout(heads, digit_rows(results))))
    return found


def law_rows(results: dict[str, Any], prompt: int) -> Rows:
    """A row for each cell with a law, exact (=) or a bound (≤), beside its paired difference to the best."""
    differences = {(row["model"], row["prompt"], row["passes"], row["sampler"]): row for row in results["best"]}
    bests = {(row["model"], row["prompt"], row["passes"], row["best"]) for row in results["best"]}
    rows: Rows = []
    for cell in results["cells"]:
        law, place = cell["law"], (cell["model"], cell["prompt"], cell["passes"], cell["sampler"])
        if law is None or cell["prompt"] != prompt:
            continue
        own = law["mean_passes"] is None and cell["sampler"] != "left to right"
        passes = "any (the model's own bound)" if own else shown_passes(cell["passes"], law["mean_passes"])
        shown = "best" if place in bests else "–"
        if place in differences:
            row = differences[place]
            shown = with_ends(row["difference"], row["interval_95"], "{:+.3f}".format)
        sign = "=" if law["is_exact"] else "≤"
        value = with_ends(law["nats_per_token"], law["interval_95"], "{:.3f}".format)
        line = [cell["model"], cell["sampler"], passes, f"{sign} {value}", shown]
        if not (own and rows and rows[-1][:3] == line[:3]):  # the same bound for all passes
            rows.append(line)
    return rows


def set_rows(results: dict[str, Any], prompt: int) -> Rows:
    """Real text, then a row for each set that was sampled at temperature 1."""
    rows, mauve = [], has_mauve(results)
    if results["reference"] is not None:
        real = results["reference"][str(prompt)]
        rows.append([REAL, "–", "–", *_numbers(real), "–", "–", *(["–"] if mauve else [])])
    for cell in results["cells"]:
        found = cell["samples"]
        if found is None or cell["prompt"] != prompt or cell["temperature"] != 1:
            continue
        rows.append(
            [
                cell["model"],
                cell["sampler"],
                shown_passes(cell["passes"], found["mean_passes"]),
                *_numbers(found),
                three_digits(found["network_seconds"]),
                f"{found['tokens_per_second']:,.0f}",
                *([f"{found['mauve']['value']:.3f}"] if mauve else []),
            ]
        )
    return rows if len(rows) > 1 else []


def frontier_rows(results: dict[str, Any]) -> Rows:
    """A row for each temperature sweep."""
    rows = []
    for each in results["frontiers"]:
        at = each["at_real_entropy"]
        span = f"entropy {min(each['entropy']):.2f} to {max(each['entropy']):.2f} only"
        shown = span if at is None else with_ends(at, each["interval_95"], three_digits)
        temperatures = f"{min(each['temperatures']):g} to {max(each['temperatures']):g}"
        rows.append([each["model"], each["sampler"], str(each["passes"]), temperatures, shown])
    return rows


def digit_rows(results: dict[str, Any]) -> Rows:
    """A row for each number of token-wise passes."""
    rows = []
    for each in results["digits"]:
        if each["prompt"]:
            continue
        share = with_ends(each["share"], each["interval_95"], "{:.2f}".format) if each["share"] is not None else ""
        shown = {"no": "not reached", "at once": f"at most {share}", "yes": share}[each["reached"]]
        rows.append([each["model"], each["rule"], f"{each['passes']:.3g}", f"{each['nats_per_token']:.3f}", shown])
    return rows


def notes(results: dict[str, Any]) -> list[str]:
    """What must be known to read the tables."""
    text = results["text"]
    real = f"windows of {text['source']}, in {text['num_clusters']} clusters of {text['over']}"
    about = (
        f"{results['samples']} texts of {results['length']} tokens a set, none left out, EOS a token like any other; "
        f"as many {real}."
    )
    if results["judge"] is None:
        about = f"{results['samples']} {real}, of {results['length']} tokens."
    lines = [
        about,
        "= exact, ≤ a bound; [ ] and ± 95% intervals: of laws on real text over clusters of documents (Student's t, "
        "differences paired), of sets of texts over samples, of real ones over clusters (bootstrap; distinct-n by "
        "jackknife).",
    ]
    judge = results["judge"]
    if judge is not None:
        lines += [f"Judge: {judge['name']} ({judge['family']}{judge['chosen']}). {JUDGED}"]
        lines += judge["notes"]
    for model in results["models"]:
        lines += [f"{model['name']} has no {each}" for each in model["without"]]
    without_law = dict.fromkeys(each["sampler"] for each in results["cells"] if excludes(each["sampler"]))
    lines += [f"{each}: its top_p excludes tokens, so real text has probability 0." for each in without_law]
    return lines


def has_mauve(results: dict[str, Any]) -> bool:
    return any(cell["samples"] is not None and "mauve" in cell["samples"] for cell in results["cells"])


def about_models(results: dict[str, Any], layout: Layout) -> str:
    """The models of a study."""
    rows = [[each["name"], each["family"], quantity(each["parameters"])] for each in results["models"]]
    return layout(["model", "family", "parameters"], rows)


def with_ends(value: float, ends: Sequence[float | None] | None, form: Callable[[float], str]) -> str:
    """A value and its interval: 1.23 [1.20, 1.26]; an end of None is not reached."""
    if ends is None:
        return form(value)
    return f"{form(value)} [{', '.join('never' if each is None else form(each) for each in ends)}]"


def shown_passes(most: int, mean: float | None) -> str:
    """Passes of a text: how many it may take at most, and, where it takes fewer, how many it took.

    Interpolating diffusion takes more: the number is of its diffusion steps, and the tokens left take a pass each.
    """
    if mean is None or abs(mean - most) < 0.05:
        return str(most)
    return f"{mean:.1f} of {most}" if mean < most else f"{mean:.1f} ({most} diffusion steps)"


def _numbers(found: dict[str, Any]) -> list[str]:
    forms = {
        "generative_perplexity": three_digits,
        "entropy": "{:.2f}".format,
        "distinct_2": "{:.3f}".format,
        "self_bleu": "{:.3f}".format,
        "repetition": "{:.3f}".format,
        "copied": "{:.3f}".format,
    }
    return [
        with_ends(found[name]["value"], found[name]["interval_95"], form) if name in found else "–"
        for name, form in forms.items()
    ]
