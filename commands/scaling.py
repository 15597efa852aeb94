"""`prime-v2 scaling`: scaling laws of the published points and of one's own runs."""

import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prime_v2.commands.base import Command, finish, new_app
from prime_v2.commands.options import MOST_DRAWS, Json, Output, new_file
from prime_v2.output.progress import progress_bar
from prime_v2.output.records import code_version, read_record

if TYPE_CHECKING:
    from prime_v2.studies.scaling.families import FamilyFit
    from prime_v2.studies.scaling.points import Point

FIGURES = (".png", ".pdf", ".svg")
OF_FITS = ("loss", "count", "bootstrap", "seed", "allow_mixed")  # options that decide fits

scaling_app = new_app("scaling", "Fit and use scaling laws. Draw them, plan a run, compare families at equal loss.")


class Loss(StrEnum):
    """Which number of a record is its loss."""

    bound = "bound"
    paper_loss = "paper_loss"


class Count(StrEnum):
    """How the FLOPs of a record are counted."""

    six_n_d = "6nd"
    measured = "measured"


class Approach(StrEnum):
    """The approaches 2 and 3 of Hoffmann et al., arXiv:2203.15556."""

    both = "both"
    isoflop = "2"
    parametric = "3"


APPROACHES = {Approach.both: (2, 3), Approach.isoflop: (2,), Approach.parametric: (3,)}

SOURCE_HELP = (
    "Points: records of train.py or compare, folders of them, .csv files, or published, the points of "
    "arXiv:2603.16077 [default: published]."
)
Sources = Annotated[list[str] | None, typer.Argument(metavar="SOURCE", help=SOURCE_HELP, show_default=False)]
Family = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A family to fit; repeatable [default: all whose loss is a bound]."),
]
LossOption = Annotated[
    Loss, typer.Option("--loss", help="Which loss of a record: its bound, or the paper's loss, which is no bound.")
]
CountOption = Annotated[
    Count, typer.Option("--count", help="FLOPs of a record: by the rule 6 N D, or as train.py measured them.")
]
ApproachOption = Annotated[
    Approach, typer.Option("--approach", help="3 fits E + A/N^a + B/D^b, 2 a parabola in log N at each budget.")
]
Bootstrap = Annotated[
    int, typer.Option(min=0, max=MOST_DRAWS, metavar="N", help="Samples for the 95% intervals; 0 for none.")
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the samples.")]
AllowMixed = Annotated[
    bool, typer.Option("--allow-mixed", help="Fit runs of different code or data order together all the same.")
]
Fit = Annotated[Path | None, typer.Option("--fit", metavar="FILE", help="Use the fits of this record of scaling fit.")]


@scaling_app.command(cls=Command)
def fit(
    source: Sources = None,
    family: Family = None,
    loss: LossOption = Loss.bound,
    count: CountOption = Count.six_n_d,
    approach: ApproachOption = Approach.both,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    allow_mixed: AllowMixed = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Fit scaling laws to points.

    L(N, D) = E + A/N^a + B/D^b and the isoFLOP parabolas of each family, with 95% intervals.

    \b
    prime-v2 scaling fit                                     # the published points of ARM and MDM
    prime-v2 scaling fit --family MDM-Prime-v2               # its published training loss: not a bound, and marked so
    prime-v2 scaling fit runs/ --count measured --output fit.json

    A .csv file has one point a line under the header family,train_flops,nonembedding_params,train_tokens,
    loss_nats_per_token,is_bound[,stderr].
    """
    from prime_v2.studies.scaling.fit_records import to_json
    from prime_v2.studies.scaling.report import render_fit

    code = code_version()
    fits, left_out = _fits(source, family, loss, count, None, approach, bootstrap, seed, allow_mixed)
    results = {
        "loss": loss.value,
        "count": count.value,
        "bootstrap": bootstrap,
        "allow_mixed": allow_mixed,
        "left_out": left_out,
        "families": {name: to_json(each) for name, each in fits.items()},
    }
    _say(left_out, as_json)
    text = "\n\n".join(map(render_fit, fits.values()))
    finish("scaling_fit", results, lambda: text, as_json, output, seed=seed, code=code)


@scaling_app.command(cls=Command)
def plot(
    figure: Annotated[
        Path,
        typer.Option(metavar="FILE", help="New file for the figure: .png, .pdf or .svg.", callback=new_file(*FIGURES)),
    ],
    source: Sources = None,
    family: Family = None,
    loss: LossOption = Loss.bound,
    count: CountOption = Count.six_n_d,
    allow_mixed: AllowMixed = False,
    as_json: Json = False,
) -> None:
    """Draw loss envelope, isoFLOP curves and isoloss contours.

    For each family: the loss against FLOPs, the isoFLOP curves, and the isoloss contours with the frontier.
    """
    from prime_v2.studies.scaling.families import choose_families
    from prime_v2.studies.scaling.plots import plot_families

    fits, left_out = _fits(source, family, loss, count, allow_mixed=allow_mixed)
    points, _ = choose_families(_points(source, loss, count), family or [])
    plot_families([(fits[name], points[name]) for name in fits], figure)
    labels = [each.label for each in fits.values()]
    _say(left_out, as_json)
    print(
        json.dumps({"figure": str(figure), "families": labels}) if as_json else f"wrote {figure}: {', '.join(labels)}"
    )


@scaling_app.command(cls=Command)
def plan(
    context: typer.Context,
    flops: Annotated[list[float], typer.Option(metavar="C", help="Training FLOPs, e.g. 3e20; repeatable.")],
    source: Sources = None,
    fit: Fit = None,
    family: Family = None,
    loss: LossOption = Loss.bound,
    count: CountOption = Count.six_n_d,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    allow_mixed: AllowMixed = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """The best size and token count of a budget.

    That is, those with the lowest loss, that loss, and the nearest published network.

    \b
    prime-v2 scaling plan --flops 3e20 --family MDM
    prime-v2 scaling plan --flops 1e17 --flops 1e18 --fit fit.json
    """
    from prime_v2.studies.scaling import families
    from prime_v2.studies.scaling.report import render_plan

    _check_budgets(flops)
    seed = _seed_beside(fit, context, seed)
    code = code_version()
    fits, left_out = _fits(source, family, loss, count, fit, Approach.both, bootstrap, seed, allow_mixed)
    plans = [families.plan(each, budget) for each in fits.values() for budget in flops]
    _say(left_out, as_json)
    text = "\n\n".join(map(render_plan, plans))
    results = {"left_out": left_out, "plans": plans}
    finish("scaling_plan", results, lambda: text, as_json, output, seed=seed, code=code)


@scaling_app.command(cls=Command)
def efficiency(
    context: typer.Context,
    family: Annotated[str, typer.Argument(metavar="A", help="Family whose loss is to be reached.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Family that is to reach it.")],
    source: Sources = None,
    flops: Annotated[
        list[float] | None,
        typer.Option(
            metavar="C", help="FLOPs of A; repeatable [default: the ends and the middle of what both have points at]."
        ),
    ] = None,
    fit: Fit = None,
    loss: LossOption = Loss.bound,
    count: CountOption = Count.six_n_d,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    allow_mixed: AllowMixed = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """FLOPs that one family needs for the loss of another.

    How many times more FLOPs the frontier of B needs to reach the loss of A's, by each approach. Bounds only.

    \b
    prime-v2 scaling efficiency ARM MDM --flops 3e19
    prime-v2 scaling efficiency MDM MDM-Prime runs/
    """
    from prime_v2.studies.scaling.families import common_budgets, compare, require_bounds
    from prime_v2.studies.scaling.report import render_efficiency

    _check_budgets(flops or [])
    if family.casefold() == other.casefold():
        raise ValueError(f"{family} and {other} are one family; give two")
    seed = _seed_beside(fit, context, seed)
    code = code_version()
    if fit is None:  # before the fits: which of them is a bound decides whether there is anything to do
        kinds = {point.family.casefold(): point.is_bound for point in _points(source, loss, count)}
        require_bounds((name, kinds.get(name.casefold(), True)) for name in (family, other))
    fits, _ = _fits(source, [family, other], loss, count, fit, Approach.both, bootstrap, seed, allow_mixed)
    first, second = fits
    rows = compare(fits, (first, second), flops or common_budgets(fits[first], fits[second]))
    results = {"family": first, "other": second, "rows": rows}
    finish("scaling_efficiency", results, lambda: render_efficiency(results), as_json, output, seed=seed, code=code)


def _points(source: list[str] | None, loss: Loss, count: Count) -> "list[Point]":
    from prime_v2.studies.scaling.points import PUBLISHED, read_points

    return read_points(source or [PUBLISHED], loss=loss.value, count=count.value)


def _fits(
    source: list[str] | None,
    families: list[str] | None,
    loss: Loss,
    count: Count,
    record: Path | None = None,
    approach: Approach = Approach.both,
    bootstrap: int = 0,
    seed: int = 0,
    allow_mixed: bool = False,
) -> "tuple[dict[str, FamilyFit], list[str]]":
    """The fits, made or read from a record of `scaling fit`, and sentences about families that are left out."""
    from prime_v2.studies.scaling.families import fit_families
    from prime_v2.studies.scaling.fit_records import read_fits

    if record is not None:
        if source:
            raise ValueError("--fit and SOURCE both say what to use; leave one out")
        return read_fits(record, families or []), []
    points = _points(source, loss, count)
    with progress_bar("bootstrap samples") as show:
        return fit_families(
            points,
            families or [],
            approaches=APPROACHES[approach],
            bootstrap=bootstrap,
            seed=seed,
            allow_mixed=allow_mixed,
            progress=show,
        )


def _seed_beside(record: Path | None, context: typer.Context, seed: int) -> int:
    """The seed of the fits that are used; ValueError for options that decide fits beside --fit, which has them."""
    if record is None:
        return seed
    for name in OF_FITS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is decided by the fits of --fit {record}; leave {option} out, or give points")
    return read_record(record).get("seed", seed)


def _check_budgets(budgets: list[float]) -> None:
    for each in budgets:
        if not (math.isfinite(each) and each > 0):
            raise ValueError(f"--flops {each} must be a number above 0, such as 3e20")


def _say(sentences: list[str], as_json: bool) -> None:
    """Sentences on stderr; JSON has them itself."""
    for each in () if as_json else sentences:
        print(each, file=sys.stderr)
