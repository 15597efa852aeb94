"""The 95% intervals of `log_likelihood`: of 2,000 on enumerable cases, how many hold the exact value."""

import pytest
import torch
from enumeration import all_sequences, small_model

from prime_v2.eval.likelihood import interval
from prime_v2.likelihood_prime_v2 import paired_difference, stratified_degrees, stratified_stderr

REPEATS = 200  # of ten sequences: 2,000 intervals, whose coverage varies by 0.5%
ROWS = {2: [3, 7, 11, 24, 0, 9, 13, 18, 21, 6], 4: [3, 77, 111, 240, 400, 98, 613, 318, 521, 206]}


@pytest.fixture(scope="module")
def model():
    return small_model(seed=2, vocab_size=5, num_subtokens=3, reveal_order="nested", stage_digits=[1, 3])


@pytest.mark.parametrize(
    ("method", "length", "num_samples"),
    [("subtoken", 2, 64), ("subtoken", 2, 128), ("token_objective", 2, 128), ("token", 4, 128), ("nested", 4, 128)],
)
def test_intervals_hold_the_exact_value_as_often_as_they_say(model, method, length, num_samples):
    ids = all_sequences(5, length)[ROWS[length]]
    exact = model.log_likelihood(ids, method=method, num_samples=700)
    assert exact.stderr.tolist() == [0] * 10, "all masks were summed over"
    keys = torch.arange(10 * REPEATS)
    found = model.log_likelihood(
        ids.repeat(REPEATS, 1), method=method, num_samples=num_samples, keys=keys, exhaustive=False
    )
    low, high = interval(found.value, found.stderr, found.degrees)
    truth = exact.value.repeat(REPEATS)
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    assert 0.93 <= covered <= 0.97


def test_degrees_of_freedom_of_equal_strata_are_two_thirds_of_the_draws():
    draws = torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert stratified_degrees(draws) == pytest.approx(2000, rel=0.15)  # a ratio of sums that vary by some 5%
    assert stratified_degrees(draws[:2]) == 2
    assert stratified_degrees(torch.ones(4)) == float("inf")


def test_degrees_of_freedom_are_few_where_few_strata_vary():
    draws = torch.zeros(64, dtype=torch.double)
    draws[0] = 1.0
    assert stratified_degrees(draws) == 2
    assert stratified_stderr(draws).item() == pytest.approx((0.5 + 0.25) ** 0.5 / 64)


def test_an_exact_value_is_its_own_interval(model):
    found = model.log_likelihood(torch.tensor([[3, 1]]), method="chain")
    assert found.degrees.tolist() == [float("inf")]
    low, high = interval(found.value, found.stderr, found.degrees)
    assert low == high == found.value
    assert paired_difference(torch.ones(1), torch.zeros(1)) == (1.0, 0.0)
