"""A family's fits by both approaches, and what follows from them: plans, efficiencies."""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prime_v2.studies.scaling.fit import LawFit, efficiency, fit_law
from prime_v2.studies.scaling.isoflop import SAME_BUDGET, IsoFlop, PowerLaw, at_size, fit_isoflop
from prime_v2.studies.scaling.points import Point, Shape, check_one_experiment, read_shapes

SIX = 6.0  # C = 6 N D
NEAR_SIX = 0.01  # points within it of C = 6 N D follow the rule; published tokens are rounded
MISFIT = 0.01  # relative distance of the two approaches' lowest losses at a budget that is worth a note
ROUNDING = 1e-6  # of a log
NOT_A_BOUND = "not a bound"


@dataclass
class FamilyFit:
    """A family's fits. law or isoflop is None where that approach was not asked for or had too few points.

    flops, parameters, tokens: smallest and largest of the points. k: of C = k N D, with its range over the points.
    weights_per_layer: how N is counted (studies/scaling/points.py).
    """

    family: str
    is_bound: bool
    loss_name: str
    points: int
    sources: list[str]
    code: list[str]
    data_order: list[dict[str, str]]
    flops: tuple[float, float]
    parameters: tuple[float, float]
    tokens: tuple[float, float]
    k: float
    k_range: tuple[float, float]
    weights_per_layer: int
    law: LawFit | None
    isoflop: IsoFlop | None
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The family's name wherever it is printed or drawn."""
        return self.family if self.is_bound else f"{self.family} ({NOT_A_BOUND})"


def choose_families(points: Sequence[Point], asked: Sequence[str]) -> tuple[dict[str, list[Point]], list[str]]:
    """The points of each family to fit, and sentences about families that are left out.

    asked: names, in any case; none for all families whose loss is a bound, or the only family there is.
    Raises ValueError for an unknown name, a family that mixes bounds and other losses, and for families of both kinds
    in one request.
    """
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    chosen = named_families(asked, families, "there are no points of", "there are")
    kinds = {family: {point.is_bound for point in families[family]} for family in chosen}
    for family, kind in kinds.items():
        if len(kind) > 1:
            raise ValueError(f"{family} has points that are bounds and points that are not; fit only one kind")
    bounds = [family for family in chosen if kinds[family] == {True}]
    others = [family for family in chosen if family not in bounds]
    left_out = []
    if others and (bounds or len(others) > 1):
        if asked or not bounds:
            together = "is not a bound" if len(others) == 1 else "are not bounds"
            raise ValueError(
                f"the loss of {', '.join(others)} {together} on -log p and means nothing beside another family's; fit "
                f"it by itself, with --family {others[0]}"
            )
        left_out = [f"{each} left out: its loss is not a bound; --family {each} fits it by itself" for each in others]
        chosen = bounds
    return {family: families[family] for family in chosen}, left_out


def named_families(asked: Sequence[str], families: Iterable[str], lacks: str, has: str) -> list[str]:
    """The families that are asked for, in any case; none for all. lacks, has: words of the ValueError for others."""
    names = {family.casefold(): family for family in families}
    for each in asked:
        if each.casefold() not in names:
            raise ValueError(f"{lacks} {each}; {has} {', '.join(names.values())}")
    return [names[each.casefold()] for each in dict.fromkeys(asked)] or list(names.values())


def fit_families(
    points: Sequence[Point],
    families: Sequence[str] = (),
    *,
    approaches: Sequence[int] = (2, 3),
    bootstrap: int = 1000,
    seed: int = 0,
    allow_mixed: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> tuple[dict[str, FamilyFit], list[str]]:
    """Fit each family (see `choose_families`), and the sentences about those left out.

    seed: of the bootstrap; each family and approach has its own stream, so that families are resampled independently.
    Raises ValueError for points of several experiments, unless `allow_mixed`.
    """
    chosen, left_out = choose_families(points, families)
    if not allow_mixed:
        check_one_experiment(point for group in chosen.values() for point in group)
    total = bootstrap * len(chosen)
    found = {}
    for i, (family, group) in enumerate(chosen.items()):
        begun = i * bootstrap

        def show(done: int, of: int | None, begun: int = begun) -> None:
            progress(begun + done, total)

        try:
            found[family] = _fit_family(family, group, approaches, bootstrap, seed, show)
        except ValueError as error:
            raise ValueError(f"{family}: {error}") from error
    return found, left_out


def _fit_family(
    family: str,
    points: list[Point],
    approaches: Sequence[int],
    bootstrap: int,
    seed: int,
    progress: Callable[[int, int | None], None],
) -> FamilyFit:
    flops, parameters, tokens, loss = (
        np.array([getattr(point, name) for point in points]) for name in ("flops", "parameters", "tokens", "loss")
    )
    per_product = flops / (parameters * tokens)
    k_range = float(per_product.min()), float(per_product.max())
    follows = max(abs(end / SIX - 1) for end in k_range) <= NEAR_SIX
    k = SIX if follows else float(np.exp(np.log(per_product).mean()))
    streams = [np.random.default_rng([seed, zlib.crc32(family.encode()), approach]) for approach in (2, 3)]
    law, isoflop, notes = None, None, []
    if 3 in approaches:
        law = fit_law(parameters, tokens, loss, k=k, bootstrap=bootstrap, rng=streams[1], progress=progress)
    if 2 in approaches:
        try:
            isoflop = fit_isoflop(
                flops, parameters, loss, k=k if follows else per_product, bootstrap=bootstrap, rng=streams[0]
            )
        except ValueError as error:
            if law is None:
                raise
            notes.append(f"approach 2 left out: {error}")
    weights = {point.weights_per_layer for point in points}
    if len(weights) > 1:
        notes.append("the points count parameters in two ways, 12 and 16 weights a layer in units of hidden_size^2")
    if not follows:
        notes.append(
            f"C = {k:.3g} N D in approach 3 and plans, the mean over the points ({k_range[0]:.3g} to {k_range[1]:.3g})"
        )
    found = FamilyFit(
        family=family,
        is_bound=points[0].is_bound,
        loss_name=points[0].loss_name,
        points=len(points),
        sources=sorted({point.source for point in points}),
        code=sorted({point.code for point in points}),
        data_order=[dict(order) for order in sorted({point.data_order for point in points})],
        flops=(float(flops.min()), float(flops.max())),
        parameters=(float(parameters.min()), float(parameters.max())),
        tokens=(float(tokens.min()), float(tokens.max())),
        k=k,
        k_range=k_range,
        weights_per_layer=max(weights),
        law=law,
        isoflop=isoflop,
        notes=notes,
    )
    found.notes += _disagreements(found, flops, parameters, per_product)
    return found


def _disagreements(fit: FamilyFit, flops: np.ndarray, parameters: np.ndarray, per_product: np.ndarray) -> list[str]:
    """Budgets at which the two approaches differ: the form E + A/N^a + B/D^b then does not fit the points.

    flops, parameters, per_product: C, N and C / (N D) of the points (n,). Both approaches take C / (N D) as it is
    there.
    """
    notes: list[str] = []
    if fit.law is None or fit.isoflop is None:
        return notes
    for each in fit.isoflop.parabolas:
        if each.loss is None or each.parameters is None:
            continue
        there = np.abs(np.log(flops / each.flops)) <= SAME_BUDGET
        sizes = np.geomspace(min(each.range[0], each.parameters), max(each.range[1], each.parameters), 1000)
        tokens = each.flops / (at_size(sizes, parameters[there], per_product[there]) * sizes)
        frontier = float(fit.law.law.loss(sizes, tokens).min())
        if abs(frontier / each.loss - 1) > MISFIT:
            notes.append(
                f"at {each.flops:.3g} FLOPs the lowest loss of approach 3 is {frontier:.3f}, the isoFLOP minimum "
                f"{each.loss:.3f}: the form of approach 3 does not fit there"
            )
    return notes


def plan(fit: FamilyFit, flops: float) -> dict[str, Any]:
    """The best size and token count of a budget with the loss to expect, and the nearest published network."""
    if fit.law is None:
        raise ValueError(
            f"{fit.family} has no fit of approach 3, which a plan needs; fit it with --approach 3 or both"
        )
    law = fit.law
    size, tokens = (float(each) for each in law.law.allocate(flops))
    found: dict[str, Any] = {
        "family": fit.family,
        "label": fit.label,
        "is_bound": fit.is_bound,
        "flops": flops,
        "parameters": size,
        "parameters_interval_95": law.interval(lambda each: each.allocate(flops)[0]),
        "tokens": tokens,
        "tokens_interval_95": law.interval(lambda each: each.allocate(flops)[1]),
        "loss": float(law.law.frontier(flops)),
        "loss_interval_95": law.interval(lambda each: each.frontier(flops)),
        "isoflop": None,
        "shape": _nearest_shape(fit, flops, size),
        "notes": [*law.notes, *fit.notes],
    }
    if fit.isoflop and fit.isoflop.power_laws:
        found["isoflop"] = {
            name: {"value": float(each.at(flops)), "interval_95": each.interval(lambda one: one.at(flops))}
            for name, each in fit.isoflop.power_laws.items()
        }
    for name, value, ends, within in (
        (f"{flops:.3g} FLOPs", flops, fit.flops, SAME_BUDGET),
        (f"N* = {size:.3g}", size, fit.parameters, ROUNDING),
        (f"D* = {tokens:.3g}", tokens, fit.tokens, ROUNDING),
    ):
        if not inside(value, ends, within):
            found["notes"].append(f"extrapolated: {name} is outside the points, {ends[0]:.3g} to {ends[1]:.3g}")
    return found


def inside(value: float, ends: tuple[float, float], within: float) -> bool:
    """Whether a value lies in a range, or beyond an end of it by no more than `within` in the log."""
    return ends[0] * math.exp(-within) <= value <= ends[1] * math.exp(within)


def _nearest_shape(fit: FamilyFit, flops: float, parameters: float) -> dict[str, Any]:
    """The published network whose size is nearest, of the family if it has any, with what the budget gives it."""
    shapes = read_shapes()
    own = [shape for shape in shapes if shape.family == fit.family] or shapes

    def distance(shape: Shape) -> float:
        return abs(math.log(shape.parameters(fit.weights_per_layer) / parameters))

    nearest = min(own, key=distance)
    size = nearest.parameters(fit.weights_per_layer)
    tokens = flops / (fit.k * size)
    assert fit.law is not None
    return {
        "parameters": size,
        "weights_per_layer": fit.weights_per_layer,
        "layers": nearest.layers,
        "hidden_size": nearest.hidden,
        "heads": nearest.heads,
        "intermediate_size": nearest.ffn,
        "tokens": tokens,
        "batch_sequences": nearest.batch,
        "sequence_length": nearest.sequence_length,
        "steps": math.ceil(tokens / (nearest.batch * nearest.sequence_length)),
        "loss": float(fit.law.law.loss(size, tokens)),
        "loss_interval_95": fit.law.interval(lambda each: each.loss(size, tokens)),
    }


def require_bounds(families: Iterable[tuple[str, bool]]) -> None:
    """ValueError for a (family, is_bound) that is none: a frontier of another loss says nothing about a bound's."""
    for family, is_bound in families:
        if not is_bound:
            raise ValueError(
                f"the loss of {family} is not a bound on -log p, so that no compute efficiency follows from it; give "
                f"runs whose results.evaluation.bound is one"
            )


def compare(fits: dict[str, FamilyFit], names: tuple[str, str], budgets: Iterable[float]) -> list[dict[str, Any]]:
    """Rows of `efficiency` of names[0] over names[1], one a budget and approach.

    Raises ValueError unless the losses of both families are bounds.
    """
    first, second = (fits[name] for name in names)
    require_bounds((fit.family, fit.is_bound) for fit in (first, second))
    rows = []
    for flops in budgets:
        for approach, curves in _frontiers(first, second):
            row = {"flops": flops, "approach": approach, **efficiency(*curves[:2], flops, curves[2])}
            needed = row["flops_of_other"]
            outside = [
                f"{name} at {value:.3g} FLOPs"
                for name, value, fit in ((names[0], flops, first), (names[1], needed, second))
                if value is not None and not inside(value, fit.flops, SAME_BUDGET)
            ]
            rows.append({**row, "extrapolated": outside})
    if not rows:
        raise ValueError(f"{names[0]} and {names[1]} have no approach in common; fit both with the same --approach")
    return rows


def _frontiers(first: FamilyFit, second: FamilyFit) -> list[tuple[int, tuple[Any, Any, Any]]]:
    """(approach, (frontier, other frontier, both with bootstrap samples or None)) for what both families have."""
    found: list[tuple[int, tuple[Any, Any, Any]]] = []
    if first.law and second.law:
        found.append((3, (first.law.law, second.law.law, _pair(first.law, second.law))))
    if first.isoflop and second.isoflop:
        line, other = (fit.isoflop.power_laws.get("loss") for fit in (first, second))
        if line and other:
            found.append((2, (line, other, _pair(line, other))))
    return found


def _pair(one: LawFit | PowerLaw, two: LawFit | PowerLaw) -> tuple[Any, Any] | None:
    """Both with as many bootstrap samples as both have; None without any."""
    count = min(len(one.replicates), len(two.replicates))
    if not count:
        return None
    first, second = (replace(each, replicates=each.replicates[:count]).resampled() for each in (one, two))
    return first, second


def common_budgets(first: FamilyFit, second: FamilyFit) -> list[float]:
    """The ends and the geometric middle of the FLOPs that both families have points at."""
    low, high = max(first.flops[0], second.flops[0]), min(first.flops[1], second.flops[1])
    if low > high:
        raise ValueError(f"{first.family} and {second.family} have no budget in common; give one with --flops")
    return [low, math.sqrt(low * high), high] if high > low else [low]
