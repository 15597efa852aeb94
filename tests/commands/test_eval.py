"""`prime-v2 eval`: what it makes of its arguments, what it prints and records, and lm-eval's own command."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from command_runs import of_command
from installed import link_package, make_environment
from task_files import own_cache, write_questions  # noqa: F401

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.commands import eval as commands_eval
from prime_v2.commands.eval import call_lm_eval, parse_arguments, summarise
from prime_v2.eval.offline_tasks import PAPER, parse_splits, write_tasks
from prime_v2.output.records import read_record
from prime_v2.tokenization.bpe import train_bpe

# As lm-eval returns them: one document scored by two metrics, and a generated answer read by a filter.
RESULTS = {
    "results": {
        "boolq": {"name": "boolq", "alias": "boolq", "sample_len": 4, "acc,none": 0.75, "acc_stderr,none": 0.25},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
        "perplexity": {"word_perplexity,none": float("inf")},
    },
    "configs": {
        "boolq": {"metadata": {"version": 2.0, "scored_split": "train", "data_sha256": "abc"}, "test_split": "x"},
        "gsm8k": {"metadata": {"version": 3.0}, "test_split": "test", "validation_split": None},
    },
    "versions": {"boolq": 2.0, "gsm8k": 3.0},
    "n-shot": {"boolq": 0, "gsm8k": 5},
    "n-samples": {"boolq": {"original": 9, "effective": 4}, "gsm8k": {"original": 8, "effective": 8}},
    "config": {
        "model": "prime_v2",
        "model_args": {"pretrained": "/somewhere/else/model", "seed": 3},
        "model_dtype": torch.float32,
        "likelihood": {"method": "subtoken", "draws_per_choice": float("nan")},
    },
    "chat_template": "{{ messages }}",
}
run, refused = of_command("eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "data")


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    """What lm-eval's command is called with, which here returns RESULTS; with it the task files that it would read."""
    seen: list = []

    def call(arguments):
        paths = [value for key, value in zip(arguments, arguments[1:], strict=False) if key == "--include_path"]
        made = [yaml.safe_load(path.read_text()) for folder in paths for path in sorted(Path(folder).glob("*.yaml"))]
        seen.append((arguments, made))
        print("the table of lm-eval")
        return RESULTS

    monkeypatch.setattr(commands_eval, "call_lm_eval", call)
    return seen


# ------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["DIR", "--tasks", "sciq"],
            ["run", "--model", "prime_v2", "--tasks", "sciq", "--model_args", '{"pretrained": "DIR"}'],
        ),
        (
            ["--model_args", "pretrained=DIR,seed=1", "-t", "sciq,boolq", "arc_easy", "-L", "3", "--tasks", "anli"],
            [
                *("run", "--model", "prime_v2", "--tasks", "sciq,boolq,arc_easy,anli_r1,anli_r2,anli_r3"),
                *("--model_args", "pretrained=DIR,seed=1", "-L", "3"),
            ],
        ),
        (
            ["run", "-M", "hf", "-a", "pretrained=gpt2", "dtype=float32", "--tasks=paper", "--include_path", "mine"],
            [
                *("run", "--model", "hf", "--tasks", ",".join(PAPER), "--include_path", "mine"),
                *("-a", "pretrained=gpt2", "dtype=float32"),
            ],
        ),
        (["--model", "dummy", "--tasks", "sciq"], ["run", "--model", "dummy", "--tasks", "sciq"]),
        (
            ["a,b=c", "--tasks", "sciq", "--output_path", "there", "--apply_chat_template"],
            [
                *("run", "--model", "prime_v2", "--tasks", "sciq", "--model_args", '{"pretrained": "a,b=c"}'),
                *("--output_path", "there", "--apply_chat_template"),
            ],
        ),
        (["--config", "run.yaml", "-s"], ["run", "--config", "run.yaml", "-s"]),
    ],
)
def test_arguments_go_to_lm_eval_with_model_and_tasks_filled_in(given, expected):
    assert parse_arguments(given).for_lm_eval() == expected


def test_what_is_missing_is_said_at_once(data, tmp_path, calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused() == (
        "no model was named; give its folder or Hub name first, as in prime-v2 eval MODEL --tasks sciq, or add "
        "--model_args pretrained=MODEL"
    )
    assert "add --model_args pretrained=MODEL" in refused("--tasks", "sciq", "--model_args", "seed=1")
    assert refused("DIR").startswith("no task was named; add --tasks sciq,boolq,arc_easy, or --tasks paper")
    assert refused("DIR", "--tasks", "sciq", "-a", "pretrained=OTHER") == (
        "DIR and pretrained= name a model each; leave one out"
    )
    assert refused("DIR", "--tasks") == "argument --tasks/-t: expected at least one argument"
    (tmp_path / "there.json").touch()
    assert "there.json exists; give another name" in refused("DIR", "--output", tmp_path / "there.json")
    both = ["DIR", "--include_path", "mine", "--tasks", "boolq"]
    assert refused(*both, "--data", data) == "--data and --include_path both say where the tasks are; leave one out"
    assert refused(*both, "--split", "train").startswith("--split and --include_path both")
    assert refused("--config", "run.yaml", "--split", "train") == "--split needs --tasks on the command line"
    assert refused("DIR", "--tasks", "hellaswag", "--data", data).startswith("the task hellaswag cannot be read")
    assert refused("DIR", "--tasks", "gsm8k", "--data", data).endswith(
        "has only train.jsonl; --split gsm8k=train scores it, and --tasks without it leaves it out"
    )
    assert calls == []


# ------------------------------------------------------------------------------------------------- results


def test_own_task_files_are_there_while_lm_eval_runs_and_the_split_is_shown(data, calls):
    done = run("DIR", "--tasks", "boolq,arc_easy", "--data", data, "--split", "boolq=train")
    assert done.exit_code == 0, done.stderr
    ((arguments, made),) = calls
    assert [(each["task"], each["metadata"]["scored_split"]) for each in made] == [
        ("arc_easy", "test"),
        ("boolq", "train"),
    ]
    assert not Path(arguments[arguments.index("--include_path") + 1]).exists()
    assert done.stdout == (
        "the table of lm-eval\n"
        "boolq     train: 3 questions, few-shot examples from train (without the question itself)\n"
        "arc_easy  test: 3 questions, few-shot examples from train\n"
    )


def test_record_holds_each_number_with_its_error_and_what_it_was_computed_from(tmp_path, data, calls):
    output = tmp_path / "eval.json"
    done = run("DIR", "--tasks", "boolq", "--data", data, "--json", "--output", output)
    summary = json.loads(done.stdout)
    assert "the table of lm-eval" in done.stderr
    record = read_record(output)
    assert record["results"] == summary
    assert (record["name"], record["seed"]) == ("eval", 3)
    assert summary["data"] == "data"
    assert json.loads(run("DIR", "--tasks", "boolq", "--json").stdout)["data"] == "hub"


def test_summary_has_a_row_for_each_task_metric_and_filter():
    summary = summarise(RESULTS, None)
    first, second, third = summary["scores"]
    assert first == {
        "task": "boolq",
        "version": 2.0,
        "metric": "acc",
        "filter": "none",
        "value": 0.75,
        "stderr": 0.25,
        "n": 4,
        "n_in_split": 9,
        "num_fewshot": 0,
        "scored_split": "train",
        "data_sha256": "abc",
    }
    assert (second["metric"], second["filter"], second["stderr"]) == ("exact_match", "strict-match", None)
    assert (second["scored_split"], second["num_fewshot"], second["n"]) == ("test", 5, 8)
    assert (third["value"], third["stderr"], third["scored_split"]) == (None, None, None)
    assert summary["config"]["model_args"] == {"pretrained": "model", "seed": 3}
    assert summary["config"]["model_dtype"] == "torch.float32"
    assert summary["config"]["likelihood"] == {"method": "subtoken", "draws_per_choice": None}
    assert summary["chat_template"] is True


def test_nothing_is_written_when_scoring_fails(tmp_path, monkeypatch):
    def fail(arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(commands_eval, "call_lm_eval", fail)
    done = run("DIR", "--tasks", "boolq", "--output", tmp_path / "eval.json")
    assert done.exit_code == 1
    assert isinstance(done.exception, RuntimeError)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- with lm-eval


def test_lm_eval_runs_in_this_process_and_leaves_it_as_it_was(data, tmp_path, monkeypatch, capfd):
    """Its model of random answers; the scan of lm-eval's own ten thousand task files is left out."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    keep = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **given: keep(self, include_defaults=False, **given))
    before = (list(sys.argv), lm_eval.simple_evaluate)
    monkeypatch.chdir(tmp_path)  # no checkout
    output = tmp_path / "eval.json"
    tasks = ["--model", "dummy", "--tasks", "sciq,gsm8k", "--num_fewshot", 1, "--split", "gsm8k=train"]
    done = run(*tasks, "--data", data, "--output", output)
    assert done.exit_code == 0, done.stderr
    assert (list(sys.argv), lm_eval.simple_evaluate) == before
    assert "fatal" not in capfd.readouterr().err  # of git, which lm-eval asks for the commit
    assert "|acc_norm" in done.stdout
    assert "±" in done.stdout
    results = read_record(output)["results"]
    assert [(row["task"], row["metric"], row["n"]) for row in results["scores"]] == [
        *(("sciq", "acc", 3), ("sciq", "acc_norm", 3)),
        *(("gsm8k", "exact_match", 3), ("gsm8k", "exact_match", 3)),
    ]
    assert {row["task"]: row["scored_split"] for row in results["scores"]} == {"sciq": "validation", "gsm8k": "train"}
    assert results["lm_eval"] == lm_eval.__version__
    assert results["config"]["model"] == "dummy"

    refused_by_lm_eval = {
        ("--speed", 3): "unrecognized arguments: --speed 3",
        ("--limit", "few"): "argument --limit/-L: invalid float value: 'few'",
        ("--limit", -1): "--limit -1 must be above 0: a number of questions, or below 1 a share; use 100",
        ("--num_fewshot", -1): "--num_fewshot -1 must be at least 0; use 0",
        ("--samples", "x"): '--samples x is neither JSON, such as {"sciq": [0, 1]}, nor a file of it',
        ("--seed", "x"): "argument --seed: invalid value: 'x'",
        ("--log_samples",): "Specify --output_path if providing --log_samples or --predict_only",
    }
    for options, message in refused_by_lm_eval.items():
        assert refused("--model", "dummy", "--tasks", "sciq", "--data", data, *options) == message
    assert refused("--model", "dummy", "--tasks", "nothing") == "Tasks not found: nothing"


def test_other_sub_commands_and_the_short_help_are_those_of_lm_eval(capsys):
    with pytest.raises(SystemExit) as stop:
        call_lm_eval(["run", "-h"])
    assert not stop.value.code
    assert "--fewshot_as_multiturn" in capsys.readouterr().out
    assert "usage: lm-eval list" in run("ls", "-h").stdout
    assert "--fewshot_as_multiturn" in run("-h").stdout


@pytest.mark.slow
def test_the_real_command_of_lm_eval_scores_a_model(tmp_path, data):
    """Word for word, in an environment that has the start-up line as an installation has it."""
    pytest.importorskip("prime_v2.eval.lm")
    torch.manual_seed(0)
    texts = [path.read_text() for path in sorted(data.rglob("*.jsonl"))]
    tokenizer = build_tokenizer(train_bpe(texts, 300), special_tokens={"eos_token": "<|endoftext|>"})
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    model = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=300, eos_token_id=0, pad_token_id=0, **shape))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks", ["sciq", "boolq", "arc_easy"], parse_splits([]), data)

    link_package(tmp_path / "packages")
    python = make_environment(tmp_path / "home", tmp_path / "packages", Path(sysconfig.get_path("purelib")))
    arguments = "--model prime_v2 --model_args pretrained=model,num_samples=4 --tasks sciq,boolq,arc_easy"
    place = "--include_path tasks --output_path results.json"
    command = [python, "-m", "lm_eval", *arguments.split(), *place.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prime_v2 ({'pretrained': 'model', 'num_samples': 4})")
    (written,) = tmp_path.glob("results_*.json")
    results = json.loads(written.read_text())
    counts = {task: results["n-samples"][task]["effective"] for task in results["results"]}
    assert counts == {"sciq": 3, "boolq": 3, "arc_easy": 3}
    assert results["configs"]["sciq"]["metadata"]["scored_split"] == "validation"
    for task, metrics in results["results"].items():
        assert metrics["acc,none"] * 3 in (0, 1, 2, 3), task
    assert results["config"]["likelihood"]["choices"] == 3 * (4 + 2 + 3)
