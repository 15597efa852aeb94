"""Ways of doing one thing timed by turns, so that all of them see the same machine; ratios of neighbors in time."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prime_v2.linear_prime_v2 import product
from prime_v2.output.places import check_file


def positive(text: str) -> int:
    """A size on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1, e.g. 8")
    return int(text)


def _place(text: str) -> Path:
    """The place of a record, tried before anything is measured; a record that is there is overwritten."""
    try:
        check_file(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--output ")) from None
    return Path(text)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Option --output, the file of the record."""
    parser.add_argument("--output", type=_place, metavar="FILE", help="write the record here (JSON)")


HEAD_DIM = 64  # of the benchmarks that have no option for the number of heads


def _width(text: str) -> int:
    if positive(text) % HEAD_DIM:
        raise argparse.ArgumentTypeError(f"{text} must be a multiple of {HEAD_DIM}, the width of a head, e.g. 256")
    return int(text)


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Options of whole numbers, hidden_size=256 as --hidden-size 256; `seed` may be anything."""
    types = {"seed": int} if "heads" in defaults else {"seed": int, "hidden_size": _width}
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=types.get(name, positive), default=default)


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call; an accelerator is waited for."""
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def by_turns(ways: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` a way, after `warm_up` calls that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(warm_up + repeats):
        for name, work in ways.items():
            taken = seconds_of(work)
            if repeat >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> dict[str, Any]:
    """seconds[name] / seconds[reference] of neighbors: {"median", "range"}."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
    return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


def products_alone(
    rows: int, inner: int, columns: int, flops: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Any], int]:
    """What does about `flops` FLOPs of (rows, inner) @ (inner, columns) by the faster of two libraries; the FLOPs."""
    left, right = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))
    ways = (lambda: left @ right.t(), lambda: product(left, right))
    fastest = min(ways, key=lambda way: min(seconds_of(way) for _ in range(4)))
    each = 2 * rows * inner * columns
    count = max(1, flops // each)

    def run() -> None:
        for _ in range(count):
            fastest()

    return run, count * each
