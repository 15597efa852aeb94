"""`log_likelihood` of interpolating diffusion: draws against enumeration, and errors."""

import pytest
import torch
from enumeration import all_sequences, naive_log_likelihood
from networks import small_interpolating

from prime_v2.eval.intervals import half_width
from prime_v2.likelihood_interpolating_prime_v2 import num_states
from prime_v2.likelihood_output_prime_v2 import paired_difference

# float32 network: rows of different length and batches of different shape round differently, 1e-6 a logit, times n/k.
NETWORK = {"rtol": 1e-5, "atol": 1e-5}
ALL = 10_000  # draws that no test case has as many rows as


@pytest.fixture(scope="module")
def model():
    return small_interpolating(seed=2, vocab_size=5)


@pytest.fixture(scope="module")
def ids():
    return all_sequences(5, 3)[[3, 27, 71, 124]]


# Draws


@pytest.mark.parametrize("alpha_0", [0.05, 0.3, 0.7, 1.0])
def test_draws_agree_with_the_enumerated_expectation(ids, alpha_0):
    """4 standard errors, 16 comparisons: a false alarm for one choice of the seed in 1,000; the seed is fixed."""
    model = small_interpolating(seed=2, vocab_size=5, alpha_0=alpha_0)
    exact = model.log_likelihood(ids, num_samples=ALL)
    assert exact.stderr.tolist() == [0] * 4 and exact.degrees.isinf().all()
    assert exact.num_forward.tolist() == [num_states(3, alpha_0)] * 4
    result = model.log_likelihood(ids, num_samples=2000, exhaustive=False)
    assert ((result.value - exact.value).abs() < 4 * result.stderr).all()
    assert (result.stderr > 0).all() and (result.stderr < 0.1).all(), "of some 5 nats"
    assert (result.num_forward.tolist(), result.num_scored.tolist(), result.is_bound) == ([2000] * 4, [3] * 4, True)


def test_single_draws_estimate_the_bound_without_a_stated_error(model, ids):
    exact = model.log_likelihood(ids[:1], num_samples=ALL).value
    keys = torch.arange(1500)
    result = model.log_likelihood(ids[:1].expand(1500, -1), num_samples=1, keys=keys, exhaustive=False)
    assert result.stderr.isnan().all()
    assert abs(float(result.value.mean() - exact)) < 4 * float(result.value.std()) / 1500**0.5  # false alarm 6e-5


def test_intervals_hold_the_exact_value_as_often_as_they_say(model):
    """Of 1,000 intervals of ten texts of four tokens; their coverage varies by 0.7%."""
    ids = all_sequences(5, 4)[[3, 77, 111, 240, 400, 98, 613, 318, 521, 206]]
    exact = model.log_likelihood(ids, num_samples=ALL)
    assert exact.stderr.tolist() == [0] * 10
    found = model.log_likelihood(ids.repeat(100, 1), num_samples=64, keys=torch.arange(1000), exhaustive=False)
    half = torch.as_tensor(half_width(found.stderr.numpy(), found.degrees.numpy()))
    low, high = found.value - half, found.value + half
    truth = exact.value.repeat(100)
    assert 0.93 <= float(((low <= truth) & (truth <= high)).double().mean()) <= 0.97


def test_two_lots_together_estimate_the_same_value(model, ids):
    exact = model.log_likelihood(ids, num_samples=ALL).value
    keys, options = torch.arange(4), {"exhaustive": False, "return_samples": True}
    first = model.log_likelihood(ids, num_samples=1000, keys=keys, **options)
    second = model.log_likelihood(ids, num_samples=1000, keys=keys, round_number=1, **options)
    assert not torch.equal(first.samples[0], second.samples[0])
    for row in range(4):
        mean = torch.cat([first.samples[row], second.samples[row]]).mean()
        assert abs(mean - exact[row]) < 4 * first.stderr[row]  # false alarm under 3e-4 in all


def test_further_lots_of_few_tokens_are_all_states(model, ids):
    """As many rows as both rounds draw together are enough for all 20 states."""
    first = model.log_likelihood(ids, num_samples=10)
    assert (first.stderr > 0).all()
    second = model.log_likelihood(ids, num_samples=10, round_number=1, return_samples=True)
    assert second.stderr.tolist() == [0] * 4 and [len(each) for each in second.samples] == [1] * 4
    torch.testing.assert_close(second.value, model.log_likelihood(ids, num_samples=ALL).value, **NETWORK)


def test_draws_are_spread_over_both_terms_and_over_their_counts(model, monkeypatch):
    """At alpha_0 = 0.5 half of the draws are left-to-right rows, the others diffusion rows, both with more and more
    masked tokens."""
    asked = []
    score = model.sequence_nll

    def record(parts, weights):
        (inputs,) = parts
        long = (inputs.order_ids != 2**31).sum(1) == 6  # all tokens are shown
        asked.extend(zip(long.tolist(), (inputs.target_ids >= 0).sum(1).tolist(), strict=True))
        return score(parts, weights)

    monkeypatch.setattr(model, "sequence_nll", record)
    model.log_likelihood(torch.tensor([[3, 1, 4, 1, 0, 2]]), num_samples=40, exhaustive=False)
    assert [long for long, _ in asked] == [True] * 20 + [False] * 20
    for half in (asked[:20], asked[20:]):
        counts = [count for _, count in half]
        assert counts == sorted(counts) and len(set(counts)) >= 4


# Left to right


def test_chain_is_one_row_and_the_product_from_left_to_right(model):
    ids, prompt = [3, 1, 4, 0, 2], [0, 1, 0, 0, 1]
    expected = naive_log_likelihood(model, ids, [each == 0 for each in prompt], (0, 1, 2)).detach()
    result = model.log_likelihood(torch.tensor([ids]), prompt_mask=torch.tensor([prompt]), method="chain")
    assert result.value.item() == pytest.approx(expected.item(), abs=1e-5)  # as NETWORK
    assert (result.num_forward.tolist(), result.stderr.tolist(), result.is_bound) == ([1], [0], True)


# Common random numbers


def test_equal_keys_share_their_draws():
    """Two texts that differ in the last token only: their draws move together, the difference is far surer."""
    ids = torch.randint(11, (1, 16), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    ids[1, -1] = (ids[0, -1] + 3) % 11
    model = small_interpolating(seed=2, scale=0.2)
    common = model.log_likelihood(ids, num_samples=128, keys=torch.tensor([7, 7]), return_samples=True)
    difference, stderr = paired_difference(*common.samples)
    assert difference == pytest.approx(float(common.value[0] - common.value[1]), abs=1e-9)
    apart = model.log_likelihood(ids, num_samples=128, return_samples=True)
    unpaired = float(apart.stderr.square().sum().sqrt())
    assert stderr < 0.6 * unpaired
    assert paired_difference(*apart.samples)[1] == pytest.approx(unpaired, rel=0.3)  # a stderr of 128 draws is 7% off


def test_the_standard_error_of_a_difference_is_calibrated(model):
    """Root mean square of z over 150 keys; it varies by 1 / sqrt(300) = 6%."""
    ids = torch.tensor([[3, 1, 4, 0], [3, 1, 4, 2]])
    exact = model.log_likelihood(ids, num_samples=ALL).value
    found = model.log_likelihood(
        ids.repeat(150, 1),
        num_samples=32,
        keys=torch.arange(150).repeat_interleave(2),
        exhaustive=False,
        return_samples=True,
    )
    differences = [paired_difference(*found.samples[2 * key : 2 * key + 2]) for key in range(150)]
    z = torch.tensor([(value - float(exact[0] - exact[1])) / stderr for value, stderr in differences])
    assert 0.75 < z.square().mean().sqrt() < 1.25


def test_draws_in_pieces_change_no_value(model, monkeypatch):
    ids = torch.tensor([[3, 1, 4, 0, 2]])
    whole = [model.log_likelihood(ids, num_samples=each, return_samples=True) for each in (30, ALL)]
    for module in ("frame", "interpolating"):
        monkeypatch.setattr(f"prime_v2.likelihood_{module}_prime_v2.ROWS_PER_PIECE", 7)
    for expected, num_samples in zip(whole, (30, ALL), strict=True):
        found = model.log_likelihood(ids, num_samples=num_samples, return_samples=True)
        torch.testing.assert_close(found.samples[0], expected.samples[0], **NETWORK)


def test_the_share_of_the_training_changes_no_likelihood(model, ids):
    other = small_interpolating(seed=2, vocab_size=5, ar_share=0.9)
    assert torch.equal(other.log_likelihood(ids, num_samples=4).value, model.log_likelihood(ids, num_samples=4).value)
