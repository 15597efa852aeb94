"""What a streamer gets of a text that an autoregressive model writes: its states and logits, as of other families."""

from typing import Any

import torch
from torch import Tensor


def states_to_streamer(logits_processor: Any, states: "StatesOfStreamer") -> dict[str, Any]:
    """The streamer, and where it takes logits the logits processors with one that passes them on, last."""
    if not states.takes_logits:
        return {"streamer": states}
    given = [] if logits_processor is None else logits_processor
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    return {"streamer": states, "logits_processor": [*given, states.put_logits]}


class StatesOfStreamer:
    """Tells a streamer each state of the one sequence of `width` tokens that is written from left to right."""

    def __init__(self, streamer: Any, width: int, unwritten: int):
        self.streamer, self.takes_logits = streamer, bool(getattr(streamer, "takes_logits", False))
        self.state, self.known = torch.full((1, width), unwritten), 0

    def put(self, ids: Tensor) -> None:
        """Ids of any shape that follow what is known: the prompt, then token by token."""
        self.streamer.put(ids)
        self.state[0, self.known : self.known + ids.numel()] = ids.flatten().cpu()
        self.known += ids.numel()
        self.streamer.put_states(self.state.clone(), self.state.unsqueeze(2).clone())

    def put_logits(self, ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that changes nothing: ids (1, T), scores (1, V)."""
        self.streamer.put_logits(torch.tensor([ids.shape[1]]), scores)
        return scores

    def end(self) -> None:
        self.streamer.end()
