"""`prime-v2 scaling`: scaling laws of the published points and of one's own runs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prime_v2.commands.base import Command, new_app
from prime_v2.commands.options import MOST_DRAWS, NEW_FILE, Json, Output

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
    """Of Hoffmann et al., arXiv:2203.15556."""

    both = "both"
    isoflop = "2"
    parametric = "3"


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
    Loss, typer.Option("--loss", help="Of a record: its bound, or the paper's loss, which is no bound.")
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
    from prime_v2.studies.scaling.report import Selection, run_fit

    selection = Selection(
        source or [], family or [], loss.value, count.value, approach.value, bootstrap, seed, allow_mixed
    )
    run_fit(selection, as_json, output)


@scaling_app.command(cls=Command)
def plot(
    figure: Annotated[
        Path, typer.Option(metavar="FILE", help="New file for the figure: .png, .pdf or .svg.", callback=NEW_FILE)
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
    from prime_v2.studies.scaling.report import Selection, run_plot

    selection = Selection(source or [], family or [], loss.value, count.value, bootstrap=0, allow_mixed=allow_mixed)
    run_plot(selection, figure, as_json)


@scaling_app.command(cls=Command)
def plan(
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
    from prime_v2.studies.scaling.report import Selection, run_plan

    selection = Selection(
        source or [], family or [], loss.value, count.value, "both", bootstrap, seed, allow_mixed, fit
    )
    run_plan(selection, flops, as_json, output)


@scaling_app.command(cls=Command)
def efficiency(
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
    from prime_v2.studies.scaling.report import Selection, run_efficiency

    selection = Selection(source or [], [], loss.value, count.value, "both", bootstrap, seed, allow_mixed, fit)
    run_efficiency(selection, (family, other), flops or [], as_json, output)


__all__ = ["scaling_app"]
