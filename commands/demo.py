"""`prime-v2 demo`: two small models trained on this machine's documentation, measured side by side, and a sample."""

import contextlib
import sys
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer

from prime_v2.commands.base import finish
from prime_v2.commands.options import FOLDER, Json, Output

KEPT = ("nats_per_token", "stderr", "degrees", "perplexity", "is_bound", "is_exact", "unigram_entropy", "num_tokens")
LABELS = {"published": "published: binary digits, shuffled", "coarse_first": "coarse_first: codes grown from the text"}
PICTURE = "denoising.svg"
PROMPT, NEW_TOKENS = "Return the number of", 18  # of the sample: documentation begins like this
SEED = 0


def demo(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TRAIN_OPTIONS]",
            help="Options of train.py for both runs, such as --max_steps 300 or --data my_texts/.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the text, the runs and the picture.",
            show_default="runs/demo",
            callback=FOLDER,
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Train two small models, compare them and sample.

    They learn from this machine's documentation. One has the published form; the other has codes grown from the text
    and reveals the first digits of all tokens before the others. Both get the same measured FLOPs, about five minutes
    together on two cores. They are runs of configs/demo.yaml and need no network. The same command continues what was
    stopped, and prints the results again when all is done.
    """
    from prime_v2.eval.plugin import DEMO, DEMO_RUNS
    from prime_v2.output.drawing import save_drawing
    from prime_v2.output.progress import quiet_libraries
    from prime_v2.output.records import code_of, code_version, read_record

    quiet_libraries()
    folder, code = out or DEMO, code_version()
    for name in DEMO_RUNS:
        finished = folder / name / "results" / "train.json"
        if output is not None and finished.exists() and code_of(read_record(finished)) != code_of(code):
            raise ValueError(
                f"{folder / name} was trained by commit {code_of(read_record(finished), 12)}, this is "
                f"{code_of(code, 12)}, which --output {output} would name; give a new folder with --out"
            )
    records = train_both(arguments or [], folder, code)
    better = min(records, key=lambda name: bound_of(records[name])["nats_per_token"])
    text, picture = sample(folder / better)
    results = {
        "runs": {name: summary(record) for name, record in records.items()},
        "better": better,
        "sample": text,
    }
    finish("demo", results, lambda: report(results, folder), as_json, output, seed=SEED, code=code)
    save_drawing(picture, folder / PICTURE)


def train_both(arguments: list[str], out: Path, code: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of the two runs, trained or continued. Exits with 128 + its number after a signal."""
    from prime_v2.eval.plugin import DEMO_RUNS
    from prime_v2.output.records import read_record
    from prime_v2.training.options import RaisingParser, parse_options
    from prime_v2.training.run import keep_freed_memory, train

    keep_freed_memory()
    given = {each.split("=")[0] for each in arguments}
    for option in ("--output_dir", "--data_dir", "--config", "--record"):
        if option in given:
            raise ValueError(f"{option} is set by the demo for both runs; leave it out, or use train.py")
    records: dict[str, dict[str, Any]] = {}
    if not (out / "text").exists():
        print("preparing the text, about a minute ...", file=sys.stderr, flush=True)
    for name in DEMO_RUNS:
        place = ["--output_dir", str(out / name), "--data_dir", str(out / "text")]
        options = parse_options(["--config", f"demo:{name}", *arguments, *place], parser_class=RaisingParser)
        print(f"\n{LABELS[name]}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
            status = train(*options, code, tell=say_nothing)
        if status:
            raise typer.Exit(status)
        records[name] = read_record(out / name / "results" / "train.json")
    return records


def say_nothing(record: dict[str, Any], folder: Path) -> None:
    """In place of the summary of one run."""


def sample(folder: Path) -> tuple[str, Any]:
    """(A text of the model in `folder`, its picture)."""
    from prime_v2.commands.picture import picture_of
    from prime_v2.eval.loading import load_model_and_tokenizer
    from prime_v2.output.trace import Trace

    model, tokenizer = load_model_and_tokenizer(str(folder))
    prompt = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    room = model.config.max_position_embeddings - prompt.shape[1]
    trace, length = Trace(), min(NEW_TOKENS, room)
    ids = model.generate(prompt, streamer=trace, seed=SEED, max_new_tokens=length, eos_token_id=None)
    return tokenizer.decode(ids[0], skip_special_tokens=True), picture_of(trace, model, tokenizer)


def bound_of(record: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a run's likelihood."""
    return record["results"]["evaluation"]["bound"]


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What the demo says of a run."""
    training = record["results"]["training"]
    evaluation = record["results"]["evaluation"]
    return {
        "family": record["results"]["family"],
        "parameters": training["parameters"],
        "tokens": training["tokens"],
        "flops_measured": training["flops_measured"],
        "seconds": training["seconds"],
        **{
            name: {key: evaluation[name][key] for key in KEPT if key in evaluation[name]}
            for name in ("bound", "paper_loss")
            if name in evaluation
        },
    }


def report(results: dict[str, Any], out: Path) -> str:
    """The table of both runs and the unigram entropy, the sample, and where everything is."""
    from prime_v2.commands.generate import PICTURES
    from prime_v2.eval.intervals import plus_minus
    from prime_v2.output.numbers import duration, quantity
    from prime_v2.output.tables import aligned

    runs, better = results["runs"], results["better"]
    first = runs[better]["bound"]
    entropy = first["unigram_entropy"]
    rows = [
        ["held-out text, nats/token", "bound", "perplexity", "the paper's loss", "tokens", "FLOPs", "time"],
        ["token frequencies of this text (unigram entropy)", f"{entropy:.3f}", "", "", "", "", ""],
    ]
    for name, run in runs.items():
        bound, loss = run["bound"], run.get("paper_loss")
        rows.append(
            [
                LABELS[name],
                f"<= {bound['nats_per_token']:.3f}{plus_minus(bound)}",
                f"<= {bound['perplexity']:.0f}",
                "-" if loss is None else f"{loss['nats_per_token']:.3f} (no bound)",
                quantity(run["tokens"]),
                f"{run['flops_measured']:.2e}",
                duration(run["seconds"]),
            ]
        )
    sample_text = indent(results["sample"].rstrip().translate(PICTURES), "    ")
    return (
        f"\n{aligned(rows)}\n\n"
        f"Both were measured on the same {first['num_tokens']:,} tokens; lower is better, ± is a 95% interval. "
        f"FLOPs are of training, as measured.\n"
        f"The paper's loss is no bound on the likelihood: it says nothing about which model is better.\n\n"
        f"A sample of {better}, after the prompt {PROMPT!r}:\n\n{sample_text}\n\n"
        f"how it denoised    {out / PICTURE}\n"
        f"models             {', '.join(str(out / name) for name in runs)}\n"
        f"more samples       prime-v2 generate {out / better} --prompt {PROMPT!r} --watch"
    )
