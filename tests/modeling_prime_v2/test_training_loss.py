"""What `model(input_ids, labels=...)` hides, scores and divides by. Its value and gradients: test_chunked_loss.py."""

import pytest
import torch
from enumeration import count_form, nats_of_all_masks
from networks import small_model, some_ids, some_noise

from prime_v2.diffusion_prime_v2 import RevealOrder

# float32 networks of two layers; a loss is a mean of a few dozen nats.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def model():
    return small_model(objective="marginal")


@pytest.fixture
def seen(model, monkeypatch):
    """The states that the network was given, call by call."""
    states, forward = [], model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kwargs: states.append(args[0]) or forward(*args, **kwargs)
    )
    return states


# What is hidden


def test_tokens_with_label_minus_100_and_padding_are_shown_and_not_scored(model, seen):
    ids, mask = some_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    labels = ids.clone()
    labels[:, :2] = -100
    mask[1, 5] = 0
    noise = some_noise(2) | {"noise_levels": torch.full((2,), 0.999, dtype=torch.double)}
    loss = model(ids, mask, labels=labels, **noise).loss
    hidden = (seen[0] == 2).all(-1)
    expected = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(hidden, expected)
    assert torch.equal(seen[0][~expected], model.encode(ids)[~expected])
    # Nothing else is in the loss: hiding all n units has weight 1, and 7 tokens are scored.
    logits = model(subtoken_ids=seen[0], attention_mask=mask).logits.log_softmax(-1)
    table = model.code_table
    marginals = (logits.exp() @ table.one_hot())[expected].unflatten(-1, (table.num_subtokens, table.base))
    digits = table.encode(ids)[expected].unsqueeze(-1)
    torch.testing.assert_close(loss, -marginals.gather(-1, digits).log().sum() / 7, **CLOSE)


def test_a_mask_in_the_prompt_stays_masked(model, seen):
    ids = some_ids(1, 4)
    labels, inputs = ids.clone(), ids.clone()
    labels[0, 0], inputs[0, 0] = -100, 11
    model(inputs, labels=labels, **some_noise(1))
    assert (seen[0][0, 0] == 2).all()


# Noise drawn by the model


def test_levels_of_a_batch_are_stratified(model, seen):
    """Of 28 digits, 4 rows hide k in 1..7, 8..14, 15..21 and 22..28."""
    ids = some_ids(4, 7)
    for seed in range(20):
        torch.manual_seed(seed)
        model(ids, labels=ids)
        counts = (seen[-1] == 2).flatten(1).sum(1)
        assert ((counts - 1) // 7).sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("fields", [{}, {"noise_form": "time"}, {"reveal_order": "token"}], ids=str)
def test_the_mean_loss_over_noise_is_the_enumerated_bound(fields):
    """4 standard errors: a false alarm for one seed in 16,000, more with the heavy tail of 1/t; the seed is fixed."""
    model = small_model(vocab_size=4, objective="marginal", **fields)
    ids = torch.tensor([[1, 3]])
    order = RevealOrder.from_config(model.config)
    bound = float(count_form(*nats_of_all_masks(model, ids, order, "marginal"))) / 2
    torch.manual_seed(5)
    with torch.no_grad():
        losses = torch.tensor([model(ids.expand(60, -1), labels=ids.expand(60, -1)).loss.item() for _ in range(50)])
    # Stratified over 60 rows, so the 50 batches are the independent draws.
    assert abs(losses.mean() - bound) < 4 * losses.std() / 50**0.5
    assert losses.std() / 50**0.5 < 0.1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"objective": "joint"}, False),
        ({"objective": "marginal"}, True),
        ({"objective": "marginal", "loss_weight": "low_variance"}, False),
        ({"objective": "joint", "reveal_order": "token"}, True),
        ({"objective": "joint", "base": 11, "num_subtokens": 1}, True),
        ({"objective": "marginal", "whole_token_above": 0.5}, False),
        ({"objective": "marginal", "reveal_order": "nested", "stage_digits": [2, 4]}, True),
    ],
    ids=str,
)
def test_every_loss_says_whether_it_is_a_bound(fields, expected):
    ids = some_ids(2, 3)
    output = small_model(**fields)(ids, labels=ids)
    assert output.is_bound is expected
    assert output.loss.dtype == torch.float32
    assert output.logits is None
    assert small_model(**fields)(ids).is_bound is None


def test_whole_token_masks_above_a_level_are_hidden_by_the_model():
    model = small_model(whole_token_above=0.5)
    ids = some_ids(4, 7)
    states = []
    model.model.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(ids, labels=ids, **some_noise(4))
    hidden = (states[0] == 2).sum(-1)
    assert set(hidden[2:].flatten().tolist()) == {0, 4}
    assert not set(hidden[:2].flatten().tolist()) <= {0, 4}


def test_labels_are_of_token_ids(model):
    ids = some_ids(2, 3)
    with pytest.raises(ValueError, match="labels need input_ids"):
        model(subtoken_ids=model.encode(ids), labels=ids)


def test_nats_of_an_objective_that_there_is_not_are_refused():
    """Not taken for those of the joint distribution, a number that would look right."""
    with pytest.raises(ValueError, match="objective='subtoken' is not one of joint, marginal"):
        small_model().sequence_nll(None, None, None, None, "subtoken", None)
