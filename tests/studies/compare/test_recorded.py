"""Runs taken from a record of `prime-v2 compare`: what is made of them is what was made of the runs' own records."""

import json
import re
from dataclasses import replace

import pytest
from command_runs import of_command
from compare_runs import Fork, three_runs, use_forks, write
from made_up_records import compared

from prime_v2.studies.compare.recorded import read_recorded
from prime_v2.studies.compare.report import summarise

run, _ = of_command("compare")
SHAPES, SEEDS = ("16x1", "32x1"), (0, 1, 2)


def with_laws(trained):
    """The same records with a law of a sampler, but for ARM."""
    for made, record in trained:
        evaluation = record["results"]["evaluation"]
        if made.name != "ARM":
            law = evaluation["bound"] | {
                "nats_of_sequences": [2 * n for n in evaluation["bound"]["nats_of_sequences"]]
            }
            evaluation["sampler"] = {"8": law}
    return trained


def file_of(results: dict, folder, name="record.json"):
    path = folder / name
    record = {"name": "compare", "command": "prime-v2 compare made_up", "commit": "a" * 40, "results": results}
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def an_earlier_versions(results: dict) -> dict:
    """The record without the sums of clusters, which earlier versions did not keep."""
    found = json.loads(json.dumps(results))
    del found["clusters"]
    for row in found["rows"]:
        for scored in (row["evaluation"]["bound"], *row["sampler"].values()):
            del scored["nats_of_clusters"]
    return found


def part(comparison, trained, wanted):
    runs = tuple(made for made in comparison.runs if wanted(made))
    return replace(comparison, runs=runs), [(made, record) for made, record in trained if wanted(made)]


def assert_same(found, expected):
    """Equal but for the last digits, since sums are kept to 1e-3 nats."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert_same(mine, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


def test_a_summary_of_recorded_runs_is_the_summary_of_their_records(tmp_path):
    comparison, trained = compared(shapes=SHAPES, seeds=SEEDS)
    results = summarise(comparison, with_laws(trained))
    recorded = read_recorded([file_of(results, tmp_path)], comparison)
    assert [made for made, _ in recorded] == [*comparison.runs]
    assert_same(json.loads(json.dumps(summarise(comparison, recorded))), json.loads(json.dumps(results)))


@pytest.mark.parametrize("earlier", [False, True])
def test_seeds_or_runs_added_to_a_record_give_the_summary_of_all(tmp_path, earlier):
    """Of a record without sums only other seeds: its own differences are those that it has."""
    comparison, trained = compared(shapes=SHAPES, seeds=SEEDS)
    comparison = replace(comparison, search_seed=0)
    expected = summarise(comparison, with_laws(trained))
    parts = [lambda made: made.seed == 0, *([] if earlier else [lambda made: made.name == "MDM"])]
    for wanted in parts:
        results = summarise(*part(comparison, trained, wanted))
        path = file_of(an_earlier_versions(results) if earlier else results, tmp_path)
        recorded = dict(read_recorded([path], comparison))
        assert recorded and all(map(wanted, recorded))
        found = summarise(comparison, [(made, recorded.get(made, record)) for made, record in trained])
        for key in ("groups", "best"):
            assert_same(found[key], expected[key])


def test_two_records_make_one(tmp_path):
    comparison, trained = compared(shapes=SHAPES, seeds=SEEDS)
    expected = summarise(comparison, with_laws(trained))
    parts = [summarise(*part(comparison, trained, lambda made, seed=seed: made.seed == seed)) for seed in SEEDS]
    paths = [file_of(results, tmp_path, f"{i}.json") for i, results in enumerate(parts)]
    assert_same(summarise(comparison, read_recorded(paths, comparison))["best"], expected["best"])


def test_runs_of_several_seeds_without_sums_are_not_paired_anew(tmp_path):
    comparison, trained = compared(shapes=SHAPES, seeds=SEEDS)
    path = file_of(an_earlier_versions(summarise(comparison, with_laws(trained))), tmp_path)
    with pytest.raises(ValueError, match="train both again where --recorded gives one that an earlier version made"):
        summarise(comparison, read_recorded([path], comparison))


def test_what_is_no_record_of_the_comparison_is_refused(tmp_path):
    comparison, trained = compared()
    results = summarise(comparison, trained)
    with pytest.raises(ValueError, match=r"is a record of other, not of the comparison made_up"):
        read_recorded([file_of(results | {"comparison": "other"}, tmp_path)], comparison)
    bare = tmp_path / "tasks.json"
    bare.write_text(json.dumps({"name": "tasks", "command": "", "commit": "", "results": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is a record of tasks, not of the comparison made_up"):
        read_recorded([bare], comparison)
    fewer = replace(comparison, runs=comparison.runs[:2])
    with pytest.raises(ValueError, match=re.escape(f"its run {comparison.runs[2].folder} is not of this comparison")):
        read_recorded([file_of(results, tmp_path)], fewer)
    with pytest.raises(ValueError, match="is damaged, it lacks 'rows'; give the whole record"):
        read_recorded([file_of({"comparison": "made_up"}, tmp_path)], comparison)
    changed = replace(comparison, runs=tuple(replace(each, options={"block_size": 9}) for each in comparison.runs))
    with pytest.raises(ValueError, match="was trained with block_size=8, the comparison has 9; leave the record out"):
        read_recorded([file_of(results, tmp_path)], changed)


def test_a_study_goes_on_from_its_record_in_an_empty_folder(tmp_path, monkeypatch):
    """The record has two runs; the third alone is trained, and the plan says so."""
    use_forks(monkeypatch, Fork)
    content = three_runs(tmp_path)
    runs, record, whole = content["runs"], tmp_path / "two.json", tmp_path / "three.json"
    two = write(tmp_path, content, runs={name: runs[name] for name in ("MDM", "ARM")}, count="measured")
    assert run(two, "--out", tmp_path / "first", "--output", record).exit_code == 0
    config = write(tmp_path, content, count="measured")
    plan = run(config, "--out", tmp_path / "second", "--recorded", record, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert "2 more are recorded" in plan.stdout and "Prime v2" in plan.stdout and "ARM" not in plan.stdout
    result = run(config, "--out", tmp_path / "second", "--recorded", record, "--output", whole)
    assert result.exit_code == 0, result.output
    (trained,) = tmp_path.glob("second/*/results/train.json")
    assert trained.parent.parent.name.startswith("Prime_v2-")
    assert run(config, "--out", tmp_path / "third", "--output", tmp_path / "alone.json").exit_code == 0
    rows, alone = (json.loads(path.read_text())["results"]["rows"] for path in (whole, tmp_path / "alone.json"))
    assert [row["name"] for row in rows] == ["MDM", "Prime v2", "ARM"]
    for row, other in zip(rows, alone, strict=True):
        assert_same(row["difference"], other["difference"])
        assert row["evaluation"] == other["evaluation"]
    result = run(config, "--out", tmp_path / "fourth", "--recorded", whole)
    assert result.exit_code == 0 and not list(tmp_path.glob("fourth/data"))  # nothing to train, so no text is read


def test_runs_recorded_by_another_commit_are_not_joined_by_new_ones(tmp_path, monkeypatch):
    use_forks(monkeypatch, Fork)
    content = three_runs(tmp_path)
    config, record = write(tmp_path, content, runs={"MDM": content["runs"]["MDM"]}), tmp_path / "one.json"
    assert run(config, "--out", tmp_path / "first", "--output", record).exit_code == 0
    found = json.loads(record.read_text())
    found["results"]["rows"][0]["commit"] = "f" * 40
    record.write_text(json.dumps(found))
    result = run(write(tmp_path, content), "--out", tmp_path / "second", "--recorded", record)
    assert result.exit_code == 2
    assert "-seed0 was trained by commit ffffffffffff" in result.stderr
    assert "--allow-mixed" in result.stderr
    assert not list(tmp_path.glob("second/*/results"))
