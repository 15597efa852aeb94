"""`prime-v2 compare`: run what is missing of the training runs of a comparison.

`config` reads what a comparison is, `plan` what its runs cost; `prime_v2.training.run` trains them, each in a process
of its own (`children`); `recorded` takes runs from a record, `report` makes the rows and `plots` the figures
(docs/compare.md).
"""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.trainer_utils import get_last_checkpoint

from prime_v2.data.packing import PackedBlocks
from prime_v2.data.preparation import prepare_text
from prime_v2.eval.intervals import plus_minus
from prime_v2.output.atomic import write_json
from prime_v2.output.locks import LOCK, folder_lock
from prime_v2.output.numbers import duration
from prime_v2.output.progress import say
from prime_v2.output.records import code_of, code_version, read_record
from prime_v2.studies.compare.children import Children, Task, stopping_on_signals
from prime_v2.studies.compare.config import Comparison, Run
from prime_v2.studies.compare.plan import PlannedRun, data_folder, parsed, plan, record_path
from prime_v2.studies.compare.search import Trained, narrowed, searched
from prime_v2.training.course import Holds, check_folder, course_of
from prime_v2.training.run import text_options

MARKER = "compare.json"  # in the output folder: which comparison it holds


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


def run_comparison(
    comparison: Comparison, out: Path, running: Running, recorded: Sequence[Trained] = ()
) -> list[Trained]:
    """Train what is neither trained nor recorded; the runs with their records.

    Raises ValueError for bad input and for runs that failed, `children.Stopped` after a signal, when the
    running ones have saved.
    """
    new = not out.exists()
    # The children inherit the lock, so nobody trains beside those of a killed parent.
    with stopping_on_signals(), folder_lock(out, f"--out {out}") as lock:
        check_out(out, comparison)
        try:
            planned, waiting = _prepared(searched(comparison), out, running, recorded)
        except Exception:
            if new:
                shutil.rmtree(out)
            raise
        chosen = searched(comparison)
        failures = _train(waiting, len(planned) - len(waiting), out, running, lock.descriptor)
        if comparison.search_seed is not None and not failures:
            say(f"all sizes are trained at seed {comparison.search_seed}; the other seeds take the best of each run")
            chosen = narrowed(comparison, _with_recorded(searched(comparison), planned, recorded))
            planned, waiting = _prepared(chosen, out, running, recorded)
            failures = _train(waiting, len(planned) - len(waiting), out, running, lock.descriptor)
        for each in planned:
            tidy(Path(each.options["output_dir"]), running.keep_models)
    if failures:
        name, why = next(iter(failures.items()))
        more = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        raise ValueError(f"run {name} failed{more}: {why}; the same command tries again and keeps what is finished")
    left = sum(run not in chosen.runs for run, _ in recorded)
    if left:
        say(f"{left} recorded runs are left out, of sizes that are not the best of their run")
    return _with_recorded(chosen, planned, recorded)


def _with_recorded(
    comparison: Comparison, planned: Sequence[PlannedRun], recorded: Sequence[Trained]
) -> list[Trained]:
    """All runs of the comparison, in its order: those of the folder, and the recorded ones."""
    found = {each.run: read_record(record_path(each)) for each in planned} | dict(recorded)
    return [(run, found[run]) for run in comparison.runs]


def _prepared(
    comparison: Comparison, out: Path, running: Running, recorded: Sequence[Trained]
) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """All runs that are not recorded, and those of them that are not finished, with the text that these need."""
    records = dict(recorded)
    missing = [run for run in comparison.runs if run not in records]
    if not (out / MARKER).exists():
        write_json(out / MARKER, {"comparison": comparison.name})
    if comparison.count == "measured":  # which depends on the size of the vocabulary
        prepare(missing, out)
    planned = plan(comparison, out, measure=False, recorded=recorded)
    finished = {each.run.folder for each in planned if state_of(each) == "finished"}
    waiting = [each for each in planned if each.run.folder not in finished]
    if waiting:
        if not running.allow_mixed:
            done = [each for each in planned if each.run.folder in finished]
            check_code([(each.run, read_record(record_path(each))) for each in done] + [*recorded])
        prepare(missing, out)
        _check_text(waiting, out, recorded)
    return planned, waiting


def _check_text(waiting: Sequence[PlannedRun], out: Path, recorded: Sequence[Trained]) -> None:
    """ValueError where the text of a waiting run is not that of the recorded runs, before it is trained."""
    texts = {run.seed: record["results"]["data"] for run, record in recorded}
    splits = next(iter(texts.values()))["fingerprints"] if texts else {}  # of a stream without train
    for seed in dict.fromkeys(each.run.seed for each in waiting if texts):
        folder = data_folder(out, seed)
        here = {split: PackedBlocks(folder / split) for split in splits}
        found = {split: blocks.fingerprint for split, blocks in here.items()}
        if seed in texts and found != texts[seed]["fingerprints"]:
            raise ValueError(
                f"the text of seed {seed} in {folder} is not that of the recorded runs, whose test split has the "
                f"fingerprint {texts[seed]['fingerprints']['test'][:12]}, not {found['test'][:12]}; give the text and "
                f"the versions that they had, or leave the record out"
            )
        documents = sum(blocks.documents for blocks in here.values())
        for other, text in texts.items():
            if documents != sum(text[f"{split}_documents"] for split in here):
                raise ValueError(
                    f"the text in {folder} has {documents:,} documents, that of the recorded runs of seed {other} "
                    f"another number; give the same text, or leave the record out"
                )


def prepare(runs: Sequence[Run], out: Path) -> None:
    """Text and tokenizer of each seed, for its runs to share."""
    done = set()
    for run in runs:
        if run.seed not in done:
            done.add(run.seed)
            options, training, _ = parsed(run.options | {"max_steps": 1}, f"run {run.name}")
            folder = data_folder(out, run.seed)
            if not (folder / "complete").exists():
                say(f"preparing the text of seed {run.seed}")
            prepare_text(text_options(options, training.seed), {"num_subtokens": 1}, folder)


def check_code(finished: Sequence[Trained]) -> None:
    """ValueError where the finished runs are of other code (commit, uncommitted changes) than the others would be."""
    code = code_version()
    for run, record in finished:
        if code_of(record) != code_of(code):
            raise ValueError(
                f"{run.folder} was trained by commit {code_of(record, 12)}, this is {code_of(code, 12)}; give a new "
                f"--out, and no --recorded, to train all runs again, or add --allow-mixed"
            )


def _train(waiting: list[PlannedRun], already: int, out: Path, running: Running, lock: int) -> dict[str, str]:
    """Train the runs; the failures as sentences by run."""
    names = {str(each.run): each for each in waiting}
    total, begun, clock, code = already + len(waiting), [already], _Clock(), code_of(code_version())

    def on_start(task: Task) -> None:
        if not running.allow_mixed and code_of(code_version()) != code:
            raise ValueError(
                f"the code is that of commit {code_of(code_version())} now; when the comparison began it was that of "
                f"{code}; go back to it and start again, which continues, or add --allow-mixed"
            )
        begun[0] += 1
        say(f"[{begun[0]}/{total}] {task.name}: {names[task.name].steps:,} steps")

    def on_end(task: Task, seconds: float) -> None:
        bound = read_record(task.record)["results"]["evaluation"]["bound"]
        done = names.pop(task.name)
        tidy(Path(done.options["output_dir"]), running.keep_models)
        still = [each for name, each in names.items() if name not in children.failures]
        left = clock.left(done, seconds, still, running.jobs)
        say(f"{task.name}: {bound['nats_per_token']:.3f}{plus_minus(bound)} nats/token, {duration(seconds)}{left}")

    tasks = []
    for each in waiting:
        config = out / "configs" / f"{each.run.folder}.yaml"
        config.parent.mkdir(exist_ok=True)
        config.write_text(yaml.safe_dump(each.options, sort_keys=False), encoding="utf-8")
        log = out / "logs" / f"{each.run.folder}.txt"
        tasks.append(Task(str(each.run), running.command(config), log, record_path(each)))
    children = Children(running.jobs, lock, on_start, on_end)
    return children.run(tasks)


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


def named_runs(comparison: Comparison, out: Path, recorded: Sequence[Trained] = ()) -> Comparison:
    """The comparison with the runs that can be named before anything else is trained: those of a search, or all."""
    first, found = searched(comparison), dict(recorded)
    for run in first.runs:
        path = out / run.folder / "results" / "train.json"
        if run not in found and path.exists():
            found[run] = read_record(path)
    if comparison.search_seed is None or not all(run in found for run in first.runs):
        return first
    return narrowed(comparison, [(run, found[run]) for run in first.runs])
