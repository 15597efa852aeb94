"""lm-eval tasks that read JSONL folders instead of the Hub, or score another split, under lm-eval's own task names.

A task file written here includes lm-eval's own file of the task and replaces where the data comes from, so prompt,
choices and metrics stay lm-eval's. DATA holds `<folder>/<split>.jsonl` in the schema of the Hub's data set (`TASKS`).
"""

import glob
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prime_v2.validation_keywords_prime_v2 import did_you_mean

SPLITS = ("train", "validation", "test")
ALL_TASKS = "*"

# A check takes the value of a field and the whole document; it returns what is wrong in words, or None.
Check = Callable[[Any, dict[str, Any]], str | None]


def _text(value: Any, _: dict[str, Any]) -> str | None:
    return None if isinstance(value, str) else "must be a text"


def _choice(value: Any, _: dict[str, Any]) -> str | None:
    return None if isinstance(value, str) and value else "must be a text that is not empty"


def _one_of(*allowed: int | str) -> Check:
    def check(value: Any, _: dict[str, Any]) -> str | None:
        if any(type(value) is type(each) and value == each for each in allowed):
            return None
        return f"must be one of {', '.join(map(json.dumps, allowed))}"

    return check


def _are_choices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) and each for each in value)


def _labelled_choices(value: Any, _: dict[str, Any]) -> str | None:
    form = 'must be {"text": [...], "label": [...]} with two or more texts that are not empty and a label for each'
    if not isinstance(value, dict) or not _are_choices(value.get("text")) or not _are_choices(value.get("label")):
        return form
    return None if len(value["text"]) == len(value["label"]) else form


def _answer_key(value: Any, document: dict[str, Any]) -> str | None:
    if not isinstance(value, str):
        return "must be a text"
    if _labelled_choices(document.get("choices"), document) is not None:
        return None  # said of `choices`
    return None if value.lstrip() in document["choices"]["label"] else "must be among the labels of choices"


def _targets(only_first: bool) -> Check:
    rule = "only the first being 1" if only_first else "one or more of them 1"
    form = f'must be {{"choices": [...], "labels": [...]}} with labels 0 and 1, {rule}'

    def check(value: Any, _: dict[str, Any]) -> str | None:
        if not isinstance(value, dict) or not _are_choices(value.get("choices")):
            return form
        labels = value.get("labels")
        if not isinstance(labels, list) or len(labels) != len(value["choices"]):
            return form
        if any(type(label) is not int or label not in (0, 1) for label in labels):
            return form
        right = labels[0] == sum(labels) == 1 if only_first else sum(labels) > 0
        return None if right else form

    return check


@dataclass(frozen=True)
class TaskSource:
    """A task of lm-eval, the folder that its data is read from, and the fields that it needs."""

    name: str
    yaml: str  # lm-eval's own file, below lm_eval/tasks
    folder: str
    fields: Mapping[str, Check] = field(repr=False)


_SCIQ = {"question": _text, "support": _text} | dict.fromkeys(
    ("distractor1", "distractor2", "distractor3", "correct_answer"), _choice
)
_SOCIAL_IQA = {
    **{"context": _text, "question": _text, "label": _one_of("1", "2", "3")},
    **dict.fromkeys(("answerA", "answerB", "answerC"), _choice),
}
_MC_TACO = {"sentence": _text, "question": _text, "answer": _text, "label": _one_of(0, 1)}
_TRUTHFULQA = {"question": _text, "mc1_targets": _targets(True), "mc2_targets": _targets(False)}
_BOOLQ = {"passage": _text, "question": _text, "label": _one_of(0, 1)}
_ANLI = {"premise": _text, "hypothesis": _text, "label": _one_of(0, 1, 2)}
_ARC = {"question": _text, "choices": _labelled_choices, "answerKey": _answer_key}
_OPENBOOKQA = {"question_stem": _text, "choices": _labelled_choices, "answerKey": _answer_key}
_PIQA = {"goal": _text, "sol1": _choice, "sol2": _choice, "label": _one_of(0, 1)}
_GSM8K = {"question": _text, "answer": _text}

TASKS = {
    source.name: source
    for source in (
        TaskSource("sciq", "sciq/sciq.yaml", "sciq", _SCIQ),
        TaskSource("social_iqa", "siqa/siqa.yaml", "social_iqa", _SOCIAL_IQA),
        TaskSource("mc_taco", "mc_taco/default.yaml", "mc_taco", _MC_TACO),
        TaskSource("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1.yaml", "truthfulqa_mc", _TRUTHFULQA),
        TaskSource("truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc", _TRUTHFULQA),
        TaskSource("boolq", "super_glue/boolq/default.yaml", "boolq", _BOOLQ),
        TaskSource("anli_r1", "anli/anli_r1.yaml", "anli", _ANLI),
        TaskSource("anli_r2", "anli/anli_r2.yaml", "anli", _ANLI),
        TaskSource("anli_r3", "anli/anli_r3.yaml", "anli", _ANLI),
        TaskSource("arc_easy", "arc/arc_easy.yaml", "arc_easy", _ARC),
        TaskSource("openbookqa", "openbookqa/openbookqa.yaml", "openbookqa", _OPENBOOKQA),
        TaskSource("piqa", "piqa/piqa.yaml", "piqa", _PIQA),
        TaskSource("gsm8k", "gsm8k/gsm8k.yaml", "gsm8k", _GSM8K),
    )
}
# The eight tasks of the paper's table.
PAPER = tuple(name for name in TASKS if name not in ("piqa", "gsm8k"))
GROUPS = {"paper": PAPER, "anli": ("anli_r1", "anli_r2", "anli_r3")}


@dataclass(frozen=True)
class WrittenTask:
    """A task file, and what it will score. Questions and their file's hash are None for data of the Hub."""

    task: str
    scored_split: str
    fewshot_split: str
    num_questions: int | None = None
    data_sha256: str | None = None


def expand_tasks(names: Iterable[str]) -> list[str]:
    """Task names with `GROUPS` replaced by their tasks, each once; other names, known here or not, as they are."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def parse_splits(items: Iterable[str]) -> dict[str, str]:
    """`train` or `TASK=train`, each perhaps several joined by commas, as {task or ALL_TASKS: split}.

    Raises ValueError for a split that is none of `SPLITS`, and for a task (or all of them) named twice.
    """
    splits: dict[str, str] = {}
    for item in (part.strip() for each in items for part in each.split(",")):
        left, sign, right = item.partition("=")
        split = right if sign else left
        if split not in SPLITS:
            raise ValueError(f"--split {item} must be one of {', '.join(SPLITS)}, or TASK= and one of them")
        for task in expand_tasks([left]) if sign else [ALL_TASKS]:
            if task in splits:
                raise ValueError(f"--split names {'all tasks' if task == ALL_TASKS else task} twice")
            splits[task] = split
    return splits


def tasks_in(data: Path, splits: Mapping[str, str]) -> list[str]:
    """The tasks of `TASKS` that a folder of JSONL folders holds a scored split of. ValueError when it holds none.

    splits: from `parse_splits`; a task that has only a train split is among them when `splits` says to score that.
    """
    _check_data_folder(data)
    found = [
        task
        for task, source in TASKS.items()
        if (files := _files(source, _upstream(source), data))
        # What has only a train split is not scored unless that is asked for.
        and (set(files) != {"train"} or task in splits or ALL_TASKS in splits)
    ]
    if not found:
        folders = ", ".join(dict.fromkeys(source.folder for source in TASKS.values()))
        raise ValueError(f"{data} holds no folder of a task; its folders must be named {folders}")
    return found


def write_tasks(
    out: Path, tasks: Sequence[str], splits: Mapping[str, str], data: Path | None = None
) -> list[WrittenTask]:
    """Write `out/<task>.yaml` for each task, for `lm_eval --include_path`; nothing is written when any is refused.

    out: made when it does not exist. splits: from `parse_splits`; a task in it, or all of them, is scored on that
    split, any other on test, or on validation without one. data: JSONL folders; None leaves the data on the Hub.
    Every line of the files in use is checked for the fields of the task. Raises ValueError, naming task, file, line
    and field, for whatever is missing or wrong, and when `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; give a new one")
    if not tasks:
        raise ValueError(f"no task was named; give some of {', '.join(TASKS)}, e.g. --tasks sciq,boolq")
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        what = "scored on another split" if data is None else "read from local files"
        hint = did_you_mean(unknown[0], TASKS)
        raise ValueError(f"the task {unknown[0]} cannot be {what}; those that can are {', '.join(TASKS)}{hint}")
    strays = [name for name in splits if name != ALL_TASKS and name not in tasks]
    if strays:
        raise ValueError(f"--split names {strays[0]}, which is not among the tasks {', '.join(tasks)}")
    if data is not None:
        _check_data_folder(data)
    checked: dict[Path, tuple[int, str]] = {}
    prepared = [_prepare(TASKS[name], splits.get(name, splits.get(ALL_TASKS)), data, checked) for name in tasks]
    out.mkdir(parents=True, exist_ok=True)
    for content, written in prepared:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (out / f"{written.task}.yaml").write_text(text, encoding="utf-8")
    return [written for _, written in prepared]


def _prepare(
    source: TaskSource, asked: str | None, data: Path | None, checked: dict[Path, tuple[int, str]]
) -> tuple[dict[str, Any], WrittenTask]:
    """Content of a task file, and what it scores. checked: rows and sha256 of the data files read so far."""
    upstream = _upstream(source)
    names = _split_names(upstream)
    files = None if data is None else _files(source, upstream, data)
    available = list(names) if files is None else list(files)
    if files is not None and not files:
        wanted = ", ".join(f"{name}.jsonl" for name in names.values())
        raise ValueError(f"{source.name}: {data}/{source.folder} holds none of {wanted}; give one of them")
    scored = asked or next((split for split in ("test", "validation") if split in available), None)
    if scored is None:
        raise ValueError(
            f"{source.name}: {data}/{source.folder} has only {names['train']}.jsonl; --split {source.name}=train "
            f"scores it, and --tasks without it leaves it out"
        )
    if scored not in names:
        raise ValueError(f"{source.name} has no {scored} split; it has {', '.join(names)}")
    if scored not in available:
        there = ", ".join(f"{names[split]}.jsonl" for split in available)
        file = f"{data}/{source.folder}/{names[scored]}.jsonl"
        raise ValueError(f"{source.name}: {file} does not exist; there is {there}")
    # As lm-eval chooses. Where it is the scored split, lm-eval leaves out the question that is being asked.
    fewshot = next(split for split in SPLITS if split in available)

    content: dict[str, Any] = {
        "include": str(_upstream_file(source)),
        "task": source.name,
        # A tag in a folder of --include_path would hide the other tasks that lm-eval has under it.
        "tag": None,
        **_split_fields(upstream, names, scored, fewshot),
    }
    written = WrittenTask(source.name, scored, fewshot)
    if files is not None:
        used = {split: files[split] for split in (scored, fewshot)}
        for path in used.values():
            if path not in checked:
                checked[path] = _check_file(source, path)
        content |= {
            "dataset_path": "json",
            "dataset_name": None,
            # The loader takes a path for a pattern.
            "dataset_kwargs": {
                "data_files": {names[split]: glob.escape(str(path.resolve())) for split, path in used.items()}
            },
        }
        written = WrittenTask(source.name, scored, fewshot, *checked[files[scored]])
    about = {key: value for key, value in vars(written).items() if key != "task" and value is not None}
    content["metadata"] = upstream.get("metadata", {}) | about
    return content, written


def _split_fields(upstream: dict[str, Any], names: dict[str, str], scored: str, fewshot: str) -> dict[str, str | None]:
    """The fields of a task file that say which split is what.

    The splits that lm-eval would use itself keep its own fields, so that its few-shot examples are drawn as ever. For
    any other, the scored split is named as `test_split`; where `fewshot_split` equals it, lm-eval leaves out the
    question that is being asked.
    """
    used = {names[scored], names[fewshot]}
    kept = {key: upstream.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")}
    usual = next(split for split in ("test", "validation") if split in names)
    usual_fewshot = kept["fewshot_split"] or names[next(split for split in SPLITS if split in names)]
    if scored == usual and names[fewshot] == usual_fewshot:
        return {key: name if name in used else None for key, name in kept.items()}
    return {
        "training_split": names["train"] if fewshot == "train" else None,
        "validation_split": None,
        "test_split": names[scored],
        "fewshot_split": names[fewshot],
    }


def _check_data_folder(data: Path) -> None:
    if not data.is_dir():
        raise ValueError(f"{data} is not a folder; give the folder that holds the folders of the tasks")


def _upstream_file(source: TaskSource) -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("lm-eval is not installed; install it with pip install lm-eval")
    path = Path(spec.submodule_search_locations[0]) / "tasks" / source.yaml
    if not path.is_file():
        raise ValueError(f"this release of lm-eval has no file tasks/{source.yaml}; install lm-eval 0.4.13")
    return path


def _upstream(source: TaskSource) -> dict[str, Any]:
    """lm-eval's own file of a task with what it includes; functions stay the text that names them."""
    return _read_yaml(_upstream_file(source))


class _Loader(yaml.SafeLoader):
    """Reads `!function a.b` as the text `a.b`."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _read_yaml(path: Path) -> dict[str, Any]:
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    if "include" not in content:
        return content
    return _read_yaml(path.parent / content.pop("include")) | content


def _split_names(upstream: dict[str, Any]) -> dict[str, str]:
    """{split: its name in the data set} for the splits that lm-eval's own file of the task names."""
    fields = zip(SPLITS, ("training_split", "validation_split", "test_split"), strict=True)
    return {split: upstream[key] for split, key in fields if upstream.get(key)}


def _files(source: TaskSource, upstream: dict[str, Any], data: Path) -> dict[str, Path]:
    """{split: file} for the splits of a task that are there."""
    paths = {split: data / source.folder / f"{name}.jsonl" for split, name in _split_names(upstream).items()}
    return {split: path for split, path in paths.items() if path.is_file()}


def _check_file(source: TaskSource, path: Path) -> tuple[int, str]:
    """(rows, sha256) of a JSONL file; ValueError at the first row that lacks what the task needs."""
    place = f"{source.folder}/{path.name}"
    content = path.read_bytes()
    rows = 0
    for number, document in _documents(content, place):
        rows += 1
        for name, check in source.fields.items():
            if name not in document:
                fields = ", ".join(source.fields)
                raise ValueError(f"{place} line {number} lacks the field {name!r}; {source.name} needs {fields}")
            fault = check(document[name], document)
            if fault is not None:
                value = json.dumps(document[name], ensure_ascii=False)
                value = value if len(value) <= 60 else f"{value[:57]}..."
                raise ValueError(f"{place} line {number}: the field {name!r} is {value}; it {fault}")
    if not rows:
        raise ValueError(f"{place} is empty; it must hold a question a line")
    return rows, hashlib.sha256(content).hexdigest()


def _documents(content: bytes, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{place} line {number} is not JSON ({error})") from None
        if not isinstance(document, dict):
            raise ValueError(f"{place} line {number} is not a JSON object")
        yield number, document
