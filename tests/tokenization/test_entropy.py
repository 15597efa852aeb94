"""Sub-token entropies against counting tuples of digits, and the table against what must hold for every shuffle."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from prime_v2.code_table_prime_v2 import base_needed, build_code_table, digits_needed
from prime_v2.tokenization import build_tokenizer, count_tokens, entropy_table, render_table, subtoken_entropies

COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=60).filter(any)
MEANS = ("unshuffled", "shuffled", "shuffled_25_percent")


def zipf_counts(vocab_size: int) -> np.ndarray:
    """Counts that fall as 1 / rank, commonest token first, as the ids of a BPE roughly do."""
    return np.round(1e6 / np.arange(1, vocab_size + 1))


def entropy_nats(counter: Counter) -> float:
    total = sum(counter.values())
    return -sum(n / total * math.log(n / total) for n in counter.values() if n)


@given(COUNTS, st.integers(1, 7), st.integers(0, 1000))
def test_entropies_equal_counting_each_digit(counts, num_subtokens, seed):
    base = base_needed(len(counts), num_subtokens)
    codes = build_code_table(len(counts), base, num_subtokens, seed)
    expected = []
    for j in range(num_subtokens):
        counter: Counter = Counter()
        for token, count in enumerate(counts):
            counter[codes[token, j].item()] += count
        expected.append(entropy_nats(counter) / math.log(base))
    assert subtoken_entropies(counts, codes, base) == pytest.approx(expected, abs=1e-12)


@given(COUNTS, st.integers(0, 1000))
def test_joint_entropy_is_the_same_for_every_code_table(counts, seed):
    """Counted over the tuples of digits of each shuffled table, against H(p) in the rows."""
    for row in entropy_table(counts, len(counts), shuffle_seed=seed):
        codes = build_code_table(len(counts), row["base"], row["num_subtokens"], seed)
        joint = entropy_nats(Counter({tuple(code.tolist()): n for code, n in zip(codes, counts, strict=True)}))
        assert row["joint_nats"] == pytest.approx(joint, abs=1e-12)
        assert row["joint_per_subtoken"] * row["num_subtokens"] * math.log(row["base"]) == pytest.approx(joint)


@given(COUNTS, st.integers(0, 1000))
def test_no_mean_is_below_the_joint_share_or_above_one(counts, seed):
    """Subadditivity of entropy; 1e-12 is float64 rounding."""
    for row in entropy_table(counts, len(counts), shuffle_seed=seed):
        assert all(row["joint_per_subtoken"] - 1e-12 <= row[name] <= 1 + 1e-12 for name in MEANS)


def test_equal_counts_of_every_code_reach_the_ceiling():
    for row in entropy_table(np.ones(64), 64)[:2]:
        assert [row[name] for name in MEANS] == pytest.approx([1.0] * 3, abs=1e-12)


def test_two_tokens_that_differ_in_every_digit():
    """By hand: both digits are fair coins, log 2 each, while the joint is log 2 once."""
    assert subtoken_entropies([5, 5], [[0, 0], [1, 1]], 2).tolist() == [1.0, 1.0]
    assert subtoken_entropies([5, 5], [[0, 0], [0, 1]], 2).tolist() == [0.0, 1.0]


def test_shuffling_raises_the_mean_of_a_zipf_law_and_a_quarter_of_it_raises_it_less():
    for row in entropy_table(zipf_counts(4096), 4096):
        assert row["unshuffled"] < row["shuffled_25_percent"] < row["shuffled"]


@pytest.mark.parametrize(
    "vocab_size, expected",
    [
        (50257, {2: 225, 3: 37, 4: 15, 6: 7, 8: 4, 16: 2}),
        (32000, {2: 179, 3: 32, 4: 14, 6: 6, 8: 4, 15: 2}),
        (100, {2: 10, 3: 5, 4: 4, 6: 3, 7: 2}),
        (2, {1: 2}),
    ],
)
def test_rows_are_the_design_space_and_then_binary(vocab_size, expected):
    rows = entropy_table(zipf_counts(vocab_size), vocab_size)
    assert {row["num_subtokens"]: row["base"] for row in rows} == expected
    assert rows[-1]["num_subtokens"] == digits_needed(vocab_size, 2)


def test_the_seed_and_the_domain_are_read():
    tables = [
        entropy_table(zipf_counts(100), 100, **options)[-1]["shuffled"]
        for options in ({}, {"shuffle_seed": 1}, {"shuffle_domain": "vocab"}, {"shuffle_seed": 0})
    ]
    assert tables[0] == tables[3] and len(set(tables)) == 3


def test_rows_are_json_and_the_rendered_table_shows_them():
    rows = entropy_table(zipf_counts(100), 100)
    assert json.loads(json.dumps(rows)) == rows
    _, _, *body, last = render_table(rows).splitlines()
    assert [[float(cell) for cell in line.split()] for line in body] == [
        [row["num_subtokens"], row["base"], *(round(row[name], 4) for name in (*MEANS, "joint_per_subtoken"))]
        for row in rows
    ]
    assert f"{rows[0]['joint_nats']:.4f} nats" in last


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_tokens_are_counted_over_documents_without_special_tokens():
    tokenizer = build_tokenizer(word_tokenizer(), special_tokens={"eos_token": "<eos>", "unk_token": "<unk>"})
    documents = ["a b a", "", "b zebra", "<|mask|> <eos>"] * 200
    counts = count_tokens(iter(documents), tokenizer)
    assert counts.dtype == np.int64
    assert counts.tolist() == [3 * 200, 2 * 200, 2 * 200, 0, 0]  # the names of special tokens are text here: unknown


@pytest.mark.parametrize(
    "counts, message",
    [
        ([1, 2, 3], r"counts of shape \(3,\), but the vocabulary has 4 tokens"),
        ([0, 0, 0, 0], "not all zero; use a text with at least one token"),
        ([1, -1, 1, 1], "counts must be finite, not negative"),
        ([1, math.nan, 1, 1], "counts must be finite"),
        ([1, math.inf, 1, 1], "counts must be finite"),
    ],
)
def test_impossible_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        entropy_table(counts, 4)
