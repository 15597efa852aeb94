"""Attention, held against closed forms and plain loops: studies/analysis/attention.py."""

import math

import numpy as np
import pytest
import torch
from networks import causal_model, small_interpolating, small_model, small_uniform, some_ids
from torch import nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from prime_v2.studies.analysis import attention as analysis
from prime_v2.studies.analysis.attention import (
    STATISTICS,
    attention_statistics,
    measure_attention,
)
from prime_v2.studies.analysis.inputs import feed, seen_everywhere
from prime_v2.studies.analysis.spectra import (
    projection_matrices,
)

LENGTH = 16


def draw(count: int = 5, length: int = LENGTH) -> torch.Tensor:
    return some_ids(count, length, seed=1)


def naive_statistics(weights: torch.Tensor, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics of weights (N, heads, L, L) by loops over windows, heads, queries and keys; (heads,) each."""
    seen = seen.expand(len(weights), -1, -1)
    num_windows, heads, length, _ = weights.shape
    result = {name: torch.zeros(heads, dtype=torch.double) for name in STATISTICS}
    for head in range(heads):
        received = torch.zeros(num_windows, length, dtype=torch.double)
        for window in range(num_windows):
            several = sum(int(seen[window, query].sum()) > 1 for query in range(length))
            for query in range(length):
                row = [float(each) for each in weights[window, head, query]]
                entropy = -sum(each * math.log(each) for each in row if each > 0)
                choices = int(seen[window, query].sum())
                share = 1 / (num_windows * length)
                result["first_position_mass"][head] += share * row[0]
                result["self_mass"][head] += share * row[query]
                result["neighbour_mass"][head] += share * sum(row[max(0, query - 1) : query + 2])
                result["entropy"][head] += share * entropy
                if choices > 1:
                    result["relative_entropy"][head] += entropy / math.log(choices) / (num_windows * several)
                result["mean_distance"][head] += share * sum(abs(query - key) * each for key, each in enumerate(row))
                received[window] += torch.tensor(row, dtype=torch.double) / length
        result["top_in_window_mass"][head] = received.amax(1).mean()
        result["top_position_mass"][head] = received.mean(0).max()
    return result


def network_for(kind: str):
    """A small model, its network, and what it is asked for."""
    if kind in ("gpt2", "llama"):
        model = causal_model(LlamaForCausalLM if kind == "llama" else GPT2LMHeadModel)
        return model, model.model, None
    model = {"uniform": small_uniform, "interpolating": small_interpolating}.get(kind, small_model)()
    return model, model, 0.0 if kind == "clean" else 0.5


@pytest.mark.parametrize("kind", ["masked", "clean", "gpt2", "llama", "uniform", "interpolating"])
def test_statistics_are_those_of_plain_loops_over_the_networks_own_attention(kind):
    """The weights are those that Transformers gives for output_attentions."""
    model, network, share = network_for(kind)
    windows = draw(3)
    found = measure_attention(model, windows, share)
    network.set_attn_implementation("eager")
    fed = feed(model, windows, share, 0)
    with torch.no_grad():
        attentions = network.base_model(**fed.inputs, output_attentions=True).attentions
    assert found["layers"] == [0, 1] and len(attentions) == 2
    for layer, weights in enumerate(attentions):
        for name, values in naive_statistics(weights, fed.seen).items():
            measured = found["statistics"][name]["mean"][layer]
            np.testing.assert_allclose(measured, values, rtol=1e-5, atol=1e-7, err_msg=name)  # float32, 6 digits
        assert (weights[~fed.seen.unsqueeze(1).expand_as(weights)] == 0).all()
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
    assert found["uniform"] == pytest.approx(UNIFORM[causal], rel=1e-5)  # of rounded values
    for name, expected in UNIFORM[causal].items():
        np.testing.assert_allclose(found["statistics"][name]["mean"], expected, rtol=1e-5, err_msg=name)  # float32
        np.testing.assert_allclose(found["statistics"][name]["stderr"], 0, atol=1e-6)


def test_attention_on_one_position_each_has_the_closed_form():
    """Each query attends to the next position, the last one to itself."""
    weights = torch.diag(torch.ones(LENGTH - 1), 1)
    weights[-1, -1] = 1
    found = attention_statistics(weights.expand(2, 3, LENGTH, LENGTH), seen_everywhere(LENGTH))
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

    def spy(weights, visible):
        seen.append(tuple(weights.shape))
        return attention_statistics(weights, visible)

    monkeypatch.setattr(analysis, "attention_statistics", spy)
    monkeypatch.setattr(analysis, "WEIGHTS_PER_PASS", 3 * 2 * LENGTH**2 + 1)
    measure_attention(small_model(), draw(7), 0.5)
    # Two layers a pass, three windows a pass; after each pass the reference, uniform attention.
    reference = [(1, 1, LENGTH, LENGTH)]
    whole, rest = ([(count, 2, LENGTH, LENGTH)] * 2 + reference for count in (3, 1))
    assert seen == whole + whole + rest


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
    assert (feed(model, ids, 0, 0).inputs["subtoken_ids"] == digits).all()
    assert (feed(model, ids, 1, 0).inputs["subtoken_ids"] == model.config.base).all()
    fewer = None
    for share in (0.25, 0.5, 0.9):
        states = feed(model, ids, share, 0).inputs["subtoken_ids"]
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
    together = feed(model, ids, 0.5, 3).inputs["subtoken_ids"]
    alone = torch.cat([feed(model, row.unsqueeze(0), 0.5, 3).inputs["subtoken_ids"] for row in ids])
    assert (together == alone).all()
    assert (together != feed(model, ids, 0.5, 4).inputs["subtoken_ids"]).any()
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
    assert (feed(scorer, ids, None, 0).inputs["input_ids"] == fed[0]).all()


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan, None])
def test_masked_shares_outside_0_to_1_are_refused(share):
    with pytest.raises(ValueError, match=rf"masked_share={share} must be between 0 \(clean text\) and 1 .*; use 0\.5"):
        measure_attention(small_model(), draw(), share)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="masked_share=0.5 is for masked diffusion; a causal model has None, clean"):
        measure_attention(causal_model(), draw(), 0.5)
    with pytest.raises(ValueError, match="there are 5 windows of 7 tokens; give at least one of 8 tokens"):
        measure_attention(small_model(), draw(length=7), 0.5)
    with pytest.raises(ValueError, match="seed=1.5 must be an integer"):
        measure_attention(small_model(), draw(), 0.5, seed=1.5)
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

    with pytest.raises(ValueError, match="models of type 'other' cannot be analyzed: .*; use a causal model or"):
        feed(Model(), draw(), 0.5, 0)


# ------------------------------------------------------------------------------------------- the other families


def test_a_uniform_state_model_is_fed_replaced_tokens_and_their_time():
    model, ids = small_uniform(), draw(64)
    clean = feed(model, ids, 0, 0).inputs
    assert (clean["input_ids"] == ids).all() and (clean["times"] < 1e-10).all()
    before = 0.0
    for share in (0.25, 0.5, 0.9):
        fed = feed(model, ids, share, 0)
        changed = share * 10 / 11  # one draw in eleven changes nothing
        assert (fed.shares["changed_tokens"].mean() - changed).abs() < 0.05
        assert (fed.inputs["times"].mean() - share).abs() < 0.05 and fed.inputs["times"].mean() > before
        before = fed.inputs["times"].mean()
    assert (feed(model, ids[:1], 0.5, 0).inputs["input_ids"] == feed(model, ids, 0.5, 0).inputs["input_ids"][:1]).all()


def test_an_interpolating_model_is_fed_masks_and_an_order():
    """A masked token sees itself and what is known; the k-th known one, k tokens."""
    model, ids = small_interpolating(), draw(6)
    fewer = torch.zeros_like(ids, dtype=torch.bool)
    for share in (0.0, 0.25, 0.5, 1.0):
        fed = feed(model, ids, share, 0)
        hidden = fed.inputs["input_ids"] == model.config.mask_token_id
        assert (hidden.sum(1) == share * LENGTH).all() and (hidden | ~fewer).all()
        assert (fed.inputs["input_ids"] == torch.where(hidden, model.config.mask_token_id, ids)).all()
        known = LENGTH - int(share * LENGTH)
        counts = fed.seen.sum(-1)
        assert (counts[hidden] == known + 1).all()
        assert (counts.masked_fill(hidden, 0).sort(1).values[:, LENGTH - known :] == torch.arange(1, known + 1)).all()
        fewer = hidden


@pytest.mark.parametrize("kind", ["uniform", "interpolating"])
def test_uniform_attention_is_over_what_a_query_sees(kind):
    model, network, share = network_for(kind)
    for each in projection_matrices(network):
        if each.kind == "q":
            nn.init.zeros_(each.weight)
    found = measure_attention(model, draw(), share)
    for name, expected in found["uniform"].items():
        if name != "top_position_mass":  # of each head of all windows, like the reference, but rounded before
            np.testing.assert_allclose(found["statistics"][name]["mean"], expected, rtol=1e-5, err_msg=name)
    assert found["uniform"]["relative_entropy"] == pytest.approx(1)
