"""The BPE that is trained on documents."""

import re

import pytest

from prime_v2.tokenization.bpe import train_bpe

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody minds. "


def test_bpe_gives_every_text_back_and_has_the_asked_size():
    tokenizer = train_bpe([SENTENCE * 3, "some other text about foxes"], 280)
    assert tokenizer.get_vocab_size() == 280
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ["", SENTENCE, " two  spaces\n\n\ttab ", "é 漢字 🙂 \u200d\x00\x7f", "a <|endoftext|> b"]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert 0 not in ids
    assert len(tokenizer.encode(SENTENCE).ids) < len(SENTENCE)


def test_bpe_is_deterministic():
    documents = [f"{SENTENCE} number {i}" for i in range(50)]
    assert train_bpe(documents, 300).to_str() == train_bpe(iter(documents), 300).to_str()


def test_bpe_of_an_impossible_size_is_refused():
    with pytest.raises(ValueError, match="vocab_size=257 leaves no room for merges .* use at least 258"):
        train_bpe([SENTENCE], 257)
    with pytest.raises(ValueError, match="fewer than the 5000 of the vocabulary; use more text, or") as error:
        train_bpe([SENTENCE], 5000)
    size_that_works = int(re.search(r"--bpe_vocab_size (\d+)", str(error.value))[1])
    assert train_bpe([SENTENCE], size_that_works).get_vocab_size() == size_that_works
