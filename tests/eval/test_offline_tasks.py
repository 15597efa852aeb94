"""Task files for lm-eval: which split they score, what they refuse, and that lm-eval runs every one of them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from task_files import FOLDERS, own_cache, read_rows, write_questions, write_rows  # noqa: F401
from typer.testing import CliRunner

from prime_v2.commands.main import app
from prime_v2.eval.offline_tasks import (
    ALL_TASKS,
    PAPER,
    TASKS,
    WrittenTask,
    expand_tasks,
    parse_splits,
    tasks_in,
    write_tasks,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Read only. The name of the folder is a pattern for whoever does not escape it."""
    return write_questions(tmp_path_factory.mktemp("data") / "questions[1]")


@pytest.fixture
def own_data(tmp_path) -> Path:
    """To change."""
    return write_questions(tmp_path / "data")


def upstream_file(task: str) -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / TASKS[task].yaml


def content(out: Path, task: str) -> dict:
    return yaml.safe_load((out / f"{task}.yaml").read_text())


# ------------------------------------------------------------------------------------------------- names and splits


def test_paper_names_its_eight_tasks():
    assert expand_tasks(["paper"]) == list(PAPER)
    questions = ["sciq", "social_iqa", "mc_taco", "truthfulqa_mc1", "truthfulqa_mc2", "boolq"]
    assert list(PAPER) == [*questions, "anli_r1", "anli_r2", "anli_r3", "arc_easy", "openbookqa"]
    assert expand_tasks(["boolq", "anli", "anli_r2", "hellaswag", "boolq"]) == [
        *("boolq", "anli_r1", "anli_r2", "anli_r3", "hellaswag")
    ]


def test_splits_are_given_for_all_tasks_or_by_task():
    assert parse_splits([]) == {}
    assert parse_splits(["train"]) == {ALL_TASKS: "train"}
    assert parse_splits(["validation,boolq=train", "anli=test"]) == {
        **{ALL_TASKS: "validation", "boolq": "train"},
        **dict.fromkeys(("anli_r1", "anli_r2", "anli_r3"), "test"),
    }
    for items, message in (
        (["dev"], "--split dev must be one of train, validation, test, or TASK="),
        (["boolq=all"], "--split boolq=all must be one of"),
        (["train", "test"], "--split names all tasks twice"),
        (["anli=train", "anli_r1=test"], "--split names anli_r1 twice"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_splits(items)


def test_table_agrees_with_the_files_of_lm_eval(tmp_path):
    """For data on the Hub, where the split that lm-eval scores by itself keeps lm-eval's own fields."""
    usual = dict.fromkeys(("social_iqa", "truthfulqa_mc1", "truthfulqa_mc2", "boolq", "piqa"), "validation")
    written = write_tasks(tmp_path / "tasks", list(TASKS), {})
    assert [each.task for each in written] == list(TASKS)
    assert {each.task: each.scored_split for each in written} == dict.fromkeys(TASKS, "test") | usual
    for task in TASKS:
        made = content(tmp_path / "tasks", task)
        assert made["include"] == str(upstream_file(task))
        assert re.search(rf"^task: {task}$", upstream_file(task).read_text(), re.MULTILINE)
        assert "dataset_path" not in made
        assert made["tag"] is None
    made = content(tmp_path / "tasks", "anli_r2")
    assert (made["training_split"], made["validation_split"], made["test_split"]) == ("train_r2", None, "test_r2")
    assert made["metadata"] == {"version": 1.0, "scored_split": "test", "fewshot_split": "train"}


def test_another_split_of_the_hub_is_scored(tmp_path):
    write_tasks(tmp_path / "tasks", ["boolq", "anli_r3"], parse_splits(["train", "anli_r3=validation"]))
    boolq, anli = content(tmp_path / "tasks", "boolq"), content(tmp_path / "tasks", "anli_r3")
    assert (boolq["test_split"], boolq["fewshot_split"], boolq["validation_split"]) == ("train", "train", None)
    assert (anli["test_split"], anli["fewshot_split"], anli["training_split"]) == ("dev_r3", "train_r3", "train_r3")
    with pytest.raises(ValueError, match="mc_taco has no train split; it has validation, test"):
        write_tasks(tmp_path / "none", ["mc_taco"], parse_splits(["train"]))
    with pytest.raises(ValueError, match="boolq has no test split; it has train, validation"):
        write_tasks(tmp_path / "none", ["boolq"], parse_splits(["test"]))


@pytest.mark.parametrize(
    ("files", "split", "scored", "fewshot", "fields"),
    [
        # fields: training, validation, test, few-shot. lm-eval's own where it would do the same.
        ("train validation test", [], "test", "train", ("train", None, "test", None)),
        ("validation test", [], "test", "validation", (None, None, "test", "validation")),
        ("train validation", [], "validation", "train", ("train", None, "validation", "train")),
        ("test", [], "test", "test", (None, None, "test", "test")),
        ("validation", [], "validation", "validation", (None, None, "validation", "validation")),
        ("train validation test", ["train"], "train", "train", ("train", None, "train", "train")),
        ("train", ["arc_easy=train"], "train", "train", ("train", None, "train", "train")),
        ("train validation test", ["validation"], "validation", "train", ("train", None, "validation", "train")),
    ],
)
def test_scored_split_is_the_one_asked_for_or_test_or_validation(
    own_data, tmp_path, files, split, scored, fewshot, fields
):
    for path in (own_data / "arc_easy").iterdir():
        if path.stem not in files.split():
            path.unlink()
    (written,) = write_tasks(tmp_path / "tasks", ["arc_easy"], parse_splits(split), own_data)
    assert (written.task, written.scored_split, written.fewshot_split) == ("arc_easy", scored, fewshot)
    made = content(tmp_path / "tasks", "arc_easy")
    names = ("training_split", "validation_split", "test_split", "fewshot_split")
    assert tuple(made[name] for name in names) == fields
    assert made["dataset_kwargs"]["data_files"] == {
        name: str(own_data / "arc_easy" / f"{name}.jsonl") for name in (scored, fewshot)
    }
    about = {key: value for key, value in vars(written).items() if key != "task"}
    assert made["metadata"] == {"version": 1.0, **about}
    assert written.num_questions == 3


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("sciq", {"support": None}, "sciq/validation.jsonl line 2: the field 'support' is null; it must be a text"),
        ("sciq", {"distractor2": ""}, "the field 'distractor2' is \"\"; it must be a text that is not empty"),
        ("social_iqa", {"label": 1}, 'the field \'label\' is 1; it must be one of "1", "2", "3"'),
        ("mc_taco", {"label": True}, "the field 'label' is true; it must be one of 0, 1"),
        ("boolq", {"label": -1}, "boolq/validation.jsonl line 2: the field 'label' is -1; it must be one of 0, 1"),
        ("anli", {"label": 3}, "anli/dev_r1.jsonl line 2: the field 'label' is 3; it must be one of 0, 1, 2"),
        ("piqa", {"label": 1.0}, "the field 'label' is 1.0; it must be one of 0, 1"),
        ("openbookqa", {"answerKey": "E"}, "the field 'answerKey' is \"E\"; it must be among the labels of choices"),
        ("openbookqa", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "two or more texts that are not empty"),
        ("truthfulqa_mc", {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}}, "only the first being 1"),
        ("truthfulqa_mc", {"mc2_targets": {"choices": ["a", "b"], "labels": [0, 0]}}, "one or more of them 1"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_line(own_data, tmp_path, folder, change, message):
    path = next(path for path in (own_data / folder).iterdir() if path.stem in ("validation", "dev_r1"))
    rows = read_rows(path)
    rows[1] |= change
    write_rows(path, rows)
    task = next(name for name, source in TASKS.items() if source.folder == folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_tasks(tmp_path / "tasks", ["gsm8k", task], {"gsm8k": "train"}, own_data)
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize("task", TASKS)
def test_every_field_of_a_task_is_asked_for(own_data, tmp_path, task):
    files = list((own_data / TASKS[task].folder).iterdir())
    rows = {path: read_rows(path) for path in files}
    for name in TASKS[task].fields:
        for path, kept in rows.items():
            write_rows(path, [{key: value for key, value in row.items() if key != name} for row in kept])
        with pytest.raises(ValueError, match=f"line 1 lacks the field '{name}'; {task} needs "):
            write_tasks(tmp_path / "tasks", [task], {"gsm8k": "train"} if task == "gsm8k" else {}, own_data)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "boolq/validation.jsonl is empty; it must hold a question a line"),
        ("\n \n", "boolq/validation.jsonl is empty"),
        ('{"question": \n', "boolq/validation.jsonl line 1 is not JSON"),
        ("\n[1]\n", "boolq/validation.jsonl line 2 is not a JSON object"),
        (b"\xff\n", "boolq/validation.jsonl line 1 is not JSON"),
    ],
)
def test_files_that_hold_no_questions_are_refused(own_data, tmp_path, lines, message):
    (own_data / "boolq" / "validation.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(ValueError, match=message):
        write_tasks(tmp_path / "tasks", ["boolq"], {}, own_data)


def test_what_is_not_there_is_refused_by_name(own_data, tmp_path):
    def refusal(tasks: list[str], *splits: str, data: Path | None = own_data) -> str:
        with pytest.raises(ValueError) as caught:
            write_tasks(tmp_path / "tasks", tasks, parse_splits(splits), data)
        assert not (tmp_path / "tasks").exists()
        return str(caught.value)

    assert refusal(["gsm8k"]) == (
        f"gsm8k: {own_data}/gsm8k has only train.jsonl; --split gsm8k=train scores it, and --tasks without it leaves "
        "it out"
    )
    assert refusal(["boolq"], "boolq=test") == "boolq has no test split; it has train, validation"
    assert refusal(["sciq"], "test").endswith("sciq/test.jsonl does not exist; there is validation.jsonl")
    assert refusal(["hellaswag"]).startswith(
        "the task hellaswag cannot be read from local files; those that can are sciq, "
    )
    assert refusal(["hellaswag"], data=None).startswith("the task hellaswag cannot be scored on another split; those")
    assert refusal(["arc_eazy"]).endswith("; did you mean arc_easy?")
    assert refusal(["sciq"], "boolq=train") == "--split names boolq, which is not among the tasks sciq"
    assert refusal([]).startswith("no task was named; give some of ")
    for path in (own_data / "sciq").iterdir():
        path.rename(path.with_name("dev.jsonl"))
    assert refusal(["sciq"]).endswith(
        "/sciq holds none of train.jsonl, validation.jsonl, test.jsonl; give one of them"
    )
    assert refusal(["sciq"], data=tmp_path / "nowhere").endswith(
        "nowhere is not a folder; give the folder that holds the folders of the tasks"
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "other.yaml").touch()
    with pytest.raises(ValueError, match="is not an empty folder; give a new one"):
        write_tasks(tmp_path / "tasks", ["boolq"], {}, own_data)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="holds no folder of a task; its folders must be named sciq, social_"):
        tasks_in(tmp_path / "nothing", {})


# ------------------------------------------------------------------------------------------------- the command


def test_tasks_command_writes_the_tasks_that_are_there(own_data, tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(app, ["tasks", *map(str, arguments)])

    refused = run(own_data, tmp_path / "out", "--tasks", "gsm8k")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"prime-v2 tasks: error: gsm8k: {own_data}/gsm8k has only train.jsonl")
    assert not (tmp_path / "out").exists()

    usual = run(own_data, tmp_path / "usual", "--json")
    assert [each["task"] for each in json.loads(usual.stdout)] == [name for name in TASKS if name != "gsm8k"]

    (own_data / "piqa" / "validation.jsonl").unlink()
    done = run(own_data, tmp_path / "out", "--split", "gsm8k=train", "--json")
    assert done.exit_code == 0, done.stderr
    written = [WrittenTask(**each) for each in json.loads(done.stdout)]
    assert [each.task for each in written] == [name for name in TASKS if name != "piqa"]
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {each.task for each in written}

    plain = run(own_data, tmp_path / "two", "--tasks", "boolq,anli_r1")
    assert plain.stdout == (
        "boolq    validation: 3 questions, few-shot examples from train\n"
        "anli_r1  validation: 3 questions, few-shot examples from validation (without the question itself)\n"
    )


# ------------------------------------------------------------------------------------------------- in lm-eval


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory) -> dict:
    """Results and samples of all tasks with lm-eval's model of random answers, two examples before each question."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    out = tmp_path_factory.mktemp("tasks") / "out"
    write_tasks(out, list(TASKS), parse_splits(["gsm8k=train", "openbookqa=validation"]), data)
    manager = TaskManager(include_path=str(out), include_defaults=False)
    assert manager.all_subtasks == sorted(TASKS)
    return simple_evaluate("dummy", tasks=list(TASKS), task_manager=manager, num_fewshot=2, bootstrap_iters=0)


@pytest.mark.parametrize("task", TASKS)
def test_lm_eval_asks_every_question_with_its_own_prompt(data, evaluated, task):
    from lm_eval.tasks._yaml_loader import load_yaml

    config, samples = evaluated["configs"][task], evaluated["samples"][task]
    about = config["metadata"]
    names = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    upstream = load_yaml(upstream_file(task), resolve_func=False)
    file = data / TASKS[task].folder / f"{upstream[names[about['scored_split']]]}.jsonl"
    rows = read_rows(file)
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    assert evaluated["n-samples"][task] == {"original": len(rows), "effective": len(rows)}
    assert [sample["doc"] for sample in first] == rows
    for field in ("doc_to_text", "doc_to_choice", "output_type", "metric_list"):
        if field in upstream:
            assert config[field] == upstream[field]
    assert about["num_questions"] == len(rows)


@pytest.mark.parametrize("task", [name for name in TASKS if "truthfulqa" not in name])
def test_examples_are_never_the_question_itself(evaluated, task):
    """Three questions in a file: with two examples drawn from it, every one of the others is taken."""
    by_folder = {"anli": "premise", "mc_taco": "sentence", "social_iqa": "context", "piqa": "goal"}
    by_folder |= {"sciq": "support", "boolq": "passage", "openbookqa": "question_stem"}
    field = by_folder.get(TASKS[task].folder, "question")
    assert evaluated["n-shot"][task] == 2
    for sample in evaluated["samples"][task]:
        prompt = sample["arguments"][0][0]
        assert prompt.count(sample["doc"][field].strip()) == 1


def test_folders_are_those_of_the_table():
    assert tuple(dict.fromkeys(source.folder for source in TASKS.values())) == FOLDERS
