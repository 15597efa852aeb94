"""What the lm-eval model refuses, warns of and notes: perplexities of scores that are no bounds, the demo's model."""

import dataclasses
import errno
import json
import logging
import shutil
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from saved_models import save_model
from task_files import own_cache, write_questions  # noqa: F401
from typer.testing import CliRunner

from prime_v2 import PrimeV2ForMaskedDiffusion
from prime_v2.commands.main import app
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.lm_settings import ScoreFile
from prime_v2.eval.plugin import register

TEXTS = ["the quick brown fox jumps over the lazy dog", "a fox is no dog, and a dog is no fox"]
# As lm-eval's LAMBADA, and as its WikiText, on local files.
CLOZE = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{word}}"}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
METRICS = {"perplexity": CLOZE} | dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte"), ROLLING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("rules") / "model", TEXTS * 3)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "data")


def write_task(folder: Path, metric: str) -> Path:
    """A folder for --include_path with the task `cloze` of this metric."""
    folder.mkdir()
    lines = [{"text": text, "word": "dog"} for text in TEXTS]
    (folder / "cloze.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"task": "cloze", "dataset_path": "json", "test_split": "test", **METRICS[metric]}
    task["dataset_kwargs"] = {"data_files": {"test": str(folder / "cloze.jsonl")}}
    task["metric_list"] = [{"metric": metric}]
    (folder / "cloze.yaml").write_text(yaml.safe_dump(task))
    return folder


def no_scoring(monkeypatch) -> None:
    def score(*arguments, **options):
        raise AssertionError("scored before it was refused")

    for name in ("loglikelihood", "loglikelihood_rolling"):
        monkeypatch.setattr(PrimeV2LM, name, score)


@pytest.mark.parametrize("metric", METRICS)
def test_prime_v2_eval_refuses_a_perplexity_of_what_is_no_bound_before_any_scoring(
    metric, folder, tmp_path, monkeypatch
):
    no_scoring(monkeypatch)
    task = write_task(tmp_path / "tasks", metric)
    arguments = ["--model_args", f"pretrained={folder},method=paper_loss,num_samples=2", "--tasks", "cloze"]
    result = CliRunner().invoke(app, ["eval", *arguments, "--include_path", str(task)])
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1] == (
        f"prime-v2 eval: error: the task cloze reports {metric}, but paper_loss is no likelihood of this model, "
        f"so no perplexity follows from it; use method=subtoken"
    )


@pytest.mark.parametrize("metric", ["perplexity", "word_perplexity"])
def test_lm_evals_own_command_refuses_it_too(metric, folder, tmp_path):
    register()
    manager = TaskManager(include_path=str(write_task(tmp_path / "tasks", metric)))
    arguments = {"pretrained": str(folder), "method": "paper_loss", "num_samples": 2}
    with pytest.raises(ValueError, match="no likelihood of this model, so no perplexity follows.*use method=subtoken"):
        lm_eval.simple_evaluate("prime_v2", model_args=arguments, tasks=["cloze"], task_manager=manager)


def test_a_perplexity_of_a_likelihood_is_reported(folder, tmp_path):
    task = write_task(tmp_path / "tasks", "perplexity")
    result = CliRunner().invoke(app, ["eval", str(folder), "--tasks", "cloze", "--include_path", str(task), "--json"])
    assert result.exit_code == 0, result.output
    (score,) = json.loads(result.stdout)["scores"]
    assert score["metric"] == "perplexity" and score["value"] > 1


@pytest.mark.parametrize("method", ["chain", "subtoken", "token", "orders"])
def test_any_method_that_the_model_says_is_no_bound_falls_under_the_rule(method, folder, monkeypatch, caplog):
    """By `is_bound` of the model's own answer, not by a name."""
    likelihood = PrimeV2ForMaskedDiffusion.log_likelihood

    def unbounded(*arguments, **options):
        return dataclasses.replace(likelihood(*arguments, **options), is_bound=False)

    plain = PrimeV2LM(pretrained=str(folder), method=method)
    assert plain.draws_report()["is_likelihood_or_bound"]
    monkeypatch.setattr(PrimeV2ForMaskedDiffusion, "log_likelihood", unbounded)
    with caplog.at_level(logging.WARNING, "prime_v2"):
        lm = PrimeV2LM(pretrained=str(folder), method=method)
    assert f"method={method} is neither the likelihood of this model nor a bound on it" in caplog.text
    assert not lm.draws_report()["is_likelihood_or_bound"]
    request = Instance("loglikelihood", {}, ("a", " dog"), 0, ("cloze", 0, 1))
    with pytest.raises(ValueError, match=f"task cloze .*single answers.*but {method} is no likelihood of this model"):
        lm.loglikelihood([request], disable_tqdm=True)
    with pytest.raises(ValueError, match="is a text to be scored whole, but"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a dog",), 0, ("x", 0, 1))], True)


def test_every_use_of_the_papers_loss_is_warned_of(folder, caplog):
    for arguments in ({"method": "paper_loss"}, {"published": True}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "prime_v2"):
            PrimeV2LM(pretrained=str(folder), **arguments)
        assert "method=paper_loss is neither the likelihood" in caplog.text


def test_without_a_model_the_better_one_of_the_demo_is_taken(folder, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no model was named; add --model_args pretrained=DIR"):
        PrimeV2LM()
    for name, nats in (("published", 6.2), ("coarse_first", 5.1)):
        place = shutil.copytree(folder, tmp_path / "runs" / "demo" / name)
        (place / "results").mkdir()
        record = {"results": {"evaluation": {"bound": {"nats_per_token": nats}}}}
        (place / "results" / "train.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert PrimeV2LM().config.hidden_size == 16
    said = "prime_v2: no model was named; taking runs/demo/{}, the better model of make demo"
    assert capsys.readouterr().err.splitlines().count(said.format("coarse_first")) == 1

    task = ["--tasks", "boolq", "--data", str(questions), "--limit", "1"]
    result = CliRunner().invoke(app, ["eval", *task, "--json", "--output", "eval.json"])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines().count(said.format("coarse_first")) == 1
    model = json.loads(Path("eval.json").read_text())["results"]["config"]["model_args"]["pretrained"]
    assert model == "runs/demo/coarse_first"

    demo = tmp_path / "runs" / "demo"
    (demo / "coarse_first" / "results" / "train.json").unlink()  # a run that has not finished
    PrimeV2LM()
    assert said.format("published") in capsys.readouterr().err
    (demo / "published" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model was named"):
        PrimeV2LM()


def test_results_have_the_device_that_was_used_and_a_bounded_bootstrap(folder, questions, monkeypatch):
    """lm-eval notes cuda:0 on any machine, and draws 100,000 samples for the standard error of an f1."""
    drawn = []

    def stderr(metric, values, iters):
        drawn.append(iters)
        return 0.5

    monkeypatch.setattr("lm_eval.api.metrics.bootstrap_stderr", stderr)
    task = ["--tasks", "mc_taco", "--data", str(questions), "--json"]
    result = CliRunner().invoke(app, ["eval", str(folder), *task])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (
        found["config"]["device"]
        == found["config"]["model_device"]
        == ("cuda" if torch.cuda.is_available() else "cpu")
    )
    assert drawn == [1000] and found["config"]["bootstrap_iters"] == 1000
    assert {score["stderr"] for score in found["scores"] if score["metric"] == "f1"} == {0.5}


def test_scores_that_cannot_be_written_are_an_error_in_the_log_and_leave_no_file(tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    scores = ScoreFile(str(tmp_path / "scores.jsonl"), rank=0, world_size=1)
    scores.add({"task": "x"})
    monkeypatch.setattr("prime_v2.output.atomic.os.replace", full)
    scores.write()
    assert "scores.jsonl could not be written (No space left on device)" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_recorded_devices_are_ones_that_the_recorded_machine_has():
    for path in sorted((Path(__file__).parents[2] / "results").glob("*.json")):
        record = json.loads(path.read_text())
        device = str(record["results"].get("config", {}).get("device", "cpu"))
        assert record["machine"]["accelerator"] is not None or not device.startswith("cuda"), path.name
