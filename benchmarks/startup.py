"""Seconds to `import prime_v2` and to start the command line, against Transformers' own import.

    python benchmarks/startup.py                                # 15 starts of each, by turns
    python benchmarks/startup.py --output results/startup.json

Each start is a new process. `import transformers` loads nothing but names; the reference for a library that defines a
model is the import of the classes that its model file needs, so both are here.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

from timing import add_output, by_turns, positive

from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record

STARTS = {
    "python": "pass",
    "transformers": "import transformers",
    "transformers with torch": "import torch, transformers",
    "a model file of transformers": "import transformers.models.llama.modeling_llama",
    "prime_v2": "import prime_v2",
    "prime_v2 with its model": "from prime_v2 import PrimeV2ForMaskedDiffusion",
    "prime-v2 --help": "import sys; sys.argv[1:] = ['--help']; from prime_v2.commands.main import main; main()",
}
# What is added to what.
ADDED = (
    ("prime_v2", "transformers"),
    ("prime_v2 with its model", "a model file of transformers"),
    ("prime-v2 --help", "transformers"),
)


def start(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=15)
    add_output(parser)
    options = parser.parse_args(arguments)
    code = code_version()
    seconds = by_turns({name: start(code) for name, code in STARTS.items()}, options.repeats)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in medians.items():
        print(f"{name:30} {1000 * each:7.0f} ms")
    added = {
        f"{name} - {other}": statistics.median(a - b for a, b in zip(seconds[name], seconds[other], strict=True))
        for name, other in ADDED
    }
    for name, each in added.items():
        print(f"{name:60} {1000 * each:+7.0f} ms")
    if options.output:
        results = {"seconds_median": medians, "seconds": seconds, "added_median": added}
        print(f"record: {write_json(options.output, make_record('startup', results, seed=None, code=code))}")


if __name__ == "__main__":
    main()
