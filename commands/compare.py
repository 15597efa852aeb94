"""`prime-v2 compare`: families of models, budgets and sizes side by side, each run trained alike (docs/compare.md)."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prime_v2.commands.options import FOLDER, MANY, Json, Output

if TYPE_CHECKING:
    from prime_v2.studies.compare.config import Comparison
    from prime_v2.studies.compare.plan import PlannedRun

SUMMARY = "summary.json"  # the record in the output folder


def compare(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML file, or a recipe of configs/compare/, e.g. families.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the runs.", show_default="runs/compare/CONFIG", callback=FOLDER),
    ] = None,
    runs: Annotated[
        list[str] | None, typer.Option("--run", metavar="NAME", help="Only the runs of this name. May be repeated.")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", metavar="SIZE", help="Only those of this size. May be repeated.")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", help="Only those of this seed. May be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print runs, sizes, FLOPs and the time they will take; train nothing.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, max=MANY, metavar="N", help="Runs at once, which share the threads.")
    ] = 1,
    launcher: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help='What starts a run, e.g. "accelerate launch --num_processes 8".',
            show_default="this Python",
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models/--drop-models", help="Whether the weights of finished runs stay.")
    ] = True,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Compare runs of different code versions all the same.")
    ] = False,
    recorded: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A record of CONFIG, or of part of its runs: these are taken from it, not trained. May be repeated.",
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Train families of models at equal FLOPs and compare them.

    Every run of CONFIG is trained, and their bounds are set side by side, with paired differences.

    \b
    prime-v2 compare families --dry-run
    prime-v2 compare families --output results/compare_families.json
    prime-v2 compare study_1e13 --run MDM --run ARM --shape 64x2 --seed 0
    prime-v2 compare mine.yaml --launcher "accelerate launch --num_processes 8"

    The same command continues where it was stopped. --run, --shape and --seed train a part, with the steps, text and
    noise of the whole, and print its tables; the whole continues from it. --recorded takes runs from a record of
    another machine. Tables, figures and a record of the whole are written to DIR.
    """
    from prime_v2.output.progress import quiet_libraries
    from prime_v2.output.records import code_version
    from prime_v2.studies.compare.children import Stopped
    from prime_v2.studies.compare.config import read_comparison
    from prime_v2.studies.compare.plan import plan, with_times_of_records
    from prime_v2.studies.compare.recorded import read_recorded
    from prime_v2.studies.compare.run import Running, check_out, named_runs, run_comparison
    from prime_v2.studies.compare.search import number_done, number_of_runs
    from prime_v2.studies.compare.selection import selected

    quiet_libraries()
    whole, code = read_comparison(config), code_version()
    comparison = selected(whole, runs or [], shapes or [], seeds or [])
    folder = out or Path("runs") / "compare" / comparison.name
    taken = [(run, record) for run, record in read_recorded(recorded or [], whole) if run in comparison.runs]
    if dry_run:
        if output is not None:
            raise ValueError("--output needs results, which --dry-run makes none of; leave one of them out")
        check_out(folder, comparison)
        named = named_runs(comparison, folder, taken)
        planned = with_times_of_records(plan(named, folder, measure=True, recorded=taken))
        _print_plan(
            comparison,
            planned,
            number_of_runs(comparison) - len(named.runs),
            sum(run in named.runs for run, _ in taken),
            as_json,
        )
        return
    try:
        trained = run_comparison(comparison, folder, Running(launcher, jobs, keep_models, allow_mixed), taken)
    except Stopped as stopped:
        done = {run for run, _ in taken}
        done |= {run for run in comparison.runs if (folder / run.folder / "results" / "train.json").exists()}
        print(
            f"{stopped}; {number_done(comparison, done)} of {number_of_runs(comparison)} runs are finished, the same "
            f"command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(128 + stopped.number) from None
    whole_folder = folder if comparison.runs == whole.runs else None
    _finish(comparison, trained, whole_folder, code, allow_mixed, as_json, output)


def _finish(
    comparison: "Comparison",
    trained: Any,
    folder: Path | None,
    code: dict[str, Any],
    allow_mixed: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Print the tables or JSON, record them at `output`, and write tables, figures and record into a folder, if any.

    folder: None of a part, which must not stand in the place of the whole.
    """
    from prime_v2.output.atomic import write_json
    from prime_v2.output.places import print_and_record
    from prime_v2.output.records import make_record
    from prime_v2.studies.compare.plots import plot_comparison
    from prime_v2.studies.compare.report import markdown_text, render, summarise

    results = summarise(comparison, trained, allow_mixed)
    record = make_record("compare", results, seed=results["seeds"][0], code=code)
    text = json.dumps(results, ensure_ascii=False, allow_nan=False) if as_json else render(results)
    print_and_record(text, output, lambda: record)
    if folder is None:
        return
    write_json(folder / SUMMARY, record)
    (folder / "README.md").write_text(f"# {comparison.name}\n\n{markdown_text(results)}", encoding="utf-8")
    figures = plot_comparison(results, folder)
    if not as_json:
        print(f"\n{folder}/: {SUMMARY}, README.md, {', '.join(each.name for each in figures)}")


def _print_plan(
    comparison: "Comparison", planned: "list[PlannedRun]", later: int, recorded: int, as_json: bool
) -> None:
    """The runs with what they cost and where they are.

    later: how many follow at sizes that are not yet chosen; recorded: how many need no training.
    """
    from prime_v2.output.numbers import duration, quantity
    from prime_v2.output.tables import aligned
    from prime_v2.studies.compare.config import number
    from prime_v2.studies.compare.run import state_of

    rows: list[dict[str, Any]] = []
    for each in planned:
        state = state_of(each)
        rows.append(
            {
                "name": each.run.label,
                "shape": each.run.shape,
                "budget": each.run.budget,
                "seed": each.run.seed,
                "parameters": each.cost.parameters,
                "parameters_non_embedding": each.cost.non_embedding,
                "tokens": each.tokens,
                "steps": each.steps,
                "flops_6nd": each.cost.flops("6nd") * each.tokens,
                "flops_measured": each.cost.flops("measured") * each.tokens,
                "seconds": each.seconds,
                "state": state,
            }
        )
    left = sum(row["seconds"] for row in rows if row["state"] != "finished")
    if as_json:
        found = {
            "count": comparison.count,
            "runs": rows,
            "runs_later": later,
            "runs_recorded": recorded,
            "seconds_left": left,
        }
        print(json.dumps(found, allow_nan=False))
        return
    heads = ["run", "size", "budget", "seed", "N", "D", "steps", "FLOPs, 6ND", "measured", "time", "state"]
    lines = [
        [
            row["name"],
            row["shape"] or "–",
            number(row["budget"]),
            str(row["seed"]),
            quantity(row["parameters_non_embedding"]),
            quantity(row["tokens"]),
            f"{row['steps']:,}",
            f"{row['flops_6nd']:.2e}",
            f"{row['flops_measured']:.2e}",
            duration(row["seconds"]),
            row["state"],
        ]
        for row in rows
    ]
    print(aligned([heads, *lines]))
    print(f"\n{len(rows)} runs, about {duration(left)} left, one after the other on this machine as busy as it is now")
    if recorded:
        print(f"{recorded} more runs are taken from a record")
    if later:
        print(
            f"{later} more follow: the other seeds, at the size of each run that is best at seed "
            f"{comparison.search_seed}"
        )
