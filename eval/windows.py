"""From documents to windows of token ids in which every token is scored once (docs/perplexity.md)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prime_v2.tokenization.plain_text import first_loss, in_batches, plain_ids

Windows = tuple[Tensor, Tensor | None]  # ids (N, L) int64; prompt_mask (N, L) bool, True for what is not scored


def window_and_stride(configs: Sequence[Any], window: int | None, stride: int | None) -> tuple[int, int]:
    """The window and stride that all models of these configurations score a text with.

    window: None is the smallest max_position_embeddings, so that models with different limits see equal windows.
    stride: None is the window. Raises ValueError for a window below 1 or above a limit, a stride outside [1, window],
    and no window where no configuration has a limit.
    """
    texts = [config.get_text_config() for config in configs]
    limits = [limit for text in texts if (limit := getattr(text, "max_position_embeddings", None))]
    if window is None and not limits:
        raise ValueError("the model's configuration has no max_position_embeddings; give the window, e.g. 1024")
    window = min(limits) if window is None else window
    if window < 1 or window > min(limits, default=window):
        most = f"between 1 and max_position_embeddings={min(limits)}" if limits else "at least 1"
        raise ValueError(f"window={window} must be {most}")
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and window={window}")
    return window, stride


def cut_windows(ids: Tensor, window: int, stride: int) -> list[Windows]:
    """Windows over ids (T,) in which every token is scored exactly once: (ids (N, L), prompt_mask (N, L) or None).

    A window begins every `stride` tokens and has `window` of them, the last one perhaps fewer. The first one scores
    all its tokens; each later one scores those that no earlier window has, given the `window - stride` tokens before
    them (prompt_mask True), so stride = window is disjoint windows and no prompt.
    """
    total, prompt = len(ids), window - stride
    whole = ids.unfold(0, window, stride) if total >= window else ids.new_empty(0, window)  # (N, window)
    # The first window, and those after it, differ in what they score; without a prompt they are one group.
    first = len(whole) if prompt == 0 else min(1, len(whole))
    start = len(whole) * stride
    # After the last whole window; what it shares with that window is scored already.
    last = ids[start:].unsqueeze(0) if total > start + (prompt if len(whole) else 0) else ids.new_empty(1, 0)
    groups = [(whole[:first], False), (whole[first:], True), (last, bool(len(whole)))]
    return [
        (part, _prompt_mask(part, prompt) if prompt and has_prompt else None)
        for part, has_prompt in groups
        if part.numel()
    ]


def _prompt_mask(ids: Tensor, prompt: int) -> Tensor:
    """(N, L) bool, True for the first `prompt` tokens of each row."""
    return (torch.arange(ids.shape[1]) < prompt).expand(len(ids), -1)


class EncodedText(NamedTuple):
    """Documents as one stream of tokens.

    ids (T,) int64, the documents joined by EOS; token_bytes (T,) float64: UTF-8 bytes of a token, those of a document
    shared equally among its tokens, 0 for EOS. eos_token_id: the EOS, None where there is none. loss: what the tokens
    do not hold of the text, an example in words; None where they hold all of it.
    """

    ids: Tensor
    num_documents: int
    text_bytes: int
    token_bytes: Tensor
    eos_token_id: int | None
    loss: str | None


def encode_documents(tokenizer: Any, documents: Iterable[str], eos_token_id: Any = None) -> EncodedText:
    """The documents joined by EOS; text that spells a special token is encoded as text.

    eos_token_id: used where the tokenizer has none; of a list the first. Raises ValueError for text without a token
    and for several documents without an EOS token.
    """
    separator = tokenizer.eos_token_id
    if separator is None:
        separator = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    pieces: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    num_documents, text_bytes, loss = 0, 0, None
    for texts in in_batches(documents):
        encoded = plain_ids(tokenizer, texts)
        loss = loss or first_loss(tokenizer, texts, encoded)
        for text, ids in zip(texts, encoded, strict=True):
            if num_documents:
                if separator is None:
                    raise ValueError("the tokenizer has no eos_token to put between documents; give one document")
                pieces.append(np.array([separator], dtype=np.int64))
                sizes.append(np.zeros(1))
            pieces.append(np.asarray(ids, dtype=np.int64))
            num_bytes = len(text.encode("utf-8"))
            sizes.append(np.full(len(ids), num_bytes / max(1, len(ids))))
            num_documents += 1
            text_bytes += num_bytes
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    if not text_bytes or not len(stream):
        raise ValueError(f"the text has no token to score ({num_documents} documents); give text that is not empty")
    token_bytes = torch.from_numpy(np.concatenate(sizes))
    return EncodedText(torch.from_numpy(stream), num_documents, text_bytes, token_bytes, separator, loss)
