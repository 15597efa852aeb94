"""Time and peak memory of a training step against transformers' causal Llama of the same shape with full logits.

    python benchmarks/training_step.py                          # V = 50,257, S = 16, D = 512, 8 layers, L = 512
    python benchmarks/training_step.py --output results/training_step.json \\
        --cases 50257:16:joint 50257:16:stages 50257:16:tree 50257:16:marginal 50257:8:joint 50257:1:joint \\
        32000:15:joint 2048:8:marginal
    python benchmarks/training_step.py --hidden-size 1792 --layers 20 --heads 14 --length 2048 --batch 8 --compile \\
        --cases 32000:15:joint --output results/training_step_1b.json       # the 1.1B shape, for a GPU

`stages` is the nested order in two stages of digits, summed as in the published form, with a head for each stage;
`tree` is the coarse-first order of configs/compare/tuning.yaml with such a head, and vectors of the nodes of the code
tree as the embedding. Both are also held against "mdm", whole tokens with a head over all of them.

A step is forward, backward, clipping and AdamW, with freed memory kept as `train.py` keeps it. Steps of the models
alternate in one process, so that both see the same machine; the time ratio is the median of the ratios of neighboring
steps. Peak memory is measured in a fresh process for each model, above what the process holds before the model is
built. The arithmetic rate counts the matrix products of forward and backward (PyTorch's counter) over the whole step.
It stands beside the machine's own rate for nothing but products, float32 on a CPU, bf16 on an accelerator, by the
faster of two libraries, which takes turns with the steps when the causal model is gone: "width" of 2,048 tokens by a
D x 4 D weight, "square" of two matrices of side 2,048. `mfu` is the share of the accelerator's data-sheet rate.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import add_output, add_sizes, by_turns, products_alone, ratio
from transformers import LlamaConfig, LlamaForCausalLM

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record
from prime_v2.training.flops import measure_flops, peak_flops
from prime_v2.training.run import keep_freed_memory

KINDS = ("prime", "causal")
FEWEST_DIGITS = 4  # that make four levels of a tree
STAGED = ("stages", "tree")  # cases with a head in stages


@dataclass(frozen=True)
class Case:
    """V, S and the objective, or one of `STAGED`."""

    vocab_size: int
    num_subtokens: int
    objective: str

    @classmethod
    def parse(cls, text: str) -> "Case":
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*):(joint|marginal|stages|tree)", text)
        if not found:
            raise argparse.ArgumentTypeError(
                f"{text} is not V:S:joint, V:S:marginal, V:S:stages or V:S:tree, e.g. 50257:16:joint"
            )
        if found[3] in STAGED and int(found[2]) < FEWEST_DIGITS:
            raise argparse.ArgumentTypeError(
                f"{text} has fewer than {FEWEST_DIGITS} digits for its stages; use e.g. {found[1]}:16:{found[3]}"
            )
        return cls(int(found[1]), int(found[2]), found[3])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The models that take turns; the first is compared with each of the others."""
        return (*KINDS, "mdm") if self.objective in STAGED else KINDS

    def __str__(self) -> str:
        return f"{self.vocab_size}:{self.num_subtokens}:{self.objective}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden_size=512, layers=8, heads=8, length=512, batch=4, steps=9, seed=0)
    cases = [Case(50257, 16, "joint"), Case(50257, 16, "marginal")]
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=cases, metavar="V:S:OBJECTIVE")
    parser.add_argument("--compile", action="store_true", help="compile the Transformer of both by torch.compile")
    add_output(parser)
    parser.add_argument("--memory-of", choices=(*KINDS, "mdm"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    width, heads = options.hidden_size, options.heads
    if width % (2 * heads):
        parser.error(f"--hidden-size {width} must be an even multiple of --heads {heads}, e.g. {64 * heads}")
    return options


def build(kind: str, case: Case, options: argparse.Namespace) -> torch.nn.Module:
    shape = {
        "vocab_size": case.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "max_position_embeddings": options.length,
    }
    if kind == "causal":
        return LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
    if kind == "mdm":
        return PrimeV2ForMaskedDiffusion(PrimeV2Config(**shape, num_subtokens=1))
    base = next(base for base in range(2, case.vocab_size + 1) if base**case.num_subtokens >= case.vocab_size)
    digits: dict[str, Any] = {"base": base, "num_subtokens": case.num_subtokens, "objective": case.objective}
    if case.objective in STAGED:
        digits |= staged_fields(case)
    config = PrimeV2Config(**shape, **digits)
    return PrimeV2ForMaskedDiffusion(config)


def staged_fields(case: Case) -> dict[str, Any]:
    """Two stages; of "tree" the levels of the embedding, too, for S = 11 those of configs/compare/tuning.yaml."""
    last = case.num_subtokens
    half = (last + 1) // 2
    fields = {"objective": "joint", "stage_digits": [half, last], "head": "stages"}
    if case.objective == "stages":
        return fields | {"reveal_order": "nested"}
    levels = sorted({3 * last // 8, half, 3 * last // 4, last})
    return fields | {"reveal_order": "coarse_first", "subtoken_embedding": "ancestors", "tree_levels": levels}


class Stepper:
    """One model with its optimizer and a fixed batch of ids (B, L), all on one device."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor):
        self.model, self.ids, self.device = model.train(), ids, ids.device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    @classmethod
    def of_case(cls, kind: str, case: Case, options: argparse.Namespace, device: torch.device) -> "Stepper":
        """Of a model made here, whose Transformer is compiled where the options ask for it."""
        torch.manual_seed(options.seed)
        model = build(kind, case, options).to(device)
        if options.compile:
            model.model.compile()
        return cls(model, torch.randint(case.vocab_size, (options.batch, options.length), device=device))

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            return self.model(input_ids=self.ids, labels=self.ids).loss

    def step(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent's memory at the time of the fork
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(kind: str, options: argparse.Namespace, device: torch.device) -> None:
    before = peak_mib(device)
    stepper = Stepper.of_case(kind, options.cases[0], options, device)
    for _ in range(2):
        stepper.step()
    print(json.dumps(peak_mib(device) - before))


def memory_in_fresh_process(kind: str, case: Case, options: argparse.Namespace) -> float:
    # glibc keeps freed blocks below a growing threshold for later; a fixed one makes the peak that of live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    sizes = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in
             ("hidden-size", "layers", "heads", "length", "batch", "seed")]  # fmt: skip
    sizes += ["--compile"] if options.compile else []
    done = subprocess.run(
        [sys.executable, __file__, *sizes, "--cases", str(case), "--memory-of", kind],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(done.stdout.strip().splitlines()[-1])


def beside_products(
    stepper: Stepper, flops: int, sides: dict[str, tuple[int, int, int]], repeats: int
) -> dict[str, Any]:
    """FLOP/s of products by themselves, which take turns with the steps, and the share of them that a step reaches.

    sides: M, K and N of each product.
    """
    dtype = torch.float32 if stepper.device.type == "cpu" else torch.bfloat16
    alone = {name: products_alone(*each, flops // 10, stepper.device, dtype) for name, each in sides.items()}
    seconds = by_turns({"step": stepper.step} | {name: run for name, (run, _) in alone.items()}, repeats)
    return {
        "seconds_beside_products": seconds,
        "matrix_rate": {name: done / statistics.median(seconds[name]) for name, (_, done) in alone.items()},
        "share_of_matrix_rate": {
            name: flops / done / ratio(seconds, "step", name)["median"] for name, (_, done) in alone.items()
        },
    }


def measure(case: Case, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A row of the record."""
    steppers = {kind: Stepper.of_case(kind, case, options, device) for kind in case.kinds}
    flops = measure_flops(steppers["prime"].loss)
    steppers["prime"].optimizer.zero_grad(set_to_none=True)
    seconds = by_turns({kind: stepper.step for kind, stepper in steppers.items()}, options.steps)
    for kind in case.kinds[1:]:
        del steppers[kind]
    sides = {"width": (2048, options.hidden_size, 4 * options.hidden_size), "square": (2048, 2048, 2048)}
    beside = beside_products(steppers["prime"], flops, sides, options.steps)
    del steppers
    memory = {kind: memory_in_fresh_process(kind, case, options) for kind in case.kinds}
    medians, peak = {kind: statistics.median(values) for kind, values in seconds.items()}, peak_flops(device)
    times = {kind: ratio(seconds, "prime", kind) for kind in case.kinds[1:]}
    return {
        "vocab_size": case.vocab_size,
        "num_subtokens": case.num_subtokens,
        "objective": case.objective,
        "seconds_median": medians,
        "seconds": seconds,
        "tokens_per_second": {kind: options.batch * options.length / medians[kind] for kind in case.kinds},
        "peak_mib": memory,
        "time_ratio": times["causal"]["median"],
        "time_ratio_range": times["causal"]["range"],
        "memory_ratio": memory["prime"] / memory["causal"],
        **{f"time_ratio_{kind}": each["median"] for kind, each in times.items() if kind != "causal"},
        **{f"time_ratio_{kind}_range": each["range"] for kind, each in times.items() if kind != "causal"},
        "flops": flops,
        **beside,
        "mfu": None if peak is None else flops / medians["prime"] / peak,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory_of:
        measure_memory(options.memory_of, options, device)
        return
    keep_freed_memory()
    code = code_version()
    print(
        f"D = {options.hidden_size}, {options.layers} layers, {options.batch} x {options.length} tokens, {device.type}"
    )
    rows = []
    for case in options.cases:
        row = measure(case, options, device)
        rows.append(row)
        low, high = row["time_ratio_range"]
        print(
            f"V = {case.vocab_size:,}, S = {case.num_subtokens}, {case.objective}: "
            f"{row['tokens_per_second']['prime']:,.0f} tokens/s, causal {row['tokens_per_second']['causal']:,.0f}; "
            f"time ratio {row['time_ratio']:.3f} ({low:.3f} to {high:.3f}); "
            f"{row['peak_mib']['prime']:,.0f} / {row['peak_mib']['causal']:,.0f} MiB, "
            f"ratio {row['memory_ratio']:.3f}; "
            + ", ".join(
                f"{share:.0%} of {row['matrix_rate'][name] / 1e9:,.0f} GFLOP/s ({name})"
                for name, share in row["share_of_matrix_rate"].items()
            )
            + (f"; time ratio to MDM {row['time_ratio_mdm']:.3f}" if "time_ratio_mdm" in row else "")
            + ("" if row["mfu"] is None else f", MFU {row['mfu']:.0%}"),
            flush=True,
        )
    names = ("hidden_size", "layers", "heads", "length", "batch", "steps", "compile")
    shape = {name: getattr(options, name) for name in names}
    if options.output:
        results = {"shape": shape, "device": device.type, "rows": rows}
        record = make_record("training_step", results, seed=options.seed, code=code)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
