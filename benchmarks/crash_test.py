"""Training runs that are killed at random moments, and the weights that they end with.

    python benchmarks/crash_test.py --kills 4 --pairs 2 --tampers 4           # to see that it works
    python benchmarks/crash_test.py --kills 0 --pairs 0 --tampers 50 --seed 1 # a part of it
    python benchmarks/crash_test.py --output results/crash_test.json

A small run is trained once without a break. Then the same run is started, killed with SIGKILL and started again, over
and over; when it reaches its end, its weights are compared with those of the unbroken run, and the next one begins.
By turns a kill is aimed at the start of the process, a training step, an evaluation, a checkpoint and the end of a run
(where weights, record and card are written): the process is killed a random part of that phase's length after it began
one. The phase in which it died is what is counted.

Then pairs: the command is started a second time, a random moment after the first, which is killed in every other pair;
one of the two must run and the other be refused, and the weights must be those of the unbroken run. Then tampering: a
run is killed, something in its folder is changed (`tampering.py`), and it is started again: it must end with those
weights or with a sentence, never with other weights.

A process is forked from one that has imported everything, since importing takes longer than the run. CPU only.
"""

import argparse
import collections
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process with CUDA cannot be forked
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tampering import tamper
from timing import add_output, positive

from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record
from prime_v2.training import run as training

PHASES = ("start", "step", "evaluation", "checkpoint", "end")
WORDS = ("the", "one", "two", "red", "blue", "cat", "dog", "tree", "house", "runs", "sees", "and", "or", "near")
OPTIONS = (
    "--bpe_vocab_size 300 --block_size 16 --global_batch 4 --per_device_train_batch_size 2 --max_steps {steps} "
    "--save_steps 3 --eval_steps 2 --logging_steps 1 --eval_sequences 4 --test_sequences 4 --eval_num_samples 2 "
    "--num_generated 1 --dev_share 0.2 --test_share 0.2 "
    "--model hidden_size=32 num_hidden_layers=1 num_attention_heads=2 intermediate_size=64 attention_dropout=0.1"
)
POLL_SECONDS = 0.0005
LIMIT_SECONDS = 300.0  # a process that takes longer is stuck


class Marks:
    """What a forked process is doing: its phase and how many phases it has begun, readable from outside."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8)

    def begin(self, phase: str) -> None:
        begun = int.from_bytes(self.memory[4:8], "little") + 1
        self.memory[:8] = PHASES.index(phase).to_bytes(4, "little") + begun.to_bytes(4, "little")

    def phase(self) -> tuple[str, int]:
        return PHASES[int.from_bytes(self.memory[:4], "little")], int.from_bytes(self.memory[4:8], "little")

    def clear(self) -> None:
        self.memory[:8] = bytes(8)

    def watch(self, owner: Any, name: str, phase: str, after: str | None) -> None:
        """Mark each call of a function; after: what follows it, None for what was before."""
        inner = getattr(owner, name)

        def marked(*args, **kwargs):
            before = self.phase()[0]
            self.begin(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self.begin(after or before)

        setattr(owner, name, marked)


def start(arguments: list[str], log: Path, marks: Marks) -> int:
    """A forked process that trains; its number."""
    marks.clear()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        trainer = training.DiffusionTrainer
        marks.watch(trainer, "training_step", "step", "step")
        marks.watch(trainer, "evaluate", "evaluation", None)
        marks.watch(trainer, "_save_checkpoint", "checkpoint", None)
        marks.watch(training, "finish", "end", "end")
        status = training.main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(status)


def ended(process: int) -> int | None:
    """The exit status of a process, minus the signal for a killed one; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def follow(process: int, marks: Marks) -> tuple[int, dict[str, float]]:
    """Wait for the end of a process; its status and the mean length of its phases in seconds."""
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    (phase, begun), since = marks.phase(), time.monotonic()
    while (status := ended(process)) is None:
        now = time.monotonic()
        if marks.phase()[1] != begun:
            seconds[phase].append(now - since)
            (phase, begun), since = marks.phase(), now
        time.sleep(POLL_SECONDS)
    seconds[phase].append(time.monotonic() - since)
    return status, {name: sum(each) / len(each) for name, each in seconds.items()}


def kill_in(process: int, marks: Marks, target: str, skip: int, delay: float) -> tuple[int, str]:
    """Kill a process `delay` seconds into the phase `target`, after `skip` others of it: its status, and its phase.

    A process that ends before is left alone.
    """
    limit, last = time.monotonic() + LIMIT_SECONDS, -1
    while (status := ended(process)) is None:
        phase, begun = marks.phase()
        if phase == target and begun != last:
            last, skip = begun, skip - 1
        if skip < 0 or time.monotonic() > limit:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            return (status if skip < 0 else 71), marks.phase()[0]
        time.sleep(POLL_SECONDS)
    return status, marks.phase()[0]


def write_text(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    lines = [{"text": " ".join(draw.choices(WORDS, k=60))} for _ in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Place:
    """A folder of runs, the command that they share, and what the unbroken one of them was like."""

    def __init__(self, home: Path, seed: int, steps: int):
        self.home, self.marks = home, Marks()
        write_text(home / "text.jsonl", seed)
        self.arguments = ["--data", str(home / "text.jsonl"), *OPTIONS.format(steps=steps).split(), "--output_dir"]
        log = home / "unbroken.log"
        began = time.monotonic()
        status, lengths = follow(self.start(home / "unbroken", log, self.marks), self.marks)
        self.seconds = time.monotonic() - began
        if status:
            raise SystemExit(f"the unbroken run ended with status {status}: {log.read_text()[-500:]}")
        self.wanted = digest(home / "unbroken")
        self.lengths = dict.fromkeys(PHASES, POLL_SECONDS) | lengths  # one shorter than a poll may not be seen

    def start(self, folder: Path, log: Path, marks: Marks) -> int:
        return start([*self.arguments, str(folder)], log, marks)

    def is_wanted(self, folder: Path) -> bool:
        return (folder / "model.safetensors").is_file() and digest(folder) == self.wanted


def run_crashes(place: Place, kills: int, draw: random.Random) -> dict[str, Any]:
    """Counts of kills by the phase that they hit, and what became of the runs."""
    marks, lengths = place.marks, place.lengths
    hits: collections.Counter[str] = collections.Counter()
    runs: list[dict[str, Any]] = []
    while sum(hits.values()) < kills:
        number = len(runs)
        folder, log = place.home / f"run_{number}", place.home / f"run_{number}.log"
        run = {"kills": 0, "status": None, "equal": False}
        runs.append(run)
        while run["status"] is None:
            process = place.start(folder, log, marks)
            if (left := kills - sum(hits.values())) > 0:
                target = PHASES[left % len(PHASES)]
                skip = draw.randrange(3) if target in ("step", "evaluation", "checkpoint") else 0
                status, phase = kill_in(process, marks, target, skip, draw.uniform(0, lengths[target]))
            else:
                (status, _), phase = follow(process, marks), "end"
            if status == -signal.SIGKILL:
                hits[phase] += 1
                run["kills"] += 1
            else:
                run["status"] = status
        run["equal"] = run["status"] == 0 and place.is_wanted(folder)
        if not run["equal"]:
            print(f"run {number} ended with status {run['status']}: {log.read_text()[-2000:]}", file=sys.stderr)
    return {
        "kills": sum(hits.values()),
        "kills_by_phase": {phase: hits[phase] for phase in PHASES},
        "runs": len(runs),
        "kills_of_each_run": [run["kills"] for run in runs],
        "lost_runs": sum(run["status"] != 0 for run in runs),
        "runs_with_other_weights": sum(run["status"] == 0 and not run["equal"] for run in runs),
        "seconds_of_a_phase": {phase: round(lengths[phase], 4) for phase in PHASES},
    }


def said(log: Path) -> list[str]:
    """The sentences of refusals; a traceback is one that no refusal has."""
    content = log.read_text(errors="replace") if log.exists() else ""
    return [line for line in content.splitlines() if line.startswith(("train.py: error: ", "Traceback"))]


def run_pairs(place: Place, pairs: int, draw: random.Random) -> dict[str, Any]:
    """What became of two copies of the command in one folder, started at random moments."""
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(pairs):
        folder, logs = place.home / f"pair_{number}", [place.home / f"pair_{number}_{i}.log" for i in range(3)]
        first, kill = place.start(folder, logs[0], Marks()), number % 2 == 1
        time.sleep(draw.uniform(0, place.seconds * (0.7 if kill else 0.9)) if draw.randrange(4) else 0)
        second = place.start(folder, logs[1], Marks())
        if kill:
            time.sleep(draw.uniform(0, place.seconds / 4))
            os.kill(first, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in (first, second)]
        refused = [status == 2 and [" is in use by process " in line for line in said(log)] == [True]
                   for status, log in zip(statuses, logs, strict=False)]  # fmt: skip
        ended = [status in (0, -signal.SIGKILL) for status in statuses]
        if kill and not place.is_wanted(folder):  # the killed one was the one that ran
            (last, _) = follow(place.start(folder, logs[2], place.marks), place.marks)
            ended.append(last == 0)
            refused.append(False)
        if not all(a or b for a, b in zip(ended, refused, strict=True)) or not place.is_wanted(folder):
            outcomes["wrong"] += 1
            print(
                f"pair {number} ended with {statuses}: {[each.read_text()[-1500:] for each in logs[:2]]}",
                file=sys.stderr,
            )
        elif any(refused):
            outcomes["one_refused"] += 1
        else:
            outcomes["one_after_the_other"] += 1
    return {"pairs": pairs, **{each: outcomes[each] for each in ("one_refused", "one_after_the_other", "wrong")}}


def run_tampers(place: Place, tampers: int, draw: random.Random) -> dict[str, Any]:
    """What became of runs whose folder was changed after a kill."""
    outcomes: collections.Counter[str] = collections.Counter()
    changes: collections.Counter[str] = collections.Counter()
    for number in range(tampers):
        folder, log = place.home / f"tampered_{number}", place.home / f"tampered_{number}.log"
        process = place.start(folder, log, place.marks)
        target = draw.choice(("step", "evaluation", "checkpoint", "checkpoint", "end"))
        kill_in(process, place.marks, target, draw.randrange(1, 5), draw.uniform(0, place.lengths[target]))
        change = tamper(folder, draw) if folder.is_dir() else "nothing yet"
        changes[change.split(":")[0] if ":" in change else change.split(" is ")[-1]] += 1
        log.unlink(missing_ok=True)
        status, _ = follow(place.start(folder, log, place.marks), place.marks)
        sentences = said(log)
        if status == 0 and place.is_wanted(folder):
            outcomes["equal"] += 1
        elif status == 2 and len(sentences) == 1 and sentences[0].startswith("train.py: error: "):
            outcomes["refused"] += 1
        else:
            outcomes["other_weights" if status == 0 else "no_sentence"] += 1
            print(f"{change}: ended with status {status}: {log.read_text()[-2000:]}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
    names = ("equal", "refused", "other_weights", "no_sentence")
    return {"tampers": tampers, **{each: outcomes[each] for each in names}, "changes": dict(sorted(changes.items()))}


def count(text: str) -> int:
    """A number of things to do on the command line, 0 included."""
    return 0 if text == "0" else positive(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=count, default=100)
    parser.add_argument("--pairs", type=count, default=30, help="two copies of the command at once")
    parser.add_argument("--tampers", type=count, default=60, help="changes of a folder between two starts")
    parser.add_argument("--steps", type=positive, default=12, help="training steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to put the runs, to look at them after; by default a temporary one")
    add_output(parser)
    options = parser.parse_args()
    code = code_version()
    if options.steps < 6:
        parser.error(f"--steps {options.steps} must be at least 6, or nothing is left to kill in; use 12")
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(options.folder or temporary)
        home.mkdir(parents=True, exist_ok=True)
        place = Place(home, options.seed, options.steps)
        results = run_crashes(place, options.kills, random.Random(options.seed)) | {
            "steps_of_a_run": options.steps,
            "sha256_of_the_weights": place.wanted,
            "two_processes": run_pairs(place, options.pairs, random.Random(options.seed)),
            "tampering": run_tampers(place, options.tampers, random.Random(options.seed)),
        }
    print(json.dumps(results, indent=1))
    if options.output:
        write_json(options.output, make_record("crash_test", results, seed=options.seed, code=code))
    wrong = [results["lost_runs"], results["runs_with_other_weights"], results["two_processes"]["wrong"]]
    return 1 if any([*wrong, *(results["tampering"][each] for each in ("other_weights", "no_sentence"))]) else 0


if __name__ == "__main__":
    sys.exit(main())
