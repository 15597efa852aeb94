"""`prime-v2 overlap`."""

import json

from command_runs import DOCUMENTS, prepared, refused, run

from prime_v2.data.packing import PackedBlocks
from prime_v2.data.preparation import COMPLETE, SEALED, WHOLE_TOKENS, measured_of
from prime_v2.data.splits import corpus_fingerprint
from prime_v2.output.paths import without_places
from prime_v2.output.records import read_record
from prime_v2.output.seals import write_seal
from prime_v2.tokenization import PrimeV2Tokenizer

TRAINED_ON = [f"{text} and then document {i} says no more" for i, text in enumerate(DOCUMENTS * 5)]


def runs_of(ids: list[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]


def test_the_runs_of_a_text_are_counted_that_the_training_split_has_too(text_file, tmp_path):
    data = prepared(tmp_path, TRAINED_ON)
    output = tmp_path / "record.json"
    arguments = ["overlap", data, text_file, "--max-documents", 7]
    printed = json.loads(run(*arguments, "--json", "--output", output).stdout)
    tokenizer = PrimeV2Tokenizer.from_pretrained(data / WHOLE_TOKENS)
    ids = [each for text in DOCUMENTS[:7] for each in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    trained_on = PackedBlocks(data / "train").ids.tolist()
    for found, length in zip(printed["ngrams_in_train"], (8, 32), strict=True):
        known = set(runs_of(trained_on, length))
        wanted = runs_of(ids, length)
        assert (found["length"], found["ngrams"]) == (length, len(wanted))
        assert found["ngrams_in_train"] == sum(each in known for each in wanted)
    assert printed["ngrams_in_train"][0]["ngrams_in_train"] > 0
    assert (printed["documents"], printed["tokens"]) == (7, len(ids) - 7)
    assert printed["train_tokens"] == len(trained_on)
    fingerprints = {"train": PackedBlocks(data / "train").fingerprint, "text": corpus_fingerprint(DOCUMENTS[:7])}
    assert printed["fingerprints"] == fingerprints
    assert read_record(output)["results"] == without_places(printed)
    assert f" runs of 8 tokens, {printed['ngrams_in_train'][0]['share']:.1%}" in run(*arguments).stdout


def test_a_split_of_the_source_itself_is_that_of_the_prepared_text(tmp_path):
    """Its test split has the counts that were made when it was prepared, but for the tokens after the last block."""
    data = prepared(tmp_path, TRAINED_ON)
    arguments = ["overlap", data, tmp_path / "trained_on.jsonl", "--split"]
    counted, known = json.loads(run(*arguments, "test", "--json").stdout)["ngrams_in_train"], measured_of(data)
    for found, expected in zip(counted, known["test_ngrams_in_train"], strict=True):
        assert 0 <= found["ngrams"] - expected["ngrams"] < 8
        assert 0 <= found["ngrams_in_train"] - expected["ngrams_in_train"] < 8
    ids = PackedBlocks(data / "train").ids
    of_train = json.loads(run(*arguments, "train", "--json").stdout)
    assert 0 <= of_train["tokens"] + of_train["documents"] - len(ids) < 8


def test_a_folder_without_prepared_text_is_refused(text_file, tmp_path):
    sentence = refused("overlap", tmp_path, text_file)
    assert sentence.startswith(f"{tmp_path} holds no prepared text; give the folder `data` of a run of train.py, or")


def test_damaged_text_is_refused(text_file, tmp_path):
    data = prepared(tmp_path, TRAINED_ON)
    content = bytearray((data / "train").read_bytes())
    content[3] ^= 1
    (data / "train").write_bytes(content)
    assert "is damaged" in refused("overlap", data, text_file)


def test_a_streamed_text_is_refused(text_file, tmp_path):
    data = prepared(tmp_path, TRAINED_ON)
    for path in (data / "train", data / "train.json", data / COMPLETE):  # of a stream dev and test are kept only
        path.unlink()
    write_seal(data, COMPLETE, ("dev", "dev.json", "test", "test.json", *SEALED))
    assert "is of a streamed text" in refused("overlap", data, text_file)
