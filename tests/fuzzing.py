"""What the fuzz tests share: how many cases, what counts as a refusal, and a count of both outcomes.

Each case ends in an answer that the test checks, or in a refusal: a ValueError (of a configuration Transformers' own
form of it) with a sentence. Anything else, a traceback of another kind included, fails the test.
"""

import atexit
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

COUNTS_FILE = "PRIME_V2_FUZZ_COUNTS"  # where benchmarks/fuzz.py wants the counts of this process
COUNTS: Counter[str] = Counter()
LONGEST_SENTENCE = 1000


def cases(ordinary: int, thorough: int) -> settings:
    """How many examples a test runs, in the ordinary suite and with --hypothesis-profile=thorough."""
    is_thorough = settings.get_current_profile_name() == "thorough"
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=thorough if is_thorough else ordinary, suppress_health_check=slow)


def attempt(test: str | None, call: Callable[[], Any]) -> Any:
    """call(), counted as an answer of `test`; or its refusal, a `Refusal`, counted as one (None: not counted)."""
    try:
        answer = call()
    except (ValueError, StrictDataclassError) as error:
        sentence = " ".join(str(error).split())
        assert 10 < len(sentence) < LONGEST_SENTENCE, sentence
        answer = Refusal(sentence)
    if test is not None:
        COUNTS[f"{test}: {'refused' if isinstance(answer, Refusal) else 'answered'}"] += 1
    return answer


class Refusal:
    """The sentence of a refusal."""

    def __init__(self, sentence: str):
        self.sentence = sentence

    def __repr__(self) -> str:
        return f"refused: {self.sentence}"


@st.composite
def options(draw: Any, good: dict[str, list], bad: dict[str, list], most: int = 5) -> tuple[dict[str, Any], bool]:
    """(Some options by name, whether all have good values): a third of the cases has a bad one."""
    names = draw(st.lists(st.sampled_from(sorted(good)), max_size=most, unique=True))
    chosen = {name: draw(st.sampled_from(good[name])) for name in names}
    if draw(st.integers(0, 2)):
        return chosen, True
    name = draw(st.sampled_from(sorted(bad)))
    return chosen | {name: draw(st.sampled_from(bad[name]))}, False


@atexit.register
def _write_counts() -> None:
    if path := os.environ.get(COUNTS_FILE):
        Path(path).write_text(json.dumps(COUNTS, indent=1, sort_keys=True), encoding="utf-8")
