"""lm-eval's requests as questions: those of one document with one context are the choices of a question."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance

from prime_v2.eval.answers import Choice

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # lm-eval's: texts, ids of context, of continuation


@dataclass
class Question:
    """Requests with one context: their numbers, the choice of each, and the choices, equal ones once.

    is_truncated: the context lost its oldest tokens so as to fit beside the longest continuation.
    """

    task: str | None
    context: list[int]
    requests: list[int] = field(default_factory=list)
    choice_of: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    is_truncated: bool = False


def questions_of(
    requests: Sequence[Request], instances: Sequence[Instance], prefix_token_id: int, max_length: int
) -> list[Question]:
    """The questions of some requests, in the order of their first ones.

    instances: where the requests come from, or none. prefix_token_id: the context in place of an empty one.
    Raises ValueError for a continuation that is longer than max_length.
    """
    groups: dict[Any, Question] = {}
    for number, (texts, context, _) in enumerate(requests):
        if not context and texts is not None:  # only white space, which lm-eval gives to the continuation
            context = [prefix_token_id]
        task, document = (instances[number].task_name, instances[number].doc_id) if instances else (None, None)
        question = groups.setdefault((task, document, tuple(context)), Question(task, context))
        question.requests.append(number)
    for question in groups.values():
        continuations = [requests[number][2] for number in question.requests]
        for number, ids in zip(question.requests, continuations, strict=True):
            if len(ids) > max_length:
                raise ValueError(
                    f"{place_of(instances, number)} has a continuation of {len(ids)} tokens, but the model takes "
                    f"{max_length}; score it with loglikelihood_rolling, or shorten it"
                )
        room = max_length - max(map(len, continuations))
        question.is_truncated = len(question.context) > room
        context = question.context[len(question.context) - room :] if question.is_truncated else question.context
        for number, ids in zip(question.requests, continuations, strict=True):
            texts = requests[number][0]
            length = max(1, len(texts[1].strip())) if texts else max(1, len(ids))
            choice = Choice((*context, *ids), len(context), length)
            if choice not in question.choices:
                question.choices.append(choice)
            question.choice_of.append(question.choices.index(choice))
    return list(groups.values())


def check_ids(request: Request, place: str, vocab_size: int, mask_token: str) -> None:
    """ValueError for a continuation without a token, and for the mask token, whose id is vocab_size."""
    if not request[2]:
        raise ValueError(
            f"{place} has a continuation without a token of its own (it merges with the context), which has no "
            f"likelihood; begin it with a space"
        )
    if max(max(request[1], default=0), max(request[2])) >= vocab_size:
        raise ValueError(f"{place} spells the mask token {mask_token!r}, which is no text")


def place_of(instances: Sequence[Instance], number: int) -> str:
    """A request by its number, task and document."""
    if not instances:
        return f"request {number}"
    instance = instances[number]
    return f"request {number} (task {instance.task_name}, document {instance.doc_id})"
