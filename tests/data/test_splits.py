"""Repetition, sides and the fingerprint of documents."""

import hashlib

import pytest

from prime_v2.data.splits import corpus_fingerprint, deduplicate, split_of


def test_deduplicate_keeps_the_first_of_equal_texts():
    documents = ["One two", "three", "one  TWO\n", "", " ", "Three", "three."]
    assert list(deduplicate(documents)) == ["One two", "three", "", "three."]


def test_deduplicate_tells_of_each_document_that_it_leaves_out():
    calls = []
    kept = list(deduplicate(["a b", "A  b", "c", "a b", "d"], lambda: calls.append(1)))
    assert (kept, len(calls)) == (["a b", "c", "d"], 2)


def test_split_is_a_function_of_text_and_seed_with_the_asked_shares():
    documents = [f"Document {i}" for i in range(20000)]
    sides = [split_of(document, seed=3, dev_share=0.1, test_share=0.2) for document in documents]
    # Standard deviations are at most 57 documents: seven of them, a false alarm in 10^11 for a random hash.
    assert abs(sides.count("dev") - 2000) < 400 and abs(sides.count("test") - 4000) < 400
    assert sides == [split_of(f" document\n{i}", seed=3, dev_share=0.1, test_share=0.2) for i in range(20000)]
    other_dev_share = [split_of(document, seed=3, dev_share=0.5, test_share=0.2) for document in documents]
    assert [side == "test" for side in sides] == [side == "test" for side in other_dev_share]
    both = sum(
        side == "test" == split_of(text, seed=4, test_share=0.2) for text, side in zip(documents, sides, strict=True)
    )
    assert abs(both - 800) < 200  # the seeds are independent: 20,000 x 0.2 x 0.2


def test_split_is_the_same_for_ever():
    """Blake2b, 16 bytes, of "seed\\ntext"; the first 8 of them as a fraction: test below its share, dev at the top."""
    for i in range(100):
        digest = hashlib.blake2b(b"5\ntext %d" % i, digest_size=16).hexdigest()
        fraction = int(digest[:16], 16) / 16**16
        expected = "test" if fraction < 0.3 else "dev" if fraction >= 0.75 else "train"
        assert split_of(f"TEXT\n{i}", seed=5, dev_share=0.25, test_share=0.3) == expected


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0), (float("nan"), 0.1)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="dev_share=.* must be at least 0 and leave a share for training"):
        split_of("text", dev_share=shares[0], test_share=shares[1])


def test_fingerprint_is_sha256_of_lengths_and_texts():
    expected = hashlib.sha256(b"\0\0\0\0\0\0\0\2\xc3\xa9" + b"\0\0\0\0\0\0\0\1a").hexdigest()
    assert corpus_fingerprint(["é", "a"]) == expected
    assert len({corpus_fingerprint(x) for x in ([], [""], ["ab"], ["a", "b"], ["b", "a"])}) == 5
