"""Likelihood of text in nats per token, and the perplexity and bits per byte that follow where it is a bound.

Everything is estimated by `model.log_likelihood`, of a diffusion model or of a `CausalScorer`; this file cuts text
into windows, adds up over them and states how sure the sum is (docs/perplexity.md).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from prime_v2.likelihood_prime_v2 import NotFiniteError

Progress = Callable[[int, int], None]  # called with (sequences done, sequences in all)
Windows = tuple[Tensor, Tensor | None]  # ids (N, L) int64; prompt_mask (N, L) bool, True for what is not scored

NORMAL_95 = 1.959964  # 97.5% point of the standard normal
EXACT_METHODS = ("chain", "causal")  # the log-likelihood itself, nothing drawn
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
    keep_sequences: bool = False,
    shared: bool = False,
) -> dict[str, Any]:
    """Nats per token of blocks (N, L) of clean token ids without padding, each block scored on its own; JSON-ready.

    method, num_samples, seed: as in `log_likelihood`. text_bytes: UTF-8 bytes of the text that all blocks cover.
    shared: see `score_windows`.
    Keys of the result:
        method, is_bound; is_exact: -log p itself, nothing drawn; num_tokens, num_sequences, num_samples (draws a
            sequence, 0 where exact), num_forward (rows that the network ran)
        nats_per_token: -log p, or its upper bound where `is_bound`; otherwise it may be below -log p
        nats_per_token_interval_95: from `stderr`, None without one
        stderr: standard error of nats_per_token over sequences taken as independent, which covers the choice of text
            and the draws; None for one sequence
        monte_carlo_stderr: of the draws alone, the text being fixed; rather too large than too small, and with few
            draws it may exceed stderr (`stratified_stderr`); None for one draw
        unigram_entropy: entropy in nats of the token frequencies of these very tokens (plug-in)
    and only where `is_bound`:
        perplexity, perplexity_interval_95 (from `stderr`, None without one)
        text_bytes, bits_per_byte, bits_per_byte_interval_95, where text_bytes is given
    and with `keep_sequences` nats_of_sequences, the nats of each block to 1e-3: models that score the same blocks are
    compared block by block (`prime_v2.eval.compare_report.paired`).
    Raises ValueError for no tokens, text_bytes < 1, logits that are not finite and what `log_likelihood` refuses.
    """
    return score_windows(
        model,
        [(_as_ids(blocks), None)],
        method=method,
        num_samples=num_samples,
        seed=seed,
        text_bytes=text_bytes,
        progress=progress,
        keep_sequences=keep_sequences,
        shared=shared,
    )


def score_text(
    model: Any,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    method: str = "subtoken",
    num_samples: int = 8,
    seed: int = 0,
    window: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As `score_blocks`, over documents of text: every token is scored once, bits per byte are over the text's bytes.

    The documents are joined by EOS and cut by `cut_windows` into windows of `window` tokens [default: the model's
    max_position_embeddings] every `stride` tokens [default: `window`]. The EOS between documents are scored as well,
    and add no bytes. Adds `num_documents`, `window` and `stride`.
    Raises ValueError for text without a token, several documents without an EOS token, and what `window_and_stride`
    refuses.
    """
    window, stride = window_and_stride([model.config], window, stride)
    ids, num_documents, text_bytes = encode_documents(tokenizer, documents, model.config.eos_token_id)
    result = score_windows(
        model,
        cut_windows(ids, window, stride),
        method=method,
        num_samples=num_samples,
        seed=seed,
        text_bytes=text_bytes,
        progress=progress,
    )
    return {**result, "num_documents": num_documents, "window": window, "stride": stride}


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


class _Scores(NamedTuple):
    """What `_summary` reads of an output of `log_likelihood`, on the CPU."""

    value: Tensor
    stderr: Tensor
    num_scored: Tensor
    num_forward: Tensor
    is_bound: bool


def score_windows(
    model: Any,
    groups: Sequence[Windows],
    *,
    method: str = "subtoken",
    num_samples: int = 8,
    seed: int = 0,
    text_bytes: int | None = None,
    progress: Progress | None = None,
    keep_sequences: bool = False,
    shared: bool = False,
) -> dict[str, Any]:
    """As `score_blocks`, over groups of windows that may differ in length and give a part of their tokens.

    shared: the processes of this run (Accelerate's) each score a part, and all of them get the whole result.
    """
    if text_bytes is not None and text_bytes < 1:
        raise ValueError(f"text_bytes={text_bytes} must be at least 1; leave it out where the bytes are not known")
    state = PartialState() if shared else None
    processes, rank = (state.num_processes, state.process_index) if state is not None else (1, 0)
    num_sequences, parts = sum(len(ids) for ids, _ in groups), []
    for ids, prompt_mask in groups:
        rows = ids.shape[1] if method == "chain" else 1 if method in EXACT_METHODS else num_samples
        step = max(1, ROW_TOKENS_PER_CALL // max(1, rows * ids.shape[1]))
        step = min(step, -(-len(ids) // processes))
        for start in range(0, len(ids), step):
            end = start + step
            parts.append((ids[start:end], None if prompt_mask is None else prompt_mask[start:end]))
    done, found = 0, []
    for number, (ids, prompt_mask) in enumerate(parts):
        if number % processes == rank:
            found.append((number, _scores_of(model, ids, prompt_mask, method, num_samples, seed, done)))
        done += len(ids)
        if progress is not None:
            progress(done, num_sequences)
    if processes > 1:
        found = sorted(gather_object(found), key=lambda each: each[0])
    outputs = []
    for _, scores in found:
        if isinstance(scores, int):
            raise ValueError(
                f"the log-likelihood of sequence {scores} of {num_sequences} is no number: the network's logits are "
                f"not finite"
            )
        outputs.append(scores)
    scored = torch.cat([ids.flatten() if mask is None else ids[~mask] for ids, mask in groups])
    result = _summary(outputs, scored, method, num_samples, text_bytes)
    if keep_sequences:
        result["nats_of_sequences"] = [round(float(each), 3) for output in outputs for each in -output.value]
    return result


def _scores_of(model, ids, prompt_mask, method, num_samples, seed, first: int) -> _Scores | int:
    """The scores of some sequences, or the number (counted from `first`) of one whose likelihood is no number.

    Not raised here: other processes wait for the scores of this one.
    """
    options = {} if prompt_mask is None else {"prompt_mask": prompt_mask.to(model.device)}
    try:
        output = model.log_likelihood(
            ids.to(model.device), method=method, num_samples=num_samples, seed=seed, **options
        )
    except NotFiniteError as error:
        return first + error.row
    return _Scores(
        output.value.cpu(),
        output.stderr.cpu(),
        output.num_scored.cpu(),
        output.num_forward.cpu(),
        bool(output.is_bound),
    )


def _summary(outputs: list[_Scores], scored: Tensor, method: str, num_samples: int, text_bytes) -> dict[str, Any]:
    """The result of `score_blocks` from what `log_likelihood` gave; scored (T,): the token ids it is about."""
    nats = -torch.cat([output.value for output in outputs])
    lengths = torch.cat([output.num_scored for output in outputs]).double()
    variance = torch.cat([output.stderr for output in outputs]).square().sum()
    num_tokens, is_bound = int(lengths.sum()), bool(outputs[0].is_bound)
    mean = float(nats.sum()) / num_tokens
    stderr = _ratio_stderr(nats, lengths)
    result: dict[str, Any] = {
        "method": method,
        "is_bound": is_bound,
        "is_exact": method in EXACT_METHODS,
        "nats_per_token": mean,
        "nats_per_token_interval_95": _interval(mean, stderr, float),
        "stderr": stderr,
        "monte_carlo_stderr": _finite(math.sqrt(float(variance)) / num_tokens),
        "num_tokens": num_tokens,
        "num_sequences": len(nats),
        "num_samples": 0 if method in EXACT_METHODS else num_samples,
        "num_forward": sum(int(output.num_forward.sum()) for output in outputs),
        "unigram_entropy": unigram_entropy(scored.bincount()),
    }
    if is_bound:
        result["perplexity"] = _exp(mean)
        result["perplexity_interval_95"] = _interval(mean, stderr, _exp)
        if text_bytes is not None:
            bits_per_nat = num_tokens / (math.log(2) * text_bytes)
            result["text_bytes"] = int(text_bytes)
            result["bits_per_byte"] = mean * bits_per_nat
            result["bits_per_byte_interval_95"] = _interval(mean, stderr, lambda value: value * bits_per_nat)
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


__all__ = [
    "EXACT_METHODS",
    "cut_windows",
    "encode_documents",
    "score_blocks",
    "score_text",
    "score_windows",
    "unigram_entropy",
    "window_and_stride",
]
