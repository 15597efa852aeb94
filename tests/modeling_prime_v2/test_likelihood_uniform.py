"""`log_likelihood` of uniform-state diffusion against its enumerated value; what it does not depend on; refusals."""

import pytest
import torch
from enumeration import all_sequences, correlated_law, entropy, exact_bound, optimal_uniform
from networks import small_uniform

from prime_v2.eval.intervals import half_width
from prime_v2.likelihood_prime_v2 import paired_difference, stratified_degrees, stratified_stderr
from prime_v2.likelihood_uniform_prime_v2 import sampled_rows

# float32 network: rows of different length and batches of different shape round differently, 1e-6 a logit, times the
# weights of up to n + 1.
NETWORK = {"rtol": 1e-5, "atol": 2e-5}


def padded(rows: list[torch.Tensor], side: str, length: int, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention_mask) of rows (L_i,) padded to `length` on one side."""
    ids, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, part], mask[i, part] = row, 1
    return ids, mask


@pytest.fixture(scope="module")
def model():
    return small_uniform(seed=2, vocab_size=4)


@pytest.fixture(scope="module")
def ids():
    return all_sequences(4, 2)[[3, 7, 11, 14]]


@pytest.fixture(scope="module")
def exact(ids):
    return -exact_bound(small_uniform(seed=2, vocab_size=4).double(), ids)


# Values


def test_monte_carlo_agrees_with_the_enumerated_bound(model, ids, exact):
    """4 standard errors, 4 comparisons: a false alarm for one choice of the seed in 4,000; the seed is fixed."""
    result = model.log_likelihood(ids, num_samples=4000)
    assert ((result.value - exact).abs() < 4 * result.stderr).all()
    assert (result.stderr < 0.06).all(), "of some 5 nats"
    assert result.is_bound is True
    assert result.num_forward.tolist() == [4000] * 4
    assert result.num_scored.tolist() == [2] * 4


def test_the_bound_of_the_optimal_denoiser_is_estimated_without_bias():
    """The mean over texts and draws is minus the entropy; 4 standard errors."""
    law, ids = correlated_law(3, 2), all_sequences(3, 2)
    result = optimal_uniform(law, 3, 2).log_likelihood(ids, num_samples=4000)
    error = float((law * result.stderr).square().sum().sqrt())
    assert abs(float((law * result.value).sum()) + entropy(law)) < 4 * error
    assert error < 0.02


CASES = [(4, 2, [3, 7, 11, 1, 0, 9, 13, 15, 5, 6], 128), (3, 4, [3, 77, 11, 24, 40, 9, 61, 31, 52, 20], 64)]


@pytest.mark.parametrize(("vocab_size", "length", "rows", "num_samples"), CASES, ids=str)
def test_intervals_hold_the_exact_value_as_often_as_they_say(vocab_size, length, rows, num_samples):
    """2,000 intervals of 95%, whose coverage varies by 0.5%; as tests/eval/test_coverage.py."""
    model, ids = small_uniform(seed=2, vocab_size=vocab_size), all_sequences(vocab_size, length)[rows]
    truth = -exact_bound(small_uniform(seed=2, vocab_size=vocab_size).double(), ids, num_points=100).repeat(200)
    found = model.log_likelihood(ids.repeat(200, 1), num_samples=num_samples, keys=torch.arange(2000))
    half = torch.as_tensor(half_width(found.stderr.numpy(), found.degrees.numpy()))
    low, high = found.value - half, found.value + half
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.93 <= covered <= 0.97
    # Stratified, so that 2,000 means of a few dozen draws each are near normal: 4 standard errors.
    error = found.value - truth
    assert abs(float(error.mean())) < 4 * float(error.std()) / 2000**0.5


def test_the_prompt_is_given_clean_and_not_scored(model):
    """With a prompt in the middle, against noise on the scored tokens alone."""
    ids, prompt = torch.tensor([[3, 1, 2]]), torch.tensor([[0, 1, 0]])
    exact = -exact_bound(small_uniform(seed=2, vocab_size=4).double(), ids, scored=~prompt[0].bool())
    result = model.log_likelihood(ids, prompt_mask=prompt, num_samples=4000)
    assert abs(float(result.value - exact)) < 4 * float(result.stderr)  # false alarm 6e-5, for a fresh seed
    assert result.num_scored.item() == 2


def test_two_lots_of_draws_together_estimate_the_same_value(model, ids, exact):
    keys, options = torch.arange(4), {"return_samples": True, "num_samples": 1000}
    first = model.log_likelihood(ids, keys=keys, **options)
    second = model.log_likelihood(ids, keys=keys, round_number=1, **options)
    for row in range(4):
        assert not torch.equal(first.samples[row], second.samples[row])
        mean = torch.cat([first.samples[row], second.samples[row]]).mean()
        assert abs(mean - exact[row]) < 4 * first.stderr[row]


def test_lots_of_draws_have_noise_of_their_own():
    """Of two lots of 4 draws of one token, 4 draws replace it: by 4 of a million tokens, no two of them equal."""
    ids, scored = torch.tensor([7]), torch.tensor([True])
    for seed in range(20):
        lots = [next(sampled_rows(ids, scored, 0, 10**6, 4, torch.tensor(seed), lot)) for lot in (0, 1)]
        replaced = set(torch.cat([lot.noise.ids for lot in lots]).flatten().tolist()) - {7}
        assert len(replaced) == 4


def test_value_error_and_degrees_are_those_of_the_draws(model, ids):
    result = model.log_likelihood(ids, num_samples=9, return_samples=True)
    for row, draws in enumerate(result.samples):
        assert draws.dtype == torch.double and len(draws) == 9
        assert float(draws.mean()) == float(result.value[row])
        assert float(stratified_stderr(draws)) == float(result.stderr[row])
        assert stratified_degrees(draws) == float(result.degrees[row])
    assert model.log_likelihood(ids, num_samples=9).samples is None
    assert model.log_likelihood(ids, num_samples=1).stderr.isnan().all()


def test_equal_keys_share_their_noise():
    """Two texts that differ in one token only: their draws move together, the difference is surer."""
    model, ids = small_uniform(vocab_size=4, scale=0.2), torch.tensor([[3, 1, 0, 2, 3, 1], [3, 1, 0, 2, 3, 2]])
    paired = apart = 0.0
    for key in range(6):
        common = model.log_likelihood(ids, num_samples=128, keys=torch.tensor([key, key]), return_samples=True)
        difference, stderr = paired_difference(*common.samples)
        assert difference == pytest.approx(float(common.value[0] - common.value[1]), abs=1e-9)
        paired, apart = paired + stderr**2, apart + float(common.stderr.square().sum())
    assert (paired / apart) ** 0.5 < 0.8


def test_exhaustive_changes_nothing(model, ids):
    values = [model.log_likelihood(ids, num_samples=5, exhaustive=each).value for each in (True, False)]
    assert torch.equal(*values)


# What it does not depend on


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, (length,), generator=generator) for length in (3, 5, 2, 7, 4, 1)]


def test_padding_batch_and_order_change_no_value(model, rows):
    alone = [model.log_likelihood(row[None], num_samples=8) for row in rows]
    value = torch.cat([each.value for each in alone])
    stderr = torch.cat([each.stderr for each in alone])
    for side in ("left", "right"):
        batch, mask = padded(rows, side, 9, fill=3)
        result = model.log_likelihood(batch, mask, num_samples=8)
        torch.testing.assert_close(result.value, value, **NETWORK)
        torch.testing.assert_close(result.stderr, stderr, **NETWORK)
        assert result.num_scored.tolist() == [len(row) for row in rows]
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled = model.log_likelihood(batch[order], mask[order], num_samples=8)
    torch.testing.assert_close(shuffled.value, value[order], **NETWORK)


@pytest.mark.parametrize("tokens_per_pass", [1, 7, 20, 64])
def test_the_size_of_a_forward_pass_changes_no_value(model, rows, tokens_per_pass, monkeypatch):
    batch, mask = padded(rows, "right", 8)
    whole = model.log_likelihood(batch, mask, num_samples=5)
    sizes, forward = [], model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda noised, *rest: sizes.append(noised.numel()) or forward(noised, *rest)
    )
    pieces = model.log_likelihood(batch, mask, num_samples=5, tokens_per_pass=tokens_per_pass)
    torch.testing.assert_close(pieces.value, whole.value, **NETWORK)
    torch.testing.assert_close(pieces.stderr, whole.stderr, **NETWORK)
    assert max(sizes) <= max(tokens_per_pass, 7), "one row at least, of 7 tokens"


def test_a_seed_gives_its_draws_and_another_others(model, ids):
    first, again, other = (model.log_likelihood(ids, num_samples=4, seed=seed).value for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first != other).all()


def test_the_model_is_left_as_it_was_and_dropout_is_off(ids):
    model = small_uniform(vocab_size=4, attention_dropout=0.5)
    expected = model.log_likelihood(ids, num_samples=4).value
    model.train()
    assert torch.equal(model.log_likelihood(ids, num_samples=4).value, expected)
    assert model.training


def test_the_model_names_its_method(model, ids):
    assert model.likelihood_methods == ("uniform",) and model.bound_method == "uniform"
    first, second = (model.log_likelihood(ids, num_samples=4, **each).value for each in ({}, {"method": "uniform"}))
    assert torch.equal(first, second)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "subtoken"}, "method='subtoken' is not one of uniform"),
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1; use 1"),
        ({"num_samples": 3, "round_number": 2}, "round_number=2 with num_samples=3: it takes a multiple of 2 draws"),
        ({"input_ids": torch.tensor([[1, 4]])}, r"token ids span \[1, 4\], but a likelihood .* ids in \[0, 3\]"),
        ({"input_ids": torch.tensor([[-1, 2]])}, r"token ids span \[-1, 2\]"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\); give \(B, L\)"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"input_ids has shape \(0, 4\); give \(B, L\)"),
        (
            {"input_ids": torch.zeros(1, 33, dtype=torch.long)},
            "33 tokens, but max_position_embeddings=32; cut it to 32",
        ),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\), but input_ids \(2, 2\)"),
        ({"prompt_mask": torch.ones(2, 1)}, r"prompt_mask has shape \(2, 1\), but input_ids \(2, 2\)"),
        ({"attention_mask": torch.tensor([[1, 1], [0, 0]])}, "row 1 has no token to score .* drop that row"),
        ({"prompt_mask": torch.tensor([[1, 1], [0, 0]])}, "row 0 has no token to score .* drop that row"),
        ({"input_ids": torch.tensor([[0.5, 1.0]])}, "token ids must be integers, not torch.float32"),
    ],
    ids=str,
)
def test_bad_input_is_refused(model, arguments, message):
    arguments = {"input_ids": torch.tensor([[1, 2], [3, 0]]), **arguments}
    with pytest.raises(ValueError, match=message):
        model.log_likelihood(**arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_that_is_not_finite_gives_an_error_and_no_number(ids, value):
    model = small_uniform(vocab_size=4)
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(ValueError, match="log-likelihood of row 0 is .*: the network's logits are not finite"):
        model.log_likelihood(ids, num_samples=4)
