"""Packed blocks, the order in which they are read, streams, and batches."""

import json
import os
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from prime_v2.data.packing import (
    PackedBlocks,
    StreamedBlocks,
    TrainingOrder,
    collate,
    pack_blocks,
    short_length,
)
from prime_v2.data.splits import corpus_fingerprint
from prime_v2.tokenization import plain_text

EOS = 256


def encode_bytes(texts):
    return [list(text.encode()) for text in texts]


def some_documents(number, seed=0):
    generator = random.Random(seed)
    return ["".join(generator.choices("abc é漢\n", k=generator.randint(0, 40))) for _ in range(number)]


def pack(path, documents, **options):
    arguments = {"block_size": 16, "eos_token_id": EOS, "vocab_size": 257, "path": path}
    return pack_blocks(documents, encode_bytes, **(arguments | options))


def naive_stream(documents):
    return [i for document in documents for i in [*document.encode(), EOS]]


# Packing


@pytest.mark.parametrize("block_size", [1, 7, 16, 300])
def test_blocks_are_the_stream_of_ids_cut_into_rows(tmp_path, monkeypatch, block_size):
    monkeypatch.setattr(plain_text, "TEXTS_PER_BATCH", 5)
    documents = some_documents(53)
    blocks = pack(tmp_path / "a.bin", iter(documents), block_size=block_size)
    stream = naive_stream(documents)
    kept = len(stream) // block_size * block_size
    assert [i for block in blocks for i in block] == stream[:kept]
    assert all(block.dtype == np.int64 and block.shape == (block_size,) for block in blocks)
    assert (blocks.tokens, blocks.info["dropped_tokens"], len(blocks)) == (
        kept,
        len(stream) - kept,
        kept // block_size,
    )
    assert (blocks.documents, blocks.fingerprint) == (53, corpus_fingerprint(documents))
    assert (blocks.block_size, blocks.vocab_size, blocks.eos_token_id) == (block_size, 257, EOS)
    # One id a byte here, so the bytes are those ids that are not EOS, up to the share of one cut document.
    exact = sum(i != EOS for i in stream[:kept])
    assert exact - 1 <= blocks.bytes <= exact
    assert blocks.bytes_per_token == blocks.bytes / kept


def test_bytes_of_a_document_kept_in_part_count_in_proportion(tmp_path):
    # "ab" is one id and "c" another: 20 bytes in 10 ids + EOS, then 9 bytes in 9 ids + EOS of which 5 are kept.
    def encode(texts):
        return [[0 if letter == "a" else 1 for letter in text.replace("ab", "a")] for text in texts]

    blocks = pack_blocks(
        ["ab" * 10, "c" * 9], encode, block_size=16, eos_token_id=2, vocab_size=3, path=tmp_path / "a.bin"
    )
    assert blocks.bytes == 20 + round(9 * 5 / 10)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "uint16"), (65536, "uint32"), (200_000, "uint32")])
def test_large_ids_survive(tmp_path, vocab_size, dtype):
    ids = [0, 1, vocab_size - 2, vocab_size - 1]
    blocks = pack_blocks(
        ["x"], lambda texts: [ids], block_size=5, eos_token_id=3, vocab_size=vocab_size, path=tmp_path / "a.bin"
    )
    assert blocks[0].tolist() == [*ids, 3]
    assert blocks.info["dtype"] == dtype
    size = {"uint16": 2, "uint32": 4}[dtype]
    assert (tmp_path / "a.bin").read_bytes() == b"".join(i.to_bytes(size, "little") for i in [*ids, 3])


def test_blocks_pickle_as_their_path(tmp_path):
    blocks = pack(tmp_path / "a.bin", some_documents(400))
    data = pickle.dumps(blocks)
    assert len(data) < 500 < blocks.tokens
    assert (pickle.loads(data)[3] == blocks[3]).all()


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "there is no document to pack"),
        (["abc", "de"], {}, "the text has 7 tokens, fewer than one block of block_size=16; use block_size=7 or less"),
        (["abc" * 9], {"block_size": 0}, "block_size=0 must be at least 1 token"),
        (["abc" * 9], {"eos_token_id": 257}, r"eos_token_id=257 must be an id in \[0, 257\)"),
        (["abc" * 9], {"eos_token_id": -1}, r"eos_token_id=-1 must be an id"),
        (["abc" * 9], {"vocab_size": 98, "eos_token_id": 0}, r"span \[0, 99\], outside \[0, 98\); use vocab_size=100"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_nothing_is_written(tmp_path, documents, options, message):
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "new" / "a.bin", documents, **options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_encoders_are_refused(tmp_path):
    arguments = {"block_size": 2, "eos_token_id": 0, "vocab_size": 9, "path": tmp_path / "a.bin"}
    with pytest.raises(ValueError, match="encode_batch returned 1 lists of ids for 2 documents"):
        pack_blocks(["a", "b"], lambda texts: [[1]], **arguments)
    with pytest.raises(ValueError, match=r"ids that span \[-1, 1\], outside \[0, 9\)"):
        pack_blocks(["a"], lambda texts: [[1, -1]], **arguments)


def test_failure_while_packing_keeps_the_earlier_file(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_text, "TEXTS_PER_BATCH", 2)
    path = tmp_path / "a.bin"
    first = [block.tolist() for block in pack(path, some_documents(20))]
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.bin.json"]

    def broken_documents():
        yield from some_documents(15, seed=1)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        pack(path, broken_documents())
    assert [block.tolist() for block in PackedBlocks(path)] == first
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.bin.json"]
    second = pack(path, some_documents(15, seed=1))
    assert [block.tolist() for block in PackedBlocks(path)] == [block.tolist() for block in second] != first


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(ValueError, match="a.bin.json does not exist; pack the text again"):
        PackedBlocks(path)
    size = 2 * pack(path, some_documents(20)).tokens
    os.truncate(path, size - 2)
    with pytest.raises(ValueError, match=f"a.bin has {size - 2} bytes instead of {size}; pack the text again"):
        PackedBlocks(path)
    path.unlink()
    with pytest.raises(ValueError, match="a.bin does not exist"):
        PackedBlocks(path)
    for text in ["", "[]", "{}", json.dumps({"tokens": 3})]:
        (tmp_path / "a.bin.json").write_text(text)
        with pytest.raises(ValueError, match="a.bin.json does not describe packed blocks"):
            PackedBlocks(path)


# Order


def numbered_blocks(number, block_size=4):
    return [np.full(block_size, i, dtype=np.int64) for i in range(number)]


def test_every_epoch_visits_every_block_once_in_another_order():
    order = TrainingOrder(numbered_blocks(10), num_samples=35, seed=1)
    visited = [int(order[i]["input_ids"][0]) for i in range(len(order))]
    epochs = [visited[i : i + 10] for i in range(0, 40, 10)]
    assert [sorted(epoch) for epoch in epochs[:3]] == [list(range(10))] * 3
    assert len(epochs[3]) == len(set(epochs[3])) == 5
    assert len({tuple(epoch) for epoch in epochs[:3]}) == 3
    assert [int(order[i]["sample_number"]) for i in range(35)] == list(range(35))


def test_order_does_not_depend_on_the_way_it_is_read():
    order = TrainingOrder(numbered_blocks(7), num_samples=60, seed=5)
    expected = [int(order[i]["input_ids"][0]) for i in range(60)]
    backwards = TrainingOrder(numbered_blocks(7), num_samples=60, seed=5)
    assert [int(backwards[i]["input_ids"][0]) for i in reversed(range(60))] == expected[::-1]
    assert [int(sample["sample_number"]) for sample in order] == list(range(60))
    copied = pickle.loads(pickle.dumps(order))
    assert [int(copied[i]["input_ids"][0]) for i in range(60)] == expected
    other = TrainingOrder(numbered_blocks(7), num_samples=60, seed=6)
    assert [int(other[i]["input_ids"][0]) for i in range(60)] != expected


def test_first_blocks_of_the_epochs_are_uniform():
    epochs = 4000
    order = TrainingOrder(numbered_blocks(5), num_samples=5 * epochs, seed=0)
    counts = Counter(int(order[5 * epoch]["input_ids"][0]) for epoch in range(epochs))
    statistic = sum((counts[i] - epochs / 5) ** 2 / (epochs / 5) for i in range(5))
    assert statistic < 33.4  # chi-square with 4 degrees of freedom: exceeded once in a million random orders


def test_order_through_data_loader_workers_is_the_same(tmp_path):
    blocks = pack(tmp_path / "a.bin", some_documents(20))
    order = TrainingOrder(blocks, num_samples=2 * len(blocks) + 3, seed=2)
    expected = [order[i]["input_ids"].tolist() for i in range(len(order))]
    loader = DataLoader(order, batch_size=4, num_workers=2)
    batches = list(loader)
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == expected
    assert torch.cat([batch["sample_number"] for batch in batches]).tolist() == list(range(len(order)))
    assert all((batch["labels"] == batch["input_ids"]).all() for batch in batches)


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="there are no blocks to train on"):
        TrainingOrder([], num_samples=3, seed=0)
    order = TrainingOrder(numbered_blocks(2), num_samples=3, seed=0)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"sample {index} of 3"):
            order[index]


# Streams


def stream_blocks(documents, encode_batch=encode_bytes, **options):
    arguments = {"block_size": 16, "eos_token_id": EOS, "vocab_size": 257, "num_samples": 20}
    return StreamedBlocks(documents, encode_batch, **(arguments | options))


def test_stream_gives_the_blocks_of_all_passes_one_after_the_other(monkeypatch):
    monkeypatch.setattr(plain_text, "TEXTS_PER_BATCH", 3)
    passes = [some_documents(7, seed=number) for number in range(5)]
    stream = naive_stream(document for documents in passes for document in documents)
    assert len(naive_stream(passes[0])) % 16 and len(stream) >= 20 * 16
    samples = list(stream_blocks(passes.__getitem__))
    assert [sample["input_ids"].tolist() for sample in samples] == [stream[16 * i : 16 * i + 16] for i in range(20)]
    assert [sample["labels"].tolist() for sample in samples] == [sample["input_ids"].tolist() for sample in samples]
    assert [int(sample["sample_number"]) for sample in samples] == list(range(20))


def test_a_stream_resumes_at_the_position_of_any_sample(monkeypatch):
    """The same samples as the unbroken stream, from the position of each sample, at that sample and at later ones;
    documents before the position are not tokenised. Passes, empty documents and long ones are among them."""
    monkeypatch.setattr(plain_text, "TEXTS_PER_BATCH", 3)
    passes = [[*some_documents(5, seed=number), "", "x" * 50] for number in range(5)]
    encoded = []

    def encode(texts):
        encoded.extend(texts)
        return encode_bytes(texts)

    samples = [
        {name: value.tolist() for name, value in sample.items()}
        for sample in stream_blocks(passes.__getitem__, encode)
    ]
    assert len({tuple(sample["position"][1:]) for sample in samples}) == 20
    for sample in samples:
        number, number_of_pass, document, offset = sample["position"]
        text = [*passes[number_of_pass][document].encode(), EOS]
        assert number == sample["sample_number"] and text[offset] == sample["input_ids"][0]
        for start in range(number, 21, 3):
            stream = stream_blocks(passes.__getitem__, encode)
            stream.resume(start, tuple(sample["position"]))
            encoded.clear()
            found = [{name: value.tolist() for name, value in each.items()} for each in stream]
            assert found == samples[start:]
            assert encoded[0] == passes[number_of_pass][document]


def test_impossible_positions_are_refused():
    stream = stream_blocks(lambda number: ["x" * 40])
    with pytest.raises(ValueError, match=r"position \(5, 0, 1, 0\) is not before sample 4; use \(0, 0, 0, 0\)"):
        stream.resume(4, (5, 0, 1, 0))
    stream.resume(5, (5, 0, 1, 0))
    with pytest.raises(ValueError, match="pass 0 over the stream has no documents from 1 on; give a source that can"):
        next(iter(stream))


def test_stream_reads_no_further_than_it_must(monkeypatch):
    monkeypatch.setattr(plain_text, "TEXTS_PER_BATCH", 3)
    num_read = 0

    def endless(number):
        nonlocal num_read
        while True:
            num_read += 1
            yield "x" * 15

    assert len(list(stream_blocks(endless))) == 20
    assert num_read == 21


def test_stream_through_a_data_loader_worker_is_the_same():
    documents = some_documents(9)
    expected = [sample["input_ids"].tolist() for sample in stream_blocks(lambda number: documents)]
    loader = DataLoader(stream_blocks(lambda number: documents), batch_size=5, num_workers=1)
    assert [row for batch in loader for row in batch["input_ids"].tolist()] == expected


def test_impossible_streams_are_refused():
    for start in (-1, 21):
        with pytest.raises(ValueError, match=f"start={start} must lie in"):
            stream_blocks(lambda number: []).resume(start, (0, 0, 0, 0))
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        stream_blocks(lambda number: [], block_size=0)
    with pytest.raises(ValueError, match="pass 0 over the stream has no documents"):
        next(iter(stream_blocks(lambda number: [])))
    documents = iter(["x" * 40])  # an iterator instead of a fresh one per pass
    with pytest.raises(
        ValueError, match="pass 1 over the stream has no documents; give a source that can be read again"
    ):
        list(stream_blocks(lambda number: documents))
    with pytest.raises(ValueError, match="a stream cannot be shared by 2 workers; use dataloader_num_workers=1"):
        list(DataLoader(stream_blocks(lambda number: ["x" * 40]), num_workers=2))


# Batches


def samples_from(number, count, block_size=50):
    ids = torch.arange(block_size)
    return [
        {"input_ids": ids + i, "labels": ids + i, "sample_number": torch.tensor(i)}
        for i in range(number, number + count)
    ]


def test_collate_stacks():
    batch = collate(samples_from(6, 4), global_batch=3, seed=0)
    assert batch["input_ids"].tolist() == [list(range(i, i + 50)) for i in range(6, 10)]
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert batch["sample_number"].tolist() == [6, 7, 8, 9]


def test_micro_batches_of_a_step_are_cut_alike():
    lengths = set()
    for step in range(30):
        parts = [
            collate(samples_from(8 * step + 2 * part, 2), global_batch=8, seed=4, short_share=0.5) for part in range(4)
        ]
        step_lengths = {part[name].shape[1] for part in parts for name in ("input_ids", "labels")}
        assert step_lengths == {short_length(50, 4, step, 0.5)}
        assert all(part["input_ids"].tolist() == part["labels"].tolist() for part in parts)
        assert parts[1]["input_ids"][1, 0] == 8 * step + 3  # the beginning is kept
        lengths |= step_lengths
    assert 50 in lengths and len(lengths) > 5


def test_lengths_have_the_asked_distribution():
    counts = Counter(short_length(4, 9, step, 0.4) for step in range(5000))
    expected = {1: 500, 2: 500, 3: 500, 4: 3500}
    statistic = sum((counts[n] - expected[n]) ** 2 / expected[n] for n in expected)
    assert statistic < 30.7  # chi-square with 3 degrees of freedom: exceeded once in a million seeds
    assert sum(counts.values()) == sum(counts[n] for n in expected)
    assert {short_length(4, 9, step, 0.0) for step in range(100)} == {4}


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="short_share=1.5 must be a probability"):
        collate(samples_from(0, 2), global_batch=2, seed=0, short_share=1.5)
    with pytest.raises(ValueError, match="global_batch=0 must be at least 1"):
        collate(samples_from(0, 2), global_batch=0, seed=0)
    with pytest.raises(ValueError, match=r"samples of steps \[0, 1\]; use a batch size that divides global_batch=3"):
        collate(samples_from(0, 4), global_batch=3, seed=0, short_share=0.5)
