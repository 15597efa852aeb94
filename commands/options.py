"""Options and arguments that several sub-commands share."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from prime_v2.commands.base import place
from prime_v2.output.places import check_folder, check_new_file, check_new_folder

# The largest values of options that count: more would end in the machine's limits, or never.
MANY = 10**12  # of what is read or done at most, where less is there
MOST_SAMPLES = 1024  # texts that are generated at once
MOST_DRAWS = 10**6  # for one number

# Callbacks of options and arguments that name a place to write.
NEW_FOLDER, FOLDER = map(place, (check_new_folder, check_folder))


def new_file(*suffixes: str) -> Callable[..., Path | None]:
    """The callback of an option that names a new file, with one of these suffixes."""
    return place(partial(check_new_file, suffixes=suffixes))


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its name on the Hub.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, ... [default: cuda if there is one]")]
Dtype = Annotated[
    str | None, typer.Option(metavar="NAME", help="Type of the weights [default: bfloat16 on cuda, else float32]")
]

SOURCE_HELP = (
    "Text: a .txt, .jsonl or .parquet file, a folder of them, a Hub data set name[:config], or docs (the "
    "documentation of the installed Python packages)."
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Split of a Hub data set [default: train for entropy, else test]. For other sources "
        "train, dev or test: the documents that train.py puts there [default: all documents].",
    ),
]
TextField = Annotated[str, typer.Option(metavar="NAME", help="Field or column that holds the text.")]
MaxDocuments = Annotated[int | None, typer.Option(min=1, max=MANY, metavar="N", help="Read at most N documents.")]
Window = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens a window [default: the smallest limit of the models].")
]

TaskSplit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TASK=]SPLIT",
        help="Score train, validation or test, of all tasks or of TASK; repeatable [default: test, or validation "
        "without one].",
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write a record, .json: the numbers with command, commit, versions and machine. FILE must be new.",
        callback=new_file(".json"),
    ),
]

# Samplers (prime_v2.eval.samplers): of generate, and of the law that ppl scores.
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What a pass reveals: ancestral (units at random times), probability, margin or entropy (the surest "
        "units; short for confidence with that --score), threshold, entropy-bound or remasking; of uniform-state "
        "models ancestral or predictor-corrector.",
        show_default="the model's own",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--max-denoising-steps",
        "--steps",
        min=1,
        max=MANY,
        metavar="N",
        help="Steps; more of them draw fewer tokens at once.",
    ),
]
Unit = Annotated[str | None, typer.Option(metavar="NAME", help="Unit of a rule: token, digit, or stage.")]
Score = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of --sampler confidence: probability, margin or entropy.")
]
Threshold = Annotated[
    float | None, typer.Option(metavar="X", help="Of threshold: the probability to exceed, in (0, 1).")
]
EntropyBound = Annotated[
    float | None, typer.Option(metavar="X", help="Of entropy-bound: nats of uncertainty a pass may reveal.")
]
StagePasses = Annotated[
    str | None,
    typer.Option(
        metavar="X:X...",
        help="Share of the passes that each stage gets, e.g. 0.75:0.25; with --unit stage, or of ancestral in a "
        "coarse-first model.",
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(metavar="X", help="Of remasking: the largest probability of hiding a revealed unit in a step."),
]
TimeOn = Annotated[
    float | None,
    typer.Option(
        "--t-on",
        metavar="T",
        help="Of remasking and predictor-corrector: they act at times in (T_OFF, T_ON] of [0, 1].",
    ),
]
TimeOff = Annotated[float | None, typer.Option("--t-off", metavar="T", help="See --t-on; time falls from 1 to 0.")]
CorrectorSteps = Annotated[
    int | None,
    typer.Option(min=1, max=MANY, metavar="N", help="Of predictor-corrector: corrector steps after a predictor step."),
]
CorrectorShare = Annotated[
    float | None,
    typer.Option(metavar="X", help="Of predictor-corrector: share of the tokens that one redraws, in (0, 1]."),
]
BlockLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Fill blocks of N tokens from left to right.")
]
CacheKind = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="NAME",
        help="Keys and values kept in a block of --block-length: none, prefix or dual (approximate).",
    ),
]
Temperature = Annotated[float | None, typer.Option(metavar="X", help="Divisor of the logits, above 0.")]
TopP = Annotated[float | None, typer.Option(metavar="X", help="Mass of the nucleus, in (0, 1].")]
