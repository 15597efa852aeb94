"""The picture of a sample, as `prime-v2 generate --picture` and `prime-v2 demo` draw it."""

from typing import Any

from prime_v2.output.drawing import Drawing
from prime_v2.output.trace import Trace
from prime_v2.output.trace_picture import draw_trace


def check_drawable(model: Any) -> None:
    """ValueError for a causal model, which hides nothing."""
    if model.config.causal:
        raise ValueError(
            "--picture shows hidden tokens as they become known, but this model writes from left to right and hides "
            "none; leave --picture out, or use --watch"
        )


def hidden_digit(model: Any) -> int:
    """The digit that stands for a hidden one: the base, or the mask id where a whole token is the only digit."""
    return getattr(model.config, "base", model.config.vocab_size)


def picture_of(trace: Trace, model: Any, tokenizer: Any) -> Drawing:
    """The picture of one sequence of `model.generate`."""
    base, mask_id = hidden_digit(model), model.config.mask_token_id
    return draw_trace(trace, lambda token: tokenizer.decode([token]), base=base, mask_id=mask_id)
