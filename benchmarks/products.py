"""Rates of float32 products with a weight matrix on this machine: PyTorch's own, and `linear_prime_v2.product`.

    python benchmarks/products.py                                   # the shapes of D = 512; about a minute
    python benchmarks/products.py --hidden-size 256 --output results/products.json

The two take turns on the same matrices. "forward" is inputs (M, K) @ weight (N, K).T; "backward" is the gradient of
the inputs, (M, N) @ weight (N, K), which a step computes as often. PyTorch takes MKL on a CPU, `product` oneDNN where
both are there and the product is not small; where it does not, both are the same.
"""

import argparse
import statistics
from typing import Any

import torch
from timing import add_output, add_sizes, by_turns, ratio

from prime_v2.chunked_loss_prime_v2 import CHUNK_ELEMENTS_CPU
from prime_v2.linear_prime_v2 import product
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """Name to (M, K, N)."""
    width, tokens = options.hidden_size, options.tokens
    return {
        "query, key, value, output": (tokens, width, width),
        "gate, up": (tokens, width, 4 * width),
        "down": (tokens, 4 * width, width),
        "head, a chunk": (max(1, CHUNK_ELEMENTS_CPU // options.vocab_size), width, options.vocab_size),
        "square": (2048, 2048, 2048),
    }


def measure(name: str, shape: tuple[int, int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for forward, a row for backward."""
    rows, columns, height = shape
    generator = torch.Generator().manual_seed(options.seed)
    inputs, weight, grad = (
        torch.randn(size, generator=generator) for size in ((rows, columns), (height, columns), (rows, height))
    )
    found = []
    for direction, left, right in (("forward", inputs, weight), ("backward", grad, weight.t())):
        ways = {
            "pytorch": lambda left=left, right=right: torch.nn.functional.linear(left, right),
            "product": lambda left=left, right=right: product(left, right),
        }
        with torch.no_grad():
            seconds = by_turns(ways, options.repeats)
        speedup, flops = ratio(seconds, "pytorch", "product"), 2 * rows * columns * height
        rates = {way: flops / statistics.median(times) for way, times in seconds.items()}
        found.append(
            {"matrices": name, "direction": direction, "shape": shape, "seconds": seconds, "flops_per_second": rates}
            | {"speedup": speedup["median"], "speedup_range": speedup["range"]}
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden_size=512, tokens=2048, vocab_size=50257, repeats=15, seed=0)
    add_output(parser)
    options = parser.parse_args(arguments)
    code = code_version()
    rows = []
    for name, shape in shapes(options).items():
        for row in measure(name, shape, options):
            rows.append(row)
            rates = row["flops_per_second"]
            print(
                f"{name:26} {row['direction']:9} {rates['pytorch'] / 1e9:5.0f} to {rates['product'] / 1e9:5.0f} "
                f"GFLOP/s, {row['speedup']:.2f} times"
            )
    if options.output:
        shape = {key: value for key, value in vars(options).items() if key != "output"}
        record = make_record("products", {"shape": shape, "rows": rows}, seed=options.seed, code=code)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
