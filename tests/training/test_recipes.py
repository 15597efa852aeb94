"""Recipes by path and by name, from any folder."""

import re

import pytest
import yaml

from prime_v2.training.finetuning import TRAINING_FIELDS
from prime_v2.training.options import RaisingParser, parse_options
from prime_v2.training.recipes import CONFIGS, find_recipe, recipe_names


@pytest.mark.parametrize("kind", ["", "compare", "accelerate"])
def test_every_recipe_is_found_by_each_of_its_names_in_any_folder(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_names(kind) == sorted(path.stem for path in (CONFIGS / kind).iterdir() if path.suffix == ".yaml")
    for name in recipe_names(kind):
        folder = f"{kind}/" if kind else ""
        for given in (name, f"{name}.yaml", f"configs/{folder}{name}.yaml", f"{folder}{name}"):
            assert find_recipe(given, kind) == CONFIGS / kind / f"{name}.yaml"


def test_every_folder_of_recipes_is_one_that_the_names_reach():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == {"compare", "accelerate"}


def test_a_file_goes_before_a_recipe_of_its_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("max_steps: 1\n")
    (tmp_path / "owt").mkdir()
    assert find_recipe("tiny.yaml").resolve() == (tmp_path / "tiny.yaml").resolve()
    assert find_recipe("owt") == CONFIGS / "owt.yaml"


@pytest.mark.parametrize(
    "given", ["", ".", "tinny", "configs", "configs/", "../configs/tiny.yaml", "a/tiny", "families"]
)
def test_what_is_neither_is_refused_with_the_recipes(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = f"--config {given} is no file and no recipe; the recipes are {', '.join(recipe_names())}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        find_recipe(given)


def recipes_of_runs():
    """Every run that train.py has a recipe for: a file, or FILE:ENTRY of a file with several."""
    for name in recipe_names():
        content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        several = any(entry.startswith(".") for entry in content)
        yield from (f"{name}:{entry}" for entry in content if not entry.startswith(".")) if several else [name]


@pytest.mark.parametrize("recipe", list(recipes_of_runs()))
def test_a_recipe_goes_with_a_trained_folder(recipe, tmp_path):
    """What it says of tokens, codes, vectors and sizes gives way; flags that do are refused (test_finetuning.py)."""
    run, _, fields = parse_options(
        ["--config", recipe, "--init_from", str(tmp_path), "--output_dir", str(tmp_path / "run")], None, RaisingParser
    )
    assert (run.tokenizer, run.codes, run.embedding_init) == ("bpe", "shuffle", "random")
    assert set(fields) <= TRAINING_FIELDS
