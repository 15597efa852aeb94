"""What `model(input_ids, labels=...)` hides, scores and divides by. Its value and gradients: test_head.py."""

import pytest
import torch
from enumeration import count_form, nats_of_all_masks
from networks import small_model

from prime_v2.diffusion_prime_v2 import RevealOrder

# float32 networks of two layers; a loss is a mean of a few dozen nats.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def some_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_noise(batch: int, start: int = 0) -> dict:
    levels = (torch.arange(batch, dtype=torch.double) + 0.5) / batch
    return {"noise_keys": torch.arange(start, start + batch), "noise_levels": levels}


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
    marginals = table.digit_marginals(logits.exp())[expected]  # (7, S, base)
    digits = table.encode(ids)[expected].unsqueeze(-1)
    torch.testing.assert_close(loss, -marginals.gather(-1, digits).log().sum() / 7, **CLOSE)


def test_a_mask_in_the_prompt_stays_masked(model, seen):
    ids = some_ids(1, 4)
    labels, inputs = ids.clone(), ids.clone()
    labels[0, 0], inputs[0, 0] = -100, 11
    model(inputs, labels=labels, **some_noise(1))
    assert (seen[0][0, 0] == 2).all()


def test_inputs_that_are_masked_where_labels_are_scored_are_noised_from_the_labels(model):
    """As other masked language models are called."""
    ids = some_ids(2, 5)
    masked = torch.where(torch.arange(5) % 2 == 0, 11, ids)
    expected = model(ids, labels=ids, **some_noise(2)).loss
    torch.testing.assert_close(model(masked, labels=ids, **some_noise(2)).loss, expected, rtol=0, atol=0)


def test_a_row_with_nothing_to_score_takes_no_part(model):
    ids = some_ids(3, 5)
    labels = ids.clone()
    labels[1] = -100
    noise = some_noise(3)
    rest = {name: each[[0, 2]] for name, each in noise.items()}
    expected = model(ids[[0, 2]], labels=labels[[0, 2]], **rest).loss
    torch.testing.assert_close(model(ids, labels=labels, **noise).loss, expected, **CLOSE)


# What it is divided by


@pytest.mark.parametrize("fields", [{"objective": "joint"}, {"objective": "marginal", "noise_form": "time"}], ids=str)
def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(fields):
    """Rows of unequal numbers of scored tokens: the mean of the micro-batches' means would differ."""
    model, ids = small_model(**fields), some_ids(6, 7)
    labels, noise = ids.clone(), some_noise(6)
    labels[0, 1:] = labels[3, :5] = labels[5, 2:] = -100
    whole = model(ids, labels=labels, **noise).loss
    whole.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    count = (labels != -100).sum()
    total = 0.0
    for rows in torch.tensor([5, 0, 3, 2, 4, 1]).split(2):
        part = {name: each[rows] for name, each in noise.items()}
        loss = model(ids[rows], labels=labels[rows], num_items_in_batch=count, **part).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)  # as CLOSE
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_gradient(side):
    """The noise of a row does not depend on where its padding lies, given its key."""
    model, lengths = small_model(objective="marginal"), [4, 7, 2]
    noise = some_noise(3)
    rows = [some_ids(1, length, seed=length) for length in lengths]
    total = sum(
        model(
            row, labels=row, num_items_in_batch=sum(lengths), **{k: each[i : i + 1] for k, each in noise.items()}
        ).loss
        for i, row in enumerate(rows)
    )
    total.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(9 - lengths[i], 9) if side == "left" else slice(0, lengths[i])
        ids[i, part], mask[i, part] = row, 1
    loss = model(ids, mask, labels=ids, **noise).loss
    torch.testing.assert_close(loss, total, **CLOSE)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE)


# Noise drawn by the model


def test_noise_comes_from_torchs_generator(model):
    ids = some_ids(3, 7)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] == losses[1] != losses[2]


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


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.full((2, 3), -100)}, "no label to score: every one is -100 or padding"),
        ({"attention_mask": torch.zeros(2, 3)}, "no label to score: every one is -100 or padding"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "row 1 of attention_mask has only padding"),
        ({"labels": torch.tensor([[1, 2, 3], [4, 5, 11]])}, r"token ids span \[1, 11\], .* in \[0, 10\], labels are"),
        ({"labels": torch.tensor([[1, 2, 3], [4, 5, -1]])}, r"token ids span \[-1, 5\]"),
        (
            {"labels": torch.tensor([[2, 3, 4], [5, 6, 7]])},
            r"labels\[0, 0\]=2 differs from input_ids=1; .* not shifted",
        ),
        (
            {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 12]]), "labels": torch.tensor([[1, 2, 3], [4, 5, -100]])},
            "12",
        ),
        ({"labels": torch.tensor([[1, 2, 3]])}, r"labels has shape \(1, 3\), but input_ids \(2, 3\)"),
        ({"labels": torch.tensor([1, 2, 3])}, r"labels has shape \(3,\), but input_ids \(2, 3\)"),
        ({"attention_mask": torch.ones(2, 1)}, r"attention_mask has shape \(2, 1\), but input_ids \(2, 3\)"),
        ({"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}, r"input_ids has shape \(2,\); give \(B"),
        (
            {"input_ids": torch.zeros(0, 3, dtype=torch.long), "labels": torch.zeros(0, 3, dtype=torch.long)},
            r"input_ids has shape \(0, 3\); give \(B, L\) with at least one token",
        ),
        (
            {"input_ids": torch.zeros(1, 33, dtype=torch.long), "labels": torch.zeros(1, 33, dtype=torch.long)},
            "33 tokens, but max_position_embeddings=32",
        ),
        ({"input_ids": None, "subtoken_ids": torch.zeros(2, 3, 4, dtype=torch.long)}, "labels need input_ids"),
    ],
    ids=str,
)
def test_bad_input_is_refused(model, changes, message):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids, "labels": ids} | changes))
