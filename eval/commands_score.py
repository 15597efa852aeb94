"""`prime-v2 ppl` and `prime-v2 entropy`."""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_v2.eval.commands_shared import check_new_file, progress_bar, quiet_libraries
from prime_v2.eval.records import make_record, write_json
from prime_v2.tokenization.corpus import deduplicate, read_documents, split_of

SIDES = ("train", "dev", "test")


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
    path = Path(run_folder) / "run.json"
    if not path.is_file():
        raise ValueError(
            f"--split needs {path}, which says what {run_folder} was trained on; give the folder that train.py wrote, "
            f"or leave --split out"
        )
    options = json.loads(path.read_text(encoding="utf-8"))
    return {name: options[name] for name in ("seed", "dev_share", "test_share") if name in options}


def counted(documents: Iterator[str], show: Any) -> Iterator[str]:
    """The documents, their number shown as they pass."""
    for number, document in enumerate(documents, 1):
        show(number, None)
        yield document


def run_ppl(
    model_name: str,
    text: TextSource,
    method: str | None,
    num_samples: int,
    seed: int,
    device: str | None,
    dtype: str | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Score a text and print, and perhaps record, the result."""
    check_new_file(output)
    quiet_libraries()
    documents = text.documents("test", model_name)
    from prime_v2.eval.loading import load_model_and_tokenizer
    from prime_v2.eval.perplexity import score_text
    from prime_v2.likelihood_prime_v2 import BOUND_OF_ORDER

    model, tokenizer = load_model_and_tokenizer(model_name, device, dtype)
    method = method or BOUND_OF_ORDER[model.config.reveal_order]
    with progress_bar("reading documents") as show:
        kept = list(counted(documents, show))
    started = time.monotonic()
    with progress_bar("scoring sequences") as show:
        score = score_text(model, tokenizer, kept, method=method, num_samples=num_samples, seed=seed, progress=show)
    results = {
        "model": Path(model_name).name if Path(model_name).exists() else model_name,
        "source": text.source,
        "split": text.split,
        "max_documents": text.max_documents,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": time.monotonic() - started,
        "evaluation": score,
    }
    if output is not None:
        write_json(output, make_record("ppl", results, seed=seed))
    print(json.dumps(results, ensure_ascii=False, allow_nan=False) if as_json else render_score(score))


def render_score(score: dict[str, Any]) -> str:
    """A `score_text` result as text: a bound as a bound, and no perplexity from what is none."""
    stderr = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
    is_exact = score["method"] == "chain"
    sign = "=" if is_exact else "≤"
    kind = "exact, left to right" if is_exact else "bound" if score["is_bound"] else "not a bound"
    number = score.get("num_documents")
    documents = "" if number is None else "1 document, " if number == 1 else f"{number:,} documents, "
    lines = [
        ("text", f"{documents}{score['num_tokens']:,} tokens in {score['num_sequences']:,} sequences"),
        (score["method"], f"{score['nats_per_token']:.4f}{stderr} nats/token ({kind})"),
    ]
    if score["is_bound"]:
        lines.append(("perplexity", f"{sign} {score['perplexity']:.2f}{_interval(score, 'perplexity', 2)}"))
        if "bits_per_byte" in score:
            lines.append(
                ("bits per byte", f"{sign} {score['bits_per_byte']:.4f}{_interval(score, 'bits_per_byte', 4)}")
            )
    lines.append(("unigram entropy", f"{score['unigram_entropy']:.4f} nats/token, of these very tokens"))
    if score["num_samples"]:
        errors = [score[name] for name in ("stderr", "monte_carlo_stderr") if score[name] is not None]
        part = f", at most {min(errors):.4f} nats/token of the error" if len(errors) == 2 else ""
        lines.append(("draws", f"{score['num_samples']} a sequence{part}"))
    return "\n".join(f"{name:<17}{value}" for name, value in lines)


def _interval(score: dict[str, Any], name: str, digits: int) -> str:
    interval = score[f"{name}_interval_95"]
    if interval is None:
        return ""
    return f"  (95% interval {interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def run_entropy(
    text: TextSource, tokenizer_name: str, shuffle_seed: int, shuffle_domain: str, as_json: bool, output: Path | None
) -> None:
    """Print, and perhaps record, the table of sub-token entropies."""
    check_new_file(output)
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
    if output is not None:
        write_json(output, make_record("entropy", results, seed=shuffle_seed))
    if as_json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        print(f"{results['num_tokens']:,} tokens of {text.source}, vocabulary of {len(counts):,}")
        print(render_table(rows))


__all__ = ["TextSource", "render_score", "run_entropy", "run_ppl"]
