"""Windows of held-out text and their clusters; the training text's n-grams."""

import numpy as np
import pytest
from command_runs import DOCUMENTS

from prime_v2 import build_tokenizer
from prime_v2.studies.quality.statistics import NgramIndex
from prime_v2.studies.quality.texts import held_out, training_index
from prime_v2.tokenization.bpe import train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(train_bpe(DOCUMENTS, 280), special_tokens={"eos_token": "<|endoftext|>"})


def test_windows_are_spread_over_the_text_and_know_their_documents(tokenizer):
    long = " ".join(DOCUMENTS)
    found = held_out(tokenizer, [long, *DOCUMENTS, long], None, length=8, count=10)
    ids = [each for text in (long, *DOCUMENTS, long) for each in [*tokenizer(text)["input_ids"], 0]][:-1]
    total = len(ids) // 8
    places = np.linspace(0, total - 1, 10).round().astype(int)
    np.testing.assert_array_equal(found.windows, [ids[8 * each : 8 * each + 8] for each in places])
    assert (np.diff(found.units) >= 0).all() and found.units[0] == 0, "in the order of the text"
    first_ends, last_begins = ids.index(0) // 8, (len(ids) - 1 - ids[::-1].index(0)) // 8
    assert len(set(found.units[places < first_ends])) == 1, "windows of one document are one cluster"
    assert len(set(found.units[places > last_begins])) == 1
    assert len(set(found.units)) >= 3
    clusters = found.clusters
    assert sum(clusters.sequences) == 10 and len(clusters) == len(set(found.units))


def test_a_text_with_fewer_windows_than_samples_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"has \d windows of 8 tokens, fewer than samples=99; give a longer text"):
        held_out(tokenizer, DOCUMENTS[:1], None, length=8, count=99)
    with pytest.raises(ValueError, match=r"has 0 windows of 500 tokens"):
        held_out(tokenizer, DOCUMENTS[:1], None, length=500, count=9)


def test_the_training_index_holds_the_ngrams_of_each_document(tokenizer):
    texts = [np.array(tokenizer(each)["input_ids"]) for each in DOCUMENTS]
    np.testing.assert_array_equal(training_index(tokenizer, iter(DOCUMENTS)).sorted, NgramIndex(texts).sorted)
