"""Any keyword of a public function and any field of a configuration: refused by its name, or it changes nothing.

The names are near the real ones, those of other libraries, and random; the values are anything.
"""

import inspect
import re

import numpy as np
import pytest
import torch
from fuzzing import Refusal, attempt, cases
from hypothesis import given
from hypothesis import strategies as st
from networks import KINDS, TINY, network, times_of

from prime_v2.families import FAMILIES
from prime_v2.generation_config_prime_v2 import OPTIONS, idle_options
from prime_v2.likelihood_frame_prime_v2 import log_likelihood

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
FOREIGN = (
    "token_type_ids cache_position is_causal seq_idx cu_seq_lens_q max_length_k output_router_logits "
    "inputs_embeds past_key_values head_mask task_ids logits_to_keep use_cache num_beams top_k steps "
    "n_layers gates labels_"
)
VALUES = [
    None,
    False,
    True,
    0,
    1,
    2,
    -1,
    0.5,
    1.0,
    float("nan"),
    "",
    "token",
    [],
    [1, 2],
    {},
    np.int64(1),
    np.float32(0.5),
    torch.tensor(1),
    torch.zeros(2, 3),
    torch.ones(2, 3, dtype=torch.long),
]
NOT_KEYWORDS = {"self", "kwargs", "args"}


@st.composite
def keywords(draw, real):
    """(a name, a value): a real name with a letter changed, left out, doubled or added; a foreign or a random name."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.sampled_from(FOREIGN.split())), draw(st.sampled_from(VALUES))
    if kind == 1:
        return draw(st.text(LETTERS, min_size=1, max_size=12)), draw(st.sampled_from(VALUES))
    name = draw(st.sampled_from(real))
    place, letter = draw(st.integers(0, len(name) - 1)), draw(st.sampled_from(LETTERS))
    changes = (
        name[:place] + letter + name[place + 1 :],
        name[:place] + name[place + 1 :],
        name[:place] + name[place] + name[place:],
        name + letter,
    )
    return changes[kind - 2] or "x", draw(st.sampled_from(VALUES))


def arguments(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in NOT_KEYWORDS]


def tensors(found) -> list:
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, tuple):
        return [each for each in found if isinstance(each, torch.Tensor)]
    names = ("loss", "logits", "value", "stderr", "matches", "sequences")
    return [getattr(found, name) for name in names if getattr(found, name, None) is not None]


def calls(model):
    """Public functions by name: (the call without more keywords, its real keywords)."""
    times = times_of(model, 2)
    noise = {"noise_keys": torch.arange(2), "noise_levels": torch.full((2,), 0.5, dtype=torch.double)}
    target = torch.tensor([[0, 0, 1], [0, 1, 1]])
    of_scores = arguments(log_likelihood)[1:]
    of_generate = [*arguments(model.generate), *OPTIONS, *idle_options()]
    return {
        "forward": (lambda **more: model(IDS, **{**times, **more}), arguments(model.forward)),
        "loss": (lambda **more: model(IDS, **{"labels": IDS, **noise, **more}), arguments(model.forward)),
        "log_likelihood": (lambda **more: model.log_likelihood(IDS, **{"num_samples": 2, **more}), of_scores),
        "greedy_matches": (
            lambda **more: model.greedy_matches(IDS, None, target, **more),
            ["tokens_per_pass", "input_ids"],
        ),
        "generate": (lambda **more: model.generate(IDS, **{"max_new_tokens": 2, "seed": 0, **more}), of_generate),
    }


def is_named(name: str, refusal: Refusal) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", refusal.sentence) is not None


@pytest.mark.parametrize("function", ["forward", "loss", "log_likelihood", "greedy_matches", "generate"])
@pytest.mark.parametrize("kind", ["digits", "ARM", "uniform", "interpolating"])
def test_a_keyword_is_refused_by_its_name_or_changes_nothing(kind, function):
    """What is a real keyword after all, with a value that may well change the result, is not looked at here."""
    call, real = calls(network(kind))[function]
    expected = tensors(call())

    @cases(25, 600)
    @given(keywords(sorted(real)))
    def check(case):
        name, value = case
        if name in real:
            return
        found = attempt(f"{function} of {kind}", lambda: call(**{name: value}))
        if isinstance(found, Refusal):
            assert is_named(name, found), found
            return
        again = tensors(found)
        assert len(again) == len(expected) and all(map(torch.equal, again, expected)), (name, value)

    check()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_field_is_refused_by_its_name_or_changes_nothing(family):
    config_class, model_class = FAMILIES[family].config_class, FAMILIES[family].model_class
    real = sorted(set(config_class.__dataclass_fields__) | {"rope_theta", "rope_scaling", "partial_rotary_factor"})
    plain = config_class(**TINY)
    torch.manual_seed(0)
    weights = model_class(plain).state_dict()
    kept = {name: value for name, value in vars(plain).items() if name in config_class.__dataclass_fields__}

    @cases(60, 1500)
    @given(keywords([name for name in real if not name.startswith("_")]))
    def check(case):
        name, value = case
        if name in real or name.startswith("_") or name == "self":
            return
        found = attempt(f"fields of {family}", lambda: config_class(**TINY, **{name: value}))
        if isinstance(found, Refusal):
            assert is_named(name, found) or "num_labels" in name, found
            return
        changed = {each for each in kept if getattr(found, each) != kept[each]}
        assert changed <= {"id2label", "label2id", "dtype"}, (name, value, changed)
        torch.manual_seed(0)
        again = model_class(found).state_dict()
        assert all(torch.equal(weights[each].float(), again[each].float()) for each in weights)

    check()


def test_the_kinds_named_here_exist():
    assert {"digits", "ARM", "uniform", "interpolating"} <= set(KINDS)
