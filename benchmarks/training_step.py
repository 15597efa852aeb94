"""Time and peak memory of a training step against transformers' causal Llama of the same shape with full logits.

    python benchmarks/training_step.py                          # V = 50,257, S = 16, D = 512, 8 layers, L = 512
    python benchmarks/training_step.py --objective subtoken --output results/training_step_subtoken.json

A step is forward, backward, clipping and AdamW. Steps of the two models alternate in one process, so that both see the
same machine; the time ratio is the median of the ratios of neighbouring steps. Peak memory is measured in a fresh
process for each model, above what the process holds before the model is built.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.eval.records import make_record, write_json


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("vocab_size", 50257),
        ("num_subtokens", 16),
        ("hidden_size", 512),
        ("layers", 8),
        ("heads", 8),
        ("length", 512),
        ("batch", 4),
        ("steps", 9),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--objective", choices=("token", "subtoken"), default="token")
    parser.add_argument("--output", help="write the record here (JSON)")
    parser.add_argument("--memory-of", choices=("prime", "causal"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def build(kind: str, options: argparse.Namespace) -> torch.nn.Module:
    shape = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "max_position_embeddings": options.length,
    }
    if kind == "causal":
        return LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
    return PrimeV2ForMaskedDiffusion(
        PrimeV2Config(**shape, num_subtokens=options.num_subtokens, objective=options.objective)
    )


class Stepper:
    """One model with its optimiser and a fixed batch; `run()` takes a training step and returns its seconds."""

    def __init__(self, kind: str, options: argparse.Namespace, device: torch.device):
        torch.manual_seed(options.seed)
        self.device = device
        self.model = build(kind, options).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(options.vocab_size, (options.batch, options.length), device=device)

    def run(self) -> float:
        started = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent's memory at the time of the fork
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(kind: str, options: argparse.Namespace, device: torch.device) -> None:
    before = peak_mib(device)
    stepper = Stepper(kind, options, device)
    for _ in range(2):
        stepper.run()
    print(json.dumps(peak_mib(device) - before))


def memory_in_fresh_process(kind: str, arguments: list[str]) -> float:
    # glibc keeps freed blocks below a growing threshold for later; a fixed one makes the peak that of live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--memory-of", kind],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory_of:
        measure_memory(options.memory_of, options, device)
        return
    steppers = {kind: Stepper(kind, options, device) for kind in ("prime", "causal")}
    seconds: dict[str, list[float]] = {kind: [] for kind in steppers}
    for step in range(options.steps + 2):
        for kind, stepper in steppers.items():
            taken = stepper.run()
            if step >= 2:  # the first two warm up caches and the optimiser's state
                seconds[kind].append(taken)
    del steppers
    memory = {kind: memory_in_fresh_process(kind, arguments) for kind in seconds}
    ratios = [a / b for a, b in zip(seconds["prime"], seconds["causal"], strict=True)]
    tokens = options.batch * options.length
    results = {
        "shape": {key: value for key, value in vars(options).items() if key not in ("output", "memory_of")},
        "device": device.type,
        "seconds_median": {kind: statistics.median(values) for kind, values in seconds.items()},
        "seconds": seconds,
        "tokens_per_second": {kind: tokens / statistics.median(values) for kind, values in seconds.items()},
        "peak_mib": memory,
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "memory_ratio": memory["prime"] / memory["causal"],
    }
    print(
        f"training step, V = {options.vocab_size:,}, S = {options.num_subtokens}, D = {options.hidden_size}, "
        f"{options.layers} layers, {options.batch} x {options.length} tokens, objective {options.objective}, "
        f"{device.type}"
    )
    for kind in seconds:
        print(
            f"  {kind:7} {results['seconds_median'][kind]:7.3f} s  {results['tokens_per_second'][kind]:9,.0f} "
            f"tokens/s {memory[kind]:8,.0f} MiB"
        )
    low, high = results["time_ratio_range"]
    print(
        f"  time ratio {results['time_ratio']:.3f} ({low:.3f} to {high:.3f})   "
        f"memory ratio {results['memory_ratio']:.3f}"
    )
    if options.output:
        print(f"  record: {write_json(options.output, make_record('training_step', results, seed=options.seed))}")


if __name__ == "__main__":
    main()
