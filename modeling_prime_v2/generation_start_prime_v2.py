"""The start token that `generate` of an autoregressive model feeds before its prompts, and that no caller sees."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessorList, StoppingCriteriaList


def with_start(ids: Tensor, real: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Prompts (B, P) with padding before the text and the start token where the text does not begin with it.

    Returns (ids, real), both (B, P + 1), or (B, P) where every text begins with it.
    """
    order = real.int().argsort(dim=1, stable=True)
    ids, real = ids.masked_fill(~real, start).gather(1, order), real.gather(1, order)
    ids, real = functional.pad(ids, (1, 0), value=start), functional.pad(real, (1, 0), value=False)
    last_padding = (~real).sum(1, keepdim=True) - 1  # (B, 1), where the start token would stand
    lacks = ids.gather(1, last_padding + 1) != start if ids.shape[1] > 1 else torch.ones_like(real)
    real = real.scatter(1, last_padding, lacks)
    return (ids, real) if lacks.any() else (ids[:, 1:], real[:, 1:])


def without_start(added: int, logits_processor: Any, stopping_criteria: Any, streamer: Any) -> dict:
    """What Transformers calls back, in its lists, given ids (B, T) without their first `added` columns."""

    def hide(call: Callable) -> Callable:
        return lambda ids, *args, **kwargs: call(ids[:, added:], *args, **kwargs)

    def hide_all(calls: Any) -> list[Callable]:
        calls = calls if isinstance(calls, (list, tuple)) else [] if calls is None else [calls]
        return [hide(each) if added else each for each in calls]

    return {
        "logits_processor": LogitsProcessorList(hide_all(logits_processor)),
        "stopping_criteria": StoppingCriteriaList(hide_all(stopping_criteria)),
        "streamer": _StreamerWithoutStart(streamer, added) if added and streamer is not None else streamer,
    }


class _StreamerWithoutStart:
    """Passes on what `generate` streams, the prompt (B, T) first, without its first `added` columns."""

    def __init__(self, streamer: Any, added: int):
        self.streamer, self.columns = streamer, slice(added, None)

    def put(self, ids: Tensor) -> None:
        self.streamer.put(ids if self.columns is None else ids[:, self.columns])
        self.columns = None

    def end(self) -> None:
        self.streamer.end()
