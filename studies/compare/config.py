"""The YAML file of `prime-v2 compare`: what is trained at which budgets, sizes and seeds (docs/compare.md)."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prime_v2.training.recipes import find_recipe

KIND = "compare"  # of its recipes
FIELDS = ("train", "budgets", "count", "shapes", "seeds", "search_seed", "runs", "baseline")
RUN_FIELDS = ("label", "family", "model", "train", "shapes", "budgets")
COUNTS = {"6nd": "flops_6nd", "measured": "flops_measured"}  # how FLOPs are counted, and their name in a record
# Options of train.py that a comparison sets itself, and from what.
DECIDED = {
    "config": "it is made for each run",
    "family": "write it in the run",
    "label": "write it in the run",
    "output_dir": "it is --out and the name of the run",
    "data_dir": "all runs share one in --out",
    "record": "use --output",
    "seed": "write `seeds`",
    "data_seed": "write `seeds`",
    "max_steps": "it follows from the budget",
    "num_train_epochs": "it follows from the budget",
    "eval_steps": "it follows from the budget",
    "logging_steps": "it follows from the budget",
    "save_steps": "it follows from the budget",
}
# What all runs must have in common: which text they read, in which order, and where they are scored.
COMMON = (
    "data", "data_split", "text_field", "streaming", "max_documents", "tokenizer", "bpe_vocab_size", "block_size",
    "global_batch", "short_share", "dev_share", "test_share", "eval_sequences", "test_sequences",
    "sampler_passes", "sampler_sequences",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {"num_generated": 0}


@dataclass(frozen=True)
class Run:
    """One training run. `options`: those of train.py, except the ones that follow from the number of steps.

    budget: FLOPs; shape: the name of the network's size, "" where there is only one size.
    """

    name: str
    shape: str
    budget: float
    seed: int
    options: dict[str, Any] = dataclasses.field(hash=False)

    @property
    def label(self) -> str:
        """What it is called in tables and figures: by default its name."""
        return self.options.get("label", self.name)

    @property
    def folder(self) -> str:
        """The name of its folder: the same however many runs a comparison has."""
        parts = [slug(self.name), self.shape, number(self.budget), f"seed{self.seed}"]
        return "-".join(part for part in parts if part)

    def __str__(self) -> str:
        shape = f", {self.shape}" if self.shape else ""
        return f"{self.label}{shape}, {number(self.budget)} FLOPs, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A comparison as its file describes it; `runs` in the order of budgets, shapes, seeds and names.

    search_seed: the seed at which all shapes are trained, so that the others take the best (`search`); None: all do.
    cost_seed: that under whose noise the FLOPs of a step are measured, for all seeds; None: the run's own.
    baseline_label: what the baseline is called, which may have no run here (`selection`); None: as its run is.
    """

    name: str
    count: str
    baseline: str
    runs: tuple[Run, ...]
    search_seed: int | None = None
    cost_seed: int | None = None
    baseline_label: str | None = None

    def values(self, name: str) -> list[Any]:
        """The different labels, shapes, budgets or seeds of its runs, in their order."""
        return list(dict.fromkeys(getattr(run, name) for run in self.runs))


@dataclass(frozen=True)
class _Shape:
    name: str
    model: dict[str, Any]
    train: dict[str, Any]
    scale: dict[str, float]  # what options of `train` are multiplied by, whichever part of the file gives them


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key_node.value} is there twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_comparison(given: str) -> Comparison:
    """The comparison of a YAML file, or of a recipe, a name in configs/compare/.

    Raises ValueError, with a sentence, for whatever in it no run can be made of; options of train.py and fields of a
    model are looked at when the runs are planned (`prime_v2.studies.compare.plan.plan`).
    """
    path = find_recipe(given, KIND, "CONFIG")
    content = _load(path)
    _check_keys({key: value for key, value in content.items() if not str(key).startswith(".")}, FIELDS, str(path))
    train, count = _mapping(content, "train", str(path)), str(content.get("count", "6nd"))
    _check_train(train, f"{path}: train")
    if count not in COUNTS:
        raise ValueError(f"{path}: count={count} is not one of {', '.join(COUNTS)}")
    budgets, seeds = _budgets(content.get("budgets"), str(path)), _seeds(content.get("seeds", [0]), str(path))
    shapes = _shapes(content.get("shapes"), str(path))
    search_seed = _search_seed(content.get("search_seed"), seeds, shapes, str(path))
    runs = _mapping(content, "runs", str(path))
    if not runs:
        raise ValueError(f"{path}: there are no runs; write e.g. `runs: {{ARM: {{family: arm}}}}`")
    baseline = str(content.get("baseline", next(iter(runs))))
    if baseline not in runs:
        raise ValueError(
            f"{path}: the baseline {baseline} is not among the runs {_listed(runs)}{_nearest(baseline, runs)}"
        )
    _check_names(runs, str(path))
    common_model = _common_model(train, runs, shapes, str(path))
    made = [
        made
        for name, entry in runs.items()
        for made in _runs_of(name, entry or {}, train, common_model, budgets, shapes, seeds, str(path))
    ]
    names = list(runs)
    order = {each.name: number for number, each in enumerate(shapes)}
    made.sort(key=lambda run: (run.budget, order[run.shape], seeds.index(run.seed), names.index(run.name)))
    cost_seed, label = seeds[0] if search_seed is None else search_seed, _label(baseline, runs[baseline] or {})
    return Comparison(path.stem, count, baseline, tuple(made), search_seed, cost_seed, label)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path}{line}: {problem}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no comparison; write `budgets` and `runs`, see docs/compare.md")
    return content


def _common_model(
    train: dict[str, Any], runs: dict[str, Any], shapes: Sequence[_Shape], place: str
) -> dict[str, dict[str, Any]]:
    """The fields of `train.model` that each family has; ValueError for one that no family here has."""
    from prime_v2.families import family_named

    wanted, fields = _mapping(train, "model", f"{place}: train"), {}
    for name, entry in runs.items():
        family = str((entry or {}).get("family", "prime"))
        try:
            fields[family] = family_named(family).fields()
        except ValueError as error:
            raise ValueError(f"{place}: run {name}: {str(error).replace('--family', 'family')}") from None
    for key in wanted:
        if not any(key in each for each in fields.values()):
            known = set().union(*fields.values())
            raise ValueError(f"{place}: train.model.{key} is a field of no family here ({_listed(fields)})"
                             f"{_nearest(key, known)}")  # fmt: skip
    for shape in shapes:
        for key in shape.model:
            lacking = next((family for family, known in fields.items() if key not in known), None)
            if lacking is not None:
                raise ValueError(f"{place}: {key} in shapes is no field of family {lacking}"
                                 f"{_nearest(key, fields[lacking])}; a shape is for all runs")  # fmt: skip
    return {family: {key: value for key, value in wanted.items() if key in known} for family, known in fields.items()}


def _runs_of(
    name: str,
    entry: dict[str, Any],
    train: dict[str, Any],
    common_model: dict[str, dict[str, Any]],
    budgets: list[float],
    shapes: list[_Shape],
    seeds: list[int],
    path: str,
) -> Iterable[Run]:
    """The runs of one entry of `runs`, a field of which wins over that of the shape, and this over the common one."""
    place = f"{path}: run {name}"
    own = _mapping(entry, "train", place)
    _check_train(own, f"{place}: train", own=True)
    model, family = _mapping(entry, "model", place), str(entry.get("family", "prime"))
    chosen = shapes
    if entry.get("shapes") is not None:
        named = {each.name: each for each in shapes}
        wanted = [slug(each) for each in _list(entry["shapes"], f"{place}: shapes")]
        for each in wanted:
            if each not in named:
                raise ValueError(f"{place}: there is no shape {each}; there are {_listed(named)}")
        chosen = [each for each in shapes if each.name in wanted]
    if entry.get("budgets") is not None:
        own_budgets = _budgets(entry["budgets"], place)
        for budget in own_budgets:
            if budget not in budgets:
                raise ValueError(f"{place}: {number(budget)} is not among the budgets {_listed(map(number, budgets))}")
        budgets = own_budgets
    for budget in budgets:
        for shape in chosen:
            options = DEFAULTS | train | shape.train | own
            options |= {
                "family": family,
                "model": common_model[family] | shape.model | model,
                "label": _label(name, entry),
            }
            for key, factor in shape.scale.items():
                if key not in options:
                    raise ValueError(
                        f"{place}: shape {shape.name} scales {key}, which the run has not; give it in `train`"
                    )
                options[key] = factor * _float(options[key], f"{place}: {key}")
            for seed in seeds:
                yield Run(name, shape.name, budget, seed, options | {"seed": seed})


def _check_train(train: dict[str, Any], place: str, own: bool = False) -> None:
    """Refuse what a comparison decides itself and, in a part for some runs, what all must have in common."""
    for key, value in train.items():
        if key in DECIDED:
            raise ValueError(f"{place}: {key} is not for this file: {DECIDED[key]}")
        if own and key == "model":
            raise ValueError(f"{place}: write the fields of the model beside `train`, not in it")
        if own and key in COMMON:
            raise ValueError(f"{place}: {key} must be the same for all runs, or they cannot be compared; write it in "
                             f"the `train` of all")  # fmt: skip
        if key == "warmup_steps" and not 0 <= _float(value, f"{place}: {key}") < 1:
            raise ValueError(f"{place}: warmup_steps={value} is a number of steps, but runs differ in length; give a "
                             f"share of the run, e.g. 0.05")  # fmt: skip


def _check_names(runs: dict[str, Any], path: str) -> None:
    found: dict[str, str] = {}
    for name, entry in runs.items():
        if entry is not None and not isinstance(entry, dict):
            raise ValueError(f"{path}: run {name} is {entry!r}; write e.g. `{name}: {{family: arm}}`")
        _check_keys(entry or {}, RUN_FIELDS, f"{path}: run {name}")
        folder = slug(name)
        if not folder or folder in found:
            other = f", like {found[folder]}" if folder in found else ""
            raise ValueError(f"{path}: the name {name} gives the folder {folder!r}{other}; use letters and digits "
                             f"that tell runs apart")  # fmt: skip
        found[folder] = name
    labels = [_label(name, entry or {}) for name, entry in runs.items()]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two runs have the label {twice}; give each its own")


def _label(name: str, entry: dict[str, Any]) -> str:
    return str(entry.get("label", name))


def _shapes(value: Any, path: str) -> list[_Shape]:
    """The sizes; one without a name where there is no list of them."""
    if value is None:
        return [_Shape("", {}, {}, {})]
    found: dict[str, _Shape] = {}
    for entry in _list(value, f"{path}: shapes"):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {entry!r} in shapes must hold fields such as `hidden_size: 64`")
        model = {key: each for key, each in entry.items() if key not in ("name", "train", "scale")}
        train = _mapping(entry, "train", f"{path}: shapes")
        _check_train(train, f"{path}: shapes: train", own=True)
        sizes = [str(model[key]) for key in ("hidden_size", "num_hidden_layers") if key in model]
        name = slug(entry.get("name", "x".join(sizes)))
        if not name or name in found:
            raise ValueError(f"{path}: two shapes, or none of them, are called {name!r}; give each a `name`")
        found[name] = _Shape(name, model, train, _scale(entry, train, f"{path}: shapes: {name}"))
    return list(found.values())


def _scale(entry: dict[str, Any], train: dict[str, Any], place: str) -> dict[str, float]:
    """The factors of a shape; ValueError for one of an option that the shape sets, that must be common, or below 0."""
    scale = _mapping(entry, "scale", place)
    _check_train(scale, f"{place}: scale", own=True)
    for key in scale:
        if key in train:
            raise ValueError(f"{place}: {key} is in `train` and in `scale`; write one of them")
    factors = {key: _float(value, f"{place}: scale: {key}") for key, value in scale.items()}
    for key, factor in factors.items():
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{place}: scale: {key}={factor} must be a factor above 0, e.g. 0.5")
    return factors


def _budgets(value: Any, place: str) -> list[float]:
    if value is None:
        raise ValueError(f"{place}: there are no budgets; write e.g. `budgets: [1.0e+12]`, in FLOPs")
    found = [_float(each, f"{place}: budgets") for each in _list(value, f"{place}: budgets")]
    for budget in found:
        if not (math.isfinite(budget) and budget > 0):
            raise ValueError(f"{place}: the budget {budget:g} must be a number of FLOPs above 0, e.g. 1.0e+12")
    if len(set(map(number, found))) < len(found):
        raise ValueError(f"{place}: two budgets are equal to six digits ({_listed(map(number, found))})")
    return sorted(found)


def _seeds(value: Any, path: str) -> list[int]:
    found = _list(value, f"{path}: seeds")
    for seed in found:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 or found.count(seed) > 1:
            raise ValueError(f"{path}: seeds={found} must be different whole numbers from 0, e.g. [0, 1, 2]")
    return found


def _search_seed(value: Any, seeds: list[int], shapes: list[_Shape], path: str) -> int | None:
    if value is not None and (isinstance(value, bool) or value not in seeds):
        raise ValueError(f"{path}: search_seed={value} is not among the seeds {_listed(map(str, seeds))}")
    if value is not None and len(shapes) < 2:
        raise ValueError(f"{path}: search_seed={value} chooses among several `shapes`; give them, or leave it out")
    return value


def _check_keys(entry: dict[str, Any], known: Sequence[str], place: str) -> None:
    for key in entry:
        if key not in known:
            raise ValueError(f"{place}: unknown field {key}{_nearest(key, known)}; there are {_listed(known)}")


def _mapping(entry: dict[str, Any], key: str, place: str) -> dict[str, Any]:
    value = entry.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{place}: {key} is {value!r}; it holds lines such as `name: value`")
    return {str(name): each for name, each in (value or {}).items()}


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} is {value!r}; give a list, e.g. [1, 2]")
    return value


def _float(value: Any, place: str) -> float:
    """A number; YAML reads `1e12` as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{place}: {value!r} is no number") from None


def _nearest(given: Any, known: Iterable[str]) -> str:
    from prime_v2.validation_keywords_prime_v2 import did_you_mean

    return did_you_mean(given, known)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def slug(name: Any) -> str:
    """Letters, digits, dots and underscores of a name, for a folder."""
    return re.sub(r"[^\w.]+", "_", str(name)).strip("_.")


def number(value: float) -> str:
    """A number of FLOPs for people and folders: 3e12."""
    return re.sub(r"e\+0*", "e", f"{value:g}")
