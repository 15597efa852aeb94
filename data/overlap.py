"""How much of the text that a model is tested on also stands in the text that it trains on: equal runs of tokens.

Documents that are equal up to case and whitespace are on one side of the split (`splits`); what licences, headings and
quotations share is not, and this counts it.
"""

from typing import Any

import numpy as np

LENGTHS = (8, 32)  # tokens of a run: a phrase, and one or two lines of a repeated passage
CHUNK = 2**19  # tokens that are hashed at once
BITS = 24  # of a hash, that a table of candidates is indexed by
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def ngram_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit number for each run of consecutive ids, equal for equal runs: (n,) to (n - length + 1,) uint64."""
    count = max(0, len(ids) - length + 1)
    hashed = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        hashed = (hashed ^ (ids[place : place + count].astype(np.uint64) + np.uint64(1))) * _FACTOR
        hashed ^= hashed >> np.uint64(29)
    return hashed


def overlap(train: np.ndarray, test: np.ndarray, length: int) -> dict[str, Any]:
    """Of the runs of `length` tokens in the test ids (n,), how many are also in the training ids (m,); both integers.

    Keys: length, ngrams (of the test text, each as often as it occurs), ngrams_in_train, share (None without any).
    Runs are compared by 64-bit hashes: of 1e6 against 1e9 runs, one in 18,000 texts has a false match.
    """
    wanted = ngram_hashes(test, length)
    distinct, counts = np.unique(wanted, return_counts=True)
    found = np.zeros(len(distinct), dtype=bool)
    candidate = np.zeros(2**BITS, dtype=bool)  # which last bits occur: spares most of the searches
    last = np.uint64(2**BITS - 1)
    candidate[distinct & last] = True
    for start in range(0, len(train), CHUNK):
        hashed = ngram_hashes(train[start : start + CHUNK + length - 1], length)
        hashed = hashed[candidate[hashed & last]]
        places = np.searchsorted(distinct, hashed)
        inside = places < len(distinct)
        places, hashed = places[inside], hashed[inside]
        found[places[distinct[places] == hashed]] = True
    shared = int(counts[found].sum())
    share = shared / len(wanted) if len(wanted) else None
    return {"length": length, "ngrams": len(wanted), "ngrams_in_train": shared, "share": share}
