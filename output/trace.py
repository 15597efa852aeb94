"""The trace of a generated text: what was known of it before the first pass of the network and after each."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TraceStep:
    """A text of T tokens as far as it is known.

    ids: T token ids, the mask id where a token is not fully known. digits: T lists of S digits, `base` where hidden;
    of a family whose tokens are whole S = 1, and the digit is the id.
    """

    ids: list[int]
    digits: list[list[int]]


@dataclass
class Trace:
    """A streamer of `generate` that keeps each state of the one sequence that it generates.

    steps: the state before the first pass, then after each pass. num_given: tokens before the first generated one.
    result: the T ids that `generate` returns, without the padding of the prompt; they differ from the last step's ids
    after an end-of-sequence token, where they are padding.
    """

    steps: list[TraceStep] = field(default_factory=list)
    num_given: int = 0
    result: list[int] = field(default_factory=list)

    def put(self, value: Any) -> None:
        """Ids (1, ...): those before the first generated token, then, when all are known, the others."""
        if not self.steps:
            self.num_given = value.numel()
        self.result += value.flatten().tolist()

    def put_states(self, ids: Any, digits: Any) -> None:
        """Ids (1, T) and digits (1, T, S) of the state that is reached."""
        self.steps.append(TraceStep(ids[0].tolist(), digits[0].tolist()))

    def end(self) -> None:
        """Nothing is left to do."""
