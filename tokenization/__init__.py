"""The tokenizer that splits tokens into base-b digits, its builder, and sub-token entropy tables."""

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "PrimeV2Tokenizer": "tokenization_prime_v2",
    "build_tokenizer": "build",
    "count_tokens": "entropy",
    "entropy_table": "entropy",
    "render_table": "entropy",
    "subtoken_entropies": "entropy",
}
__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from prime_v2.tokenization.build import build_tokenizer as build_tokenizer
    from prime_v2.tokenization.entropy import count_tokens as count_tokens
    from prime_v2.tokenization.entropy import entropy_table as entropy_table
    from prime_v2.tokenization.entropy import render_table as render_table
    from prime_v2.tokenization.entropy import subtoken_entropies as subtoken_entropies
    from prime_v2.tokenization.tokenization_prime_v2 import PrimeV2Tokenizer as PrimeV2Tokenizer


def __getattr__(name: str) -> Any:
    """Import on first use: `import prime_v2.tokenization` itself loads neither torch nor Transformers."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
