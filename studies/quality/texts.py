"""The real text that samples are set beside: windows of held-out text, and the n-grams of the training text."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from prime_v2.eval.intervals import Clusters, cluster
from prime_v2.eval.windows import cut_windows, encode_documents
from prime_v2.studies.quality.statistics import NgramIndex
from prime_v2.tokenization.plain_text import in_batches, plain_ids


@dataclass(frozen=True)
class HeldOut:
    """Windows (N, L) int64 of held-out text, spread over it; units (N,): the cluster of documents of each, from 0."""

    windows: Tensor
    units: np.ndarray
    over: str

    @property
    def clusters(self) -> Clusters:
        """What intervals are taken over; windows of a cluster follow one another."""
        counts = np.bincount(self.units)
        return Clusters(counts.tolist(), ((counts * self.windows.shape[1]) ** 2).tolist(), self.over)

    @property
    def about(self) -> dict[str, Any]:
        """What a record says of them: `cluster_of_window` (N,) lets its differences be worked out anew."""
        return {"num_clusters": len(self.clusters), "over": self.over, "cluster_of_window": self.units.tolist()}

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()


def held_out(tokenizer: Any, documents: Iterable[str], eos_token_id: Any, length: int, count: int) -> HeldOut:
    """`count` windows of `length` tokens, evenly spread over the documents joined by EOS.

    Raises ValueError for a text that has fewer windows.
    """
    text = encode_documents(tokenizer, documents, eos_token_id)
    windows = [ids for ids, _ in cut_windows(text.ids, length, length) if ids.shape[1] == length]
    total = len(windows[0]) if windows else 0
    if total < count:
        raise ValueError(
            f"the held-out text has {total} windows of {length} tokens, fewer than samples={count}; give a longer "
            f"text, or draw fewer samples"
        )
    ends = (text.ids[: total * length] == (-1 if text.eos_token_id is None else text.eos_token_id)).numpy()
    whole = cluster(np.full(total, length), ends)
    picked = np.linspace(0, total - 1, count).round().astype(int)
    of_window = np.repeat(np.arange(len(whole)), whole.sequences)[picked]
    return HeldOut(windows[0][picked], np.unique(of_window, return_inverse=True)[1].reshape(-1), whole.over)


def training_index(tokenizer: Any, documents: Iterable[str]) -> NgramIndex:
    """The n-grams of the training text that samples might be copied from, none across two documents."""
    texts = (ids for batch in in_batches(documents) for ids in plain_ids(tokenizer, batch))
    return NgramIndex(np.asarray(ids, dtype=np.int64) for ids in texts)
