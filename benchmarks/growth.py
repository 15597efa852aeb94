"""How time and memory of a training step grow with batch B, length L and vocabulary V: slopes on logarithmic scales.

    python benchmarks/growth.py                                 # D = 256, 4 layers; about 5 minutes on two cores
    python benchmarks/growth.py --output results/growth.json

A slope of 1 is proportional. One of B, L and V changes at a time from a middle point; sizes take turns. Beside it is
Transformers' causal Llama of the same shape with full logits, which holds B L V numbers; here the logits are computed
in chunks, so the memory of activations does not depend on V.
"""

import argparse
import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from timing import HEAD_DIM, add_output, add_sizes, by_turns
from training_step import KINDS, Case, Stepper, memory_in_fresh_process

from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record

AXES = {"batch": (2, 4, 8, 16), "length": (64, 128, 256, 512), "vocab_size": (4096, 8192, 16384, 32768)}
MIDDLE = {"batch": 4, "length": 256, "vocab_size": 16384}


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Least squares on logarithmic scales."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure(axis: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Medians at each size of one axis, and their slopes."""
    found: dict[str, Any] = {"axis": axis, "sizes": AXES[axis], "seconds": {}, "peak_mib": {}, "slopes": {}}
    for kind in KINDS:
        steppers, memory = {}, []
        for size in AXES[axis]:
            at = MIDDLE | {axis: size}
            shape = SimpleNamespace(
                **vars(options),
                batch=at["batch"],
                length=at["length"],
                heads=options.hidden_size // HEAD_DIM,
                compile=False,
            )
            case = Case(at["vocab_size"], (at["vocab_size"] - 1).bit_length(), "marginal")
            steppers[str(size)] = Stepper.of_case(kind, case, shape, device)
            memory.append(memory_in_fresh_process(kind, case, shape))
        seconds = by_turns({name: each.step for name, each in steppers.items()}, options.repeats)
        medians = [statistics.median(each) for each in seconds.values()]
        found["seconds"][kind], found["peak_mib"][kind] = medians, memory
        found["slopes"][kind] = {"seconds": slope(AXES[axis], medians), "peak_mib": slope(AXES[axis], memory)}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden_size=256, layers=4, repeats=3, seed=0)
    add_output(parser)
    options = parser.parse_args(arguments)
    code = code_version()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    axes = []
    for axis in AXES:
        row = measure(axis, options, device)
        axes.append(row)
        for kind, each in row["slopes"].items():
            print(f"{axis:10} {kind:7} time ~ size^{each['seconds']:.2f}, peak memory ~ size^{each['peak_mib']:.2f}")
    if options.output:
        shape = {key: value for key, value in vars(options).items() if key != "output"}
        record = make_record("growth", {"shape": shape, "middle": MIDDLE, "axes": axes}, seed=options.seed, code=code)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
