"""Spectra and attention, held against closed forms and plain loops: eval/analysis_spectra.py, eval/analysis.py."""

import math

import numpy as np
import pytest
import torch
from enumeration import small_model
from scipy import stats
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from prime_v2.eval import analysis
from prime_v2.eval.analysis import (
    STATISTICS,
    _inputs_of,
    attention_statistics,
    measure_attention,
    uniform_statistics,
)
from prime_v2.eval.analysis_spectra import (
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
from prime_v2.eval.causal import CausalScorer

LENGTH = 16


def causal_model(make=GPT2LMHeadModel, **options) -> CausalScorer:
    torch.manual_seed(0)
    if make is GPT2LMHeadModel:
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
        config = GPT2Config(vocab_size=11, bos_token_id=3, eos_token_id=3, **shape, **options)
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.5}
        config = LlamaConfig(
            vocab_size=11, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, **shape
        )
    return CausalScorer(make(config).eval())


def draw(count: int = 5, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(11, (count, length), generator=torch.Generator().manual_seed(seed))


def with_values(values: np.ndarray, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values between random orthogonal ones."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(generator.standard_normal((columns, len(values))))
    return torch.from_numpy((left * values) @ right.T)


# ------------------------------------------------------------------------------------------------- spectra


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


# ------------------------------------------------------------------------------------------------- matrices


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


# ------------------------------------------------------------------------------------------------- attention


def naive_statistics(weights: torch.Tensor, causal: bool) -> dict[str, torch.Tensor]:
    """The statistics of weights (N, heads, L, L) by loops over windows, heads, queries and keys; (heads,) each."""
    num_windows, heads, length, _ = weights.shape
    result = {name: torch.zeros(heads, dtype=torch.double) for name in STATISTICS}
    for head in range(heads):
        received = torch.zeros(num_windows, length, dtype=torch.double)
        for window in range(num_windows):
            for query in range(length):
                row = [float(each) for each in weights[window, head, query]]
                entropy = -sum(each * math.log(each) for each in row if each > 0)
                seen = query + 1 if causal else length
                share = 1 / (num_windows * length)
                result["first_position_mass"][head] += share * row[0]
                result["self_mass"][head] += share * row[query]
                result["neighbour_mass"][head] += share * sum(row[max(0, query - 1) : query + 2])
                result["entropy"][head] += share * entropy
                if seen > 1:
                    queries = num_windows * (length - causal)
                    result["relative_entropy"][head] += entropy / math.log(seen) / queries
                result["mean_distance"][head] += share * sum(abs(query - key) * each for key, each in enumerate(row))
                received[window] += torch.tensor(row, dtype=torch.double) / length
        result["top_in_window_mass"][head] = received.amax(1).mean()
        result["top_position_mass"][head] = received.mean(0).max()
    return result


@pytest.mark.parametrize("kind", ["masked", "clean", "gpt2", "llama"])
def test_statistics_are_those_of_plain_loops_over_the_networks_own_attention(kind):
    """The weights are those that Transformers gives for output_attentions."""
    causal = kind in ("gpt2", "llama")
    model = causal_model(LlamaForCausalLM if kind == "llama" else GPT2LMHeadModel) if causal else small_model()
    share = None if causal else 0.5 if kind == "masked" else 0.0
    windows = draw(3)
    found = measure_attention(model, windows, share)
    network = model.model if causal else model
    network.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = network(**_inputs_of(model, windows, share, 0), output_attentions=True).attentions
    assert found["layers"] == [0, 1] and len(attentions) == 2
    for layer, weights in enumerate(attentions):
        for name, values in naive_statistics(weights, causal).items():
            measured = found["statistics"][name]["mean"][layer]
            np.testing.assert_allclose(measured, values, rtol=1e-5, atol=1e-7, err_msg=name)  # float32, 6 digits
        received = weights.double().mean((0, 2))  # (heads, L)
        assert found["top_position"][layer] == received.argmax(1).tolist()


def test_standard_errors_are_those_over_windows():
    model, windows = small_model(), draw(4)
    found = measure_attention(model, windows, 0.5)["statistics"]
    each = [measure_attention(model, window.unsqueeze(0), 0.5)["statistics"] for window in windows]
    for name in set(STATISTICS) - {"top_position_mass"}:  # the top of one window is not that of all
        values = np.array([one[name]["mean"] for one in each])  # (windows, layers, heads)
        expected = values.std(0, ddof=1) / 2
        np.testing.assert_allclose(found[name]["stderr"], expected, rtol=1e-3, err_msg=name)  # of rounded values
        assert each[0][name]["stderr"] is None


def harmonic(count: int) -> float:
    return sum(1 / number for number in range(1, count + 1))


UNIFORM = {
    False: {
        "first_position_mass": 1 / LENGTH,
        "top_position_mass": 1 / LENGTH,
        "top_in_window_mass": 1 / LENGTH,
        "self_mass": 1 / LENGTH,
        "neighbour_mass": (3 * LENGTH - 2) / LENGTH**2,
        "entropy": math.log(LENGTH),
        "relative_entropy": 1.0,
        "mean_distance": (LENGTH**2 - 1) / (3 * LENGTH),
    },
    # Query i of 1..L sees i positions: 1/i on each, itself and (from the second on) one neighbour.
    True: {
        "first_position_mass": harmonic(LENGTH) / LENGTH,
        "top_position_mass": harmonic(LENGTH) / LENGTH,
        "top_in_window_mass": harmonic(LENGTH) / LENGTH,
        "self_mass": harmonic(LENGTH) / LENGTH,
        "neighbour_mass": (2 * harmonic(LENGTH) - 1) / LENGTH,
        "entropy": math.log(math.factorial(LENGTH)) / LENGTH,
        "relative_entropy": 1.0,
        "mean_distance": (LENGTH - 1) / 4,
    },
}


@pytest.mark.parametrize("causal", [False, True])
def test_uniform_attention_has_the_closed_form(causal):
    """Zero queries make every logit equal."""
    model = causal_model(LlamaForCausalLM) if causal else small_model()
    network = model.model if causal else model
    for each in projection_matrices(network):
        if each.kind == "q":
            nn.init.zeros_(each.weight)
    found = measure_attention(model, draw(), None if causal else 0.5)
    assert uniform_statistics(LENGTH, causal) == pytest.approx(UNIFORM[causal], rel=1e-12)
    assert found["uniform"] == uniform_statistics(LENGTH, causal)
    for name, expected in UNIFORM[causal].items():
        np.testing.assert_allclose(found["statistics"][name]["mean"], expected, rtol=1e-5, err_msg=name)  # float32
        np.testing.assert_allclose(found["statistics"][name]["stderr"], 0, atol=1e-6)


def test_attention_on_one_position_each_has_the_closed_form():
    """Each query attends to the next position, the last one to itself."""
    weights = torch.diag(torch.ones(LENGTH - 1), 1)
    weights[-1, -1] = 1
    found = attention_statistics(weights.expand(2, 3, LENGTH, LENGTH), causal=False)
    expected = {
        "first_position_mass": 0,
        "top_in_window_mass": 2 / LENGTH,
        "self_mass": 1 / LENGTH,
        "neighbour_mass": 1,
        "entropy": 0,
        "relative_entropy": 0,
        "mean_distance": (LENGTH - 1) / LENGTH,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.full((2, 3), value, dtype=torch.double), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_runs_repeat_themselves_and_passes_change_nothing(causal):
    """By more than the rounding of float32: products of other shapes sum in another order."""
    model = causal_model() if causal else small_model()
    share, windows, steps = None if causal else 0.5, draw(7), []
    whole = measure_attention(model, windows, share, progress=steps.append)
    assert steps == [7]
    assert measure_attention(model, windows, share) == whole
    for count in (1, 3):
        parts = measure_attention(model, windows, share, windows_per_pass=count)
        assert {key: parts[key] for key in parts if key != "statistics"} == {
            key: whole[key] for key in whole if key != "statistics"
        }
        for name in STATISTICS:
            for part in ("mean", "stderr"):
                one, other = (each["statistics"][name][part] for each in (parts, whole))
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6, err_msg=name)


def test_one_pass_of_one_layer_is_held_at_a_time(monkeypatch):
    seen = []

    def spy(weights, causal):
        seen.append(tuple(weights.shape))
        return attention_statistics(weights, causal)

    monkeypatch.setattr(analysis, "attention_statistics", spy)
    monkeypatch.setattr(analysis, "WEIGHTS_PER_PASS", 3 * 2 * LENGTH**2 + 1)
    measure_attention(small_model(), draw(7), 0.5)
    # Two layers a pass, three windows a pass; the last one is the reference of uniform attention.
    assert seen[:-1] == [(3, 2, LENGTH, LENGTH)] * 4 + [(1, 2, LENGTH, LENGTH)] * 2


def test_the_network_is_left_as_it_was():
    model = small_model().train()
    before = model.config._attn_implementation
    assert before != "eager"
    measure_attention(model, draw(), 0.5)
    assert model.config._attn_implementation == before and model.training
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="masked_share=2 must be"):
        measure_attention(model, draw(), 2)
    assert model.config._attn_implementation == before and model.training
    assert not any(module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------- what is fed

ORDERS = {
    "digit": {},
    "token": {"reveal_order": "token"},
    "nested": {"reveal_order": "nested", "stage_digits": [1, 4]},
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_level_is_the_share_of_hidden_units_of_the_models_own_order(order):
    model, ids = small_model(**ORDERS[order]), draw(6)
    digits = model.encode(ids)
    assert (_inputs_of(model, ids, 0, 0)["subtoken_ids"] == digits).all()
    assert (_inputs_of(model, ids, 1, 0)["subtoken_ids"] == model.config.base).all()
    fewer = None
    for share in (0.25, 0.5, 0.9):
        states = _inputs_of(model, ids, share, 0)["subtoken_ids"]
        hidden = states == model.config.base  # (6, L, 4)
        assert (states == torch.where(hidden, model.config.base, digits)).all()
        if order == "digit":
            units, num_units = hidden.sum((1, 2)), 4 * LENGTH
        elif order == "token":
            assert (hidden == hidden[..., :1]).all()
            units, num_units = hidden[..., 0].sum(1), LENGTH
        else:  # stages of 1 and 3 digits: hidden are the last 0, 3 or 4
            counts = hidden.sum(-1)
            assert set(counts.flatten().tolist()) <= {0, 3, 4} and (hidden[..., 1:] == hidden[..., 1:2]).all()
            units, num_units = (counts > 0).sum(1) + (counts == 4).sum(1), 2 * LENGTH
        assert (units == math.ceil(share * num_units)).all()
        # A higher level hides the same and more.
        assert fewer is None or (hidden | ~fewer).all()
        fewer = hidden


def test_masks_depend_on_the_seed_and_the_window_alone():
    model, ids = small_model(), draw(6)
    together = _inputs_of(model, ids, 0.5, 3)["subtoken_ids"]
    alone = torch.cat([_inputs_of(model, row.unsqueeze(0), 0.5, 3)["subtoken_ids"] for row in ids])
    assert (together == alone).all()
    assert (together != _inputs_of(model, ids, 0.5, 4)["subtoken_ids"]).any()
    masks = together == model.config.base
    assert len({tuple(each.flatten().tolist()) for each in masks}) == 6


def test_the_result_says_what_was_fed_and_how_much_was_hidden():
    found = measure_attention(small_model(), draw(), 0.5)
    assert found["fed"] == "draw_noise at level 0.5: count form, reveal order digit"
    assert (found["masked_share"], found["masked_digits"]) == (0.5, 0.5)
    whole = measure_attention(small_model(whole_token_above=0.4), draw(), 0.5)
    assert whole["fed"] == "draw_noise at level 0.5: count form, reveal order digit, whole tokens above 0.4"
    assert whole["masked_digits"] == whole["masked_tokens"] == 0.5 > found["masked_tokens"]
    assert measure_attention(small_model(), draw(), 0.0)["fed"] == "clean text: every digit visible"
    causal = measure_attention(causal_model(), draw())
    assert causal["fed"] == "clean text: start token 3 and the window without its last token"
    assert causal["masked_share"] is None and "masked_digits" not in causal


def test_a_causal_model_is_fed_what_its_likelihood_is_computed_from(monkeypatch):
    scorer, ids, fed = causal_model(), draw(2), []
    logits = scorer._logits
    monkeypatch.setattr(scorer, "_logits", lambda ids, mask: (fed.append(ids), logits(ids, mask))[1])
    scorer.log_likelihood(ids)
    assert (_inputs_of(scorer, ids, None, 0)["input_ids"] == fed[0]).all()


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan, None])
def test_masked_shares_outside_0_to_1_are_refused(share):
    with pytest.raises(ValueError, match=rf"masked_share={share} must be between 0 \(clean text\) and 1 .*; use 0\.5"):
        measure_attention(small_model(), draw(), share)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="masked_share=0.5 is for masked diffusion; a causal model has None, clean"):
        measure_attention(causal_model(), draw(), 0.5)
    with pytest.raises(ValueError, match="there are 5 windows of 7 tokens; give at least one of 8 tokens"):
        measure_attention(small_model(), draw(length=7), 0.5)
    with pytest.raises(ValueError, match="there are 0 windows of 16 tokens"):
        measure_attention(small_model(), draw(0), 0.5)
    with pytest.raises(ValueError, match="token id 12 is not below vocab_size=11; use the model's own tokenizer"):
        measure_attention(causal_model(), draw() + 2)


def test_attention_that_gives_no_weights_or_no_softmax_is_refused(monkeypatch):
    model = small_model()
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: (forward(*args, **kwargs)[0], None))
    with pytest.raises(
        ValueError, match="the attention of layer 1 gives no weights; use a model with eager attention"
    ):
        measure_attention(model, draw(), 0.5)
    for factor, error in ((1.5, r"0\.5"), (math.nan, "nan")):

        def scaled(*arguments, factor=factor, **options):
            output, weights = forward(*arguments, **options)
            return output, weights * factor

        monkeypatch.setattr(attention, "forward", scaled)
        with pytest.raises(
            ValueError, match=rf"weights of layer 1 miss a sum of 1 by {error}, more than 0\.01; use a"
        ):
            measure_attention(model, draw(), 0.5)


def test_a_family_of_which_nothing_is_known_is_refused_by_its_type():
    class Other:
        model_type = "other"

    class Model:
        config = Other()

    with pytest.raises(ValueError, match="models of type 'other' cannot be analyzed: .*; use a 'prime_v2' or causal"):
        _inputs_of(Model(), draw(), 0.5, 0)
