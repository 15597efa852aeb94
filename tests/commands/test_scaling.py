"""`prime-v2 scaling`: what it prints and writes, its refusals, its figures, and the tables of docs/scaling.md."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import typer
from command_runs import of_command
from matplotlib.figure import Figure

from docs.tables.scaling import TABLES
from prime_v2.commands.base import Group
from prime_v2.commands.scaling import scaling_app
from prime_v2.output.records import read_record
from prime_v2.studies.scaling import fit as scaling
from prime_v2.studies.scaling.fit import Law
from prime_v2.studies.scaling.points import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
LAWS = {"ARM": Law(1.7, 400.0, 2000.0, 0.34, 0.37), "MDM": Law(2.0, 500.0, 2500.0, 0.33, 0.36)}

app = typer.Typer(cls=Group, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(scaling_app)


@app.callback()
def top() -> None:
    """A command with sub-commands, as prime-v2 is."""


@pytest.fixture(autouse=True)
def few_starts(monkeypatch):
    monkeypatch.setattr(scaling, "START_EXPONENTS", (0.25, 0.45))


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> Path:
    """Points of two laws with noise of 0.2%, and of a third family whose loss is no bound."""
    rng = np.random.default_rng(0)
    lines = [",".join([*COLUMNS, "stderr"])]
    for family, law in (*LAWS.items(), ("Prime", LAWS["ARM"])):
        for flops in np.geomspace(3e18, 3e20, 4):
            for size in law.allocate(flops)[0] * np.geomspace(0.25, 4, 7):
                tokens = flops / (6 * size)
                loss = law.loss(size, tokens) * np.exp(rng.normal(0, 0.002))
                lines.append(f"{family},{flops},{size},{tokens},{loss},{family in LAWS},0.006")
    path = tmp_path_factory.mktemp("points") / "points.csv"
    path.write_text("\n".join(lines))
    return path


run, refused = of_command("scaling")


# ------------------------------------------------------------------------------------------------- fit


def test_fit_prints_both_approaches_and_what_it_leaves_out(points):
    done = run("fit", points, "--bootstrap", 10)
    assert done.exit_code == 0, done.output
    assert done.stderr == "Prime left out: its loss is not a bound; --family Prime fits it by itself\n"
    for family in LAWS:
        assert f"{family}: 28 points, 3e+18 to 3e+20 FLOPs" in done.stdout
    assert "95% intervals from 10 bootstrap samples" in done.stdout
    assert "4 of 4 starts end in this optimum" in done.stdout
    assert re.search(r"N\* ~ C\^0\.5\d\d +\[0\.\d\d\d, 0\.\d\d\d\]", done.stdout)
    assert re.search(r"L\* ~ C\^-0\.0\d{3} \[-0\.0\d{3}, -0\.0\d{3}\]", done.stdout)
    assert "Prime" not in done.stdout


def test_a_loss_that_is_no_bound_is_marked_wherever_it_is_printed(points):
    shown = run("fit", points, "--family", "prime", "--bootstrap", 0).stdout
    assert shown.startswith("Prime (not a bound): 28 points")
    assert "nats per token (not a bound)" in shown
    assert "loss (not a bound)" in shown
    plan = run("plan", points, "--family", "Prime", "--flops", "1e19", "--bootstrap", 0).stdout
    assert plan.startswith("Prime (not a bound) at 1e+19 FLOPs\n")
    results = json.loads(run("fit", points, "--family", "Prime", "--bootstrap", 0, "--json").stdout)
    assert results["families"]["Prime"]["label"] == "Prime (not a bound)"
    assert results["families"]["Prime"]["is_bound"] is False


def test_json_is_what_the_record_holds_and_the_seed_decides_it(points, tmp_path):
    output = tmp_path / "fit.json"
    first = run("fit", points, "--family", "MDM", "--bootstrap", 10, "--seed", 3, "--json", "--output", output)
    results = json.loads(first.stdout)
    record = read_record(output)
    assert (record["name"], record["seed"], record["results"]) == ("scaling_fit", 3, results)
    law = results["families"]["MDM"]["approach_3"]
    low, high = law["E"]["interval_95"]
    assert low < law["E"]["value"] < high
    assert len(law["replicates"]["E"].split()) == 10
    assert results["families"]["MDM"]["approach_2"]["power_laws"]["loss"]["exponent"] < 0
    again, other = (
        json.loads(run("fit", points, "--family", "MDM", "--bootstrap", 10, "--seed", seed, "--json").stdout)
        for seed in (3, 4)
    )
    assert again == results
    assert other["families"]["MDM"]["approach_3"]["E"]["value"] == law["E"]["value"]
    assert other["families"]["MDM"]["approach_3"]["E"]["interval_95"] != [low, high]


def test_an_approach_can_be_left_out(points):
    three = json.loads(run("fit", points, "--approach", 3, "--bootstrap", 0, "--json").stdout)["families"]["ARM"]
    two = json.loads(run("fit", points, "--approach", 2, "--bootstrap", 0, "--json").stdout)["families"]["ARM"]
    assert (three["approach_2"], two["approach_3"]) == (None, None)
    assert len(two["approach_2"]["budgets"]) == 4
    assert three["approach_3"]["E"]["interval_95"] is None


# ------------------------------------------------------------------------------------------------- plan, efficiency


def test_a_plan_from_a_record_is_that_of_the_points(points, tmp_path):
    fit = tmp_path / "fit.json"
    assert run("fit", points, "--bootstrap", 20, "--output", fit).exit_code == 0
    options = ["--flops", "1e19", "--family", "mdm"]
    direct = json.loads(run("plan", points, *options, "--bootstrap", 20, "--json").stdout)["plans"]
    kept = json.loads(run("plan", "--fit", fit, *options, "--json").stdout)["plans"]
    assert direct[0]["parameters"] == kept[0]["parameters"]
    np.testing.assert_allclose(direct[0]["loss_interval_95"], kept[0]["loss_interval_95"], rtol=1e-3)  # 5 digits kept
    assert direct[0]["shape"]["layers"] == kept[0]["shape"]["layers"]
    shown = run("plan", "--fit", fit, "--flops", "1e19", "--flops", "1e23", "--output", tmp_path / "plan.json").stdout
    assert shown.count("nearest published shape: ") == 4  # two families, two budgets
    assert shown.count("note: extrapolated: 1e+23 FLOPs is outside the points, 3e+18 to 3e+20") == 2
    assert read_record(tmp_path / "plan.json")["name"] == "scaling_plan"


def test_efficiency_shows_factors_and_extrapolation(points, tmp_path):
    output = tmp_path / "efficiency.json"
    done = run("efficiency", "ARM", "mdm", points, "--bootstrap", 20, "--output", output)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("times the FLOPs that MDM needs to reach the loss of ARM, ")
    rows = read_record(output)["results"]["rows"]
    assert [(round(row["flops"] / 3e18), row["approach"]) for row in rows] == [
        (1, 3), (1, 2), (10, 3), (10, 2), (100, 3), (100, 2)
    ]  # fmt: skip
    for row in rows:
        expected = LAWS["MDM"].flops_for(LAWS["ARM"].frontier(row["flops"])) / row["flops"]
        if row["approach"] == 3 and row["flops"] < 1e20:  # noise of 0.2% in L moves distances from the floor by 2%
            assert row["factor"] == pytest.approx(expected, rel=0.25)
            assert row["factor_interval_95"][0] < row["factor"] < row["factor_interval_95"][1]
    assert "extrapolated: MDM at " in done.stdout
    given = json.loads(run("efficiency", "MDM", "ARM", points, "--flops", "1e20", "--bootstrap", 0, "--json").stdout)
    assert (given["family"], given["other"], {row["flops"] for row in given["rows"]}) == ("MDM", "ARM", {1e20})
    assert all(row["factor"] < 1 for row in given["rows"])


def test_an_infinite_factor_is_printed_as_such(points):
    shown = run("efficiency", "ARM", "MDM", points, "--flops", "1e26", "--bootstrap", 0).stdout
    assert re.search(r"1e\+26 +3 .* infinite", shown)


# ------------------------------------------------------------------------------------------------- plot


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure saved, which is still written."""
    saved, save = [], Figure.savefig

    def spy(figure, *arguments, **options):
        saved.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.get_title()]


def test_the_figure_has_three_panels_a_family(points, tmp_path, figures):
    path = tmp_path / "scaling.png"
    done = run("plot", points, "--figure", path, "--json")
    assert json.loads(done.stdout) == {"figure": str(path), "families": ["ARM", "MDM"]}
    assert path.read_bytes().startswith(b"\x89PNG")
    drawn = panels(figures[0])
    kinds = ("loss envelope", "isoFLOP curves", "isoloss contours")
    assert [axes.get_title() for axes in drawn] == [f"{family}: {kind}" for family in LAWS for kind in kinds]
    for envelope, isoflop, isoloss in (drawn[:3], drawn[3:]):
        assert envelope.get_ylabel() == isoflop.get_ylabel() == "nats per token"
        frontier = {line.get_label(): line for line in envelope.lines}["frontier, approach 3"]
        assert (np.diff(frontier.get_ydata()) < 0).all()
        budgets = [text.get_text() for text in isoflop.get_legend().get_texts()]
        assert budgets == ["3e+18", "1.39e+19", "6.46e+19", "3e+20"]
        labels = {line.get_label() for line in isoloss.lines}
        assert {"efficient frontier, approach 3", "isoFLOP minima", "points"} <= labels
        (bars,) = envelope.containers
        lengths = [np.diff(segment[:, 1])[0] for segment in bars[2][0].get_segments()]
        np.testing.assert_allclose(lengths, 2 * 1.959964 * 0.006, rtol=1e-6)


def test_the_frontier_in_the_figure_is_the_law(points, tmp_path, figures):
    run("plot", points, "--family", "ARM", "--figure", tmp_path / "a.svg")
    isoloss = panels(figures[0])[2]
    flops, sizes = {line.get_label(): line for line in isoloss.lines}["efficient frontier, approach 3"].get_data()
    np.testing.assert_allclose(sizes, LAWS["ARM"].allocate(np.asarray(flops))[0], rtol=0.3)
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")


def test_a_family_that_is_no_bound_is_marked_in_every_panel(points, tmp_path, figures):
    run("plot", points, "--family", "Prime", "--figure", tmp_path / "a.png")
    drawn = panels(figures[0])
    assert all(axes.get_title().startswith("Prime (not a bound): ") for axes in drawn)
    assert [axes.get_ylabel() for axes in drawn[:2]] == ["nats per token (not a bound)"] * 2


# ------------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_one_sentence_and_writes_nothing(points, tmp_path):
    output, figure = tmp_path / "new.json", tmp_path / "new.png"
    assert refused("fit", "gone.csv", "--output", output).startswith("gone.csv does not exist; give a record")
    assert "is not a bound on -log p and means nothing beside" in refused(
        "fit", points, "--family", "ARM", "--family", "Prime", "--output", output
    )
    assert refused("fit", points, "published", "--output", output).startswith(
        "the points differ in data order: source"
    )
    assert "there are no points of XYZ; there are ARM, MDM, Prime" in refused("fit", points, "--family", "XYZ")
    assert "'4' is not one of 'both', '2', '3'" in refused("fit", points, "--approach", 4)
    assert "Missing option '--flops'" in refused("plan", points)
    assert refused("plan", points, "--flops", 0, "--output", output) == (
        "--flops 0.0 must be a number above 0, such as 3e20"
    )
    assert refused("efficiency", "ARM", "arm", points) == "ARM and arm are one family; give two"
    for names in (("ARM", "Prime"), ("Prime", "MDM")):
        assert refused("efficiency", *names, points, "--output", output) == (
            "the loss of Prime is not a bound on -log p, so that no compute efficiency follows from it; give runs "
            "whose results.evaluation.bound is one"
        )
    assert "must end with .png or .pdf or .svg" in refused("plot", points, "--figure", tmp_path / "new.txt")
    assert "does not exist; make it first" in refused("plot", points, "--figure", tmp_path / "no" / "new.png")
    assert "is not a bound" in refused("plot", points, "--family", "Prime", "--family", "MDM", "--figure", figure)
    assert list(tmp_path.iterdir()) == []
    for path in (output, figure):
        path.touch()
    assert "new.json exists; give another name" in refused("fit", points, "--output", output)
    assert "new.png exists; give another name" in refused("plot", points, "--figure", figure)


def test_records_that_are_no_fits_are_refused(points, tmp_path):
    record = ROOT / "results" / "tiny.json"
    assert "is no record of prime-v2 scaling fit" in refused("plan", "--fit", record, "--flops", 1e19)
    fit = tmp_path / "fit.json"
    run("fit", points, "--bootstrap", 0, "--output", fit)
    assert refused("plan", points, "--fit", fit, "--flops", 1e19) == (
        "--fit and SOURCE both say what to use; leave one out"
    )
    assert "has no fit of Prime; it has ARM, MDM" in refused("efficiency", "ARM", "Prime", "--fit", fit)


@pytest.mark.parametrize(
    "given", [["--loss", "bound"], ["--count", "6nd"], ["--bootstrap", 7], ["--seed", 0], ["--allow-mixed"]]
)
def test_options_that_decide_fits_are_refused_beside_fits(given, points, tmp_path):
    fit = tmp_path / "fit.json"
    run("fit", points, "--bootstrap", 0, "--seed", 5, "--output", fit)
    for command in (["plan", "--flops", 1e19], ["efficiency", "ARM", "MDM"]):
        assert refused(*command, "--fit", fit, *given) == (
            f"{given[0]} is decided by the fits of --fit {fit}; leave {given[0]} out, or give points"
        )
    run("plan", "--flops", 1e19, "--fit", fit, "--output", tmp_path / "plan.json")
    assert read_record(tmp_path / "plan.json")["seed"] == 5


def test_the_tables_of_the_page_are_those_of_the_records():
    page = (ROOT / "docs" / "scaling.md").read_text()
    blocks = dict(re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end of table -->", page, re.DOTALL))
    assert set(blocks) == set(TABLES)
    for name, made in TABLES.items():
        assert blocks[name] == made(ROOT / "results"), name
    not_a_bound = [line for line in blocks["scaling_not_a_bound"].splitlines() if line.startswith("| MDM")]
    assert all(line.startswith("| MDM-Prime-v2 (not a bound) |") for line in not_a_bound)
    assert "Prime" not in blocks["scaling_law"] + blocks["scaling_minima"] + blocks["scaling_efficiency"]
