"""How fast a small training step is on an idle and on a busy machine, by how OpenMP's threads wait for each other.

    python benchmarks/busy_machine.py                               # 8 settings, under 8 minutes; on an idle machine
    python benchmarks/busy_machine.py --output results/busy_machine.json

The step is that of configs/tiny.yaml, on two threads and two cores. "Busy": beside two processes that compute without
end on the same cores. Each setting has a process of its own, which waits until it is asked; in each round all take
turns, idle and busy, and rates of one round are compared. libgomp, torch's OpenMP on Linux, lets a thread that waits
spin 300,000 times by default, a few milliseconds; GOMP_SPINCOUNT bounds that, OMP_WAIT_POLICY=passive forbids it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prime_v2.commands.process import CHOSEN_BY_USER, SPINS

CORES = 2
DEFAULT, CHOSEN = "default", f"GOMP_SPINCOUNT={SPINS}"
COUNTS = (300, 1_000, 3_000, 10_000, 30_000)
SETTINGS: dict[str, dict[str, str]] = {DEFAULT: {}, "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}}
SETTINGS |= {f"GOMP_SPINCOUNT={each}": {"GOMP_SPINCOUNT": str(each)} for each in COUNTS}
SETTINGS |= {CHOSEN: {"GOMP_SPINCOUNT": SPINS}, "one thread": {"OMP_NUM_THREADS": "1"}}
CONDITIONS = ("idle", "busy")


def serve() -> None:
    """For each number of seconds on stdin, tokens/s of training steps in that time on stdout."""
    import torch
    from accelerate.utils import set_seed

    from prime_v2.training.options import parse_options
    from prime_v2.training.run import keep_freed_memory, make_model
    from prime_v2.training.trainer import Collator

    keep_freed_memory()
    run, training, model_options = parse_options(["--config", "tiny", "--use_cpu", "true", "--bf16", "false"])
    set_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    table = SimpleNamespace(shape=(run.bpe_vocab_size, 1))
    model = make_model(
        run, training, model_options, SimpleNamespace(code_table=table, code_table_parameters={}, **special)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(run.bpe_vocab_size, (training.per_device_train_batch_size, run.block_size))
    samples = [{"input_ids": row, "labels": row, "sample_number": torch.tensor(i)} for i, row in enumerate(ids)]
    batch = Collator(run.global_batch, 0, 0.0)(samples)

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < float(line):
            step()
            steps += 1
        print(steps * ids.numel() / (time.perf_counter() - started), flush=True)


class Server:
    """A process that trains when it is asked."""

    def __init__(self, setting: dict[str, str]):
        environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
        environment |= {"OMP_NUM_THREADS": str(CORES), "CUDA_VISIBLE_DEVICES": ""} | setting
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def ready(self) -> None:
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit("a process that trains has ended; see above")

    def rate(self, seconds: float) -> float:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def measure(settings: list[str], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Tokens/s by setting and condition, one of each round."""
    servers = {name: Server(SETTINGS[name]) for name in settings}
    try:
        for server in servers.values():
            server.ready()
        rates: dict[str, dict[str, list[float]]] = {name: {each: [] for each in CONDITIONS} for name in settings}
        for number in range(rounds):
            for condition in CONDITIONS:
                others = [
                    subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    for _ in range(CORES if condition == "busy" else 0)
                ]
                try:
                    time.sleep(0.3)
                    for name in settings[number % len(settings) :] + settings[: number % len(settings)]:
                        rates[name][condition].append(servers[name].rate(seconds))
                finally:
                    for other in others:
                        other.kill()
                        other.wait()
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()
    return rates


def summary(rates: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """By setting: medians, and ratios of rounds to the idle rate of the default."""
    reference = rates[DEFAULT]["idle"]
    rows = []
    for name, found in rates.items():
        row: dict[str, Any] = {"setting": name, "environment": SETTINGS[name], "is_the_choice": name == CHOSEN}
        for condition in CONDITIONS:
            ratios = [a / b for a, b in zip(found[condition], reference, strict=True)]
            row[condition] = {
                "tokens_per_second": statistics.median(found[condition]),
                "of_the_idle_default": {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
            }
        rows.append(row)
    return rows


def main() -> int:
    from timing import add_output, positive

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--seconds", type=positive, default=2, help="of a measurement")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    add_output(parser)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # the processes of below inherit it
    if options.serve:
        serve()
        return 0
    from prime_v2.output.records import code_version, make_record

    code = code_version()
    settings = [DEFAULT, *(each for each in options.settings if each != DEFAULT)]
    rows = summary(measure(settings, options.rounds, options.seconds))
    for row in rows:
        found = [(each, row[each]["tokens_per_second"], row[each]["of_the_idle_default"]) for each in CONDITIONS]
        shares = ", ".join(f"{each} {rate:8,.0f} tokens/s ({share['median']:.0%})" for each, rate, share in found)
        print(f"{row['setting']:<24} {shares}{'   <- the choice' if row['is_the_choice'] else ''}")
    if options.output:
        from prime_v2.output.atomic import write_json

        results = {"cores": CORES, "rounds": options.rounds, "seconds": options.seconds, "settings": rows}
        write_json(options.output, make_record("busy_machine", json.loads(json.dumps(results)), seed=0, code=code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
