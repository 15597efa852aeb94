"""Training runs that are killed at random moments, and the weights that they end with.

    python benchmarks/crash_test.py --kills 4                   # to see that it works
    python benchmarks/crash_test.py --output results/crash_test.json

A small run is trained once without a break. Then the same run is started, killed with SIGKILL and started again, over
and over; when it reaches its end, its weights are compared with those of the unbroken run, and the next one begins.
By turns a kill is aimed at the start of the process, a training step, an evaluation, a checkpoint and the end of a run
(where weights, record and card are written): the process is killed a random part of that phase's length after it began
one. The phase in which it died is what is counted.

A process is forked from one that has imported everything, since importing takes longer than the run. CPU only.
"""

import argparse
import collections
import hashlib
import itertools
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process with CUDA cannot be forked
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from timing import positive

from prime_v2.eval import training
from prime_v2.eval.records import make_record, write_json

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


def run_crashes(kills: int, seed: int, steps: int, home: Path) -> dict[str, Any]:
    """Counts of kills by the phase that they hit, and what became of the runs."""
    draw, marks = random.Random(seed), Marks()
    write_text(home / "text.jsonl", seed)
    arguments = ["--data", str(home / "text.jsonl"), *OPTIONS.format(steps=steps).split(), "--output_dir"]
    status, lengths = follow(start([*arguments, str(home / "unbroken")], home / "unbroken.log", marks), marks)
    if status:
        raise SystemExit(f"the unbroken run ended with status {status}: {(home / 'unbroken.log').read_text()[-500:]}")
    wanted = digest(home / "unbroken")
    lengths = dict.fromkeys(PHASES, POLL_SECONDS) | lengths  # one that is shorter than a poll may not be seen
    hits: collections.Counter[str] = collections.Counter()
    runs: list[dict[str, Any]] = []
    for number in itertools.count():
        folder, log = home / f"run_{number}", home / f"run_{number}.log"
        run = {"kills": 0, "status": None, "equal": False}
        runs.append(run)
        while run["status"] is None:
            process = start([*arguments, str(folder)], log, marks)
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
        run["equal"] = run["status"] == 0 and digest(folder) == wanted
        if not run["equal"]:
            print(f"run {number} ended with status {run['status']}: {log.read_text()[-2000:]}", file=sys.stderr)
        if sum(hits.values()) >= kills:
            break
    return {
        "kills": sum(hits.values()),
        "kills_by_phase": {phase: hits[phase] for phase in PHASES},
        "runs": len(runs),
        "kills_of_each_run": [run["kills"] for run in runs],
        "lost_runs": sum(run["status"] != 0 for run in runs),
        "runs_with_other_weights": sum(run["status"] == 0 and not run["equal"] for run in runs),
        "steps_of_a_run": steps,
        "seconds_of_a_phase": {phase: round(lengths[phase], 4) for phase in PHASES},
        "sha256_of_the_weights": wanted,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive, default=100)
    parser.add_argument("--steps", type=positive, default=12, help="training steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to put the runs, to look at them after; by default a temporary one")
    parser.add_argument("--output", help="where to write the record (JSON)")
    options = parser.parse_args()
    if options.steps < 6:
        parser.error(f"--steps {options.steps} must be at least 6, or nothing is left to kill in; use 12")
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(options.folder or temporary)
        home.mkdir(parents=True, exist_ok=True)
        results = run_crashes(options.kills, options.seed, options.steps, home)
    print(json.dumps(results, indent=1))
    if options.output:
        write_json(options.output, make_record("crash_test", results, seed=options.seed))
    return 1 if results["lost_runs"] or results["runs_with_other_weights"] else 0


if __name__ == "__main__":
    sys.exit(main())
