"""The suite with the lowest and with the newest of every dependency that setup.cfg allows, an environment each.

    make test-versions                     # the whole suite in both; writes what is below
    python benchmarks/versions.py --quick  # for CI: the tests that meet dependencies; the newest only where it is news
    python benchmarks/versions.py --check  # whether the record is of the bounds and pins that stand here

The lowest is each bound of setup.cfg, with the newest that goes with it of what setup.cfg does not name; the newest is
what `pip install .` takes today. A whole run writes `results/versions.json` and the table of docs/dependencies.md, and
where both environments were green it pins the newest in constraints.txt, which `make` installs.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record, read_record

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "versions.json"
DOCS = ROOT / "docs" / "dependencies.md"
ENVIRONMENTS = {"lowest": ".venv-lowest", "newest": ".venv-newest"}
# In every environment as in constraints.txt, and moved there by hand: other builds of torch are not to be had
# everywhere and give other numbers; the verdicts of mypy and ruff change between releases.
HELD = ("torch", "mypy", "ruff")
# Files of tests that `--quick` leaves out: what they test takes numbers, files or text from us, not from the parts of
# a dependency that change. A new file is run.
NO_DEPENDENCY = (
    "benchmarks/*",
    "docs/*",
    "hub_card/*",
    "modeling_prime_v2/test_bounds",
    "modeling_prime_v2/test_code_table",
    "output/*",
    "studies/*",
    "test_packaging",
    "tokenization/test_codes",
    "tokenization/test_entropy",
)
PIP = ("-W", "ignore", "-m", "pip")  # it has deprecated calls of its own
PINS_HEAD = """\
# What the suite was last green on, which `make` installs. `make test-versions` writes this file; torch, mypy and ruff
# it takes over as they stand here (docs/dependencies.md).
"""


def read_bounds(setup_cfg: Path) -> dict[str, str]:
    """Name to lowest version of each dependency of the package; ValueError for one that has none."""
    options = ConfigParser()
    options.read(setup_cfg, encoding="utf-8")
    found = {}
    for line in options["options"]["install_requires"].split():
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?", line)
        if match is None:
            raise ValueError(
                f"install_requires of {setup_cfg} has {line!r}; write it as NAME>=LOWEST or NAME>=LOWEST,<NEXT"
            )
        found[normal(match[1])] = match[2]
    return found


def read_pins(constraints: Path) -> dict[str, str]:
    """Name to version of each pin of a constraints file."""
    return {
        normal(name): each for name, each in re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(), re.MULTILINE)
    }


def normal(name: str) -> str:
    """A project's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same_version(one: str | None, other: str | None) -> bool:
    """Whether two versions are one release: 1.10 and 1.10.0 are."""
    return one is not None and other is not None and re.sub(r"(\.0)+$", "", one) == re.sub(r"(\.0)+$", "", other)


def constraints(name: str, bounds: dict[str, str], pins: dict[str, str]) -> str:
    """The text of the constraints file behind an environment."""
    held = {each: pins[each] for each in HELD}
    wanted = held | (bounds if name == "lowest" else {})
    return "".join(f"{package}=={version}\n" for package, version in wanted.items())


def pip_install(python: Path, text: str, *arguments: str) -> None:
    """`pip install`, everything as new as the constraints in `text` allow."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text)
        file.flush()
        strategy = ("--upgrade", "--upgrade-strategy", "eager", "--constraint", file.name)
        subprocess.run([python, *PIP, "install", "--quiet", *strategy, *arguments], cwd=ROOT, check=True)


def build(name: str, text: str) -> Path:
    """The interpreter of an environment, made or brought up to date; CalledProcessError when it does not install."""
    home = ROOT / ENVIRONMENTS[name]
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run(["make", "--no-print-directory", f"VENV={home.name}", home.name], cwd=ROOT, check=True)
    pip_install(python, text, "--editable", ".[test]")
    subprocess.run([python, *PIP, "check"], cwd=ROOT, check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Name to version of what an environment holds, but pip and the package itself; without a build's `+cpu`."""
    command = [python, *PIP, "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {normal(each["name"]): each["version"].split("+")[0] for each in listed}
    return {name: version for name, version in sorted(found.items()) if name not in ("pip", "prime-v2")}


def newer_releases(python: Path, text: str) -> list[str]:
    """What `pip install .` would change in an environment, as `name version`: releases newer than its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip_install(python, text, "--dry-run", "--report", str(report), ".")
        found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    return [f"{each['name']} {each['version']}" for each in found if normal(each["name"]) != "prime-v2"]


def run_suite(python: Path, arguments: Iterable[str]) -> dict[str, Any]:
    """Counts of a run of pytest, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = time.monotonic()
        subprocess.run([python, "-m", "pytest", *arguments, f"--junitxml={report}"], cwd=ROOT, check=False)
        seconds = round(time.monotonic() - start)
        counts = read_counts(report.read_text()) if report.exists() else {"passed": 0, "failed": 1, "skipped": 0}
    return counts | {"seconds": seconds}


def read_counts(report: str) -> dict[str, int]:
    """Tests passed, failed (in their set-up too) and skipped, from pytest's JUnit report; none run is one failed."""
    (suite,) = ElementTree.fromstring(report).iter("testsuite")
    total, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed if total else 1, "skipped": skipped}


def check(record: dict[str, Any], bounds: dict[str, str], pins: dict[str, str]) -> list[str]:
    """What in a record of a whole run is not what setup.cfg allows and constraints.txt pins, or was not green."""
    problems = []
    for name, expected, where in (("lowest", bounds, "setup.cfg allows"), ("newest", pins, "constraints.txt pins")):
        failed, tested = (record["results"][name][key] for key in ("failed", "packages"))
        if failed:
            problems.append(f"{failed} tests failed with the {name} versions")
        for package in bounds:
            if not same_version(tested.get(package), expected.get(package)):
                problems.append(f"{name} {package} tested: {tested.get(package)}, {where} {expected.get(package)}")
    return problems


def write_pins(path: Path, versions: dict[str, str]) -> None:
    """Pin what an environment holds."""
    path.write_text(PINS_HEAD + "".join(f"{name}=={version}\n" for name, version in versions.items()))


def quick(bounds: dict[str, str], pins: dict[str, str], arguments: list[str]) -> bool:
    """CI's part, beside its run of the whole suite on the pinned versions; True where it is green."""
    arguments = [*arguments, *(f"--ignore-glob=tests/{pattern}.py" for pattern in NO_DEPENDENCY)]
    news = newer_releases(Path(sys.executable), constraints("newest", bounds, pins))
    names = ["lowest", "newest"] if news else ["lowest"]
    print(f"newer than the pinned versions: {', '.join(news) or 'nothing, so the pinned are the newest'}", flush=True)
    green = True
    for name in names:
        found = run_suite(build(name, constraints(name, bounds, pins)), arguments)
        print(f"{name} versions: {found}", flush=True)
        green &= not found["failed"]
    return green


def whole(bounds: dict[str, str], pins: dict[str, str], arguments: list[str]) -> bool:
    """Both environments and the whole suite, recorded; True where both are green."""
    code, results = code_version(), {}
    for name in ENVIRONMENTS:
        start = time.monotonic()
        python = build(name, constraints(name, bounds, pins))
        built = round(time.monotonic() - start)
        held = installed(python)
        found = run_suite(python, arguments)
        print(f"{name} versions: {found}", flush=True)
        results[name] = {**found, "seconds_to_install": built, "packages": {each: held.get(each) for each in bounds}}
    green = not any(each["failed"] for each in results.values())
    if green:
        write_pins(ROOT / "constraints.txt", held)
    record = make_record("versions", results, seed=None, command="make test-versions", code=code)
    write_json(RECORD, record)
    subprocess.run([sys.executable, "-m", "docs.tables", str(DOCS)], cwd=ROOT, check=True)
    return green


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="what CI runs; writes nothing")
    mode.add_argument("--check", action="store_true", help="compare the record with setup.cfg and constraints.txt")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    bounds, pins = read_bounds(ROOT / "setup.cfg"), read_pins(ROOT / "constraints.txt")
    if options.check:
        problems = check(read_record(RECORD), bounds, pins)
        for problem in problems:
            print(f"results/versions.json: {problem}; run `make test-versions`")
        return int(bool(problems))
    return int(not (quick if options.quick else whole)(bounds, pins, options.pytest))


if __name__ == "__main__":
    sys.exit(main())
