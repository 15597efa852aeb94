"""Any arguments of `generate`: what is given comes back as it was, what is new is allowed, or a refusal."""

import pytest
import torch
from fuzzing import Refusal, attempt, cases, options
from hypothesis import given
from hypothesis import strategies as st
from networks import KINDS, LIMIT, VOCAB_SIZE, network

MASK, EOS = VOCAB_SIZE, 2
NAN, INF = float("nan"), float("inf")
GOOD = {
    "max_new_tokens": [1, 2, 5],
    "max_length": [8, 12],
    "max_denoising_steps": [1, 3, 40],
    "temperature": [1.0, 0.5, 3, 1e-4, 1e4],
    "top_p": [1.0, 0.9, 0.1, 1e-6, 1],
    "seed": [0, -1, 2**62],
    "do_sample": [True, False, None],
    "eos_token_id": [None, EOS, [EOS, 3], []],
    "pad_token_id": [None, 0, EOS],
    "return_dict_in_generate": [True, False],
}
BAD = {
    "max_new_tokens": [0, -1, 13, 10**9, 2.5, "4", True, [4]],
    "max_length": [0, -3, 1, 13, 10**9, 8.0, "8"],
    "max_denoising_steps": [0, -1, 2.0, "3", True],
    "temperature": [0, 0.0, -1.0, NAN, INF, "1", True],
    "top_p": [0, 0.0, -0.1, 1.01, NAN, INF, "1", True],
    "seed": [0.5, "0", [0], True],
    "do_sample": [1, 0, "yes"],
    "eos_token_id": [MASK, -1, 10**9, "2", [EOS, MASK], [-1], True],
    "pad_token_id": [MASK, -1, 10**9, 0.0, "0"],
    "return_dict_in_generate": ["yes", 2],
    "num_beams": [2],
    "temprature": [1.0],
}
ID_TYPES = [torch.long, torch.long, torch.long, torch.int32, torch.uint8, torch.float32]


@st.composite
def token_rows(draw, rows, widths, masks):
    width = draw(st.sampled_from(widths))
    most = MASK if masks else VOCAB_SIZE - 1
    return [[draw(st.integers(0, most)) for _ in range(width)] for _ in range(rows)]


@st.composite
def calls(draw, fills_in):
    """(prompt, mask or None, suffix or None, options, type of the ids, excluded ids, whether all of that is right)."""
    rows = draw(st.integers(1, 3))
    prompt = draw(token_rows(rows, [0, 1, 2, 3, 4], fills_in and draw(st.booleans())))
    suffix = draw(token_rows(rows, [0, 1, 2], draw(st.booleans()))) if fills_in and draw(st.booleans()) else None
    real = None
    if draw(st.booleans()):
        real = [[draw(st.integers(0, 2)) > 0 for _ in row] for row in prompt]
        for row in real:  # a row of only padding is refused, which has its own tests
            row[-1:] = [True] * len(row[-1:])
    chosen, right = draw(options(GOOD, BAD))
    excluded = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8, unique=True))
    if not draw(st.integers(0, 9)) and prompt[0]:
        prompt[0][-1], right = draw(st.sampled_from([MASK + 1, -1, -100, 2**40])), False
    return prompt, real, suffix, chosen, draw(st.sampled_from(ID_TYPES)), excluded, right


def as_ids(rows, id_type):
    held = torch.iinfo(id_type) if not id_type.is_floating_point else torch.finfo(id_type)
    return torch.tensor([[int(max(min(each, held.max), held.min)) for each in row] for row in rows]).to(id_type)


def acceptable(chosen, id_type, width, fills_in) -> bool:
    """Whether options that are right one by one are right together."""
    if id_type not in (torch.long, torch.int32):
        return False
    sampled = chosen.get("do_sample", True) is not False
    if not sampled and any(
        chosen.get(name, idle) not in (None, idle)
        for name, idle in (("temperature", 1.0), ("top_p", 1.0), ("seed", None))
    ):
        return False
    if not fills_in and "max_denoising_steps" in chosen:
        return False
    new = chosen.get("max_new_tokens")
    if new is None and "max_length" in chosen:
        return width < chosen["max_length"] <= LIMIT
    return width + (new or 1) <= LIMIT


def without(excluded):
    """A logits processor that leaves these ids out."""
    return lambda ids, scores: scores.index_fill(1, torch.tensor(excluded, dtype=torch.long), -torch.inf)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "digits in base 3, tied"])
def test_what_is_given_is_kept_and_what_is_new_is_allowed(kind):
    model = network(kind)
    fills_in = not kind.startswith("ARM")
    # Of a token that is partly visible, a processor may exclude every candidate: then it is not heard.
    whole = kind not in ("digits", "stages", "coarse first")

    @cases(12, 400)
    @given(calls(fills_in))
    def check(case):
        prompt, real, suffix, chosen, id_type, excluded, right = case
        ids = as_ids(prompt, id_type).reshape(len(prompt), -1)
        ends = None if suffix is None else as_ids(suffix, torch.long).reshape(len(suffix), -1)
        mask = None if real is None else torch.tensor(real).long().reshape(len(prompt), -1)
        given_ = {"suffix_ids": ends} if fills_in else {}
        call = {"logits_processor": [without(excluded)] if excluded else None, **given_, **chosen}
        torch.manual_seed(0)
        found = attempt(f"generate of {kind}", lambda: model.generate(ids, mask, **call))
        after = 0 if ends is None else ends.shape[1]
        width = ids.shape[1] + after
        if isinstance(found, Refusal):
            assert not (right and acceptable(chosen, id_type, width, fills_in)), found
            return
        assert right or not fills_in  # an ARM's other options are Transformers' own, which it takes as they come
        sequences = found if isinstance(found, torch.Tensor) else found.sequences
        before = ids.shape[1]
        new = sequences[:, before : sequences.shape[1] - after]
        if fills_in:
            expected = chosen.get("max_new_tokens")
            if expected is None:
                expected = chosen["max_length"] - width if "max_length" in chosen else LIMIT - width
            assert new.shape == (len(ids), expected)
        given_ids = ids.long() if ends is None else torch.cat([ids.long(), ends], dim=1)
        returned = torch.cat([sequences[:, :before], sequences[:, sequences.shape[1] - after :]], dim=1)
        padding = torch.zeros_like(given_ids, dtype=torch.bool)
        if mask is not None:
            padding[:, :before] = mask == 0
        kept = (given_ids != MASK) | padding
        assert torch.equal(returned[kept], given_ids[kept])
        filled = torch.cat([returned[~kept], new.flatten()])
        assert ((filled >= 0) & (filled < VOCAB_SIZE)).all()
        eos = chosen.get("eos_token_id")
        ends_at = [] if eos is None else eos if isinstance(eos, list) else [eos]
        pad = chosen.get("pad_token_id")
        pad = (ends_at or [0])[0] if pad is None else pad
        for row in new.tolist():
            first = next((i for i, each in enumerate(row) if each in ends_at), len(row))
            assert all(each == pad for each in row[first + 1 :])
            if whole:
                assert not set(row[: first + 1]) & set(excluded)
        if chosen.get("seed") is not None or chosen.get("do_sample") is False:
            again = model.generate(ids, mask, **call)
            assert torch.equal(sequences, again if isinstance(again, torch.Tensor) else again.sequences)

    check()
