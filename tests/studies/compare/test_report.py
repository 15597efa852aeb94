"""Rows, paired differences, tables and pictures of a comparison, from records that are made up here."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_records import LENGTH, compared, settings_compared
from matplotlib.figure import Figure
from scipy import stats

from prime_v2.studies.compare.config import Run
from prime_v2.studies.compare.differences import over_seeds, paired
from prime_v2.studies.compare.plots import plot_comparison
from prime_v2.studies.compare.report import (
    cost_table,
    markdown_text,
    notes,
    render,
    score_table,
    summarise,
)


def summary_notes(comparison, trained) -> list[str]:
    return notes(summarise(comparison, trained))


def nats_of(record: dict) -> np.ndarray:
    return np.array(record["results"]["evaluation"]["bound"]["nats_of_sequences"])


def scored(nats: np.ndarray, sequences: list[int]) -> dict:
    """What `paired` reads of a score of sequences of 16 tokens, so many of them in each cluster."""
    tokens = [16 * count for count in sequences]
    clusters = {"sequences": sequences, "squares": [each**2 for each in tokens], "over": "documents", "tokens": tokens}
    return {"num_sequences": len(nats), "nats_of_sequences": nats.tolist(), "clusters": clusters}


def test_a_paired_difference_is_the_mean_of_the_clusters_differences():
    rng = np.random.default_rng(0)
    a, b = rng.normal(50, 9, 30), rng.normal(48, 9, 30)
    found = paired(scored(a, [3] * 10), scored(b, [3] * 10))
    expected = stats.ttest_rel(a.reshape(10, 3).mean(1) / 16, b.reshape(10, 3).mean(1) / 16)
    assert found["nats_per_token"] == pytest.approx((a - b).mean() / 16)
    assert found["stderr"] == pytest.approx(found["nats_per_token"] / expected.statistic)
    assert found["interval_95"] == pytest.approx([*expected.confidence_interval(0.95)])


def test_one_cluster_has_a_difference_without_an_error_and_others_cannot_be_paired():
    one = paired(scored(np.array([32.0]), [1]), scored(np.array([16.0]), [1]))
    assert one == {"nats_per_token": 1.0, "stderr": None, "interval_95": None}
    three = np.ones(3)
    with pytest.raises(ValueError, match="3 sequences cannot be paired with 1"):
        paired(scored(three, [3]), scored(np.ones(1), [1]))
    with pytest.raises(ValueError, match="do not say alike which sequences share documents"):
        paired(scored(three, [1, 2]), scored(three, [2, 1]))
    with pytest.raises(ValueError, match="do not say alike which sequences share documents"):
        paired({"num_sequences": 1}, {"num_sequences": 1})  # of an earlier version


def test_over_seeds_the_interval_is_students_of_the_seeds_values():
    values = [1.0, 1.4, 1.1]
    found = over_seeds([{"nats_per_token": value, "stderr": 0.01} for value in values])
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found["interval_95"] == pytest.approx([*expected])
    assert found["stderr"] == pytest.approx(stats.sem(values))


def test_a_single_seed_keeps_its_own_error_and_interval():
    for name in ("nats_per_token_interval_95", "interval_95"):  # of a bound, of a difference
        found = over_seeds([{"nats_per_token": 2.0, "stderr": 0.1, name: [1.7, 2.3]}])
        assert found == {"nats_per_token": 2.0, "stderr": 0.1, "interval_95": [1.7, 2.3]}


def test_rows_hold_the_numbers_of_the_records_and_differences_at_equal_seed():
    comparison, trained = compared(seeds=(0, 1, 2))
    results = summarise(comparison, trained)
    records = {(run.name, run.seed): record for run, record in trained}
    for row in results["rows"]:
        record = records[row["name"], row["seed"]]
        assert row["training"]["flops_6nd"] == record["results"]["training"]["flops_6nd"]
        assert row["evaluation"]["bound"]["nats_per_token"] == nats_of(record).mean() / LENGTH
        assert "nats_of_sequences" not in row["evaluation"]["bound"]
        assert row["curve"][0]["flops"] == pytest.approx(row["curve"][0]["tokens"] * 6 * 1000)
        if row["name"] == "MDM":
            assert row["difference"] is None
            continue
        gaps = (nats_of(record) - nats_of(records["MDM", row["seed"]])) / LENGTH
        assert row["difference"]["nats_per_token"] == pytest.approx(gaps.mean())
    group = next(each for each in results["groups"] if each["name"] == "ARM")
    means = [(nats_of(records["ARM", seed]) - nats_of(records["MDM", seed])).mean() / LENGTH for seed in (0, 1, 2)]
    assert group["difference"]["nats_per_token"] == pytest.approx(np.mean(means))
    assert group["difference"]["stderr"] == pytest.approx(stats.sem(means))


def test_tables_give_perplexity_of_bounds_alone_and_label_the_papers_loss():
    results = summarise(*compared(Prime=1.0))
    heads, lines = score_table(results)
    assert heads == ["run", "family", "nats/token ± 95%", "perplexity", "paper's loss", "minus MDM ± 95%"]
    cells = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    bounds = {row["name"]: row["evaluation"]["bound"]["nats_per_token"] for row in results["rows"]}
    for name, sign in (("MDM", "≤"), ("Prime", "≤"), ("ARM", "=")):
        assert cells[name]["nats/token ± 95%"].startswith(f"{sign} {bounds[name]:.3f} ± ")
        assert cells[name]["perplexity"].startswith(
            f"{sign} {math.exp(bounds[name]):,.{bounds[name] < math.log(100):d}f}"
        )
    assert cells["MDM"]["paper's loss"].endswith("(the same bound)")
    assert cells["Prime"]["paper's loss"].endswith("(no bound)")
    assert cells["ARM"]["paper's loss"] == "–"
    assert cells["MDM"]["minus MDM ± 95%"] == "–"
    assert cells["Prime"]["minus MDM ± 95%"].startswith("+")
    assert cost_table(results)[1][0][2:] == ["1 K", "1.2 K", "100", "7.20e+06", "1.08e+07", "1.5 min"]


def test_text_and_markdown_say_what_the_numbers_are():
    results = summarise(*compared(shapes=("16x1", "32x1"), seeds=(0, 1)))
    for text in (render(results), markdown_text(results)):
        assert "no bound on the likelihood" in text
        assert "unigram entropy is 5.500" in text
        assert "over 2 seeds (Student t)" in text
        assert "what bounds with 97.5% confidence is the upper end of its interval" in text
        assert "Budgets count 6 N D" in text
        assert "12 of 12 runs read the training text more than once, up to 2.4 times" in text
    assert markdown_text(results).startswith("| run | family | size | nats/token ± 95% |")


def test_a_run_is_called_by_its_label_and_lies_in_the_folder_of_its_name():
    comparison, trained = compared(names=("MDM", "ARM"), shapes=("16x1", "32x1"))
    called = {run: replace(run, options={"label": f"{run.name}!"}) for run in comparison.runs}
    comparison = replace(comparison, runs=tuple(called.values()))
    results = summarise(comparison, [(called[run], record) for run, record in trained])
    assert (results["names"], results["baseline"]) == (["MDM!", "ARM!"], "MDM!")
    assert {(row["name"], row["folder"].split("-")[0]) for row in results["rows"]} == {
        ("MDM!", "MDM"),
        ("ARM!", "ARM"),
    }
    assert [each["difference"] is None for each in results["best"]] == [True, False]


def test_notes_say_what_the_interval_of_one_seed_covers():
    comparison, trained = compared()
    assert "intervals are 95%, over documents and draws; one seed" in render(summarise(comparison, trained))
    results = summarise(comparison, trained)
    for row in results["rows"]:
        del row["evaluation"]["bound"]["interval_over"]
    assert "Recorded by an earlier version: intervals take sequences as independent" in render(results)


def test_notes_say_what_the_splits_share_where_it_was_counted():
    comparison, trained = compared(seeds=(0, 1))
    for run, record in trained:
        shares = [{"length": length, "share": (1 + run.seed) / length} for length in (8, 32)]
        record["results"]["data"] |= {"repeated_documents": 1200, "test_ngrams_in_train": shares}
    text = render(summarise(comparison, trained))
    assert "18.8% of its runs of 8 tokens and 4.7% of its runs of 32 tokens are also in the training text" in text
    assert "1,200 documents equal to an earlier one were left out" in text
    assert "in the training text" not in render(summarise(*compared()))


def test_notes_say_what_codes_and_vectors_cost_where_the_records_say_it():
    comparison, trained = compared()
    assert "Codes and initial vectors" not in "".join(summary_notes(comparison, trained))
    training = trained[1][1]["results"]["training"]
    flops = training["flops_measured"]
    training["made_from_text"] = {
        "codes": {"tokens": 9, "seconds": 10.0, "flops": flops / 100},
        "vectors": {"tokens": 9, "seconds": 2.0, "flops": flops / 200},
    }
    trained[2][1]["results"]["training"]["made_from_text"] = {}
    row = summarise(comparison, trained)["rows"][1]
    assert row["training"]["made_from_text"]["codes"]["seconds"] == 10.0
    (note,) = [each for each in summary_notes(comparison, trained) if each.startswith("Codes and initial vectors")]
    assert ": 1 of 3 runs made them from their text, in up to 12 s and " in note
    assert note.endswith(f" {flops * 0.015:.1e} FLOPs, at most 1.50% of those of training.")


def test_the_best_size_is_chosen_on_the_dev_split_and_compared_with_the_baselines_best():
    comparison, trained = compared(names=("MDM", "ARM"), shapes=("16x1", "32x1", "64x1"))
    wanted = {"MDM": "64x1", "ARM": "32x1"}
    for run, record in trained:
        last = record["results"]["history"][2]
        last["eval_bound"] = 1.0 if run.shape == wanted[run.name] else 2.0
    best = {each["name"]: each for each in summarise(comparison, trained)["best"]}
    assert {name: each["shape"] for name, each in best.items()} == wanted
    assert [best[name]["at_the_edge"] for name in ("MDM", "ARM")] == [True, False]
    nats = {run: nats_of(record) for run, record in trained}
    gap = nats[Run("ARM", "32x1", 1e9, 0, {})] - nats[Run("MDM", "64x1", 1e9, 0, {})]
    assert best["ARM"]["difference"]["nats_per_token"] == pytest.approx(gap.mean() / LENGTH)


def test_laws_of_ancestral_sampling_are_paired_with_the_baselines_at_as_many_passes():
    comparison, trained = compared(seeds=(0, 1))
    for run, record in trained:
        evaluation = record["results"]["evaluation"]
        if run.name != "ARM":
            few = {**evaluation["bound"], "nats_of_sequences": (nats_of(record) + LENGTH * run.seed).tolist()}
            evaluation["sampler"] = {"8": evaluation["bound"], "4": few}
    results = summarise(comparison, trained)
    groups = {group["name"]: group for group in results["groups"]}
    assert groups["ARM"]["sampler"] == {} and groups["MDM"]["sampler"]["8"]["difference"] is None
    assert groups["Prime"]["sampler"]["8"]["difference"] == groups["Prime"]["difference"]
    # What is added to both runs of a seed is in no difference.
    few, whole = groups["Prime"]["sampler"]["4"]["difference"], groups["Prime"]["difference"]
    assert few["nats_per_token"] == pytest.approx(whole["nats_per_token"])
    assert few["interval_95"] == pytest.approx(whole["interval_95"])
    assert "8 passes ± 95% | minus MDM | 4 passes ± 95% | minus MDM" in markdown_text(results)
    assert "law of ancestral sampling" in render(results)
    assert "law of ancestral sampling" not in render(summarise(*compared()))


def test_settings_of_one_size_are_at_no_edge_of_the_sizes():
    results = settings_compared()
    assert [each["at_the_edge"] for each in results["best"]] == [False, False]
    assert "At the edge" not in render(results)


def test_records_of_other_code_are_refused_unless_allowed():
    comparison, trained = compared()
    trained[1][1]["commit"] = "b" * 40
    with pytest.raises(
        ValueError, match="different code: MDM, 1e9 FLOPs, seed 0 of commit a{12}, Prime.*--allow-mixed"
    ):
        summarise(comparison, trained)
    results = summarise(comparison, trained, allow_mixed=True)
    assert "2 versions of the code" in render(results)


def test_uncommitted_changes_are_other_code():
    comparison, trained = compared()
    trained[1][1]["uncommitted_changes"] = True
    with pytest.raises(ValueError, match="Prime.* of a{12} with uncommitted changes; train them with one"):
        summarise(comparison, trained)


def test_a_stream_is_not_said_to_have_been_read_twice():
    """Of a stream the folder of text counts what one run read of it."""
    comparison, trained = compared()
    results = summarise(comparison, trained)
    for each in results["data"].values():
        each["train_tokens"] = 1
    assert any("read the training text more than once" in note for note in notes(results))
    for row in results["rows"]:
        row["options"]["streaming"] = True
    assert not any("more than once" in note for note in notes(results))


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        (("data", "fingerprints", "train"), "x", "the fingerprint of train is x and t"),
        (("options", "block_size"), 16, "block_size is 16 and 8"),
        (("options", "global_batch"), 32, "global_batch is 32 and None"),
        (("options", "seed"), 5, "seed is 5 and 0"),
        (("evaluation", "bound", "num_sequences"), 3, "the number of scored sequences is 3 and 12"),
    ],
)
def test_records_of_another_data_order_are_refused_by_name(place, name, message):
    comparison, trained = compared()
    part = trained[2][1]["results"]
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = name
    with pytest.raises(ValueError, match=f"ARM, .* and MDM, .* differ in data order: {message}"):
        summarise(comparison, trained, allow_mixed=True)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure saved, which is still written."""
    saved, save = [], Figure.savefig

    def spy(figure, *arguments, **options):
        saved.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_pictures_of_one_size_hold_all_names_points_and_intervals(tmp_path: Path, figures):
    results = summarise(*compared(budgets=(1e9, 3e9)))
    paths = plot_comparison(results, tmp_path / "new")
    assert [path.name for path in paths] == ["curves.png", "bounds.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    curves, bounds = figures
    assert legend_of(curves) == ["MDM", "Prime", "ARM", "1e9 FLOPs", "3e9 FLOPs", "unigram entropy"]
    flops, tokens = curves.axes
    assert (flops.get_xlabel(), tokens.get_xlabel()) == ("training FLOPs (6 N D)", "training tokens")
    row = results["rows"][0]
    drawn = flops.containers[0][0].get_xydata()
    np.testing.assert_allclose(drawn, [[point["flops"], point["bound"]] for point in row["curve"]])
    assert len(flops.containers) == len(tokens.containers) == 6
    low, high = flops.get_ylim()
    assert low < row["curve"][-1]["bound"] < high < row["curve"][0]["bound"]  # the beginning is cut off
    assert [text.get_text() for text in bounds.axes[0].get_yticklabels()] == ["MDM", "Prime", "ARM"]
    assert len(bounds.axes[0].containers) == 3
    assert len(bounds.axes[1].containers) == 2  # no difference of the baseline to itself


def test_pictures_of_several_sizes_show_the_bound_against_n(tmp_path: Path, figures):
    results = summarise(*compared(shapes=("16x1", "32x1", "64x1"), budgets=(1e9, 3e9)))
    paths = plot_comparison(results, tmp_path)
    assert [path.name for path in paths] == ["curves.png", "sizes.png"]
    curves, sizes = figures
    assert len(curves.axes) == 6
    assert legend_of(sizes) == ["MDM", "Prime", "ARM"]
    assert [axes.get_title() for axes in sizes.axes] == ["1e9 FLOPs", "3e9 FLOPs"]
    line = sizes.axes[0].containers[0][0].get_xydata()
    np.testing.assert_allclose(line[:, 0], [1000, 4000, 16000], rtol=0.04)  # beside each other
    group = next(each for each in results["groups"] if (each["name"], each["shape"]) == ("MDM", "64x1"))
    assert line[2, 1] == pytest.approx(group["bound"]["nats_per_token"])
