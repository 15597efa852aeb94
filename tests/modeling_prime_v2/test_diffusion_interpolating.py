"""Interpolating diffusion: counts, orders, attention, and the bound, each against enumeration or plain loops."""

import itertools
import math

import pytest
import torch
from enumeration import (
    all_sequences,
    correlated_law,
    decoding_orders,
    entropy,
    gauss_legendre,
    naive_bound,
    naive_log_likelihood,
    optimal_interpolating,
    optimal_model,
    query_log_probabilities,
)
from hypothesis import given
from hypothesis import strategies as st
from networks import small_config, small_interpolating
from scipy.stats import chisquare

from prime_v2.diffusion_interpolating_prime_v2 import (
    NEVER_SEEN,
    PADDING,
    ScoredTexts,
    SortedInputs,
    diffusion_counts,
    diffusion_inputs,
    draw_terms,
    is_bound,
    random_places,
    revealed_chances,
    sequential_counts,
    sequential_inputs,
    sequential_share,
)
from prime_v2.diffusion_prime_v2 import hidden_counts_to_draw
from prime_v2.likelihood_frame_prime_v2 import join
from prime_v2.likelihood_rows_prime_v2 import Rows

ALPHAS = [0.0, 0.3, 0.7, 1.0]
# The network's norms compute in float32, and batches of different shapes round differently: 1e-6 a token.
NETWORK = {"rtol": 0, "atol": 2e-5}
MOST = 2**31  # exclusive bound of a drawn key


def texts_of(ids, scored=None, given=None, mask_id: int = 11) -> ScoredTexts:
    scored = torch.ones_like(ids, dtype=torch.bool) if scored is None else scored
    given = ~scored if given is None else given
    return ScoredTexts(ids, given, scored, torch.arange(ids.shape[1]).expand_as(ids), mask_id)


# How many tokens are hidden


@pytest.mark.parametrize("alpha_0", [*ALPHAS, 0.01, 0.999])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 30])
def test_chances_of_revealed_tokens_are_binomial(num_tokens, alpha_0):
    equal, beyond = revealed_chances(torch.tensor([num_tokens]), 33, alpha_0)
    expected = [math.comb(num_tokens, c) * alpha_0**c * (1 - alpha_0) ** max(0, num_tokens - c) for c in range(34)]
    torch.testing.assert_close(equal[0], torch.tensor(expected, dtype=torch.double), rtol=1e-12, atol=1e-15)
    tails = torch.tensor([sum(expected[c + 1 :]) for c in range(34)], dtype=torch.double)
    torch.testing.assert_close(beyond[0], tails, rtol=1e-12, atol=1e-15)
    assert float(beyond.sum()) == pytest.approx(num_tokens * alpha_0, abs=1e-12)


def test_chances_of_long_texts_are_a_law():
    """Logarithms of binomial coefficients of some 1,400 nats, good to 1e-12 of their size."""
    equal, beyond = revealed_chances(torch.tensor([2048, 1]), 2048, 0.37)
    torch.testing.assert_close(equal.sum(1), torch.ones(2, dtype=torch.double), rtol=1e-8, atol=0)
    torch.testing.assert_close(beyond.sum(1), torch.tensor([2048 * 0.37, 0.37], dtype=torch.double), rtol=1e-8, atol=0)


@pytest.mark.parametrize("alpha_0", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 9])
def test_the_closed_form_of_the_diffusion_term_is_its_integral(num_tokens, alpha_0):
    """A set of k masked tokens: the integral over m of 1/m m^k (1 - m)^(n - k), a polynomial of degree n - 1."""
    nodes, weights = gauss_legendre(12)
    m = 1 - alpha_0 + alpha_0 * nodes
    beyond = revealed_chances(torch.tensor([num_tokens]), num_tokens, alpha_0)[1][0]
    for k in range(1, num_tokens + 1):
        integral = float((alpha_0 * weights * m ** (k - 1) * (1 - m) ** (num_tokens - k)).sum())
        assert float(beyond[num_tokens - k]) / k / math.comb(num_tokens, k) == pytest.approx(integral, rel=1e-11)


@pytest.mark.parametrize("alpha_0", [0.3, 0.7])
def test_counts_have_their_chances_and_move_with_the_level(alpha_0):
    """A grid of N levels finds a chance to 2 / N."""
    n, size = 6, 20_000
    levels, tokens = (torch.arange(size, dtype=torch.double) + 0.5) / size, torch.full((size,), n)
    equal, beyond = (each[0] for each in revealed_chances(torch.tensor([n]), n, alpha_0))
    k = sequential_counts(levels, tokens, n + 3, alpha_0)
    # Each number of masked tokens as often as it masks: P(k) k / (n (1 - alpha_0)).
    expected = (equal.flip(0) * torch.arange(n + 1) / (n * (1 - alpha_0))).float()
    torch.testing.assert_close(k.bincount(minlength=n + 1) / size, expected, rtol=0, atol=2 / size)
    assert (k.diff() >= 0).all()
    k = diffusion_counts(levels, tokens, n + 3, alpha_0)
    expected = torch.cat([torch.zeros(1), (beyond[:n].flip(0) / (n * alpha_0)).float()])
    torch.testing.assert_close(k.bincount(minlength=n + 1) / size, expected, rtol=0, atol=2 / size)
    assert (k.diff() >= 0).all()


@given(st.floats(1e-9, 1 - 1e-9), st.integers(0, 50), st.integers(0, 5))
def test_at_alpha_0_of_one_the_counts_are_those_of_masked_diffusion(level, num_tokens, padding):
    level, tokens = torch.tensor([level], dtype=torch.double), torch.tensor([num_tokens])
    found = diffusion_counts(level, tokens, num_tokens + padding, 1.0)
    assert torch.equal(found, hidden_counts_to_draw(level, tokens))
    assert sequential_counts(level, tokens, num_tokens + padding, 1.0).tolist() == [min(1, num_tokens)]
    assert sequential_counts(level, tokens, num_tokens + padding, 0.0).tolist() == [num_tokens]


def test_shares_of_the_terms():
    assert [sequential_share(each) for each in (0.0, 0.3, 1.0)] == [1.0, 0.7, 0.0]
    assert [sequential_share(each) for each in (0.01, 0.99)] == [0.95, 0.05]
    assert sequential_share(0.3, 0.5) == 0.5


# In which order


def test_every_order_is_equally_likely():
    """Chi-square over the 24 orders of four tokens, 24,000 keys; false alarm 1e-6 for a fresh range of keys."""
    keys = torch.arange(24_000)
    places = random_places(torch.ones(len(keys), 4, dtype=torch.bool), keys)
    orders = list(itertools.permutations(range(4)))
    counts = [0] * 24
    for each in places.tolist():
        counts[orders.index(tuple(each))] += 1
    assert chisquare(counts).pvalue > 1e-6


def test_the_order_does_not_depend_on_where_padding_and_given_tokens_lie():
    keys = torch.arange(50)
    alone = random_places(torch.ones(50, 3, dtype=torch.bool), keys)
    scored = torch.tensor([[0, 1, 0, 1, 1, 0]], dtype=torch.bool).expand(50, -1)
    assert torch.equal(random_places(scored, keys)[scored].view(50, 3), alone)


# Rows of the network


def test_inputs_of_a_worked_example():
    """Text of padding, a given token 7, scored 1 2 3, a given token 8; the third scored token is revealed first."""
    ids = torch.tensor([[9, 7, 1, 2, 3, 8]])
    scored = torch.tensor([[0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    texts = texts_of(ids, scored, torch.tensor([[0, 1, 0, 0, 0, 1]], dtype=torch.bool))
    places, num_clean = torch.tensor([[5, 5, 1, 2, 0, 5]]), torch.tensor([1])
    x, no = NEVER_SEEN, -100
    found = diffusion_inputs(texts, places, num_clean)
    assert found.ids.tolist() == [[11, 7, 11, 11, 3, 8]]
    assert found.order_ids.tolist() == [[x, 0, x, x, 2, 1]]
    assert found.visible_until[:, 1:].tolist() == [[0, 2, 2, 2, 1]]
    assert found.target_ids.tolist() == [[no, no, 1, 2, no, no]]
    found = sequential_inputs(texts, places, num_clean)
    assert found.ids.tolist() == [[11, 7, 1, 2, 3, 8, 11, 11]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3]]
    assert found.order_ids.tolist() == [[x, 0, 3, 4, 2, 1, x, x]]
    assert found.visible_until.tolist() == [[-1, 0, 3, 4, 2, 1, 2, 3]]
    assert found.target_ids.tolist() == [[no] * 6 + [1, 2]]


def test_joined_rows_are_padded_and_kept_in_order():
    ids = torch.tensor([[1, 2, 3]])
    texts = texts_of(ids)
    parts = [sequential_inputs(texts, torch.tensor([[0, 1, 2]]), torch.tensor([c])) for c in (1, 0)]
    rows = [Rows(vars(each), torch.ones(1)) for each in [*parts, SortedInputs.blank(ids.device)]]
    joined = SortedInputs(**join(rows, PADDING, ids.device)[0])
    assert joined.ids.tolist() == [[1, 2, 3, 11, 11, 0], [1, 2, 3, 11, 11, 11], [0] * 6]
    assert joined.order_ids[2].tolist() == [NEVER_SEEN] * 6
    assert torch.equal(joined.visible_until[1:2], parts[1].visible_until)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields", [{}, {"num_key_value_heads": 1, "qk_norm": True, "tie_word_embeddings": True}], ids=str
)
def test_queries_give_the_probabilities_of_plain_causal_attention_over_the_sorted_order(fields, implementation):
    """Rows of different lengths with padding on both sides and given tokens between the scored ones."""
    model = small_interpolating(**fields)
    model.set_attn_implementation(implementation)
    ids = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(0))
    real, scored = torch.ones(6, 8, dtype=torch.bool), torch.ones(6, 8, dtype=torch.bool)
    scored[:, 1], scored[3, 4:6] = False, False
    real[1, :2], real[2, 6:], scored[5, 2:] = False, False, False
    scored &= real
    texts = texts_of(ids, scored, real & ~scored)
    places = random_places(scored, torch.arange(6))
    num_clean = torch.tensor([0, 1, 2, 4, 7, 1])
    sequential = sequential_inputs(texts, places, num_clean)
    diffusion = diffusion_inputs(texts, places, num_clean)
    ones = torch.ones(6, dtype=torch.double)
    with torch.no_grad():
        _, (chain_nats, parallel_nats) = model.sequence_nll([sequential, diffusion], [ones, ones])
        for row in range(6):
            order = places[row][scored[row]].argsort().tolist()
            numbers = [*order[: num_clean[row]], *sorted(order[num_clean[row] :])]
            at = scored[row].nonzero().flatten().tolist()
            known = [(i, int(ids[row, i])) for i in range(8) if real[row, i] and not scored[row, i]]
            known += [(at[i], int(ids[row, at[i]])) for i in numbers[: num_clean[row]]]
            chain = parallel = 0.0
            later = list(known)
            for i in (at[number] for number in numbers[num_clean[row] :]):
                parallel -= float(query_log_probabilities(model, known, i)[ids[row, i]])
                chain -= float(query_log_probabilities(model, later, i)[ids[row, i]])
                later.append((i, int(ids[row, i])))
            assert float(chain_nats[row]) == pytest.approx(chain, abs=2e-5)  # as NETWORK
            assert float(parallel_nats[row]) == pytest.approx(parallel, abs=2e-5)


def test_masked_tokens_do_not_see_each_other_and_known_ones_look_back_alone():
    """`model(input_ids)`: the logits of a mask do not depend on other masks, and follow the left-to-right order."""
    model = small_interpolating()
    ids = torch.tensor([[3, 11, 5, 11, 2]])
    logits = model(ids).logits[0]
    for place in (1, 3):
        expected = query_log_probabilities(model, [(0, 3), (2, 5), (4, 2)], place)
        torch.testing.assert_close(logits[place].log_softmax(-1), expected, **NETWORK)
    for place in (0, 2, 4):
        assert logits[place].argmax() == ids[0, place] and logits[place].isfinite().sum() == 1
    padded, mask = torch.tensor([[0, 3, 11, 5, 11, 2, 9]]), torch.tensor([[0, 1, 1, 1, 1, 1, 0]])
    again = model(padded, mask).logits[0, 1:6]
    masked = [1, 3]
    torch.testing.assert_close(again[masked], logits[masked], **NETWORK)


# The bound


@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 0.5, 1.0])
def test_the_bound_of_a_random_network_is_the_mean_over_orders_and_above_its_log_likelihood(alpha_0):
    """By plain loops over the sets that the diffusion reveals and their orders. The sum of all p is 1."""
    model = small_interpolating(seed=3, vocab_size=3, alpha_0=alpha_0).double()
    ids, total = all_sequences(3, 3), 0.0
    found = model.log_likelihood(ids, num_samples=100)
    assert found.stderr.eq(0).all() and found.is_bound
    for row, value in zip(ids.tolist(), found.value.tolist(), strict=True):
        bound, nats = naive_bound(model, row)
        assert -value == pytest.approx(bound, abs=2e-5)  # as NETWORK
        assert -value >= nats - 2e-5
        assert alpha_0 == 0 or -value > nats + 1e-6, "orders differ"
        total += math.exp(-nats)
    assert total == pytest.approx(1, abs=1e-5)


def test_given_tokens_come_first_and_are_not_scored():
    model = small_interpolating(seed=4, vocab_size=5, alpha_0=0.4).double()
    ids, prompt = [3, 1, 4, 2, 0], [0, 1, 0, 0, 1]
    bound, _ = naive_bound(model, ids, [each == 0 for each in prompt])
    found = model.log_likelihood(torch.tensor([ids]), prompt_mask=torch.tensor([prompt]), num_samples=100)
    assert -float(found.value) == pytest.approx(bound, abs=2e-5)  # as NETWORK
    assert found.num_scored.tolist() == [3]


@pytest.mark.parametrize("alpha_0", ALPHAS)
@pytest.mark.parametrize(("vocab_size", "length"), [(5, 2), (3, 4)])
def test_the_bound_of_the_optimal_denoiser_is_the_entropy(vocab_size, length, alpha_0):
    """Correlated tokens, both ends and the middle. Sums of under 10,000 float64 terms of order 1."""
    law, ids = correlated_law(vocab_size, length), all_sequences(vocab_size, length)
    model = optimal_interpolating(law, vocab_size, length, alpha_0=alpha_0)
    found = model.log_likelihood(ids, num_samples=200)
    assert found.stderr.eq(0).all()
    assert float((law * -found.value).sum()) == pytest.approx(entropy(law), abs=1e-10)
    chain = model.log_likelihood(ids, method="chain")
    torch.testing.assert_close(chain.value, law.log(), rtol=0, atol=1e-10)


def test_alpha_0_of_one_is_masked_diffusion():
    """Each text's bound is that of `PrimeV2ForMaskedDiffusion` with whole tokens and the same denoiser."""
    law, ids = correlated_law(3, 4), all_sequences(3, 4)
    ours = optimal_interpolating(law, 3, 4, alpha_0=1.0).log_likelihood(ids, num_samples=100)
    masked = optimal_model(law, 4, vocab_size=3, num_subtokens=1)
    expected = masked.log_likelihood(ids, method="token", num_samples=100)
    assert ours.stderr.eq(0).all() and expected.stderr.eq(0).all()
    torch.testing.assert_close(ours.value, expected.value, rtol=0, atol=1e-10)


def test_alpha_0_of_zero_is_the_product_from_left_to_right():
    model = small_interpolating(seed=5, alpha_0=0.0)
    ids, scored = [3, 1, 4, 1, 5, 9], [True, False, True, True, True, True]
    expected = float(naive_log_likelihood(model, ids, scored, (0, 1, 2, 3, 4)).detach())
    prompt = torch.tensor([[not each for each in scored]])
    for method, exhaustive in (("interpolating", True), ("interpolating", False), ("chain", True)):
        found = model.log_likelihood(
            torch.tensor([ids]), prompt_mask=prompt, method=method, num_samples=8, exhaustive=exhaustive
        )
        assert float(found.value) == pytest.approx(expected, abs=2e-5)  # as NETWORK
        assert (found.stderr.tolist(), found.num_forward.tolist(), found.is_bound) == ([0], [1], True)


# The noise of training


@pytest.mark.parametrize(("alpha_0", "share"), [(0.0, 1.0), (0.4, 0.6), (0.4, 0.25), (1.0, 0.0)])
def test_the_expected_loss_is_the_bound_whatever_the_share(alpha_0, share):
    """The loss is constant between the levels at which a count changes: the sum over these pieces, of the mean over
    keys that give each order of three tokens once, is the exact expectation."""
    model = small_interpolating(seed=6, vocab_size=4, alpha_0=alpha_0, ar_share=share)
    text, n = [2, 0, 3], 3
    places = [tuple(each) for each in random_places(torch.ones(100, n, dtype=torch.bool), torch.arange(100)).tolist()]
    keys = torch.tensor([places.index(each) for each in itertools.permutations(range(n))])
    clean = [math.comb(n, c) * alpha_0**c * (1 - alpha_0) ** (n - c) for c in range(n + 1)]
    ends = []
    if alpha_0 < 1:
        sizes = [clean[n - k] * k / (n * (1 - alpha_0)) for k in range(1, n + 1)]
        ends += [share * sum(sizes[:k]) for k in range(1, n + 1)]
    if alpha_0:
        tails = [sum(clean[n - k + 1 :]) / (n * alpha_0) for k in range(1, n + 1)]
        ends += [share + (1 - share) * sum(tails[:k]) for k in range(1, n + 1)]
    expected, start = 0.0, 0.0
    for end in ends:
        if end > start + 1e-9:
            levels = torch.full((len(keys),), (start + end) / 2, dtype=torch.double)
            ids = torch.tensor([text] * len(keys))
            with torch.no_grad():
                expected += (end - start) * float(model(ids, labels=ids, noise_keys=keys, noise_levels=levels).loss)
            start = end
    assert start == pytest.approx(1)
    assert expected == pytest.approx(naive_bound(model, text)[0] / n, abs=2e-5)  # as NETWORK


def test_rows_of_the_terms_have_their_weights():
    ids = torch.arange(10).expand(8, -1) % 11
    levels = (torch.arange(8, dtype=torch.double) + 0.5) / 8
    for loss_weight in ("elbo", "low_variance"):
        sequential, diffusion = draw_terms(texts_of(ids), torch.arange(8), levels, 0.5, 0.25, loss_weight)
        assert sequential.texts.tolist() == [0, 1] and diffusion.texts.tolist() == [2, 3, 4, 5, 6, 7]
        for term, factor in ((sequential, 0.5 / 0.25), (diffusion, 0.5 / 0.75)):
            k = (term.inputs.target_ids >= 0).sum(1)
            assert k.unique().numel() > len(k) // 2
            expected = factor * (10 / k.double() if loss_weight == "elbo" else torch.ones(len(k), dtype=torch.double))
            torch.testing.assert_close(term.weights, expected)


@given(st.floats(0.0, 1.0), st.integers(1, 9), st.lists(st.booleans(), min_size=9, max_size=9), st.integers(0, MOST))
def test_every_draw_asks_for_hidden_tokens_alone_and_for_each_once(alpha_0, num_scored, flags, key):
    ids = torch.arange(12).unsqueeze(0) % 11
    scored = torch.tensor([[*flags, True, True, False]]) & (torch.arange(12) < num_scored + 3)
    given_tokens = ~scored & (torch.arange(12) > 0)
    texts = texts_of(ids, scored, given_tokens)
    share = sequential_share(alpha_0)
    for level in (0.001, 0.4, 0.999):
        terms = draw_terms(texts, torch.tensor([key]), torch.tensor([level], dtype=torch.double), alpha_0, share)
        assert sorted(len(term.texts) for term in terms) == [0, 1]
        inputs = next(term.inputs for term in terms if len(term.texts))
        asked = inputs.target_ids >= 0
        assert (inputs.ids[asked] == 11).all() and (inputs.order_ids[asked] == NEVER_SEEN).all()
        assert (inputs.position_ids[asked] % 11 == inputs.target_ids[asked]).all()
        assert inputs.position_ids[asked].unique().numel() == int(asked.sum())
        shown = inputs.order_ids[inputs.order_ids != NEVER_SEEN].sort().values
        assert shown.tolist() == list(range(len(shown))), "ranks have no gap"
        assert int(scored.sum()) + int(given_tokens.sum()) == len(shown) + int(asked.sum()) * (len(terms[1].texts) > 0)


def test_orders_of_all_chances_add_up():
    """Of the reference itself: chances of sets and orders."""
    for alpha_0 in ALPHAS:
        assert sum(chance for chance, _, _ in decoding_orders(4, alpha_0)) == pytest.approx(1)


def test_what_is_called_a_bound():
    assert is_bound(0.5, "elbo") and is_bound(0.0, "low_variance")
    assert not is_bound(0.5, "low_variance") and not is_bound(1.0, "low_variance")


# The configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha_0": 1.5}, r"alpha_0=1\.5 is outside \[0, 1\]; use 0\.5"),
        ({"alpha_0": -0.1}, r"alpha_0=-0\.1 is outside \[0, 1\]"),
        ({"ar_share": 0.0}, r"ar_share=0\.0 is outside \(0, 1\), but alpha_0=0\.5 has two terms to train; use 0\.5"),
        ({"ar_share": 1}, r"ar_share=1 is outside \(0, 1\)"),
        ({"alpha_0": 1, "ar_share": 0.5}, r"ar_share=0\.5 must be 0 for alpha_0=1, which has only one term"),
        ({"alpha_0": 0, "ar_share": 0.5}, r"ar_share=0\.5 must be 1 for alpha_0=0"),
        ({"loss_weight": "elbow"}, "loss_weight='elbow' is not one of elbo, low_variance"),
        ({"mask_token_id": 3}, "mask_token_id=3 must be vocab_size=11, the first id outside"),
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_attention_heads=2"),
        ({"alpha_0": "half"}, "alpha_0"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        small_config("interpolating", **fields)
    assert "Strict" in type(caught.value).__name__


def test_fields_have_defaults_and_survive_a_file(tmp_path):
    config = small_config("interpolating", alpha_0=0.25)
    assert (config.ar_share, config.loss_weight, config.mask_token_id) == (None, "elbo", 11)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {"auto_map": again.auto_map}
    assert again.auto_map["AutoModelForMaskedLM"].endswith("PrimeV2ForInterpolatingDiffusion")
