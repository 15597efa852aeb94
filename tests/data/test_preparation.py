"""From a source to packed splits: every document once, on the side that its text and the seed decide."""

import pytest

from prime_v2.data import preparation
from prime_v2.data.preparation import TextOptions, prepare_text
from prime_v2.data.splits import corpus_fingerprint, deduplicate, split_of

DOCUMENTS = [f"The {number} quick brown foxes jump over {number % 7} lazy dogs." for number in range(300)]


def options(source, **changed) -> TextOptions:
    return TextOptions(
        **{
            "data": str(source),
            "data_split": "train",
            "text_field": "text",
            "streaming": False,
            "max_documents": None,
            "tokenizer": "bpe",
            "bpe_vocab_size": 270,
            "block_size": 16,
            "dev_share": 0.2,
            "test_share": 0.2,
            "eval_sequences": 2,
            "test_sequences": 3,
            "seed": 5,
            **changed,
        }
    )


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The numbers of the documents that were read, in place of any source; the first ten are repeated."""
    numbers: list[int] = []

    def read(source, **ignored):
        for number, document in enumerate([*DOCUMENTS, *DOCUMENTS[:10]]):
            numbers.append(number)
            yield document

    monkeypatch.setattr(preparation, "read_documents", read)
    monkeypatch.setattr(preparation, "fingerprint_of", lambda source: {"revision": None})
    return numbers


def sides(shares) -> dict[str, list[str]]:
    found = {"train": [], "dev": [], "test": []}
    for document in deduplicate(DOCUMENTS):
        found[split_of(document, seed=5, dev_share=shares, test_share=shares)].append(document)
    return found


def test_the_source_is_read_once_and_no_copy_of_it_stays(reads, tmp_path):
    _, data = prepare_text(options("a_set"), {"base": 2}, tmp_path / "data")
    assert reads == list(range(310))
    expected = {split: corpus_fingerprint(documents) for split, documents in sides(0.2).items()}
    assert {split: blocks.fingerprint for split, blocks in data.items()} == expected
    assert not (tmp_path / "data" / "documents").exists()
    assert (data["dev"].first(2) == data["dev"].first(99)[:2]).all() and len(data["dev"].first(2)) == 2


def test_of_a_stream_no_more_is_read_than_dev_and_test_may_need(reads, tmp_path):
    """Four documents for each block that is wanted: 8 and 12. A shared tokenizer comes from another preparation."""
    prepare_text(options("a_set"), {"base": 2}, tmp_path / "first")
    reads.clear()
    text = options("a_set", streaming=True, tokenizer=str(tmp_path / "first" / "tokenizer"))
    _, data = prepare_text(text, {"base": 2}, tmp_path / "stream")
    found = sides(0.2)
    last = max(DOCUMENTS.index(found["dev"][7]), DOCUMENTS.index(found["test"][11]))
    assert reads == list(range(last + 1))
    assert data["dev"].fingerprint == corpus_fingerprint(found["dev"][:8])
    assert data["test"].fingerprint == corpus_fingerprint(found["test"][:12])


def test_a_source_that_breaks_off_leaves_no_copy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 has no field 'text'"):
        prepare_text(options(tmp_path / "a.jsonl"), {"base": 2}, tmp_path / "data")
    assert not (tmp_path / "data" / "documents").exists()
