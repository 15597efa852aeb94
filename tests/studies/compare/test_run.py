"""`prime-v2 compare` from end to end on tiny runs: planning, records, resume, interruption, refusals.

Most runs are trained in forks of this process, which spares each the imports; the interrupted one in real processes.
"""

import dataclasses
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_runs import of_command
from compare_runs import NETWORK, TOKENS_PER_STEP, WEIGHTS, Fork, three_runs, use_forks, write

from prime_v2.studies.compare import plan
from prime_v2.studies.compare import run as compare
from prime_v2.studies.compare.children import progress_of
from prime_v2.studies.compare.config import Comparison, number, read_comparison
from prime_v2.studies.compare.differences import paired
from prime_v2.studies.scaling.points import check_one_experiment, read_points
from prime_v2.training.flops import count_parameters
from prime_v2.training.recipes import CONFIGS

APPLICATION = "from prime_v2.commands.main import app; app()"


@pytest.fixture
def forked(monkeypatch) -> list[tuple[str, str]]:
    """Children are forks of this process; of each, its run's folder and its OMP_NUM_THREADS."""
    started: list[tuple[str, str]] = []

    def start(arguments, env, **options):
        started.append((Path(arguments[-1]).stem, env["OMP_NUM_THREADS"]))
        return Fork(arguments, **options)

    use_forks(monkeypatch, start)
    return started


run, _ = of_command("compare")


def refused(*arguments: object) -> str:
    """The last line of a refusal."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("prime-v2 compare: error: ")
    return line.removeprefix("prime-v2 compare: error: ")


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict:
    return three_runs(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory) -> Path:
    """The folder of the comparison, trained; beside it mini.yaml and the record."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patched:
        use_forks(patched, Fork)
        result = run(write(folder, content), "--out", folder / "out", "--output", folder / "record.json")
    assert result.exit_code == 0, result.output
    assert "minus MDM ± 95%" in result.stdout
    assert "[3/3] ARM, 7.71e7 FLOPs, seed 0: 25 steps" not in result.stdout  # what goes on is on stderr
    assert re.search(r"\[3/3\] ARM, .* FLOPs, seed 0: 25 steps", result.stderr)
    return folder


def records_of(folder: Path) -> dict[str, dict]:
    """The records of the runs, by label."""
    found = [json.loads(path.read_text()) for path in folder.glob("out/*/results/train.json")]
    return {record["results"]["label"]: record for record in found}


def test_every_run_has_the_steps_of_its_budget_and_the_same_text_and_order(finished):
    records = records_of(finished)
    assert set(records) == {"MDM", "Prime v2", "ARM"}
    for record in records.values():
        training = record["results"]["training"]
        assert training["parameters_non_embedding"] == WEIGHTS
        assert training["steps"] == 25
        assert training["flops_6nd"] == 25 * 6 * WEIGHTS * TOKENS_PER_STEP
    prints = {json.dumps(record["results"]["data"]["fingerprints"]) for record in records.values()}
    assert len(prints) == 1
    laws = {name: record["results"]["evaluation"].get("sampler", {}) for name, record in records.items()}
    assert [list(laws[name]) for name in ("MDM", "Prime v2", "ARM")] == [["4", "2"], ["4", "2"], []]
    points = read_points([str(finished / "out")])
    assert {point.family for point in points} == {"MDM", "Prime v2", "ARM"}
    assert {point.loss for point in read_points([str(finished / "record.json")])} == {point.loss for point in points}
    check_one_experiment(points)  # prime-v2 scaling takes them as they are


def test_the_summary_holds_the_records_and_their_paired_differences(finished):
    summary = json.loads((finished / "record.json").read_text())
    assert summary == json.loads((finished / "out" / "summary.json").read_text())
    assert summary["name"] == "compare"
    records = records_of(finished)
    nats = {
        name: np.array(record["results"]["evaluation"]["bound"]["nats_of_sequences"])
        for name, record in records.items()
    }
    assert all(len(each) == 12 for each in nats.values())
    for row in summary["results"]["rows"]:
        results = records[row["name"]]["results"]
        assert row["evaluation"]["bound"]["nats_per_token"] == results["evaluation"]["bound"]["nats_per_token"]
        assert row["training"]["seconds"] == results["training"]["seconds"]
        assert row["curve"][-1]["tokens"] == 25 * TOKENS_PER_STEP
        assert [point["tokens"] // TOKENS_PER_STEP for point in row["curve"]] == [*range(3, 25, 3), 25]
        if row["name"] != "MDM":
            gaps = (nats[row["name"]] - nats["MDM"]) / 16
            assert row["difference"]["nats_per_token"] == pytest.approx(gaps.mean())
            bounds = [records[name]["results"]["evaluation"]["bound"] for name in (row["name"], "MDM")]
            assert row["difference"] == paired(*bounds)
            assert bounds[0]["clusters"]["tokens"] == [16 * count for count in bounds[0]["clusters"]["sequences"]]
            assert sum(bounds[0]["clusters"]["sequences"]) == 12
    losses = {row["name"]: row["evaluation"]["paper_loss"] for row in summary["results"]["rows"]}
    assert losses["ARM"] is None
    assert losses["MDM"]["is_bound"] and not losses["Prime v2"]["is_bound"]
    assert "perplexity" not in losses["Prime v2"]


def test_the_folder_keeps_models_tables_and_pictures_but_no_checkpoints(finished):
    out = finished / "out"
    assert len(list(out.glob("*/model.safetensors"))) == 3
    assert not list(out.glob("*/checkpoint-*"))
    assert "| ARM | = " in (out / "README.md").read_text()
    for name in ("curves.png", "bounds.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_trains_nothing(finished, forked):
    result = run(finished / "mini.yaml", "--out", finished / "out", "--json")
    assert result.exit_code == 0, result.output
    assert not forked
    rows = json.loads(result.stdout)["rows"]
    assert rows == json.loads((finished / "record.json").read_text())["results"]["rows"]


def test_a_missing_run_alone_is_trained_again_to_the_same_numbers(finished, forked, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    out = tmp_path / "copy" / "out"
    (record,) = out.glob("Prime_v2-*/results/train.json")
    before = json.loads(record.read_text())["results"]["evaluation"]
    record.unlink()
    result = run(finished / "mini.yaml", "--out", out, "--allow-mixed", "--drop-models")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in forked] == [record.parent.parent.name]
    assert json.loads(record.read_text())["results"]["evaluation"] == before
    assert not list(out.glob("*/*.safetensors"))


def test_the_plan_counts_flops_as_the_runs_do_and_writes_nothing(finished, content, tmp_path):
    config = write(tmp_path, content, count="measured")
    result = run(config, "--out", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mini.yaml"]
    records = records_of(finished)
    for row in json.loads(result.stdout)["runs"]:
        trained = records[row["name"]]["results"]["training"]
        per_token = trained["flops_measured"] / trained["tokens"]
        assert row["flops_measured"] / row["tokens"] == pytest.approx(per_token)
        assert row["steps"] == content["budgets"][0] // (per_token * TOKENS_PER_STEP)
        assert row["flops_6nd"] == 6 * WEIGHTS * row["tokens"]
        assert row["parameters"] == trained["parameters"]
        assert row["state"] == "to do"


def test_a_dry_run_of_finished_runs_says_so(finished):
    result = run(finished / "mini.yaml", "--out", finished / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["finished"] * 3
    assert "3 runs, about 0 s left" in lines[-1]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(content, tmp_path, monkeypatch, request):
    """The command and its run in processes of their own; the signal reaches the command alone."""
    config = write(tmp_path, content, budgets=[28 * content["budgets"][0]], runs={"MDM": content["runs"]["MDM"]})
    out, logs = tmp_path / "out", tmp_path / "out" / "logs"
    arguments = [sys.executable, "-c", APPLICATION, "compare", str(config), "--out", str(out)]
    # A background job of a shell starts with SIGINT ignored, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not any("loss" in progress_of(log) for log in logs.glob("*")):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert printed == ""
    assert "stopped by SIGINT; 0 of 1 runs are finished, the same command goes on from there" in errors
    (checkpoint,) = out.glob("MDM-*/checkpoint-*")
    plan = json.loads(run(config, "--out", out, "--dry-run", "--json").stdout)["runs"][0]
    assert plan["state"] == checkpoint.name.replace("checkpoint-", "step ")
    assert 0 < int(plan["state"].split()[1]) < plan["steps"]
    use_forks(monkeypatch, Fork)
    result = run(config, "--out", out, "--allow-mixed")
    assert result.exit_code == 0, result.output
    (log,) = logs.glob("*")
    assert f"continuing from {checkpoint}" in log.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "there are no runs"),
        ({"runs": {"A": {"family": "armm"}}}, "run A: family armm is not one of prime, arm, uniform, interpolating"),
        ({"runs": {"A": {"familly": "arm"}}}, "run A: unknown field familly; did you mean family?"),
        ({"runs": {"A": None, "B": 3}}, "run B is 3; write e.g. `B: {family: arm}`"),
        ({"runs": {"A-1": None, "A 1": None}, "baseline": "A 1"}, "the name A 1 gives the folder 'A_1', like A-1"),
        ({"runs": {"A": {"label": "B"}, "B": None}, "baseline": "A"}, "two runs have the label B; give each its own"),
        ({"runs": {"A": {"model": {"hiden_size": 8}}}}, "run A: --model hiden_size is no field .*hidden_size"),
        (
            {"runs": {"MDM": None, "A": {"family": "uniform", "model": {"num_subtokens": 9}}}},
            "run A: --model num_subtokens is no field of PrimeV2UniformConfig .*belongs to --family prime and arm",
        ),
        ({"runs": {"A": {"model": {"base": 2, "num_subtokens": 3}}}}, "run A: .*does not fit in num_subtokens=3"),
        (
            {"runs": {"A": {"train": {"lerning_rate": 1}}}},
            "run A: unknown option lerning_rate; did you mean learning_",
        ),
        (
            {"runs": {"A": {"train": {"learning_rate": "fast"}}}},
            "run A: argument --learning_rate.*: invalid float value: 'fast'",
        ),
        ({"runs": {"A": {"train": {"global_batch": 8}}}}, "run A: train: global_batch must be the same for all runs"),
        ({"runs": {"A": {"train": {"model": {}}}}}, "run A: train: write the fields of the model beside `train`"),
        ({"runs": {"A": {"shapes": ["9x9"]}}}, "run A: there is no shape 9x9"),
        ({"runs": {"A": {"budgets": [5]}}}, "run A: 5 is not among the budgets"),
        ({"baseline": "GPT"}, "the baseline GPT is not among the runs MDM, Prime v2, ARM"),
        ({"baselin": "MDM"}, "unknown field baselin; did you mean baseline?"),
        ({"budgets": None}, "there are no budgets"),
        ({"budgets": 1e9}, "budgets is 1000000000.0; give a list"),
        ({"budgets": [-1]}, "the budget -1 must be a number of FLOPs above 0"),
        ({"budgets": ["many"]}, "budgets: 'many' is no number"),
        ({"budgets": [1e9, "1e9"]}, "two budgets are equal"),
        ({"seeds": [0, 0]}, "must be different whole numbers from 0"),
        ({"count": "flops"}, "count=flops is not one of 6nd, measured"),
        ({"shapes": [{"hidden_size": 32}, {"hidden_size": 32}]}, "two shapes, or none of them, are called '32'"),
        ({"shapes": [{"hidden": 32, "name": "a"}]}, "hidden in shapes is no field of family prime"),
        ({"shapes": [3]}, "3 in shapes must hold fields"),
        ({"train": 5}, "train is 5; it holds lines"),
        ({"train": {"seed": 3}}, "train: seed is not for this file: write `seeds`"),
        ({"train": {"warmup_steps": 50}}, "warmup_steps=50 is a number of steps.*e.g. 0.05"),
        ({"train": {"model": {"colour": 1}}}, r"train.model.colour is a field of no family here \(prime, arm\)"),
        ({"train": {"block_size": [1]}}, "run MDM: "),
    ],
)
def test_bad_configs_are_one_sentence_and_write_nothing(content, tmp_path, changes, message):
    baseline = {} if set(changes) != {"runs"} or not changes["runs"] else {"baseline": next(iter(changes["runs"]))}
    sentence = refused(write(tmp_path, content, **baseline, **changes), "--out", tmp_path / "out")
    assert re.search(message, sentence), sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs:\n  A: {family: arm\n", "line 3: expected"),
        ("runs:\n  A: {}\n  A: {}\n", "line 3: A is there twice"),
        ("- 1\n", "holds no comparison"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_what_is_no_config_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert re.search(f"bad.yaml,? ?{message}", refused(path))


def test_a_run_names_its_shapes_as_the_file_does(content, tmp_path):
    shapes = [{"name": "half rate", "hidden_size": 32}, {"name": "whole", "hidden_size": 32}]
    runs = {"MDM": {"shapes": ["half rate"]}, "ARM": {"family": "arm", "shapes": ["whole"]}}
    comparison = read_comparison(str(write(tmp_path, content, shapes=shapes, runs=runs)))
    assert [(each.name, each.shape) for each in comparison.runs] == [("MDM", "half_rate"), ("ARM", "whole")]


def test_an_unknown_name_is_refused_with_those_that_there_are():
    assert re.search("famlies is no file and no recipe; the recipes are .*families", refused("famlies"))


def test_a_budget_below_a_step_is_refused_with_the_smallest_that_works(content, tmp_path):
    sentence = refused(write(tmp_path, content, budgets=[1000]), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = re.search(r"run MDM: the budget 1000 is less than one step .* works for all runs is (\S+)", sentence)
    assert found, sentence
    config = write(tmp_path, content, budgets=[found[1]])
    planned = plan.plan(read_comparison(str(config)), tmp_path / "out", measure=False)
    assert [each.steps for each in planned] == [1, 1, 1]


def test_other_options_in_the_folder_are_refused_by_folder(finished, content, tmp_path):
    train = {**content["train"], "learning_rate": 0.02}
    sentence = refused(write(tmp_path, content, train=train), "--out", finished / "out")
    assert re.search(r"--output_dir .*MDM-.* holds a run with learning_rate=0.01, not 0.02", sentence)


def test_no_run_is_trained_beside_those_of_another_commit(finished, content, forked, tmp_path, monkeypatch):
    """Finished runs alone are reported as they are, since nothing is mixed."""
    monkeypatch.setattr(compare, "code_version", lambda: {"commit": "f" * 40, "uncommitted_changes": False})
    assert run(finished / "mini.yaml", "--out", finished / "out").exit_code == 0
    runs = {**content["runs"], "another": {"family": "arm"}}
    sentence = refused(write(tmp_path, content, runs=runs), "--out", finished / "out")
    assert "was trained by commit" in sentence and not forked


def test_no_run_is_begun_when_the_code_has_become_another_one(content, forked, tmp_path, monkeypatch):
    def version():
        return {"commit": ("b" if forked else "a") * 40, "uncommitted_changes": False}

    monkeypatch.setattr(compare, "code_version", version)
    sentence = refused(write(tmp_path, content), "--out", tmp_path / "out")
    assert f"the code is that of commit {'b' * 40} now" in sentence and len(forked) == 1
    (folder,) = [each.parent.parent for each in (tmp_path / "out").glob("*/results/train.json")]
    assert folder.name.startswith("MDM"), "what ran has ended"


def test_a_quoted_number_in_a_recipe_is_the_number(content, tmp_path):
    train = {**content["train"], "eval_sequences": "8", "test_sequences": "8"}
    config = write(tmp_path, content, train=train)
    planned = plan.plan(read_comparison(str(config)), tmp_path / "out", measure=False)
    assert {(each.options["eval_sequences"], each.options["test_sequences"]) for each in planned} == {(8, 8)}


def test_folders_of_something_else_or_in_use_are_refused(finished, content, tmp_path):
    config = write(tmp_path, content)
    assert "is not empty and holds no comparison" in refused(config, "--out", tmp_path)
    other = config.rename(tmp_path / "other.yaml")
    assert "holds the comparison mini, not other" in refused(other, "--out", finished / "out")
    (tmp_path / "file").touch()
    assert "is not a folder" in refused(other, "--out", tmp_path / "file")
    with open(finished / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use" in refused(finished / "mini.yaml", "--out", finished / "out")


def test_a_failed_run_does_not_stop_the_others_and_is_named(content, forked, tmp_path, monkeypatch):
    """Two at a time, on half of the threads each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    runs = {"MDM": {"train": {"codes": "nothing.npy"}}, "ARM": {"family": "arm"}}
    config = write(tmp_path, content, runs=runs, budgets=[content["budgets"][0] / 5])
    sentence = refused(config, "--out", tmp_path / "out", "--jobs", 2)
    assert re.search(r"run MDM, .* failed: --codes nothing.npy .*log: .*; the same command tries again", sentence)
    assert [threads for _, threads in forked] == ["1", "1"]
    assert list(records_of(tmp_path)) == ["ARM"]


def test_a_launcher_that_is_not_there_is_refused(content, tmp_path):
    sentence = refused(write(tmp_path, content), "--out", tmp_path / "out", "--launcher", "no_such_program -x")
    assert sentence == "--launcher no_such_program: No such file or directory"
    sentence = refused(write(tmp_path, content), "--out", tmp_path / "new", "--launcher", "'a")
    assert sentence == "--launcher 'a is no command (No closing quotation); close its quotation marks"
    assert not (tmp_path / "new").exists()


def one_sequence_a_micro_batch(comparison: Comparison) -> Comparison:
    """FLOPs are measured on micro-batches, and those for a GPU take minutes here; nor is GPT-2's tokenizer at hand."""
    runs = []
    for run in comparison.runs:
        options = run.options | {"per_device_train_batch_size": 1}
        if options["tokenizer"] == "gpt2":
            options |= {"tokenizer": "bpe", "bpe_vocab_size": 50_257}
        runs.append(dataclasses.replace(run, options=options))
    return dataclasses.replace(comparison, runs=tuple(runs))


@pytest.mark.parametrize("path", sorted((CONFIGS / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_made_comparisons_can_be_planned(path, tmp_path):
    comparison = one_sequence_a_micro_batch(read_comparison(path.stem))
    planned = plan.plan(comparison, tmp_path, measure=False)
    assert all(each.steps >= 30 for each in planned)
    spread = {}
    for each in planned:  # what is compared has the same FLOPs, but for less than a step
        flops = each.cost.flops(comparison.count) * each.tokens
        assert flops <= each.run.budget < flops * (1 + 1 / each.steps)
        spread.setdefault((each.run.shape, each.run.name), set()).add(each.cost.non_embedding)
    assert all(len(sizes) == 1 for sizes in spread.values())


def test_a_network_is_measured_once(monkeypatch, tmp_path):
    """The eight settings of `tuning` are of one network an arm, with equal steps."""
    measured, cost_of = [], plan.cost_of
    monkeypatch.setattr(plan, "cost_of", lambda *args: measured.append(args[-1]) or cost_of(*args))
    comparison = one_sequence_a_micro_batch(read_comparison("tuning"))
    planned = plan.plan(comparison, tmp_path, measure=False)
    names = {run.name for run in comparison.runs}
    assert len(measured) == len(names) < len(planned)
    study = read_comparison("study_1e12")
    sizes = {(run.shape, plan._network_of(run, study)) for run in study.runs if run.name == "MDM"}
    assert len(sizes) == len({network for _, network in sizes}) == 4  # other sizes are other networks, seeds are not
    assert all(len({each.steps for each in planned if each.run.name == name}) == 1 for name in names)


def test_other_rates_of_a_recorded_network_have_its_steps(monkeypatch, tmp_path):
    """And not those that its own text would have cost, nor what another machine or version measures."""
    comparison = one_sequence_a_micro_batch(read_comparison("tuning"))
    some = tuple(run for run in comparison.runs if run.name == "MDM")
    training = {"parameters": 9, "parameters_non_embedding": 8, "flops_measured": 3e6, "tokens": 2, "steps": 77}
    recorded = [(some[0], {"results": {"training": training}})]
    monkeypatch.setattr(plan, "cost_of", lambda *args: pytest.fail("measured"))
    planned = plan.plan(dataclasses.replace(comparison, runs=some), tmp_path, measure=False, recorded=recorded)
    assert len(planned) == len(some) - 1
    assert {(each.cost.measured, each.steps) for each in planned} == {(1.5e6, 77)}


def test_numbers_of_flops_are_short():
    assert [number(each) for each in (3e12, 1.5e13, 1000.0, 2.5)] == ["3e12", "1.5e13", "1000", "2.5"]


def test_the_network_of_these_tests_is_the_size_that_they_say():
    """WEIGHTS by the layers' shapes, beside what the model itself counts."""
    from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion

    model = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=300, **NETWORK))
    assert count_parameters(model)["non_embedding"] == WEIGHTS
