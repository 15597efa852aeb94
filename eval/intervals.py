"""95% intervals of means over text: Student's t, over clusters of sequences that share documents (docs/perplexity.md).

One home for what every command and report says about how sure a number is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

# A cluster ends where, of the document that is cut there, the tokens before times those after the cut are at most this
# share of the cluster's squared document lengths: the cut leaves out twice the share of the variance.
CUT_SHARE = 0.1
STRETCHES = 20  # into which a text is cut that has no two clusters of documents
# Sentences for what is printed.
UPPER_END = "The value of a bound is an estimate; what bounds with 97.5% confidence is the upper end of its interval."
NOT_CLUSTERED = "Recorded by an earlier version: intervals take sequences as independent, which is too narrow."


def half_width(stderr: Any, degrees: Any = None, level: float = 0.95) -> Any:
    """Half of the interval of an estimate: the two-sided point of Student's t with so many degrees, times stderr.

    Numbers or arrays that broadcast. degrees: None where they are not known, which is the normal law. A stderr of None
    is not known either and has no width: 0.
    """
    from scipy.stats import t

    return 0.0 if stderr is None else t.ppf(0.5 + level / 2, math.inf if degrees is None else degrees) * stderr


def standard_errors_as_sure(as_of_normal: float, degrees: float) -> float:
    """How many standard errors with so many degrees are as sure (one-sided) as `as_of_normal` of a normal law."""
    from scipy.stats import norm, t

    return float(t.isf(norm.sf(as_of_normal), degrees))


def plus_minus(score: dict[str, Any], digits: int = 3, sign: str = "±") -> str:
    """Half of the 95% interval of nats per token, as " ± 0.032", of a score of any version; "" without an error."""
    if score["stderr"] is None:
        return ""
    interval = score.get("nats_per_token_interval_95")
    half = half_width(score["stderr"]) if interval is None else interval[1] - score["nats_per_token"]
    return f" {sign} {half:.{digits}f}"


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums with its standard error and degrees of freedom, both None where one cluster is all there is."""

    value: float
    stderr: float | None
    degrees: float | None

    def interval(self, transform: Callable[[float], float] = float) -> list[float] | None:
        """[lower, upper] ends of the 95% interval, each put through `transform`; None without a standard error."""
        if self.stderr is None or self.degrees is None:
            return None
        half = float(half_width(self.stderr, self.degrees))
        return [transform(self.value - half), transform(self.value + half)]


@dataclass(frozen=True)
class Clusters:
    """Which consecutive sequences of a text belong together, because documents reach across them. JSON-ready.

    sequences: how many each cluster has; squares: sum of the squared token counts of the documents (or parts of them)
    in it, which its variance goes with where the tokens of a document are alike.
    over: what they sample, "documents" or, of a text without two clusters of documents, "stretches" of it.
    """

    sequences: list[int]
    squares: list[int]
    over: str

    def __len__(self) -> int:
        return len(self.sequences)

    def sums(self, values: Any) -> np.ndarray:
        """Values (N,) of the sequences, added up in each cluster: (G,) float64."""
        starts = np.cumsum([0, *self.sequences[:-1]])
        return np.add.reduceat(np.asarray(values, dtype=np.float64), starts)

    def ratio(self, numerators: Any, denominators: Any) -> Estimate:
        """sum(numerators) / sum(denominators), both (N,) of the sequences, over these clusters."""
        return ratio(self.sums(numerators), self.sums(denominators), self.squares)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cluster(lengths: Any, ends: Any) -> Clusters:
    """Clusters of N consecutive sequences of lengths (N,) tokens; ends (T,) bool: the tokens that end a document.

    A cluster is closed behind the first sequence where the cut document matters little (`CUT_SHARE`), so that it holds
    whole documents but for small parts: several sequences of a long document, or one sequence of many short ones.
    """
    lengths, ends = np.asarray(lengths, dtype=np.int64), np.asarray(ends, dtype=bool)
    stops = np.flatnonzero(ends) + 1  # of documents, in tokens
    total = len(ends)
    if not len(stops) or stops[-1] < total:
        stops = np.append(stops, total)
    sequences: list[int] = []
    squares: list[int] = []
    count, own, document, start = 0, 0, 0, 0  # start: of the document's part in the cluster
    first = 0  # document that is the first to begin in the cluster
    for end in np.cumsum(lengths).tolist():
        count += 1
        while document < len(stops) and stops[document] <= end:
            own += (int(stops[document]) - start) ** 2
            start, document = int(stops[document]), document + 1
        before = end - start
        after = int(stops[document]) - end if before else 0
        if before * after > CUT_SHARE * (own + before**2):
            continue
        begun = document + bool(before)  # documents that have begun so far
        if begun > first or not sequences:
            sequences.append(count)
            squares.append(own + before**2)
        else:  # no more than the end of a document that began before
            sequences[-1] += count
            squares[-1] += own + before**2
        count, own, start, first = 0, 0, end, begun
    return Clusters(sequences, squares, "documents") if len(sequences) > 1 else _stretches(lengths)


def _stretches(lengths: np.ndarray) -> Clusters:
    parts = np.array_split(lengths, min(STRETCHES, len(lengths)))
    return Clusters([len(part) for part in parts], [int(part.sum()) ** 2 for part in parts], "stretches")


def ratio(numerators: Any, denominators: Any, squares: Any) -> Estimate:
    """sum(numerators) / sum(denominators) over G independent clusters, all (G,), and its jackknifed error.

    squares: in proportion to the clusters' variances, as far as these are known; used for the degrees of freedom only.
    The jackknife leaves out a cluster at a time (linearised: Cochran, "Sampling Techniques", 1977, section 6.17), so
    that a cluster that is a large part of the text counts for what it weighs. Its degrees are Satterthwaite's,
    2 E(v)^2 / Var(v) of the variance v for normal residuals (Bell, McCaffrey, Survey Methodology 28, 2002): G - 1 for
    equal clusters, fewer where some are larger.
    """
    numerators, denominators = (np.asarray(each, dtype=np.float64) for each in (numerators, denominators))
    whole, count = denominators.sum(), len(denominators)
    value = float(numerators.sum() / whole)
    if count < 2 or (denominators >= whole).any():
        return Estimate(value, None, None)
    residuals = numerators - value * denominators
    weights = (count - 1) / count / (whole - denominators) ** 2
    return Estimate(
        value, float(np.sqrt((weights * residuals**2).sum())), _degrees(weights, denominators / whole, squares)
    )


def _degrees(weights: np.ndarray, shares: np.ndarray, variances: Any) -> float:
    """Degrees of sum(weights x residuals^2) for residuals s - h sum(s), s independent normal with these variances."""
    v = np.asarray(variances, dtype=np.float64)
    v, c, h = v / v.sum(), weights / weights.sum(), shares
    mean = (c * (v - 2 * h * v + h**2)).sum()
    a, b, d = (c * h**2).sum(), (c * h * v).sum(), (c * v**2).sum()
    square = (c**2 * (v**2 - 4 * h * v**2 + 2 * v * h**2)).sum() + a**2 + 2 * a * d - 4 * a * b + 2 * b**2
    return float(max(1.0, mean**2 / square))


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of independent values with its standard error."""
    return ratio(values, np.ones(len(values)), np.ones(len(values)))
