"""The name by which the installed Transformers knows the cache of keys and values.

5.24 renamed `past_key_values` to `cache` in what generation passes to a model and reads from its output; the old name
is deprecated until 5.40. Models here take both and give the one that is current.
"""

from dataclasses import fields
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(each for each in CACHE_NAMES if each in {field.name for field in fields(BaseModelOutputWithPast)})


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that was given under one of its two names; ValueError for both, and for what is no cache."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give the first of them only")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, Cache):
        raise ValueError(
            f"cache (past_key_values) is of type {type(found).__name__}; give one of Transformers, e.g. DynamicCache()"
        )
    return found
