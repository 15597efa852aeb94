"""How lm-eval comes to know the model `prime_v2`: by registration or the start-up line, which must harm nobody."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installed import HOOK, link_package, make_environment

from prime_v2.eval.plugin import MODEL_CLASS, MODEL_NAME, register
from prime_v2.eval.startup import LAST_WITHOUT_DISCOVERY

# A small lm-eval: the order of imports and the registry's rules are those of 0.4.13.
REGISTRY = """
class Registry(dict):
    def register(self, alias, target):
        if self.get(alias, target) != target:
            raise ValueError(f"{alias} is registered already")
        self[alias] = target
model_registry = Registry()
"""
MODELS = """
from lm_eval.api.registry import model_registry
model_registry.register("dummy", target="lm_eval.models.dummy:DummyLM")
"""
# Prints the registered models, and which of the modules that the start-up line may load are loaded.
MAIN = """
import json, sys
before = sorted({"prime_v2", "prime_v2.eval.startup"} & set(sys.modules))
import lm_eval.models
from lm_eval.api.registry import model_registry
heavy = sorted({"torch", "transformers", "prime_v2.eval.lm"} & set(sys.modules))
print(json.dumps({"models": model_registry, "before": before, "heavy": heavy, "finders": len(sys.meta_path)}))
"""
REGISTERED = {"dummy": "lm_eval.models.dummy:DummyLM", MODEL_NAME: MODEL_CLASS}
ALONE = {"dummy": REGISTERED["dummy"]}


def write_lm_eval(folder: Path, version: str) -> None:
    package = folder / "lm_eval"
    shutil.rmtree(package, ignore_errors=True)
    for name, text in {
        "__init__.py": f"__version__ = {version!r}\n",
        "__main__.py": MAIN,
        "api/__init__.py": "",
        "api/registry.py": REGISTRY,
        "models/__init__.py": MODELS,
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """(Interpreter, folder on its path that holds prime_v2 and lm_eval)."""
    folder = tmp_path_factory.mktemp("environment")
    link_package(folder / "packages")
    return make_environment(folder / "home", folder / "packages"), folder / "packages"


@pytest.fixture
def packages(places, request) -> Path:
    write_lm_eval(places[1], "0.4.13")
    return places[1]


def run(places, *arguments: str | Path, errors: str = "", **environment: str) -> dict:
    """What MAIN prints. errors: what must be on stderr."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PRIME_V2"))}
    done = subprocess.run(
        [places[0], *arguments], capture_output=True, text=True, env=kept | environment, cwd=places[1].parent
    )
    assert (done.returncode, done.stderr) == (0, errors)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("version", "models"),
    [("0.4.12", REGISTERED), ("0.4.13", REGISTERED), ("0.4.14", ALONE), ("0.4.14.dev0", ALONE), ("0.5", ALONE)],
)
def test_start_up_line_registers_the_model_with_releases_that_discover_no_plugins(places, packages, version, models):
    write_lm_eval(packages, version)
    assert run(places, "-m", "lm_eval") == {
        "models": models,
        "before": ["prime_v2", "prime_v2.eval.startup"],
        "heavy": [],
        "finders": 3,
    }
    assert LAST_WITHOUT_DISCOVERY == (0, 4, 13)


@pytest.mark.parametrize("name", ["lm_eval", "lm-eval", "lm-eval.exe"])
def test_start_up_line_knows_the_scripts_of_lm_eval(places, packages, name):
    script = packages.parent / name
    script.write_text(MAIN)
    assert run(places, script, "--model", MODEL_NAME)["models"] == REGISTERED


def test_start_up_line_does_nothing_in_other_processes(places, packages):
    script = packages.parent / "other.py"
    script.write_text(MAIN)
    assert run(places, script) == {"models": ALONE, "before": [], "heavy": [], "finders": 3}


def test_start_up_line_is_switched_off_by_the_environment(places, packages):
    found = run(places, "-m", "lm_eval", PRIME_V2_LM_EVAL_HOOK="0")
    assert (found["models"], found["before"]) == (ALONE, [])
    assert run(places, "-m", "lm_eval", PRIME_V2_LM_EVAL_HOOK="1")["models"] == REGISTERED


@pytest.mark.parametrize("damage", ["raise RuntimeError('broken')", "import nothing_of_that_name", "def ("])
def test_a_broken_package_troubles_neither_python_nor_lm_eval(tmp_path, damage):
    folder = tmp_path / "packages"
    (folder / "prime_v2").mkdir(parents=True)
    (folder / "prime_v2" / "__init__.py").write_text(damage)
    write_lm_eval(folder, "0.4.13")
    places = (make_environment(tmp_path / "home", folder), folder)
    assert run(places, "-m", "lm_eval")["models"] == ALONE
    shutil.rmtree(folder / "prime_v2")
    assert run(places, "-m", "lm_eval")["models"] == ALONE


def test_a_failing_registration_is_one_line_and_lm_eval_goes_on(places, packages):
    registry = packages / "lm_eval" / "api" / "registry.py"
    registry.write_text(REGISTRY.replace("self.get(alias, target) != target", "alias == 'prime_v2'"))
    said = "prime_v2 is not registered with lm-eval: ValueError: prime_v2 is registered already\n"
    assert run(places, "-m", "lm_eval", errors=said)["models"] == ALONE


def test_a_missing_lm_eval_models_is_the_usual_error(places, packages):
    shutil.rmtree(packages / "lm_eval" / "models")
    done = subprocess.run([places[0], "-m", "lm_eval"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'lm_eval.models'\n")


def test_a_registration_by_others_is_left_alone(places, packages):
    (packages / "lm_eval" / "models" / "__init__.py").write_text(
        MODELS + "model_registry.register('prime_v2', target='elsewhere:Class')\n"
    )
    assert run(places, "-m", "lm_eval")["models"] == ALONE | {MODEL_NAME: "elsewhere:Class"}


def test_start_up_line_is_one_line_that_site_runs():
    assert HOOK.startswith("import ")
    assert HOOK.count("\n") == 1
    assert HOOK.endswith("\n")


def test_model_is_registered_beside_the_models_of_lm_eval():
    register()
    register()
    from lm_eval.api.registry import model_registry

    assert {MODEL_NAME, "hf", "dummy"} <= set(model_registry)
    module, _, name = MODEL_CLASS.partition(":")
    model_class = model_registry.get(MODEL_NAME)
    assert (model_class.__module__, model_class.__name__) == (module, name)
    register()


def test_registration_imports_nothing_of_the_model():
    code = (
        "import sys; from prime_v2.eval.plugin import register; register()\n"
        "print(sorted({'torch', 'transformers', 'prime_v2.eval.lm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
