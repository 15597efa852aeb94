"""Numbers as people read them: times, counts, three digits, intervals."""

import math
from collections.abc import Callable, Sequence

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def perplexity(nats_per_token: float) -> float:
    """exp, cut at 700 nats a token so that an absurd model still gives a number that JSON can hold."""
    return math.exp(min(nats_per_token, 700.0))


def duration(seconds: float) -> str:
    """A time: 45 s, 1.5 min, 2.0 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3597 else f"{seconds / 3600:.1f} h"


def quantity(value: float) -> str:
    """A count of parameters or tokens in three digits: 640, 786 K, 2.1 M."""
    for unit, name in UNITS:
        if value >= unit * 0.9995:  # which has three digits 1000 of the unit below
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def three_digits(value: float) -> str:
    """Three digits without an exponent: 0.0395, 12.3, 17800."""
    return f"{value:.3g}" if value < 100 else f"{float(f'{value:.3g}'):.0f}"


def interval(ends: Sequence[float | None] | None, form: Callable[[float], str] = three_digits) -> str:
    """[low, high], each end as `form` has it; "" for None, "inf" for an end of None."""
    if ends is None:
        return ""
    return f"[{', '.join('inf' if end is None else form(end) for end in ends)}]"
