"""`prime-v2 generate`: samples, and the view of a text that denoises."""

import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prime_v2.commands.options import (
    MOST_SAMPLES,
    BlockLength,
    CacheKind,
    CorrectorShare,
    CorrectorSteps,
    Device,
    Dtype,
    EntropyBound,
    Eta,
    Json,
    Model,
    Sampler,
    Score,
    StagePasses,
    Steps,
    Temperature,
    Threshold,
    TimeOff,
    TimeOn,
    TopP,
    Unit,
    new_file,
)
from prime_v2.commands.picture import check_drawable, hidden_digit, picture_of
from prime_v2.output.atomic import write_text
from prime_v2.output.drawing import SUFFIXES, save_drawing
from prime_v2.output.progress import progress_bar, quiet_libraries
from prime_v2.output.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = "░▒▓"  # for a token of which less than a third, two thirds, or more of the digits are known
FRAME_SECONDS = 0.04  # shortest time a draft is shown: a small model would be done before it is seen
# Control characters, which could move a terminal's cursor, as their visible pictures; line ends and tabs stay.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text that the sample starts with.")] = "",
    suffix: Annotated[str, typer.Option(metavar="TEXT", help="Text that follows the sample (infilling).")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens to generate.")] = None,
    max_denoising_steps: Steps = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the draws: the same seed gives the same text.")
    ] = None,
    greedy: Annotated[
        bool | None,
        typer.Option("--greedy/--sample", help="Deterministic: the likeliest tokens, the most confident first."),
    ] = None,
    sampler: Sampler = None,
    unit: Unit = None,
    score: Score = None,
    threshold: Threshold = None,
    entropy_bound: EntropyBound = None,
    stage_passes: StagePasses = None,
    eta: Eta = None,
    t_on: TimeOn = None,
    t_off: TimeOff = None,
    corrector_steps: CorrectorSteps = None,
    corrector_share: CorrectorShare = None,
    block_length: BlockLength = None,
    cache: CacheKind = None,
    num_samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, metavar="N", help="Samples to draw.")] = 1,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the text as it denoises (one sample, on a terminal).")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw how the text denoised, passes by tokens (one sample), in a new file: .svg or .png.",
            callback=new_file(*SUFFIXES),
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write how the text denoised, with what the network predicted, as an HTML page that needs nothing "
            "else (one sample). FILE must be new.",
            callback=new_file(".html"),
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,OPTION=VALUE]",
            help="On the page, also what this sampler writes with the same seed, e.g. margin,unit=digit,steps=16.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Draw samples from a model.

    Options left out take the values of its generation_config.json.
    """
    for option, is_given in (("--watch", watch), ("--picture", picture is not None), ("--page", page is not None)):
        if is_given and num_samples > 1:
            raise ValueError(f"{option} shows one sample, not --num-samples {num_samples}; leave one of the two out")
    if watch and as_json:
        raise ValueError("--watch and --json exclude each other; leave one of them out")
    if beside and len(beside) > 1:
        raise ValueError(f"--beside is given {len(beside)} times, but a page shows one sampler beside the other")
    if beside and page is None:
        raise ValueError(f"--beside {beside[0]} is shown on a page; add --page FILE, or leave --beside out")
    from prime_v2.commands.page import beside_options, page_of, sampler_label
    from prime_v2.eval.loading import load_model_and_tokenizer
    from prime_v2.eval.samplers import named_sampler

    quiet_libraries()
    network, tokenizer = load_model_and_tokenizer(model, device, dtype)
    named: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_denoising_steps": max_denoising_steps,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "do_sample": None if greedy is None else not greedy,
    }
    of_sampler = {"unit": unit, "score": score, "threshold": threshold, "entropy_bound": entropy_bound}
    of_sampler |= {"stage_passes": stage_passes, "eta": eta, "t_on": t_on, "t_off": t_off}
    of_sampler |= {"corrector_steps": corrector_steps, "corrector_share": corrector_share}
    named |= {"block_length": block_length, "cache": cache}
    if (rule := named_sampler(sampler, network, **of_sampler)) is not None:
        named["sampler_config"] = rule.to_dict()
    options = {name: value for name, value in named.items() if value is not None}
    if options.get("do_sample", network.generation_config.do_sample) is not False:
        options.setdefault("seed", random.SystemRandom().randrange(2**31))
    elif num_samples > 1:
        raise ValueError(f"--greedy has one result, not --num-samples {num_samples}; leave one of the two out")
    input_ids, suffix_ids = _prompt_ids(network, tokenizer, prompt), _ids(tokenizer, suffix)
    call: dict[str, Any] = {"return_dict_in_generate": True, "num_return_sequences": num_samples, **options}
    if suffix_ids is not None:
        call["suffix_ids"] = suffix_ids
    if picture is not None:
        check_drawable(network)
    calls = [call]
    if beside:
        calls.append(call | beside_options(beside[0], network, call))
    kept = None if picture is None and page is None else Trace(takes_logits=page is not None)
    output, trace = _generated(network, tokenizer, input_ids, call, watch, kept)
    traces = [trace]
    for other in calls[1:]:
        traces.append(_generated(network, tokenizer, input_ids, other, False, Trace(takes_logits=True))[1])
    new = slice(input_ids.shape[1], output.sequences.shape[1] - (0 if suffix_ids is None else suffix_ids.shape[1]))
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    if as_json:
        completions = tokenizer.batch_decode(output.sequences[:, new], skip_special_tokens=True)
        request = {"model": model, "prompt": prompt, "suffix": suffix, "options": options}
        print(json.dumps({**request, **_as_json(texts, completions, output)}, ensure_ascii=False))
    else:
        _print_texts(texts, options)
    kept_keys = options.get("cache") or getattr(network.generation_config, "cache", None) or "none"
    if kept_keys != "none":
        print(
            f"cache {kept_keys} is approximate: with --cache none the same seed may write another text "
            f"(prime-v2 ppl --method sampler gives the nats that it costs)",
            file=sys.stderr,
        )
    if picture is not None:
        save_drawing(picture_of(trace, network, tokenizer), picture)
    if page is not None:
        labels = [sampler_label(network, each) for each in calls]
        if len(set(labels)) < len(labels):
            labels[1] += " again"
        shown = {"prompt": prompt, "suffix": suffix, "seed": options.get("seed")}
        write_text(page, page_of(dict(zip(labels, traces, strict=True)), network, tokenizer, model, shown))


def _print_texts(texts: list[str], options: dict[str, Any]) -> None:
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"{'' if number == 1 else chr(10)}--- sample {number} of {len(texts)}, seed {options['seed']} ---")
        print(text.translate(PICTURES))


def _generated(
    model: Any, tokenizer: Any, input_ids: "Tensor", call: dict[str, Any], watch: bool, trace: Trace | None
) -> tuple[Any, Trace]:
    """(What `model.generate` returns, its trace), with the text shown as it denoises or a bar of the passes.

    trace: one to fill, or None; then the trace is empty unless the text is shown.
    """
    if watch and sys.stdout.isatty():
        view = DraftView(tokenizer, hidden_digit(model))
        view.takes_logits = trace is not None and trace.takes_logits
        try:
            return model.generate(input_ids, streamer=view, **call), view
        finally:
            view.end()
    # The most passes of the network, where the options say so; an ARM makes one a token.
    most = call.get("max_denoising_steps", getattr(model.generation_config, "max_denoising_steps", None))
    with progress_bar("passes of the network") as show:
        tick = _Tick(show, most)
        return model.generate(input_ids, stopping_criteria=[tick], streamer=trace, **call), trace or Trace()


def _ids(tokenizer: Any, text: str) -> "Tensor | None":
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] if text else None


def _prompt_ids(model: Any, tokenizer: Any, prompt: str) -> "Tensor":
    """The prompt (1, P); without one what `generate` starts with, BOS where the model has one."""
    ids = _ids(tokenizer, prompt)
    if ids is not None:
        return ids
    import torch

    bos = model.generation_config.bos_token_id
    bos = model.config.bos_token_id if bos is None else bos
    return torch.full((1, 0 if bos is None else 1), bos or 0)


class _Tick:
    """A stopping criterion that never stops, and shows the passes done."""

    def __init__(self, show: Any, steps: int | None):
        self.show, self.steps, self.done = show, steps, 0

    def __call__(self, input_ids: "Tensor", scores: Any, **kwargs: Any) -> "Tensor":
        self.done += 1
        self.show(self.done, self.steps)
        return input_ids.new_zeros(len(input_ids)).bool()


def _as_json(texts: list[str], completions: list[str], output: Any) -> dict[str, Any]:
    samples: list[dict[str, Any]] = [
        {"text": text, "completion": completion} for text, completion in zip(texts, completions, strict=True)
    ]
    for sample, passes in zip(samples, output.num_forward.tolist(), strict=True):
        sample["num_forward"] = passes
    return {
        "samples": samples,
        "network_seconds": output.network_seconds,
        "sampling_seconds": output.sampling_seconds,
    }


class DraftView(Trace):
    """Streamer of `generate` that shows the text in place as it denoises: a block for each token not fully known.

    The more of its digits are known, the darker the block. The view disappears at the end; the caller prints the
    finished text. hidden: the digit that stands for a hidden one.
    """

    def __init__(self, tokenizer: Any, hidden: int, console: Any = None, frame_seconds: float = FRAME_SECONDS) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__()
        self.tokenizer, self.hidden, self.frame_seconds = tokenizer, hidden, frame_seconds
        self.live = Live(console=console or Console(), transient=True, auto_refresh=False)
        self.prefix: list[int] = []
        self.has_draft = False

    def put(self, value: "Tensor") -> None:
        """Tokens that will not change: those before the first generated one, and at the end all the others.

        An ARM gives its tokens one by one, without drafts.
        """
        super().put(value)
        if self.has_draft:
            return
        begun = bool(self.prefix)
        self.prefix += value.flatten().tolist()
        if begun:
            self.live.start()
            self.live.update(self.render([]), refresh=True)
            time.sleep(self.frame_seconds)

    def put_draft(self, value: "Tensor", **kwargs: Any) -> None:
        """The other tokens so far, the mask token where one is not fully known."""
        if not self.has_draft:
            self.live.start()
            self.has_draft = True
        self.live.update(self.render(value.flatten().tolist()), refresh=True)
        time.sleep(self.frame_seconds)

    def end(self) -> None:
        """Take the view off the terminal."""
        self.live.stop()

    def render(self, ids: list[int]) -> Any:
        """The prefix and a draft as rich text, and below it how much of the draft is known."""
        from rich.text import Text

        view = Text()
        view.append(self._decode(self.prefix), style="bold")
        mask_id = self.tokenizer.mask_token_id
        digits = self.steps[-1].digits[len(self.steps[-1].digits) - len(ids) :] if self.steps else []
        known = [1 - each.count(self.hidden) / len(each) for each in digits]
        for is_hidden, run in itertools.groupby(range(len(ids)), key=lambda i: ids[i] == mask_id):
            if is_hidden:
                blocks = (BLOCKS[min(int(known[i] * len(BLOCKS)), len(BLOCKS) - 1)] for i in run)
                view.append("".join(blocks), style="cyan")
            else:
                view.append(self._decode([ids[i] for i in run]))
        if ids:
            view.append(f"\n\n{len(ids) - ids.count(mask_id)} of {len(ids)} tokens known", style="dim")
        return view

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).translate(PICTURES) if ids else ""
