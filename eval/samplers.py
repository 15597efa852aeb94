"""Samplers by name: one spelling for `prime-v2 generate`, `ppl` and `quality`, and for lm-eval's arguments.

The names are those of `SAMPLERS`, and the scores of confidence (probability, margin, entropy), which are short for
`sampler="confidence", score=...`. The options are the fields of the sampler's config, and those of `generate` that its
law depends on (`LAW`), of which `steps` is short for max_denoising_steps. As text, stage_passes has colons: 0.75:0.25.
Refusals say names, too, where those of the model say configs (`by_name`).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig, merge_options
from prime_v2.sampler_families_prime_v2 import check_family
from prime_v2.samplers_prime_v2 import SAMPLERS, SCORES, AncestralSamplerConfig, SamplerConfig
from prime_v2.validation_keywords_prime_v2 import did_you_mean, one_of

NAMES = (*SAMPLERS, *SCORES)
LAW = {"steps": "max_denoising_steps", **{name: name for name in ("block_length", "cache", "temperature", "top_p")}}


def options_of(name: str) -> tuple[str, ...]:
    """The options of the sampler of this name, one of `NAMES`."""
    if name in SCORES:
        return tuple(option for option in options_of("confidence") if option != "score")
    return tuple(each.name for each in dataclasses.fields(SAMPLERS[name]))


OPTIONS = tuple(dict.fromkeys(option for name in SAMPLERS for option in options_of(name)))
_NAME_OF = {each.__name__: name for name, each in SAMPLERS.items()}
_CONFIG = re.compile(rf"\b({'|'.join(_NAME_OF)})\b(?: \(([\w-]+)\)|\(((?:[^()]|\([^()]*\))*)\))?")
_SHARES = re.compile(r"(?:(?<=stage_passes=)|(?<=to 1; use ))\((\d[\d.]*(?:, \d[\d.]*)*),?\)")


def by_name(sentence: str) -> str:
    """A sentence about configs of samplers as one about names: sampler=confidence with unit=digit."""

    def named(found: re.Match[str]) -> str:
        name, listed, fields = _NAME_OF[found[1]], found[2], found[3]
        if listed is not None:  # "ConfidenceSamplerConfig (confidence)", in a list
            return name
        given = [each for each in (fields or "").split(", ") if each and not each.startswith("score=")]
        if name == "confidence" and "score=" in (fields or ""):
            name = re.sub(r".*score='(\w+)'.*", r"\1", fields)
        return f"sampler={name}{' with ' if given else ''}{' and '.join(given)}"

    sentence = _SHARES.sub(lambda found: found[1].replace(", ", ":"), sentence)
    sentence = _CONFIG.sub(named, sentence).replace("sampler_config", "sampler")
    return re.sub(r"\b(unit|score|cache)='([\w-]+)'", r"\1=\2", sentence)


@contextlib.contextmanager
def refusals_by_name() -> Iterator[None]:
    """ValueErrors of this block say names of samplers instead of configs."""
    try:
        yield
    except ValueError as error:
        raise ValueError(by_name(str(error))) from error


def parsed(text: str, given: str = "sampler") -> tuple[str, dict[str, Any]]:
    """(name, options) of NAME[,OPTION=VALUE]...; ValueError about the argument `given` for another form or name."""
    name, *pairs = [each.strip() for each in text.split(",")]
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals or not value:
            raise ValueError(f"{given}={text!r} has {pair!r}; write NAME,OPTION=VALUE, e.g. margin,unit=digit")
        options[option] = _number_or_text(value)
    one_of(f"{given}={name!r}", name, NAMES)
    return name, options


def _number_or_text(value: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def named_sampler(name: str | None, model: Any = None, **options: Any) -> SamplerConfig | None:
    """The sampler of this name with its options, of which None counts as not given; None without a name.

    model: that it must suit. Raises ValueError for an unknown name or option, an option of another sampler, a sampler
    that the model's family has not, and values that the sampler's config refuses.
    """
    given = {option: value for option, value in options.items() if value is not None}
    if name is None:
        for option, value in given.items():
            owners = _owners(option)
            first = owners.split(",")[0]
            raise ValueError(f"{option}={value!r} is an option of the sampler {owners}; name it, e.g. sampler={first}")
        return None
    one_of(f"sampler={name!r}", name, NAMES)
    for option, value in given.items():
        if option in options_of(name):
            continue
        if name in SCORES and option == "score":
            raise ValueError(f"sampler={name} is confidence with score={name}; leave score out")
        own = ", ".join(options_of(name))
        takes = f"takes {own}" if own else "has no options"
        owners = _owners(option)
        raise ValueError(f"{option}={value!r} is an option of the sampler {owners}, but {name} {takes}; leave it out")
    if isinstance(given.get("stage_passes"), str):
        given["stage_passes"] = _shares(given["stage_passes"])
    kind = SAMPLERS["confidence" if name in SCORES else name]
    with refusals_by_name():
        config = kind(**given, **({"score": name} if name in SCORES else {}))
        if model is not None:
            check_family(model, config)
    return config


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(":"))
    except ValueError:
        raise ValueError(
            f"stage_passes={text!r} must be shares with colons between them that add up to 1; use 0.75:0.25"
        ) from None


def named_config(model: Any, sampler: str | None = None, **options: Any) -> PrimeV2GenerationConfig:
    """The generation config of a sampler's law on this model: `named_sampler` with the options of `LAW`.

    What is None or not given is the model's own, but for do_sample=True: only draws have a law. Raises ValueError for
    what `named_sampler` and `generate` refuse.
    """
    law = {LAW[name]: value for name, value in options.items() if name in LAW}
    of_sampler = {name: value for name, value in options.items() if name not in LAW}
    for name in of_sampler:
        if name not in OPTIONS:
            raise ValueError(f"{name} is no option of a sampler{did_you_mean(name, (*LAW, *OPTIONS))}")
    rule = named_sampler(sampler, model, **of_sampler)
    with refusals_by_name():
        config = PrimeV2GenerationConfig(sampler_config=rule, do_sample=True, **law)
        merge_options(model, config, {"seed": 0})
    return config


def description(model: Any, config: PrimeV2GenerationConfig | None) -> dict[str, Any]:
    """What the law of `generate` with this config depends on, the model's own options included; JSON-ready."""
    options = merge_options(model, config, {"seed": 0})
    sampler = options.sampler_config or AncestralSamplerConfig()
    return {
        "sampler": sampler_name(sampler),
        "unit": getattr(sampler, "unit", None),
        "sampler_config": sampler.to_dict(),
        "steps": options.max_denoising_steps,
        **{name: getattr(options, name) for name in LAW if name != "steps"},
    }


def sampler_name(sampler: SamplerConfig) -> str:
    """The shortest name of a sampler, one of `NAMES`."""
    return str(getattr(sampler, "score", "")) if sampler.name == "confidence" else sampler.name


def sentence(law: dict[str, Any]) -> str:
    """A `description` as text: the sampler with its options, its steps, and what else differs from the defaults."""
    fields = {name: value for name, value in law["sampler_config"].items() if name not in ("_cls_name", "score")}
    shown = [law["sampler"], *(f"{name} {value}" for name, value in fields.items() if value is not None)]
    shown.append(f"{law['steps']} steps")
    idle = {"block_length": None, "cache": "none", "temperature": 1.0, "top_p": 1.0}
    shown += [f"{name} {law[name]}" for name, value in idle.items() if law[name] != value]
    return ", ".join(shown).replace("_", " ").replace(f"cache {law['cache']}", f"cache {law['cache']} (approximate)")


def _owners(option: str) -> str:
    return ", ".join(name for name in SAMPLERS if option in options_of(name)) or "none"
