"""Scaling laws by approach 3 of Hoffmann et al. (arXiv:2203.15556): L(N, D) = E + A / N^a + B / D^b.

N non-embedding parameters, D training tokens, L nats per token, C training FLOPs, C = k N D with k = 6 by the 6 N D
rule. A family is fitted by itself, from points of one experiment (studies/scaling/points.py). Approach 2, the isoFLOP
parabolas, is in studies/scaling/isoflop.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import numpy as np
from scipy.optimize import OptimizeResult, minimize, nnls
from threadpoolctl import threadpool_limits

PARAMETERS = ("E", "A", "B", "a", "b")
HUBER_DELTA = 1e-3  # of log L: residuals above it count linearly (arXiv:2203.15556, Appendix D.3)
# Exponents of the grid of starts; each pair starts from its own non-negative least squares for E, A and B.
START_EXPONENTS = tuple(np.arange(0.1, 1.2, 0.15))
EXPONENTS = (0.01, 3.0)  # range of a and b
FLOOR_SHARE = 0.01  # E is kept above this share of the lowest loss: E = 0 has no logarithm
TERM_FLOOR = 1e-6  # nats: a term below it at the centre of the points is not there
MIN_FOR_INTERVALS = 2 * len(PARAMETERS)  # points; below, resampled points hardly determine five parameters
SAME_OPTIMUM = 1e-3  # relative distance of objectives that counts as the same optimum
FLAT = 1e-5  # singular value over the largest, below which the points do not see a direction of the parameters
LEVELS = (0.025, 0.975)  # of a 95% interval


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b with C = k N D. Fields are floats, or arrays of equal shape for many laws."""

    E: Any
    A: Any
    B: Any
    a: Any
    b: Any
    k: float = 6.0

    @classmethod
    def of(cls, values: Any, k: float) -> "Law":
        """The law of (E, A, B, a, b), or the laws of rows of them, (R, 5)."""
        floor, of_size, of_tokens, a, b = np.asarray(values, dtype=float).T
        return cls(floor, of_size, of_tokens, a, b, k)

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Nats per token of N parameters trained on D tokens; infinite for N or D of 0."""
        with np.errstate(divide="ignore"):
            return self.E + self.A * parameters**-self.a + self.B * tokens**-self.b

    @property
    def exponents(self) -> tuple[Any, Any]:
        """The powers of C in the optimal N and D: b / (a + b) and a / (a + b)."""
        return self.b / (self.a + self.b), self.a / (self.a + self.b)

    def allocate(self, flops: Any) -> tuple[Any, Any]:
        """(N, D) of the lowest loss at C = k N D: N = G (C/k)^(b/(a+b)), D = (C/k)^(a/(a+b)) / G.

        G = (a A / (b B))^(1/(a+b)) (arXiv:2203.15556, equation 4). A law that its points do not identify can put N at
        0 and D at infinity, or the other way round.
        """
        of_parameters, of_tokens = self.exponents
        ratio = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        with np.errstate(divide="ignore", over="ignore"):
            return ratio * (flops / self.k) ** of_parameters, (flops / self.k) ** of_tokens / ratio

    def frontier(self, flops: Any) -> Any:
        """The lowest loss at C: E + M C^(-ab/(a+b)), since both terms fall with the same power at the optimum."""
        return self.loss(*self.allocate(flops))

    def flops_for(self, loss: Any) -> Any:
        """C at which the frontier reaches a loss, infinity where E is at or above it. Inverse of `frontier`."""
        above = np.asarray(loss - self.E, dtype=float)
        power = self.a * self.b / (self.a + self.b)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            flops = ((self.frontier(1.0) - self.E) / above) ** (1 / power)
        found = np.where(above > 0, flops, np.inf)
        return found if found.ndim else float(found)


@dataclass
class LawFit:
    """A fitted law, with what says how far to trust it.

    replicates: (R, 5) float64, columns PARAMETERS, one row a bootstrap sample; R = 0 where there are no intervals.
    rms, largest: residuals of log L. starts_at_optimum: of `starts`, how many end in the optimum that was taken.
    notes: sentences about what these points do not identify.
    """

    law: Law
    replicates: np.ndarray
    objective: float
    rms: float
    largest: float
    starts: int
    starts_at_optimum: int
    notes: list[str] = field(default_factory=list)

    def resampled(self) -> Law:
        """The laws of all bootstrap samples at once, fields of shape (R,)."""
        return Law.of(self.replicates, self.law.k)

    def interval(self, of: Callable[[Law], Any]) -> list[float | None] | None:
        """95% percentile interval of a number computed from a law; None for an infinite end, None without samples."""
        return percentile_interval(of(self.resampled())) if len(self.replicates) else None


def percentile_interval(values: np.ndarray) -> list[float | None]:
    """2.5% and 97.5% points of the samples; None for an end that is infinite."""
    low, high = np.quantile(values, LEVELS, method="inverted_cdf")  # picks samples: infinite ones need no arithmetic
    return [float(end) if math.isfinite(end) else None for end in (low, high)]


class _Objective:
    """Huber loss of log L - log L(N, D), in units of HUBER_DELTA squared, and its gradient.

    The variables are x = (log E, log of the N term, log of the D term, a, b), the terms taken at the geometric mean of
    the points' N and D: there they hardly depend on the exponents, which keeps the problem well conditioned.
    log L(N, D) is the log-sum-exp of log E, log A - a log N and log B - b log D.
    """

    def __init__(self, parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray):
        log_n, log_d = np.log(parameters), np.log(tokens)
        self.centre = log_n.mean(), log_d.mean()
        self.n, self.d = log_n - self.centre[0], log_d - self.centre[1]
        self.log_loss = np.log(loss)
        low, high = loss.min(), loss.max()
        term = (math.log(TERM_FLOOR), math.log(10 * high))
        self.bounds = [(math.log(FLOOR_SHARE * low), math.log(high)), term, term, EXPONENTS, EXPONENTS]

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log L (n,) and its derivative by x (n, 5)."""
        terms = np.stack([np.full_like(self.n, x[0]), x[1] - x[3] * self.n, x[2] - x[4] * self.d])
        largest = terms.max(0)
        shares = np.exp(terms - largest)
        total = shares.sum(0)
        shares /= total
        slopes = np.stack([*shares, -shares[1] * self.n, -shares[2] * self.d], axis=1)
        return largest + np.log(total), slopes

    def __call__(self, x: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        predicted, slopes = self.predict(x)
        scaled = (predicted - self.log_loss) / HUBER_DELTA
        size = np.abs(scaled)
        value = weights @ np.where(size <= 1, 0.5 * scaled**2, size - 0.5)
        return float(value), (weights * np.clip(scaled, -1, 1) / HUBER_DELTA) @ slopes

    def minimise(self, start: np.ndarray, weights: np.ndarray) -> OptimizeResult:
        options = {"maxiter": 2000, "maxfun": 4000, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-8}
        return minimize(self, start, args=(weights,), jac=True, method="L-BFGS-B", bounds=self.bounds, options=options)

    def start(self, a: float, b: float) -> np.ndarray:
        """The least squares of the relative residuals in E, A, B >= 0, for given exponents."""
        loss = np.exp(self.log_loss)
        columns = np.stack([np.ones_like(loss), np.exp(-a * self.n), np.exp(-b * self.d)], axis=1)
        found, _ = nnls(columns / loss[:, None], np.ones_like(loss))
        lows, highs = np.array(self.bounds).T
        x = [*np.log(np.maximum(found, 1e-300)), a, b]
        return np.clip(x, lows, highs)

    def law_values(self, x: np.ndarray) -> np.ndarray:
        """E, A, B, a, b (..., 5) of x (..., 5)."""
        n, d = self.centre
        logs = np.stack([x[..., 0], x[..., 1] + x[..., 3] * n, x[..., 2] + x[..., 4] * d], axis=-1)
        return np.concatenate([np.exp(logs), x[..., 3:]], axis=-1)

    def at_edge(self, x: np.ndarray) -> np.ndarray:
        """Which of x (5,) are at an end of their range, past which the fit wanted to go."""
        lows, highs = np.array(self.bounds).T
        return np.minimum(x - lows, highs - x) < 1e-4 * (highs - lows)

    def edge_name(self, i: int, value: float) -> str:
        """In words, where the i-th of x is when it is at an edge."""
        low, high = self.bounds[i]
        if i >= 3:
            return f"{PARAMETERS[i]} is at {value:.2g}, an end of its range, {low:g} to {high:g}"
        return f"{PARAMETERS[i]} is at 0" if value - low < high - value else f"{PARAMETERS[i]} is at its largest"


def fit_law(
    parameters: Sequence[float] | np.ndarray,
    tokens: Sequence[float] | np.ndarray,
    loss: Sequence[float] | np.ndarray,
    *,
    k: float = 6.0,
    bootstrap: int = 1000,
    rng: np.random.Generator | None = None,
    start_exponents: Sequence[float] | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> LawFit:
    """Fit L(N, D) to points (n,) of N, D and L, with bootstrap intervals over the points.

    bootstrap: number of samples drawn from `rng`, each fitted from the optimum of all points. start_exponents: of a
    and b, every pair a start; None for START_EXPONENTS.
    Raises ValueError for fewer points than parameters.
    """
    sizes, data, losses = (np.asarray(each, dtype=float) for each in (parameters, tokens, loss))
    places = np.unique(np.stack([sizes, data]), axis=1, return_inverse=True)[1].ravel()
    distinct = len(set(places))
    if distinct < len(PARAMETERS):
        raise ValueError(
            f"L = E + A/N^a + B/D^b has {len(PARAMETERS)} parameters, and there are {distinct} runs of different N or "
            f"D; give at least {len(PARAMETERS)}, and {MIN_FOR_INTERVALS} for intervals"
        )
    objective = _Objective(sizes, data, losses)
    equal = np.ones_like(losses)
    samples = np.empty((bootstrap if distinct >= MIN_FOR_INTERVALS else 0, len(PARAMETERS)))
    # The matrices inside L-BFGS-B are tiny: BLAS threads, which wait for each other, take 20 times as long over them.
    with threadpool_limits(1, user_api="blas"):
        starts = [objective.start(a, b) for a, b in product(start_exponents or START_EXPONENTS, repeat=2)]
        ends = [objective.minimise(start, equal) for start in starts]
        best = min(ends, key=lambda end: end.fun)
        if len(samples):
            counts = resample(places, bootstrap, len(PARAMETERS) + 1, rng or np.random.default_rng(0))
            for i, weights in enumerate(counts):
                samples[i] = objective.minimise(best.x, weights).x
                progress(i + 1, bootstrap)
    same = sum(end.fun <= best.fun * (1 + SAME_OPTIMUM) + 1e-9 for end in ends)
    too_few = [f"no intervals: they need {MIN_FOR_INTERVALS} runs of different N or D, and there are {distinct}"]
    residuals = objective.predict(best.x)[0] - objective.log_loss
    return LawFit(
        law=Law.of(objective.law_values(best.x), k),
        replicates=objective.law_values(samples),
        objective=float(best.fun * HUBER_DELTA**2),
        rms=float(np.sqrt(np.mean(residuals**2))),
        largest=float(np.abs(residuals).max()),
        starts=len(ends),
        starts_at_optimum=same,
        notes=_notes(objective, best.x, samples) + (too_few if bootstrap > len(samples) else []),
    )


def resample(places: np.ndarray, count: int, distinct: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap weights (count, n): how often each of n points is drawn, n draws a sample.

    places (n,) integers, equal where points say nothing new (the same N and D); at least `distinct` different ones.
    A sample with fewer than `distinct` places cannot determine a fit and is drawn again.
    """
    total, kinds = len(places), np.eye(places.max() + 1)[places]  # (n, places)
    weights = np.zeros((count, total))
    left = np.arange(count)
    while len(left):
        drawn = rng.integers(0, total, (len(left), total)) + total * np.arange(len(left))[:, None]
        weights[left] = np.bincount(drawn.ravel(), minlength=len(left) * total).reshape(-1, total)
        left = left[((weights[left] @ kinds) > 0).sum(1) < distinct]
    return weights


def _notes(objective: _Objective, x: np.ndarray, samples: np.ndarray) -> list[str]:
    """What these points do not identify, in sentences."""
    edges = objective.at_edge(x)
    notes = [f"{objective.edge_name(int(i), x[i])}: not identified by these points" for i in np.flatnonzero(edges)]
    _, sizes, directions = np.linalg.svd(objective.predict(x)[1])
    flat = directions[: len(sizes)][sizes < FLAT * sizes[0]]
    if len(flat):
        names = [PARAMETERS[i] for i in np.flatnonzero((np.abs(flat) > 0.05).any(0))]
        notes.append(
            f"{', '.join(names)} can change together and leave every prediction at these points as it is: not "
            f"identified by these points; add other sizes and token counts"
        )
    if len(samples):
        reached = np.array([objective.at_edge(each) for each in samples])  # (R, 5)
        for i in np.flatnonzero((reached.mean(0) > LEVELS[0]) & ~edges):
            where = objective.edge_name(int(i), float(np.median(samples[reached[:, i], i])))
            notes.append(
                f"the interval of {PARAMETERS[i]} reaches an end of its range ({where} in {reached[:, i].mean():.0%} "
                f"of the samples): not identified by these points"
            )
    return notes


class Frontier(Protocol):
    """The lowest loss against FLOPs: a `Law`, or a power law of approach 2."""

    def frontier(self, flops: Any) -> Any: ...

    def flops_for(self, loss: Any) -> Any: ...


def efficiency(
    curve: Frontier, other: Frontier, flops: float, samples: tuple[Frontier, Frontier] | None = None
) -> dict[str, Any]:
    """How many times more FLOPs the frontier `other` needs to reach the loss of the frontier `curve` at `flops`.

    samples: both with bootstrap samples in their fields, independent and paired by their order, for the interval.
    A factor, its end or flops_of_other is None where it is infinite: the loss is at or below E of `other`.
    """
    loss = float(curve.frontier(flops))
    needed = float(other.flops_for(loss))
    finite = math.isfinite(needed)
    interval = None
    if samples is not None:
        interval = percentile_interval(samples[1].flops_for(samples[0].frontier(flops)) / flops)
    return {
        "factor": needed / flops if finite else None,
        "factor_interval_95": interval,
        "loss": loss,
        "flops_of_other": needed if finite else None,
    }
