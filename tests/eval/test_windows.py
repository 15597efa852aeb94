"""Documents to tokens and tokens to windows: eval/windows.py."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, MambaConfig, PreTrainedTokenizerFast

from prime_v2 import build_tokenizer
from prime_v2.eval.windows import cut_windows, encode_documents, window_and_stride
from prime_v2.tokenization.bpe import train_bpe

TEXT = ["the quick brown fox jumps over the lazy dog", "naïve café — ünïcode €", "a <|endoftext|> in a text"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(train_bpe(TEXT, 270), special_tokens={"eos_token": "<|endoftext|>"})


def test_documents_are_joined_by_eos_and_what_spells_it_stays_text(tokenizer):
    text = encode_documents(tokenizer, TEXT)
    assert (text.ids == tokenizer.eos_token_id).sum() == 2
    assert text.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(text.ids) == "<|endoftext|>".join(TEXT)
    assert (text.num_documents, text.text_bytes) == (3, sum(len(text.encode()) for text in TEXT))
    assert text.loss is None


def test_the_tokens_of_a_document_share_its_bytes_and_eos_has_none(tokenizer):
    text = encode_documents(tokenizer, TEXT)
    ends = [*(text.ids == tokenizer.eos_token_id).nonzero().flatten().tolist(), len(text.ids)]
    start = 0
    for document, end in zip(TEXT, ends, strict=True):
        sizes = text.token_bytes[start:end]
        assert sizes.sum().item() == pytest.approx(len(document.encode()))
        assert (sizes == sizes[0]).all()
        start = end + 1
    assert text.token_bytes[ends[:-1]].tolist() == [0, 0]


def test_the_models_eos_stands_in_for_that_of_the_tokenizer():
    without_eos = build_tokenizer(train_bpe(TEXT, 270))
    assert encode_documents(without_eos, ["a", "b"], [3, 4]).ids[1] == 3


def word_tokenizer(*words: str, **parts) -> PreTrainedTokenizerFast:
    """Whole words and [UNK], joined by spaces when decoded."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_text_that_does_not_come_back_is_named_where_it_begins_to_differ():
    lower = word_tokenizer("the", "fox", normalizer=normalizers.Lowercase())
    assert encode_documents(lower, ["the fox"]).loss is None
    assert encode_documents(lower, ["the Fox"]).loss == "'the Fox' comes back as 'the fox'"
    assert encode_documents(lower, ["the cat"]).loss == "'the cat' comes back as 'the'"
    assert encode_documents(lower, ["the  fox"]).loss == "'the  fox' comes back as 'the fox'"
    late = encode_documents(lower, ["the " * 20 + "dog"]).loss
    assert late == "' the the the dog' comes back as ' the the the'"


def test_a_space_that_a_tokenizer_puts_in_front_is_no_loss():
    """As Llama's: a text begins with a space that is not in it."""
    backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode(tokenizer("ab a")["input_ids"]) == " ab a"
    assert encode_documents(tokenizer, ["ab a"]).loss is None


@pytest.mark.parametrize(("window", "stride"), [(5, 5), (5, 2), (5, 1), (1, 1), (7, 6)])
def test_every_token_is_scored_once_given_at_least_window_minus_stride_earlier_ones(window, stride):
    for total in range(1, 4 * window + 2):
        scored = []
        for ids, prompt_mask in cut_windows(torch.arange(total), window, stride):
            assert ids.shape[1] <= window
            for row, is_prompt in zip(ids, torch.zeros_like(ids) if prompt_mask is None else prompt_mask, strict=True):
                new = row[~is_prompt.bool()]
                assert (row.diff() == 1).all() and len(new)
                assert int(new[0] - row[0]) == (window - stride if row[0] else 0)
                scored += new.tolist()
        assert scored == list(range(total))


def test_a_stride_of_the_window_gives_disjoint_windows_without_prompts():
    whole, last = cut_windows(torch.arange(14), 4, 4)
    assert whole[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert last[0].tolist() == [[12, 13]]
    assert whole[1] is None and last[1] is None


def test_the_window_is_the_smallest_limit_of_the_models():
    limits = [GPT2Config(n_positions=16), GPT2Config(n_positions=12), MambaConfig()]
    assert window_and_stride(limits, None, None) == (12, 12)
    assert window_and_stride(limits, 9, None) == (9, 9)
    assert window_and_stride(limits[2:], 5000, 7) == (5000, 7)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (13, None, "window=13 must be between 1 and max_position_embeddings=12"),
        (0, None, "window=0 must be between 1"),
        (8, 9, "stride=9 must be between 1 and window=8"),
        (None, 0, "stride=0 must be between 1 and window=12"),
    ],
)
def test_impossible_windows_are_refused(window, stride, message):
    with pytest.raises(ValueError, match=message):
        window_and_stride([GPT2Config(n_positions=12)], window, stride)


def test_a_model_without_a_limit_needs_a_window():
    with pytest.raises(ValueError, match="has no max_position_embeddings; give the window, e.g. 1024"):
        window_and_stride([MambaConfig()], None, None)
