"""`search_seed`: all shapes at one seed, the other seeds at the shape that is best there by the dev split."""

import json

import pytest
import yaml
from command_runs import of_command
from compare_runs import NETWORK, Fork, three_runs, use_forks, write

from prime_v2.studies.compare.config import Comparison, Run, read_comparison
from prime_v2.studies.compare.search import best_shapes, narrowed, number_of_runs, searched

run, _ = of_command("compare")
SHAPES = [{**NETWORK, "name": "low"}, {**NETWORK, "name": "high", "train": {"learning_rate": 0.03}}]


def made_up(search_seed):
    """Two runs, two shapes, three seeds; with records whose dev bounds favour "b" at seed 1 and "a" at the others."""
    runs = tuple(Run(n, s, 1e9, seed, {}) for s in ("a", "b") for seed in (0, 1, 2) for n in ("MDM", "ARM"))
    trained = []
    for each in runs:
        bound = 2.0 if (each.shape == "b") == (each.seed == 1) else 3.0
        trained.append((each, {"results": {"history": [{"eval_bound": 9.0}, {"eval_bound": bound}, {"loss": 1.0}]}}))
    return Comparison("made_up", "6nd", "MDM", runs, search_seed), trained


def test_without_a_search_seed_every_shape_has_every_seed():
    comparison, trained = made_up(None)
    assert searched(comparison) == comparison and number_of_runs(comparison) == 12
    assert set(best_shapes(comparison, trained).values()) == {"a"}


@pytest.mark.parametrize(("seed", "best", "others"), [(0, "a", {1, 2}), (1, "b", {0, 2})])
def test_other_seeds_are_trained_at_the_best_shape_of_the_search_seed_alone(seed, best, others):
    comparison, trained = made_up(seed)
    first = searched(comparison)
    assert [(each.shape, each.name) for each in first.runs] == [(s, n) for s in "ab" for n in ("MDM", "ARM")]
    assert {each.seed for each in first.runs} == {seed}
    # What was trained at other seeds changes nothing in the choice.
    assert set(best_shapes(comparison, trained).values()) == {best}
    rest = narrowed(comparison, trained).runs
    assert rest[:4] == first.runs and len(rest) == number_of_runs(comparison) == 8
    assert {(each.shape, each.name, each.seed) for each in rest[4:]} == {
        (best, name, other) for name in ("MDM", "ARM") for other in others
    }


def test_a_run_without_a_dev_bound_is_refused_and_its_other_seeds_are_not_dropped():
    comparison, trained = made_up(0)
    bare = [(run, {"results": {"history": []}} if run.name == "ARM" else record) for run, record in trained]
    with pytest.raises(ValueError, match="ARM, a, 1e9 FLOPs, seed 0 has no dev bound to choose a shape by"):
        narrowed(comparison, bare)


def test_a_comparison_with_a_search_trains_reports_and_plans_what_it_says(tmp_path, monkeypatch):
    content = three_runs(tmp_path)
    content["runs"] = {"MDM": {"model": {"num_subtokens": 1}}, "ARM": {"family": "arm", "shapes": ["high"]}}
    config, out = write(tmp_path, content, shapes=SHAPES, seeds=[3, 5], search_seed=5), tmp_path / "out"
    plan = run(config, "--out", out, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert "3 runs, about" in plan.stdout
    assert plan.stdout.splitlines()[-1].startswith(
        "2 more follow: the other seeds, at the size of each run that is best"
    )
    use_forks(monkeypatch, Fork)
    result = run(config, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert "all sizes are trained at seed 5; the other seeds take the best of each run" in result.stderr
    found = json.loads(result.stdout)
    assert found["search_seed"] == 5
    trained = {(row["name"], row["shape"], row["seed"]): row for row in found["rows"]}
    dev = {shape: trained["MDM", shape, 5]["curve"][-1]["bound"] for shape in ("low", "high")}
    best = min(dev, key=dev.get)
    assert set(trained) == {
        ("MDM", "low", 5),
        ("MDM", "high", 5),
        ("MDM", best, 3),
        ("ARM", "high", 5),
        ("ARM", "high", 3),
    }
    assert [(each["name"], each["shape"], each["seeds"]) for each in found["best"]] == [
        ("MDM", best, [5, 3]),
        ("ARM", "high", [5, 3]),
    ]
    # All seeds of a run have the steps of the first.
    assert len({row["training"]["steps"] for key, row in trained.items() if key[0] == "ARM"}) == 1
    # Differences of the best are to the baseline's best, whatever its shape, and so are those of few passes.
    difference = found["best"][1]["difference"]["nats_per_token"]
    means = [
        trained["ARM", "high", seed]["evaluation"]["bound"]["nats_per_token"]
        - trained["MDM", best, seed]["evaluation"]["bound"]["nats_per_token"]
        for seed in (5, 3)
    ]
    assert difference == pytest.approx(sum(means) / 2, abs=1e-3)  # records round the nats of sequences
    assert found["best"][0]["sampler"]["2"]["difference"] is None
    again = run(config, "--out", out, "--dry-run")
    assert "5 runs, about 0 s left" in again.stdout.splitlines()[-1]
    assert "where a size has one seed only" in run(config, "--out", out).stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_seed": 7}, "search_seed=7 is not among the seeds 0, 1"),
        ({"search_seed": True}, "search_seed=True is not among the seeds"),
        ({"search_seed": 0, "shapes": [NETWORK]}, "chooses among several `shapes`; give them, or leave it out"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tmp_path, changes, message):
    content = three_runs(tmp_path) | {"shapes": SHAPES, "seeds": [0, 1]}
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    result = run(path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_a_shape_scales_the_options_of_each_run(tmp_path):
    shapes = [{**NETWORK, "name": "as it is"}, {**NETWORK, "name": "half", "scale": {"learning_rate": 0.5}}]
    content = three_runs(tmp_path) | {"shapes": shapes}
    content["runs"]["ARM"] |= {"train": {"learning_rate": 0.04}}
    found = {
        (each.name, each.shape): each.options["learning_rate"]
        for each in read_comparison(write(tmp_path, content)).runs
    }
    assert found["MDM", "as_it_is"] == 0.01 and found["MDM", "half"] == 0.005
    assert found["ARM", "as_it_is"] == 0.04 and found["ARM", "half"] == 0.02


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"scale": {"weight_decay": 2}}, "shape a scales weight_decay, which the run has not; give it in `train`"),
        ({"scale": {"learning_rate": -1}}, "learning_rate=-1.0 must be a factor above 0, e.g. 0.5"),
        ({"scale": {"learning_rate": "much"}}, "scale: learning_rate: 'much' is no number"),
        ({"scale": {"global_batch": 2}}, "global_batch must be the same for all runs"),
        ({"scale": {"learning_rate": 2}, "train": {"learning_rate": 1}}, "is in `train` and in `scale`"),
        ({"scale": 2}, "scale is 2; it holds lines"),
    ],
)
def test_a_factor_that_cannot_be_is_refused(tmp_path, shape, message):
    content = three_runs(tmp_path) | {"shapes": [{"name": "a", **NETWORK, **shape}]}
    result = run(write(tmp_path, content), "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr, result.output
