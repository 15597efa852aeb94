"""Log-likelihoods of the answer choices of questions, with no more passes than telling them apart takes.

Everything is estimated by `model.log_likelihood`. Added here: the choices of a question share their masks, so that the
standard error of their difference is small (common random numbers); draws come in rounds and stop where the best
choice leads clearly; rows of many questions share forward passes. A score depends on its question and the settings,
not on the other questions, their order, the batch or the number of processes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prime_v2.eval.intervals import standard_errors_as_sure
from prime_v2.likelihood_frame_prime_v2 import TOKENS_PER_PASS
from prime_v2.likelihood_output_prime_v2 import NotFiniteError, paired_difference, stratified_degrees
from prime_v2.likelihood_rows_prime_v2 import draw_levels, sequence_key
from prime_v2.random_prime_v2 import Stream, hash64
from prime_v2.validation_inputs_prime_v2 import checked_flag, checked_seed, whole_number

FIRST_DRAWS = 8  # of an adaptive score; one draw has no standard error
ONE_ROUND = ("chain", "causal", "orders", "sampler")  # nothing drawn, or no mean of draws
PASSES_PER_GROUP = 16  # questions are scored in groups of about this many passes: progress, cache, memory


@dataclass(frozen=True)
class Settings:
    """How choices are scored; `method`, `num_samples` and `seed` as in `log_likelihood`.

    adaptive: None, or z: rounds of draws, each doubling them, end for a question when its best choice leads every
        other by z paired standard errors, in nats and in nats per unit of `Choice.length`; for few effective degrees
        of freedom by more, as sure as z of a normal (Student's t). The draws of all rounds
        together are stratified as if drawn at once (`draw_levels`). The first round has `num_samples` halved as long
        as it stays whole and at least FIRST_DRAWS.
    common_masks: choices of a question draw the same masks.
    generation_config: of method="sampler", the sampler on top of the model's own options.
    """

    method: str = "subtoken"
    num_samples: int = 128
    seed: int = 0
    adaptive: float | None = None
    common_masks: bool = True
    tokens_per_pass: int = TOKENS_PER_PASS
    generation_config: Any = None

    def __post_init__(self):
        whole_number("num_samples", self.num_samples, 1, use=128)
        checked_seed(self.seed)
        adaptive: Any = self.adaptive
        is_number = isinstance(adaptive, Real) and not isinstance(adaptive, bool)
        if adaptive is not None and not (is_number and adaptive > 0):
            raise ValueError(f"adaptive={self.adaptive} must be a positive number of standard errors, or off; use 3")
        whole_number("tokens_per_pass", self.tokens_per_pass, 1, use=TOKENS_PER_PASS)
        checked_flag("common_masks", self.common_masks)

    def of_method(self) -> dict[str, Any]:
        """Arguments of `log_likelihood` that only this method has."""
        return {"generation_config": self.generation_config} if self.method == "sampler" else {}

    def rounds(self) -> list[int]:
        """New draws of each round."""
        if self.adaptive is None or self.method in ONE_ROUND:
            return [self.num_samples]
        first, doublings = self.num_samples, 0
        while first % 2 == 0 and first // 2 >= FIRST_DRAWS:
            first, doublings = first // 2, doublings + 1
        return [first, *(first * 2**each for each in range(doublings))]


@dataclass(frozen=True)
class Choice:
    """Clean ids of context and continuation, of which the first `num_context` are given.

    length: divisor of the normalised score, e.g. the characters of the continuation.
    """

    ids: tuple[int, ...]
    num_context: int
    length: float = 1.0


@dataclass
class ChoiceScore:
    """value: nats, the log-likelihood or its bound; stderr of the draws, 0 where nothing was drawn, NaN for one draw.

    num_draws: rows (of a sampler, paths) averaged, 0 where nothing was drawn; num_forward: rows the network ran;
    token_passes: those times their tokens.
    """

    value: float = 0.0
    stderr: float = 0.0
    num_draws: int = 0
    num_forward: int = 0
    token_passes: int = 0
    draws: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.double), repr=False)  # (K,)
    levels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.double), repr=False)  # (K,), rising


@dataclass
class QuestionScore:
    """Scores of the choices, in their order; the lead of the best over the runner-up and its paired standard error.

    lead, lead_stderr: nats; NaN for a single choice.
    """

    choices: list[ChoiceScore]
    lead: float = float("nan")
    lead_stderr: float = float("nan")


class ChoiceError(ValueError):
    """A likelihood that is no number; `question` and `choice` are its place."""

    def __init__(self, question: int, choice: int, message: str):
        super().__init__(message)
        self.question, self.choice = question, choice


def score_questions(
    model: Any,
    questions: Sequence[Sequence[Choice]],
    settings: Settings,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, QuestionScore]]:
    """Yields (number, score) of each question, the longest first; progress is called with how many choices are done.

    questions: the choices of each, with the same context (its ids give the shared masks). Raises ValueError for what
    `log_likelihood` refuses and `ChoiceError` for logits that are not finite.
    """
    for group in _groups(questions, settings):
        scores = {number: QuestionScore([ChoiceScore() for _ in questions[number]]) for number in group}
        active = list(group)
        for round_number, size in enumerate(settings.rounds()):
            _one_round(model, questions, scores, active, settings, round_number, size)
            for number in active:
                _summarise(scores[number])
            active = [number for number in active if not _is_decided(scores[number], questions[number], settings)]
            if not active:
                break
        for number in group:
            yield number, scores[number]
            if progress is not None:
                progress(len(questions[number]))


def _groups(questions: Sequence[Sequence[Choice]], settings: Settings) -> Iterator[list[int]]:
    """Numbers of the questions, longest first, so that the rows of a pass are of like length."""
    size = [max(len(choice.ids) for choice in question) for question in questions]
    group: list[int] = []
    tokens = 0
    for number in sorted(range(len(questions)), key=lambda each: (-size[each], each)):
        group.append(number)
        tokens += size[number] * len(questions[number]) * settings.rounds()[0]
        if tokens >= PASSES_PER_GROUP * settings.tokens_per_pass:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _one_round(model, questions, scores, active, settings: Settings, round_number: int, size: int) -> None:
    """Adds a round of draws to every choice of the active questions that still draws."""
    places = [
        (number, index)
        for number in active
        for index, score in enumerate(scores[number].choices)
        if round_number == 0 or score.num_draws
    ]
    choices = [questions[number][index] for number, index in places]
    ids, mask, prompt = padded(choices)
    keys = torch.stack([_key(choice, settings) for choice in choices])
    try:
        output = model.log_likelihood(
            ids,
            mask,
            prompt,
            settings.method,
            num_samples=size,
            round_number=round_number,
            keys=keys,
            return_samples=True,
            tokens_per_pass=settings.tokens_per_pass,
            **settings.of_method(),
        )
    except NotFiniteError as error:
        raise ChoiceError(*places[error.row], str(error)) from None
    for row, (number, index) in enumerate(places):
        score, num_forward = scores[number].choices[index], int(output.num_forward[row])
        score.num_forward += num_forward
        score.token_passes += num_forward * len(choices[row].ids)
        if (
            len(output.samples[row]) == 1 and output.stderr[row] == 0
        ):  # nothing drawn: what was drawn before is dropped
            score.draws, score.num_draws = output.samples[row], 0
            continue
        levels, order = torch.cat([score.levels, draw_levels(keys[row], size, round_number)]).sort()
        score.levels, score.draws = levels, torch.cat([score.draws, output.samples[row]])[order]
        score.num_draws = len(levels)


def padded(choices: Sequence[Choice]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids int64, attention_mask bool, prompt_mask bool), all (B, L), of choices that are padded on the right."""
    ids = pad_sequence([torch.tensor(choice.ids) for choice in choices], batch_first=True)
    columns = torch.arange(ids.shape[1])
    lengths, given = (
        torch.tensor(each).unsqueeze(1)
        for each in ([len(choice.ids) for choice in choices], [choice.num_context for choice in choices])
    )
    return ids, columns < lengths, columns < given


def _key(choice: Choice, settings: Settings) -> Tensor:
    ids = torch.tensor(choice.ids)
    scored = torch.arange(len(ids)) >= choice.num_context
    if settings.common_masks:
        ids, scored = ids[~scored], scored[~scored]
    return hash64(sequence_key(ids, scored, settings.seed), Stream.QUESTION)


def _summarise(score: QuestionScore) -> None:
    nothing = torch.zeros(1, dtype=torch.double)
    for choice in score.choices:
        choice.value, choice.stderr = paired_difference(choice.draws, nothing)
        if choice.num_draws == 1:
            choice.stderr = math.nan
    if len(score.choices) > 1:
        ranked = sorted(score.choices, key=lambda choice: -choice.value)
        score.lead, score.lead_stderr = paired_difference(ranked[0].draws, ranked[1].draws)
        if any(choice.num_draws == 1 for choice in ranked[:2]):
            score.lead_stderr = math.nan


def _is_decided(score: QuestionScore, choices: Sequence[Choice], settings: Settings) -> bool:
    """Whether further draws could not change which choice is best, as sure as `adaptive` asks for."""
    if all(choice.num_draws == 0 for choice in score.choices):
        return True
    if settings.adaptive is None or len(choices) < 2:
        return False
    for lengths in ([1.0] * len(choices), [choice.length for choice in choices]):
        values = [each.value / length for each, length in zip(score.choices, lengths, strict=True)]
        best = values.index(max(values))
        for other, each in enumerate(score.choices):
            if other == best:
                continue
            difference = score.choices[best].draws / lengths[best] - each.draws / lengths[other]
            lead, stderr = paired_difference(difference, torch.zeros(1, dtype=torch.double))
            if not lead > _reach(settings.adaptive, difference) * stderr:
                return False
    return True


def _reach(standard_errors: float, difference: Tensor) -> float:
    """Standard errors that are as sure, for so few and heavy-tailed draws (K,), as `standard_errors` of a normal."""
    return standard_errors_as_sure(
        standard_errors, stratified_degrees(difference) if len(difference) > 1 else math.inf
    )
