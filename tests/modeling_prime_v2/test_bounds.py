"""Which losses are bounds on -log p(x), and how tight (docs/derivation.md): every mask and order enumerated."""

import itertools
import math

import pytest
import torch
from enumeration import (
    AnyOrder,
    all_sequences,
    correlated_law,
    count_form,
    entropy,
    nats_of_all_masks,
    optimal_model,
    time_form,
)
from networks import small_model

from prime_v2.diffusion_prime_v2 import RevealOrder, is_bound

# Sums of under 10,000 float64 terms of order 1: rounding stays below 1e-11.
CLOSE = {"rtol": 0, "atol": 1e-10}
# The network's norms compute in float32 (as Llama's do), and batches of different shapes round differently: 1e-6 a
# token, times n/k up to 6.
NETWORK = {"rtol": 0, "atol": 2e-5}

# (vocab_size, length, the digits' form): binary, ternary, plain MDM (base V), with and without unused codes.
TABLES = [
    (5, 2, {"base": 2, "num_subtokens": 3}),
    (4, 3, {"base": 2, "num_subtokens": 2}),
    (5, 2, {"base": 2, "num_subtokens": 4, "shuffle_domain": "vocab"}),
    (7, 2, {"base": 3, "num_subtokens": 2}),
    (5, 3, {"base": 5, "num_subtokens": 1}),
]
SEEDS = [0, 1]  # of the shuffle


def stages(num_subtokens: int) -> dict:
    """Fields of a config whose nested order has two stages where the digits allow it."""
    stage_digits = [1, num_subtokens] if num_subtokens > 1 else [1]
    return {"reveal_order": "nested", "stage_digits": stage_digits}


def optimal(table, shuffle_seed: int, **fields):
    """(model with the optimal denoiser, its law, all sequences)."""
    vocab_size, length, form = table
    law = correlated_law(vocab_size, length, seed=vocab_size * length)
    fields = {"vocab_size": vocab_size, **form, **stages(form["num_subtokens"]), **fields}
    return optimal_model(law, length, shuffle_seed=shuffle_seed, **fields), law, all_sequences(vocab_size, length)


def expected(law, values) -> float:
    return float((law * values).sum())


@pytest.mark.parametrize("shuffle_seed", SEEDS)
@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("kind", ["digit", "token", "nested"])
def test_each_bound_of_the_optimal_denoiser_equals_the_entropy(kind, table, shuffle_seed):
    """Correlated tokens and digits. An optimal denoiser gives a token that contradicts a visible digit no probability,
    so carry-over changes nothing."""
    carry_over = shuffle_seed == 0
    model, law, ids = optimal(table, shuffle_seed, carry_over=carry_over)
    nats, counts = nats_of_all_masks(model, ids, RevealOrder.from_config(model.config, kind), "marginal")
    assert expected(law, count_form(nats, counts)) == pytest.approx(entropy(law), abs=1e-10)  # as CLOSE
    assert expected(law, time_form(nats, counts)) == pytest.approx(entropy(law), abs=1e-10)


@pytest.mark.parametrize("shuffle_seed", SEEDS)
@pytest.mark.parametrize("table", TABLES, ids=str)
def test_chain_of_the_optimal_denoiser_is_the_log_probability_of_each_sequence(table, shuffle_seed):
    model, law, ids = optimal(table, shuffle_seed)
    result = model.log_likelihood(ids, method="chain")
    torch.testing.assert_close(result.value, law.log(), **CLOSE)
    assert result.is_bound
    assert result.stderr.eq(0).all()
    assert result.num_forward.eq(ids.shape[1]).all()


@pytest.mark.parametrize("shuffle_seed", SEEDS)
@pytest.mark.parametrize("table", TABLES, ids=str)
def test_the_papers_loss_falls_below_the_entropy_unless_a_token_is_one_digit(table, shuffle_seed):
    model, law, ids = optimal(table, shuffle_seed)
    nats, counts = nats_of_all_masks(model, ids, RevealOrder.from_config(model.config, "digit"), "joint")
    loss = expected(law, count_form(nats, counts))
    assert loss == pytest.approx(expected(law, time_form(nats, counts)), abs=1e-10)
    if model.config.num_subtokens == 1:
        assert loss == pytest.approx(entropy(law), abs=1e-10)
    else:
        assert loss < entropy(law) - 0.02  # below by what the digits of a token share


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_two_tokens_that_differ_in_k_digits_have_the_published_numbers(k):
    """The authors' example: entropy log 2; the paper's loss is log(2) / k, the marginals' log 2 for every k."""
    law = torch.full((2,), 0.5, dtype=torch.double)
    codes = torch.tensor([[0] * k, [1] * k])
    model = optimal_model(law, 1, codes, vocab_size=2, base=2, num_subtokens=k)
    order = RevealOrder("digit", k)
    joint = count_form(*nats_of_all_masks(model, all_sequences(2, 1), order, "joint"))
    marginal = count_form(*nats_of_all_masks(model, all_sequences(2, 1), order, "marginal"))
    assert expected(law, joint) == pytest.approx(math.log(2) / k, abs=1e-12)
    assert expected(law, marginal) == pytest.approx(math.log(2), abs=1e-12)


RANDOM_NETWORKS = [
    {"vocab_size": 4, "base": 2, "num_subtokens": 2},
    {"vocab_size": 5, "base": 2, "num_subtokens": 3},
    {"vocab_size": 5, "base": 2, "num_subtokens": 3, "carry_over": False},
    {"vocab_size": 5, "base": 3, "num_subtokens": 2, "subtoken_embedding": "concat"},
    {"vocab_size": 6, "base": 6, "num_subtokens": 1},
]


@pytest.fixture(scope="module", params=RANDOM_NETWORKS, ids=str)
def network(request):
    return small_model(seed=3, **request.param, **stages(request.param["num_subtokens"])).double()


@pytest.mark.parametrize("kind", ["digit", "token", "nested"])
def test_each_bound_of_a_random_network_is_above_its_exact_any_order_likelihood(network, kind):
    """By recursion over the sets of visible units: the bound is the mean over orders of -log p(x given the order),
    and Jensen's inequality puts it above -log of the mean."""
    ids = all_sequences(network.config.vocab_size, 2)
    order = RevealOrder.from_config(network.config, kind)
    nats, counts = nats_of_all_masks(network, ids, order, "marginal")
    exact = AnyOrder(network, order, ids)
    if network.config.carry_over or kind == "token":
        assert exact.nats.neg().exp().sum() == pytest.approx(1, abs=1e-5)  # as NETWORK; it is a law on sequences
    torch.testing.assert_close(count_form(nats, counts), exact.bound, **NETWORK)
    torch.testing.assert_close(time_form(nats, counts), exact.bound, **NETWORK)
    assert (count_form(nats, counts) > exact.nats).all()


SETS_OF_4 = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("kind", ["digit", "token"])
def test_the_bound_is_the_mean_over_the_orders_of_revealing_units_one_by_one(kind):
    """All permutations of the units: a check of the recursion above as well."""
    model = small_model(seed=5, vocab_size=4, base=2, num_subtokens=2).double()
    ids = torch.tensor([2, 1])
    order = RevealOrder(kind, 2)
    digits, codes = model.encode(ids), model.code_table.codes[:-1]
    units = [(i, [j]) for i in range(2) for j in range(2)] if kind == "digit" else [(0, [0, 1]), (1, [0, 1])]
    states = torch.stack([torch.where(torch.tensor(each).view(2, 2), digits, 2) for each in SETS_OF_4])
    with torch.no_grad():
        probabilities = model(subtoken_ids=states).logits.double().softmax(-1)
    log_likelihoods = []
    for permutation in itertools.permutations(units):
        visible, log_likelihood = torch.zeros(2, 2, dtype=torch.bool), 0.0
        for i, columns in permutation:
            q = probabilities[SETS_OF_4.index(tuple(visible.flatten().tolist())), i]
            log_likelihood += float(q[(codes[:, columns] == digits[i, columns]).all(1)].sum().log())
            visible[i, columns] = True
        log_likelihoods.append(log_likelihood)
    log_likelihoods = torch.tensor(log_likelihoods, dtype=torch.double)
    exact = AnyOrder(model, order, ids[None])
    assert -float(log_likelihoods.exp().mean().log()) == pytest.approx(float(exact.nats), abs=2e-5)  # as NETWORK
    assert -float(log_likelihoods.mean()) == pytest.approx(float(exact.bound), abs=2e-5)


def test_what_is_called_a_bound():
    digit, token, nested = RevealOrder("digit", 4), RevealOrder("token", 4), RevealOrder("nested", 4, (2, 4))
    assert is_bound("marginal", "elbo", 4, digit, None)
    assert is_bound("marginal", "elbo", 4, token, None)
    assert is_bound("marginal", "elbo", 4, nested, None)
    assert is_bound("joint", "elbo", 4, token, None)
    assert is_bound("joint", "elbo", 1, RevealOrder("digit", 1), None)
    assert not is_bound("joint", "elbo", 4, digit, None)
    assert not is_bound("joint", "elbo", 4, nested, None)
    assert not is_bound("marginal", "low_variance", 4, digit, None)
    assert not is_bound("marginal", "elbo", 4, digit, 0.5)
