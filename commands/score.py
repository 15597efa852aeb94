"""`prime-v2 ppl` and `prime-v2 entropy`."""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prime_v2.data.documents import deduplicate, read_documents, split_of
from prime_v2.eval.intervals import UPPER_END, plus_minus
from prime_v2.eval.suites import SetOfDocuments, nearest, read_suite, sets_trained_on
from prime_v2.output.places import print_and_record
from prime_v2.output.progress import progress_bar, quiet_libraries
from prime_v2.output.records import make_record
from prime_v2.tokenization.round_trip import not_kept
from prime_v2.validation_config_prime_v2 import read_mapping

SIDES = ("train", "dev", "test")
RUN_FILE = "run.json"  # of train.py


@dataclass
class TextSource:
    """A source of text as the command line names it."""

    source: str
    split: str | None
    text_field: str
    max_documents: int | None

    def documents(self, hub_split: str, run_folder: str | None = None) -> Iterator[str]:
        """Its documents. hub_split: of a hub data set, where no split is asked for.

        run_folder: a run of train.py, whose seed and shares decide which side a document of another source is on.
        """
        is_hub = self.source != "docs" and not Path(self.source).expanduser().exists()
        split = self.split or hub_split
        documents = read_documents(self.source, text_field=self.text_field, split=split)
        if self.split is not None and not is_hub:
            if self.split not in SIDES:
                raise ValueError(f"--split {self.split} of {self.source} must be one of {', '.join(SIDES)}")
            shares = _shares(run_folder)
            documents = (text for text in deduplicate(documents) if split_of(text, **shares) == self.split)
        return itertools.islice(documents, self.max_documents)


def _shares(run_folder: str | None) -> dict[str, Any]:
    """Arguments of `split_of` from the run.json of a run; without a run, none: its defaults."""
    if run_folder is None:
        return {}
    options = _run_options(run_folder)
    if not options:
        path = Path(run_folder) / RUN_FILE
        raise ValueError(
            f"--split needs {path}, which says what {run_folder} was trained on; give the folder that train.py wrote, "
            f"or leave --split out"
        )
    shares: dict[str, Any] = {name: options[name] for name in ("seed", "dev_share", "test_share") if name in options}
    if not all(isinstance(each, int | float) for each in shares.values()) or isinstance(shares.get("seed"), float):
        raise ValueError(f"{Path(run_folder) / RUN_FILE} has {shares}, which are no seed and shares; put a copy back")
    return shares


def _run_options(run_folder: str) -> dict[str, Any]:
    """The options that train.py wrote beside a model; none where it did not."""
    path = Path(run_folder) / RUN_FILE
    return read_mapping(path, "put a copy of it back, or move it away") if path.is_file() else {}


def counted(documents: Iterator[str], show: Any) -> Iterator[str]:
    """The documents, their number shown as they pass."""
    for number, document in enumerate(documents, 1):
        show(number, None)
        yield document


@dataclass
class SuiteSource:
    """A suite of texts as the command line names it."""

    suite: str
    data: Path | None
    only: list[str]
    max_documents: int | None


@dataclass
class Scoring:
    """How `ppl` scores: options of `score_text`, None for their defaults, and where and in what the models run."""

    method: str | None
    num_samples: int
    seed: int
    window: int | None
    stride: int | None
    device: str | None
    dtype: str | None
    keep_sequences: bool = False  # in a record, so that models can be compared sequence by sequence

    def options(self) -> dict[str, Any]:
        """Of `score_text`, but for the method, which each model has its own of."""
        names = ("num_samples", "seed", "window", "stride", "keep_sequences")
        return {name: getattr(self, name) for name in names}


def run_ppl(
    models: list[str], text: TextSource | SuiteSource, scoring: Scoring, as_json: bool, output: Path | None
) -> None:
    """Score one text with one model, or make a table of texts and models; print and perhaps record the result."""
    from huggingface_hub.utils import logging

    quiet_libraries()
    logging.set_verbosity_error()  # each retry of a hub that cannot be reached is a warning
    if len(set(models)) < len(models):
        raise ValueError(f"{next(each for each in models if models.count(each) > 1)} is given twice; once will do")
    results: dict[str, Any]
    scoring = replace(scoring, keep_sequences=output is not None)
    if isinstance(text, TextSource) and len(models) == 1:
        results = _score_one(models[0], text, scoring)
        scores = [results["evaluation"]]
        shown, name = "" if as_json else render_score(results["evaluation"]), "ppl"
    else:
        results = _score_table(models, text, scoring)
        scores = results["rows"]
        shown, name = "" if as_json else render_table(results), "ppl_table"
    for score in scores if as_json else ():  # the tables say it themselves
        if "tokenizer_loss" in score:
            print(f"no bits per byte: {_lossy(score)}", file=sys.stderr)
    shown = json.dumps(results, ensure_ascii=False, allow_nan=False) if as_json else shown
    print_and_record(shown, output, partial(make_record, name, results, seed=scoring.seed))


def _score_one(model_name: str, text: TextSource, scoring: Scoring) -> dict[str, Any]:
    documents = text.documents("test", model_name)
    from prime_v2.eval.loading import load_scorer
    from prime_v2.eval.perplexity import score_text

    method = _methods([model_name], scoring.method)[0]
    model, tokenizer = load_scorer(model_name, scoring.device, scoring.dtype)
    with progress_bar("reading documents") as show:
        kept = list(counted(documents, show))
    started = time.monotonic()
    with progress_bar("scoring sequences") as show:
        score = score_text(model, tokenizer, kept, method=method, progress=show, **scoring.options())
    return {
        "model": labels_of([model_name])[0],
        "source": text.source,
        "split": text.split,
        "max_documents": text.max_documents,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": time.monotonic() - started,
        "evaluation": score,
    }


def _score_table(models: list[str], text: TextSource | SuiteSource, scoring: Scoring) -> dict[str, Any]:
    """Rows of set x model: flat dictionaries of `score_text`'s numbers; all models on windows of one length."""
    from prime_v2.eval.loading import load_config, load_scorer
    from prime_v2.eval.perplexity import score_text
    from prime_v2.eval.windows import window_and_stride

    methods, labels = _methods(models, scoring.method), labels_of(models)
    window, stride = window_and_stride([load_config(each) for each in models], scoring.window, scoring.stride)
    sets, skipped = _read_sets(text, models[0])
    rows, about = [], []
    for name, label, method in zip(models, labels, methods, strict=True):
        model, tokenizer = load_scorer(name, scoring.device, scoring.dtype)
        about.append({"name": label, "model_type": model.config.model_type, "method": method})
        about[-1] |= {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        if isinstance(text, SuiteSource):
            trained_on = sets_trained_on(text.suite, _run_options(name))
            about[-1]["trained_on"] = [each.name for each in sets if each.name in trained_on]
        for each in sets:
            started = time.monotonic()
            options = scoring.options() | {"window": window, "stride": stride}
            try:
                with progress_bar(f"{label}, {each.name}") as show:
                    score = score_text(model, tokenizer, each.documents, method=method, progress=show, **options)
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


def _read_sets(text: TextSource | SuiteSource, run_folder: str) -> tuple[list[SetOfDocuments], list[dict[str, str]]]:
    with progress_bar("reading documents") as show:
        if isinstance(text, SuiteSource):
            return read_suite(text.suite, text.data, only=text.only, max_documents=text.max_documents, progress=show)
        kept = list(counted(text.documents("test", run_folder), show))
        local = Path(text.source).expanduser()
        name = local.name if local.exists() else text.source
        return [SetOfDocuments(name, ", ".join(filter(None, [name, text.split])), kept)], []


def _methods(models: list[str], asked: str | None) -> list[str]:
    """The method of each model. asked: None for each model's own; otherwise that of the models that have it.

    Raises ValueError for an unknown method, for one that no model here has, and for "causal" beside a model that has
    others.
    """
    from prime_v2.eval.causal import METHOD, check_method
    from prime_v2.eval.loading import is_causal, load_config
    from prime_v2.families import FAMILIES, FAMILY_OF_TYPE, bound_method

    if asked is not None:
        nearest("--method", asked, sorted({method for family in FAMILIES.values() for method in family.methods}))
    methods, reported = [], []
    for name in models:
        config = None if is_causal(name) else load_config(name)
        methods.append((METHOD,) if config is None else FAMILY_OF_TYPE[config.model_type].methods)
        reported.append(METHOD if config is None else bound_method(config))
    having = [asked in each for each in methods]
    if asked not in (None, METHOD) and all(each == (METHOD,) for each in methods):
        check_method(asked)
    if asked == METHOD and not all(having):
        other = having.index(False)
        raise ValueError(
            f"method={METHOD!r} is for causal models; {models[other]} is a diffusion model and has "
            f"{', '.join(methods[other])}"
        )
    if asked is not None and not any(having):
        raise ValueError(f"method={asked!r} is none of {models[0]}, which has {', '.join(methods[0])}")
    return [asked if has else own for has, own in zip(having, reported, strict=True)]


def labels_of(models: list[str]) -> list[str]:
    """Names for a record: of a folder its own, with as many folders above as tell the models apart."""
    paths = [Path(os.path.abspath(Path(each).expanduser())) for each in models]
    parts = [path.parts if path.exists() else (name,) for path, name in zip(paths, models, strict=True)]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-count:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"{models[-1]} is given twice; once will do")


def render_score(score: dict[str, Any]) -> str:
    """A `score_text` result as text: a bound as a bound, and no perplexity from what is none."""
    sign = "=" if score["is_exact"] else "≤"
    kind = "exact, left to right" if score["is_exact"] else "bound" if score["is_bound"] else "not a bound"
    number = score.get("num_documents")
    documents = "" if number is None else "1 document, " if number == 1 else f"{number:,} documents, "
    lines = [
        ("text", f"{documents}{score['num_tokens']:,} tokens in {score['num_sequences']:,} sequences"),
        (score["method"], f"{score['nats_per_token']:.4f}{plus_minus(score, 4)} nats/token ({kind})"),
    ]
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
    if score["stderr"] is not None:
        lines.append(("intervals", _about_intervals([score])))
    return "\n".join(f"{name:<17}{value}" for name, value in lines)


def _about_intervals(scores: list[dict[str, Any]]) -> str:
    """What the intervals of these scores cover, and how to read that of a bound."""
    names = {"documents": "documents", "stretches": "stretches of one text (not other documents)"}
    covered = " or ".join(names[over] for over in dict.fromkeys(score["interval_over"] for score in scores))
    draws = " and draws" if any(score["num_samples"] for score in scores) else ""
    bounds = any(score["is_bound"] and not score["is_exact"] for score in scores)
    return f"95% (Student's t), over {covered}{draws}{f'. {UPPER_END}' if bounds else ''}"


def _lossy(score: dict[str, Any]) -> str:
    return not_kept(score["tokenizer_loss"])


def render_table(results: dict[str, Any]) -> str:
    """A table of sets and models: bounds with ≤, exact values with =, and no perplexity from what is neither."""
    heads = ["set", "model", "nats/token", "perplexity", "bits/byte", "tokens", "draws", "method"]
    lines = [heads, *(_table_row(row) for row in results["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    shown = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    windows = f"windows of {results['window']:,} tokens"
    if results["stride"] < results["window"]:
        windows += f", the last {results['stride']:,} of them scored"
    shown.append(f"\n{windows}; = exact, ≤ bound; ± and [ ] are intervals: {_about_intervals(results['rows'])}")
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
    return [*cells, f"{row['num_tokens']:,}", str(row["num_samples"] or "none"), method]


def _interval(score: dict[str, Any], name: str, digits: int) -> str:
    interval = score[f"{name}_interval_95"]
    if interval is None:
        return ""
    return f"  (95% interval {interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def run_entropy(
    text: TextSource, tokenizer_name: str, shuffle_seed: int, shuffle_domain: str, as_json: bool, output: Path | None
) -> None:
    """Print, and perhaps record, the table of sub-token entropies."""
    quiet_libraries()
    documents = text.documents("train")
    from prime_v2.eval.loading import load_tokenizer
    from prime_v2.tokenization.entropy import count_tokens, entropy_table, render_table

    tokenizer = load_tokenizer(tokenizer_name)
    with progress_bar("counting tokens of documents") as show:
        counts = count_tokens(counted(documents, show), tokenizer)
    rows = entropy_table(counts, len(counts), shuffle_seed, shuffle_domain)
    results = {
        "tokenizer": Path(tokenizer_name).name if Path(tokenizer_name).exists() else tokenizer_name,
        "vocab_size": len(counts),
        "source": text.source,
        "split": text.split,
        "max_documents": text.max_documents,
        "num_tokens": int(counts.sum()),
        "shuffle_seed": shuffle_seed,
        "shuffle_domain": shuffle_domain,
        "rows": rows,
    }
    shown = f"{results['num_tokens']:,} tokens of {text.source}, vocabulary of {len(counts):,}\n{render_table(rows)}"
    shown = json.dumps(results, ensure_ascii=False, allow_nan=False) if as_json else shown
    print_and_record(shown, output, partial(make_record, "entropy", results, seed=shuffle_seed))


__all__ = [
    "RUN_FILE",
    "Scoring",
    "SuiteSource",
    "TextSource",
    "labels_of",
    "render_score",
    "render_table",
    "run_entropy",
    "run_ppl",
]
