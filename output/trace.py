"""The trace of a generated text: what was known of it before the first pass of the network and after each."""

from dataclasses import dataclass, field
from typing import Any

MOST_LIKELY = 3  # tokens of a prediction that are kept


@dataclass(frozen=True)
class TraceStep:
    """A text of T tokens as far as it is known.

    ids: T token ids, the mask id where a token is not fully known. digits: T lists of S digits, `base` where hidden;
    of a family whose tokens are whole S = 1, and the digit is the id.
    """

    ids: list[int]
    digits: list[list[int]]


@dataclass(frozen=True)
class Prediction:
    """What a pass of the network said of a token: the entropy in nats, and the likeliest ids with probabilities."""

    entropy: float
    likeliest: list[tuple[int, float]]


@dataclass
class Trace:
    """A streamer of `generate` that keeps each state of the one sequence that it generates.

    steps: the state before the first pass, then after each pass. num_given: tokens before the first generated one.
    result: the T ids that `generate` returns, without the padding of the prompt; they differ from the last step's ids
    after an end-of-sequence token, where they are padding or missing. takes_logits: keep predictions, too.
    predictions: of each pass, by the index of the token, as far as the pass scored it. Pass k + 1 goes from steps[k],
    which predictions[k] are of, to steps[k + 1].
    """

    steps: list[TraceStep] = field(default_factory=list)
    num_given: int = 0
    result: list[int] = field(default_factory=list)
    takes_logits: bool = False
    predictions: list[dict[int, Prediction]] = field(default_factory=list)
    _of_pass: dict[int, Prediction] = field(default_factory=dict)

    def put(self, value: Any) -> None:
        """Ids (1, ...): those before the first generated token, then, when all are known, the others."""
        if not self.steps:
            self.num_given = value.numel()
        self.result += value.flatten().tolist()

    def put_logits(self, places: Any, logits: Any) -> None:
        """Logits (M, V) of the tokens at places (M,), of the pass whose state comes next."""
        probabilities = logits.double().softmax(-1)
        # 0 log 0 is 0: any finite number in place of log 0.
        entropies = -(probabilities * probabilities.log().clamp(min=-1e4)).sum(-1)
        top = probabilities.topk(min(MOST_LIKELY, logits.shape[-1]), dim=-1)
        rows = zip(places.tolist(), entropies.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
        for place, entropy, ids, values in rows:
            possible = [(token, value) for token, value in zip(ids, values, strict=True) if value > 0]
            self._of_pass[place] = Prediction(entropy, possible)

    def put_states(self, ids: Any, digits: Any) -> None:
        """Ids (1, T) and digits (1, T, S) of the state that is reached."""
        if self.steps:
            self.predictions.append(self._of_pass)
            self._of_pass = {}
        self.steps.append(TraceStep(ids[0].tolist(), digits[0].tolist()))

    def end(self) -> None:
        """Nothing is left to do."""

    def kept(self) -> list[int]:
        """The tokens that are in the result, without the padding after an end-of-sequence token."""
        return [i for i, final in enumerate(self.result) if self.steps and self.steps[-1].ids[i] == final]

    def hides_by_mask(self, mask_id: int) -> bool:
        """Whether hidden tokens are masked; those of uniform-state diffusion hold other tokens instead."""
        return mask_id in self.steps[0].ids

    def is_given(self, index: int, mask_id: int) -> bool:
        """Whether a token was known before the first pass: one of the prompt or of the suffix."""
        first = self.steps[0].ids[index]
        return index < self.num_given or (self.hides_by_mask(mask_id) and first != mask_id)

    def generated(self, mask_id: int) -> list[int]:
        """The tokens of `kept` that were not given."""
        return [i for i in self.kept() if not self.is_given(i, mask_id)]

    def share_known(self, step: TraceStep, generated: list[int], base: int, mask_id: int) -> float:
        """The share of the digits of the generated tokens that are known in a state, and final."""
        shares = []
        for i in generated:
            hidden = step.digits[i].count(base) / len(step.digits[i]) if step.ids[i] == mask_id else 0.0
            shares.append(1 - hidden if step.ids[i] in (mask_id, self.result[i]) else 0.0)
        return sum(shares) / len(shares) if shares else 1.0
