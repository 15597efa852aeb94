"""`PrimeV2ForInterpolatingDiffusion(input_ids, labels=...)`: value, gradients, what is scored; saving and refusals."""

import itertools

import pytest
import torch
from enumeration import query_log_probabilities
from networks import small_interpolating, some_ids, some_noise

from prime_v2.diffusion_interpolating_prime_v2 import NEVER_SEEN, ScoredTexts, draw_terms, sequential_share

# float32 networks of two layers; a loss is a mean of a few dozen nats.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def model():
    return small_interpolating()


@pytest.fixture
def seen(model, monkeypatch):
    """The arguments that the network was given, call by call."""
    calls, forward = [], model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kwargs: calls.append((args, kwargs)) or forward(*args, **kwargs)
    )
    return calls


# Value and gradients


def naive_loss(model, texts: ScoredTexts, noise: dict) -> torch.Tensor:
    """The loss by plain causal attention over the sorted order, one query at a time."""
    config, total = model.config, torch.zeros(())
    share = sequential_share(config.alpha_0, config.ar_share)
    terms = draw_terms(texts, noise["noise_keys"], noise["noise_levels"], config.alpha_0, share, config.loss_weight)
    for term in terms:
        for row in range(len(term.texts)):
            ids, places, order_ids, visible, targets = (each[row].tolist() for each in vars(term.inputs).values())
            order = sorted((rank, place, id) for rank, place, id in zip(order_ids, places, ids, strict=True))
            for place, sees_up_to, target in zip(places, visible, targets, strict=True):
                if target >= 0:
                    known = [(where, id) for rank, where, id in order if rank <= sees_up_to and rank != NEVER_SEEN]
                    total = total - term.weights[row] * query_log_probabilities(model, known, place)[target]
    return total / texts.scored.sum()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alpha_0": 0.0},
        {"alpha_0": 1.0},
        {"loss_weight": "low_variance", "ar_share": 0.7},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_a_plain_loop(fields):
    model, ids, noise = small_interpolating(**fields).double(), some_ids(4, 5), some_noise(4)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 1:3], mask[2, 3:], mask[3, :2] = -100, 0, 0
    loss = model(ids, mask, labels=labels, **noise).loss
    real = mask.bool()
    scored = real & (labels != -100)
    texts = ScoredTexts(ids, real & ~scored, scored, torch.arange(5).expand_as(ids), 11)
    expected = naive_loss(model, texts, noise)
    close = {"rtol": 1e-5, "atol": 1e-5}  # norms and rotary angles are float32
    torch.testing.assert_close(loss, expected, **close)
    gradients = [torch.autograd.grad(each, model.parameters()) for each in (loss, expected)]
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9, name


# What is hidden and scored


def test_a_batch_is_split_between_the_terms(model, seen):
    """Of eight rows at alpha_0 = 0.5 four are left-to-right: a network call for each term."""
    ids = some_ids(8, 7)
    output = model(ids, labels=ids, **some_noise(8))
    assert [len(kwargs["visible_until"]) for _, kwargs in seen] == [4, 4]
    assert seen[0][1]["visible_until"].shape[1] > 7 and seen[1][1]["visible_until"].shape[1] == 7
    assert output.is_bound is True and output.logits is None and output.loss.dtype == torch.float32


def test_every_process_makes_the_same_calls_whatever_its_levels_are(model, seen):
    """Where weights are sharded, a call gathers them from all processes. Gradients flow through both calls."""
    ids = some_ids(2, 5)
    for level in (0.1, 0.9):
        seen.clear()
        noise = some_noise(2) | {"noise_levels": torch.tensor([level, level], dtype=torch.double)}
        model(ids, labels=ids, **noise).loss.backward()
        assert len(seen) == 2
        assert sorted(kwargs["visible_until"].shape[0] for _, kwargs in seen) == [1, 2]
    for alpha_0 in (0.0, 1.0):
        small_interpolating(alpha_0=alpha_0)(ids, labels=ids)


def test_tokens_with_label_minus_100_and_padding_are_shown_and_not_scored(model, seen):
    ids, mask = some_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    labels = ids.clone()
    labels[:, :2] = -100
    mask[1, 5] = 0
    noise = some_noise(2) | {"noise_levels": torch.full((2,), 0.999, dtype=torch.double)}
    model(ids, mask, labels=labels, **noise)
    args, kwargs = next(call for call in seen if call[1]["visible_until"].shape[0] == 2)
    hidden = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)  # padding as a mask, never seen
    assert torch.equal(args[0], torch.where(hidden, 11, ids))
    assert kwargs["order_ids"].tolist() == [[0, 1] + [NEVER_SEEN] * 4] * 2


def test_a_mask_in_the_prompt_is_no_token(model):
    """It is neither asked for nor seen: the loss is that of the row without it, its place left empty."""
    ids, labels = some_ids(1, 5), some_ids(1, 5)
    ids[0, 1], labels[0, 1] = 11, -100
    kept = [0, 2, 3, 4]
    expected = model(ids[:, kept], position_ids=torch.tensor([kept]), labels=labels[:, kept], **some_noise(1)).loss
    torch.testing.assert_close(model(ids, labels=labels, **some_noise(1)).loss, expected, **CLOSE)


# Noise drawn by the model


def test_levels_of_a_batch_are_stratified(model, seen):
    """Of four rows at alpha_0 = 0.5 two are left-to-right, whatever the seed."""
    ids = some_ids(4, 7)
    for seed in range(20):
        torch.manual_seed(seed)
        seen.clear()
        model(ids, labels=ids)
        assert [len(kwargs["visible_until"]) for _, kwargs in seen] == [2, 2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, True), ({"loss_weight": "low_variance"}, False), ({"loss_weight": "low_variance", "alpha_0": 0}, True)],
    ids=str,
)
def test_every_loss_says_whether_it_is_a_bound(fields, expected):
    model, ids = small_interpolating(**fields), some_ids(2, 3)
    assert model(ids, labels=ids).is_bound is expected is model.loss_is_bound
    assert model(ids).is_bound is None
    assert (model.bound_method, model.likelihood_methods) == ("interpolating", ("interpolating", "chain"))


# Loading


def test_attention_that_cannot_take_the_mask_is_refused():
    for implementation in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError), match="(?i)flash|flex"):
            small_interpolating(attn_implementation=implementation)


# Refusals


def test_levels_decide_the_term_and_keys_the_draw(model):
    """Other keys, other losses; equal keys and levels, the same: a pure function of both."""
    ids, found = some_ids(1, 7), {}
    for key, level in itertools.product((1, 2), (0.1, 0.3, 0.6, 0.7)):
        noise = {"noise_keys": torch.tensor([key]), "noise_levels": torch.tensor([level], dtype=torch.double)}
        found[key, level] = model(ids, labels=ids, **noise).loss.item()
        assert found[key, level] == model(ids, labels=ids, **noise).loss.item()
    assert len(set(found.values())) == 8
