"""Scaling laws by approach 2 of Hoffmann et al. (arXiv:2203.15556): at each budget a parabola of the loss in log N.

Its minimum is the best size N* of that budget C, with D* = C / (k N*) and the loss L*; straight lines through log N*,
log D* and log L* against log C are the power laws. Nothing is assumed about the form of L(N, D). Where C / (N D)
differs from size to size (the head is more of the work in small models), k at N* is that of the sizes beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prime_v2.studies.scaling.fit import LEVELS, percentile_interval, resample

SAME_BUDGET = 0.1  # of log C: runs within it of the smallest of a budget are of that budget
MIN_SIZES = 3  # of a parabola
MIN_SIZES_FOR_INTERVALS = 7  # of fewer, samples are nearly interpolations: 95% intervals of four sizes cover 53%
REACH = 10.0  # how far outside its sizes, as a factor, a budget's minimum may lie
NO_SAMPLES = np.empty((0, 2))
POWER_LAWS = {"parameters": "N*", "tokens": "D*", "loss": "L*"}


@dataclass
class Parabola:
    """loss = c0 + c1 u + c2 u^2 with u = log(N / centre), at one budget, by least squares.

    parameters, tokens, loss: of its minimum; None where it has none (c2 <= 0) within REACH of the sizes. inside:
    whether that minimum lies within the sizes of the budget. Intervals are 95%, over resampled points, or None.
    """

    flops: float
    sizes: int
    range: tuple[float, float]
    centre: float
    coefficients: tuple[float, float, float]
    parameters: float | None
    tokens: float | None
    loss: float | None
    parameters_interval_95: list[float] | None = None
    tokens_interval_95: list[float] | None = None
    loss_interval_95: list[float] | None = None

    @property
    def inside(self) -> bool:
        return self.parameters is not None and self.range[0] <= self.parameters <= self.range[1]

    def at(self, parameters: np.ndarray) -> np.ndarray:
        """The loss of the parabola at N."""
        u = np.log(parameters / self.centre)
        c0, c1, c2 = self.coefficients
        return c0 + c1 * u + c2 * u**2


@dataclass
class PowerLaw:
    """value = exp(log_coefficient) C^exponent. Fields are floats, or arrays (R,) for many laws.

    replicates (R, 2): log_coefficient and exponent of bootstrap samples; R = 0 where there are no intervals.
    """

    log_coefficient: Any
    exponent: Any
    replicates: np.ndarray

    def at(self, flops: Any) -> Any:
        return np.exp(self.log_coefficient + self.exponent * np.log(flops))

    def interval(self, of: Callable[["PowerLaw"], Any]) -> list[float | None] | None:
        """95% percentile interval of a number computed from the law; None without samples."""
        return percentile_interval(of(self.resampled())) if len(self.replicates) else None

    def resampled(self) -> "PowerLaw":
        """The laws of all bootstrap samples at once, fields of shape (R,)."""
        log_coefficient, exponent = self.replicates.T
        return PowerLaw(log_coefficient, exponent, NO_SAMPLES)

    # The law of the loss is a frontier (studies/scaling/fit.py): it has no floor, and reaches every loss.
    frontier = at

    def flops_for(self, loss: Any) -> Any:
        """C at which the value is `loss`; infinity for a law that does not fall."""
        with np.errstate(divide="ignore", over="ignore"):
            flops = np.exp((np.log(loss) - self.log_coefficient) / self.exponent)
        return np.where(self.exponent < 0, flops, np.inf)


@dataclass
class IsoFlop:
    """The parabolas of a family and, by the keys of POWER_LAWS, the power laws through their minima (or none)."""

    parabolas: list[Parabola]
    power_laws: dict[str, PowerLaw]
    notes: list[str] = field(default_factory=list)


def group_budgets(flops: Sequence[float] | np.ndarray) -> list[np.ndarray]:
    """Places of the points (n,) of each budget, from the smallest budget to the largest."""
    values = np.log(np.asarray(flops, dtype=float))
    groups: list[list[int]] = []
    for i in np.argsort(values, kind="stable"):
        if groups and values[i] - values[groups[-1][0]] <= SAME_BUDGET:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    return [np.array(sorted(group)) for group in groups]


def fit_isoflop(
    flops: Sequence[float] | np.ndarray,
    parameters: Sequence[float] | np.ndarray,
    loss: Sequence[float] | np.ndarray,
    *,
    k: float | Sequence[float] | np.ndarray = 6.0,
    bootstrap: int = 1000,
    rng: np.random.Generator | None = None,
) -> IsoFlop:
    """Fit a parabola to each budget that has three sizes, and power laws through two minima or more.

    flops, parameters, loss (n,). k: C / (N D), of all points or of each (n,). bootstrap: samples drawn from `rng`,
    at each budget from its own points.
    Raises ValueError when no budget has three sizes.
    """
    budgets, sizes, losses = (np.asarray(each, dtype=float) for each in (flops, parameters, loss))
    per_product = np.broadcast_to(np.asarray(k, dtype=float), budgets.shape)
    rng = rng or np.random.default_rng(0)
    parabolas, samples, notes = [], [], []
    for group in group_budgets(budgets):
        budget = float(np.median(budgets[group]))
        distinct = len(set(sizes[group]))
        if distinct < MIN_SIZES:
            notes.append(f"{budget:.3g} FLOPs left out: {distinct} sizes, and a parabola needs {MIN_SIZES}")
            continue
        parabola, drawn = _fit_budget(budget, sizes[group], losses[group], per_product[group], bootstrap, rng)
        notes += _notes(parabola, drawn)
        if bootstrap and not len(drawn):
            few = f"{distinct} sizes, and they need {MIN_SIZES_FOR_INTERVALS}"
            notes.append(f"no intervals at {budget:.3g} FLOPs: {few}")
        parabolas.append(parabola)
        samples.append(drawn)
    if not parabolas:
        raise ValueError(
            f"no budget has {MIN_SIZES} sizes, which a parabola needs; train {MIN_SIZES} sizes at equal FLOPs (within "
            f"{SAME_BUDGET:.0%}), or fit only approach 3"
        )
    found = IsoFlop(parabolas, {}, notes)
    _fit_power_laws(found, samples)
    return found


def _fit_budget(
    flops: float, sizes: np.ndarray, losses: np.ndarray, k: np.ndarray, bootstrap: int, rng: np.random.Generator
) -> tuple[Parabola, np.ndarray]:
    """The parabola of one budget and the minima of its bootstrap samples: (R, 3) N*, D*, L*, nan where there is none.

    Without samples (too few sizes, or bootstrap 0) the minima are (0, 3).
    """
    centre = _centre(sizes)
    columns = np.vander(np.log(sizes / centre), 3, increasing=True)  # (n, 3)
    coefficients = np.linalg.lstsq(columns, losses, rcond=None)[0]
    minimum = _minima(coefficients[None], sizes, flops, k)[0]
    has_one = bool(np.isfinite(minimum[0]))
    parabola = Parabola(
        flops=flops,
        sizes=len(set(sizes)),
        range=(float(sizes.min()), float(sizes.max())),
        centre=centre,
        coefficients=(float(coefficients[0]), float(coefficients[1]), float(coefficients[2])),
        parameters=float(minimum[0]) if has_one else None,
        tokens=float(minimum[1]) if has_one else None,
        loss=float(minimum[2]) if has_one else None,
    )
    if not bootstrap or parabola.sizes < MIN_SIZES_FOR_INTERVALS:
        return parabola, np.empty((0, 3))
    places = np.unique(sizes, return_inverse=True)[1]
    weights = resample(places, bootstrap, MIN_SIZES, rng)  # (R, n)
    gram = np.einsum("rn,ni,nj->rij", weights, columns, columns)
    drawn = np.linalg.solve(gram, np.einsum("rn,ni,n->ri", weights, columns, losses)[..., None])[..., 0]
    minima = _minima(drawn, sizes, flops, k)
    if has_one and np.isnan(minima[:, 0]).mean() <= LEVELS[0]:
        for i, name in enumerate(POWER_LAWS):
            ends = np.nanquantile(minima[:, i], LEVELS)
            setattr(parabola, f"{name}_interval_95", [float(end) for end in ends])
    return parabola, minima


def _minima(coefficients: np.ndarray, sizes: np.ndarray, flops: float, k: np.ndarray) -> np.ndarray:
    """(R, 3) coefficients to (R, 3) N*, D*, L* of the minimum; nan where there is none within REACH of the sizes (n,).

    k (n,) of the points; at N* its log is interpolated in log N, outside the sizes it is that of the nearest.
    """
    c0, c1, c2 = coefficients.T
    centre = _centre(sizes)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        best = centre * np.exp(-c1 / (2 * c2))
        found = np.stack([best, flops / (at_size(best, sizes, k) * best), c0 - c1**2 / (4 * c2)], axis=1)
    near = (best >= sizes.min() / REACH) & (best <= sizes.max() * REACH) & (found[:, 2] > 0)
    return np.where((near & (c2 > 0))[:, None], found, np.nan)


def at_size(best: np.ndarray, sizes: np.ndarray, k: np.ndarray) -> np.ndarray:
    """k (n,) of the sizes (n,) to k at other sizes (R,); of points of one size the geometric mean."""
    distinct, places, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    mean = np.bincount(places, np.log(k)) / counts
    return np.exp(np.interp(np.log(best), np.log(distinct), mean))


def _centre(sizes: np.ndarray) -> float:
    return float(np.exp(np.log(sizes).mean()))


def _notes(parabola: Parabola, minima: np.ndarray) -> list[str]:
    name = f"the best size at {parabola.flops:.3g} FLOPs"
    if parabola.parameters is None:
        return [f"{name} is not identified by these points: the parabola has no minimum near the sizes"]
    notes = []
    if not parabola.inside:
        notes.append(
            f"{name} lies outside the sizes trained, {parabola.range[0]:.3g} to {parabola.range[1]:.3g}: extrapolated"
        )
    lost = np.isnan(minima[:, 0]).mean() if len(minima) else 0.0
    if lost > LEVELS[0]:
        notes.append(f"{name} is not identified by these points: no minimum in {lost:.0%} of the samples")
    return notes


def _fit_power_laws(found: IsoFlop, samples: list[np.ndarray]) -> None:
    """Least-squares lines through the logs of the minima that exist; no interval where a budget has no samples."""
    kept = [(each, drawn) for each, drawn in zip(found.parabolas, samples, strict=True) if each.parameters is not None]
    if len(kept) < 2:
        found.notes.append("no power laws: they need the minima of two budgets")
        return
    log_flops = np.log([each.flops for each, _ in kept])
    rows = max(len(drawn) for _, drawn in kept)
    for i, name in enumerate(POWER_LAWS):
        values = np.log([getattr(each, name) for each, _ in kept])
        exponent, start = np.polyfit(log_flops, values, 1)
        replicates = NO_SAMPLES
        if not all(len(each) for _, each in kept):
            if rows:
                found.notes.append(
                    f"no interval for the power law of {POWER_LAWS[name]}: a budget has fewer than "
                    f"{MIN_SIZES_FOR_INTERVALS} sizes"
                )
            found.power_laws[name] = PowerLaw(float(start), float(exponent), replicates)
            continue
        drawn = np.stack([np.log(each[:, i]) for _, each in kept])  # (budgets, R)
        drawn = drawn[:, np.isfinite(drawn).all(0)]
        if drawn.shape[1] and drawn.shape[1] >= (1 - LEVELS[0]) * rows:
            replicates = np.polyfit(log_flops, drawn, 1).T[:, ::-1]
        elif rows:
            found.notes.append(f"no interval for the power law of {POWER_LAWS[name]}: samples without a minimum")
        found.power_laws[name] = PowerLaw(float(start), float(exponent), replicates)
