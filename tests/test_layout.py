"""The rooms of the source tree: imports run one way, and no file or package outgrows its name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each room may import of the others. The model is remote code, so it imports its own files only.
BELOW = {
    "modeling_prime_v2": (),
    "output": (),
    "tokenization": ("modeling_prime_v2", "output"),
    "hub_card": ("modeling_prime_v2", "output"),
    "data": ("modeling_prime_v2", "output", "tokenization", "hub_card"),
    "eval": ("modeling_prime_v2", "output", "tokenization", "hub_card", "data"),
    "training": ("modeling_prime_v2", "output", "tokenization", "hub_card", "data", "eval"),
    "studies": ("modeling_prime_v2", "output", "tokenization", "hub_card", "data", "eval", "training"),
    "commands": ("modeling_prime_v2", "output", "tokenization", "hub_card", "data", "eval", "training", "studies"),
}
LONGEST_FILE = 450  # lines
LARGEST_SHARE = 0.35  # of the lines of all rooms
FILES = [path for room in BELOW for path in sorted((ROOT / room).rglob("*.py"))]


def room_of(module: str) -> str:
    """The folder that a module `prime_v2...` lies in."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in BELOW else "modeling_prime_v2"


def imported(path: Path) -> set[str]:
    """The rooms whose modules a file imports, wherever in the file the import stands.

    `prime_v2/__init__.py` names what users import from the package, the tokenizer among it, and imports it on demand.
    """
    if path == ROOT / "modeling_prime_v2" / "__init__.py":
        return set()
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""] + [f"{node.module}.{each.name}" for each in node.names]
        else:
            continue
        rooms |= {room_of(each) for each in modules if each.split(".")[0] == "prime_v2" and each != "prime_v2"}
    return rooms


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in (ROOT / room).rglob("*.py"):
        above = imported(path) - {room, *BELOW[room]}
        assert not above, f"{path.relative_to(ROOT)} imports from {', '.join(sorted(above))}"


def test_nothing_imports_the_script_the_tests_or_the_pages():
    for path in FILES:
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in ([each.name for each in node.names] if isinstance(node, ast.Import) else [])
            + ([node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
        }
        assert not names & {"train", "tests", "docs", "benchmarks", "configs"}, path


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_package_is_a_hall():
    counts = {room: sum(lines(path) for path in (ROOT / room).rglob("*.py")) for room in BELOW}
    largest = max(counts, key=counts.get)
    assert counts[largest] <= LARGEST_SHARE * sum(counts.values()), counts


def test_no_file_is_longer_than_can_be_read_at_once():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.py"), ROOT / "train.py"]:
        assert lines(path) <= LONGEST_FILE, f"{path.relative_to(ROOT)}: {lines(path)} lines"


def test_tests_lie_in_the_folder_of_what_they_test():
    folders = {path.parent.relative_to(ROOT / "tests").parts[:1] for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= {(), ("benchmarks",), ("docs",), *((room,) for room in BELOW)}


def test_no_test_imports_from_a_file_of_tests():
    """What two of them share is a module of its own in tests/, which sets up without the tests of the other."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[-1].startswith("test_") for name in names), path
