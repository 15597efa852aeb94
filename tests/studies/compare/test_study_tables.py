"""Tables of the study, from records that are made up here."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_up_records import record_of, settings_compared
from scipy import stats

from docs.tables import study as tables
from docs.tables.study import families_table, settings_table, verdict_table
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record, read_record
from prime_v2.studies.compare.config import Comparison, Run
from prime_v2.studies.compare.differences import paired
from prime_v2.studies.compare.report import summarise


def test_the_table_of_settings_marks_the_lowest_dev_bound_of_each_run(tmp_path):
    write_json(
        tmp_path / "compare_tuning.json", make_record("compare", settings_compared(), seed=0, code=code_version())
    )
    heads, _, mdm, arm = settings_table("tuning", tmp_path).splitlines()[:4]
    assert heads.startswith("| run | 16x1 | 32x1 | test")
    assert mdm.startswith("| MDM | **1.000** | 2.000 | ≤ ") and "| – |" in mdm
    assert arm.startswith("| ARM | 2.000 | **1.000** | = ")


def test_the_papers_loss_is_a_column_where_it_is_asked_for(tmp_path):
    results = settings_compared()
    write_json(tmp_path / "compare_shuffle_ratio.json", make_record("compare", results, seed=0, code=code_version()))
    heads, _, mdm, arm = settings_table("shuffle_ratio", tmp_path, papers_loss=True).splitlines()[:4]
    loss = {each["name"]: each for each in results["best"]}["MDM"]["paper_loss"]
    assert "| test ± 95%, of the one in bold | the paper's loss | minus " in heads
    assert f" | {loss['nats_per_token']:.3f} (the same bound) | " in mdm and loss["is_bound"]
    assert arm.count("|") == heads.count("|")


def recorded_study(folder: Path, better: str = "MDM, tree") -> dict:
    """A record of three arms, three seeds and laws of four passes; the dev bound of `better` is the lowest."""
    names = {"MDM": "MDM", "MDM, tree": "MDM", "Prime": "Prime"}
    runs = [Run(name, "16x1", 1e9, seed, {}) for seed in (0, 1, 2) for name in names]
    runs.append(Run("Prime", "32x1", 1e9, 0, {}))
    trained = []
    for run in runs:
        record = record_of(replace(run, name=names[run.name]), {"MDM": 0.5, "MDM, tree": 0.0, "Prime": -0.5}[run.name])
        evaluation = record["results"]["evaluation"]
        evaluation["sampler"] = {"4": evaluation["bound"]}
        record["results"]["history"][2]["eval_bound"] = 1.0 if run.name == better else 2.0 + (run.shape == "32x1")
        trained.append((run, record))
    results = summarise(Comparison("study_1e9", "measured", "MDM, tree", tuple(runs), 0), trained)
    write_json(folder / "compare_study_1e9.json", make_record("compare", results, seed=0, code=code_version()))
    return results


def test_the_verdict_is_read_off_the_paired_interval_of_the_best_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ALL_ARMS", "study_1e9")
    for name, value in (("BUDGETS", ("study_1e9",)), ("WHOLE_TOKENS", ("MDM", "MDM, tree")), ("DIGITS", ("Prime",))):
        monkeypatch.setattr(tables, name, value)
    results = recorded_study(tmp_path)
    difference = {each["name"]: each for each in results["best"]}["Prime"]["difference"]
    half = (difference["interval_95"][1] - difference["interval_95"][0]) / 2
    at_level = half / stats.t.ppf(0.975, 2) * stats.t.ppf(1 - 0.05 / 9 / 2, 2)
    cell = f"{difference['nats_per_token']:+.3f} ± {half:.3f}, below (± {at_level:.3f} for 9 comparisons)"
    text = verdict_table(tmp_path)
    assert f"| Prime | bound | {cell} |" in text
    of_passes = half / stats.t.ppf(0.975, 2) * stats.t.ppf(1 - 0.05 / 27 / 2, 2)  # at three numbers of passes
    assert f"| Prime | 4 passes | {cell[: cell.index(' (')]} (± {of_passes:.3f} for 27 comparisons) |" in text
    above = {"nats_per_token": 1.0, "interval_95": [0.5, 1.5], "stderr": 0.1}
    assert tables._verdict(above, 3, 9).startswith("+1.000 ± 0.500, ab")
    assert ", level (" in tables._verdict({"nats_per_token": 0.1, "interval_95": [-0.5, 0.7], "stderr": 0.1}, 3, 9)
    with pytest.raises(ValueError, match="a verdict over 1 seed is none"):
        tables._verdict(above, 1, 9)
    families = families_table(tmp_path)
    bound = {each["name"]: each for each in results["best"]}["Prime"]["bound"]["nats_per_token"]
    assert f"| Prime | yes | ≤ {bound:.2f} ± " in families and "| MDM, tree | no | ≤ " in families
    settings = settings_table("study_1e9", tmp_path)
    assert "| Prime | **2.000** | 3.000 | ≤ " in settings and "law of ancestral sampling" in settings
    # The seeds at which nothing was chosen are in no dev bound.
    recorded_study(tmp_path, better="MDM")
    with pytest.raises(ValueError, match="the baseline MDM, tree of study_1e9 is not the best on dev"):
        verdict_table(tmp_path)


def test_the_table_of_seeds_pairs_each_arm_with_the_baseline_of_its_seed(tmp_path):
    results = recorded_study(tmp_path)
    runs = [row for row in results["rows"] if row["shape"] == "16x1"]
    rows = {(row["name"], row["seed"]): row["evaluation"]["bound"] for row in runs}
    lines = tables.seeds_table("study_1e9", tmp_path).splitlines()
    assert lines[0] == "| seed | MDM, tree | MDM; difference ± 95% | Prime; difference ± 95% | interval over |"
    for seed, line in enumerate(lines[2:5]):
        cells = line.strip("| ").split(" | ")
        own = rows["MDM, tree", seed]["nats_per_token"]
        assert cells[:2] == [str(seed), f"≤ {own:.3f}"]
        for cell, name in zip(cells[2:4], ("MDM", "Prime"), strict=True):
            bound = rows[name, seed]["nats_per_token"]
            assert cell.startswith(f"≤ {bound:.3f}; {bound - own:+.3f} ± ")
    mean = {each["name"]: each["difference"] for each in results["best"]}["Prime"]["nats_per_token"]
    assert f"; {mean:+.3f} ± " in lines[5] and lines[5].endswith("| 3 seeds |")
    record = read_record(tmp_path / "compare_study_1e9.json")
    record["results"]["rows"].pop(1)
    write_json(tmp_path / "compare_study_1e9.json", record)
    with pytest.raises(ValueError, match="study_1e9 has not one run of each arm at seed 0"):
        tables.seeds_table("study_1e9", tmp_path)


def test_the_table_of_orders_pairs_each_bound_with_that_of_the_tree_embedded_mdm(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ORDERS", {"a text": ("order_a", "order_b"), "another": ("order_c",)})
    rows = {
        name: record_of(Run(name, "16x1", 1e9, 0, {}))["results"]["evaluation"]["bound"] for name in ("MDM", "Prime")
    }
    tree = {**rows["MDM"], "model": "MDM_tree-16x1", "method": "token"}
    nested = {**rows["Prime"], "model": "nested-16x1", "method": "coarse_first"}
    for name, found in (
        ("order_a", [nested, tree]),
        ("order_b", [{**nested, "method": "nested"}, {**rows["Prime"], "model": "ARM", "method": "causal"}]),
        ("order_c", [tree]),
    ):
        write_json(tmp_path / f"{name}.json", make_record("perplexity", {"rows": found}, seed=0, code=code_version()))
    distance = paired(nested, tree)
    half = (distance["interval_95"][1] - distance["interval_95"][0]) / 2
    cell = f"≤ {nested['nats_per_token']:.3f} ± 0.300; {distance['nats_per_token']:+.3f} ± {half:.3f}"
    own = f"≤ {tree['nats_per_token']:.3f} ± 0.300; –"
    lines = tables.orders_table(tmp_path).splitlines()[2:5]
    assert lines == [
        f"| MDM_tree-16x1 | token | {own} | {own} |",
        f"| nested-16x1 | coarse_first | {cell} | – |",
        f"| nested-16x1 | nested | {cell} | – |",
    ]
