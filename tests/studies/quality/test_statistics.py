"""Statistics of texts, each against naive loops, cases by hand or simulation."""

import math

import numpy as np
import pytest

from prime_v2.studies.quality.statistics import (
    REFERENCES,
    NgramIndex,
    describe,
    distinct,
    entropy,
    mean,
    percentiles,
    repeated,
    resampled,
    self_bleu,
)


def random_texts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, vocab_size, (count, length)))


def naive_ngrams(ids: np.ndarray, size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + size].tolist()) for start in range(len(ids) - size + 1)]


def test_the_entropy_of_a_text_is_that_of_its_frequencies():
    assert entropy(np.arange(16)) == pytest.approx(math.log(16), rel=1e-12)
    assert entropy(np.zeros(9, dtype=np.int64)) == 0
    assert entropy(np.array([1, 1, 1, 2])) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-12
    )


def test_the_entropy_of_long_uniform_texts_is_that_of_the_uniform_law():
    (text,) = random_texts(1, 200_000, 8)
    assert entropy(text) == pytest.approx(math.log(8), abs=1e-3)  # its bias is 7 / 400,000


@pytest.mark.parametrize("size", [1, 2, 4])
def test_repeated_ngrams_are_those_that_a_loop_has_seen_before(size):
    for text in random_texts(5, 60, 4):
        seen, count = set(), 0
        for gram in naive_ngrams(text, size):
            count += gram in seen
            seen.add(gram)
        assert repeated(text, size) == count
    assert repeated(np.arange(3), 4) == 0, "a text that is too short"


@pytest.mark.parametrize("size", [2, 3])
def test_copied_ngrams_are_those_of_a_set(size):
    training, samples = random_texts(30, 40, 6), random_texts(10, 25, 6, seed=1)
    there = {gram for text in training for gram in naive_ngrams(text, size)}
    index = NgramIndex(training, size)
    assert len(index.sorted) == len(there)
    for text in samples:
        assert index.count(text) == sum(gram in there for gram in naive_ngrams(text, size))
    assert index.count(samples[0][: size - 1]) == 0
    assert NgramIndex([], size).count(samples[0]) == 0


def test_no_ngram_reaches_across_two_training_texts():
    index = NgramIndex([np.array([1, 2]), np.array([3, 4])], 2)
    assert index.count(np.array([1, 2, 3, 4])) == 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_distinct_n_is_a_set_over_all_of_its_ngrams_and_its_error_leaves_out_one_unit_each(size):
    texts, units = random_texts(6, 20, 5), np.array([0, 0, 1, 2, 2, 2])

    def naive(kept: list[np.ndarray]) -> float:
        grams = [gram for text in kept for gram in naive_ngrams(text, size)]
        return len(set(grams)) / len(grams)

    found = distinct(texts, size, units)
    assert found["value"] == naive(texts)
    without = np.array([naive([t for t, u in zip(texts, units, strict=True) if u != left]) for left in range(3)])
    stderr = math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    low, high = found["interval_95"]
    assert (high - low) / 2 == pytest.approx(4.302653 * stderr, rel=1e-6)  # the 97.5% point of t with 2 degrees
    assert distinct(texts, size, np.zeros(6, dtype=int))["interval_95"] is None


def test_the_interval_of_distinct_n_covers_its_expectation():
    """Sets of 24 texts; 200 of them have the expectation within 0.02 of 95% (chance of failing 1e-3 at 97.5%)."""
    sets = [random_texts(24, 16, 12, seed) for seed in range(400)]
    found = [distinct(each, 2, np.arange(24)) for each in sets]
    expected = np.mean([each["value"] for each in found])
    covered = np.mean([each["interval_95"][0] <= expected <= each["interval_95"][1] for each in found])
    assert covered >= 0.93, "the jackknife's variance is rather too large"


def test_self_bleu_is_one_for_equal_texts_and_falls_with_their_difference():
    same = [np.arange(20)] * (REFERENCES + 1)
    np.testing.assert_allclose(self_bleu(same), 1, rtol=1e-9)
    other = [np.arange(20) + 20 * i for i in range(REFERENCES + 1)]
    assert self_bleu(other).max() < 0.05, "nothing but sacrebleu's smoothing is left"
    half = [np.arange(20) + 20 * i * (np.arange(20) > 9) for i in range(REFERENCES + 1)]  # the first 10 are common
    np.testing.assert_allclose(self_bleu(half), (10 / 20 * 9 / 19 * 8 / 18 * 7 / 17) ** 0.25, rtol=1e-9)


def test_self_bleu_is_bleu_4_by_its_definition():
    texts = random_texts(REFERENCES + 1, 30, 4)
    found = self_bleu(texts)
    for i in (0, 7):
        others = [texts[(i + 1 + j) % len(texts)] for j in range(REFERENCES)]
        product = 1.0
        for size in range(1, 5):
            own = naive_ngrams(texts[i], size)
            most = {gram: max(naive_ngrams(each, size).count(gram) for each in others) for gram in set(own)}
            product *= sum(min(own.count(gram), most[gram]) for gram in set(own)) / len(own)
        assert found[i] == pytest.approx(product**0.25, rel=1e-6)  # equal lengths: no brevity penalty


def test_fewer_samples_than_self_bleu_needs_are_refused():
    with pytest.raises(ValueError, match="self-BLEU needs at least 17 samples, not 5; draw 17"):
        self_bleu([np.arange(4)] * 5)


def test_a_mean_is_a_ratio_of_sums_and_its_interval_is_over_units():
    rng = np.random.default_rng(0)
    over, under = rng.exponential(size=40), rng.uniform(1, 2, 40)
    found = mean(over, under, np.arange(40))
    assert found["value"] == pytest.approx(over.sum() / under.sum(), rel=1e-12)
    low, high = found["interval_95"]
    assert low < found["value"] < high
    doubled = mean(np.tile(over, 2), np.tile(under, 2), np.tile(np.arange(40), 2))
    assert doubled == {"value": pytest.approx(found["value"]), "interval_95": pytest.approx([low, high])}
    assert mean(over, under, np.arange(40), math.exp)["interval_95"] == pytest.approx([math.exp(low), math.exp(high)])
    assert mean(under, under, np.arange(40))["interval_95"] is None, "all units alike"
    assert mean(over[:7], under[:7], np.arange(7))["interval_95"] is None, "fewer units than an interval needs"


def test_the_bootstrap_interval_covers_a_skewed_mean_as_often_as_it_says():
    """400 sets of 64 exponential values: 95% within 0.03; a coverage of 95% fails with a chance of 4e-3."""
    covered = 0
    for seed in range(400):
        values = np.random.default_rng(seed).exponential(size=64)
        low, high = mean(values, np.ones(64), np.arange(64))["interval_95"]
        covered += low <= 1 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_resampled_ratios_spread_as_the_ratio_does_and_pair_what_stands_side_by_side():
    values = np.random.default_rng(0).normal(size=(400, 2))
    values[:, 1] = values[:, 0] + 3
    drawn = resampled(values, np.ones(400), np.arange(400), np.random.default_rng(1))
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 3, rtol=1e-12)
    assert drawn[:, 0].std() == pytest.approx(values[:, 0].std() / 20, rel=0.07)  # 2,000 draws: 1.6% standard error


def test_the_ends_of_an_interval_that_were_not_reached_are_none():
    assert percentiles(np.array([1.0] * 50 + [np.inf] * 50)) == [1.0, None]


def test_a_description_has_every_number_with_an_interval():
    found = describe(random_texts(20, 30, 9), training=NgramIndex(random_texts(9, 30, 2)))
    assert list(found) == ["entropy", "repetition", "copied", "self_bleu", "distinct_1", "distinct_2", "distinct_3"]
    assert all(set(each) == {"value", "interval_95"} for each in found.values())
    assert "copied" not in describe(random_texts(20, 30, 9))
