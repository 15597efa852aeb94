"""Points of scaling laws, from records and files; and the published points against their file and docs/scaling.md."""

import json
from pathlib import Path

import numpy as np
import pytest
from scaling_laws import FEW_STARTS, LAW, grid, points_of, rows_of

from prime_v2.output.records import read_record
from prime_v2.studies.scaling import fit as scaling
from prime_v2.studies.scaling.families import compare, fit_families
from prime_v2.studies.scaling.fit import Law, fit_law
from prime_v2.studies.scaling.fit_records import from_json
from prime_v2.studies.scaling.points import (
    PUBLISHED_POINTS,
    PUBLISHED_RUNS,
    check_one_experiment,
    read_points,
    read_shapes,
)

ROOT = Path(__file__).resolve().parents[3]
HEADER = "family,train_flops,nonembedding_params,train_tokens,loss_nats_per_token,is_bound"
# Ranges that hold the fits of the published points, from results/scaling_published.json.
RECORDED = {"ARM": {"E": (2.0, 2.06), "a": (0.29, 0.32)}, "MDM": {"E": (2.4, 2.45), "a": (0.33, 0.36)}}


@pytest.fixture(autouse=True)
def few_starts(monkeypatch):
    monkeypatch.setattr(scaling, "START_EXPONENTS", FEW_STARTS)


# ------------------------------------------------------------------------------------------------- points


def test_the_published_points_are_read_with_what_is_a_bound():
    points = read_points(["published"])
    counts = {family: sum(point.family == family for point in points) for family in ("ARM", "MDM", "MDM-Prime-v2")}
    assert counts == {"ARM": 65, "MDM": 68, "MDM-Prime-v2": 62}
    assert {point.family for point in points if not point.is_bound} == {"MDM-Prime-v2"}
    assert {point.is_bound for point in points if point.family == "MDM-Prime-v2"} == {False}
    lowest = min((point for point in points if point.flops == 3e20), key=lambda each: (not each.is_bound, each.loss))
    assert (lowest.family, lowest.parameters, lowest.loss) == ("ARM", 1107e6, 2.619)
    np.testing.assert_allclose([6 * each.parameters * each.tokens / each.flops for each in points], 1, rtol=1e-3)


def test_published_shapes_have_the_sizes_they_are_named_by():
    named = [float(row["nonembedding_params_M"]) for row in rows_of(PUBLISHED_RUNS)]
    found = [shape.parameters(12) / 1e6 for shape in read_shapes()]
    np.testing.assert_allclose(found, named, rtol=0.035)  # "14M" has 14.45 million
    assert len(found) == 52


def test_records_are_points_with_their_valid_bound():
    (prime,) = read_points([str(ROOT / "results" / "tiny.json")])
    (mdm,) = read_points([str(ROOT / "results" / "tiny_mdm.json")])
    results = read_record(ROOT / "results" / "tiny.json")["results"]
    assert (prime.family, mdm.family) == ("MDM-Prime-v2", "MDM")
    assert (prime.loss, prime.stderr) == tuple(
        results["evaluation"]["bound"][key] for key in ("nats_per_token", "stderr")
    )
    assert (prime.is_bound, mdm.is_bound) == (True, True)
    assert (prime.flops, prime.parameters, prime.tokens) == (61882761216000, 3147520, 3276800)
    (measured,) = read_points([str(ROOT / "results" / "tiny.json")], count="measured")
    assert measured.flops == results["training"]["flops_measured"]
    for name, is_bound in (("tiny", False), ("tiny_mdm", True)):
        (point,) = read_points([str(ROOT / "results" / f"{name}.json")], loss="paper_loss")
        assert point.is_bound is is_bound
    assert dict(prime.data_order)["fingerprint of train"] == results["data"]["fingerprints"]["train"][:12]


def write_runs(folder: Path, law: Law = LAW, **results) -> Path:
    """A folder of records as train.py writes them, one run a point of `grid`."""
    base = read_record(ROOT / "results" / "tiny_mdm.json")
    for i, (n, d) in enumerate(zip(*grid(law), strict=True)):
        record = json.loads(json.dumps(base))
        record["results"]["training"] |= {"parameters_non_embedding": n, "tokens": d, "flops_6nd": 6 * n * d}
        record["results"]["training"]["flops_measured"] = 6.6 * n * d
        record["results"]["evaluation"]["bound"] |= {"nats_per_token": float(law.loss(n, d)), "stderr": 0.002}
        record["results"] |= results
        path = folder / f"run_{i}" / "results" / "train.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    return folder


def test_folders_are_searched_and_copies_counted_once(tmp_path):
    write_runs(tmp_path, family="ARM")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "copy.json").write_text((tmp_path / "run_0" / "results" / "train.json").read_text())
    points = read_points([str(tmp_path)])
    assert len(points) == 42
    assert {point.family for point in points} == {"ARM"}
    assert "run_1/results/train.json" in {point.source for point in points}
    found, _ = fit_families(read_points([str(tmp_path)], count="measured"), bootstrap=0)
    np.testing.assert_allclose(found["ARM"].k, 6.6)
    assert "C = 6.6 N D in approach 3 and plans, the mean over the points" in found["ARM"].notes[0]
    np.testing.assert_allclose(found["ARM"].law.law.frontier(6.6e19), LAW.frontier(6e19), rtol=1e-5)


def test_a_comparison_is_a_point_for_each_of_its_runs(tmp_path):
    """Two runs of one family with names of their own, as `prime-v2 compare` records them beside the runs."""
    write_runs(tmp_path, family="MDM-Prime-v2")
    rows = []
    for i, name in enumerate(("base 2", "base 16")):
        record = read_record(tmp_path / f"run_{i}" / "results" / "train.json")
        kept = {key: record[key] for key in ("command", "commit", "uncommitted_changes", "time_utc")}
        rows.append({"name": name, **kept, **record["results"]})
    comparison = tmp_path / "compare.json"
    comparison.write_text(json.dumps({**record, "name": "compare", "results": {"rows": rows}}))
    points = read_points([str(comparison)])
    assert [(point.family, point.source) for point in points] == [
        ("base 2", "compare.json, base 2"),
        ("base 16", "compare.json, base 16"),
    ]
    np.testing.assert_allclose(
        [point.loss for point in points], [LAW.loss(n, d) for n, d in zip(*grid(), strict=True)][:2]
    )
    together = read_points([str(tmp_path)])
    assert len(together) == 42
    assert [point.family for point in together[:3]] == ["base 2", "base 16", "MDM-Prime-v2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family,loss\nMDM,3\n", r"the header of .* lacks train_flops, nonembedding_params"),
        (f"{HEADER},colour\nMDM,1,1,1,1,true,red\n", r"the header of .* has colour, which nothing reads"),
        (
            f"# note\n{HEADER}\nMDM,1e18,1e8,1e9,three,true\n",
            r"line 3: loss_nats_per_token='three' must be a number",
        ),
        (f"{HEADER}\nMDM,1e18,1e8,1e9,-1,true\n", r"line 2: loss_nats_per_token='-1' must be"),
        (f"{HEADER}\nMDM,1e18,1e8,1e9,3,maybe\n", r"is_bound='maybe' must be true or false"),
        (f"{HEADER}\n,1e18,1e8,1e9,3,1\n", r"the family is empty; name it"),
        (f"{HEADER}\nMDM,1e18,1e8,1e9,3\n", r"line 2: 5 cells under a header of 6"),
        (f"{HEADER}\n", r"has a header and no points"),
        ("", r"is empty; its header must be family,"),
        (f"{HEADER}\n{'x' * 200_000},1,1,1,1,true\n", r"line 2 is no line of a CSV file of points: field larger than"),
    ],
)
def test_bad_csv_files_are_refused(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_points([str(path)])


def test_bad_records_are_refused(tmp_path):
    record = read_record(ROOT / "results" / "tiny.json")
    path = tmp_path / "run.json"

    def refused(message: str, **options) -> None:
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=message):
            read_points([str(path)], **options)

    with pytest.raises(ValueError, match=r"gone\.json does not exist; give a record of train\.py"):
        read_points([str(tmp_path / "gone.json")])
    with pytest.raises(ValueError, match="holds no record of a training run"):
        read_points([str(tmp_path)])
    with pytest.raises(ValueError, match="loss='ppl' must be one of bound, paper_loss"):
        read_points(["published"], loss="ppl")
    with pytest.raises(ValueError, match="count='12nd' must be one of 6nd, measured"):
        read_points(["published"], count="12nd")
    record["results"]["training"].pop("flops_measured")
    refused(r"flops_measured=None must be a number above 0", count="measured")
    record["results"]["config"].pop("base")
    refused("the config in run.json lacks base")
    record["results"]["config"]["model_type"] = "llama"
    refused("names no family and its model_type is 'llama'; add a name")
    record["results"]["evaluation"].pop("bound")
    refused(r"has no results\.evaluation\.bound that says whether it is a bound")
    record["results"].pop("training")
    refused("is no record of a training run; give one that train.py wrote")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        read_points([str(path)])


def test_runs_of_different_experiments_are_not_mixed(tmp_path):
    points = points_of(LAW)
    check_one_experiment(points)
    others = points_of(LAW, code="d")
    with pytest.raises(ValueError, match=r"2 versions of the code \(c, d\); give runs of one experiment, or add "):
        fit_families(points + others, bootstrap=0)
    others = points_of(LAW, data_order=(("seed", "1"),))
    with pytest.raises(ValueError, match=r"differ in data order: seed \(0 or 1\); give runs of one experiment"):
        fit_families(points + others, bootstrap=0)
    others = points_of(LAW, data_order=(("seed", "0"), ("block_size", "128")))
    with pytest.raises(ValueError, match=r"differ in data order: block_size \(128\)"):
        fit_families(points + others, bootstrap=0)
    found, _ = fit_families(points + others, bootstrap=0, allow_mixed=True)
    assert found["MDM"].points == 84
    csv_file = tmp_path / "own.csv"
    csv_file.write_text(f"{HEADER}\nMDM,1e18,1e8,1e9,3,1\n")
    with pytest.raises(ValueError, match=r"source \(own\.csv \(a CSV file\) or published\)"):
        fit_families(read_points(["published", str(csv_file)]), ["mdm"])


# ------------------------------------------------------------------------------------------------- what is published


@pytest.fixture(scope="module")
def recorded():
    families = read_record(ROOT / "results" / "scaling_published.json")["results"]["families"]
    return {name: from_json(each) for name, each in families.items()}


def test_the_record_of_the_published_points_is_their_fit(recorded):
    found, _ = fit_families(read_points(["published"]), bootstrap=0)
    assert list(found) == list(recorded) == ["ARM", "MDM"]
    for name, fit in found.items():
        for parameter, (low, high) in RECORDED[name].items():
            assert low < getattr(fit.law.law, parameter) < high
            # An optimum of a nearly linear loss is found to about 1e-5.
            np.testing.assert_allclose(
                getattr(recorded[name].law.law, parameter), getattr(fit.law.law, parameter), rtol=1e-3
            )
        low, high = recorded[name].law.interval(lambda law: law.exponents[0])
        assert 0.35 < low < 0.5 < high < 0.65


def test_isoflop_minima_are_those_of_polyfit_on_the_file(recorded):
    for family, fit in recorded.items():
        for parabola in fit.isoflop.parabolas:
            rows = [
                row
                for row in rows_of(PUBLISHED_POINTS)
                if row["family"] == family and float(row["train_flops"]) == parabola.flops
            ]
            u = np.log10([float(row["nonembedding_params"]) for row in rows])
            c2, c1, c0 = np.polyfit(u, [float(row["loss_nats_per_token"]) for row in rows], 2)
            np.testing.assert_allclose(parabola.parameters, 10 ** (-c1 / (2 * c2)), rtol=1e-6)
            np.testing.assert_allclose(parabola.loss, c0 - c1**2 / (4 * c2), rtol=1e-9)
    assert 1.1e9 < recorded["ARM"].isoflop.parabolas[-1].parameters < 1.3e9
    assert 0.65e9 < recorded["MDM"].isoflop.parabolas[-1].parameters < 0.8e9


def test_what_docs_say_of_the_published_points(recorded):
    """The numbers of docs/scaling.md that stand in its text."""
    runs = {
        (row["family"], row["nonembedding_params_M"]): int(row["global_batch_sequences"])
        * int(row["sequence_length"])
        * int(row["steps"])
        for row in rows_of(PUBLISHED_RUNS)
    }
    at_end, at_largest = [], []
    points = read_points(["published"])
    for point in points:
        size = f"{point.parameters / 1e6:.0f}".replace("3416", "3426")
        at_end.append(abs(point.tokens / runs[point.family, size] - 1) < 0.05)
        at_largest.append(point.flops == 3e20)
    ends, largest = np.array(at_end), np.array(at_largest)
    assert (len(points), ends.sum(), largest.sum(), (ends & largest).sum()) == (195, 39, 24, 22)
    for family, expected_misfit, expected_end in (("ARM", 0.023, 0.021), ("MDM", 0.015, 0.010)):
        law, parabola = recorded[family].law.law, recorded[family].isoflop.parabolas[-1]
        assert law.frontier(3e20) / parabola.loss - 1 == pytest.approx(expected_misfit, abs=5e-4)
        own = np.array([point.family == family for point in points])
        n, d, loss = (
            np.array([getattr(point, name) for point in points]) for name in ("parameters", "tokens", "loss")
        )
        early = fit_law(n[own & ~ends], d[own & ~ends], loss[own & ~ends], bootstrap=0).law
        above = np.log(early.loss(n, d) / loss)[own & ends].mean()
        assert above == pytest.approx(expected_end, abs=5e-4)
    inside = [row["factor"] for row in compare(recorded, ("MDM", "ARM"), [3e20])]
    assert inside == pytest.approx([0.045, 0.045], abs=0.0075)
    within = [row["factor"] for row in compare(recorded, ("ARM", "MDM"), [3e18])]
    assert within == pytest.approx([15.2, 18.0], abs=0.05)
    beyond = compare(recorded, ("ARM", "MDM"), [3e20])
    assert [row["factor"] for row in beyond] == pytest.approx([325, 21.4], rel=0.01)
