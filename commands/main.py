"""The command `prime-v2`. Each sub-command imports what it needs when it runs, so that `--help` answers at once.

Bad input (ValueError, OSError, a configuration that Transformers refuses, a wrong option) ends with one sentence on
stderr and exit status 2; any other exception is a fault of ours and keeps its traceback.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prime_v2.commands.base import (
    FOLDER,
    MANY,
    MOST_DRAWS,
    MOST_SAMPLES,
    NEW_FOLDER,
    PROGRAM,
    Command,
    Group,
    Json,
    Output,
)
from prime_v2.commands.compare import SHORT_HELP as COMPARE_HELP
from prime_v2.commands.compare import compare
from prime_v2.commands.convert import SHORT_HELP as CONVERT_HELP
from prime_v2.commands.convert import convert
from prime_v2.commands.scaling import scaling_app

app = typer.Typer(
    name=PROGRAM,
    cls=Group,
    help="MDM-Prime-v2: sample from masked diffusion language models over sub-tokens, and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False):
    if version:
        from prime_v2 import __version__

        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


class ShuffleDomain(StrEnum):
    """What the index shuffle permutes."""

    codes = "codes"
    vocab = "vocab"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its name on the Hub.")]
SOURCE_HELP = (
    "Text: a .txt, .jsonl or .parquet file, a folder of them, a Hub data set name[:config], or docs (the "
    "documentation of the installed Python packages)."
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Split of a Hub data set [default: test for ppl and analyze, train for entropy]. For other sources "
        "train, dev or test: the documents that train.py puts there [default: all documents].",
    ),
]
TextField = Annotated[str, typer.Option(metavar="NAME", help="Field or column that holds the text.")]
MaxDocuments = Annotated[int | None, typer.Option(min=1, max=MANY, metavar="N", help="Read at most N documents.")]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, ... [default: cuda if there is one]")]
Dtype = Annotated[
    str | None, typer.Option(metavar="NAME", help="Type of the weights [default: bfloat16 on cuda, else float32]")
]


@app.command(cls=Command, short_help="Draw samples from a model.")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text that the sample starts with.")] = "",
    suffix: Annotated[str, typer.Option(metavar="TEXT", help="Text that follows the sample (infilling).")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens to generate.")] = None,
    max_denoising_steps: Annotated[
        int | None, typer.Option(min=1, max=MANY, metavar="N", help="Steps; more of them draw fewer tokens at once.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="X", help="Divisor of the logits, above 0.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="X", help="Mass of the nucleus, in (0, 1].")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes the samples repeatable.")] = None,
    greedy: Annotated[
        bool | None,
        typer.Option("--greedy/--sample", help="Draw nothing: reveal the most probable tokens first, whole."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, metavar="N", help="Samples to draw.")] = 1,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the text as it denoises (one sample, on a terminal).")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Draw samples from a model. Options left out take the values of its generation_config.json."""
    from prime_v2.commands.generate import run_generate

    options = {
        "max_new_tokens": max_new_tokens,
        "max_denoising_steps": max_denoising_steps,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "do_sample": None if greedy is None else not greedy,
    }
    run_generate(model, prompt, suffix, options, num_samples, watch, as_json, device, dtype)


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
Window = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens a window [default: the smallest limit of the models].")
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tokens scored a window, given those before them [default: all of it]."),
]
PplMethod = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="subtoken, token or nested: bounds, for each order of reveal; chain: exact, left to right, slow; "
        "orders: a bound from random orders, slowest; paper_loss: the paper's loss, no bound; uniform, "
        "interpolating: the bounds of these families. A causal model has only causal, its exact likelihood. Beside "
        "others, a model without the given method keeps its own.",
        show_default="the bound of the order that the model was trained with",
    ),
]


@app.command(cls=Command, short_help="Bound the likelihood, perplexity and bits per byte of text.")
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
    split: Split = None,
    text_field: TextField = "text",
    max_documents: MaxDocuments = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Bound the likelihood of text: nats per token, perplexity, bits per byte, each with its error.

    MODEL and those of --also are Prime-v2 or causal models (AutoModelForCausalLM).

    \b
    prime-v2 ppl MODEL my_text.txt
    prime-v2 ppl MODEL my_text.txt --also gpt2 --window 512
    prime-v2 ppl MODEL --suite zero-shot --also gpt2 --output suite.json
    """
    from prime_v2.commands.score import Scoring, SuiteSource, TextSource, run_ppl

    scoring = Scoring(method, num_samples, seed, window, stride, device, dtype)
    text = None if source is None else TextSource(source, split, text_field, max_documents)
    suite_text = None if suite is None else SuiteSource(suite, data, only or [], max_documents)
    if (text is None) == (suite_text is None):
        raise ValueError("give either a SOURCE or --suite NAME" if text else "Missing argument 'SOURCE', or --suite")
    if suite_text is None and (data or only):
        raise ValueError("--data and --only belong to a suite; add --suite zero-shot")
    if suite_text is not None and (split or text_field != "text"):
        raise ValueError("--split and --text-field belong to a SOURCE; a suite knows those of its sets")
    run_ppl([model, *(also or [])], text or suite_text, scoring, as_json, output)


@app.command(cls=Command, short_help="Sub-token entropy of text (the paper's Table 1).")
def entropy(
    source: Source,
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME_OR_DIR", help="Any fast tokenizer: a folder, a tokenizer.json, a Hub name.")
    ],
    shuffle_seed: Annotated[int, typer.Option(metavar="N", help="Seed of the index shuffle.")] = 0,
    shuffle_domain: Annotated[
        ShuffleDomain, typer.Option(help="Permute all base^S codes, or the ids of the vocabulary.")
    ] = ShuffleDomain.codes,
    split: Split = None,
    text_field: TextField = "text",
    max_documents: MaxDocuments = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Sub-token entropy of a text for each number of sub-tokens, unshuffled and shuffled (the paper's Table 1)."""
    from prime_v2.commands.score import TextSource, run_entropy

    text = TextSource(source, split, text_field, max_documents)
    run_entropy(text, tokenizer, shuffle_seed, shuffle_domain.value, as_json, output)


TaskSplit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TASK=]SPLIT",
        help="Score train, validation or test, of all tasks or of TASK; repeatable [default: test, or validation "
        "without one].",
    ),
]


@app.command(
    "eval",
    cls=Command,
    short_help="Score benchmark tasks with lm-eval.",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
)
def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] LM_EVAL_OPTIONS",
            help="MODEL first, a folder or Hub name, is short for --model_args pretrained=MODEL. Then any options of "
            "lm_eval; -h shows them all. --tasks knows two more names: paper, for the eight tasks of the paper, and "
            "anli. --model is prime_v2 unless another is named. ls and validate instead of MODEL are lm_eval's.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Read questions from DIR/TASK/SPLIT.jsonl, nothing from the Hub."),
    ] = None,
    split: TaskSplit = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Score benchmark tasks by lm-eval's own command line, with the model prime_v2 registered.

    \b
    prime-v2 eval MODEL --tasks sciq,boolq,arc_easy --limit 100
    prime-v2 eval --model_args pretrained=MODEL,seed=1 --tasks paper --data my_data/ --output eval.json
    prime-v2 eval MODEL --tasks gsm8k --output_path results/ --log_samples

    The table is lm-eval's, with standard errors.
    """
    from prime_v2.commands.eval import run_eval

    run_eval(arguments or [], data, split or [], as_json, output)


@app.command(cls=Command, short_help="Write lm-eval task files that read JSONL folders.")
def tasks(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with a folder of JSONL files for each task.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the task files.", callback=FOLDER)],
    only: Annotated[
        str | None,
        typer.Option("--tasks", metavar="TASK,...", help="Tasks to write [default: all that DATA has files of]."),
    ] = None,
    split: TaskSplit = None,
    as_json: Json = False,
) -> None:
    """Write lm-eval task files that read JSONL folders: lm_eval --include_path OUT then needs no network.

    Names and prompts of the tasks are lm-eval's; docs/lm_eval.md has the form of DATA.
    """
    from prime_v2.commands.eval import run_tasks

    run_tasks(data, out, only, split or [], as_json)


MaskedShare = Annotated[
    list[float] | None,
    typer.Option(
        metavar="X",
        help="Level in [0, 1] of the noise that a masked-diffusion model sees, 0 for clean text; repeatable "
        "[default: 0, 0.5 and 0.9]. Causal models see clean text.",
    ),
]


@app.command(cls=Command, short_help="Spectra of the weights and attention patterns, of one model or two.")
def analyze(
    model_a: Annotated[
        str, typer.Argument(metavar="MODEL_A", help="Folder of a saved model, or its name on the Hub.")
    ],
    model_b: Annotated[
        str | None, typer.Argument(metavar="MODEL_B", help="Another one, set beside it.", show_default=False)
    ] = None,
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help=f"{SOURCE_HELP} A file may also come second.", show_default="docs"),
    ] = None,
    masked_share: MaskedShare = None,
    max_windows: Annotated[
        int, typer.Option(min=1, max=MANY, metavar="N", help="Windows of text to measure, at most.")
    ] = 16,
    window: Window = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the masks and of the Gaussian reference.")
    ] = 0,
    split: Split = None,
    text_field: TextField = "text",
    device: Device = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Type of the weights.")] = "float32",
    as_json: Json = False,
    output: Output = None,
    figure_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also draw analysis_spectra.png and analysis_attention.png, new files, in DIR.",
            callback=FOLDER,
        ),
    ] = None,
) -> None:
    """Spectra of the weight matrices and attention patterns of a model, or of two side by side.

    Models are Prime-v2 or causal ones (AutoModelForCausalLM) with projections named as in Llama, OPT or GPT-2.

    \b
    prime-v2 analyze MODEL my_text.txt
    prime-v2 analyze MODEL gpt2 my_text.txt --output analysis.json --figure-dir figures
    """
    from prime_v2.commands.analyze import Analysis, run_analyze

    options = Analysis(masked_share, max_windows, window, seed, device, dtype)
    run_analyze((model_a, model_b, text), split, text_field, options, as_json, output, figure_dir)


@app.command(cls=Command, short_help="Write a model's card from the record of its run.")
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run or of a saved model.")],
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record of the run.", show_default="DIR/results/train.json"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Copy what the Hub needs into the new folder OUT, and write the card there.",
            callback=NEW_FOLDER,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model's card (README.md), every number of it read from the record of its run, with the files' hashes."""
    import json

    from prime_v2.hub_card.card import find_record, write_card
    from prime_v2.hub_card.export import export_model
    from prime_v2.output.records import read_record

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a run or of a saved model")
    content = read_record(record or find_record(folder))
    path = write_card(folder, content) if export is None else export_model(folder, export, content) / "README.md"
    print(json.dumps({"card": str(path)}) if as_json else f"wrote {path}")


app.add_typer(scaling_app)
app.command(cls=Command, short_help=COMPARE_HELP)(compare)
app.command(cls=Command, short_help=CONVERT_HELP)(convert)


def main() -> None:
    """Entry point of the console command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # text that the terminal's encoding lacks must not end the command
    app()


if __name__ == "__main__":
    main()
