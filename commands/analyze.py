"""`prime-v2 analyze`: spectra and attention of one checkpoint, or of two side by side (docs/analysis.md)."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from prime_v2.commands.base import finish
from prime_v2.commands.options import FOLDER, MANY, SOURCE_HELP, Device, Json, Output, Split, TextField, Window
from prime_v2.commands.text_source import RUN_FILE, TextSource
from prime_v2.output.paths import short_names
from prime_v2.output.progress import progress_bar, quiet_libraries
from prime_v2.output.records import code_version

DEFAULT_TEXT = "docs"
MASKED_SHARES = (0.0, 0.5, 0.9)
FIGURES = {"spectra": "analysis_spectra.png", "attention": "analysis_attention.png"}
MaskedShare = Annotated[
    list[float] | None,
    typer.Option(
        metavar="X",
        help="Level in [0, 1] of the noise that a masked-diffusion model sees, 0 for clean text; repeatable "
        "[default: 0, 0.5 and 0.9]. Causal models see clean text.",
    ),
]


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
    """Spectra of the weights and attention patterns.

    The models, one or two side by side, are Prime-v2 or causal ones (AutoModelForCausalLM) with projections named as
    in Llama, OPT or GPT-2.

    \b
    prime-v2 analyze MODEL my_text.txt
    prime-v2 analyze MODEL gpt2 my_text.txt --output analysis.json --figure-dir figures
    """
    from prime_v2.studies.analysis.report import render

    _check_figures(figure_dir)
    quiet_libraries()
    code = code_version()
    names, source = name_arguments(model_a, model_b, text)
    options = Analysis(masked_share, max_windows, window, seed, device, dtype)
    results = _analyze(names, TextSource(source, split, text_field), options)
    finish("analysis", results, lambda: render(results), as_json, output, seed=seed, code=code)
    if figure_dir is not None:
        from prime_v2.studies.analysis.plots import plot_attention, plot_spectra

        plot_spectra(results, figure_dir / FIGURES["spectra"])
        plot_attention(results, figure_dir / FIGURES["attention"])


@dataclass
class Analysis:
    """How `analyze` measures: None for the defaults.

    masked_shares: of masked-diffusion models, default `MASKED_SHARES`; max_windows and window: of text, in tokens, the
    window being the smallest limit of the models by default; seed: of the masks and the Gaussian reference.
    """

    masked_shares: list[float] | None
    max_windows: int
    window: int | None
    seed: int
    device: str | None
    dtype: str


def name_arguments(model_a: str, second: str | None, third: str | None) -> tuple[list[str], str]:
    """(models, source of text) of the arguments `MODEL_A [MODEL_B] [TEXT]`; without a text, the source docs.

    The second of two is the text if it is docs, a file, a name that ends like one, or a folder of such files that
    holds no model.
    """
    if third is not None:
        return [model_a, str(second)], third
    if second is None:
        return [model_a], DEFAULT_TEXT
    return ([model_a], second) if _is_text(second) else ([model_a, second], DEFAULT_TEXT)


def _is_text(name: str) -> bool:
    from prime_v2.data.documents import FILE_SUFFIXES

    path = Path(name).expanduser()
    if name != DEFAULT_TEXT and path.is_dir():
        files = [each for each in path.iterdir() if each.suffix.lower() in FILE_SUFFIXES]
        return bool(files) and not (path / "config.json").exists()
    return name == DEFAULT_TEXT or path.is_file() or path.suffix.lower() in FILE_SUFFIXES


def _check_figures(folder: Path | None) -> None:
    """ValueError where one of the figures is there already; called before the work, not after it."""
    for name in FIGURES.values():
        if folder is not None and (folder / name).exists():
            raise ValueError(f"--figure-dir {folder}: {name} exists there; give another folder, or delete it first")


def _analyze(names: list[str], text: TextSource, options: Analysis) -> dict[str, Any]:
    from prime_v2.eval.loading import load_config
    from prime_v2.studies.analysis.attention import STATISTICS
    from prime_v2.studies.analysis.inputs import DIFFUSION, check_masked_share
    from prime_v2.studies.analysis.spectra import gaussian_spectrum

    labels = short_names(names)
    configs = [load_config(each) for each in names]
    has_noise = [each.model_type in DIFFUSION for each in configs]
    for share in options.masked_shares or []:
        check_masked_share(share)
    if options.masked_shares and not any(has_noise):
        raise ValueError(
            f"--masked-share {options.masked_shares[0]} is for diffusion models; leave it out for causal ones, "
            f"which are measured on clean text"
        )
    shares = sorted(set(options.masked_shares or MASKED_SHARES))
    windows, about = _windows(names, configs, text, options)
    found = [
        _analyze_model(name, label, each, shares if masked else [None], options)
        for name, label, each, masked in zip(names, labels, windows, has_noise, strict=True)
    ]
    shapes = sorted({(each["rows"], each["columns"]) for model in found for each in model["matrices"]})
    return {
        "text": about,
        "masked_shares": shares if any(has_noise) else None,
        "seed": options.seed,
        "statistics": STATISTICS,
        "models": found,
        "gaussian": [gaussian_spectrum(*shape, options.seed) for shape in shapes],
    }


def _windows(
    names: list[str], configs: list[Any], text: TextSource, options: Analysis
) -> tuple[list[Any], dict[str, Any]]:
    """Windows (N, L) of each model's own token ids, L common to all; and what a record says of the text.

    Documents are read until they fill `max_windows` windows. A shorter text gives fewer windows, or, where it does not
    fill one, a single window of all its tokens. What fills no window is left out.
    """
    from prime_v2.data.splits import corpus_fingerprint
    from prime_v2.eval.loading import load_tokenizer
    from prime_v2.eval.windows import encode_documents, window_and_stride
    from prime_v2.studies.analysis.attention import MIN_WINDOW

    window, _ = window_and_stride(configs, options.window, None)
    tokenizers = [load_tokenizer(each) for each in names]
    # The first model that train.py wrote says which documents are on a side.
    run = next((each for each in names if (Path(each) / RUN_FILE).is_file()), names[0])
    documents = _enough(text.documents("test", run), tokenizers, window * options.max_windows)
    pairs = zip(tokenizers, configs, strict=True)
    streams = [encode_documents(each, documents, config.eos_token_id)[0] for each, config in pairs]
    shortest = min(len(each) for each in streams)
    if min(window, shortest) < MIN_WINDOW:
        reason = f"the text has {shortest}" if shortest < MIN_WINDOW else f"window={window}"
        use = "a longer text" if shortest < MIN_WINDOW else f"--window {MIN_WINDOW}"
        raise ValueError(f"attention is measured on windows of at least {MIN_WINDOW} tokens, but {reason}; use {use}")
    window = min(window, shortest)
    counts = [min(options.max_windows, len(each) // window) for each in streams]
    windows = [each[: count * window].view(count, window) for each, count in zip(streams, counts, strict=True)]
    return windows, {
        "source": text.source,
        "split": text.split,
        "num_documents": len(documents),
        "documents_sha256": corpus_fingerprint(documents),
        "window": window,
        "max_windows": options.max_windows,
    }


def _enough(documents: Iterable[str], tokenizers: list[Any], num_tokens: int) -> list[str]:
    """The first documents that have `num_tokens` tokens for each tokenizer, or all."""
    kept: list[str] = []
    counts = [0] * len(tokenizers)
    with progress_bar("reading documents") as show:
        for document in documents:
            kept.append(document)
            show(len(kept), None)
            for number, tokenizer in enumerate(tokenizers):
                counts[number] += len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
            if min(counts) >= num_tokens:
                break
    return kept


def _analyze_model(name: str, label: str, windows: Any, shares: list[Any], options: Analysis) -> dict[str, Any]:
    """The numbers of one checkpoint, which is loaded and let go here."""
    from prime_v2.eval.causal import CausalScorer
    from prime_v2.eval.loading import load_scorer
    from prime_v2.studies.analysis.attention import measure_attention, network_of
    from prime_v2.studies.analysis.spectra import analyze_matrices, other_matrices, projection_matrices

    model, tokenizer = load_scorer(name, options.device, options.dtype)
    if getattr(model.config, "causal", False):  # an ARM of ours, measured as those of Transformers
        model = CausalScorer(model, tokenizer)
    network, started = network_of(model), time.monotonic()
    found = projection_matrices(network)
    total, done = len(found) + len(shares) * len(windows), 0
    with progress_bar(f"{label}: matrices, then windows of text") as show:

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            show(done, total)

        matrices = analyze_matrices(network, advance)
        attention = [measure_attention(model, windows, share, options.seed, progress=advance) for share in shares]
    return {
        "name": label,
        "model_type": model.config.model_type,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": time.monotonic() - started,
        "has_head": any(each.kind == "head" for each in found),
        "not_measured": other_matrices(network, found),
        "matrices": matrices,
        "attention": attention,
    }
