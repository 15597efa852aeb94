"""Options of `generate`: their defaults, their validation, and how those of a call, a model and a file combine."""

import difflib
import math
from typing import Any

import torch
from transformers import GenerationConfig

# What an option is when neither the call, nor its generation_config, nor the model's sets it.
DEFAULTS = {"max_new_tokens": 256, "max_denoising_steps": 256, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
SAMPLING_OPTIONS = {"temperature": 1.0, "top_p": 1.0, "seed": None}  # and the values that change nothing
SPECIAL_TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id")
OPTIONS = (*DEFAULTS, "max_length", "seed", "return_dict_in_generate", *SPECIAL_TOKENS)
METADATA = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")


class PrimeV2GenerationConfig(GenerationConfig):
    """Options of `generate`. One that is None falls back to the model's generation config, then to its default.

    max_new_tokens: tokens to generate; by default 256, or as many as max_position_embeddings leaves room for.
    max_length: tokens of the output, prompt and suffix included; read only without max_new_tokens.
    max_denoising_steps: N, the steps that the reveals are spread over, 256 by default. The network runs at most once a
        step and at most once a unit; more steps draw fewer tokens at once, independently of each other.
    do_sample: True, also by default: draw from the model. False: the deterministic decode (`GreedyProcess`), which has
        no temperature, top_p or seed. Such an option beside do_sample=False is refused; one that a config sets beneath
        the call or config that says do_sample=False is ignored.
    temperature: the logits' divisor, > 0; 1.0 by default. top_p: nucleus mass in (0, 1]; 1.0, all of it, by default.
    seed: all draws are a function of it and the row's content; None draws one from torch's global generator.
    return_dict_in_generate: return a `PrimeV2GenerationOutput`; False by default.
    bos_token_id, pad_token_id, eos_token_id (one id or several): by default those of the model's config; a missing
        padding token is the first EOS token.
    The attributes of autoregressive generation (top_k, num_beams, ...) do not exist here and are refused.
    """

    max_new_tokens: int | None
    max_length: int | None
    max_denoising_steps: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    return_dict_in_generate: bool | None
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_id: int | list[int] | None

    def __init__(self, **kwargs: Any):
        # Not super().__init__(): it sets the attributes of autoregressive generation.
        for name in OPTIONS:
            setattr(self, name, kwargs.pop(name, None))
        self._commit_hash = kwargs.pop("_commit_hash", None)
        self._from_model_config = kwargs.pop("_from_model_config", None)
        self.transformers_version = kwargs.pop("transformers_version", None)
        kwargs.pop("_original_object_hash", None)
        self.__dict__.update(kwargs)  # refused by validate
        self.validate()

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """ValueError for an unknown name, a bad type or a value out of range (the arguments are not read)."""
        for name, value in vars(self).items():
            if name not in OPTIONS and name not in METADATA:
                nearest = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{name}={value!r} is not an option of this model's generate(); the nearest is {nearest} "
                    f"(all: {', '.join(OPTIONS)})"
                )
        for name in ("max_new_tokens", "max_length", "max_denoising_steps"):
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1; use {DEFAULTS.get(name, 256)}")
        self._validate_sampling()
        if self.return_dict_in_generate not in (None, True, False):
            raise ValueError(f"return_dict_in_generate={self.return_dict_in_generate!r} must be True or False")
        if self.seed is not None and not _is_integer(self.seed):
            raise ValueError(f"seed={self.seed!r} must be an integer, or None to draw one; use 0")
        for name in SPECIAL_TOKENS:
            special_ids(name, getattr(self, name))

    def _validate_sampling(self) -> None:
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample={self.do_sample!r} must be True or False")
        given = [name for name, idle in SAMPLING_OPTIONS.items() if getattr(self, name) not in (None, idle)]
        if self.do_sample is False and given:
            named = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(
                f"do_sample=False, the deterministic decode, has no use for {named}; leave {', '.join(given)} out, or "
                f"give do_sample=True"
            )
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name}={value!r} must be a number; use 1.0")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be positive and finite; use 1.0, or do_sample=False without a "
                f"temperature, the deterministic decode"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; use 1.0 to keep every token")

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


def merge_options(model: Any, generation_config: GenerationConfig | None, kwargs: dict) -> PrimeV2GenerationConfig:
    """Options of a call: keywords, else `generation_config`, else the model's, else its config's, else `DEFAULTS`."""
    merged: dict[str, Any] = {name: getattr(model.config, name) for name in SPECIAL_TOKENS}
    for config in (model.generation_config, generation_config):
        if config is not None:
            # to_dict: also a plain GenerationConfig, whose unsupported options are then refused by name.
            given = {k: v for k, v in config.to_dict().items() if v is not None and k not in METADATA}
            _override(merged, given)
    _override(merged, kwargs)
    options = PrimeV2GenerationConfig(**merged)
    for name in ("max_denoising_steps", "do_sample", "temperature", "top_p"):
        if getattr(options, name) is None:
            setattr(options, name, DEFAULTS[name])
    if options.seed is None and options.do_sample:
        options.seed = int(torch.randint(2**62, ()))
    for name in SPECIAL_TOKENS:
        special_ids(name, getattr(options, name), model.config.vocab_size)
    options.eos_token_id = special_ids("eos_token_id", options.eos_token_id)
    if options.pad_token_id is None and options.eos_token_id:
        options.pad_token_id = options.eos_token_id[0]
    return options


def special_ids(name: str, value: Any, vocab_size: int | None = None) -> list[int]:
    """The ids that one of `SPECIAL_TOKENS` names, [] for None; ValueError for what is no id, or none of the model."""
    several = name == "eos_token_id" and isinstance(value, (list, tuple))
    ids = list(value) if several else [] if value is None else [value]
    if not all(_is_integer(each) and each >= 0 for each in ids):
        raise ValueError(f"{name}={value!r} must be a token id, an integer of at least 0, or None")
    for token in ids:
        if vocab_size is not None and token >= vocab_size:
            raise ValueError(f"{name}={token} is no token of this model; use an id in [0, {vocab_size - 1}], or None")
    return ids


def _override(merged: dict[str, Any], given: dict[str, Any]) -> None:
    """Update in place; a length given here under one of its two names replaces an earlier one under the other.

    do_sample=False given here takes away the sampling options given earlier.
    """
    if given.get("max_new_tokens") is not None:
        merged.pop("max_length", None)
    elif given.get("max_length") is not None:
        merged.pop("max_new_tokens", None)
    if given.get("do_sample") is False:
        for name in SAMPLING_OPTIONS:
            merged.pop(name, None)
    merged.update(given)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["SPECIAL_TOKENS", "PrimeV2GenerationConfig", "merge_options", "special_ids"]
