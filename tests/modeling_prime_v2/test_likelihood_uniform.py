"""`log_likelihood` of uniform-state diffusion against its enumerated value."""

import pytest
import torch
from enumeration import all_sequences, correlated_law, entropy, exact_bound, optimal_uniform
from networks import small_uniform

from prime_v2.configuration_uniform_prime_v2 import PrimeV2UniformConfig
from prime_v2.eval.intervals import half_width
from prime_v2.likelihood_output_prime_v2 import paired_difference, stratified_degrees, stratified_stderr
from prime_v2.likelihood_uniform_prime_v2 import PrimeV2UniformLikelihood

# float32 network: rows of different length and batches of different shape round differently, 1e-6 a logit, times the
# weights of up to n + 1.
NETWORK = {"rtol": 1e-5, "atol": 2e-5}


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
    """With a prompt in the middle, against noise on the scored tokens only."""
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
    """Two rounds of 4 draws of one token replace it 4 times: by 4 of a million tokens, no two of them equal."""
    ids, scored, config = torch.tensor([7]), torch.tensor([True]), PrimeV2UniformConfig(vocab_size=10**6)
    for seed in range(20):
        rounds = [PrimeV2UniformLikelihood(config, "uniform", 4, True, number) for number in (0, 1)]
        rows = [next(each.rows(ids, scored, torch.tensor(seed))) for each in rounds]
        replaced = set(torch.cat([each.inputs["ids"] for each in rows]).flatten().tolist()) - {7}
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
