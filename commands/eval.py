"""`prime-v2 eval`: lm-eval's own command line with the model registered."""

import argparse
import io
import json
import logging
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from prime_v2.commands.base import finish
from prime_v2.commands.options import Json, Output, TaskSplit
from prime_v2.commands.tasks import render_tasks
from prime_v2.output.progress import quiet_libraries
from prime_v2.output.records import code_version, command_line, git

if TYPE_CHECKING:
    from prime_v2.eval.offline_tasks import WrittenTask

# lm-eval's other sub-commands, passed on as they are.
PASSED_ON = ("ls", "validate")
# lm-eval's 100,000 take minutes for a metric without a formula, such as f1; 1,000 know a standard error to 2%.
BOOTSTRAP_ITERS = 1000
SPLIT_FIELDS = ("test_split", "validation_split")


def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] LM_EVAL_OPTIONS",
            help="MODEL first, a folder or Hub name, is short for --model_args pretrained=MODEL. Then any options of "
            "lm_eval; -h shows them all. --tasks knows two more names: paper, for the eight tasks of the paper, and "
            "anli. --model is prime_v2 unless another is named. ls and validate instead of MODEL are lm_eval's.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Read questions from DIR/TASK/SPLIT.jsonl, nothing from the Hub."),
    ] = None,
    split: TaskSplit = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Score benchmark tasks with lm-eval.

    This is lm-eval's own command line with the model prime_v2 registered, and its table, with standard errors.

    \b
    prime-v2 eval MODEL --tasks sciq,boolq,arc_easy --limit 100
    prime-v2 eval --model_args pretrained=MODEL,seed=1 --tasks paper --data my_data/ --output eval.json
    prime-v2 eval MODEL --tasks gsm8k --output_path results/ --log_samples
    """
    arguments, splits = arguments or [], split or []
    is_passed_on = bool(arguments) and arguments[0] in PASSED_ON
    if is_passed_on or "-h" in arguments:
        call_lm_eval(arguments if is_passed_on else ["run", "-h"])
        return
    code = code_version()
    command = command_line()
    parsed = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="prime_v2_tasks_") as folder:
        written = _write_own_tasks(parsed, data, splits, Path(folder) / "tasks")
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            results = call_lm_eval(parsed.for_lm_eval())
    if results is None:  # a process other than the first of several
        return
    summary = summarise(results, None if data is None else data.resolve().name)
    model_args = summary["config"].get("model_args")
    seed = model_args.get("seed", 0) if isinstance(model_args, dict) else 0
    finish("eval", summary, lambda: render_tasks(written), as_json, output, seed=int(seed), code=code, command=command)


@dataclass
class EvalArguments:
    """What `prime-v2 eval` has to know of lm-eval's arguments; `rest` is passed on unread."""

    model: str | None
    tasks: list[str]
    include_path: str | None
    rest: list[str]

    def for_lm_eval(self) -> list[str]:
        """The command line of lm-eval."""
        known = {"--model": self.model, "--tasks": ",".join(self.tasks), "--include_path": self.include_path}
        return ["run", *(part for key, value in known.items() if value for part in (key, value)), *self.rest]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_arguments(arguments: Sequence[str]) -> EvalArguments:
    """`[MODEL] LM_EVAL_OPTIONS`: MODEL becomes `pretrained=MODEL`, --model is prime_v2, names of groups their tasks.

    Where no model is named it is that of `make demo`, if there is one. Raises ValueError when there is no model or no
    task. With --config, which may name them, neither is asked for.
    """
    from prime_v2.eval.offline_tasks import expand_tasks
    from prime_v2.eval.plugin import MODEL_NAME, better_demo, demo_model

    arguments = list(arguments)
    if arguments[:1] == ["run"]:
        del arguments[0]
    place = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M")
    parser.add_argument("--tasks", "-t", nargs="+", action="extend", default=[])
    parser.add_argument("--include_path")
    parser.add_argument("--config", "-C")
    known, rest = parser.parse_known_args(arguments)
    if known.config is not None:
        rest = ["--config", known.config, *rest]
    model = known.model or (None if known.config is not None else MODEL_NAME)
    is_named = _names_a_model(rest)
    if place is not None and is_named:
        raise ValueError(f"{place} and pretrained= name a model each; leave one out")
    needs_model = place is None and model == MODEL_NAME and not is_named and known.config is None
    if needs_model and better_demo() is None:
        raise ValueError(
            "no model was named; give its folder or Hub name first, as in prime-v2 eval MODEL --tasks sciq, "
            "or add --model_args pretrained=MODEL"
        )
    tasks = expand_tasks(name for each in known.tasks for name in each.split(",") if name)
    if not tasks and known.config is None:
        raise ValueError("no task was named; add --tasks sciq,boolq,arc_easy, or --tasks paper for the paper's eight")
    if needs_model:
        place = demo_model()
    if place is not None:
        rest = ["--model_args", json.dumps({"pretrained": place}), *rest]
    return EvalArguments(model, tasks, known.include_path, rest)


def _names_a_model(arguments: Sequence[str]) -> bool:
    """Whether --model_args has `pretrained`, as key=value or in JSON."""
    values: list[str] = []
    inside = False
    for each in arguments:
        name, sign, value = each.partition("=")
        if each.startswith("-"):
            inside = name in ("--model_args", "-a")
            values += [value] * (inside and bool(sign))
        elif inside:
            values.append(each)
    return any(re.search(r"""(^|[\s,{"'])pretrained["']?\s*[=:]""", value) for value in values)


def _write_own_tasks(
    parsed: EvalArguments, data: Path | None, split: Sequence[str], folder: Path
) -> "list[WrittenTask]":
    """Task files for --data and --split, and `parsed.include_path` set to their folder; none without those options."""
    from prime_v2.eval.offline_tasks import parse_splits, write_tasks

    if data is None and not split:
        return []
    option = "--split" if data is None else "--data"
    if parsed.include_path is not None:
        raise ValueError(f"{option} and --include_path both say where the tasks are; leave one out")
    if not parsed.tasks:
        raise ValueError(f"{option} needs --tasks on the command line")
    written = write_tasks(folder, parsed.tasks, parse_splits(split), data)
    parsed.include_path = str(folder)
    return written


def call_lm_eval(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run lm-eval's command line with `prime_v2` registered; what its `simple_evaluate` returned, if it was called.

    Its log is shown from warnings up, unless LMEVAL_LOG_LEVEL says otherwise. Raises ValueError for arguments that it
    refuses.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from prime_v2.eval.plugin import register

    quiet_libraries()
    setup_logging(logging.WARNING)
    # Each of our own task files would be reported as overriding lm-eval's, which is what it is for.
    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)
    register()
    complaint = io.StringIO()
    kept: list[dict[str, Any]] = []
    with _replaced(sys, argv=["lm_eval", *arguments]), _keeping_results(kept):
        command = HarnessCLI()
        try:
            with redirect_stderr(complaint):
                parsed = command.parse_args()
        except SystemExit as stop:
            if not stop.code:
                raise
            sentence = complaint.getvalue().split("error: ")[-1]
            raise ValueError(re.sub(r"invalid functools\.partial\(.*\) value", "invalid value", sentence)) from None
        _check_numbers(getattr(parsed, "limit", None), getattr(parsed, "num_fewshot", None))
        command.execute(parsed)
    return kept[0] if kept else None


@contextmanager
def _keeping_results(kept: list[dict[str, Any]]) -> Iterator[None]:
    """Add to `kept` the results of `lm_eval.simple_evaluate`, which lm-eval's command prints but does not return.

    Meanwhile lm-eval draws `BOOTSTRAP_ITERS` bootstrap samples, the results hold the device that was used, the model
    may refuse the tasks (`check_tasks`) before anything is scored, and git does not complain outside a checkout.
    """
    import lm_eval
    from lm_eval import evaluator

    simple_evaluate: Callable[..., dict[str, Any] | None] = lm_eval.simple_evaluate
    evaluate_tasks: Callable[..., Any] = evaluator.evaluate
    devices: list[str] = []

    def evaluate_and_keep(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
        # As they are after --config and files are read.
        _check_numbers(*(kwargs.get(name) for name in ("limit", "num_fewshot", "samples")))
        try:
            results = simple_evaluate(*args, **{"bootstrap_iters": BOOTSTRAP_ITERS} | kwargs)
        except AssertionError as error:
            if "--samples" not in str(error):
                raise
            raise ValueError(str(error)) from None
        if results is not None:
            results["config"]["device"] = devices[0]
            kept.append(results)
        return results

    def check_and_evaluate(lm: Any, task_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        check = getattr(lm, "check_tasks", None)
        if check is not None:
            check(task_dict.get("tasks", {}))
        devices[:] = [str(getattr(lm, "device", None))]  # lm-eval notes what was asked for, by default cuda:0
        return evaluate_tasks(lm, task_dict, *args, **kwargs)

    def commit() -> str | None:
        return git("describe", "--always", folder=Path.cwd()) or None

    with (
        _replaced(lm_eval, simple_evaluate=evaluate_and_keep),
        _replaced(evaluator, evaluate=check_and_evaluate, get_git_commit_hash=commit),
    ):
        yield


@contextmanager
def _replaced(place: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or object have these values within the block."""
    before = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)


def _check_numbers(limit: float | None, num_fewshot: int | None, samples: Any = None) -> None:
    """ValueError for what lm-eval takes and cannot work with."""
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"--limit {limit:g} must be above 0: a number of questions, or below 1 a share; use 100")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num_fewshot {num_fewshot} must be at least 0; use 0")
    if samples is not None and not isinstance(samples, dict):
        raise ValueError(f'--samples {samples} is neither JSON, such as {{"sciq": [0, 1]}}, nor a file of it')


def summarise(results: dict[str, Any], data: str | None) -> dict[str, Any]:
    """lm-eval's results, JSON-ready: a row for each task, metric and filter, and the configuration of the run.

    data: name of the folder that the questions were read from; None is the Hub. A number that is not finite is None,
    as is a standard error that lm-eval did not compute. `config` holds the model's own report of its likelihoods.
    """
    from lm_eval.utils import handle_non_serializable

    scores = []
    for task, metrics in results["results"].items():
        config = results["configs"].get(task, {})
        about = config.get("metadata") or {}
        split = about.get("scored_split") or next((config[key] for key in SPLIT_FIELDS if config.get(key)), None)
        count = results["n-samples"].get(task, {})
        for key, value in metrics.items():
            metric, comma, name_of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{name_of_filter}")
            scores.append(
                {
                    "task": task,
                    "version": results["versions"].get(task),
                    "metric": metric,
                    "filter": name_of_filter,
                    "value": value,
                    "stderr": None if stderr == "N/A" else stderr,
                    "n": count.get("effective"),
                    "n_in_split": count.get("original"),
                    "num_fewshot": results["n-shot"].get(task),
                    "scored_split": split,
                    "data_sha256": about.get("data_sha256"),
                }
            )
    config = dict(results["config"])
    if isinstance(config.get("model_args"), dict):
        config["model_args"] = {key: _shown(value) for key, value in config["model_args"].items()}
    summary = {
        "scores": scores,
        "data": data or "hub",
        "lm_eval": version("lm_eval"),
        "chat_template": bool(results.get("chat_template")),
        "config": config,
    }
    return json.loads(json.dumps(summary, default=handle_non_serializable), parse_constant=lambda _: None)


def _shown(value: Any) -> Any:
    """A model argument for a record: of a path, the last part."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
