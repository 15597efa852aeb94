"""`prime-v2 ppl`: bounds, perplexity and bits per byte of text, of one model or a table of models."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prime_v2.commands.base import finish
from prime_v2.commands.options import (
    MOST_DRAWS,
    SOURCE_HELP,
    BlockLength,
    CacheKind,
    Device,
    Dtype,
    EntropyBound,
    Json,
    MaxDocuments,
    Model,
    Output,
    Sampler,
    Score,
    Split,
    StagePasses,
    Steps,
    Temperature,
    TextField,
    Threshold,
    TopP,
    Unit,
    Window,
)
from prime_v2.commands.text_source import TextSource, run_options
from prime_v2.output.paths import short_names
from prime_v2.output.progress import progress_bar, quiet_libraries
from prime_v2.output.records import code_version

if TYPE_CHECKING:
    from prime_v2.eval.suites import SetOfDocuments

PplSource = Annotated[
    str | None, typer.Argument(metavar="SOURCE", help=f"{SOURCE_HELP} Absent with --suite.", show_default=False)
]
Suite = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Score a suite of texts: zero-shot (OpenWebText, LAMBADA, WikiText, PTB, LM1B, AG News, ArXiv).",
    ),
]
SuiteData = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Read the suite from DIR/SET.txt, .jsonl or .parquet or a folder DIR/SET, nothing from the Hub; sets "
        "that are not there are skipped.",
    ),
]
Only = Annotated[list[str] | None, typer.Option(metavar="SET", help="One set of the suite; repeatable.")]
Also = Annotated[
    list[str] | None,
    typer.Option(metavar="MODEL", help="Another model, for a table of all on the same windows; repeatable."),
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tokens scored a window, given those before them [default: all of it]."),
]
PplMethod = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="subtoken, token, nested, coarse_first or windows: bounds, for each order of reveal; "
        "chain: exact, left to right, slow; "
        "orders: a bound from random orders, slowest; sampler: of what generate writes, exact but for ancestral; "
        "paper_loss: the paper's loss, no bound; uniform, "
        "interpolating: the bounds of these families. A causal model has only causal, its exact likelihood. Beside "
        "others, a model without the given method keeps its own.",
        show_default="the bound of the order in which the model reveals",
    ),
]


def ppl(
    model: Model,
    source: PplSource = None,
    suite: Suite = None,
    data: SuiteData = None,
    only: Only = None,
    also: Also = None,
    window: Window = None,
    stride: Stride = None,
    method: PplMethod = None,
    num_samples: Annotated[
        int, typer.Option(min=1, max=MOST_DRAWS, metavar="N", help="Noise draws per sequence.")
    ] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the draws.")] = 0,
    sampler: Sampler = None,
    steps: Steps = None,
    unit: Unit = None,
    score: Score = None,
    threshold: Threshold = None,
    entropy_bound: EntropyBound = None,
    stage_passes: StagePasses = None,
    block_length: BlockLength = None,
    cache: CacheKind = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    split: Split = None,
    text_field: TextField = "text",
    max_documents: MaxDocuments = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Bound the likelihood and perplexity of text.

    In nats per token, as a perplexity and in bits per byte, each with its error.

    MODEL and those of --also are Prime-v2 or causal models (AutoModelForCausalLM). With --method sampler it is the
    likelihood of what `prime-v2 generate` writes with the same options.

    \b
    prime-v2 ppl MODEL my_text.txt
    prime-v2 ppl MODEL my_text.txt --also gpt2 --window 512
    prime-v2 ppl MODEL my_text.txt --method sampler --sampler margin --steps 64
    prime-v2 ppl MODEL --suite zero-shot --also gpt2 --output suite.json
    """
    if source is None and suite is None:
        raise ValueError("Missing argument 'SOURCE', or --suite")
    if source is not None and suite is not None:
        raise ValueError("give either a SOURCE or --suite NAME")
    if suite is None and (data or only):
        raise ValueError("--data and --only belong to a suite; add --suite zero-shot")
    if suite is not None and (split or text_field != "text"):
        raise ValueError("--split and --text-field belong to a SOURCE; a suite knows those of its sets")
    from prime_v2.eval.samplers import named_sampler

    of_rule = {"unit": unit, "score": score, "threshold": threshold, "entropy_bound": entropy_bound}
    of_rule |= {"stage_passes": stage_passes}
    of_law = {"block_length": block_length, "cache": cache, "temperature": temperature, "top_p": top_p}
    of_sampler = {"sampler": sampler, "steps": steps, **of_rule, **of_law}
    of_sampler = {name: value for name, value in of_sampler.items() if value is not None}
    named_sampler(sampler, **of_rule)  # refused before anything is read
    if of_sampler and method != "sampler":
        first = next(iter(of_sampler)).replace("_", "-")
        raise ValueError(f"--{first} is an option of --method sampler; add that, or leave --{first} out")
    from huggingface_hub.utils import logging

    quiet_libraries()
    logging.set_verbosity_error()  # each retry of a hub that cannot be reached is a warning
    code = code_version()
    models = [model, *(also or [])]
    text = (
        SuiteSource(suite, data, only or [], max_documents)
        if source is None
        else TextSource(source, split, text_field, max_documents)
    )
    # With --output each sequence is kept, so that models can be compared sequence by sequence.
    options = {"num_samples": num_samples, "seed": seed, "keep_sequences": output is not None}
    scoring = Scoring(method, device, dtype, options | {"window": window, "stride": stride}, of_sampler)
    if isinstance(text, TextSource) and len(models) == 1:
        results = _score_one(model, text, scoring)
        rows = [results["evaluation"]]
    else:
        results = _score_table(models, text, scoring)
        rows = results["rows"]
    if as_json:  # the tables say it themselves
        for row in rows:
            if "tokenizer_loss" in row:
                print(f"no bits per byte: {_lossy(row)}", file=sys.stderr)
    if "rows" in results:
        finish("ppl_table", results, lambda: render_table(results), as_json, output, seed=seed, code=code)
    else:
        finish("ppl", results, lambda: render_score(rows[0]), as_json, output, seed=seed, code=code)


@dataclass
class SuiteSource:
    """A suite of texts as the command line names it."""

    suite: str
    data: Path | None
    only: list[str]
    max_documents: int | None


@dataclass
class Scoring:
    """How `ppl` scores: the method, None for each model's own, where and in what type the models run, the other
    options of `score_text`, and the sampler with its options, of "sampler".
    """

    method: str | None
    device: str | None
    dtype: str | None
    options: dict[str, Any]
    of_sampler: dict[str, Any]

    def of(self, model: Any, method: str) -> dict[str, Any]:
        """Options of `score_text` for this model and its method."""
        from prime_v2.eval.samplers import named_config

        config = named_config(model, **self.of_sampler) if method == "sampler" else None
        return {**self.options, "method": method, "generation_config": config}


def _score_one(model_name: str, text: TextSource, scoring: Scoring) -> dict[str, Any]:
    from prime_v2.eval.loading import load_scorer
    from prime_v2.eval.perplexity import score_text

    method = _methods([model_name], scoring.method)[0]
    model, tokenizer = load_scorer(model_name, scoring.device, scoring.dtype)
    options = scoring.of(model, method)
    documents = text.read("test", model_name)
    started = time.monotonic()
    with progress_bar("scoring sequences") as show:
        score = score_text(model, tokenizer, documents, progress=show, **options)
    return {
        "model": short_names([model_name])[0],
        **text.about(),
        **_device(model),
        "seconds": time.monotonic() - started,
        "evaluation": score,
    }


def _score_table(models: list[str], text: TextSource | SuiteSource, scoring: Scoring) -> dict[str, Any]:
    """Rows of set x model: flat dictionaries of `score_text`'s numbers; all models on windows of one length."""
    from prime_v2.eval.loading import load_config, load_scorer
    from prime_v2.eval.perplexity import score_text
    from prime_v2.eval.suites import sets_trained_on
    from prime_v2.eval.windows import window_and_stride

    labels, methods = short_names(models), _methods(models, scoring.method)
    requested = (scoring.options["window"], scoring.options["stride"])
    window, stride = window_and_stride([load_config(each) for each in models], *requested)
    sets, skipped = _read_sets(text, models[0])
    rows, about = [], []
    for name, label, method in zip(models, labels, methods, strict=True):
        model, tokenizer = load_scorer(name, scoring.device, scoring.dtype)
        about.append({"name": label, "model_type": model.config.model_type, "method": method, **_device(model)})
        if isinstance(text, SuiteSource):
            trained_on = sets_trained_on(text.suite, run_options(name))
            about[-1]["trained_on"] = [each.name for each in sets if each.name in trained_on]
        for each in sets:
            started = time.monotonic()
            options = scoring.of(model, method) | {"window": window, "stride": stride}
            try:
                with progress_bar(f"{label}, {each.name}") as show:
                    score = score_text(model, tokenizer, each.documents, progress=show, **options)
            except ValueError as error:
                raise ValueError(f"{label} on {each.name}: {error}") from error
            rows.append({"set": each.name, "model": label, **score, "seconds": time.monotonic() - started})
        del model, tokenizer  # before the next one is loaded
    names = [each.name for each in sets]
    return {
        "suite": text.suite if isinstance(text, SuiteSource) else None,
        "max_documents": text.max_documents,
        "window": window,
        "stride": stride,
        "models": about,
        "sets": [each.description() for each in sets],
        "skipped": skipped,
        "rows": sorted(rows, key=lambda row: names.index(row["set"])),
    }


def _read_sets(text: TextSource | SuiteSource, run_folder: str) -> tuple[list["SetOfDocuments"], list[dict[str, str]]]:
    from prime_v2.eval.suites import SetOfDocuments, read_suite

    if isinstance(text, SuiteSource):
        with progress_bar("reading documents") as show:
            return read_suite(text.suite, text.data, only=text.only, max_documents=text.max_documents, progress=show)
    local = Path(text.source).expanduser()
    name = local.name if local.exists() else text.source
    source = ", ".join(filter(None, [name, text.split]))
    return [SetOfDocuments(name, source, text.read("test", run_folder))], []


def _device(model: Any) -> dict[str, str]:
    """Where and in what type a model runs, for a record."""
    return {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def _methods(models: list[str], asked: str | None) -> list[str]:
    """The method of each model: the one that is asked for where the model has it, otherwise the model's own.

    Raises ValueError for a method that is unknown or that no model here has.
    """
    from prime_v2.eval.causal import METHOD
    from prime_v2.eval.loading import is_causal, load_config
    from prime_v2.families import FAMILIES, FAMILY_OF_TYPE, bound_method, check_method, methods_of
    from prime_v2.validation_keywords_prime_v2 import one_of

    if asked is not None:
        one_of(f"--method {asked}", asked, sorted({each for family in FAMILIES.values() for each in family.methods}))
    chosen, there, of_family = [], [], []
    for name in models:
        methods: tuple[str, ...] = (METHOD,)
        own = METHOD
        if not is_causal(name):
            config = load_config(name)
            methods, own = methods_of(config), bound_method(config)
            of_family += [config] if asked in FAMILY_OF_TYPE[config.model_type].methods else []
        chosen.append(asked if asked in methods else own)
        there.append(f"{name} has {', '.join(methods)}")
    if asked is not None and asked not in chosen:
        for config in of_family:
            check_method(config, asked)  # says why not
        raise ValueError(f"--method {asked} is for other models; {'; '.join(there)}")
    return chosen


def render_score(score: dict[str, Any]) -> str:
    """A `score_text` result as text: a bound as a bound, and no perplexity from what is none."""
    from prime_v2.eval.intervals import plus_minus
    from prime_v2.eval.samplers import sentence

    sign = "=" if score["is_exact"] else "≤"
    exact = "exact, of this sampler" if score["method"] == "sampler" else "exact, left to right"
    kind = exact if score["is_exact"] else "bound" if score["is_bound"] else "not a bound"
    kind += _of_draws(score) if score["stderr"] is None else ""
    number = score.get("num_documents")
    documents = "" if number is None else "1 document, " if number == 1 else f"{number:,} documents, "
    lines = [
        ("text", f"{documents}{score['num_tokens']:,} tokens in {score['num_sequences']:,} sequences"),
        (score["method"], f"{score['nats_per_token']:.4f}{plus_minus(score, 4)} nats/token ({kind})"),
    ]
    if "sampler" in score:
        lines.append(("what is written", f"{sentence(score)}; {score['passes_per_token']:.3f} passes a token"))
    if score["is_bound"]:
        lines.append(("perplexity", f"{sign} {score['perplexity']:.2f}{_interval(score, 'perplexity', 2)}"))
        if "bits_per_byte" in score:
            lines.append(
                ("bits per byte", f"{sign} {score['bits_per_byte']:.4f}{_interval(score, 'bits_per_byte', 4)}")
            )
        elif "tokenizer_loss" in score:
            lines.append(("bits per byte", f"none: {_lossy(score)}"))
    lines.append(("unigram entropy", f"{score['unigram_entropy']:.4f} nats/token, of these very tokens"))
    if score["num_samples"]:
        errors = [score[name] for name in ("stderr", "monte_carlo_stderr") if score[name] is not None]
        part = f", at most {min(errors):.4f} nats/token of the standard error" if len(errors) == 2 else ""
        lines.append(("draws", f"{score['num_samples']} a sequence{part}"))
    lines.append(("intervals", _about_intervals([score])))
    return "\n".join(f"{name:<17}{value}" for name, value in lines)


_NO_SPREAD = "a single sequence does not show how texts differ"


def _of_draws(score: dict[str, Any]) -> str:
    """What is known of the error of a single sequence; nothing where it has one draw or none."""
    error = score["monte_carlo_stderr"]
    return f"; standard error of its draws {error:.4f} nats/token" if error else ""


def _about_intervals(scores: list[dict[str, Any]]) -> str:
    """What the intervals of these scores cover, and how to read that of a bound."""
    from prime_v2.eval.intervals import UPPER_END

    scores = [each for each in scores if each["stderr"] is not None]
    if not scores:
        return f"none: {_NO_SPREAD}"
    names = {"documents": "documents", "stretches": "stretches of one text (not other documents)"}
    covered = " or ".join(names[over] for over in dict.fromkeys(score["interval_over"] for score in scores))
    draws = " and draws" if any(score["num_samples"] for score in scores) else ""
    bounds = any(score["is_bound"] and not score["is_exact"] for score in scores)
    return f"95% (Student's t), over {covered}{draws}{f'. {UPPER_END}' if bounds else ''}"


def _lossy(score: dict[str, Any]) -> str:
    from prime_v2.tokenization.plain_text import not_kept

    return not_kept(score["tokenizer_loss"])


def render_table(results: dict[str, Any]) -> str:
    """A table of sets and models: bounds with ≤, exact values with =, and no perplexity from what is neither."""
    from prime_v2.output.tables import aligned

    heads = ["set", "model", "nats/token", "perplexity", "bits/byte", "tokens", "draws", "method"]
    shown = [aligned([heads, *map(_table_row, results["rows"])])]
    windows = f"windows of {results['window']:,} tokens"
    if results["stride"] < results["window"]:
        windows += f", the last {results['stride']:,} of them scored"
    shown.append(f"\n{windows}; = exact, ≤ bound; ± and [ ] are intervals: {_about_intervals(results['rows'])}")
    shown += [
        f"no interval for {row['model']} on {row['set']}: {_NO_SPREAD}{_of_draws(row)}"
        for row in results["rows"]
        if row["stderr"] is None
    ]
    totals = {(row["set"], row["num_tokens"]) for row in results["rows"]}
    if len(totals) > len(results["sets"]):
        shown.append("the models' tokenizers differ: compare bits/byte, not nats/token or perplexity")
    shown += [
        f"{each['name']} was trained on {name}, which is not held out for it"
        for each in results["models"]
        for name in each.get("trained_on", [])
    ]
    shown += [
        f"no bits/byte of {row['model']} on {row['set']}: {_lossy(row)}"
        for row in results["rows"]
        if "tokenizer_loss" in row
    ]
    shown += [f"skipped {each['name']}: {each['reason']}" for each in results["skipped"]]
    return "\n".join(shown)


def _table_row(row: dict[str, Any]) -> list[str]:
    from prime_v2.eval.intervals import plus_minus
    from prime_v2.eval.samplers import sentence

    sign = "=" if row["is_exact"] else "≤" if row["is_bound"] else " "
    cells = [row["set"], row["model"], f"{sign} {row['nats_per_token']:.4f}{plus_minus(row, 4)}"]
    for name, digits in (("perplexity", 2), ("bits_per_byte", 4)):
        if name not in row:
            cells.append("-")
            continue
        interval = row[f"{name}_interval_95"]
        spread = "" if interval is None else " [{:,.{digits}f}, {:,.{digits}f}]".format(*interval, digits=digits)
        cells.append(f"{sign} {row[name]:,.{digits}f}{spread}")
    method = row["method"] if row["is_bound"] else f"{row['method']} (no bound)"
    if "sampler" in row:
        method = f"sampler ({sentence(row)}; {row['passes_per_token']:.3f} passes a token)"
    return [*cells, f"{row['num_tokens']:,}", str(row["num_samples"] or "none"), method]


def _interval(score: dict[str, Any], name: str, digits: int) -> str:
    interval = score[f"{name}_interval_95"]
    if interval is None:
        return ""
    return f"  (95% interval {interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
