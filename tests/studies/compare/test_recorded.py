"""Runs taken from a record of `prime-v2 compare`: what is made of them is what was made of the runs' own records."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from command_runs import of_command
from compare_runs import Fork, three_runs, use_forks, write
from made_up_records import compared

from prime_v2.studies.compare.plan import all_options, parsed
from prime_v2.studies.compare.recorded import read_recorded
from prime_v2.studies.compare.report import notes, summarise
from prime_v2.training.course import course_of

run, _ = of_command("compare")
SHAPES, SEEDS = ("16x1", "32x1"), (0, 1, 2)


def study(shapes=SHAPES, seeds=SEEDS, **options):
    """A comparison with made-up records of its runs, with all options, and a law of a sampler but for ARM."""
    comparison, trained = compared(shapes=shapes, seeds=seeds)
    runs = [replace(made, options={"seed": made.seed, **options}) for made in comparison.runs]
    for made, (_, record) in zip(runs, trained, strict=True):
        planned = all_options(made, parsed(made.options | {"max_steps": 1}, "made up")[0], 100, Path())
        record["results"]["options"] = course_of(*parsed(planned, "made up"))
        evaluation = record["results"]["evaluation"]
        if made.name != "ARM":
            nats = [2 * each for each in evaluation["bound"]["nats_of_sequences"]]
            evaluation["sampler"] = {"8": evaluation["bound"] | {"nats_of_sequences": nats}}
    records = [record for _, record in trained]
    return replace(comparison, runs=tuple(runs)), list(zip(runs, records, strict=True))


def file_of(results: dict, folder, name="record.json"):
    path = folder / name
    record = {"name": "compare", "command": "prime-v2 compare made_up", "commit": "a" * 40, "results": results}
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


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
    comparison, trained = study()
    results = summarise(comparison, trained)
    recorded = read_recorded([file_of(results, tmp_path)], comparison)
    assert [made for made, _ in recorded] == [*comparison.runs]
    assert_same(json.loads(json.dumps(summarise(comparison, recorded))), json.loads(json.dumps(results)))


@pytest.mark.parametrize("wanted", [lambda made: made.seed == 0, lambda made: made.name == "MDM"], ids=["seed", "run"])
def test_seeds_or_runs_added_to_a_record_give_the_summary_of_all(tmp_path, wanted):
    comparison, trained = study()
    expected = summarise(comparison, trained)
    path = file_of(summarise(*part(comparison, trained, wanted)), tmp_path)
    recorded = dict(read_recorded([path], comparison))
    assert recorded and all(map(wanted, recorded))
    found = summarise(comparison, [(made, recorded.get(made, record)) for made, record in trained])
    for key in ("groups", "best"):
        assert_same(found[key], expected[key])


def test_records_of_three_machines_make_one_that_says_so(tmp_path):
    comparison, trained = study()
    paths = []
    for seed in SEEDS:
        chosen = part(comparison, trained, lambda made, seed=seed: made.seed == seed)
        for _, record in chosen[1]:
            record["machine"] = {"accelerator": f"GPU {seed}", "processor": "x"}
        paths.append(file_of(summarise(*chosen), tmp_path, f"{seed}.json"))
    found = summarise(comparison, read_recorded(paths, comparison))
    assert_same(found["best"], summarise(comparison, trained)["best"])
    expected = "Trained on GPU 0, PyTorch 2.0 (6 runs); GPU 1, PyTorch 2.0 (6 runs); GPU 2, PyTorch 2.0 (6 runs)."
    assert expected in notes(found)


def refusal(results: dict, comparison, folder) -> str:
    with pytest.raises(ValueError, match=r"--recorded \S+record.json") as error:
        read_recorded([file_of(results, folder)], comparison)
    return str(error.value)


def test_what_is_no_record_of_the_comparison_is_refused(tmp_path):
    comparison, trained = study(shapes=("",), seeds=(0,))
    results = json.loads(json.dumps(summarise(comparison, trained)))
    refused = partial(refusal, comparison=comparison, folder=tmp_path)
    assert "is a record of other, not of the comparison made_up" in refused(results | {"comparison": "other"})
    assert "has budgets by count=measured, the comparison has 6nd" in refused(results | {"count": "measured"})
    earlier = {key: value for key, value in results.items() if key != "clusters"}
    assert "was made by an earlier version, which kept no sums" in refused(earlier)
    for broken in ({"rows": [1]}, {"rows": [{"name": "MDM"}]}, {"clusters": []}, {"data": 3}):
        assert "is no whole record of a comparison" in refused(results | broken)
    short = json.loads(json.dumps(results))
    short["rows"][1]["evaluation"]["bound"]["nats_of_clusters"].pop()
    assert "is no whole record of a comparison (KeyError('nats_of_clusters'))" in refused(short)
    fewer = replace(comparison, runs=comparison.runs[:2])
    assert f"its run {comparison.runs[2].folder} is not in the comparison" in refused(results, comparison=fewer)
    bare = tmp_path / "tasks.json"
    bare.write_text(json.dumps({"name": "tasks", "command": "", "commit": "", "results": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match="is a record of tasks, not of the comparison made_up"):
        read_recorded([bare], comparison)
    twice = [file_of(results, tmp_path, name) for name in ("a.json", "b.json")]
    with pytest.raises(ValueError, match="b.json: MDM, 1e9 FLOPs, seed 0 is in another of the records, too"):
        read_recorded(twice, comparison)


@pytest.mark.parametrize(
    ("recorded", "now", "name"),
    [
        ({"weight_decay": 0.2}, {}, "weight_decay"),  # which the comparison leaves out
        ({}, {"weight_decay": 0.2}, "weight_decay"),
        ({"sampler_passes": [8]}, {}, "sampler_passes"),
        ({"model": {"num_subtokens": 1}}, {"model": {"num_subtokens": 2}}, "model"),
    ],
)
def test_a_run_of_other_options_is_refused(tmp_path, recorded, now, name):
    comparison, _ = study(shapes=("",), seeds=(0,), **now)
    results = summarise(*study(shapes=("",), seeds=(0,), **recorded))
    assert f"was trained with another {name} than the comparison gives it" in refusal(results, comparison, tmp_path)


def test_numbers_that_yaml_reads_as_text_are_the_numbers_that_they_are(tmp_path):
    comparison, _ = study(shapes=("",), seeds=(0,), weight_decay="2e-1")
    results = summarise(*study(shapes=("",), seeds=(0,), weight_decay=0.2))
    assert len(read_recorded([file_of(results, tmp_path)], comparison)) == 3


def test_a_study_goes_on_from_its_record_in_an_empty_folder(tmp_path, monkeypatch):
    """The record has two runs of three; the third alone is trained, and the plan says so."""
    use_forks(monkeypatch, Fork)
    content = three_runs(tmp_path)
    runs, (whole, record, joined) = content["runs"], (tmp_path / name for name in ("3.json", "2.json", "joined.json"))
    config = write(tmp_path, content, count="measured")
    assert run(config, "--out", tmp_path / "first", "--output", whole).exit_code == 0
    write(tmp_path, content, runs={name: runs[name] for name in ("MDM", "ARM")}, count="measured")
    assert run(config, "--out", tmp_path / "first", "--output", record).exit_code == 0
    write(tmp_path, content, count="measured")
    plan = run(config, "--out", tmp_path / "second", "--recorded", record, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert "2 more runs are taken from a record" in plan.stdout
    assert "Prime v2" in plan.stdout and "ARM" not in plan.stdout
    result = run(config, "--out", tmp_path / "second", "--recorded", record, "--output", joined)
    assert result.exit_code == 0, result.output
    (trained,) = tmp_path.glob("second/*/results/train.json")
    assert trained.parent.parent.name.startswith("Prime_v2-")
    rows, alone = (json.loads(path.read_text())["results"]["rows"] for path in (joined, whole))
    assert [row["name"] for row in rows] == ["MDM", "Prime v2", "ARM"]
    for row, other in zip(rows, alone, strict=True):
        assert_same(row["difference"], other["difference"])
        assert row["evaluation"] == other["evaluation"]
    result = run(config, "--out", tmp_path / "third", "--recorded", joined)
    assert result.exit_code == 0 and not list(tmp_path.glob("third/data"))  # nothing to train, so no text is read


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


def test_another_text_than_that_of_the_record_is_refused_before_training(tmp_path, monkeypatch):
    """At a seed that is recorded by its fingerprints, at another by the number of its documents."""
    started = []
    use_forks(monkeypatch, lambda *arguments, **options: started.append(1) or Fork(*arguments, **options))
    content = three_runs(tmp_path)
    one, record = write(tmp_path, content, runs={"MDM": content["runs"]["MDM"]}), tmp_path / "one.json"
    assert run(one, "--out", tmp_path / "first", "--output", record).exit_code == 0
    text = Path(content["train"]["data"])
    text.write_text(text.read_text() + json.dumps({"text": "a cat sees a red house and finds one dog."}) + "\n")
    started.clear()
    for seeds, message in (([0], "the text of seed 0 in .* is not that of the recorded runs"), ([0, 1], "")):
        runs = content["runs"] if message else {"MDM": content["runs"]["MDM"]}
        config = write(tmp_path, content, runs=runs, seeds=seeds)
        result = run(config, "--out", tmp_path / f"second{len(seeds)}", "--recorded", record)
        assert result.exit_code == 2, result.output
        pattern = message or "has 81 documents, that of the recorded runs of seed 0 another number"
        assert re.search(pattern, result.stderr), result.stderr
    assert not started
