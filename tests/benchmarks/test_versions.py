"""Bounds, pins and the record of the versions that the suite was run with (benchmarks/versions.py)."""

import json
import runpy
import subprocess
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest

from docs.tables.benchmarks import versions_table

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "benchmarks" / "versions.py"))
BOUNDS = TOOL["read_bounds"](ROOT / "setup.cfg")
PINS = TOOL["read_pins"](ROOT / "constraints.txt")


def record_of(lowest: dict[str, str], newest: dict[str, str], failed: int = 0) -> dict:
    counts = {"passed": 1_234 - failed, "failed": failed, "skipped": 1, "seconds": 60}
    return {"results": {"lowest": counts | {"packages": lowest}, "newest": counts | {"packages": newest}}}


def test_every_dependency_has_a_lower_bound_and_a_pin_that_it_allows():
    """Torch too: left free, pip takes another build than the one that the recorded results were made with."""
    for name, lowest in BOUNDS.items():
        assert name in PINS, name
        assert [int(part) for part in PINS[name].split(".")] >= [int(part) for part in lowest.split(".")], name


def test_a_dependency_without_a_lower_bound_is_refused(tmp_path):
    path = tmp_path / "setup.cfg"
    path.write_text("[options]\ninstall_requires =\n    torch>=2.13.0,<3\n    Some_Package\n")
    with pytest.raises(ValueError, match="has 'Some_Package'; write it as NAME>=LOWEST"):
        TOOL["read_bounds"](path)
    path.write_text(path.read_text().replace("Some_Package", "Some_Package>=1.0"))
    assert TOOL["read_bounds"](path) == {"torch": "2.13.0", "some-package": "1.0"}


def test_the_lowest_environment_takes_each_bound_and_the_newest_only_what_is_held():
    held = {name: PINS[name] for name in TOOL["HELD"]}
    texts = {name: TOOL["constraints"](name, BOUNDS, PINS) for name in ("lowest", "newest")}
    found = {name: dict(line.split("==") for line in text.splitlines()) for name, text in texts.items()}
    assert found["newest"] == held
    assert found["lowest"] == held | BOUNDS


def test_a_record_of_other_bounds_other_pins_or_failures_is_named():
    check = TOOL["check"]
    bounds, pins = {"torch": "2.13", "peft": "0.20.0"}, {"torch": "2.13.0", "peft": "0.21.2", "ruff": "1.0"}
    assert check(record_of({"torch": "2.13.0", "peft": "0.20.0"}, pins), bounds, pins) == []
    assert check(record_of(bounds, pins | {"peft": "0.21.0"}), bounds, pins) == [
        "newest peft tested: 0.21.0, constraints.txt pins 0.21.2"
    ]
    assert check(record_of({"torch": "2.13.0"}, pins), bounds, pins) == [
        "lowest peft tested: None, setup.cfg allows 0.20.0"
    ]
    assert check(record_of(bounds, pins, failed=3), bounds, pins) == [
        f"3 tests failed with the {name} versions" for name in ("lowest", "newest")
    ]


@pytest.mark.parametrize(
    ("suite", "counts"),
    [
        ('<testsuite tests="9" failures="2" errors="1" skipped="1"/>', (5, 3, 1)),
        ('<testsuite tests="0" failures="0" errors="0" skipped="0"/>', (0, 1, 0)),  # a suite that ran nothing
    ],
)
def test_counts_are_those_of_pytest(suite, counts):
    found = TOOL["read_counts"](f"<testsuites>{suite}</testsuites>")
    assert (found["passed"], found["failed"], found["skipped"]) == counts


def test_releases_newer_than_an_environment_are_those_that_pip_would_install(monkeypatch):
    """A stand-in for pip, whose report lists what it would change; the package itself is always in it."""
    listed = [{"metadata": {"name": name, "version": "9.1"}} for name in ("prime_v2", "Transformers")]

    def pip(command, **options):
        assert "--dry-run" in command
        Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": listed}))

    monkeypatch.setattr(subprocess, "run", pip)
    assert TOOL["newer_releases"](Path("python"), "torch==2.13.0\n") == ["Transformers 9.1"]


def test_pins_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "constraints.txt"
    TOOL["write_pins"](path, PINS)
    assert TOOL["read_pins"](path) == PINS
    assert all(line.startswith("#") or "==" in line for line in path.read_text().splitlines())


def test_what_an_environment_holds_is_listed_without_pip_and_the_package():
    import sys

    held = TOOL["installed"](Path(sys.executable))
    assert held["torch"] == version("torch").split("+")[0]
    assert not {"pip", "prime-v2"} & set(held)


def test_the_quick_run_leaves_out_only_named_files():
    """So that a new file of tests is run with the lowest and the newest versions."""
    tests = ROOT / "tests"
    files = {path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    left_out = set()
    for pattern in TOOL["NO_DEPENDENCY"]:
        found = {each for each in files if fnmatch(each, f"{pattern}.py")}  # * matches folders too, as in pytest
        assert found, f"no file of tests is named {pattern}"
        left_out |= found
    meets = ("modeling_p", "training/", "eval/", "commands/", "data/", "tokenizer")
    harmless = {"modeling_prime_v2/test_bounds.py", "modeling_prime_v2/test_code_table.py"}
    assert [name for name in left_out - harmless if any(word in name for word in meets)] == []
    assert len(files - left_out) > len(left_out)


def test_the_table_names_each_package_and_the_counts(tmp_path):
    record = record_of({"torch": "2.13.0", "peft": "0.20.0"}, {"torch": "2.13.0", "peft": "0.21.2"}) | {
        "name": "versions",
        "command": "make test-versions",
        "commit": "0123456789abcdef",
        "time_utc": "2026-01-02T03:04:05Z",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"processor": "a processor", "threads": 2, "accelerator": None},
        "seed": None,
    }
    (tmp_path / "versions.json").write_text(json.dumps(record))
    table = versions_table(tmp_path)
    assert "| peft | 0.20.0 | 0.21.2 |\n" in table
    assert "lowest: 1,234 passed, 0 failed, 1 skipped; newest: 1,234 passed, 0 failed, 1 skipped" in table
    assert "(Python 3.11.7, 2026-01-02, commit 0123456789)" in table
