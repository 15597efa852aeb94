"""`prime-v2 compare`: plan the training runs of a comparison, run what is missing, and set the results side by side.

`config` reads what a comparison is; `prime_v2.training.run` trains the runs, each in a process of its own
(`children`); `report` makes the rows and `plots` the figures (docs/compare.md).
"""

import dataclasses
import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from prime_v2.data.preparation import WHOLE_TOKENS, prepare_text
from prime_v2.eval.intervals import plus_minus
from prime_v2.output.atomic import write_json
from prime_v2.output.locks import LOCK, folder_lock
from prime_v2.output.numbers import duration
from prime_v2.output.progress import say
from prime_v2.output.records import code_version, read_record
from prime_v2.studies.compare.children import Children, Task, stopping_on_signals
from prime_v2.studies.compare.config import Comparison, Run, number
from prime_v2.studies.compare.search import narrowed, searched
from prime_v2.tokenization.tokenization_prime_v2 import PrimeV2Tokenizer
from prime_v2.training.course import Holds, check_folder, course_of
from prime_v2.training.flops import COUNTED_BATCHES, count_parameters, flops_per_token
from prime_v2.training.options import RaisingParser, RunOptions, parse_options
from prime_v2.training.run import make_model, text_options
from prime_v2.training.trainer import Collator

MARKER = "compare.json"  # in the output folder: which comparison it holds
POINTS = 10  # evaluations of the dev bound in the course of a run, and checkpoints; the last at its end
LOGS = 100  # logged losses of a run, about
START_SECONDS = 15.0  # of a run before its first step, for estimates
TIMED_STEPS = 3  # the fastest of which counts: others on the machine slow down some of them
FORWARD_SHARE = 1 / 3  # of the time of a training step


@dataclass(frozen=True)
class Cost:
    """What a network costs a token: its parameters, FLOPs by the 6 N rule and as measured, seconds; None: unknown."""

    parameters: int
    non_embedding: int
    measured: float | None
    seconds: float | None

    def flops(self, count: str) -> float:
        """FLOPs a token by a count of `config.COUNTS`."""
        if count == "measured":
            assert self.measured is not None, "cost_of was asked to measure"
            return self.measured
        return 6 * self.non_embedding


@dataclass(frozen=True)
class PlannedRun:
    """A run with what follows from its budget: `options` are all of train.py."""

    run: Run
    cost: Cost
    steps: int
    tokens: int
    options: dict[str, Any]

    @property
    def seconds(self) -> float | None:
        """Estimated, evaluations included."""
        if self.cost.seconds is None:
            return None
        scored = self.options["eval_sequences"] * POINTS + 2 * self.options["test_sequences"]
        rows = scored * self.options["eval_num_samples"] * self.options["block_size"]
        return START_SECONDS + self.cost.seconds * (self.tokens + FORWARD_SHARE * rows)


def parsed(options: dict[str, Any], place: str) -> tuple[RunOptions, TrainingArguments, dict[str, Any]]:
    """Options of train.py, checked as train.py checks them; ValueError that begins with `place`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(options), encoding="utf-8")
        try:
            return parse_options(["--config", str(path)], parser_class=RaisingParser)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place}: {str(error).replace(f'--config {path}: ', '')}") from None


def plan(comparison: Comparison, out: Path, *, measure: bool) -> list[PlannedRun]:
    """Steps and costs of all runs; nothing is written.

    measure: also measure FLOPs and time of a micro-batch, which `count: measured` does in any case. All seeds of a run
    have the steps of its first one. Raises ValueError for options that train.py or the model refuses, and for a budget
    that is too small for a step.
    """
    costs: dict[tuple[str, str], Cost] = {}
    planned, too_small = [], []
    for run in comparison.runs:
        place = f"run {run.name}" + (f", shape {run.shape}" if run.shape else "")
        options, training, model_options = parsed(run.options | {"max_steps": 1}, place)
        if (run.name, run.shape) not in costs:
            vocab_size = vocabulary_of(options, _data_folder(out, run.seed))
            needed = measure or comparison.count == "measured"
            costs[run.name, run.shape] = cost_of(options, training, model_options, vocab_size, needed, place)
        cost, tokens_per_step = costs[run.name, run.shape], options.global_batch * options.block_size
        step_flops = cost.flops(comparison.count) * tokens_per_step
        steps = int(run.budget // step_flops)
        if steps < 1:
            too_small.append((step_flops, run))
            continue
        planned.append(PlannedRun(run, cost, steps, steps * tokens_per_step, _all_options(run, options, steps, out)))
    if too_small:
        step_flops, run = max(too_small, key=lambda each: each[0])
        raise ValueError(
            f"run {run.name}: the budget {number(run.budget)} is less than one step of {step_flops:.4g} FLOPs"
            f"{f' with shape {run.shape}' if run.shape else ''}; the smallest budget that works for all runs is "
            f"{_rounded_up(step_flops)}"
        )
    return planned


def _rounded_up(flops: float) -> str:
    """To three digits, so that what is printed suffices."""
    scale = 10.0 ** (math.floor(math.log10(flops)) - 2)
    return number(math.ceil(flops / scale) * scale)


def _all_options(run: Run, options: RunOptions, steps: int, out: Path) -> dict[str, Any]:
    """All options of train.py for a run of so many steps."""
    every = math.ceil(steps / POINTS)
    text = {name: getattr(options, name) for name in ("eval_sequences", "test_sequences", "eval_num_samples")}
    return text | run.options | {
        "block_size": options.block_size,
        "output_dir": str(out / run.folder),
        "data_dir": str(_data_folder(out, run.seed)),
        "max_steps": steps,
        "eval_steps": every,
        "save_steps": every,
        "logging_steps": max(1, steps // LOGS),
    }  # fmt: skip


def vocabulary_of(options: RunOptions, data: Path) -> int:
    """V of the tokenizer: of prepared text as it is, otherwise as asked for."""
    if (data / "complete").exists():
        return PrimeV2Tokenizer.from_pretrained(data / WHOLE_TOKENS).code_table.shape[0]
    if options.tokenizer == "bpe":
        return options.bpe_vocab_size
    from prime_v2.tokenization.build import build_tokenizer

    return build_tokenizer(options.tokenizer, num_subtokens=1).code_table.shape[0]


def cost_of(
    run: RunOptions,
    training: TrainingArguments,
    model_options: dict[str, Any],
    vocab_size: int,
    measure: bool,
    place: str,
) -> Cost:
    """The cost of a run's network, measured on the micro-batches that train.py measures; ids are random.

    FLOPs depend on what the noise hides, not on the ids; with a head in stages also on how many children the nodes of
    the hidden tokens have. Grown codes have as many for each node, give or take one, and shuffled ones, standing for
    them, nearly so in the mean. Raises ValueError, beginning with `place`, for a model that cannot be.
    """
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    # What make_model asks a tokenizer for; which digits a token has costs nothing, see above.
    tokenizer = SimpleNamespace(code_table=SimpleNamespace(shape=(vocab_size, 1)), code_table_parameters={}, **special)
    try:
        with torch.device(training.device if measure else "meta"):
            model = make_model(run, training, model_options, tokenizer)
    except Exception as error:
        if not (isinstance(error, ValueError) or type(error).__name__.startswith("StrictDataclass")):
            raise
        text = str(error).split("ValueError: ")[-1].split("TypeError: ")[-1]
        raise ValueError(f"{place}: {' '.join(text.split())}") from None
    counts = count_parameters(model)
    if not measure:
        return Cost(counts["total"], counts["non_embedding"], None, None)
    batches = _micro_batches(run, training, vocab_size)
    model.train()

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(training.device.type, torch.bfloat16, enabled=training.bf16):
            return model(**batch).loss

    measured = flops_per_token(step, batches)
    seconds = []
    for _ in range(TIMED_STEPS):
        started = time.monotonic()
        step(batches[0]).backward()
        if training.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return Cost(counts["total"], counts["non_embedding"], measured, min(seconds) / batches[0]["input_ids"].numel())


def _micro_batches(run: RunOptions, training: TrainingArguments, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """Random ids under the noise of the first micro-batches of a run."""
    generator, size = torch.Generator().manual_seed(training.seed), training.per_device_train_batch_size
    collate, made = Collator(run.global_batch, training.seed, run.short_share), []
    for first in range(0, COUNTED_BATCHES * size, size):
        ids = torch.randint(vocab_size, (size, run.block_size), generator=generator)
        samples = [
            {"input_ids": row, "labels": row, "sample_number": torch.tensor(first + i)} for i, row in enumerate(ids)
        ]
        made.append({key: value.to(training.device) for key, value in collate(samples).items()})
    return made


def state_of(planned: PlannedRun) -> str:
    """How far it is: finished, step N, or to do. Changes nothing; ValueError where its folder holds something else."""
    folder = Path(planned.options["output_dir"])
    run, training, model_options = parsed(planned.options, f"run {planned.run.name}")
    if check_folder(folder, course_of(run, training, model_options)) is Holds.finished:
        return "finished"
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return "to do" if checkpoint is None else f"step {checkpoint.rsplit('-', 1)[1]}"


def check_out(out: Path, comparison: Comparison) -> None:
    """ValueError unless the output folder is new, empty except for the lock, or of this comparison; only looks."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder; give a new one")
    if not out.is_dir() or all(each.name == LOCK for each in out.iterdir()):
        return
    try:
        found = json.loads((out / MARKER).read_text(encoding="utf-8"))["comparison"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--out {out} is not empty and holds no comparison; give a new folder") from None
    if found != comparison.name:
        raise ValueError(f"--out {out} holds the comparison {found}, not {comparison.name}; give another folder")


@dataclass
class Running:
    """How the runs are trained. launcher: what starts a Python module by `-m`; keep_models: whether weights stay.

    Raises ValueError for a launcher that a shell could not read either.
    """

    launcher: str | None = None
    jobs: int = 1
    keep_models: bool = True
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        try:
            self.words = shlex.split(self.launcher) if self.launcher else [sys.executable]
        except ValueError as error:
            raise ValueError(
                f"--launcher {self.launcher} is no command ({error}); close its quotation marks"
            ) from None

    def command(self, config: Path) -> list[str]:
        return [*self.words, "-m", "prime_v2.training.run", "--config", str(config)]


def run_comparison(comparison: Comparison, out: Path, running: Running) -> list[tuple[Run, dict[str, Any]]]:
    """Train what is not yet trained; the runs with their records.

    Raises ValueError for bad input and for runs that failed, `children.Stopped` after a signal, when the
    running ones have saved.
    """
    new = not out.exists()
    # The children inherit the lock, so nobody trains beside those of a killed parent.
    with stopping_on_signals(), folder_lock(out, f"--out {out}") as lock:
        check_out(out, comparison)
        try:
            planned, waiting = _prepared(searched(comparison), out, running)
        except Exception:
            if new:
                shutil.rmtree(out)
            raise
        failures = _train(waiting, len(planned) - len(waiting), out, running, lock.descriptor)
        if comparison.search_seed is not None and not failures:
            say(f"all sizes are trained at seed {comparison.search_seed}; the other seeds take the best of each run")
            planned, waiting = _prepared(narrowed(comparison, _records(planned)), out, running)
            failures = _train(waiting, len(planned) - len(waiting), out, running, lock.descriptor)
        for each in planned:
            tidy(Path(each.options["output_dir"]), running.keep_models)
    if failures:
        name, why = next(iter(failures.items()))
        more = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        raise ValueError(f"run {name} failed{more}: {why}; the same command tries again and keeps what is finished")
    return _records(planned)


def _records(planned: list[PlannedRun]) -> list[tuple[Run, dict[str, Any]]]:
    return [(each.run, read_record(record_of(each))) for each in planned]


def _prepared(comparison: Comparison, out: Path, running: Running) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """All runs, and those that are not finished, with the text that these need."""
    if not (out / MARKER).exists():
        write_json(out / MARKER, {"comparison": comparison.name})
    if comparison.count == "measured":  # which depends on the size of the vocabulary
        prepare(comparison, out)
    planned = plan(comparison, out, measure=False)
    finished = {each.run.folder for each in planned if state_of(each) == "finished"}
    waiting = [each for each in planned if each.run.folder not in finished]
    if waiting:
        if not running.allow_mixed:
            check_code([each for each in planned if each.run.folder in finished])
        prepare(comparison, out)
    return planned, waiting


def prepare(comparison: Comparison, out: Path) -> None:
    """Text and tokenizer of each seed, for its runs to share."""
    done = set()
    for run in comparison.runs:
        if run.seed not in done:
            done.add(run.seed)
            options, training, _ = parsed(run.options | {"max_steps": 1}, f"run {run.name}")
            folder = _data_folder(out, run.seed)
            if not (folder / "complete").exists():
                say(f"preparing the text of seed {run.seed}")
            prepare_text(text_options(options, training.seed), {"num_subtokens": 1}, folder)


def record_of(planned: PlannedRun) -> Path:
    return Path(planned.options["output_dir"]) / "results" / "train.json"


def _data_folder(out: Path, seed: int) -> Path:
    return out / "data" / f"seed{seed}"


def check_code(finished: list[PlannedRun]) -> None:
    """ValueError where the finished runs are of another commit than the code that would train the others."""
    commit = code_version()["commit"]
    for each in finished:
        found = read_record(record_of(each))["commit"]
        if found != commit:
            raise ValueError(
                f"{each.options['output_dir']} was trained by commit {found[:12]}, this is {commit[:12]}; give a new "
                f"--out to train all runs again, or add --allow-mixed"
            )


def _train(waiting: list[PlannedRun], already: int, out: Path, running: Running, lock: int) -> dict[str, str]:
    """Train the runs; the failures as sentences by run."""
    names = {str(each.run): each for each in waiting}
    total, begun, clock = already + len(waiting), [already], _Clock()

    def on_start(task: Task) -> None:
        begun[0] += 1
        say(f"[{begun[0]}/{total}] {task.name}: {names[task.name].steps:,} steps")

    def on_end(task: Task, seconds: float) -> None:
        bound = read_record(task.record)["results"]["evaluation"]["bound"]
        done = names.pop(task.name)
        tidy(Path(done.options["output_dir"]), running.keep_models)
        left = clock.left(done, seconds, list(names.values()), running.jobs)
        say(f"{task.name}: {bound['nats_per_token']:.3f}{plus_minus(bound)} nats/token, {duration(seconds)}{left}")

    tasks = []
    for each in waiting:
        config = out / "configs" / f"{each.run.folder}.yaml"
        config.parent.mkdir(exist_ok=True)
        config.write_text(yaml.safe_dump(each.options, sort_keys=False), encoding="utf-8")
        log = out / "logs" / f"{each.run.folder}.txt"
        tasks.append(Task(str(each.run), running.command(config), log, record_of(each)))
    return Children(running.jobs, lock, on_start, on_end).run(tasks)


@dataclass
class _Clock:
    """What is left, judged by the FLOPs (6 N D) and the seconds of the runs that this process has seen end."""

    flops: float = 0.0
    seconds: float = 0.0

    def left(self, done: PlannedRun, seconds: float, waiting: list[PlannedRun], jobs: int) -> str:
        self.flops += done.cost.flops("6nd") * done.tokens
        self.seconds += seconds
        flops = sum(each.cost.flops("6nd") * each.tokens for each in waiting)
        return f"; about {duration(flops * self.seconds / self.flops / jobs)} left" if waiting else ""


def tidy(folder: Path, keep_models: bool) -> None:
    """Drop the checkpoints of a finished run and, unless kept, its weights."""
    if not (folder / "results" / "train.json").exists():
        return
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if not keep_models:
        for weights in folder.glob("*.safetensors*"):
            weights.unlink()


def known_runs(comparison: Comparison, out: Path) -> Comparison:
    """The comparison with the runs that can be named before anything else is trained: those of a search, or all."""
    first = searched(comparison)
    paths = {run: out / run.folder / "results" / "train.json" for run in first.runs}
    if comparison.search_seed is None or not all(path.exists() for path in paths.values()):
        return first
    return narrowed(comparison, [(run, read_record(path)) for run, path in paths.items()])


def with_times_of_records(planned: list[PlannedRun]) -> list[PlannedRun]:
    """The plan with the time a token of finished runs of the same network, where there are any."""
    timed: dict[tuple[str, str], float] = {}
    for each in planned:
        if record_of(each).exists():
            training = read_record(record_of(each))["results"]["training"]
            if training["seconds"]:
                timed[each.run.name, each.run.shape] = training["seconds"] / training["tokens"]
    return [
        dataclasses.replace(each, cost=dataclasses.replace(each.cost, seconds=timed[each.run.name, each.run.shape]))
        if (each.run.name, each.run.shape) in timed
        else each
        for each in planned
    ]
