"""Codes grown from text: tables that are codes, that put like tokens together, and that reach model and tokenizer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import small_config

from prime_v2 import PrimeV2ForMaskedDiffusion
from prime_v2.tokenization import codes
from prime_v2.tokenization.codes import codes_from_text, neighbour_vectors, tree_codes


@given(
    number=st.integers(1, 60), base=st.integers(2, 4), extra=st.integers(0, 2), seed=st.integers(0, 5),
    width=st.integers(1, 5), is_balanced=st.booleans(),
)  # fmt: skip
def test_every_tree_gives_each_token_a_code_of_its_own(number, base, extra, seed, width, is_balanced):
    base = base if is_balanced else 2
    digits = extra + next(s for s in range(1, 9) if base**s >= number)
    vectors = np.random.default_rng(seed).normal(size=(number, width))
    codes = tree_codes(vectors, base, digits, is_balanced)
    assert codes.shape == (number, digits)
    assert codes.min() >= 0 and codes.max() < base
    assert len(np.unique(codes, axis=0)) == number


def test_the_parts_of_a_split_are_of_equal_number():
    codes = tree_codes(np.random.default_rng(0).normal(size=(64, 3)), 2, 6)
    for digits in range(1, 7):
        values, counts = np.unique(codes[:, :digits], axis=0, return_counts=True)
        assert (counts == 64 // 2**digits).all() and len(values) == 2**digits


def test_clusters_share_leading_digits():
    """Four well separated clusters of eight tokens, in random order: two leading digits name the cluster."""
    generator = np.random.default_rng(1)
    cluster = generator.permutation(np.repeat(np.arange(4), 8))
    centres = np.array([[0, 0], [0, 10], [30, 0], [30, 10]])
    codes = tree_codes(centres[cluster] + generator.normal(size=(32, 2)), 2, 5)
    names = codes[:, 0] * 2 + codes[:, 1]
    assert all(len(set(names[cluster == each])) == 1 for each in range(4))


def text_of_classes(generator) -> np.ndarray:
    """Tokens of four classes that follow one another in a cycle; within a class any token."""
    classes = (np.arange(2000)[None] + generator.integers(0, 4, size=(20, 1))) % 4
    return classes * 8 + generator.integers(0, 8, size=classes.shape)


def test_unbalanced_codes_follow_clusters_of_unequal_size():
    """Three clusters of 2, 7 and 23 tokens: the first two digits tell them apart, as balanced ones cannot."""
    generator = np.random.default_rng(1)
    cluster = generator.permutation(np.repeat(np.arange(3), [2, 7, 23]))
    vectors = np.array([[0, 0], [0, 10], [30, 0]])[cluster] + generator.normal(size=(32, 2)) / 4

    def clusters_of(digits):
        return [set(cluster[(digits[:, :2] == each).all(1)]) for each in np.unique(digits[:, :2], axis=0)]

    assert all(len(each) == 1 for each in clusters_of(tree_codes(vectors, 2, 7, is_balanced=False)))
    assert any(len(each) > 1 for each in clusters_of(tree_codes(vectors, 2, 5)))
    with pytest.raises(ValueError, match="splits tokens in two, but base=3; use base=2"):
        tree_codes(vectors, 3, 7, is_balanced=False)


def test_tokens_with_the_same_neighbours_share_leading_digits():
    blocks = text_of_classes(np.random.default_rng(2))
    codes, _ = codes_from_text("similarity", blocks, 32, 2, 5)
    names = codes[:, 0] * 2 + codes[:, 1]
    assert all(len(set(names[8 * each : 8 * each + 8])) == 1 for each in range(4))


def test_a_vector_that_is_zero_but_for_rounding_is_zero(monkeypatch):
    """Some builds of LAPACK give 1e-17 where others give 0; scaled to length 1 it would look like a meaning."""
    blocks = np.random.default_rng(3).integers(0, 6, size=(5, 40))

    decompose = np.linalg.svd

    def rounded(*args, **options):
        left, values, right = decompose(*args, **options)
        return left + 1e-17, values, right

    monkeypatch.setattr(np.linalg, "svd", rounded)
    vectors, _ = neighbour_vectors(blocks, 7)  # token 6 does not occur
    assert np.array_equal(vectors[6], np.zeros(6))
    np.testing.assert_allclose(np.linalg.norm(vectors[:6], axis=1), 1.0, rtol=1e-12)


def test_large_tables_are_decomposed_to_the_same_vectors(monkeypatch):
    """The products of all pairs by Lanczos and by the whole decomposition; the first counts what it multiplies."""
    blocks = np.random.default_rng(4).choice(60, size=(40, 60), p=np.arange(1, 61) / 1830)
    whole, _ = neighbour_vectors(blocks, 60, 8)
    monkeypatch.setattr(codes, "MOST_DENSE", 10)
    sparse, flops = neighbour_vectors(blocks, 60, 8)
    np.testing.assert_allclose(sparse @ sparse.T, whole @ whole.T, atol=1e-6)  # Lanczos works with squares
    pairs = len(np.unique(np.stack([blocks[:, :-1], blocks[:, 1:]], -1).reshape(-1, 2), axis=0))
    assert flops >= 2 * blocks.size + 8 * 2 * 2 * 2 * pairs  # a step or more for each vector, both sides' counts


def test_neighbour_vectors_are_those_of_the_dense_definition():
    """Up to a rotation: the products of all pairs, from counts by a loop and a dense decomposition."""
    blocks = np.random.default_rng(3).integers(0, 6, size=(5, 40))
    vectors, _ = neighbour_vectors(blocks, 7)  # token 6 does not occur
    joint = np.zeros((7, 14))
    order = np.argsort(-np.bincount(blocks.reshape(-1), minlength=7), kind="stable")
    for row in blocks:
        for left, right in zip(row, row[1:], strict=False):
            joint[left, np.flatnonzero(order == right)[0]] += 1
            joint[right, 7 + np.flatnonzero(order == left)[0]] += 1
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(joint * joint.sum() / np.outer(joint.sum(1), joint.sum(0)))
    positive = np.where(joint > 0, np.maximum(information, 0), 0)
    u, s, _ = np.linalg.svd(positive)
    dense = u[:, :6] * np.sqrt(s[:6])
    dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose((vectors @ vectors.T)[:6, :6], (dense @ dense.T)[:6, :6], atol=1e-6)
    assert np.abs(vectors[6]).max() < 1e-6


def test_frequency_codes_put_tokens_of_like_frequency_together():
    counts = np.arange(1, 17)
    blocks = np.repeat(np.arange(16), counts)[None]
    codes, _ = codes_from_text("frequency", blocks, 16, 2, 4)
    first_half = set(np.flatnonzero(codes[:, 0] == codes[0, 0]).tolist())
    assert first_half == set(range(8))


def test_a_model_takes_made_codes_and_keeps_them(tmp_path):
    config = small_config(code_source="data", num_subtokens=4, base=2)
    model = PrimeV2ForMaskedDiffusion(config)
    codes = torch.from_numpy(tree_codes(np.random.default_rng(4).normal(size=(11, 2)), 2, 4))
    model.code_table.set_codes(codes)
    model.save_pretrained(tmp_path)
    loaded = PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded.code_table.codes[:-1], codes)
    assert torch.equal(loaded.decode(loaded.encode(torch.arange(11))), torch.arange(11))


def test_bad_codes_are_refused():
    with pytest.raises(ValueError, match="codes='colour' is not one of similarity, clusters, frequency"):
        codes_from_text("colour", np.zeros((1, 4), dtype=int), 4, 2, 2)
    with pytest.raises(ValueError, match="use a block_size of at least 2"):
        codes_from_text("similarity", np.zeros((4, 1), dtype=int), 4, 2, 2)
    with pytest.raises(ValueError, match="5 tokens do not fit in 2 digits of base 2"):
        tree_codes(np.zeros((5, 1)), 2, 2)
    drawn = PrimeV2ForMaskedDiffusion(small_config())
    table = drawn.code_table.codes[:-1]
    with pytest.raises(ValueError, match="code_source='shuffle' draws the table"):
        drawn.code_table.set_codes(table)
    model = PrimeV2ForMaskedDiffusion(small_config(code_source="data"))
    with pytest.raises(ValueError, match=r"must be \(11, 4\) in \[0, 1\]"):
        model.code_table.set_codes(table + 1)
    with pytest.raises(ValueError, match="two tokens have the same code"):
        model.code_table.set_codes(torch.zeros_like(table))


def test_codes_of_a_tiny_vocabulary_are_the_same_each_time():
    """Text of rank 2, far below the 64 dimensions that are kept, by the dense decomposition."""
    blocks = np.random.default_rng(5).integers(0, 2, size=(4, 100)) * 20
    first, again = (codes_from_text("similarity", blocks, 24, 2, 5)[0] for _ in range(2))
    assert np.array_equal(first, again) and len(np.unique(first, axis=0)) == 24
