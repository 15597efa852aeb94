"""The name by which the installed Transformers knows the cache of keys and values.

5.24 renamed `past_key_values` to `cache` in what generation passes to a model and reads from its output; the old name
is deprecated until 5.40. Models here take both and give the one that is current.
"""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(each for each in CACHE_NAMES if each in {field.name for field in fields(BaseModelOutputWithPast)})


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that was given under one of its two names; ValueError for both."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give the first of them only")
    return past_key_values if cache is None else cache


__all__ = ["CACHE_NAME", "CACHE_NAMES", "one_cache"]
