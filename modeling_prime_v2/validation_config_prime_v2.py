"""Which fields a configuration has, and what a config.json may not ask for; unknown fields are refused by name."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from transformers import GenerationConfig, PreTrainedConfig

from .validation_keywords_prime_v2 import did_you_mean, nearest, shown

VERSION = "0.1.0"  # of this package; every configuration records it
VERSION_FIELD = "prime_v2_version"
# Fields that Transformers reads or writes without declaring them: older names, rotary parameters outside
# `rope_parameters`, what Trainer, pipelines and tokenizers set.
UNDECLARED = (
    "attn_implementation",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "partial_rotary_factor",
    "prefix",
    "rope_scaling",
    "rope_theta",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "use_cache",
)
# Declared by Transformers, and read by no network here.
NOT_READ = ("per_layer_config",)
# Attention that comes with PyTorch; any other may be downloaded as code, also under a name such as flash_attention_2.
LOCAL_ATTENTION = ("eager", "sdpa", "flex_attention")
# JSON files of a model and its tokenizer, which hold mappings; an index of weights does, too.
MAPPINGS = (
    "adapter_config.json",
    "added_tokens.json",
    "code_table.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


@cache
def declared_fields(config_class: type) -> frozenset[str]:
    """Fields of a configuration that its class or Transformers declares."""
    own = {each.name for each in fields(config_class)}
    shared = {name for name in dir(PreTrainedConfig) if not callable(getattr(PreTrainedConfig, name))}
    return frozenset(own | shared - set(NOT_READ) | set(UNDECLARED))


def own_fields(config_class: type) -> list[str]:
    """Fields that a family's configuration has beside those of every configuration."""
    shared = {each.name for each in fields(PreTrainedConfig)}
    return [each.name for each in fields(config_class) if each.name not in shared]


def refuse_unknown_fields(config_class: type, given: Mapping[str, Any]) -> None:
    """ValueError for a field that neither this configuration nor Transformers has; private ones are Transformers'.

    Where a newer version of this package wrote them, that is said.
    """
    unknown = [name for name in given if not is_known(config_class, name)]
    if not unknown:
        return
    name, made_by = unknown[0], given.get(VERSION_FIELD)
    if _is_newer(made_by):
        raise ValueError(
            f"this configuration was written by version {made_by} of prime-v2 and has the field {name}, which version "
            f"{VERSION} does not know; install the newer version, or load with trust_remote_code=True"
        )
    hint = did_you_mean(name, own_fields(config_class)) or "; leave it out"
    if name in GenerationConfig._get_default_generation_params():
        hint = "; it is an option of generate(), which goes into the generation config"
    raise ValueError(f"{name}={shown(given[name])} is no field of {config_class.__name__}{hint}")


def refuse_misspelt(config_class: type, names: Iterable[str]) -> None:
    """ValueError for a name that is none of a configuration's attributes, but nearly one of its own fields.

    `names` are set on a configuration, or left over by `from_pretrained`. Names that are near no field are let be:
    Transformers, accelerate and quantisers keep what they like in configurations, and AutoTokenizer passes its own
    arguments (eos_token, ...).
    """
    for name in names:
        of_tokenizer = name.endswith("_token")  # eos_token is like bos_token_id
        if not of_tokenizer and not is_known(config_class, name) and not hasattr(config_class, name):
            near = nearest(name, own_fields(config_class))
            if near is not None:
                raise ValueError(f"{name} is no field of {config_class.__name__}; did you mean {near}?")


def refuse_foreign_code(content: Mapping[str, Any]) -> None:
    """ValueError for a config.json that asks for quantisation, or for attention that could be downloaded as code."""
    if content.get("quantization_config") is not None:
        raise ValueError(
            "config.json has a quantization_config, which would choose the code that reads the weights; remove it, "
            "and pass quantization_config to from_pretrained if it is what you want"
        )
    for name in IMPLEMENTATIONS:
        for key in (name, f"_{name}", f"_{name}_internal"):
            value = content.get(key)
            if value is not None and value not in LOCAL_ATTENTION:
                raise ValueError(
                    f"config.json has {key}={shown(value)}, which could be code to download; a file may name "
                    f"{', '.join(LOCAL_ATTENTION)} only: remove it, and pass {name} to from_pretrained if it is what "
                    f"you want"
                )


def read_mapping(path: Path, advice: str = "save it again") -> dict[str, Any]:
    """The content of a JSON file that holds a mapping; ValueError, naming the file, for anything else in it."""
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; {advice}") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path} is not JSON ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {shown(content)}, but must hold a mapping; {advice}")
    return content


@contextmanager
def readable_json(place: Any) -> Iterator[None]:
    """ValueError, naming the file, in place of what readers raise for a JSON file of `place` that holds no mapping.

    `place`: a file, or the folder of a model or tokenizer. What is raised for another reason passes.
    """
    try:
        yield
    except (RecursionError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        if isinstance(error, RecursionError) and "JSON" not in str(error):
            raise
        path = Path(str(place))
        fault = None
        for each in [path] if path.is_file() else sorted(filter(_is_read, path.glob("*.json"))):
            try:
                read_mapping(each)
            except ValueError as found:
                fault = str(found)
                break
        if fault is None and isinstance(error, RecursionError):  # of the Hub's cache
            fault = f"a JSON file of {place} is nested too deeply to be read; save it again"
        if fault is None:
            raise
        raise ValueError(fault) from None


def _is_read(path: Path) -> bool:
    """Whether a file is one that loading reads; others beside it may hold what they like."""
    return path.is_file() and (path.name in MAPPINGS or path.name.endswith(".index.json"))


def is_known(config_class: type, name: str) -> bool:
    """Whether a name is a field of a configuration, or Transformers' own."""
    return name.startswith("_") or name == VERSION_FIELD or name in declared_fields(config_class)


def _is_newer(version: Any) -> bool:
    try:
        return Version(version) > Version(VERSION)
    except (InvalidVersion, TypeError):
        return False
