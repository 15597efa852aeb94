"""Likelihood of text in nats per token, and the perplexity and bits per byte that follow where it is a bound.

Everything is estimated by `model.log_likelihood`; this file adds it up over sequences and states how sure the sum is.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int, int], None]  # called with (sequences done, sequences in all)

NORMAL_95 = 1.959964  # 97.5% point of the standard normal
# Sequences of one call of `log_likelihood`: few enough for a progress bar that moves, enough to fill its passes.
ROW_TOKENS_PER_CALL = 32768
DOCUMENTS_PER_BATCH = 256


def score_blocks(
    model: Any,
    blocks: Tensor | np.ndarray | Sequence[Any],
    *,
    method: str = "subtoken",
    num_samples: int = 8,
    seed: int = 0,
    text_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Nats per token of blocks (N, L) of clean token ids without padding, each block scored on its own; JSON-ready.

    method, num_samples, seed: as in `log_likelihood`. text_bytes: UTF-8 bytes of the text that all blocks cover.
    Keys of the result:
        method, is_bound; num_tokens, num_sequences, num_samples (draws a sequence, 0 for "chain"), num_forward (rows
            that the network ran)
        nats_per_token: -log p, or its upper bound where `is_bound`; otherwise it may be below -log p
        stderr: standard error of nats_per_token over sequences taken as independent, which covers the choice of text
            and the draws; None for one sequence
        monte_carlo_stderr: of the draws alone, the text being fixed; rather too large than too small, and with few
            draws it may exceed stderr (`stratified_stderr`); None for one draw
        unigram_entropy: entropy in nats of the token frequencies of these very tokens (plug-in)
    and only where `is_bound`:
        perplexity, perplexity_interval_95 (from `stderr`, None without one)
        text_bytes, bits_per_byte, bits_per_byte_interval_95, where text_bytes is given
    Raises ValueError for no tokens, text_bytes < 1 and what `log_likelihood` refuses.
    """
    ids = _as_ids(blocks)
    return _score([ids], model, method, num_samples, seed, text_bytes, progress)


def score_text(
    model: Any,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    method: str = "subtoken",
    num_samples: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As `score_blocks`, over documents of text: every token is scored once, bits per byte are over the text's bytes.

    The documents are joined by EOS and cut into windows of max_position_embeddings tokens, each scored on its own; the
    last one may be shorter. The EOS between documents are scored as well, and add no bytes. Adds `num_documents`.
    Raises ValueError for text without a token and for several documents without an EOS token.
    """
    ids, num_documents, text_bytes = encode_documents(tokenizer, documents, model.config.eos_token_id)
    length = model.config.max_position_embeddings
    whole = len(ids) // length * length
    windows = [ids[:whole].view(-1, length), ids[whole:].unsqueeze(0)]
    result = _score(windows, model, method, num_samples, seed, text_bytes, progress)
    return {**result, "num_documents": num_documents}


def encode_documents(tokenizer: Any, documents: Iterable[str], eos_token_id: Any = None) -> tuple[Tensor, int, int]:
    """(ids (T,) int64 of the documents joined by EOS, number of documents, their UTF-8 bytes).

    Text that spells a special token is encoded as text. eos_token_id: used where the tokenizer has none; of a list the
    first. Raises ValueError for text without a token and for several documents without an EOS token.
    """
    separator = tokenizer.eos_token_id
    if separator is None:
        separator = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    pieces: list[np.ndarray] = []
    num_documents = text_bytes = 0
    remaining = iter(documents)
    while texts := list(itertools.islice(remaining, DOCUMENTS_PER_BATCH)):
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            if num_documents:
                if separator is None:
                    raise ValueError("the tokenizer has no eos_token to put between documents; give one document")
                pieces.append(np.array([separator], dtype=np.int64))
            pieces.append(np.asarray(ids, dtype=np.int64))
            num_documents += 1
            text_bytes += len(text.encode("utf-8"))
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    if not text_bytes or not len(stream):
        raise ValueError(f"the text has no token to score ({num_documents} documents); give text that is not empty")
    return torch.from_numpy(stream), num_documents, text_bytes


def _as_ids(blocks: Tensor | np.ndarray | Sequence[Any]) -> Tensor:
    if not isinstance(blocks, Tensor | np.ndarray):
        blocks = np.stack([blocks[i] for i in range(len(blocks))]) if len(blocks) else np.empty((0, 0), dtype=np.int64)
    ids = torch.as_tensor(blocks)
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"blocks has shape {tuple(ids.shape)}; give (N, L) token ids with at least one token")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"blocks holds {ids.dtype}; token ids must be integers, e.g. int64")
    return ids.long()


def _score(windows: list[Tensor], model, method, num_samples, seed, text_bytes, progress) -> dict[str, Any]:
    """The result of `score_blocks` for several (N, L) tensors of different L, some perhaps empty."""
    if text_bytes is not None and text_bytes < 1:
        raise ValueError(f"text_bytes={text_bytes} must be at least 1; leave it out where the bytes are not known")
    windows = [ids for ids in windows if ids.numel()]
    num_sequences, done = sum(len(ids) for ids in windows), 0
    nats, variances, lengths, num_forward, is_bound = [], [], [], 0, None
    for ids in windows:
        rows = ids.shape[1] if method == "chain" else num_samples
        step = max(1, ROW_TOKENS_PER_CALL // max(1, rows * ids.shape[1]))
        for part in ids.split(step):
            output = model.log_likelihood(part.to(model.device), method=method, num_samples=num_samples, seed=seed)
            nats.append(-output.value)
            variances.append(output.stderr.square())
            lengths.append(output.num_scored.double())
            num_forward += int(output.num_forward.sum())
            is_bound = output.is_bound
            done += len(part)
            if progress is not None:
                progress(done, num_sequences)
    all_nats, all_lengths = torch.cat(nats), torch.cat(lengths)
    num_tokens = int(all_lengths.sum())
    mean = float(all_nats.sum()) / num_tokens
    stderr = _ratio_stderr(all_nats, all_lengths)
    counts = torch.cat([ids.flatten() for ids in windows]).bincount()
    result: dict[str, Any] = {
        "method": method,
        "is_bound": bool(is_bound),
        "nats_per_token": mean,
        "stderr": stderr,
        "monte_carlo_stderr": _finite(math.sqrt(float(torch.cat(variances).sum())) / num_tokens),
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
        "num_samples": 0 if method == "chain" else num_samples,
        "num_forward": num_forward,
        "unigram_entropy": unigram_entropy(counts),
    }
    if is_bound:
        result["perplexity"] = _exp(mean)
        result["perplexity_interval_95"] = _interval(mean, stderr, _exp)
        if text_bytes is not None:
            bits_per_nat = num_tokens / (math.log(2) * text_bytes)
            result["text_bytes"] = int(text_bytes)
            result["bits_per_byte"] = mean * bits_per_nat
            result["bits_per_byte_interval_95"] = _interval(mean, stderr, lambda nats: nats * bits_per_nat)
    return result


def _ratio_stderr(nats: Tensor, lengths: Tensor) -> float | None:
    """Standard error of sum(nats) / sum(lengths) over N independent sequences, both (N,) float64; None for N = 1.

    The linearised ratio estimator (Cochran, "Sampling Techniques", 1977, section 6.4); with equal lengths it is the
    standard deviation of the sequences' nats per token over sqrt(N).
    """
    count = len(nats)
    if count < 2:
        return None
    residuals = nats - nats.sum() / lengths.sum() * lengths
    return float((count / (count - 1) * residuals.square().sum()).sqrt() / lengths.sum())


def unigram_entropy(counts: Tensor) -> float:
    """Plug-in entropy in nats of token counts (V,): what no model without context goes below on these tokens."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum())


def _interval(mean: float, stderr: float | None, transform: Callable[[float], float]) -> list[float] | None:
    if stderr is None:
        return None
    return [transform(mean - NORMAL_95 * stderr), transform(mean + NORMAL_95 * stderr)]


def _exp(nats: float) -> float:
    """exp, cut at 700 nats a token so that an absurd model still gives a number that JSON can hold."""
    return math.exp(min(nats, 700.0))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["encode_documents", "score_blocks", "score_text", "unigram_entropy"]
