"""Options of `generate`: their defaults, their validation, and how those of a call, a model and a file combine."""

import math
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin

from .generation_cache_prime_v2 import CACHES
from .sampler_families_prime_v2 import FAMILY_SAMPLERS, check_family
from .samplers_prime_v2 import ConfidenceSamplerConfig, sampler_from, sampler_meant
from .validation_config_prime_v2 import read_mapping
from .validation_inputs_prime_v2 import checked_seed, is_integer, whole_number
from .validation_keywords_prime_v2 import arguments_of, did_you_mean, refuse_unknown, shown

# What an option is when neither the call, nor its generation_config, nor the model's sets it.
DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 256,
    "max_denoising_steps": 256,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
}
# And the values that change nothing.
SAMPLING_OPTIONS = {"temperature": 1.0, "top_p": 1.0, "seed": None, "num_return_sequences": 1}
SPECIAL_TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id")
FLAGS = ("do_sample", "use_cache", "return_dict_in_generate")
SAMPLER_OPTIONS = ("sampler_config", "block_length", "cache")
OPTIONS = (*DEFAULTS, *SAMPLER_OPTIONS, "max_length", "seed", "num_return_sequences", *FLAGS[1:], *SPECIAL_TOKENS)
METADATA = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")
# Options of autoregressive generation for which the value that changes nothing is not Transformers' default.
IDLE = {"top_k": 0, "min_p": 0.0, "guidance_scale": 1.0}


class PrimeV2GenerationConfig(GenerationConfig):
    """Options of `generate`. One that is None falls back to the model's generation config, then to its default.

    max_new_tokens: tokens to generate; by default 256, or as many as max_position_embeddings leaves room for.
    max_length: tokens of the output, prompt and suffix included; read only without max_new_tokens.
    max_denoising_steps: N, the steps that the reveals are spread over, 256 by default; a block, and a stage of a
        sampler with unit="stage", has at least one. The network runs at most once a step and at most once a unit; more
        steps draw fewer tokens at once, independently of each other.
    sampler_config: what a pass reveals, a config of samplers_prime_v2.py; AncestralSamplerConfig() by default.
    block_length: tokens of a block; blocks are filled from left to right, each in its share of the steps. By default
        all generated tokens are one block.
    cache: "none" by default; "prefix" and "dual" keep keys and values while a block is filled, which is approximate
        (generation_cache_prime_v2.py). A call that asks for one of them needs block_length.
    do_sample: True, also by default: draw from the model. False: the deterministic decode, which has
        no temperature, top_p or seed. Such an option beside do_sample=False is refused; one that a config sets beneath
        the call or config that says do_sample=False is ignored.
    temperature: the logits' divisor, > 0; 1.0 by default. top_p: nucleus mass in (0, 1]; 1.0, all of it, by default.
    seed: all draws are a function of it and the row's content; None draws one from torch's global generator.
    num_return_sequences: samples of each row, which follow one another; 1 by default.
    use_cache: keep keys and values of known tokens, also by default; read by interpolating models only.
    return_dict_in_generate: return a `PrimeV2GenerationOutput`; False by default.
    bos_token_id, pad_token_id, eos_token_id (one id or several): by default those of the model's config; a missing
        padding token is the first EOS token.
    The options of autoregressive generation (top_k, num_beams, ...) do not exist here: a value that changes nothing
    there (`idle_options`: num_beams=1, top_k=0, ...) is dropped, any other is refused. Numbers of numpy are numbers.
    """

    max_new_tokens: int | None
    max_length: int | None
    max_denoising_steps: int | None
    sampler_config: Any
    block_length: int | None
    cache: str | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    num_return_sequences: int | None
    use_cache: bool | None
    return_dict_in_generate: bool | None
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_id: int | list[int] | None

    def __init__(self, **kwargs: Any):
        # Not super().__init__(): it sets the attributes of autoregressive generation.
        for name in OPTIONS:
            value = kwargs.pop(name, None)
            setattr(self, name, value.item() if isinstance(value, np.generic) else value)
        self.sampler_config = sampler_from(self.sampler_config)
        self._commit_hash = kwargs.pop("_commit_hash", None)
        self._from_model_config = kwargs.pop("_from_model_config", None)
        self.transformers_version = kwargs.pop("transformers_version", None)
        kwargs.pop("_original_object_hash", None)
        idle = idle_options()
        self.__dict__.update(  # refused by validate
            {name: value for name, value in kwargs.items() if name not in idle or not _is(value, idle[name])}
        )
        self.validate()

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """ValueError for an unknown name, a bad type or a value out of range (the arguments are not read)."""
        for name, value in vars(self).items():
            if name not in OPTIONS and name not in METADATA:
                meant = option_meant(name, value)
                hint = did_you_mean(name, OPTIONS) if meant is None else f"; {meant}"
                hint = "; leave it out" if name in idle_options() else hint
                raise ValueError(
                    f"{name}={shown(value)} is not an option of this model's generate(){hint} "
                    f"(all: {', '.join(OPTIONS)})"
                )
        for name in ("max_new_tokens", "max_length", "max_denoising_steps", "num_return_sequences", "block_length"):
            value = getattr(self, name)
            if value is not None:
                whole_number(name, value, 1, use=int(DEFAULTS.get(name, 1)))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        self._validate_sampling()
        if self.seed is not None:
            checked_seed(self.seed)
        for name in SPECIAL_TOKENS:
            special_ids(name, getattr(self, name))

    def _validate_sampling(self) -> None:
        given = [name for name, idle in SAMPLING_OPTIONS.items() if getattr(self, name) not in (None, idle)]
        if self.do_sample is False and given:
            named = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(
                f"do_sample=False, the deterministic decode, has no use for {named}; leave {', '.join(given)} out, or "
                f"give do_sample=True"
            )
        if self.cache not in (None, *CACHES):
            raise ValueError(f"cache={shown(self.cache)} is not one of {', '.join(CACHES)}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ValueError(f"{name}={value!r} must be a number; use 1.0")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be positive and finite; use 1.0, or do_sample=False without a "
                f"temperature, the deterministic decode"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; use 1.0 to keep every token")

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return read_mapping(Path(json_file))

    def to_diff_dict(self) -> dict[str, Any]:
        """What is set, the content of generation_config.json."""
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return dict(DEFAULTS)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "PrimeV2GenerationConfig":
        """Not supported: a PrimeV2Config holds no generation options (Transformers then calls `cls()`)."""
        raise NotImplementedError("PrimeV2Config holds no generation options; use PrimeV2GenerationConfig()")


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one call of `generate`, resolved by `merge_options`; meanings as of `PrimeV2GenerationConfig`.

    max_new_tokens and max_length stay None where they are not given, see `num_new_tokens`.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    max_denoising_steps: int = DEFAULTS["max_denoising_steps"]
    sampler_config: Any = None
    block_length: int | None = None
    cache: str = "none"
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    num_return_sequences: int = 1
    use_cache: bool = True
    return_dict_in_generate: bool = False
    bos_token_id: int | None = None
    pad_token_id: int = 0
    eos_token_id: tuple[int, ...] = ()

    @property
    def sampler_kind(self) -> str:
        """The process that fills the canvas, `kind` of the sampler config."""
        return getattr(self.sampler_config, "kind", "ancestral")


@cache
def idle_options() -> dict[str, Any]:
    """The options of autoregressive generation that this package's `generate` has not, each with what changes nothing.

    The value is Transformers' own default, None for those that have none, except for those of `IDLE`.
    """
    names = dict.fromkeys(vars(GenerationConfig())) | GenerationConfig._get_default_generation_params() | IDLE
    return {name: value for name, value in names.items() if name not in (*OPTIONS, *METADATA)}


def _is(value: Any, idle: Any) -> bool:
    """Whether a value is None, or equal to the idle one; a flag that has no default is idle where it is False."""
    if value is None or idle is None:
        return value is None or value is False
    return isinstance(value, bool | np.bool_) == isinstance(idle, bool) and bool(np.all(value == idle))


def merge_options(model: Any, generation_config: GenerationConfig | None, kwargs: dict) -> GenerationOptions:
    """Options of a call: keywords, else `generation_config`, else the model's, else its config's, else `DEFAULTS`."""
    known = [*OPTIONS, *arguments_of(model.generate), *idle_options(), *METADATA]
    # Values that mean nothing, of arguments of Transformers' own generate.
    foreign = {*arguments_of(GenerationMixin.generate), "token_type_ids"} - set(known)
    idle = {name for name, each in kwargs.items() if name in foreign and (each is None or each is False)}
    kwargs = {name: each for name, each in kwargs.items() if name not in idle}
    refuse_unknown("generate", kwargs, known, option_meant)
    merged: dict[str, Any] = {name: getattr(model.config, name) for name in SPECIAL_TOKENS}
    for config in (model.generation_config, generation_config):
        if config is not None:
            # to_dict: also a plain GenerationConfig, whose unsupported options are then refused by name.
            given = {k: v for k, v in config.to_dict().items() if v is not None and k not in METADATA}
            _override(merged, given)
    _override(merged, kwargs)
    checked = PrimeV2GenerationConfig(**merged)
    given = {name: value for name in OPTIONS if (value := getattr(checked, name)) is not None}
    for name in SPECIAL_TOKENS:
        special_ids(name, given.get(name), model.config.vocab_size)
    given["eos_token_id"] = tuple(special_ids("eos_token_id", given.get("eos_token_id")))
    if given["eos_token_id"]:
        given.setdefault("pad_token_id", given["eos_token_id"][0])
    if given.get("do_sample", True) and "seed" not in given:
        given["seed"] = int(torch.randint(2**62, ()))
    if given.get("do_sample") is False and "confidence" in FAMILY_SAMPLERS[model.config.model_type].names:
        phased = getattr(model.config, "reveal_order", None) == "coarse_first"
        given.setdefault("sampler_config", ConfidenceSamplerConfig(unit="stage" if phased else "token"))
    options = GenerationOptions(**given)
    check_sampler(model, options)
    # One that the model's own options set acts as it did when they were saved: on a single block.
    asked = any((kwargs.get("cache"), getattr(generation_config, "cache", None)))
    if asked and options.cache != "none" and options.block_length is None:
        raise ValueError(
            f"cache={options.cache!r} keeps keys and values of what stands outside the block that is filled; add "
            f"block_length=32, or as many as max_new_tokens to keep those of the prompt only"
        )
    return options


def option_meant(name: str, value: Any) -> str | None:
    """What to give in place of a name of the command line, or a field of a sampler config; None for other names."""
    return f"use max_denoising_steps={shown(value)}" if name == "steps" else sampler_meant(name, value)


def check_sampler(model: Any, options: GenerationOptions) -> None:
    """ValueError for a sampler, unit, block length or cache that the model's family or configuration has not."""
    config, sampler, name = model.config, options.sampler_config, type(options.sampler_config).__name__
    check_family(model, sampler, options.block_length, options.cache)
    if options.sampler_kind != "rule":
        _check_order(config, sampler)
        if not options.do_sample and sampler is not None:
            has_rules = "confidence" in FAMILY_SAMPLERS[config.model_type].names
            advice = "use ConfidenceSamplerConfig()" if has_rules else "leave sampler_config out"
            raise ValueError(f"do_sample=False draws nothing, but {name} acts at random; {advice}")
        return
    if sampler.unit == "stage" and not config.stage_digits:
        raise ValueError(f"{name}(unit='stage') needs a model with stages; use unit='token' or unit='digit'")
    if sampler.unit == "digit" and config.subtoken_embedding == "ancestors":
        raise ValueError(
            f"{name}(unit='digit') shows any digits, but this model has vectors for leading digits only; use "
            f"unit='stage' or unit='token'"
        )
    _check_stage_passes(config, sampler)


def _check_order(config: Any, sampler: Any) -> None:
    """ValueError for a random sampler, or an option of it, that the model's reveal order has not."""
    name, order = type(sampler).__name__, getattr(config, "reveal_order", None)
    if getattr(sampler, "kind", None) == "remasking" and order in ("coarse_first", "windows"):
        raise ValueError(
            f"{name} hides any unit again, but reveal_order={order!r} never shows a later stage before an earlier "
            f"one's time; use AncestralSamplerConfig() or a rule with unit='stage'"
        )
    if getattr(sampler, "stage_passes", None) is not None and order != "coarse_first":
        raise ValueError(
            f"{name}: stage_passes is for models with reveal_order='coarse_first', not {order!r}; leave it out of the "
            f"call, or of the model's generation_config.json"
        )
    _check_stage_passes(config, sampler)


def _check_stage_passes(config: Any, sampler: Any) -> None:
    shares = getattr(sampler, "stage_passes", None)
    if shares is not None and len(shares) != len(config.stage_digits):
        raise ValueError(
            f"{type(sampler).__name__}: stage_passes has {len(shares)} shares, but the model has "
            f"{len(config.stage_digits)} stages"
        )


def special_ids(name: str, value: Any, vocab_size: int | None = None) -> list[int]:
    """The ids that one of `SPECIAL_TOKENS` names, [] for None; ValueError for what is no id, or none of the model."""
    several = name == "eos_token_id" and isinstance(value, (list, tuple))
    ids = list(value) if several else [] if value is None else [value]
    if not all(is_integer(each) and each >= 0 for each in ids):
        raise ValueError(f"{name}={value!r} must be a token id, an integer of at least 0, or None")
    for token in ids:
        if vocab_size is not None and token >= vocab_size:
            raise ValueError(f"{name}={token} is no token of this model; use an id in [0, {vocab_size - 1}], or None")
    return [int(each) for each in ids]


def _override(merged: dict[str, Any], given: dict[str, Any]) -> None:
    """Update in place; a length given here under one of its two names replaces an earlier one under the other.

    do_sample=False given here takes away sampling options given earlier, and an earlier sampler that acts at random.
    """
    if given.get("max_new_tokens") is not None:
        merged.pop("max_length", None)
    elif given.get("max_length") is not None:
        merged.pop("max_new_tokens", None)
    if given.get("do_sample") is False:
        for name in SAMPLING_OPTIONS:
            merged.pop(name, None)
        sampler = sampler_from(merged.get("sampler_config"))
        if sampler is not None and sampler.kind != "rule":
            merged.pop("sampler_config")
    merged.update(given)
