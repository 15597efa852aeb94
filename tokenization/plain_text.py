"""Documents to token ids as plain text, and whether the ids give the text back.

A model over tokens codes nothing of a text that the tokens do not hold.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Texts of one call of a tokenizer: enough to use all cores, few enough to bound memory.
TEXTS_PER_BATCH = 256
SHOWN = 24  # characters of a text that is quoted


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of TEXTS_PER_BATCH; the last one may be shorter."""
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, TEXTS_PER_BATCH)):
        yield batch


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens; text that spells a special token is encoded as text."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


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
