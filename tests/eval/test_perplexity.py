"""Sums over sequences, their errors, and what may be said of them: eval/perplexity.py."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import normalizers

from prime_v2 import (
    PrimeV2Config,
    PrimeV2ForInterpolatingDiffusion,
    PrimeV2ForMaskedDiffusion,
    PrimeV2InterpolatingConfig,
    PrimeV2LogLikelihood,
    build_tokenizer,
)
from prime_v2.commands.ppl import render_score
from prime_v2.eval.intervals import UPPER_END, half_width
from prime_v2.eval.perplexity import score_text, score_windows
from prime_v2.eval.windows import encode_documents
from prime_v2.likelihood_output_prime_v2 import NotFiniteError
from prime_v2.tokenization.bpe import train_bpe

TEXT = ["the quick brown fox jumps over the lazy dog", "naïve café — ünïcode €", "a <|endoftext|> in a text"]
NEVER_WITHOUT_BOUND = ("perplexity", "perplexity_interval_95", "bits_per_byte", "bits_per_byte_interval_95")


def make_model(**options) -> PrimeV2ForMaskedDiffusion:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    return PrimeV2ForMaskedDiffusion(PrimeV2Config(**{"vocab_size": 16, "initializer_range": 0.5, **shape, **options}))


@pytest.fixture(scope="module")
def model() -> PrimeV2ForMaskedDiffusion:
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(train_bpe(TEXT, 270), special_tokens={"eos_token": "<|endoftext|>"})


def draw(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(16, (count, length), generator=torch.Generator().manual_seed(seed))


def score_blocks(model, blocks, **options):
    """Windows of one length that are scored whole."""
    return score_windows(model, [(blocks, None)], **options)


def test_nats_per_token_are_those_of_the_sequences_scored_one_by_one(model):
    blocks = draw(9, 6)
    alone = [model.log_likelihood(row.unsqueeze(0), num_samples=4, seed=3) for row in blocks]
    result = score_blocks(model, blocks, num_samples=4, seed=3)
    # float32 sums in another order.
    assert result["nats_per_token"] == pytest.approx(-sum(float(each.value) for each in alone) / 54, rel=1e-5)
    errors = math.sqrt(sum(float(each.stderr) ** 2 for each in alone)) / 54
    assert result["monte_carlo_stderr"] == pytest.approx(errors, rel=1e-4)
    assert (result["num_tokens"], result["num_sequences"], result["num_samples"]) == (54, 9, 4)
    assert result["num_forward"] == 9 * 4
    assert (result["method"], result["is_bound"]) == ("subtoken", True)


def test_a_network_that_knows_nothing_has_the_nats_of_the_uniform_distribution():
    """V = 2**S, so that the marginals of the digits are uniform too, and every draw gives log V exactly."""
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    for method in ("subtoken", "token", "chain"):
        result = score_blocks(model, draw(5, 8), method=method, text_bytes=100)
        assert result["nats_per_token"] == pytest.approx(math.log(16), rel=1e-6)
        assert result["perplexity"] == pytest.approx(16, rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(5 * 8 * 4 / 100, rel=1e-6)
        assert result["stderr"] == pytest.approx(0, abs=1e-6)


def test_stderr_of_equal_blocks_is_that_of_a_mean(model):
    blocks = draw(20, 5)
    per_token = -model.log_likelihood(blocks, num_samples=8).value.numpy() / 5
    result = score_blocks(model, blocks)
    assert result["stderr"] == pytest.approx(per_token.std(ddof=1) / math.sqrt(20), rel=1e-4)
    assert (result["degrees"], result["num_clusters"]) == (pytest.approx(19), 20)
    half = 2.093024 * result["stderr"]  # the 97.5% point of Student's t with 19 degrees of freedom
    low, high = result["perplexity_interval_95"]
    assert low == pytest.approx(math.exp(result["nats_per_token"] - half))
    assert high == pytest.approx(math.exp(result["nats_per_token"] + half))


def test_sequences_of_one_document_are_one_cluster(model):
    """EOS, here id 0, ends a document; without it the text is one, and the interval says that it is over stretches."""
    blocks = draw(6, 4).clamp(min=1)
    blocks[[1, 2, 5], 3] = 0  # documents of two, one and three blocks
    result = score_blocks(model, blocks, method="chain", eos_token_id=0, keep_sequences=True)
    assert result["clusters"] == {
        "sequences": [2, 1, 3],
        "squares": [64, 16, 144],
        "over": "documents",
        "tokens": [8, 4, 12],
    }
    assert (result["num_clusters"], result["interval_over"]) == (3, "documents")
    nats = -model.log_likelihood(blocks, method="chain").value.numpy()
    sums, tokens = np.array([nats[:2].sum(), nats[2], nats[3:].sum()]), np.array([8, 4, 12])
    residuals = (sums - nats.sum() / 24 * tokens) / (24 - tokens)  # what leaving a document out changes
    assert result["stderr"] == pytest.approx(math.sqrt(2 / 3 * (residuals**2).sum()), rel=1e-5)
    assert 1 < result["degrees"] < 2, "documents of unequal length are worth fewer than three"
    assert score_blocks(model, blocks, method="chain")["interval_over"] == "stretches"


def test_the_interval_of_bits_per_byte_takes_in_the_bytes_of_each_sequence(model):
    """Bytes in proportion to the nats of each document leave no variation; equal shares leave that of the nats."""
    blocks = draw(8, 6).clamp(min=1)
    blocks[:, -1] = 0
    nats = -model.log_likelihood(blocks, method="chain").value.numpy()
    options = {"method": "chain", "eos_token_id": 0}
    alike = score_blocks(model, blocks, text_bytes=nats * 7, **options)
    assert alike["bits_per_byte"] == pytest.approx(1 / 7 / math.log(2), rel=1e-5)
    low, high = alike["bits_per_byte_interval_95"]
    assert high - low == pytest.approx(0, abs=1e-5)
    equal = score_blocks(model, blocks, text_bytes=480, **options)
    share = 48 / 480 / math.log(2)  # bits a byte for a nat a token
    expected = [end * share for end in equal["nats_per_token_interval_95"]]
    assert equal["bits_per_byte_interval_95"] == pytest.approx(expected)
    assert equal["text_bytes"] == 480


class GaussianModel:
    """Its nats a token are 5, plus a normal effect of the text and the mean of normal draws, each with variance 1."""

    device = torch.device("cpu")
    config = SimpleNamespace(model_type="none")

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def log_likelihood(self, ids, method, num_samples, seed):
        count, length = ids.shape
        text, *draws = torch.randn(1 + num_samples, count, generator=self.generator, dtype=torch.double)
        draws = torch.stack(draws)
        return PrimeV2LogLikelihood(
            value=-length * (5 + text + draws.mean(0)),
            stderr=length * draws.std(0) / math.sqrt(num_samples),
            num_forward=torch.full((count,), num_samples),
            num_scored=torch.full((count,), length),
            is_bound=True,
        )


def test_errors_cover_the_text_and_the_draws():
    """1000 scores of 12 sequences: their z-scores are Student's t with 11 degrees of freedom, of variance 11/9.

    Seeded; for another seed it fails with a chance below 1e-4: the standard error of the measured variance is
    11/9 * sqrt((kurtosis - 1) / 1000) = 0.066, kurtosis 3 + 6/7.
    """
    model = GaussianModel()
    results = [score_blocks(model, draw(12, 4), num_samples=3) for _ in range(1000)]
    scores = [(each["nats_per_token"] - 5) / each["stderr"] for each in results]
    assert np.var(scores) == pytest.approx(11 / 9, abs=0.27)
    # The draws alone: variance 1 / (3 draws x 12 sequences), text effects left out; a mean of 1000 is within 3%.
    mean_square = np.mean([each["monte_carlo_stderr"] ** 2 for each in results])
    assert mean_square == pytest.approx(1 / 36, rel=0.03)


@pytest.mark.parametrize("num_windows", [2, 5])
def test_intervals_of_few_windows_cover(num_windows):
    """4,000 intervals, each of a few windows that are a document each: 95% hold 5 nats a token, within 5 standard
    errors of the coverage (0.34%): a false alarm has a chance below 1e-6. With the normal law 70% and 87% would."""
    model, windows = GaussianModel(), torch.ones(num_windows, 4, dtype=torch.long)
    windows[:, -1] = 0  # EOS
    found = [score_blocks(model, windows, num_samples=3, eos_token_id=0) for _ in range(4000)]
    intervals = [each["nats_per_token_interval_95"] for each in found]
    assert np.mean([low <= 5 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.017)
    normal = [abs(each["nats_per_token"] - 5) <= half_width(each["stderr"]) for each in found]
    assert np.mean(normal) == pytest.approx({2: 0.70, 5: 0.87}[num_windows], abs=0.04)


def test_an_interpolating_model_without_a_masked_share_is_exact_and_takes_one_pass():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    for alpha_0 in (0.0, 0.5):
        config = PrimeV2InterpolatingConfig(vocab_size=16, alpha_0=alpha_0, **shape)
        model = PrimeV2ForInterpolatingDiffusion(config)
        rows = []
        model.model.register_forward_pre_hook(lambda _, arguments, rows=rows: rows.append(len(arguments[0])))
        own = score_blocks(model, draw(3, 16), method="interpolating", num_samples=4)
        counted = sum(rows)
        chain = score_blocks(model, draw(3, 16), method="chain", num_samples=4)
        assert sum(rows) - counted == chain["num_forward"] == 3, "one pass a sequence, not one a token"
        assert chain["is_exact"] and chain["num_samples"] == 0
        assert own["is_exact"] == (alpha_0 == 0)
        assert (own["num_samples"], own["num_forward"]) == ((0, 3) if alpha_0 == 0 else (4, 12))
        if alpha_0 == 0:
            assert own["nats_per_token"] == pytest.approx(chain["nats_per_token"])
            assert "perplexity       = " in render_score(own), "a value, not a bound"


def test_what_is_not_a_bound_has_no_perplexity(model):
    result = score_blocks(model, draw(4, 6), method="paper_loss", text_bytes=50)
    assert result["is_bound"] is False
    assert not any(name in result for name in NEVER_WITHOUT_BOUND)
    assert not any("perplexity" in name or "bits" in name for name in result)


def test_the_papers_loss_is_a_bound_for_whole_tokens():
    model = make_model(num_subtokens=1)
    blocks = draw(4, 6)
    loss, bound = (score_blocks(model, blocks, method=name) for name in ("paper_loss", "subtoken"))
    assert loss["is_bound"]
    assert loss["perplexity"] == pytest.approx(bound["perplexity"], rel=1e-6)


def test_unigram_entropy_is_that_of_these_tokens(model):
    blocks = draw(3, 5)
    counts = Counter(blocks.flatten().tolist())
    expected = -sum(n / 15 * math.log(n / 15) for n in counts.values())
    assert score_blocks(model, blocks)["unigram_entropy"] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["subtoken", "paper_loss", "chain"])
def test_result_is_json_even_for_one_sequence_and_one_draw(model, method):
    result = score_blocks(model, draw(1, 4), method=method, num_samples=1, text_bytes=9)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["stderr"] is None
    if method == "chain":
        assert (result["monte_carlo_stderr"], result["num_samples"], result["num_forward"]) == (0.0, 0, 4)
    else:
        assert result["monte_carlo_stderr"] is None
    assert result.get("perplexity_interval_95") is None


def test_an_absurd_model_still_gives_numbers_that_json_holds():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    result = score_blocks(model, draw(3, 4), method="chain")
    assert result["nats_per_token"] > 700
    json.dumps(result, allow_nan=False)


def test_progress_counts_sequences_up_to_all_of_them(model):
    seen = []
    score_blocks(model, draw(20, 16), num_samples=128, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20)
    assert len(seen) > 1
    assert seen == sorted(seen)


def test_a_sequence_whose_logits_are_no_numbers_is_named_among_all(model):
    """Sequences are scored in several calls; the number is not that of the row in its call."""

    class Network:
        device, config = model.device, model.config

        def log_likelihood(self, ids, **options):
            bad = (ids == 15).all(1)
            if bad.any():
                raise NotFiniteError(int(bad.nonzero()[0]), math.nan)
            return model.log_likelihood(ids, **options)

    blocks = draw(40, 16)
    blocks[33] = 15
    message = "the log-likelihood of sequence 33 of 40 is no number: the network's logits are not finite"
    with pytest.raises(ValueError, match=message):
        score_blocks(Network(), blocks, num_samples=128)  # 16 sequences a call


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        (draw(2, 3), {"text_bytes": 0}, "text_bytes=0 must be at least 1"),
        (draw(2, 3), {"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
        (draw(2, 3), {"method": "guess"}, "method='guess' is not one of"),
        (draw(2, 3) + 14, {}, r"a likelihood is defined for ids in \[0, 15\]"),
        (draw(2, 17), {}, "max_position_embeddings=16"),
    ],
)
def test_bad_blocks_are_refused(model, blocks, options, message):
    with pytest.raises(ValueError, match=message):
        score_blocks(model, blocks, **options)


def test_text_is_scored_once_token_by_token_in_windows(tokenizer):
    model = make_model(vocab_size=270)
    ids = []
    for text in TEXT:
        ids += [tokenizer.eos_token_id] if ids else []
        ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) % 16  # so that there is a shorter last window
    windows = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    nats = -sum(float(model.log_likelihood(torch.tensor([each]), num_samples=8).value) for each in windows)

    result = score_text(model, tokenizer, iter(TEXT))
    text_bytes = sum(len(text.encode()) for text in TEXT)
    assert (result["num_tokens"], result["num_sequences"], result["num_documents"]) == (len(ids), len(windows), 3)
    assert result["text_bytes"] == text_bytes
    assert result["nats_per_token"] == pytest.approx(nats / len(ids), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_text_without_tokens_or_separator_is_refused(tokenizer):
    model = make_model(vocab_size=270)
    for documents in ([], [""]):
        with pytest.raises(ValueError, match=rf"no token to score \({len(documents)} documents\)"):
            score_text(model, tokenizer, documents)
    without_eos = build_tokenizer(train_bpe(TEXT, 270))
    with pytest.raises(ValueError, match="no eos_token to put between documents"):
        score_text(model, without_eos, TEXT)
    assert score_text(model, without_eos, TEXT[:1])["num_documents"] == 1


def test_strided_windows_are_the_sum_of_the_parts(tokenizer):
    """A stride is given as prompts to `log_likelihood`; each row's draws depend on the row alone."""
    model = make_model(vocab_size=270)
    ids = encode_documents(tokenizer, TEXT).ids
    result = score_text(model, tokenizer, TEXT, window=8, stride=3, num_samples=4, seed=5)
    nats, forward = 0.0, 0
    for start in range(0, len(ids), 3):
        row = ids[start : start + 8].unsqueeze(0)
        prompt = (torch.arange(row.shape[1]) < (5 if start else 0)).unsqueeze(0)
        if not prompt.all():
            nats -= float(model.log_likelihood(row, prompt_mask=prompt, num_samples=4, seed=5).value)
            forward += 4
    assert result["nats_per_token"] == pytest.approx(nats / len(ids), rel=1e-5)
    assert (result["num_tokens"], result["num_forward"]) == (len(ids), forward)
    assert (result["window"], result["stride"]) == (8, 3)
    counts = Counter(ids.tolist())
    expected = -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())
    assert result["unigram_entropy"] == pytest.approx(expected)


def test_the_default_window_is_the_models_and_the_stride_is_the_window(tokenizer):
    model = make_model(vocab_size=270)
    default = score_text(model, tokenizer, TEXT, num_samples=2)
    assert (default["window"], default["stride"]) == (16, 16)
    assert score_text(model, tokenizer, TEXT, num_samples=2, window=16, stride=16) == default


def test_intervals_of_nats_are_given_for_what_is_no_bound_too(model):
    for method in ("subtoken", "paper_loss"):
        result = score_blocks(model, draw(6, 6), method=method)
        low, high = result["nats_per_token_interval_95"]
        half = 2.570582 * result["stderr"]  # Student's t with 5 degrees of freedom
        assert [result["nats_per_token"] - low, high - result["nats_per_token"]] == pytest.approx([half, half])
        assert result["is_exact"] is False
    assert score_blocks(model, draw(1, 6))["nats_per_token_interval_95"] is None
    assert score_blocks(model, draw(1, 6), method="chain")["is_exact"] is True


def test_bits_per_byte_are_refused_where_the_tokens_do_not_hold_the_text(tokenizer):
    """A tokenizer that lower-cases codes another text, so its nats are not of the bytes that were given."""
    model = make_model(vocab_size=270)
    lower = build_tokenizer(train_bpe(TEXT, 270), special_tokens={"eos_token": "<|endoftext|>"})
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    kept, lost = (score_text(model, each, ["The Fox", "a fox"], num_samples=2) for each in (tokenizer, lower))
    assert "tokenizer_loss" not in kept and "bits_per_byte" in kept
    assert lost["tokenizer_loss"] == "'The Fox' comes back as 'the fox'"
    assert not any("byte" in name for name in lost)
    assert "bits per byte    none: the tokenizer does not keep the text: 'The Fox' comes" in render_score(lost)
    assert "bits per byte    ≤" in render_score(kept)


def test_what_is_printed_says_what_intervals_cover_and_which_end_bounds(tokenizer):
    model = make_model(vocab_size=270)
    score = score_text(model, tokenizer, TEXT * 3, num_samples=2)
    assert f"95% (Student's t), over documents and draws. {UPPER_END}" in render_score(score)
    exact = render_score(score_text(model, tokenizer, TEXT[:1], method="chain"))
    assert exact.endswith("over stretches of one text (not other documents)"), "no draws"
    assert UPPER_END not in exact, "an exact value is no bound"
