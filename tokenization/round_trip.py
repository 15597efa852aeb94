"""Whether the tokens of a text give it back: what they do not hold, no model over them codes."""

import itertools
from collections.abc import Sequence
from typing import Any

SHOWN = 24  # characters of a text that is quoted


def first_loss(tokenizer: Any, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> str | None:
    """The first text that its ids do not give back, where it begins to differ; None where all come back.

    A space in front, which some tokenizers add or drop, is no difference; a special token in place of text is one.
    """
    decoded = tokenizer.batch_decode(encoded, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for text, back in zip(texts, decoded, strict=True):
        text, back = text.removeprefix(" "), back.removeprefix(" ")
        if text != back:
            pairs = enumerate(itertools.zip_longest(text, back))
            start = max(0, next(place for place, (one, other) in pairs if one != other) - SHOWN // 2)
            return f"{text[start : start + SHOWN]!r} comes back as {back[start : start + SHOWN]!r}"
    return None


def not_kept(loss: str) -> str:
    """The sentence about such an example."""
    return f"the tokenizer does not keep the text: {loss}"


__all__ = ["first_loss", "not_kept"]
