"""`prime-v2 compare --run --shape --seed`: some of the runs of a comparison, as the whole would train them."""

import json

import pytest
from command_runs import of_command
from compare_runs import NETWORK, Fork, three_runs, use_forks, write

from prime_v2.studies.compare.config import Comparison, Run
from prime_v2.studies.compare.selection import selected

run, refused = of_command("compare")
RUNS = tuple(
    Run(name, shape, 1e9, seed, {"label": label})
    for shape in ("16x1", "2e_3")
    for seed in (0, 1)
    for name, label in (("MDM", "MDM"), ("nested 6-11", "nested"))
)
WHOLE = Comparison("made_up", "measured", "MDM", RUNS, 0, 0)


def keys(comparison):
    return [(each.name, each.shape, each.seed) for each in comparison.runs]


def test_nothing_given_leaves_the_comparison_as_it_is():
    assert selected(WHOLE) == WHOLE


@pytest.mark.parametrize("name", ["nested 6-11", "nested", "nested_6_11"])
def test_a_run_is_found_by_its_name_its_label_and_its_folder(name):
    assert keys(selected(WHOLE, [name], ["16x1"], [1])) == [("nested 6-11", "16x1", 1)]


def test_a_shape_is_found_as_it_is_written_in_the_file():
    assert keys(selected(WHOLE, shapes=["2e-3"], seeds=[0])) == [("MDM", "2e_3", 0), ("nested 6-11", "2e_3", 0)]


@pytest.mark.parametrize(
    ("shapes", "seeds", "search"), [([], [], 0), ([], [0], 0), ([], [1], None), (["16x1"], [], None)]
)
def test_shapes_are_searched_where_several_and_the_search_seed_are_left(shapes, seeds, search):
    found = selected(WHOLE, ["MDM"], shapes, seeds)
    assert (found.search_seed, found.cost_seed) == (search, 0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"runs": ["MDN"]}, "--run 'MDN' is not in the comparison; did you mean MDM?; there are MDM, nested"),
        ({"runs": [""]}, "--run '' is not in the comparison; there are MDM, nested"),
        ({"shapes": ["64x2"]}, "--shape '64x2' is not in the comparison; there are 16x1, 2e_3"),
        ({"seeds": [7]}, "--seed 7 is not in the comparison; there are 0, 1"),
    ],
)
def test_what_the_comparison_has_not_is_refused(given, sentence):
    with pytest.raises(ValueError) as refusal:
        selected(WHOLE, **given)
    assert str(refusal.value) == sentence


def test_names_without_a_run_in_common_are_refused():
    partial = Comparison("made_up", "6nd", "MDM", tuple(each for each in RUNS if each.shape == "16x1" or each.seed), 0)
    with pytest.raises(ValueError) as refusal:
        selected(partial, ["MDM"], ["2e_3"], [0])
    assert str(refusal.value) == (
        "no run has this --run, --shape and --seed at once; those that --run leaves have --shape 16x1 --seed 0, "
        "--shape 16x1 --seed 1, --shape 2e_3 --seed 1"
    )


def test_a_comparison_of_one_size_has_no_shape_to_name():
    only = Comparison("made_up", "6nd", "MDM", (Run("MDM", "", 1e9, 0, {}),))
    with pytest.raises(ValueError, match="has one size, which has no name; leave --shape out"):
        selected(only, shapes=[""])


def test_a_name_wins_over_a_label_and_a_label_over_a_folder():
    labels = {"A": "B", "B": "A", "MDM": "MDM", "plus": "MDM +", "star": "MDM*"}
    runs = tuple(Run(name, "", 1e9, 0, {"label": label}) for name, label in labels.items())
    confusing = Comparison("made_up", "6nd", "MDM", runs)
    called = {"A": "A", "B": "B", "MDM": "MDM", "MDM +": "plus", "MDM*": "star", "MDM-": "MDM"}
    for given, name in called.items():
        assert [run.name for run in selected(confusing, [given]).runs] == [name], given


def test_a_part_is_trained_as_the_whole_would_and_the_whole_goes_on_from_it(tmp_path, monkeypatch):
    content = three_runs(tmp_path) | {"count": "measured", "seeds": [3, 5], "shapes": [NETWORK]}
    content["budgets"] = [2.0e8]
    config, out = write(tmp_path, content), tmp_path / "out"
    whole = json.loads(run(config, "--out", out, "--dry-run", "--json").stdout)["runs"]
    steps = {(each["name"], each["seed"]): each["steps"] for each in whole}
    # At seed 5 alone the noise of the first micro-batches hides another number of tokens.
    alone = write(tmp_path, content, seeds=[5])
    changed = json.loads(run(alone, "--out", out, "--dry-run", "--json").stdout)["runs"]
    assert any(each["steps"] != steps[each["name"], 5] for each in changed)
    config = write(tmp_path, content)
    use_forks(monkeypatch, Fork)
    result = run(config, "--out", out, "--run", "Prime v2", "--seed", "5", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["name"], row["seed"], row["difference"]) == ("Prime v2", 5, None)
    assert row["training"]["steps"] == steps["Prime v2", 5]
    assert not (out / "summary.json").exists()  # which is of the whole
    assert "minus MDM" not in run(config, "--out", out, "--run", "Prime v2", "--seed", "5").stdout
    states = json.loads(run(config, "--out", out, "--dry-run", "--json").stdout)["runs"]
    assert [(each["name"], each["seed"]) for each in states if each["state"] == "finished"] == [("Prime v2", 5)]
    assert refused(config, "--out", out, "--run", "ARMS").startswith("--run 'ARMS' is not in the comparison")
