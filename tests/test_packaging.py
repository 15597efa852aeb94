"""Wheel, source distribution and installed package, each built from a copy of the checkout, without the network."""

import ast
import base64
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest
from installed import HOOK, HOOK_FILE
from tiny_runs import MODEL, TINY, write_text

from prime_v2.eval.plugin import MODEL_CLASS

ROOT = Path(__file__).parents[1]
ROOMS = ("output", "tokenization", "hub_card", "data", "eval", "training", "studies", "commands", "configs")
# Where each package's files lie in the checkout.
FOLDERS = {"prime_v2": "modeling_prime_v2", **{f"prime_v2/{room}": room for room in ROOMS}}

# Prints, as one JSON line, where each module of the installed package was imported from.
PROBE = """
import importlib.metadata, importlib.util, json, pkgutil
import prime_v2
names = ["prime_v2", *(m.name for m in pkgutil.walk_packages(prime_v2.__path__, "prime_v2."))]
files = {name: importlib.import_module(name).__file__ for name in names if not name.endswith("__main__")}
rooms = ("eval", "hub_card", "modeling_prime_v2", "studies", "tokenization")
strays = [name for name in rooms if importlib.util.find_spec(name)]
(command,) = importlib.metadata.entry_points(group="console_scripts", name="prime-v2")
print(json.dumps({"files": files, "strays": strays, "command": callable(command.load())}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; what it printed is in the failure when it fails."""
    environment = {**os.environ, "PYTHONWARNINGS": ""}  # pip and setuptools have deprecated calls of their own
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, out: Path, kind: str) -> Path:
    """One distribution, `kind` wheel, editable or sdist, by the setuptools of this environment."""
    code = f"from build import ProjectBuilder; ProjectBuilder({str(source)!r}).build({kind!r}, {str(out)!r})"
    out.mkdir(exist_ok=True)
    run(sys.executable, "-c", code, cwd=out)
    (built,) = out.iterdir()
    return built


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that a build leaves nothing in the checkout and finds nothing left there by an earlier one."""
    copy = tmp_path_factory.mktemp("checkout") / "prime-v2"
    leave = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results", "runs")
    return shutil.copytree(ROOT, copy, ignore=leave)


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def editable_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install -e .` installs."""
    return build(checkout, tmp_path_factory.mktemp("editable"), "editable")


def install(wheel: Path, home: Path) -> tuple[Path, Path]:
    """(Interpreter, site-packages) of a new environment with the wheel alone."""
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    return python, Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))


def add_dependencies(site_packages: Path) -> None:
    """Let the environment see this one's packages, but none that a path file adds, such as an editable install."""
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in folders))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and the dependencies."""
    python, site_packages = install(wheel, tmp_path_factory.mktemp("installed") / "environment")
    add_dependencies(site_packages)
    return python


def test_wheel_holds_every_file_of_the_package_folders_and_the_start_up_line(checkout: Path, wheel: Path):
    """A new sub-package or kind of data file that setup.cfg does not name fails here."""
    expected = {
        f"{package}/{path.relative_to(checkout / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (checkout / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in wheel_files(wheel) if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert held == expected | {HOOK_FILE}
    assert "prime_v2/py.typed" in held


@pytest.mark.parametrize("kind", ["wheel", "editable_wheel"])
def test_wheels_hold_the_start_up_line_and_a_record_of_every_file(kind: str, request: pytest.FixtureRequest):
    files = wheel_files(request.getfixturevalue(kind))
    assert files[HOOK_FILE] == HOOK.encode()
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    rows = {name: (digest, size) for name, digest, size in csv.reader(files[record].decode().splitlines())}
    assert rows.pop(record) == ("", "")
    assert rows == {
        name: (
            "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("="),
            str(len(data)),
        )
        for name, data in files.items()
        if name != record
    }


def test_wheel_names_the_command_and_the_model_of_lm_eval(wheel: Path):
    (text,) = (text.decode() for name, text in wheel_files(wheel).items() if name.endswith("/entry_points.txt"))
    points = ConfigParser()
    points.read_string(text)
    assert {section: dict(points[section]) for section in points.sections()} == {
        "console_scripts": {"prime-v2": "prime_v2.commands.process:run_command"},
        "lm_eval.models": {"prime_v2": MODEL_CLASS},
    }


def test_wheel_states_version_licence_and_python(wheel: Path):
    (metadata,) = (text.decode() for name, text in wheel_files(wheel).items() if name.endswith("/METADATA"))
    assert {"Name: prime-v2", "Version: 0.1.0", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= set(
        metadata.splitlines()
    )
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_files(wheel))


def test_source_distribution_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    from_sdist = wheel_files(build(unpacked, tmp_path / "wheel", "wheel"))
    assert from_sdist == wheel_files(wheel)


def test_installed_wheel_imports_every_module_and_puts_only_prime_v2_into_site_packages(wheel: Path, tmp_path: Path):
    """In an environment that sees this one's dependencies by a path file, but not its editable install."""
    python, site_packages = install(wheel, tmp_path / "environment")
    ours = {"prime_v2", "prime_v2-0.1.0.dist-info", HOOK_FILE}
    assert {path.name for path in site_packages.iterdir()} == ours

    add_dependencies(site_packages)
    # The last line alone: importing must print nothing before it.
    (line,) = run(python, "-I", "-c", PROBE, cwd=tmp_path).splitlines()
    probe = json.loads(line)
    assert probe["strays"] == []
    assert probe["command"]
    modules = {path.relative_to(site_packages) for path in (site_packages / "prime_v2").rglob("*.py")}
    assert {Path(file).relative_to(site_packages) for file in probe["files"].values()} == {
        path for path in modules if path.name != "__main__.py"
    }


@pytest.mark.slow
def test_the_installed_script_takes_every_recipe_by_its_name_in_any_folder(installed: Path, tmp_path: Path):
    """train.py is all that is there of the checkout; it starts, and knows the recipes."""
    shutil.copy(ROOT / "train.py", tmp_path)
    assert "--init_from" in run(installed, "-I", "train.py", "--help", cwd=tmp_path)
    code = (
        "from prime_v2.training.options import parse_options\n"
        "for given in ([], ['--config', 'configs/published.yaml:prime_v2_154m'], ['--config', 'published:mdm_14m']):\n"
        "    run, training, model = parse_options(given)\n"
        "    print(training.output_dir, model['hidden_size'])\n"
    )
    lines = run(installed, "-I", "-c", code, cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["runs/tiny", "runs/prime_v2_154m", "runs/mdm_14m"]
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.slow
def test_the_training_line_of_readme_runs_installed(installed: Path, tmp_path: Path):
    """`accelerate launch train.py`, cut to a step, in a folder that holds train.py only."""
    shutil.copy(ROOT / "train.py", tmp_path)
    write_text(tmp_path / "text.jsonl")
    launch = [installed, "-I", "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "train.py", "--data", "text.jsonl"]
    launch += [*TINY.split(), "--max_steps", "1", "--num_generated", "0", *MODEL]
    run(*launch, cwd=tmp_path)
    assert (tmp_path / "runs" / "tiny" / "results" / "train.json").is_file()


def test_the_installed_command_plans_the_comparison_of_readme(installed: Path, tmp_path: Path):
    code = "from prime_v2.commands.main import app; app(['compare', 'families', '--dry-run', '--json'])"
    plan = json.loads(run(installed, "-I", "-c", code, cwd=tmp_path))
    assert {"ARM", "MDM"} <= {each["name"] for each in plan["runs"]}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["wheel", "editable_wheel"])
def test_uninstalling_leaves_nothing(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    python, site_packages = install(request.getfixturevalue(kind), tmp_path / "environment")
    assert (site_packages / HOOK_FILE).is_file()
    run(sys.executable, "-m", "pip", "--python", python, "uninstall", "--yes", "prime-v2", cwd=tmp_path)
    assert list(site_packages.glob("*")) == []  # pip may remove the folder too


def test_every_import_is_a_declared_dependency():
    """Not one that only comes along with another: that one may drop it."""
    options = ConfigParser()
    options.read(ROOT / "setup.cfg")
    declared = re.findall(r"^[\w.-]+", options["options"]["install_requires"], re.MULTILINE)
    declared = {name.lower().replace("_", "-") for name in declared}
    optional = {"mauve"}  # of mauve-text, which is not installed here
    for extra in ("deepspeed", "quality"):  # imported where a run uses it
        optional |= set(options["options.extras_require"][extra].split())

    imported = set()
    for path in (path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    imported -= sys.stdlib_module_names | {"prime_v2"} | optional

    providers = packages_distributions()
    undeclared = {
        name
        for name in imported
        if not declared & {provider.lower().replace("_", "-") for provider in providers.get(name, [])}
    }
    assert undeclared == set()


def test_no_hub_file_asks_for_the_class_of_a_sibling():
    """A sibling may be loaded twice under two names; its classes are then two, of which `isinstance` knows one."""
    found = []
    for path in sorted((ROOT / "modeling_prime_v2").glob("*_prime_v2.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        imports = [each for each in ast.walk(module) if isinstance(each, ast.ImportFrom) and each.level]
        of_siblings = {alias.asname or alias.name for each in imports for alias in each.names}
        for call in ast.walk(module):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("isinstance", "issubclass"):
                named = {each.id for each in ast.walk(call.args[1]) if isinstance(each, ast.Name)}
                found += [f"{path.name}:{call.lineno}" for _ in named & of_siblings]
    assert found == []
