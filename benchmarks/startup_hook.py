"""What `prime_v2_lm_eval.pth` adds to the start of a Python process that has nothing to do with lm-eval.

    python benchmarks/startup_hook.py                           # 300 pairs of starts, about 10 seconds
    python benchmarks/startup_hook.py --output results/startup_hook.json

`python -c pass` is started in two fresh virtual environments that differ only by that file. The starts alternate, the
first of each pair by turns. Beside the whole start, the time of only the file's line is taken, inside new processes.
"""

import argparse
import json
import random
import runpy
import statistics
import subprocess
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

from timing import add_output

from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record

BACKEND = runpy.run_path(str(Path(__file__).parents[1] / "_build.py"))
WARM_UP = 10
RESAMPLES = 2000
TIME_LINE = "import time; line = {!r}; begin = time.perf_counter(); exec(line); print(time.perf_counter() - begin)"


def make_environment(home: Path, with_hook: bool) -> Path:
    """The interpreter of a new environment without pip."""
    venv.create(home, symlinks=True)
    if with_hook:
        site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
        (site_packages / BACKEND["HOOK_FILE"]).write_text(BACKEND["HOOK"])
    return home / "bin" / "python"


def start_seconds(python: Path) -> float:
    """Wall-clock time of `python -c pass`."""
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return time.perf_counter() - begin


def line_milliseconds(python: Path) -> float:
    """Time of the line of the file, run once in a new process."""
    command = [python, "-c", TIME_LINE.format(BACKEND["HOOK"])]
    return 1000 * float(subprocess.run(command, check=True, capture_output=True).stdout)


def interval_95(values: list[float], seed: int) -> list[float]:
    """Bootstrap interval of a median."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [medians[round(0.025 * RESAMPLES)], medians[round(0.975 * RESAMPLES) - 1]]


def measure(pairs: int, seed: int) -> dict[str, object]:
    """Medians in milliseconds, and the median of the differences within pairs with its interval."""
    milliseconds: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        pythons = {name: make_environment(Path(folder) / name, name == "with") for name in milliseconds}
        for pair in range(pairs + WARM_UP):
            for name in sorted(milliseconds, reverse=pair % 2 == 1):
                taken = 1000 * start_seconds(pythons[name])
                if pair >= WARM_UP:
                    milliseconds[name].append(taken)
        line = [line_milliseconds(pythons["without"]) for _ in range(min(pairs, 50))]
    differences = [a - b for a, b in zip(milliseconds["with"], milliseconds["without"], strict=True)]
    return {
        "pairs": pairs,
        "start_ms": {name: statistics.median(values) for name, values in milliseconds.items()},
        "added_ms": statistics.median(differences),
        "added_ms_interval_95": interval_95(differences, seed),
        "line_ms": statistics.median(line),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    options = parser.parse_args(arguments)
    code = code_version()
    results = measure(options.pairs, options.seed)
    print(json.dumps(results, indent=1))
    if options.output:
        write_json(options.output, make_record("startup_hook", results, seed=options.seed, code=code))


if __name__ == "__main__":
    main()
