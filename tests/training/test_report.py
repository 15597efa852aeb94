"""The held-out numbers of a training run: training/report.py."""

from functools import partial

import pytest
import torch
from tokenizers import normalizers

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.data.packing import pack_blocks
from prime_v2.tokenization.bpe import train_bpe
from prime_v2.tokenization.plain_text import first_loss, plain_ids
from prime_v2.training.report import bytes_held, print_summary, score_dev, score_held_out

DOCUMENTS = [f"The {word} fox jumps over {word} dogs, again and again." for word in ("quick", "Slow", "red", "Blue")]


def make_tokenizer(lower: bool = False):
    tokenizer = build_tokenizer(train_bpe(DOCUMENTS, 270), special_tokens={"eos_token": "<|endoftext|>"})
    if lower:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def packed(tmp_path, tokenizer):
    return pack_blocks(
        DOCUMENTS * 8,
        partial(plain_ids, tokenizer),
        block_size=16,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=270,
        path=tmp_path / "dev",
        find_loss=partial(first_loss, tokenizer),
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    return PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=270, **shape))


def test_dev_scores_are_over_documents_and_count_the_bytes_of_the_text(model, tmp_path):
    tokenizer = make_tokenizer()
    blocks = packed(tmp_path, tokenizer)
    held = bytes_held(blocks)
    assert held == blocks.bytes_per_token
    scored = score_held_out(model, tokenizer, blocks.first(99), held, num_samples=1, keep_sequences=True)
    assert scored["interval_over"] == "documents"
    assert scored["text_bytes"] == blocks.bytes
    assert sum(scored["clusters"]["sequences"]) == len(blocks) and scored["num_clusters"] < len(blocks)
    dev = score_dev(model, tokenizer, blocks.first(99), 1, held)
    assert dev["eval_bound"] == scored["nats_per_token"]
    assert (dev["eval_bound_stderr"], dev["eval_bound_degrees"]) == (scored["stderr"], scored["degrees"])
    assert dev["eval_bits_per_byte"] == scored["bits_per_byte"]


def test_a_tokenizer_that_does_not_keep_the_text_has_no_bits_per_byte(model, tmp_path, capsys):
    tokenizer = make_tokenizer(lower=True)
    blocks = packed(tmp_path, tokenizer)
    assert blocks.tokenizer_loss.startswith("'The quick")
    assert bytes_held(blocks) is None
    dev = score_dev(model, tokenizer, blocks.first(4), 1, bytes_held(blocks))
    assert not any("byte" in name for name in dev)
    bound = score_held_out(model, tokenizer, blocks.first(4), None, num_samples=1)
    bound["tokenizer_loss"] = blocks.tokenizer_loss
    print_summary({"results": {"evaluation": {"bound": bound}, "samples": []}}, tmp_path)
    shown = capsys.readouterr().out
    assert "no bits/byte: the tokenizer does not keep the text: 'The quick" in shown
    assert "what bounds with 97.5% confidence is the upper end of its interval" in shown


def test_the_record_of_an_earlier_version_is_printed_too(model, tmp_path, capsys):
    """As when the command of a finished run is given again: its intervals took sequences as independent."""
    tokenizer = make_tokenizer()
    blocks = packed(tmp_path, tokenizer)
    bound = score_held_out(model, tokenizer, blocks.first(4), bytes_held(blocks), num_samples=1)
    for name in ("interval_over", "num_clusters", "degrees"):
        del bound[name]
    print_summary({"results": {"evaluation": {"bound": bound}, "samples": []}}, tmp_path)
    assert "intervals are 95%, over sequences and draws" in capsys.readouterr().out
