"""What one GPU does, in eight minutes: step, head, generation, FSDP2 and a study, each result written at once.

    python benchmarks/accelerator.py                             # results/accelerator.json, on the first GPU
    python benchmarks/accelerator.py --minutes 20 --parts study  # goes on with the same record
    python benchmarks/accelerator.py --device cpu --tiny         # all of it with tiny sizes, to see that it runs

Parts: `step`, a training step of the 1.1B model of configs/slimpajama_1b.yaml in bf16 with 2,048 tokens a sequence,
eager, with flash_attn and compiled, beside the GPU's rates of nothing but matrix products; `head`, the loss in chunks
against full logits, by itself and in a step; `generation`, with blocks and caches, against the published algorithm;
`fsdp2`, a sharded step and train.py in one process; `study`, the runs of configs/compare/accelerator.yaml, which go on
from their checkpoints. What is measured is in accelerator_parts.py.

Each part has a process of its own, so none meets another's memory or failed device. A result is in the record before
the next measurement begins. One that fails (memory, a package that is missing) leaves a sentence, and the next one
begins; so does one for which the time that is left is too short. The same command keeps the results that the record
has and measures the others.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerator_parts import parts
from accelerator_setting import STUDY, Measurement, Setting, free_memory, make_setting

from prime_v2.output.atomic import write_json
from prime_v2.output.numbers import duration, three_digits
from prime_v2.output.paths import without_places
from prime_v2.output.records import code_version, make_record, read_record
from prime_v2.studies.compare.children import Stopped, stopping_on_signals
from prime_v2.training.run import keep_freed_memory

PARTS = ("step", "head", "generation", "fsdp2", "study")
SAVING_SECONDS = 20.0  # of the minutes, for a run of the study to save in
START_SECONDS = 10.0  # of a part's process
MOST_TIMES = 3  # as long as its measurements are said to take, a part is stopped: it hangs
POLL_SECONDS = 0.2
LONGEST_SENTENCE = 300  # characters
SENTENCES = ("failed", "not_begun")  # what a row has in place of numbers


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} must be minutes above 0 and up to {24 * 60}, e.g. 8")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=minutes, default=8.0, help="what is not begun by then is left out")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; the numbers say nothing")
    parser.add_argument("--study", default=STUDY, metavar="CONFIG", help="file or recipe of `prime-v2 compare`")
    parser.add_argument("--out", default="runs/accelerator", metavar="DIR", help="folder of the study's runs")
    parser.add_argument("--output", help="the record (JSON); by default results/accelerator.json, with --tiny in DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part-until", nargs=2, help=argparse.SUPPRESS)  # in a part's process: its name, its end
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu: the sizes are those of a GPU; add --tiny")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU; use --device cpu --tiny")
    if options.tiny and options.study != STUDY:
        parser.error(f"--study {options.study} with --tiny, which has a study of its own; leave one of them out")
    if options.output is None:
        options.output = f"{options.out}/accelerator.json" if options.tiny else "results/accelerator.json"
    return options


def new_record(options: argparse.Namespace) -> dict[str, Any]:
    results = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "tiny": options.tiny,
        "study": options.study,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),  # "highest": no TF32
        "minutes": options.minutes,
        "parts": {},
    }
    return make_record("accelerator", results, seed=options.seed, code=code_version())


def begin(options: argparse.Namespace) -> None:
    """Write a record without results, or find the one to go on with; ValueError where that is of something else."""
    record = new_record(options)
    if not Path(options.output).exists():
        write_json(options.output, record)
        return
    found = read_record(options.output)
    same = ("device", "cuda", "tiny", "study")
    pairs = {name: (found["results"].get(name), record["results"][name]) for name in same}
    pairs |= {
        name: (found.get(name), record[name]) for name in ("name", "commit", "uncommitted_changes", "seed", "versions")
    }
    for name, (before, now) in pairs.items():
        if before != now:
            raise ValueError(
                f"--output {options.output} has {name} {before}, but this is {now}; give another --output"
            )


def rows_of(output: str, part: str) -> list[dict[str, Any]]:
    return read_record(output)["results"]["parts"].get(part, {}).get("rows", [])


def put(output: str, part: str, row: dict[str, Any] | None = None, **about: Any) -> None:
    """Put a row, in place of an earlier one of its name, and what there is to say about the part into the record."""
    record = json.loads(Path(output).read_text(encoding="utf-8"))
    entry = record["results"]["parts"].setdefault(part, {"rows": []})
    if row is not None:
        rows = {each["name"]: each for each in entry["rows"]} | {row["name"]: without_places(row)}
        entry["rows"] = list(rows.values())
    entry |= without_places(about)
    write_json(output, record)


def missing(output: str, part: str, measurements: list[Measurement]) -> list[Measurement]:
    """Those without numbers in the record."""
    done = {row["name"] for row in rows_of(output, part) if not any(each in row for each in SENTENCES)}
    return [each for each in measurements if each.name not in done]


def sentence(error: Exception) -> str:
    """An error in one line, for the record; what compilers say is long."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):  # what it tried to allocate, without how the memory is divided
        text = ". ".join(text.split(". ")[:2])
    text = text if len(text) <= LONGEST_SENTENCE else f"{text[:LONGEST_SENTENCE]} ..."
    return text if type(error) is RuntimeError else f"{type(error).__name__}: {text}"


def measure(setting: Setting, part: str, measurements: list[Measurement], output: str, until: float) -> None:
    """In the part's own process: make the rows of a part, those that are missing and that the time allows."""
    for each in missing(output, part, measurements):
        left = until - time.time()
        row: dict[str, Any] = {"name": each.name}
        if left < each.seconds:
            row["not_begun"] = f"{max(0, left):.0f} s were left, it takes about {each.seconds:.0f} s"
        else:
            try:
                row |= each.work(setting)
                json.dumps(row, allow_nan=False)
            except Stopped as stopped:  # by the process of all parts, which waits for this one to end
                put(output, part, {"name": each.name, "failed": str(stopped)})
                raise
            except Exception as error:
                row = {"name": each.name, "failed": sentence(error)}
        put(output, part, row)
        print(f"{part}: {said(row)}", flush=True)
        torch.compiler.reset()
        free_memory(setting)


def said(row: dict[str, Any]) -> str:
    """A row for people."""
    for name in SENTENCES:
        if name in row:
            return f"{row['name']}: {name.replace('_', ' ')}: {row[name]}"
    units = {
        "flops_per_second": ("FLOP/s", lambda value: f"{value:.3g}"),
        "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
        "mfu": ("MFU", lambda value: f"{value:.1%}"),
        "peak_mib": ("MiB", lambda value: f"{value:,.0f}"),
        "nats_per_token": ("nats/token", three_digits),
    }
    numbers = [f"{form(row[key])} {unit}" for key, (unit, form) in units.items() if row.get(key) is not None]
    return f"{row['name']}: {', '.join(numbers)}"


def run_part(part: str, measurements: list[Measurement], options: argparse.Namespace, until: float) -> None:
    """A part in a process of its own, which is stopped at the end of the time."""
    waiting = missing(options.output, part, measurements)
    if not waiting:
        return
    if until - time.time() < START_SECONDS + min(each.seconds for each in waiting):
        for each in waiting:
            put(options.output, part, {"name": each.name, "not_begun": "the time was over"})
        print(f"{part}: not begun: {duration(max(0, until - time.time()))} left", flush=True)
        return
    end = until
    if part != "study":
        end = min(until, time.time() + START_SECONDS + MOST_TIMES * sum(each.seconds for each in waiting))
    command = [sys.executable, __file__, *sys.argv[1:], "--part-until", part, str(end)]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    started = time.time()
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": first})
    try:
        status = wait(process, end)
    finally:
        stop(process)
    seconds = time.time() - started
    ended = "whole" if status == 0 else f"stopped after {duration(seconds)}" if status is None else ended_by(status)
    put(options.output, part, seconds=seconds, ended=ended)
    if status != 0:
        print(f"{part}: {ended}", flush=True)


def ended_by(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def wait(process: subprocess.Popen, end: float) -> int | None:
    """The exit status; None at the end of the time."""
    while process.poll() is None:
        if time.time() >= end:
            return None
        time.sleep(POLL_SECONDS)
    return process.returncode


def stop(process: subprocess.Popen) -> None:
    """Let it save, then end it and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            wait(process, time.time() + SAVING_SECONDS)


def main(arguments: list[str] | None = None) -> None:
    until = time.time() - SAVING_SECONDS
    options = parse(arguments)
    until += 60 * options.minutes
    setting = make_setting(options.device, options.seed, Path(options.out), options.study, options.tiny)
    measured = parts(setting)
    if options.part_until:
        keep_freed_memory()
        part, end = options.part_until
        measure(setting, part, measured[part], options.output, float(end))
        return
    begin(options)
    with stopping_on_signals():
        for part in [each for each in PARTS if each in options.parts]:
            run_part(part, measured[part], options, until)
    print(f"record: {options.output}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"accelerator.py: error: {error}")
    except Stopped as stopped:
        sys.exit(f"accelerator.py: {stopped}; the same command goes on")
