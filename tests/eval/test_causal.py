"""Exact likelihoods of causal models, held against Transformers' own loss and enumeration: eval/causal.py."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from prime_v2.eval import causal
from prime_v2.eval.causal import CausalScorer, start_token_id
from prime_v2.eval.loading import is_causal, load_config, load_scorer
from prime_v2.eval.perplexity import score_windows
from prime_v2.tokenization.bpe import train_bpe

VOCAB_SIZE = 40
START = 3


def gpt2(vocab_size=VOCAB_SIZE, positions=16, **options) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
    config = GPT2Config(vocab_size=vocab_size, n_positions=positions, **{**shape, "bos_token_id": START, **options})
    return GPT2LMHeadModel(config).eval()


def llama(vocab_size=VOCAB_SIZE, positions=16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        bos_token_id=START,
        initializer_range=0.5,
        **shape,
    )
    return LlamaForCausalLM(config).eval()


def draw(count: int, length: int, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def scorer() -> CausalScorer:
    return CausalScorer(gpt2())


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("make", [gpt2, llama])
def test_nats_are_those_of_transformers_own_loss(make):
    model = make()
    ids = draw(5, 12)
    result = CausalScorer(model).log_likelihood(ids)
    # Its labels are shifted inside: the first token is the start, and scores nothing.
    fed = torch.cat([torch.full((5, 1), START), ids], dim=1)
    for row, value in zip(fed, result.value, strict=True):
        loss = model(input_ids=row.unsqueeze(0), labels=row.unsqueeze(0)).loss
        assert float(-value) == pytest.approx(12 * loss.item(), rel=1e-5)  # float32 sums in another order
    assert result.value.dtype == torch.float64
    assert result.is_bound is True
    assert (result.stderr.tolist(), result.num_forward.tolist(), result.num_scored.tolist()) == (
        [0] * 5,
        [1] * 5,
        [12] * 5,
    )


def test_probabilities_of_all_sequences_sum_to_one():
    scorer = CausalScorer(gpt2(vocab_size=5))
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    assert float(scorer.log_likelihood(every).value.exp().sum()) == pytest.approx(1, rel=1e-5)


def test_a_prompt_is_given_and_the_parts_make_the_whole(scorer):
    ids = draw(4, 10)
    prompt = (torch.arange(10) < 6).expand(4, -1)
    given = scorer.log_likelihood(ids, prompt_mask=prompt)
    parts = scorer.log_likelihood(ids[:, :6]).value + given.value
    torch.testing.assert_close(parts, scorer.log_likelihood(ids).value, rtol=1e-5, atol=0)
    assert given.num_scored.tolist() == [4] * 4


def test_padding_on_any_side_and_the_other_rows_change_nothing(scorer):
    """By more than rounding: products of other shapes sum in another order."""
    rows = [draw(1, length)[0] for length in (3, 9, 6)]
    alone = torch.cat([scorer.log_likelihood(row.unsqueeze(0)).value for row in rows])
    for side in ("left", "right"):
        ids, mask = torch.full((3, 11), 7), torch.zeros(3, 11, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(11 - len(row), 11) if side == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = row, 1
        torch.testing.assert_close(scorer.log_likelihood(ids, mask).value, alone, rtol=1e-5, atol=0)
    blocks = draw(9, 16)
    together = scorer.log_likelihood(blocks).value
    alone = torch.cat([scorer.log_likelihood(row.unsqueeze(0)).value for row in blocks])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_passes_and_chunks_keep_to_their_sizes_and_change_nothing(scorer, monkeypatch):
    blocks = draw(9, 16)
    expected = scorer.log_likelihood(blocks).value
    logits, chunks = [], []
    forward, cross_entropy = scorer.model.forward, torch.nn.functional.cross_entropy

    def watched_forward(*arguments, **options):
        output = forward(*arguments, **options)
        logits.append(output.logits.numel())
        return output

    def watched_cross_entropy(chunk, *arguments, **options):
        chunks.append(chunk.numel())
        return cross_entropy(chunk, *arguments, **options)

    monkeypatch.setattr(scorer.model, "forward", watched_forward)
    monkeypatch.setattr(causal.functional, "cross_entropy", watched_cross_entropy)
    monkeypatch.setattr(causal, "LOGITS_PER_PASS", 2 * 16 * VOCAB_SIZE + 5)
    monkeypatch.setattr(causal, "LOGITS_PER_CHUNK", 7 * VOCAB_SIZE)
    torch.testing.assert_close(scorer.log_likelihood(blocks).value, expected, rtol=1e-5, atol=0)
    assert logits == [2 * 16 * VOCAB_SIZE] * 4 + [16 * VOCAB_SIZE]
    assert max(chunks) == 7 * VOCAB_SIZE
    assert sum(chunks) == blocks.numel() * VOCAB_SIZE


def test_only_the_logits_of_scored_tokens_are_copied(scorer, monkeypatch):
    chunks, cross_entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        causal.functional,
        "cross_entropy",
        lambda x, *rest, **options: chunks.append(len(x)) or cross_entropy(x, *rest, **options),
    )
    scorer.log_likelihood(draw(2, 16), prompt_mask=(torch.arange(16) < 13).expand(2, -1))
    assert chunks == [6]


def test_blocks_of_a_causal_model_are_scored_exactly(scorer):
    blocks = draw(6, 16)
    result = score_windows(scorer, [(blocks, None)], method="causal", num_samples=8)
    expected = -float(scorer.log_likelihood(blocks).value.sum()) / 96
    assert result["nats_per_token"] == pytest.approx(expected)
    assert (result["is_exact"], result["is_bound"], result["num_samples"], result["num_forward"]) == (True, True, 0, 6)
    assert result["monte_carlo_stderr"] == 0
    assert result["stderr"] > 0


def test_the_model_keeps_its_mode(scorer):
    scorer.model.train()
    scorer.log_likelihood(draw(1, 3))
    assert scorer.model.training
    scorer.model.eval()


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (draw(2, 4), {"method": "token"}, "method='token' is for diffusion models; a causal model has only 'causal'"),
        (draw(2, 4), {"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
        (draw(2, 4), {"num_samples": 1.5}, "num_samples=1.5 must be an integer of at least 1"),
        (draw(2, 4), {"seed": 1.5}, "seed=1.5 must be an integer"),
        (draw(2, 17), {}, "17 tokens are more than max_position_embeddings=16"),
        (draw(2, 4) + 30, {}, r"a likelihood is defined for ids in \[0, 39\]"),
        (draw(2, 4)[0], {}, r"give \(B, L\) with at least one token"),
        (draw(2, 4), {"prompt_mask": torch.ones(2, 4)}, "row 0 has no token to score"),
        (draw(2, 4), {"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\)"),
    ],
)
def test_bad_sequences_are_refused(scorer, ids, options, message):
    with pytest.raises(ValueError, match=message):
        scorer.log_likelihood(ids, **options)


def test_logits_that_are_no_numbers_are_refused():
    model = gpt2()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="the log-likelihood of row 0 is nan: the network's logits are not finite"):
        CausalScorer(model).log_likelihood(draw(2, 4))


def test_a_model_that_looks_ahead_is_refused():
    """BERT loads as a causal model; its attention goes both ways, and its loss is no likelihood."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCAB_SIZE, bos_token_id=1, **shape)
    with pytest.raises(
        ValueError, match=r"the model \(type 'bert'\) is not causal: its logits depend on later tokens"
    ):
        CausalScorer(BertLMHeadModel(config).eval())
    config.is_decoder = True
    CausalScorer(BertLMHeadModel(config).eval())


def test_windows_start_with_bos_or_eos_of_the_tokenizer_or_else_of_the_config():
    class Tokenizer:
        bos_token_id: int | None = None
        eos_token_id: int | None = None

    tokenizer, config = Tokenizer(), GPT2Config(vocab_size=10, bos_token_id=None, eos_token_id=[7, 8])
    assert start_token_id(config, tokenizer, 10) == 7
    config.bos_token_id = 6
    assert start_token_id(config, tokenizer, 10) == 6
    assert start_token_id(config, None, 10) == 6
    tokenizer.eos_token_id = 5
    assert start_token_id(config, tokenizer, 10) == 5
    tokenizer.bos_token_id = 4
    assert start_token_id(config, tokenizer, 10) == 4
    tokenizer.bos_token_id = 10  # not in the vocabulary
    assert start_token_id(config, tokenizer, 10) == 5
    with pytest.raises(ValueError, match="has a BOS or EOS token to start a window with; set bos_token"):
        CausalScorer(gpt2(bos_token_id=None, eos_token_id=None))


# ------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def folder(tmp_path) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(["a small text for a small tokenizer"], 260), eos_token="<|endoftext|>"
    )
    gpt2(vocab_size=260, bos_token_id=50256, eos_token_id=50256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_causal_checkpoint_is_loaded_with_its_tokenizer(folder):
    scorer, tokenizer = load_scorer(folder, "cpu")
    assert isinstance(scorer, CausalScorer)
    assert (scorer.dtype, scorer.device.type, scorer.max_length) == (torch.float32, "cpu", 16)
    assert scorer.start_token_id == tokenizer.eos_token_id == 0
    ids = draw(2, 5)
    expected = CausalScorer(gpt2(vocab_size=260), tokenizer).log_likelihood(ids).value
    torch.testing.assert_close(scorer.log_likelihood(ids).value, expected)
    assert is_causal(folder)
    assert load_config(folder).max_position_embeddings == 16


def test_code_of_a_causal_checkpoint_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('run')")
    assert type(load_scorer(folder, "cpu")[0].model) is GPT2LMHeadModel


def test_checkpoints_that_cannot_be_scored_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        (
            {"model_type": "t5"},
            "holds a model of type 't5'; only prime_v2, .*_interpolating and causal language models of Transf",
        ),
        ({"model_type": "strange"}, "holds a model of type 'strange'; only prime_v2, "),
        ({"n_layer": 3}, "lack 12 tensors that config.json asks for"),
        ({"n_embd": 32}, "have other shapes for"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_scorer(folder, "cpu")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # what pickle would be asked to read
    with pytest.raises(ValueError, match="has its weights in pytorch_model.bin, a pickle, which can run code"):
        load_scorer(folder, "cpu")
