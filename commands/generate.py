"""`prime-v2 generate`, and the view of a text that denoises."""

import itertools
import json
import random
import sys
import time
from typing import Any

import torch
from torch import Tensor

from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.output.progress import progress_bar, quiet_libraries

BLOCKS = "░▒▓"  # for a token of which less than a third, two thirds, or more of the digits are known
FRAME_SECONDS = 0.04  # shortest time a draft is shown: a small model would be done before it is seen
# Control characters, which could move a terminal's cursor, as their visible pictures; line ends and tabs stay.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def run_generate(
    model_name: str,
    prompt: str,
    suffix: str,
    options: dict[str, Any],
    num_samples: int,
    watch: bool,
    as_json: bool,
    device: str | None,
    dtype: str | None,
) -> None:
    """Draw samples and print them. options: of `generate`; those that are None are left to the model."""
    if watch and num_samples > 1:
        raise ValueError(f"--watch shows one sample, not --num-samples {num_samples}; leave one of the two out")
    if watch and as_json:
        raise ValueError("--watch and --json exclude each other; leave one of them out")
    quiet_libraries()
    model, tokenizer = load_model_and_tokenizer(model_name, device, dtype)
    options = {name: value for name, value in options.items() if value is not None}
    if options.get("do_sample", model.generation_config.do_sample) is not False:
        options.setdefault("seed", random.SystemRandom().randrange(2**31))
    elif num_samples > 1:
        raise ValueError(f"--greedy has one result, not --num-samples {num_samples}; leave one of the two out")
    input_ids, suffix_ids = _prompt_ids(model, tokenizer, prompt), _ids(tokenizer, suffix)
    call = {"return_dict_in_generate": True, "num_return_sequences": num_samples, **options}
    if suffix_ids is not None:
        call["suffix_ids"] = suffix_ids
    if watch and sys.stdout.isatty():
        output = _watched(model, tokenizer, input_ids, call)
    else:
        with progress_bar("passes of the network") as show:
            tick = _Tick(show, options.get("max_denoising_steps", _default_passes(model)))
            output = model.generate(input_ids, stopping_criteria=[tick], **call)
    new = slice(input_ids.shape[1], output.sequences.shape[1] - (0 if suffix_ids is None else suffix_ids.shape[1]))
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    if as_json:
        completions = tokenizer.batch_decode(output.sequences[:, new], skip_special_tokens=True)
        asked = {"model": model_name, "prompt": prompt, "suffix": suffix, "options": options}
        print(json.dumps({**asked, **_as_json(texts, completions, output)}, ensure_ascii=False))
        return
    for number, text in enumerate(texts, 1):
        if num_samples > 1:
            print(f"{'' if number == 1 else chr(10)}--- sample {number} of {num_samples}, seed {options['seed']} ---")
        print(text.translate(PICTURES))


def _watched(model: Any, tokenizer: Any, input_ids: Tensor, call: dict[str, Any]) -> Any:
    view = DraftView(tokenizer)
    has_digits = hasattr(model.config, "num_subtokens") and not model.config.causal
    hook = model.model.register_forward_pre_hook(view.see_states) if has_digits else None
    try:
        return model.generate(input_ids, streamer=view, **call)
    finally:
        if hook is not None:
            hook.remove()
        view.end()


def _default_passes(model: Any) -> int | None:
    """Passes of the network that `generate` makes at most, where its options say so; an ARM makes one a token."""
    return getattr(model.generation_config, "max_denoising_steps", None)


def _ids(tokenizer: Any, text: str) -> Tensor | None:
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] if text else None


def _prompt_ids(model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """The prompt (1, P); without one what `generate` starts with, BOS where the model has one."""
    ids = _ids(tokenizer, prompt)
    if ids is not None:
        return ids
    bos = model.generation_config.bos_token_id
    bos = model.config.bos_token_id if bos is None else bos
    return torch.full((1, 0 if bos is None else 1), bos or 0)


class _Tick:
    """A stopping criterion that never stops, and shows the passes done."""

    def __init__(self, show: Any, steps: int | None):
        self.show, self.steps, self.done = show, steps, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.done += 1
        self.show(self.done, self.steps)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _as_json(texts: list[str], completions: list[str], output: Any) -> dict[str, Any]:
    samples: list[dict[str, Any]] = [
        {"text": text, "completion": completion} for text, completion in zip(texts, completions, strict=True)
    ]
    if not hasattr(output, "num_forward"):  # Transformers' own output, of an ARM: a pass a token
        return {"samples": samples}
    for sample, passes in zip(samples, output.num_forward.tolist(), strict=True):
        sample["num_forward"] = passes
    return {
        "samples": samples,
        "network_seconds": output.network_seconds,
        "sampling_seconds": output.sampling_seconds,
    }


class DraftView:
    """Streamer of `generate` that shows the text in place as it denoises: a block for each token not fully known.

    The more of its digits are known, the darker the block, provided that `see_states` is hooked to the network. The
    view disappears at the end; the caller prints the finished text.
    """

    def __init__(self, tokenizer: Any, console: Any = None, frame_seconds: float = FRAME_SECONDS):
        from rich.console import Console
        from rich.live import Live

        self.tokenizer, self.frame_seconds = tokenizer, frame_seconds
        self.live = Live(console=console or Console(), transient=True, auto_refresh=False)
        self.prefix: list[int] = []
        self.known: Tensor | None = None
        self.has_draft = False

    def see_states(self, module: Any, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook of `PrimeV2Model`: notes which digits (T, S) the network sees in this pass."""
        self.known = (arguments[0][0] != module.config.base).cpu()

    def put(self, value: Tensor) -> None:
        """Tokens that will not change: those before the first generated one, and at the end all the others.

        An ARM gives its tokens one by one, without drafts.
        """
        if self.has_draft:
            return
        begun = bool(self.prefix)
        self.prefix += value.flatten().tolist()
        if begun:
            self.live.start()
            self.live.update(self.render([]), refresh=True)
            time.sleep(self.frame_seconds)

    def put_draft(self, value: Tensor, **kwargs: Any) -> None:
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
        known = self.known[-len(ids) :].float().mean(1).tolist() if self.known is not None else [0.0] * len(ids)
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


__all__ = ["DraftView", "run_generate"]
