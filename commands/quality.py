"""`prime-v2 quality`: what samplers write: its exact likelihood, a judge, statistics of texts (docs/quality.md)."""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prime_v2.commands.base import finish
from prime_v2.commands.options import FOLDER, MOST_DRAWS, SOURCE_HELP, Device, Dtype, Json, Model, Output, new_file
from prime_v2.commands.text_source import RUN_FILE, TextSource, run_options, shares_of
from prime_v2.output.paths import short_names
from prime_v2.output.progress import progress_bar, quiet_libraries, say

if TYPE_CHECKING:
    from prime_v2.studies.quality.judge import Judge
    from prime_v2.studies.quality.plan import Plan
    from prime_v2.studies.quality.run import Bench

CELLS = "cells"  # folder of the finished parts
SAMPLERS = ("ancestral", "margin")

Counts = list[int] | None


def quality(
    model: Model,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Another model of the same tokenizer, set beside it; repeatable."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Causal model that judges the samples, ours or any AutoModelForCausalLM "
            "[default: the first ARM among MODEL and those of --also].",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"Held-out text. {SOURCE_HELP}",
            show_default="the test side of what MODEL was trained on",
        ),
    ] = None,
    dev: Annotated[
        bool,
        typer.Option("--dev", help="Without --text the dev side instead of the test side, to choose settings on."),
    ] = False,
    training_text: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text that 8-grams may be copied from.",
            show_default="without --text the training side of what MODEL was trained on",
        ),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,OPTION=VALUE...]",
            help="A sampler as of generate, such as margin,unit=digit; repeatable [default: ancestral and margin]. A "
            "family with none of them takes its first.",
        ),
    ] = None,
    passes: Annotated[
        Counts,
        typer.Option(
            min=1,
            metavar="N",
            help="Passes of the network a text, at most; repeatable [default: L, L/2, L/4, L/8 and L/16 of L tokens].",
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(metavar="X", help="Of the frontier; repeatable [default: 0.6, 0.7, ... 1.1]."),
    ] = None,
    frontier_passes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Passes of the frontier [default: L/4].")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens L of a text [default: the smallest limit].")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_DRAWS, metavar="N", help="Texts of a set, sampled and real.")
    ] = 64,
    prompts: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also continue the first N tokens of each held-out window."),
    ] = None,
    draws: Annotated[
        int, typer.Option(min=1, max=MOST_DRAWS, metavar="N", help="Noise draws a window where the law is a bound.")
    ] = 4,
    batch: Annotated[
        int, typer.Option(min=1, max=MOST_DRAWS, metavar="N", help="Texts that are sampled at once.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of samples and draws.")] = 0,
    law_only: Annotated[
        bool, typer.Option("--law-only", help="Only the law on held-out text: no samples, no judge.")
    ] = False,
    mauve: Annotated[
        bool, typer.Option("--mauve", help="MAUVE, too, on the judge's features; needs the package mauve-text.")
    ] = False,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of finished parts: the same command goes on there.", callback=FOLDER),
    ] = Path("runs/quality"),
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw the results, as a PNG. FILE must be new.", callback=new_file(".png")
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Measure what samplers write, by their law and by a judge.

    \b
    prime-v2 quality runs/nested --also runs/arm
    prime-v2 quality runs/nested --law-only --sampler margin --sampler margin,unit=digit
    prime-v2 quality MODEL --judge gpt2 --text my_text.txt --output quality.json --figure quality.png

    Every sampler writes a set of texts, of which none is left out, at each number of passes and at each temperature.
    """
    of_samples = {"mauve": mauve, "judge": judge, "temperature": temperature, "frontier-passes": frontier_passes}
    of_samples |= {"training-text": training_text}
    given = [name for name, value in of_samples.items() if value]
    if law_only and given:
        raise ValueError(f"--{given[0]} is about samples, which --law-only draws none of; leave one of the two out")
    say(f"reading configurations; finished parts are kept in {out / CELLS}")
    with progress_bar("reading configurations"):
        from prime_v2.output.records import code_of, code_version
        from prime_v2.studies.quality.report import render

        quiet_libraries()
        code, names = code_version(), [model, *(also or [])]
        made = _plan(names, sampler, passes, temperature, frontier_passes, length)
    plan = made(samples=samples, prompt=prompts, draws=draws, batch=batch, seed=seed, law_only=law_only)
    study = Study(names, judge, text, dev, training_text, mauve, out, device, dtype, code_of(code))
    try:
        results = study.run(plan)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on from what is in {out / CELLS}")
        raise
    finish("quality", results, lambda: render(results), as_json, output, seed=seed, code=code)
    if figure is not None:
        from prime_v2.studies.quality.plots import plot_quality

        plot_quality(results, figure)


def _plan(names: list[str], sampler, passes, temperature, frontier_passes, length) -> Any:
    """What makes a checked `Plan` of the other options; the models' limits give the length."""
    from prime_v2.eval.loading import load_config
    from prime_v2.eval.windows import window_and_stride
    from prime_v2.studies.quality.plan import FRONTIER_SHARE, SHARES, TEMPERATURES, Plan, parsed

    for each in sampler or []:
        parsed(each)
    most, _ = window_and_stride([load_config(each) for each in names], None, None)
    if length is not None and length > most:
        raise ValueError(f"--length {length} is above max_position_embeddings={most}; use {most} or fewer tokens")
    length = length or most
    steps = passes or [max(1, length // each) for each in SHARES]
    at = frontier_passes or (max(1, length // FRONTIER_SHARE) if not passes else passes[0])
    for each in temperature or []:
        if not 0 < each < float("inf"):
            raise ValueError(f"--temperature {each} must be positive and finite; use 1.0")

    def make(**options: Any) -> "Plan":
        plan = Plan(
            samplers=tuple(dict.fromkeys(sampler or SAMPLERS)),
            passes=tuple(dict.fromkeys(steps)),
            frontier_passes=at,
            temperatures=tuple(sorted({*(temperature or TEMPERATURES)})),
            length=length,
            **options,
        )
        plan.check()
        return plan

    return make


@dataclass
class Study:
    """What `quality` reads: models, judge and texts as given; where they run, by what code, where parts are kept."""

    models: list[str]
    judge: str | None
    text: str | None
    dev: bool
    training_text: str | None
    mauve: bool
    out: Path
    device: str | None
    dtype: str | None
    code: str

    def run(self, plan: "Plan") -> dict[str, Any]:
        from prime_v2.eval.loading import load_config, load_tokenizer
        from prime_v2.families import label_of
        from prime_v2.studies.quality.findings import findings
        from prime_v2.studies.quality.judge import check_mauve, same_tokens
        from prime_v2.studies.quality.plan import check_samplers
        from prime_v2.studies.quality.run import reference, run_model
        from prime_v2.studies.quality.statistics import check_self_bleu

        labels = short_names(self.models)
        self._check_text()
        if not plan.law_only:
            check_self_bleu()
        if self.mauve:
            check_mauve(plan.samples)
        tokenizer, *others = [load_tokenizer(each) for each in self.models]
        for label, other in zip(labels[1:], others, strict=True):
            if not same_tokens(tokenizer, other):
                raise ValueError(
                    f"{label} has other tokens than {labels[0]}, so nats per token do not compare; run it on its own"
                )
        configs = [load_config(each) for each in self.models]
        families = [label_of(each) for each in configs]
        labels = families if len(set(families)) == len(labels) > 1 else labels
        check_samplers(configs, plan.samplers)
        judge, about_judge = (None, None) if plan.law_only else self._judge(labels, configs, tokenizer, plan)
        bench, about_text = self._bench(plan, judge, tokenizer, configs[0])
        models, cells = [], []
        for name, label in zip(self.models, labels, strict=True):
            say(f"loading {label}")
            found = run_model(bench, self._loaded(name)[0], label)
            models.append({"folder": short_names([name])[0], **found["about"]})
            cells += found["cells"]
        if judge is not None and about_judge is not None and judge.re_encodes:
            about_judge["notes"] += _about_encoding(cells)
        if not plan.law_only:
            say("judging real text")
        real = reference(bench)
        return {
            **{name: getattr(plan, name) for name in ("length", "samples", "prompt", "draws", "batch")},
            "frontier_passes": plan.frontier_passes,
            "text": about_text | {"windows_sha256": bench.text.sha256, **bench.text.about},
            "judge": about_judge,
            "models": models,
            "reference": real,
            **findings(cells, bench.text, real),
            "cells": cells,
        }

    def _loaded(self, name: str) -> tuple[Any, Any]:
        from prime_v2.eval.loading import load_model_and_tokenizer

        return load_model_and_tokenizer(name, self.device, self.dtype)

    def _judge(
        self, labels: list[str], configs: list[Any], tokenizer: Any, plan: "Plan"
    ) -> tuple["Judge", dict[str, Any]]:
        """The judge, and what the results say of it."""
        from prime_v2.eval.loading import load_config, load_scorer
        from prime_v2.families import FAMILY_OF_TYPE, label_of
        from prime_v2.studies.quality.judge import Judge, check_judge

        name, chosen = self.judge, ""
        if name is None:
            kinds = [FAMILY_OF_TYPE[each.model_type].bound for each in configs]
            if "causal" not in kinds:
                raise ValueError(
                    "the samples need a causal model as their judge; add one by --judge, or an ARM by --also, or draw "
                    "no samples by --law-only"
                )
            name, chosen = self.models[kinds.index("causal")], "; no --judge was given, so the first ARM judges"
        config = load_config(name)
        check_judge(config)
        say(f"loading the judge, {_label(name, self.models, labels)}")
        judge = Judge(*load_scorer(name, self.device, self.dtype), tokenizer)
        judge.check(plan.length)
        label = _label(name, self.models, labels)
        notes = []
        if label in labels:
            notes.append(f"The judge {label} is one of the models: its own samples are judged by what wrote them.")
        if judge.re_encodes:
            notes.append("The judge has another tokenizer: samples and real text are decoded and encoded anew for it.")
        family = label_of(config) if config.model_type in FAMILY_OF_TYPE else config.model_type
        return judge, {"name": label, "family": family, "chosen": chosen, "notes": notes}

    def _bench(self, plan: "Plan", judge: Any, tokenizer: Any, config: Any) -> tuple["Bench", dict[str, Any]]:
        """What all cells are measured with; the texts are read here, in one go."""
        from prime_v2.studies.quality.plan import weights_sha256
        from prime_v2.studies.quality.run import Bench
        from prime_v2.studies.quality.texts import held_out, training_index

        say("reading the text")
        held, training, about = self._texts()
        text = held_out(tokenizer, held, config.eos_token_id, plan.length, plan.samples)
        index = None
        if judge is not None and training is not None:
            say("reading the n-grams of the training text")
            with progress_bar("n-grams of the training text"):
                index = training_index(judge.tokenizer, training)
        measured = {
            "windows": text.sha256,
            "judge": None if judge is None else weights_sha256(judge.scorer.model),
            "training": None if index is None else index.sha256,
            "mauve": self.mauve,
            "code": self.code,
        }
        return Bench(plan, text, judge, index, self.mauve, self.out / CELLS, measured), about

    def _check_text(self) -> None:
        if self.text is not None:
            if self.dev:
                raise ValueError(
                    f"--dev is a side of what MODEL was trained on, not of --text {self.text}; leave one out"
                )
            return
        if self.training_text is not None:
            raise ValueError(f"--training-text {self.training_text} goes with --text SOURCE; add it")
        if not run_options(self.models[0]):
            raise ValueError(
                f"{Path(self.models[0]) / RUN_FILE} does not exist, which says what {self.models[0]} was trained on; "
                f"give held-out text by --text FILE"
            )

    def _texts(self) -> tuple[list[str], list[str] | None, dict[str, Any]]:
        """(held-out documents, training documents or None, what a record says of them)."""
        from prime_v2.data.splits import split_of

        if self.text is not None:
            training = self.training_text and TextSource(self.training_text, None, "text").read("train")
            source = TextSource(self.text, None, "text")
            return source.read("test"), training or None, {"source": self.text, "training_text": self.training_text}
        options = run_options(self.models[0])
        shares = shares_of(self.models[0])
        sides: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        with progress_bar("reading documents") as show, contextlib.closing(_documents(options)) as documents:
            for number, document in enumerate(documents, 1):
                sides[split_of(document, **shares)].append(document)
                show(number, None)
        side = "dev" if self.dev else "test"
        about = {"source": f"{options['data']}, {side} side", "training_text": f"{options['data']}, training side"}
        return sides[side], sides["train"], about


def _documents(options: dict[str, Any]) -> Generator[str, None, None]:
    """The documents that a run of train.py with these options was made of, repeated ones left out."""
    from prime_v2.data.documents import read_documents
    from prime_v2.data.splits import deduplicate

    texts = read_documents(
        options["data"],
        text_field=options.get("text_field", "text"),
        split=options.get("data_split", "train"),
        streaming=options.get("streaming", False),
        max_documents=options.get("max_documents"),
    )
    yield from deduplicate(texts)


def _label(name: str, models: list[str], labels: list[str]) -> str:
    """The name of a model in the results: its label where it is one of the models."""
    places = [Path(each).expanduser().resolve() for each in models]
    place = Path(name).expanduser().resolve()
    return labels[places.index(place)] if place in places else short_names([name])[0]


def _about_encoding(cells: list[dict[str, Any]]) -> list[str]:
    cut = sum(cell["samples"].get("cut", 0) for cell in cells if cell["samples"] is not None)
    return [f"{cut} samples are longer than the judge reads, and were judged on their beginnings."] if cut else []
