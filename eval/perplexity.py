"""Likelihood of text in nats per token, and the perplexity and bits per byte that follow where it is a bound.

Everything is estimated by `model.log_likelihood`, of a diffusion model or of a `CausalScorer`; this file cuts text
into windows, adds up over them and states how sure the sum is (docs/perplexity.md).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from prime_v2.eval.intervals import Clusters, cluster
from prime_v2.eval.samplers import description
from prime_v2.eval.windows import Windows, cut_windows, encode_documents, window_and_stride
from prime_v2.families import rows_of_sequence
from prime_v2.likelihood_frame_prime_v2 import TOKENS_PER_PASS
from prime_v2.likelihood_output_prime_v2 import NotFiniteError
from prime_v2.output.numbers import perplexity

Progress = Callable[[int, int], None]  # called with (sequences done, sequences in all)
Bytes = int | Sequence[float]  # UTF-8 bytes of all sequences together, or of each

EXACT_METHODS = ("chain", "causal")  # the log-likelihood itself, nothing drawn
# Sequences of one call of `log_likelihood`: few enough for a progress bar that moves, enough to fill its passes.
# A sampler's passes over one row come one after another, so a call of it has the rows of a single pass.
ROW_TOKENS_PER_CALL = 32768


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
    generation_config: Any = None,
    progress: Progress | None = None,
    keep_sequences: bool = False,
) -> dict[str, Any]:
    """As `score_windows`, over documents of text: each token is scored once, bits per byte are over the text's bytes.

    The documents are joined by EOS and cut by `cut_windows` into windows of `window` tokens [default: the model's
    max_position_embeddings] every `stride` tokens [default: `window`]. The EOS between documents are scored as well,
    and add no bytes. Adds `num_documents`, `window` and `stride`. Where the tokens do not hold the text (lower-cased,
    unknown), the model codes another one: there are no bits per byte, and `tokenizer_loss` is an example.
    Raises ValueError for text without a token, several documents without an EOS token, and what `window_and_stride`
    refuses.
    """
    window, stride = window_and_stride([model.config], window, stride)
    text = encode_documents(tokenizer, documents, model.config.eos_token_id)
    windows = cut_windows(text.ids, window, stride)
    lengths: list[int] = []
    for ids, mask in windows:
        lengths += [ids.shape[1] if mask is None else int((~mask[0]).sum())] * len(ids)
    sizes = [float(each.sum()) for each in text.token_bytes.split(lengths)]
    result = score_windows(
        model,
        windows,
        method=method,
        num_samples=num_samples,
        seed=seed,
        text_bytes=sizes if text.loss is None else None,
        eos_token_id=text.eos_token_id,
        generation_config=generation_config,
        progress=progress,
        keep_sequences=keep_sequences,
    )
    result |= {"num_documents": text.num_documents, "window": window, "stride": stride}
    return result if text.loss is None else result | {"tokenizer_loss": text.loss}


class _Scores(NamedTuple):
    """What `_summary` reads of an output of `log_likelihood`, on the CPU."""

    value: Tensor
    stderr: Tensor
    num_scored: Tensor
    num_forward: Tensor
    is_bound: bool
    is_exact: bool


def score_windows(
    model: Any,
    groups: Sequence[Windows],
    *,
    method: str = "subtoken",
    num_samples: int = 8,
    seed: int = 0,
    text_bytes: Bytes | None = None,
    eos_token_id: int | None = None,
    generation_config: Any = None,
    progress: Progress | None = None,
    keep_sequences: bool = False,
    shared: bool = False,
) -> dict[str, Any]:
    """Nats per token of windows of clean token ids without padding, each scored on its own; JSON-ready.

    groups: (ids (N, L) int64, prompt_mask (N, L) bool or None) of windows of one length; prompt_mask is True for
    tokens that are given and not scored. method, num_samples, seed: as in `log_likelihood`. text_bytes: UTF-8 bytes of
    the text that all windows cover, or of each window, (N,). eos_token_id: what ends a document, None where all
    windows are of one. generation_config: with method="sampler", the sampler on top of the model's own options
    (`prime_v2.eval.samplers.named_config`). shared: the processes of this run (Accelerate's) each score a part, and
    all of them get the whole result.
    Keys of the result:
        method; is_exact: -log p itself, nothing drawn; is_bound: not below -log p, which holds for an exact value, too
        num_tokens, num_sequences, num_samples (draws a sequence, 0 where exact), num_forward (rows the network ran)
        nats_per_token: -log p, or its upper bound where `is_bound`; otherwise it may be below -log p
        nats_per_token_interval_95: Student's t of `stderr` and `degrees`, None without them
        stderr, degrees: standard error of nats_per_token and its degrees of freedom, over `num_clusters` clusters of
            sequences taken as independent (`intervals.cluster`), which covers the choice of text and the draws; None
            for one sequence
        interval_over: what it covers the choice of: "documents", or "stretches" of a text without several clusters of
            documents
        monte_carlo_stderr: of the draws only, the text being fixed; rather too large than too small, and with few
            draws it may exceed stderr (`stratified_stderr`); None for one draw
        unigram_entropy: entropy in nats of the token frequencies of these very tokens (plug-in)
    with method="sampler" also those of `samplers.description`, and passes_per_token: passes of the network that the
        sampler takes, by its tokens
    and only where `is_bound`:
        perplexity, perplexity_interval_95
        text_bytes, bits_per_byte, bits_per_byte_interval_95, where text_bytes is given: the interval takes in that
            sequences differ in their bytes, where those of each are given
    and with `keep_sequences` nats_of_sequences, the nats of each window to 1e-3, and clusters, of `intervals.Clusters`
    with the `tokens` of each and, where known, the `bytes`: models that score the same windows are compared on them
    (`prime_v2.studies.compare.differences.paired`).
    Raises ValueError for text_bytes < 1, logits that are not finite, a sampler that never writes one of the windows,
    and what `log_likelihood` refuses.
    """
    if text_bytes is not None and np.sum(text_bytes) < 1:
        raise ValueError(f"text_bytes={text_bytes} must be at least 1; leave it out where the bytes are not known")
    state = PartialState() if shared else None
    processes, rank = (state.num_processes, state.process_index) if state is not None else (1, 0)
    num_sequences, parts = sum(len(ids) for ids, _ in groups), []
    for ids, prompt_mask in groups:
        rows = rows_of_sequence(model.config, method, ids.shape[1], num_samples)
        tokens_per_call = TOKENS_PER_PASS if method == "sampler" else ROW_TOKENS_PER_CALL
        step = max(1, tokens_per_call // max(1, rows * ids.shape[1]))
        step = min(step, -(-len(ids) // processes))
        for start in range(0, len(ids), step):
            end = start + step
            parts.append((ids[start:end], None if prompt_mask is None else prompt_mask[start:end]))
    options: dict[str, Any] = {"method": method, "num_samples": num_samples, "seed": seed}
    if method == "sampler":
        options["generation_config"] = generation_config
    done, found = 0, []
    for number, (ids, prompt_mask) in enumerate(parts):
        if number % processes == rank:
            found.append((number, _scores_of(model, ids, prompt_mask, done, options)))
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
    values = torch.cat([output.value for output in outputs])
    if values.isinf().any():
        raise ValueError(
            f"the sampler never writes sequence {int(values.isinf().nonzero()[0])} of {num_sequences}, of which its "
            f"top_p excludes a token: no perplexity is finite; use top_p=1.0"
        )
    scored = torch.cat([ids.flatten() if mask is None else ids[~mask] for ids, mask in groups])
    lengths = torch.cat([output.num_scored for output in outputs]).numpy()
    clusters = cluster(lengths, (scored == (-1 if eos_token_id is None else eos_token_id)).numpy())
    result = _summary(outputs, scored, lengths, clusters, method, num_samples, text_bytes)
    if method == "sampler":
        result |= description(model, generation_config)
        result["passes_per_token"] = result["num_forward"] / result["num_tokens"] / (result["num_samples"] or 1)
    if keep_sequences:
        result["nats_of_sequences"] = [round(float(each), 3) for output in outputs for each in -output.value]
        tokens = [int(each) for each in clusters.sums(lengths)]
        result["clusters"] = clusters.to_json() | {"tokens": tokens}
        if text_bytes is not None and np.ndim(text_bytes):
            result["clusters"]["bytes"] = [round(float(each), 3) for each in clusters.sums(text_bytes)]
    return result


def _scores_of(model, ids, prompt_mask, first: int, options: dict[str, Any]) -> _Scores | int:
    """The scores of some sequences, or the number (counted from `first`) of one whose likelihood is no number.

    Not raised here: other processes wait for the scores of this one.
    """
    if prompt_mask is not None:
        options = {**options, "prompt_mask": prompt_mask.to(model.device)}
    try:
        output = model.log_likelihood(ids.to(model.device), **options)
    except NotFiniteError as error:
        return first + error.row
    return _Scores(
        output.value.cpu(),
        output.stderr.cpu(),
        output.num_scored.cpu(),
        output.num_forward.cpu(),
        bool(output.is_bound),
        bool(output.is_exact),
    )


def _summary(
    outputs: list[_Scores],
    scored: Tensor,
    lengths: np.ndarray,
    clusters: Clusters,
    method: str,
    num_samples: int,
    text_bytes: Bytes | None,
) -> dict[str, Any]:
    """The result of `score_windows` from what `log_likelihood` gave; scored (T,): the token ids it is about."""
    nats = -torch.cat([output.value for output in outputs]).numpy()
    variance = torch.cat([output.stderr for output in outputs]).square().sum()
    num_tokens, is_bound, is_exact = int(lengths.sum()), outputs[0].is_bound, outputs[0].is_exact
    estimate = clusters.ratio(nats, lengths)
    result: dict[str, Any] = {
        "method": method,
        "is_bound": is_bound,
        "is_exact": is_exact,
        "nats_per_token": estimate.value,
        "nats_per_token_interval_95": estimate.interval(),
        "stderr": estimate.stderr,
        "degrees": estimate.degrees,
        "num_clusters": len(clusters),
        "interval_over": clusters.over,
        "monte_carlo_stderr": _finite(math.sqrt(float(variance)) / num_tokens),
        "num_tokens": num_tokens,
        "num_sequences": len(nats),
        "num_samples": 0 if is_exact else num_samples,
        "num_forward": sum(int(output.num_forward.sum()) for output in outputs),
        "unigram_entropy": unigram_entropy(scored.bincount()),
    }
    if is_bound:
        result["perplexity"] = perplexity(estimate.value)
        result["perplexity_interval_95"] = estimate.interval(perplexity)
        if text_bytes is not None:
            # Bytes of all sequences together are shared equally among the tokens.
            sizes = np.asarray(lengths / num_tokens * text_bytes if np.ndim(text_bytes) == 0 else text_bytes)
            per_byte = clusters.ratio(nats, sizes)
            result["text_bytes"] = round(float(sizes.sum()))
            result["bits_per_byte"] = per_byte.value / math.log(2)
            result["bits_per_byte_interval_95"] = per_byte.interval(lambda value: value / math.log(2))
    return result


def unigram_entropy(counts: Tensor) -> float:
    """Plug-in entropy in nats of token counts (V,): what no model without context goes below on these tokens."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
