"""Spectra of matrices, held against closed forms and plain loops: studies/analysis/spectra.py."""

import math

import numpy as np
import pytest
import torch
from networks import causal_model, small_model
from scipy import stats
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from prime_v2.studies.analysis.spectra import (
    analyze_matrices,
    closest_tail,
    effective_rank,
    gaussian_spectrum,
    other_matrices,
    projection_matrices,
    shown_ranks,
    singular_values,
    spectrum,
    stable_rank,
    tail_exponent,
)


def with_values(values: np.ndarray, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values between random orthogonal ones."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(generator.standard_normal((columns, len(values))))
    return torch.from_numpy((left * values) @ right.T)


def test_an_orthogonal_matrix_has_full_ranks_and_no_tail():
    numbers = spectrum(singular_values(with_values(np.full(30, 2.0), 30, 30)), 30, 30)
    for name in ("stable_rank", "effective_rank"):
        assert numbers[name] == pytest.approx(30)
    assert (numbers["spectral_norm"], numbers["frobenius_norm"]) == pytest.approx((2, 2 * math.sqrt(30)), rel=1e-5)
    assert numbers["tail"] is None and numbers["closest_tail"] is None


def test_a_matrix_of_rank_one_has_ranks_of_one_and_no_tail():
    numbers = spectrum(singular_values(with_values(np.array([3.0]), 40, 25)), 40, 25)
    for name in ("stable_rank", "effective_rank"):
        assert numbers[name] == pytest.approx(1)  # the other values are rounding, 1e-16 of it
    assert numbers["tail"] is None and numbers["closest_tail"] is None


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 12), (0.9, 40)])
def test_ranks_of_a_geometric_spectrum_are_the_closed_form(ratio, count):
    values = singular_values(with_values(ratio ** np.arange(count), 60, 50))[:count]
    assert stable_rank(values) == pytest.approx((1 - ratio ** (2 * count)) / (1 - ratio**2))
    # p_k = c r^k with c = (1 - r) / (1 - r^n): entropy -ln c - E[k] ln r.
    mean = ratio / (1 - ratio) - count * ratio**count / (1 - ratio**count)
    entropy = -math.log((1 - ratio) / (1 - ratio**count)) - mean * math.log(ratio)
    assert effective_rank(values) == pytest.approx(math.exp(entropy))


def test_ranks_do_not_depend_on_scale_or_transposition():
    weight = torch.randn(20, 35, generator=torch.Generator().manual_seed(0))
    values = singular_values(weight)
    for other in (singular_values(weight.T), singular_values(7 * weight) / 7):
        np.testing.assert_allclose(other, values, rtol=1e-6)  # float32 weights times 7
    assert stable_rank(7 * values) == pytest.approx(stable_rank(values))
    assert effective_rank(7 * values) == pytest.approx(effective_rank(values))


def test_a_record_holds_the_largest_values_and_some_of_the_others():
    assert shown_ranks(1) == [1]
    assert shown_ranks(5) == [1, 2, 3, 4, 5]
    ranks = shown_ranks(1000)
    assert (ranks[:3], ranks[-1], len(ranks)) == ([1, 2, 5], 1000, 32)
    values = np.sort(np.random.default_rng(0).random(1000))[::-1]
    shown = spectrum(values, 1000, 1000)["singular_values"]
    np.testing.assert_allclose(shown, values[np.array(ranks) - 1], rtol=1e-5)  # 6 digits


def test_a_zero_matrix_has_no_ranks():
    numbers = spectrum(singular_values(torch.zeros(12, 15)), 12, 15)
    assert [numbers[name] for name in ("stable_rank", "effective_rank", "tail", "closest_tail")] == [None] * 4
    assert numbers["spectral_norm"] == 0


def pareto(exponent: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws of the density (exponent - 1) x^-exponent, x > 1."""
    return generator.random(count) ** (-1 / (exponent - 1))


@pytest.mark.parametrize("exponent", [1.7, 3.0, 6.0])
def test_exponents_of_pareto_samples_are_recovered_within_their_standard_errors(exponent):
    """Seeded. Over a cut-off that is an order statistic, size / (estimate - 1) is Gamma(size) / (exponent - 1).

    For another seed either check fails with a chance below 1e-6: the sum over 400 samples of 50 has a relative
    deviation of 1 / sqrt(20000), 5 of which are allowed, and the share of 400 intervals that hold the exponent one of
    0.011 around 0.949 (by the Gamma law), 5 of which are 0.055.
    """
    generator = np.random.default_rng(0)
    fits = [tail_exponent(pareto(exponent, 500, generator)) for _ in range(400)]
    assert {each.size for each in fits} == {50}
    sums = sum(50 / (each.exponent - 1) for each in fits)
    assert sums * (exponent - 1) == pytest.approx(400 * 50, rel=5 / math.sqrt(400 * 50))
    held = [abs(each.exponent - exponent) < 1.96 * each.stderr for each in fits]
    assert np.mean(held) == pytest.approx(0.949, abs=0.055)


def test_the_estimate_is_the_maximum_of_the_likelihood():
    sample = np.sort(pareto(2.5, 200, np.random.default_rng(1)))[::-1]
    fit = tail_exponent(sample, 80)
    assert fit.cutoff == pytest.approx(sample[80])
    above = sample[:80]

    def log_likelihood(exponent: float) -> float:
        return float(np.log((exponent - 1) / fit.cutoff * (above / fit.cutoff) ** -exponent).sum())

    step = 1e-3
    around = [log_likelihood(fit.exponent + shift) for shift in (-step, 0, step)]
    assert around[1] > max(around[0], around[2])
    # The standard error is that of the curvature, -1 / variance.
    assert (around[0] - 2 * around[1] + around[2]) / step**2 == pytest.approx(-1 / fit.stderr**2, rel=1e-3)


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    sample = np.random.default_rng(2).exponential(size=300)
    for size in (10, 60, 299):
        fit = tail_exponent(sample, size)
        above = np.sort(sample)[::-1][:size] / fit.cutoff
        expected = stats.kstest(above, lambda x, exponent=fit.exponent: 1 - x ** (1 - exponent)).statistic
        assert fit.distance == pytest.approx(expected)


def test_the_closest_tail_is_the_best_of_all_and_finds_where_a_power_law_begins():
    """Seeded: uniform below 1, Pareto above. Within 4 standard errors, a chance of 1e-4 for another seed."""
    generator = np.random.default_rng(3)
    sample = np.concatenate([generator.random(600), pareto(3.0, 300, generator)])
    closest = closest_tail(sample)
    every = [tail_exponent(sample, size) for size in range(90, 900)]  # a tenth of them, and more
    assert closest == min(every, key=lambda each: each.distance)
    assert 0.8 < closest.cutoff < 1.5
    assert abs(closest.exponent - 3.0) < 4 * closest.stderr


def test_a_fixed_share_scatters_less_than_the_closest_tail_where_there_is_no_tail():
    """Seeded, 60 Gaussian matrices of order 96, as docs/analysis.md says: by a tenth, and by a third.

    The margins are 5 standard errors of a relative deviation r, r / sqrt(2 * 60): less than 1e-6 for another seed.
    """
    found = [gaussian_spectrum(96, 96, seed) for seed in range(60)]
    fixed, closest = (np.array([each[name]["exponent"] for each in found]) for name in ("tail", "closest_tail"))
    assert fixed.std() / fixed.mean() == pytest.approx(0.1, abs=0.05)
    assert closest.std() / closest.mean() == pytest.approx(0.33, abs=0.15)
    assert fixed.min() > 4


def test_too_few_eigenvalues_have_no_tail():
    sample = pareto(2.0, 11, np.random.default_rng(0))
    assert tail_exponent(sample).size == 10
    for values in (sample[:10], np.array([]), np.concatenate([sample[:10], np.zeros(50)])):
        assert tail_exponent(values) is None and closest_tail(values) is None
    assert tail_exponent(sample, 11) is None


@pytest.mark.parametrize(("rows", "columns"), [(30, 12), (12, 30), (15, 15)])
def test_the_gaussian_reference_has_the_law_of_a_gaussian_matrix(rows, columns):
    """Seeded. Means over 300 draws each way; 5 standard errors of the difference, a chance of 1e-6 a number."""
    generator = np.random.default_rng(0)
    direct = [
        spectrum(np.linalg.svd(generator.standard_normal((rows, columns)), compute_uv=False), rows, columns)
        for _ in range(300)
    ]
    drawn = [gaussian_spectrum(rows, columns, seed) for seed in range(300)]
    for name in ("stable_rank", "effective_rank", "spectral_norm", "frobenius_norm"):
        one, other = (np.array([each[name] for each in found]) for found in (direct, drawn))
        assert abs(one.mean() - other.mean()) < 5 * math.sqrt((one.var() + other.var()) / 300)
    assert gaussian_spectrum(rows, columns, 5) == drawn[5]


def test_matrices_of_a_masked_diffusion_model_are_found_by_layer():
    model = small_model()
    found = projection_matrices(model)
    kinds = ["q", "k", "v", "o", "gate", "up", "down"]
    assert [(each.layer, each.kind) for each in found] == [
        *((layer, kind) for layer in (0, 1) for kind in kinds),
        (None, "embedding"),
        (None, "head"),
    ]
    state = model.state_dict()
    for each in found:
        torch.testing.assert_close(each.weight, state[f"{each.name}.weight"], rtol=0, atol=0)
    assert found[4].weight.shape == (24, 16)
    assert other_matrices(model, found) == []
    results = analyze_matrices(model)
    assert [each["name"] for each in results] == [each.name for each in found]
    expected = np.linalg.svd(found[4].weight.detach().double().numpy(), compute_uv=False)
    np.testing.assert_allclose(results[4]["singular_values"], expected, rtol=1e-5)  # 6 digits


def test_the_parts_of_gpt2s_fused_projection_are_those_that_it_computes_with():
    network = causal_model().model
    found = {(each.layer, each.kind): each for each in projection_matrices(network)}
    assert {kind for _, kind in found} == {"q", "k", "v", "o", "up", "down", "embedding"}
    attention = network.transformer.h[1].attn
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for kind, part in zip("qkv", attention.c_attn(states).split(16, dim=1), strict=True):
        matrix = found[1, kind]
        torch.testing.assert_close(states @ matrix.weight.T + attention.c_attn.bias[:16] * 0, part)  # zero biases
        assert matrix.name == f"transformer.h.1.attn.c_attn[{kind}]"
    assert found[0, "o"].name == "transformer.h.0.attn.c_proj"
    assert (found[0, "down"].name, found[0, "down"].weight.shape) == ("transformer.h.0.mlp.c_proj", (16, 64))
    # The head is the embedding, and positions are no projection.
    assert other_matrices(network, list(found.values())) == ["transformer.wpe.weight"]


def test_opt_and_llama_with_few_keys_are_read_by_their_names():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(vocab_size=11, word_embed_proj_dim=16, max_position_embeddings=32, **shape))
    assert [each.kind for each in projection_matrices(opt)] == ["q", "k", "v", "o", "up", "down", "embedding"]
    llama = projection_matrices(causal_model(LlamaForCausalLM).model)
    assert {each.kind: tuple(each.weight.shape) for each in llama[:3]} == {"q": (16, 16), "k": (8, 16), "v": (8, 16)}


def test_networks_whose_projections_are_not_known_are_refused():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=11, **shape))
    message = (
        r"layer 0 of the model \(type 'gpt_neox'\) has no q, k, v, o projection by a known name, but dense, "
        r"dense_4h_to_h, dense_h_to_4h, query_key_value; use a model with q_proj"
    )
    with pytest.raises(ValueError, match=message):
        projection_matrices(network)
    model = small_model()
    model.model.layers[1].self_attn.other = model.model.layers[1].self_attn.v_proj
    del model.model.layers[1].self_attn.v_proj
    with pytest.raises(ValueError, match=r"layer 1 .* has no v projection by a known name, but .*other"):
        projection_matrices(model)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds weights that are not finite; give a"):
        analyze_matrices(model)
