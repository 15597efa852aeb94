"""`log_likelihood` and `greedy_matches` of autoregressive models: exact values."""

import math

import pytest
import torch
from enumeration import all_sequences, causal_law
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import START, SUBTOKENS, padded, small_arm, some_ids

from prime_v2.eval.causal import CausalScorer

# float32 network: batches of other shapes round differently, 1e-6 a logit.
NETWORK = {"rtol": 1e-5, "atol": 1e-5}
FORMS = [{}, {"tie_word_embeddings": True}, SUBTOKENS, {"tie_word_embeddings": True, **SUBTOKENS}]


@pytest.fixture(scope="module")
def model():
    return small_arm(seed=2)


@pytest.fixture(scope="module")
def rows():
    """Sequences of different lengths."""
    return [some_ids(1, length, seed=length + 20)[0] for length in (3, 9, 1, 6, 9, 2)]


# Values


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_values_are_those_of_the_scorer_of_foreign_causal_models(fields, rows):
    model = small_arm(**fields)
    scorer = CausalScorer(model)
    assert scorer.start_token_id == START
    for side in ("left", "right"):
        ids, mask = padded(rows, side, 11)
        prompt = torch.zeros_like(mask)
        prompt[:, ::3] = 1
        # A prompt that begins with a start token gets no second one here, see the test below.
        prompt[mask.argmax(1, keepdim=True) == torch.arange(11)] = 0
        for options in ({}, {"prompt_mask": prompt}):
            ours, theirs = (each.log_likelihood(ids, mask, **options) for each in (model, scorer))
            torch.testing.assert_close(ours.value, theirs.value, **NETWORK)
            for name in ("stderr", "num_forward", "num_scored", "is_bound"):
                assert torch.equal(torch.as_tensor(getattr(ours, name)), torch.as_tensor(getattr(theirs, name))), name
            assert ours.value.dtype == torch.float64
            assert ours.degrees.tolist() == [math.inf] * len(rows)


@pytest.mark.parametrize("fields", [{}, {"num_subtokens": 3, "base": 2}], ids=str)
def test_it_is_a_law_on_sequences_the_product_of_next_token_probabilities(fields):
    model = small_arm(vocab_size=5, **fields)
    values = model.log_likelihood(all_sequences(5, 3)).value
    assert values.exp().sum().item() == pytest.approx(1, abs=1e-4)  # 125 float32 products of three softmaxes
    torch.testing.assert_close(values.exp(), torch.tensor(list(causal_law(model, 3).values())).double(), **NETWORK)


def test_the_loss_is_the_mean_of_minus_the_log_likelihoods(model, rows):
    ids, mask = padded(rows, "left", 11)
    result = model.log_likelihood(ids, mask)
    loss = model(ids, mask, labels=ids).loss.item()
    assert loss == pytest.approx(float(-result.value.sum() / result.num_scored.sum()), rel=1e-5)  # as NETWORK


def test_a_prompt_is_given_and_the_parts_make_the_whole(model):
    ids = some_ids(4, 10)
    prompt = (torch.arange(10) < 6).expand(4, -1)
    given = model.log_likelihood(ids, prompt_mask=prompt)
    parts = model.log_likelihood(ids[:, :6]).value + given.value
    torch.testing.assert_close(parts, model.log_likelihood(ids).value, **NETWORK)
    assert given.num_scored.tolist() == [4] * 4


def test_a_prompt_that_begins_with_the_start_token_gets_no_second_one(model):
    """As `generate` continues it; scored, it follows a start token like any other token."""
    ids = torch.tensor([[START, 4, 5, 6], [4, 4, 5, 6], [START, START, 5, 6]])
    prompt = torch.tensor([[1, 1, 0, 0]] * 3)
    found = model.log_likelihood(ids, prompt_mask=prompt).value
    for row, fed in enumerate(([START, 4, 5, 6], [START, 4, 4, 5, 6], [START, START, 5, 6])):
        log_p = model(torch.tensor([fed])).logits[0].log_softmax(-1)
        expected = log_p[-3, 5] + log_p[-2, 6]
        assert found[row].item() == pytest.approx(expected.item(), abs=1e-5)  # as NETWORK
    scored = model.log_likelihood(ids).value
    expected = [
        model(torch.tensor([[START, *row[:-1]]])).logits[0].log_softmax(-1)[torch.arange(4), row].sum().item()
        for row in ids
    ]
    assert scored.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_start_token_is_needed():
    model, ids = small_arm(bos_token_id=None), some_ids()
    for call in (model.log_likelihood, lambda ids: model.greedy_matches(ids, None, torch.ones_like(ids))):
        with pytest.raises(ValueError, match="bos_token_id=None and eos_token_id=None: neither"):
            call(ids)


# The deterministic decode


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 4), st.integers(0, 4)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["left", "right", "inside"]),
    st.sampled_from([1, 12, 999]),
)
def test_it_says_whether_generate_gives_the_targets(decode_model, texts, side, tokens_per_pass):
    """A prompt (begun by the start token or not, or none), as many tokens as asked, one of them changed or none."""
    rows, targets, expected = [], [], []
    for prompt, count, changed in texts:
        if not prompt and not count:
            count = 1
        ids = torch.tensor([prompt], dtype=torch.long)
        new = (
            decode_model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :]
            if count
            else ids[0, :0]
        )
        if changed < count:
            new[changed] = (new[changed] + 1) % 5
        rows.append(torch.cat([ids[0], new]))
        targets.append(torch.arange(len(rows[-1])) >= len(prompt))
        expected.append(not changed < count)
    width = max(map(len, rows)) + 1
    ids, mask = padded(rows, side, width)
    asked, _ = padded([each.long() for each in targets], side, width)
    found = decode_model.greedy_matches(ids, mask, asked.bool(), tokens_per_pass=tokens_per_pass)
    assert found.matches.tolist() == expected
    assert found.num_forward.tolist() == [int(each.any()) for each in targets]


@pytest.fixture(scope="module")
def decode_model():
    return small_arm(seed=3, vocab_size=5)


def test_of_equal_probabilities_the_lowest_id_is_decoded():
    model = small_arm()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = model.generate(some_ids(), max_new_tokens=5, do_sample=False)
    assert (out[:, 7:] == 0).all()
    targets = (torch.arange(12) >= 7).expand(3, -1)
    assert model.greedy_matches(out, None, targets).matches.all()
    assert not model.greedy_matches(out.where(~targets, 1), None, targets).matches.any()


def test_targets_that_are_followed_by_given_tokens_are_refused(model):
    ids, targets = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 1], [0, 1, 0]])
    with pytest.raises(ValueError, match="row 1 has targets followed by given tokens, .* left"):
        model.greedy_matches(ids, None, targets)


def test_targets_before_padding_are_the_last_tokens(model):
    ids, mask = padded([torch.tensor([1, 2, 4]), torch.tensor([1, 2])], "right", 4)
    targets = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]])
    assert model.greedy_matches(ids, mask, targets).num_forward.tolist() == [1, 1]
