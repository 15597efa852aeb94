"""The judge: exact nats of what it reads, of its own or of other tokens; MAUVE."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_runs import DOCUMENTS
from networks import small_config, small_model

from prime_v2 import build_tokenizer
from prime_v2.studies.quality.judge import Judge, check_judge, check_mauve, mauve_of
from prime_v2.studies.quality.statistics import check_self_bleu
from prime_v2.tokenization.bpe import train_bpe


def tokenizer_of(vocab_size: int):
    return build_tokenizer(train_bpe(DOCUMENTS, vocab_size), special_tokens={"eos_token": "<|endoftext|>"})


@pytest.fixture(scope="module")
def own():
    return tokenizer_of(280)


@pytest.fixture(scope="module")
def arm():
    return small_model("arm", vocab_size=280, bos_token_id=0, eos_token_id=0, max_position_embeddings=32)


@torch.no_grad()
def nats(arm, ids: list[int], first: int) -> float:
    """-log p of the ids from `first` on, one step of the network at a time."""
    total = 0.0
    for place in range(first, len(ids)):
        fed = torch.tensor([[0, *ids[:place]]])
        total -= float(arm(input_ids=fed).logits[0, -1].log_softmax(-1)[ids[place]])
    return total


def test_the_judge_gives_the_exact_nats_of_ids_in_its_own_tokens(arm, own):
    ids = torch.randint(0, 280, (3, 12), generator=torch.Generator().manual_seed(0))
    judge = Judge(arm, own, own)
    for prompt in (0, 4):
        found = judge.read(ids, prompt)
        assert not judge.re_encodes and found.cut == 0
        np.testing.assert_array_equal(found.texts, ids[:, prompt:].numpy())
        expected = [nats(arm, row.tolist(), prompt) for row in ids]
        np.testing.assert_allclose(found.nats, expected, rtol=1e-5)  # float32 logits


def test_other_tokens_are_decoded_and_encoded_anew_document_by_document(arm, own):
    other = tokenizer_of(300)
    assert other.get_vocab() != own.get_vocab()
    row = [*other(DOCUMENTS[0][:9])["input_ids"], 0, *other(DOCUMENTS[1][:12])["input_ids"]]
    judge = Judge(arm, own, other)
    found = judge.read(torch.tensor([row]), 0)
    expected = [*own(DOCUMENTS[0][:9])["input_ids"], 0, *own(DOCUMENTS[1][:12])["input_ids"]]
    assert judge.re_encodes
    assert found.texts[0].tolist() == expected
    np.testing.assert_allclose(found.nats, [nats(arm, expected, 0)], rtol=1e-5)
    given = judge.read(torch.tensor([row]), 3)
    assert given.texts[0].tolist()[-1] == expected[-1]
    assert len(given.texts[0]) < len(expected)


def test_re_encoded_texts_that_are_too_long_are_cut_and_counted(arm, own):
    other = tokenizer_of(300)
    row = [*other(" ".join(DOCUMENTS))["input_ids"]][:60]
    found = Judge(arm, own, other).read(torch.tensor([row]), 0)
    assert (found.cut, len(found.texts[0])) == (1, 32)


def test_a_text_longer_than_the_judge_reads_is_refused(arm, own):
    judge = Judge(arm, own, own)
    judge.check(32)
    with pytest.raises(ValueError, match="reads 32 tokens at most, not length=33; use 32 or another judge"):
        judge.check(33)


def test_a_judge_that_has_only_a_bound_is_refused():
    check_judge(small_config("arm"))
    with pytest.raises(ValueError, match="family MDM-Prime-v2, which has a bound of a text's likelihood only"):
        check_judge(small_config("prime"))


def test_features_are_the_last_hidden_state_that_the_head_reads(arm, own):
    ids = np.array([5, 9, 77])
    (found,) = Judge(arm, own, own).features([ids])
    logits = arm(input_ids=torch.tensor([[0, 5, 9, 77]])).logits[0, -1]
    with torch.no_grad():
        np.testing.assert_allclose(arm.lm_head(torch.from_numpy(found)), logits.detach(), rtol=1e-4, atol=1e-5)


def test_without_its_package_self_bleu_is_refused_before_the_work(monkeypatch):
    check_self_bleu()
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match="needs the package sacrebleu; pip install sacrebleu"):
        check_self_bleu()


def test_mauve_is_asked_for_by_name_and_refused_in_a_sentence_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match="needs the package mauve-text"):
        check_mauve(100)
    calls = {}

    def compute_mauve(**options):
        calls.update(options)
        return SimpleNamespace(mauve=np.float64(0.5))

    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compute_mauve))
    check_mauve(64)
    with pytest.raises(ValueError, match="MAUVE needs at least 64 samples, not 63; draw 64"):
        check_mauve(63)
    assert mauve_of(np.zeros((3, 2)), np.ones((3, 2)), seed=4) == 0.5
    assert (calls["seed"], calls["p_features"][0, 0], calls["q_features"][0, 0]) == (4, 1, 0)
