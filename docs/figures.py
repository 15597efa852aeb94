"""The figures of the pages, drawn from the records in results/.

    python -m docs.figures                  # draw all anew
    python -m docs.figures quality.png      # one of them

`tests/docs/test_figures.py` holds each to what its record gives today.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from docs import granularity, paper_loss
from prime_v2.output.records import read_record
from prime_v2.studies.analysis.plots import plot_attention, plot_spectra
from prime_v2.studies.compare.plots import plot_bounds, plot_sizes
from prime_v2.studies.quality.plots import plot_quality
from prime_v2.studies.scaling.families import choose_families
from prime_v2.studies.scaling.fit_records import read_fits
from prime_v2.studies.scaling.plots import plot_families
from prime_v2.studies.scaling.points import PUBLISHED, read_points

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


class Figure(NamedTuple):
    """record: the name of a file of results/; draw(its path, where the PNG goes)."""

    record: str
    draw: Callable[[Path, Path], Any]


def _from_results(draw: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path, Path], Any]:
    return lambda record, path: draw(read_record(record)["results"], path)


def _published(record: Path, path: Path) -> None:
    """The fits of the record over the points that they were made of."""
    fits, results = read_fits(record, []), read_record(record)["results"]
    points, _ = choose_families(read_points([PUBLISHED], loss=results["loss"], count=results["count"]), list(fits))
    plot_families([(fit, points[name]) for name, fit in fits.items()], path)


FIGURES = {
    "analysis_attention.png": Figure("analysis_tiny", _from_results(plot_attention)),
    "analysis_spectra.png": Figure("analysis_tiny", _from_results(plot_spectra)),
    "compare_isoflop.png": Figure("compare_isoflop", _from_results(plot_sizes)),
    "findings_granularity.png": Figure("compare_granularity", _from_results(granularity.draw)),
    "findings_sizes.png": Figure("compare_study_1e12", _from_results(plot_sizes)),
    "findings_sizes_1e13.png": Figure("compare_study_1e13", _from_results(plot_sizes)),
    "findings_winners.png": Figure("compare_winners", _from_results(plot_bounds)),
    "paper_loss.png": Figure("paper_loss", _from_results(paper_loss.draw)),
    "quality.png": Figure("quality", _from_results(plot_quality)),
    "quality_samplers.png": Figure("quality_samplers", _from_results(plot_quality)),
    "scaling_published.png": Figure("scaling_published", _published),
}


def draw(name: str, folder: Path) -> Path:
    """Draw a figure of `FIGURES` in the folder, in place of one that is there; returns its path."""
    figure = FIGURES[name]
    figure.draw(RESULTS / f"{figure.record}.json", folder / name)
    return folder / name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default; {', '.join(FIGURES)}")
    names = parser.parse_args(arguments).names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"{name} is no figure of a record; use one of {', '.join(FIGURES)}")
    for name in names:
        print(f"figure: {draw(name, ROOT / 'docs')}")


if __name__ == "__main__":
    main()
