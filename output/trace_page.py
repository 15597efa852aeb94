"""The page of traces: one HTML file, without anything from a network, in which a text denoises pass by pass.

The page is `trace_page.html` with its style, its script and the traces as JSON in it. The browser runs that script
only: its hash is all that the page's Content-Security-Policy allows. Text of the model is data, in the JSON and on the
page (`textContent`), never markup.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prime_v2.output.trace import Trace
from prime_v2.output.trace_picture import shown

DIGITS_WITHOUT_SPACES = 10  # the largest base whose digits are one character each
HIDDEN = "."  # in place of a digit
CERTAIN = 10_000  # a probability of 1


@dataclass(frozen=True)
class PageModel:
    """What the page needs to know of a model.

    decode: token ids to their text. base: digits are in [0, base), and base itself is a hidden digit. mask_id: the id
    of a token that is not fully known. candidates: how many tokens the digits (N, S) of N tokens allow, or None where
    every token can still change (uniform-state diffusion).
    """

    decode: Callable[[list[int]], str]
    base: int
    mask_id: int
    candidates: Callable[[list[list[int]]], list[int]] | None


def draw_page(traces: dict[str, Trace], model: PageModel, facts: Sequence[tuple[str, str]]) -> str:
    """One page of the traces, by the names of their samplers; HTML.

    facts: (name, value) for the head of the page. ValueError for a trace without a token.
    """
    texts = Texts(model.decode)
    runs = [run_data(name, trace, model, texts) for name, trace in traces.items()]
    steps = next(iter(traces.values())).steps
    data = {
        "base": model.base,
        "digits": len(steps[0].digits[0]),
        "changing": model.candidates is None,
        "facts": [list(each) for each in facts],
        "texts": texts.shown,
        "runs": runs,
    }
    style, script = (
        files("prime_v2.output").joinpath(f"trace_page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    parts = {
        "policy": f"default-src 'none'; style-src '{source_hash(style)}'; script-src '{source_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": json_for_html(data),
        "text": html.escape("\n\n".join(each["text"] for each in runs)),
    }
    template = files("prime_v2.output").joinpath("trace_page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def json_for_html(content: Any) -> str:
    """JSON in ASCII that no HTML parser takes for markup: without <, > and &, hence without </script and <!--."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def source_hash(text: str) -> str:
    """An inline style or script as a Content-Security-Policy allows it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Texts:
    """The tokens that the page shows, numbered as they are met."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.numbers = decode, dict[int, int]()
        self.shown: list[str] = []

    def number(self, token: int) -> int:
        """The number of a token id."""
        if token not in self.numbers:
            self.numbers[token] = len(self.shown)
            self.shown.append(shown(self.decode([token])))
        return self.numbers[token]


def run_data(name: str, trace: Trace, model: PageModel, texts: Texts) -> dict[str, Any]:
    """A trace as the page reads it: for each token its changes and its predictions, each with its pass.

    A change is [pass, number of the text or -1, digits or "", candidates left or -1]; a prediction is [pass, entropy
    in nats, number, probability, number, probability, ...], with probabilities in 1 / `CERTAIN`. Of each state: the
    share that is known, the units (digits, or tokens that have one digit) that its pass revealed or changed and that
    it hid again, and the mean entropy of the pass that follows.
    """
    kept = trace.kept()
    if not kept:
        raise ValueError("the trace holds no token to draw; generate one token or more")
    generated = trace.generated(model.mask_id)
    inside = set(generated)
    originals = [model.decode([trace.result[i]]) for i in kept]
    tokens: list[dict[str, Any]] = [
        {
            "given": i not in inside,
            "word": original[:1].isspace(),
            "final": texts.number(trace.result[i]),
            "changes": changes(trace, i, model, texts),
            "predictions": predictions(trace, i, texts),
        }
        for i, original in zip(kept, originals, strict=True)
    ]
    count_candidates([change for token in tokens for change in token["changes"]], model)
    entropies = [[each[i].entropy for i in generated if i in each] for each in trace.predictions]
    return {
        "name": name,
        "tokens": tokens,
        "text": model.decode([trace.result[i] for i in kept]),
        "known": [round(trace.share_known(step, generated, model.base, model.mask_id), 4) for step in trace.steps],
        "revealed": [0, *(moved(trace, number, generated, model) for number in range(1, len(trace.steps)))],
        "hidden": [0, *(moved(trace, number, generated, model, -1) for number in range(1, len(trace.steps)))],
        "entropy": [round(sum(each) / len(each), 4) if each else None for each in entropies],
    }


def changes(trace: Trace, index: int, model: PageModel, texts: Texts) -> list[list[Any]]:
    """The changes of a token; the candidates left are still its digits."""
    found: list[list[Any]] = []
    before = None
    for number, step in enumerate(trace.steps):
        digits, token = step.digits[index], step.ids[index]
        if (digits, token) != before:
            text = -1 if token == model.mask_id else texts.number(token)
            found.append([number, text, digits_text(digits, model.base) if len(digits) > 1 else "", digits])
            before = (digits, token)
    return found


def count_candidates(found: list[list[Any]], model: PageModel) -> None:
    """Put the number of candidates in place of the digits of changes, or -1 where it means nothing."""
    states = {tuple(each[3]) for each in found}
    listed = sorted(states)
    counts = model.candidates([list(each) for each in listed]) if model.candidates else [-1] * len(listed)
    number_of = dict(zip(listed, counts, strict=True))
    for each in found:
        each[3] = number_of[tuple(each[3])]


def digits_text(digits: Sequence[int], base: int) -> str:
    """Digits as one text, with spaces between them where some have two characters or more."""
    between = "" if base <= DIGITS_WITHOUT_SPACES else " "
    return between.join(HIDDEN if each == base else str(each) for each in digits)


def predictions(trace: Trace, index: int, texts: Texts) -> list[list[Any]]:
    """The predictions of a token, by pass."""
    found = []
    for number, of_pass in enumerate(trace.predictions, 1):
        if index in of_pass:
            each = of_pass[index]
            pairs = [(texts.number(token), round(value * CERTAIN)) for token, value in each.likeliest]
            found.append([number, round(each.entropy, 3), *(part for pair in pairs for part in pair)])
    return found


def moved(trace: Trace, number: int, generated: list[int], model: PageModel, direction: int = 1) -> int:
    """How many units of the generated tokens pass `number` revealed; direction -1: hid again.

    Where no token is hidden (uniform-state diffusion) a token that changes counts as revealed.
    """
    before, after = trace.steps[number - 1], trace.steps[number]
    if model.candidates is None:
        return sum(before.ids[i] != after.ids[i] for i in generated) if direction > 0 else 0
    count = 0
    for i in generated:
        for old, new in zip(before.digits[i], after.digits[i], strict=True):
            was, is_now = old == model.base, new == model.base
            count += (was and not is_now) if direction > 0 else (is_now and not was)
    return count
