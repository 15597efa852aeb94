"""What the autoregressive model's `model(input_ids, labels=...)` feeds, scores and divides by."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import START, after_start, padded, small_arm, some_ids
from torch import nn

from prime_v2 import chunked_loss_prime_v2 as chunked_loss_prime_v2
from prime_v2.likelihood_arm_prime_v2 import next_tokens

# float32 networks of two layers; a loss is a mean of a few dozen nats.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def naive_loss(model, rows: list[list[int]], scored: list[list[bool]]) -> torch.Tensor:
    """Mean of -log p of the scored tokens, one prefix at a time; a given start token in front gets no second one."""
    nats = []
    for row, asked in zip(rows, scored, strict=True):
        text = row if row[0] == START and not asked[0] else [START, *row]
        for i in range(1, len(text)):
            if asked[i - len(text)]:
                nats.append(-model(torch.tensor([text[:i]])).logits[0, -1].log_softmax(-1)[text[i]])
    return torch.stack(nats).mean()


@pytest.fixture
def model():
    return small_arm()


# What is fed and scored


def test_every_label_is_scored_the_first_one_included(model):
    ids = some_ids()
    everywhere = [[True] * 7] * 3
    torch.testing.assert_close(model(ids, labels=ids).loss, naive_loss(model, ids.tolist(), everywhere), **CLOSE)
    first = torch.where(torch.arange(7) == 0, ids, -100)
    reference = nn.functional.cross_entropy(model(torch.full((3, 1), START)).logits[:, 0], ids[:, 0])
    torch.testing.assert_close(model(ids, labels=first).loss, reference, **CLOSE)


def test_tokens_with_label_minus_100_are_seen_and_not_scored(model):
    ids = some_ids()
    scored = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = naive_loss(model, ids.tolist(), scored.tolist())
    torch.testing.assert_close(model(ids, labels=ids.where(scored, -100)).loss, expected, **CLOSE)


def test_a_prompt_that_begins_with_the_start_token_gets_no_second_one(model):
    ids = some_ids()
    ids[:, 0] = START
    labels = ids.clone()
    labels[:, :2] = -100
    expected = naive_loss(model, ids[:, 1:].tolist(), (labels[:, 1:] >= 0).tolist())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, **CLOSE)
    labels[0, 0] = START  # scored, so it follows a start token like any other first token
    rows, scored = ids.tolist(), (labels >= 0).tolist()
    torch.testing.assert_close(model(ids, labels=labels).loss, naive_loss(model, rows, scored), **CLOSE)


@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=4))
def test_the_network_is_fed_the_tokens_before_each_scored_one(texts):
    """Against plain lists: what stands in a row up to the place where a token is predicted."""
    rows = [torch.tensor([token for token, _ in text]) for text in texts]
    width = max(map(len, rows))
    ids, _ = padded(rows, "right", width)
    scored, _ = padded([torch.tensor([int(asked) for _, asked in text]) for text in texts], "right", width)
    found = next_tokens(ids, scored.bool(), START)
    assert found.inputs.shape == ids.shape
    expected = []
    for text in texts:
        whole = [token for token, _ in text]
        if not (whole[0] == START and not text[0][1]):
            whole = [START, *whole]
        offset = len(whole) - len(text)
        expected += [(whole[: i + offset], token) for i, (token, asked) in enumerate(text) if asked]
    places = zip(found.rows.tolist(), found.columns.tolist(), found.ids.tolist(), strict=True)
    assert [(found.inputs[row, : column + 1].tolist(), token) for row, column, token in places] == expected


def test_the_loss_is_a_bound_and_comes_without_logits(model):
    ids = some_ids()
    output = model(ids, labels=ids)
    assert output.is_bound is True and model.loss_is_bound is True
    assert output.logits is None and output.past_key_values is None
    assert output.loss.dtype == torch.float32
    assert model(ids).is_bound is None
    assert (model.bound_method, model.likelihood_methods) == ("causal", ("causal",))


# What it is divided by


def test_given_positions_go_with_their_tokens(model):
    """Rotary attention sees only differences of positions; twice the distance is another network."""
    rows = [some_ids(1, length, seed=length)[0] for length in (5, 3)]
    ids, mask = padded(rows, "left", 6)
    plain = model(ids, mask, labels=ids).loss
    torch.testing.assert_close(
        model(ids, mask, position_ids=torch.arange(6)[None] + 9, labels=ids).loss, plain, rtol=1e-4, atol=1e-4
    )  # float32 angles of up to 15 radians
    doubled = model(ids, mask, position_ids=2 * torch.arange(6)[None], labels=ids).loss
    naive = [
        nn.functional.cross_entropy(
            model(after_start(row[None])[:, :-1], position_ids=2 * torch.arange(len(row))[None]).logits[0],
            row,
            reduction="sum",
        )
        for row in rows
    ]
    torch.testing.assert_close(doubled, sum(naive) / 8, **CLOSE)
    assert abs(doubled - plain) > 1e-2


def test_positions_without_a_mask_cut_packed_texts(model):
    """The second text follows the last token of the first one, its EOS, as its start token."""
    first, second = some_ids(1, 4)[0], some_ids(1, 3, seed=1)[0]
    first[-1] = START
    ids, positions = torch.cat([first, second])[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    parts = [model(each[None], labels=each[None], num_items_in_batch=7).loss for each in (first, second)]
    torch.testing.assert_close(model(ids, position_ids=positions, labels=ids).loss, sum(parts), **CLOSE)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_ids": torch.tensor([[1, 11, 3], [4, 5, 6]]), "labels": torch.tensor([[1, -100, 3], [4, 5, 6]])},
            r"token ids span .* 11\], .* has no mask token",
        ),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 16)}, "labels need input_ids, whole texts"),
        ({"inputs_embeds": torch.zeros(2, 3, 16)}, "labels need input_ids, whole texts"),
    ],
    ids=str,
)
def test_bad_input_is_refused(model, changes, message):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids, "labels": ids} | changes))


def test_labels_with_a_cache_are_refused(model):
    ids = some_ids()
    with pytest.raises(ValueError, match="without inputs_embeds or cache"):
        model(ids, labels=ids, past_key_values=model(ids).past_key_values)
