"""Likelihood bounds, perplexity, training and its report, and the command line."""

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "load_model_and_tokenizer": "loading",
    "load_tokenizer": "loading",
    "make_record": "records",
    "plot_training": "plots",
    "read_record": "records",
    "score_blocks": "perplexity",
    "score_text": "perplexity",
    "write_json": "records",
}
__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from prime_v2.eval.loading import load_model_and_tokenizer as load_model_and_tokenizer
    from prime_v2.eval.loading import load_tokenizer as load_tokenizer
    from prime_v2.eval.perplexity import score_blocks as score_blocks
    from prime_v2.eval.perplexity import score_text as score_text
    from prime_v2.eval.plots import plot_training as plot_training
    from prime_v2.eval.records import make_record as make_record
    from prime_v2.eval.records import read_record as read_record
    from prime_v2.eval.records import write_json as write_json


def __getattr__(name: str) -> Any:
    """Import on first use: `import prime_v2.eval` alone loads neither torch nor Transformers."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
