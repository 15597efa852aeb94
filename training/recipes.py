"""The recipes: YAML files of configs/, in an installed package prime_v2/configs/, found by path or by name."""

from pathlib import Path

# Beside the folder of this file, in a checkout and in an installed package alike.
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def recipe_names(kind: str = "") -> list[str]:
    """The names of the recipes in a folder of configs/ ("" for the runs of train.py, compare, accelerate)."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def find_recipe(given: str, kind: str = "", option: str = "--config") -> Path:
    """The file of a path, or of a recipe: tiny, tiny.yaml and configs/tiny.yaml; of kind compare compare/tiny, too.

    A file that exists is taken before a recipe. ValueError, listing the recipes, for anything else.
    """
    path = Path(given).expanduser()
    if path.exists() and not path.is_dir():
        return path
    parts = list(Path(given).parts)
    for folder in filter(None, (CONFIGS.name, kind)):
        if parts[:1] == [folder] and len(parts) > 1:
            del parts[0]
    name = parts[0].removesuffix(".yaml") if len(parts) == 1 else ""
    if name in recipe_names(kind):
        return CONFIGS / kind / f"{name}.yaml"
    raise ValueError(f"{option} {given} is no file and no recipe; the recipes are {', '.join(recipe_names(kind))}")
