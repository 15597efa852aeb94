"""Numbers about a set of sampled texts, as token ids, and 95% intervals of them over the samples.

A set is N texts of scored tokens, (T_i,) int64 each. `units` (N,) says which texts go together because they are of one
document (of samples: each is its own unit); intervals are over units.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from prime_v2.eval.intervals import Estimate
from prime_v2.random_prime_v2 import hash64

REPEATED = 4  # tokens of the n-grams whose repetition within a text is counted
COPIED = 8  # tokens of the n-grams that are looked for in the training text
DISTINCT = (1, 2, 3)
REFERENCES = 16  # other samples that self-BLEU compares a sample with: more of them give a higher value
RESAMPLES = 2000
# How many samples each number needs at least: an interval resamples units, which fewer than 8 do not fill.
FEWEST = {"a bootstrap interval": 8, "self-BLEU": REFERENCES + 1}

Texts = Sequence[np.ndarray]


def ngrams(ids: np.ndarray, size: int) -> np.ndarray:
    """The n-grams of a text (T,), in order: (max(0, T - size + 1), size)."""
    if len(ids) < size:
        return np.empty((0, size), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(np.asarray(ids, dtype=np.int64), size)


class NgramIndex:
    """Which n-grams a text holds, as sorted 64-bit hashes: 8 bytes for each distinct n-gram.

    Two n-grams have one hash with probability 2^-64: of a million n-grams looked for among a billion, 5e-5 in all.
    """

    def __init__(self, texts: Iterable[np.ndarray], size: int = COPIED):
        found = [self.hashes(each, size) for each in texts]
        self.size, self.sorted = size, np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.sorted.tobytes()).hexdigest()

    @staticmethod
    def hashes(ids: np.ndarray, size: int) -> np.ndarray:
        """Hashes of the n-grams of a text (T,): (T - size + 1,) int64."""
        grams = ngrams(ids, size)
        if not len(grams):
            return np.empty(0, dtype=np.int64)
        return hash64(*torch.from_numpy(grams.copy()).unbind(1)).numpy()

    def count(self, ids: np.ndarray) -> int:
        """How many of the n-grams of a text (T,) are in it."""
        wanted = self.hashes(ids, self.size)
        places = np.searchsorted(self.sorted, wanted).clip(max=max(0, len(self.sorted) - 1))
        return int((self.sorted[places] == wanted).sum()) if len(self.sorted) else 0


def entropy(ids: np.ndarray) -> float:
    """Unigram entropy in nats of a text (T,): that of the frequencies of its own tokens, at most log T."""
    shares = np.unique(ids, return_counts=True)[1] / max(1, len(ids))
    return float(-(shares * np.log(shares)).sum())


def repeated(ids: np.ndarray, size: int = REPEATED) -> int:
    """How many n-grams of a text (T,) have stood in it before."""
    grams = ngrams(ids, size)
    return len(grams) - len(np.unique(grams, axis=0))


def check_self_bleu() -> None:
    """ValueError where self-BLEU's package is not installed; called before the work."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ValueError("self-BLEU needs the package sacrebleu; pip install sacrebleu, or use --law-only")


def self_bleu(texts: Texts) -> np.ndarray:
    """BLEU-4 in [0, 1] of each text against the next `REFERENCES` others, cyclically: (N,) float64 (Texygen, 2018).

    By sacrebleu over token ids, with its exponential smoothing. Raises ValueError for fewer texts than that needs.
    """
    from sacrebleu.metrics import BLEU

    needed = FEWEST["self-BLEU"]
    if len(texts) < needed:
        raise ValueError(f"self-BLEU needs at least {needed} samples, not {len(texts)}; draw {needed}")
    metric = BLEU(tokenize="none", effective_order=True)
    words = [" ".join(map(str, each.tolist())) for each in texts]
    others = [[words[(i + 1 + j) % len(words)] for j in range(REFERENCES)] for i in range(len(words))]
    return np.array([metric.sentence_score(each, refs).score / 100 for each, refs in zip(words, others, strict=True)])


def distinct(texts: Texts, size: int, units: np.ndarray) -> dict[str, Any]:
    """distinct-n (arXiv:1510.03055): distinct n-grams of the whole set over all of its n-grams.

    A bootstrap would draw texts twice, whose n-grams then are not distinct; the error is that of the jackknife that
    leaves out a unit, whose variance is rather too large (Efron, Stein, Annals of Statistics 9, 1981).
    """
    grams = [ngrams(each, size) for each in texts]
    owners = np.repeat(units, [len(each) for each in grams])
    _, numbers = np.unique(np.concatenate(grams), axis=0, return_inverse=True)
    numbers = numbers.reshape(-1)  # numpy 2.0 returned a column
    pairs = np.unique(np.stack([numbers, owners], axis=1), axis=0)  # an n-gram and a unit that has it
    count = int(units.max()) + 1
    holders = np.bincount(pairs[:, 0])
    only = np.bincount(pairs[holders[pairs[:, 0]] == 1, 1], minlength=count)  # n-grams that no other unit has
    own = np.bincount(owners, minlength=count)
    value, without = len(holders) / len(owners), (len(holders) - only) / np.maximum(1, len(owners) - own)
    if count < 2:
        return {"value": value, "interval_95": None}
    stderr = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    return {"value": value, "interval_95": Estimate(value, stderr, count - 1).interval()}


def mean(numerators: Any, denominators: Any, units: np.ndarray, transform: Callable[[float], float] = float) -> dict:
    """sum(numerators) / sum(denominators), (N,) each, with its bootstrap interval over units; both transformed.

    BCa (Efron, JASA 82, 1987), seeded: the same values give the same interval. None for fewer units than an interval
    needs, and where the ratio is the same for all units.
    """
    from scipy.stats import bootstrap

    over, under = (np.bincount(units, np.asarray(each, dtype=float)) for each in (numerators, denominators))
    value = float(over.sum() / under.sum()) if under.sum() else 0.0
    if len(over) < FEWEST["a bootstrap interval"] or np.ptp(over - value * under) < 1e-12 * max(1.0, abs(value)):
        return {"value": transform(value), "interval_95": None}
    found = bootstrap(
        (over, under),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return {"value": transform(value), "interval_95": [transform(float(found.low)), transform(float(found.high))]}


def describe(texts: Texts, units: np.ndarray | None = None, training: NgramIndex | None = None) -> dict[str, Any]:
    """The numbers of a set that need no judge: {name: {"value", "interval_95"}}.

    entropy: unigram entropy of a text, nats, averaged over texts; repetition: share of 4-grams that stood in their
    text before; copied: share of 8-grams that are in the training text (None without one); self_bleu; distinct_1 ...
    """
    units = np.arange(len(texts)) if units is None else units
    ones = np.ones(len(texts))
    ratio = partial(mean, units=units)
    found = {"entropy": ratio([entropy(each) for each in texts], ones)}
    counts = [len(ngrams(each, REPEATED)) for each in texts]
    found["repetition"] = ratio([repeated(each) for each in texts], counts)
    if training is not None:
        counts = [len(ngrams(each, training.size)) for each in texts]
        found["copied"] = ratio([training.count(each) for each in texts], counts)
    found["self_bleu"] = ratio(self_bleu(texts), ones)
    return found | {f"distinct_{size}": distinct(texts, size, units) for size in DISTINCT}


def resampled(numerators: Any, denominators: Any, units: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """sum(numerators) / sum(denominators) of `RESAMPLES` bootstrap samples of the units: (RESAMPLES, ...).

    numerators (N, ...) and denominators (N,); units are drawn once for all that is behind the first axis, so that
    differences of it are paired.
    """
    numerators, count = np.asarray(numerators, dtype=float), int(units.max()) + 1
    over = np.zeros((count, *numerators.shape[1:]))
    np.add.at(over, units, numerators)
    under = np.bincount(units, np.asarray(denominators, dtype=float))
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
    totals = weights @ under
    return np.tensordot(weights, over, axes=1) / totals.reshape(-1, *[1] * (numerators.ndim - 1))


def percentiles(values: np.ndarray) -> list[float | None]:
    """The 2.5% and 97.5% points of resampled values, None for one that is infinite."""
    ends = np.quantile(values, [0.025, 0.975], method="nearest")
    return [float(each) if np.isfinite(each) else None for each in ends]
