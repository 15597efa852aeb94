"""What `prime-v2 quality` measures: which sampler of which model, in how many passes, at which temperature."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prime_v2.eval.samplers import named_config
from prime_v2.eval.samplers import parsed as parsed_sampler
from prime_v2.families import FAMILY_OF_TYPE, bound_method
from prime_v2.sampler_families_prime_v2 import FAMILY_SAMPLERS
from prime_v2.studies.quality.statistics import COPIED, FEWEST

SHARES = (1, 2, 4, 8, 16)  # of the tokens of a text, in passes: L, L/2, ...
FRONTIER_SHARE = 4  # the passes of the temperature sweep: L/4
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
LEFT_TO_RIGHT = "left to right"  # what an ARM does, which has no samplers


@dataclass(frozen=True)
class Plan:
    """Options of a whole study, the same for all models. lengths and counts in tokens and texts.

    length: of a text, its prompt included; samples: texts of a set, of the model and of real text; prompt: tokens of
    the held-out windows that a second set continues, None for unconditional sets only; passes: at most so many;
    draws: of a bound; law_only: no sets.
    """

    samplers: tuple[str, ...]
    passes: tuple[int, ...]
    frontier_passes: int
    temperatures: tuple[float, ...]
    length: int
    samples: int
    prompt: int | None
    draws: int
    batch: int
    seed: int
    law_only: bool = False

    def check(self) -> None:
        """ValueError for what cannot be measured."""
        for what, least in FEWEST.items():
            if self.samples < least and not (self.law_only and what == "self-BLEU"):
                raise ValueError(f"{what} needs at least {least} samples, not {self.samples}; use {least} or more")
        for name in self.samplers:
            if self.law_only and excludes(name):
                raise ValueError(
                    f"sampler={name!r} gives real text probability 0, since its top_p excludes tokens; leave top_p "
                    f"out, or draw samples, too"
                )
        if self.length - (self.prompt or 0) < COPIED:
            left = f"length={self.length}" + ("" if self.prompt is None else f" less prompts={self.prompt}")
            raise ValueError(f"{left} leaves fewer than the {COPIED} tokens that the {COPIED}-grams need")
        given = [("passes", each) for each in self.passes]
        given += [] if self.law_only else [("frontier_passes", self.frontier_passes)]
        for name, each in given:
            if each > self.length:
                raise ValueError(f"{name}={each} are more than the {self.length} tokens of a text; use {self.length}")


@dataclass(frozen=True)
class Cell:
    """One sampler of one model as it is run. passes: at most; prompt: tokens given."""

    sampler: str
    passes: int
    temperature: float = 1.0
    prompt: int = 0

    @property
    def has_law(self) -> bool:
        """Whether the law on real text is measured, too: not again at each temperature, nor of a top_p below 1."""
        return self.temperature == 1 and not excludes(self.sampler)

    def __str__(self) -> str:
        about = [self.sampler, f"{self.passes} passes"]
        about += [] if self.temperature == 1 else [f"temperature {self.temperature:g}"]
        return ", ".join(about + ([f"{self.prompt} tokens given"] if self.prompt else []))


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of a sampler as it is given: NAME[,OPTION=VALUE]..., names as in `prime_v2.eval.samplers`."""
    name, options = parsed_sampler(text)
    for option in ("steps", "temperature"):
        if option in options:
            raise ValueError(f"sampler={text!r} has {option}, which the study varies; leave it out")
    return name, options


def excludes(sampler: str) -> bool:
    """Whether a sampler as it is given has a top_p that excludes tokens: most texts have probability 0 then."""
    return sampler != LEFT_TO_RIGHT and parsed(sampler)[1].get("top_p", 1) != 1


def config_of(model: Any, cell: Cell) -> Any:
    """The generation config of a cell, of a family that fills in; ValueError for a sampler that the model has not."""
    name, options = parsed(cell.sampler)
    return named_config(model, name, steps=cell.passes, temperature=float(cell.temperature), **options)


def is_causal(model: Any) -> bool:
    """Whether the model is an ARM, whose law is exact by the chain rule and which makes a pass a token."""
    return FAMILY_OF_TYPE[model.config.model_type].bound == "causal"


def samplers_of(model: Any, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """(samplers of `asked` that the model has, sentences about the others); with none of them, its first."""
    own = FAMILY_SAMPLERS[model.config.model_type].names
    if not own:
        return [LEFT_TO_RIGHT], []
    found, missing = [], []
    for name in asked:
        try:
            config_of(model, Cell(name, 1))
            found.append(name)
        except ValueError as error:
            missing.append(f"{name}: {error}")
    return found or [own[0]], missing


def check_samplers(configs: Sequence[Any], asked: Sequence[str]) -> None:
    """ValueError for a sampler that no model of these configurations has; before any is loaded."""
    import torch

    with torch.device("meta"):
        models = [FAMILY_OF_TYPE[each.model_type].model_class(each) for each in configs]
    missing = [samplers_of(each, asked)[1] for each in models if not is_causal(each)]
    for name in asked:
        sentences = [each for of_model in missing for each in of_model if each.startswith(f"{name}: ")]
        if missing and len(sentences) == len(missing):
            raise ValueError(f"no model has the sampler {sentences[0]}")


def law_method(model: Any, sampler: str) -> str:
    """The method of `log_likelihood` for what a sampler writes, or, where that has no law, the model's own bound."""
    has_method = "sampler" in model.likelihood_methods
    if has_method and config_of(model, Cell(sampler, 1)).sampler_config.kind in ("ancestral", "rule"):
        return "sampler"
    return bound_method(model.config)


def cells_of(plan: Plan, model: Any, samplers: Sequence[str]) -> list[Cell]:
    """The cells of a model: each sampler at each number of passes, then the temperature sweep."""
    passes = (plan.length,) if is_causal(model) else plan.passes
    at = plan.length if is_causal(model) else plan.frontier_passes
    cells = [Cell(name, each) for name in samplers for each in passes]
    if not plan.law_only:
        cells += [Cell(name, at, each) for name in samplers for each in plan.temperatures]
    if plan.prompt:
        cells += [Cell(name, each, prompt=plan.prompt) for name in samplers for each in passes]
    return list(dict.fromkeys(cells))


def key_of(cell: Cell, plan: Plan, about: dict[str, Any]) -> str:
    """The name of a cell's file: what decides on its numbers, hashed. about: of model, judge and texts."""
    fixed = {name: getattr(plan, name) for name in ("length", "samples", "draws", "batch", "seed", "law_only")}
    content = json.dumps([asdict(cell), fixed, about], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def identity(model: Any) -> dict[str, Any]:
    """What of a model its numbers depend on: its weights, which are hashed, its options, its device."""
    settings = {"config": model.config.to_dict(), "generation": model.generation_config.to_dict()}
    settings = {name: _plain({**each, "_name_or_path": None}) for name, each in settings.items()}
    return {"weights": weights_sha256(model), **settings, "device": model.device.type, "dtype": str(model.dtype)}


def _plain(settings: dict[str, Any]) -> Any:
    return json.loads(json.dumps(settings, default=str))


def weights_sha256(model: Any) -> str:
    """Names and bytes of all weights and buffers of a model, hashed: what its numbers depend on."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
