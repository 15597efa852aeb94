"""How much of a test text stands in the training text, against sets of tuples."""

import json

import numpy as np
import pytest

from prime_v2.data import overlap as module
from prime_v2.data.overlap import ngram_hashes, overlap
from prime_v2.data.packing import PackedBlocks, pack_blocks
from prime_v2.data.preparation import measured_of, prepare_text
from prime_v2.training.options import RaisingParser, parse_options
from prime_v2.training.run import text_options


def blocks_of(ids: np.ndarray, path) -> PackedBlocks:
    pack_blocks(["x"], lambda _: [ids.tolist()], block_size=5, eos_token_id=0, vocab_size=70_000, path=path)
    return PackedBlocks(path)


def runs_of(ids: np.ndarray, length: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + length].tolist()) for start in range(len(ids) - length + 1)]


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("chunk", [7, 64, 2**19])
@pytest.mark.parametrize("bits", [4, 24])
def test_shared_runs_are_counted_as_sets_of_tuples_count_them(tmp_path, monkeypatch, length, chunk, bits):
    monkeypatch.setattr(module, "BITS", bits)
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(length)
    train, test = rng.integers(0, 3, 400), rng.integers(0, 3, 203)
    test[50:90] = train[300:340]
    train, test = blocks_of(train, tmp_path / "train"), blocks_of(test, tmp_path / "test")
    wanted, known = runs_of(test.ids, length), set(runs_of(train.ids, length))
    found = overlap(train.ids, test.ids, length)
    shared = sum(each in known for each in wanted)
    assert shared > 0
    assert found == {
        "length": length,
        "ngrams": len(wanted),
        "ngrams_in_train": shared,
        "share": pytest.approx(shared / len(wanted)),
    }


def test_equal_runs_and_no_others_have_equal_hashes():
    ids = np.random.default_rng(0).integers(0, 2, 20_000).astype(np.uint32)
    hashes, runs = ngram_hashes(ids, 8), runs_of(ids, 8)
    assert len(set(zip(hashes.tolist(), runs, strict=True))) == len(set(runs)) == len(set(hashes.tolist())) == 256


def test_a_text_shorter_than_a_run_has_no_share(tmp_path):
    long, short = blocks_of(np.arange(40), tmp_path / "train"), blocks_of(np.arange(6), tmp_path / "test")
    assert overlap(long.ids, short.ids, 8) == {"length": 8, "ngrams": 0, "ngrams_in_train": 0, "share": None}


def test_prepared_text_says_what_was_left_out_and_what_its_splits_share(tmp_path):
    path = tmp_path / "text.jsonl"
    texts = [f"the cat number {i} sat on the mat and looked at dog number {i * i}" for i in range(60)]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in [*texts, texts[3], texts[5].upper()]))
    arguments = ["--data", str(path), "--bpe_vocab_size", "280", "--block_size", "8", "--dev_share", "0.2"]
    arguments += ["--test_share", "0.2", "--output_dir", str(tmp_path / "run")]
    run, training, _ = parse_options(arguments, parser_class=RaisingParser)
    _, splits = prepare_text(text_options(run, training.seed), {"num_subtokens": 1}, tmp_path / "prepared")
    measured = measured_of(tmp_path / "prepared")
    assert measured["repeated_documents"] == 2
    found = measured["test_ngrams_in_train"]
    assert found == [overlap(splits["train"].ids, splits["test"].ids, length) for length in (8, 32)]
    assert found[0]["share"] > 0
