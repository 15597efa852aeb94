"""Run the fuzz tests in full and count their cases: answered and checked, refused with a sentence, failed.

    python benchmarks/fuzz.py --output results/fuzz.json          # every file, over 10,000 cases
    python benchmarks/fuzz.py config code_table --jobs 2          # some files, two at a time

A failed case is a silent wrong answer or an error that is no refusal; Hypothesis prints the smallest one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from timing import add_output, positive

from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    path.stem.removeprefix("test_fuzz_"): path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_fuzz_*.py")
}
SUMMARY = re.compile(r"(\d+) (passed|failed|error)")


def fuzz(name: str) -> dict[str, Any]:
    """Counts of one file, in a process of its own, as tests/fuzzing.py takes them."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "pytest", "-q", "--hypothesis-profile=thorough", str(FILES[name])]
        environment = {**os.environ, "PRIME_V2_FUZZ_COUNTS": str(counts)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        by_test = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    ended = {outcome: int(number) for number, outcome in SUMMARY.findall(done.stdout.splitlines()[-1])}
    total = {kind: sum(n for test, n in by_test.items() if test.endswith(kind)) for kind in ("answered", "refused")}
    return {
        "file": FILES[name].as_posix(),
        "cases": sum(total.values()),
        **total,
        "tests_passed": ended.get("passed", 0),
        "tests_failed": ended.get("failed", 0) + ended.get("error", 0) + (done.returncode not in (0, 1)),
        "by_test": by_test,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    names = sorted(FILES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--jobs", type=positive, default=1, help="files at once")
    add_output(parser)
    args = parser.parse_args()
    unknown = sorted(set(args.files) - set(names))
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(names)}")
    code, rows = code_version(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(fuzz, args.files or names):
            rows.append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "by_test"}), flush=True)
    results = {
        "cases": sum(row["cases"] for row in rows),
        "tests_failed": sum(row["tests_failed"] for row in rows),
        "files": rows,
    }
    print(f"{results['cases']:,} cases, {results['tests_failed']} tests failed")
    if args.output is not None:
        write_json(args.output, make_record("fuzz", results, seed=0, code=code))
    return min(1, results["tests_failed"])


if __name__ == "__main__":
    sys.exit(main())
