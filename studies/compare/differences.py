"""Paired differences of two runs, the sums that they are made of in a comparison's record, and means over seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prime_v2.eval.intervals import Clusters, Estimate, mean_of, ratio
from prime_v2.studies.compare.search import Trained

BOUND_FIELDS = (
    "method", "is_bound", "is_exact", "nats_per_token", "nats_per_token_interval_95", "stderr", "degrees",
    "num_clusters", "interval_over", "monte_carlo_stderr", "num_tokens", "num_sequences", "num_samples",
    "unigram_entropy", "perplexity", "perplexity_interval_95", "text_bytes", "bits_per_byte",
    "bits_per_byte_interval_95",
)  # fmt: skip


def paired(bound: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What `bound` is above `other`, in nats per token.

    Both as `score_windows` gives them with `keep_sequences`, or as a comparison's record keeps them.
    Keys: nats_per_token, stderr over the clusters of sequences that share documents, interval_95 (Student t); the last
    two are None for one cluster. ValueError unless both are of the same sequences.
    """
    count, others = bound["num_sequences"], other["num_sequences"]
    if count != others:
        raise ValueError(f"{count} sequences cannot be paired with {others}; score the same ones")
    clusters = bound.get("clusters")
    if clusters is None or clusters != other.get("clusters"):
        raise ValueError(
            "the records do not say alike which sequences share documents; evaluate both with this version"
        )
    return _as_json(ratio(_cluster_sums(bound) - _cluster_sums(other), clusters["tokens"], clusters["squares"]))


def _cluster_sums(scored: dict[str, Any]) -> np.ndarray:
    """The nats of each cluster of sequences, (G,): as a comparison's record keeps them, or from the sequences."""
    if "nats_of_clusters" in scored:
        return np.array(scored["nats_of_clusters"])
    clusters = scored["clusters"]
    return Clusters(clusters["sequences"], clusters["squares"], clusters["over"]).sums(scored["nats_of_sequences"])


def over_seeds(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One estimate from those of several seeds (`nats_per_token`, `stderr`): their mean, its error, the interval.

    The error is that of the spread between seeds, which holds that of the test text and the draws, since each seed has
    its own; the interval is Student's. A single estimate keeps its error and its interval.
    """
    if len(estimates) > 1:
        return _as_json(mean_of([each["nats_per_token"] for each in estimates]))
    (only,) = estimates
    interval = only["interval_95"] if "interval_95" in only else only["nats_per_token_interval_95"]
    return {"nats_per_token": only["nats_per_token"], "stderr": only["stderr"], "interval_95": interval}


def _as_json(estimate: Estimate) -> dict[str, Any]:
    return {"nats_per_token": estimate.value, "stderr": estimate.stderr, "interval_95": estimate.interval()}


def without_sequences(scored: dict[str, Any]) -> dict[str, Any]:
    return {name: scored[name] for name in BOUND_FIELDS if name in scored}


def with_sums(scored: dict[str, Any]) -> dict[str, Any]:
    """A score in the summary, with what paired differences are made of."""
    sums = {} if scored.get("clusters") is None else {"nats_of_clusters": _cluster_sums(scored).round(3).tolist()}
    return without_sequences(scored) | sums


def clusters_of(trained: Sequence[Trained]) -> dict[str, dict[str, Any]]:
    """By seed, the clusters of the sequences that bounds and laws of samplers are scored on, the same for all runs."""
    found: dict[str, dict[str, Any]] = {}
    for run, record in trained:
        evaluation = record["results"]["evaluation"]
        scores = {"bound": evaluation["bound"], "sampler": next(iter(evaluation.get("sampler", {}).values()), {})}
        for name, score in scores.items():
            if score.get("clusters") is not None:
                found.setdefault(str(run.seed), {}).setdefault(name, score["clusters"])
    return found
