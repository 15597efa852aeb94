"""Which samplers, blocks and caches the model of each family has, and why no others."""

from dataclasses import dataclass
from typing import Any

from .samplers_prime_v2 import SAMPLERS, sampler_from
from .validation_keywords_prime_v2 import shown


@dataclass(frozen=True)
class FamilySamplers:
    """The samplers of a family, and why it has no others.

    names: of `SAMPLERS`; blocks: whether they take block_length and cache; reason: why there is nothing else.
    """

    names: tuple[str, ...]
    blocks: bool
    reason: str


# By the model_type of the configuration.
FAMILY_SAMPLERS = {
    "prime_v2": FamilySamplers(
        ("ancestral", "confidence", "threshold", "entropy-bound", "remasking"),
        True,
        "a token is hidden or final, and final ones are drawn again by remasking only",
    ),
    "prime_v2_uniform": FamilySamplers(
        ("ancestral", "predictor-corrector"),
        False,
        "no token is hidden, to be revealed by a rule or in blocks: all are noised alike until the last pass",
    ),
    "prime_v2_interpolating": FamilySamplers(
        ("ancestral",), False, "the order of its tokens is drawn before the first pass, for an exact cache (use_cache)"
    ),
    "prime_v2_arm": FamilySamplers(
        (), False, "it writes from left to right with an exact cache (use_cache), by temperature, top_p and top_k"
    ),
}


def check_family(model: Any, sampler: Any = None, block_length: int | None = None, cache: Any = None) -> None:
    """ValueError for a sampler config, a block length or a kind of cache, a string, that the family has not."""
    family, has = type(model).__name__, FAMILY_SAMPLERS[model.config.model_type]
    names = ", ".join(f"{SAMPLERS[name].__name__} ({name})" for name in has.names)
    it_has = f"; it has {names}" if names else "; leave sampler_config out"
    if sampler is not None and sampler_from(sampler).name not in has.names:
        raise ValueError(f"{family} has no {type(sampler_from(sampler)).__name__}: {has.reason}{it_has}")
    if has.blocks:
        return
    for option, value in (("block_length", block_length), ("cache", cache if isinstance(cache, str) else None)):
        if value not in (None, "none"):
            raise ValueError(f"{option}={shown(value)} is not for {family}: {has.reason}; leave {option} out")
