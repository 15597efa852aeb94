"""Uniform-state diffusion: noise, bound, gradient and reverse step, each against enumeration or plain loops."""

import math

import pytest
import torch
from enumeration import (
    all_sequences,
    chain_law,
    correlated_law,
    entropy,
    estimates,
    exact_bound,
    expected_integrand,
    forward_chances,
    gauss_legendre,
    naive_integrand,
    naive_posterior,
    naive_reverse_step,
    optimal_uniform,
    reverse_chain,
    time_nodes,
)
from hypothesis import given
from hypothesis import strategies as st
from networks import small_uniform
from scipy.stats import kstest

from prime_v2 import chunked_loss_prime_v2 as chunked_loss_prime_v2
from prime_v2 import diffusion_uniform_prime_v2 as diffusion_uniform_prime_v2
from prime_v2.diffusion_uniform_prime_v2 import (
    KINDS,
    T_MIN,
    NoisedTokens,
    draw_noise,
    excess,
    reverse_step,
    uniform_loss,
)

# float64 sums of some 20 terms of up to 1e3 each.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
ENDS = [T_MIN, 1e-9, 1e-4, 0.3, 0.9, 1 - 1e-4, 1 - 1e-9, 1 - T_MIN]  # times
LAWS = [(4, 1), (3, 2), (2, 3), (5, 2)]  # (V, L)


def some_tokens(count: int, vocab_size: int, seed: int = 0) -> NoisedTokens:
    """Half of them noised to themselves at least; times in [0.01, 0.99], weights in [1, 10]."""
    generator = torch.Generator().manual_seed(seed)
    ids, noised = torch.randint(vocab_size, (2, count), generator=generator)
    noised[::2] = ids[::2]
    times, weights = torch.rand(2, count, generator=generator, dtype=torch.double)
    return NoisedTokens(ids, noised, 0.01 + 0.98 * times, 1 + 9 * weights)


def states_and_head(count: int, vocab_size: int, dtype=torch.double, scale: float = 1.0, width: int = 5):
    generator = torch.Generator().manual_seed(7)
    hidden_states = scale * torch.randn(count, width, generator=generator, dtype=torch.double)
    head = torch.randn(vocab_size, width, generator=generator, dtype=torch.double)
    return hidden_states.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()


def naive_nats(logits, tokens: NoisedTokens, kind: str) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    if kind == "elbo":
        return naive_integrand(probabilities, tokens.ids, tokens.noised, tokens.times)
    posterior = naive_posterior(probabilities, tokens.noised, tokens.times)
    return -posterior.gather(1, tokens.ids.unsqueeze(1)).squeeze(1).log()


def both_forms(kind: str, vocab_size: int = 13, count: int = 23, dtype=torch.double, scale: float = 1.0):
    """[loss, nats, gradients of hidden states and head] of the chunked form and of autograd of the plain one."""
    tokens, results = some_tokens(count, vocab_size), []
    for form in (dtype, torch.double):
        hidden_states, head = (
            each.detach().to(form).requires_grad_() for each in states_and_head(count, vocab_size, dtype, scale)
        )
        if not results:
            loss, nats = uniform_loss(hidden_states, head, tokens, kind)
        else:
            nats = naive_nats(hidden_states @ head.T, tokens, kind)
            loss = (nats * tokens.weights).sum()
        # A factor that is not 1, as accumulation or the division by the number of tokens gives.
        gradients = torch.autograd.grad(loss * 0.37, [hidden_states, head])
        results.append([each.detach().double() for each in (loss, nats, *gradients)])
    return results


# The integrand and its gradient


@pytest.mark.parametrize("vocab_size", [2, 3, 13, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_those_of_the_plain_sum(kind, vocab_size):
    for chunked, naive in zip(*both_forms(kind, vocab_size), strict=True):
        torch.testing.assert_close(chunked, naive, **FLOAT64)


@pytest.mark.parametrize("rows", [1, 2, 7, 22, 23, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_chunks_changes_nothing(kind, rows, monkeypatch):
    monkeypatch.setattr(chunked_loss_prime_v2, "CHUNK_ELEMENTS_CPU", rows * 13 + 1)
    for chunked, naive in zip(*both_forms(kind), strict=True):
        torch.testing.assert_close(chunked, naive, **FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(kind):
    # float32 carries 6e-8; a term of 100 nats is a difference of such of 1,000, and 23 of them are summed.
    for chunked, naive in zip(*both_forms(kind, 50, dtype=torch.float32), strict=True):
        torch.testing.assert_close(chunked, naive, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("time", ENDS)
@pytest.mark.parametrize("vocab_size", [4, 50_000])
def test_float32_is_exact_at_both_ends_of_time(vocab_size, time):
    """Where a = V alpha / (1 - alpha) is 1e-16 or 1e21, against float64 of the same formulas."""
    count = 8
    tokens = some_tokens(count, vocab_size)
    tokens.times = torch.full((count,), time, dtype=torch.double)
    hidden_states, head = states_and_head(count, vocab_size)
    _, exact = uniform_loss(hidden_states.detach(), head.detach(), tokens, "elbo")
    loss, nats = uniform_loss(hidden_states.float().detach().requires_grad_(), head.float(), tokens, "elbo")
    # Logits of up to 20, rounded, change log p by some 1e-6; a sum over V that cancels by some 1e-6 of 1 nat.
    torch.testing.assert_close(nats.double(), exact, rtol=2e-5, atol=2e-5)
    assert loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_bfloat16_gives_finite_values_and_gradients_at_both_ends_of_time(kind, scale):
    """Logits of thousands as well: probabilities of 0."""
    for time in ENDS:
        tokens = some_tokens(9, 40)
        tokens.times = torch.full((9,), time, dtype=torch.double)
        hidden_states, head = states_and_head(9, 40, torch.bfloat16, scale)
        loss, nats = uniform_loss(hidden_states, head, tokens, kind)
        loss.backward()
        assert loss.dtype == nats.dtype == torch.float32
        for each in (loss, nats, hidden_states.grad, head.grad):
            assert each.isfinite().all()


@given(st.integers(2, 9), st.floats(1e-6, 1 - 1e-6), st.floats(0, 30), st.integers(0, 2**31))
def test_the_integrand_is_no_less_than_zero(vocab_size, time, scale, seed):
    """Each of its terms is: r log(r / s) - r + s >= 0. Up to rounding of sums of size 1/t and 1/(1 - t)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, vocab_size, generator=generator, dtype=torch.double)
    ids, noised = torch.randint(vocab_size, (2, 6), generator=generator)
    times = torch.full((6,), time, dtype=torch.double)
    tokens = NoisedTokens(ids, noised, times, torch.ones(6, dtype=torch.double))
    _, nats = uniform_loss(logits, torch.eye(vocab_size, dtype=torch.double), tokens, "elbo")
    assert (nats > -1e-8).all()


def test_the_integrand_of_a_certain_and_right_estimate_is_zero():
    ids, noised = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2])
    times = torch.tensor([0.2, 0.5, 0.9], dtype=torch.double)
    logits = 1e3 * torch.eye(3, dtype=torch.double)[ids]
    tokens = NoisedTokens(ids, noised, times, torch.ones(3, dtype=torch.double))
    _, nats = uniform_loss(logits, torch.eye(3, dtype=torch.double), tokens, "elbo")
    torch.testing.assert_close(nats, torch.zeros(3, dtype=torch.double), rtol=0, atol=1e-12)


def test_no_gradient_is_computed_where_none_is_asked(monkeypatch):
    asked, elbo = [], diffusion_uniform_prime_v2._elbo
    monkeypatch.setattr(diffusion_uniform_prime_v2, "_elbo", lambda *args: asked.append(args[-1]) or elbo(*args))
    tokens, (hidden_states, head) = some_tokens(3, 13), states_and_head(3, 13)
    with torch.no_grad():
        uniform_loss(hidden_states, head, tokens, "elbo")
    uniform_loss(hidden_states, head.detach(), tokens, "elbo")[0].backward()
    assert asked == [False, True]
    assert hidden_states.grad is not None and head.grad is None


def test_gradients_of_the_head_alone():
    """A frozen backbone."""
    tokens, (hidden_states, head) = some_tokens(5, 13), states_and_head(5, 13)
    both = torch.autograd.grad(uniform_loss(hidden_states, head, tokens, "elbo")[0], head)[0]
    alone = torch.autograd.grad(uniform_loss(hidden_states.detach(), head, tokens, "elbo")[0], head)[0]
    torch.testing.assert_close(alone, both, rtol=0, atol=0)


def test_a_second_backward_pass_and_a_second_derivative_are_refused():
    tokens, (hidden_states, head) = some_tokens(3, 13), states_and_head(3, 13)
    loss, _ = uniform_loss(hidden_states, head, tokens, "elbo")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken; compute the loss again"):
        loss.backward()
    loss, _ = uniform_loss(hidden_states, head, tokens, "elbo")
    (gradient,) = torch.autograd.grad(loss.square(), head, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='token' is not one of elbo, posterior"):
        uniform_loss(torch.ones(1, 2), torch.ones(11, 2), some_tokens(1, 11), "token")


# The bound


@pytest.mark.parametrize(("vocab_size", "length"), LAWS)
def test_the_bound_of_the_optimal_denoiser_is_the_entropy(vocab_size, length):
    """Correlated tokens. Both ends of time are in the integral: nothing is added, nothing is left out."""
    law = correlated_law(vocab_size, length, seed=vocab_size * length)
    bound = exact_bound(optimal_uniform(law, vocab_size, length), all_sequences(vocab_size, length))
    # The quadrature's error falls as its points^-4, from 4e-8 for 100 points.
    assert float((law * bound).sum()) == pytest.approx(entropy(law), abs=1e-8)


@pytest.mark.parametrize(("vocab_size", "length"), LAWS)
def test_with_the_posterior_given_a_noised_token_itself_the_bound_is_above_the_entropy(vocab_size, length):
    law = correlated_law(vocab_size, length, seed=vocab_size * length)
    model = optimal_uniform(law, vocab_size, length, own=True)
    bound = exact_bound(model, all_sequences(vocab_size, length))
    assert float((law * bound).sum()) > entropy(law) + 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_both_losses_are_least_for_the_optimal_denoiser(kind):
    """At each time, in expectation over texts and noise: its gradient with respect to every logit is zero."""
    law, times = correlated_law(3, 2), torch.tensor([0.1, 0.5, 0.9], dtype=torch.double)
    x, z = all_sequences(3, 2), all_sequences(3, 2)
    model = optimal_uniform(law, 3, 2)
    for time in times:
        chance = law.unsqueeze(1) * forward_chances(x.unsqueeze(1), z, 1 - time, 3).prod(-1)  # (X, Z)
        logits = estimates(model, z, time.expand(len(z))).log().requires_grad_()  # (Z, L, V)
        shape = (len(x), len(z), 2)
        tokens = NoisedTokens(
            x.unsqueeze(1).expand(shape).flatten(),
            z.expand(shape).flatten(),
            time.expand(shape).flatten(),
            chance.unsqueeze(-1).expand(shape).flatten(),
        )
        loss, _ = uniform_loss(logits.expand(len(x), -1, -1, -1).flatten(0, 2), torch.eye(3).double(), tokens, kind)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def end_terms(model, ids, t_0: float, t_1: float) -> torch.Tensor:
    """E -log p(x | z_t0) + KL(q(z_t1 | x) || uniform) of sequences ids (B, L), by enumeration."""
    vocab_size, z = model.config.vocab_size, all_sequences(model.config.vocab_size, ids.shape[1])
    times = torch.full((len(z),), t_0, dtype=torch.double)
    posterior = naive_posterior(estimates(model, z, times), z, times.unsqueeze(1))  # (Z, L, V)
    chance = forward_chances(ids.unsqueeze(1), z, 1 - t_0, vocab_size).prod(-1)  # (B, Z)
    index = ids.unsqueeze(1).expand(-1, len(z), -1).unsqueeze(-1)
    log_x = posterior.log().expand(len(ids), -1, -1, -1).gather(-1, index).squeeze(-1).sum(-1)
    own = (1 - t_1) + t_1 / vocab_size
    divergence = own * math.log(vocab_size * own) + (vocab_size - 1) * t_1 / vocab_size * math.log(t_1)
    return -(chance * log_x).sum(1) + ids.shape[1] * divergence


def test_an_integral_between_two_times_lacks_what_its_ends_cost():
    """The optimal denoiser: with both ends it is the entropy, but for the dependence of tokens drawn in one step at
    t0 and of what is left at t1, which are of second order."""
    law, ids, (t_0, t_1) = correlated_law(3, 2), all_sequences(3, 2), (1e-3, 1 - 1e-3)
    model = optimal_uniform(law, 3, 2)
    nodes, weights = gauss_legendre(200)
    u_0, u_1 = (torch.tensor(each, dtype=torch.double).logit() for each in (t_0, t_1))
    times = (u_0 + (u_1 - u_0) * nodes).sigmoid()
    inner = (expected_integrand(model, ids, times) * weights * (u_1 - u_0) * times * (1 - times)).sum(1)
    without = float((law * inner).sum())
    total = without + float((law * end_terms(model, ids, t_0, t_1)).sum())
    assert without < entropy(law) - 0.005
    assert entropy(law) - 1e-9 < total < entropy(law) + 1e-5
    ends = [float((law * end_terms(model, ids, t, 1 - t)).sum()) for t in (1e-4, 1e-6, 1e-12)]
    assert ends[0] > ends[1] > ends[2]
    assert ends[2] < 1e-10, "which is why the integral from 0 to 1 needs none"


# The reverse process


@pytest.mark.parametrize("end", [0.0, 0.3])
@pytest.mark.parametrize("start", [0.4, 0.9, 1.0])
def test_a_reverse_step_is_bayes_rule(start, end):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(6, 5, generator=generator, dtype=torch.double).softmax(-1)
    ids = torch.randint(5, (6,), generator=generator)
    alpha = [torch.full((6,), 1 - each, dtype=torch.double) for each in (start, end)]
    weights = reverse_step(p, ids, *alpha)
    expected = torch.stack([naive_reverse_step(p[m], int(ids[m]), start, end) for m in range(6)])
    own = p.gather(1, ids.unsqueeze(1))
    torch.testing.assert_close(weights.sum(1, keepdim=True), 5 * (1 - start) * own + start, **FLOAT64)
    torch.testing.assert_close(weights / weights.sum(1, keepdim=True), expected, **FLOAT64)
    if end == 0:
        posterior = naive_posterior(p, ids, torch.full((6,), start, dtype=torch.double))
        torch.testing.assert_close(expected, posterior, **FLOAT64)


def discrete_bound(model, ids, num_steps: int) -> torch.Tensor:
    """The bound of N steps (B,): the sum of KL(q(z_s | z_t, x) || the model's step), by enumeration of z_t."""
    vocab_size, z = model.config.vocab_size, all_sequences(model.config.vocab_size, ids.shape[1])
    total = torch.zeros(len(ids), dtype=torch.double)
    for step in range(num_steps):
        t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
        p = estimates(model, z, torch.full((len(z),), t, dtype=torch.double)).flatten(0, 1)
        alpha = [torch.full((len(p),), 1 - each, dtype=torch.double) for each in (t, s)]
        model_step = reverse_step(p, z.flatten(), *alpha)
        model_step = (model_step / model_step.sum(1, keepdim=True)).log()
        for b, x in enumerate(ids):
            known = torch.nn.functional.one_hot(x.expand_as(z).flatten(), vocab_size).double()
            true_step = reverse_step(known, z.flatten(), *alpha)
            true_step = true_step / true_step.sum(1, keepdim=True)
            divergence = (torch.xlogy(true_step, true_step) - true_step * model_step).sum(1).view(z.shape).sum(1)
            total[b] += (forward_chances(x, z, 1 - t, vocab_size).prod(1) * divergence).sum()
    return total


@pytest.fixture(scope="module")
def network():
    return small_uniform(seed=3, vocab_size=3).double()


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_bound_of_finitely_many_steps_is_above_minus_log_of_their_exact_probability(network, num_steps):
    """The law of the sampler's chain by products of its transition matrices; Jensen's inequality, term by term."""
    ids = all_sequences(3, 2)
    law = chain_law(reverse_chain(network, num_steps, 2), torch.full((9,), 1 / 9, dtype=torch.double))
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    bound = discrete_bound(network, ids, num_steps)
    assert (bound > -law.log() - 1e-12).all()
    if num_steps > 1:
        assert (bound > -law.log() + 1e-3).any()


def test_the_bound_of_many_steps_tends_to_the_integral(network):
    """Its error falls as log(N) / N: by more than half from 64 to 256 steps, to less than 2%."""
    ids = all_sequences(3, 2)[[1, 5]]
    exact = exact_bound(network, ids, num_points=600)
    errors = [(discrete_bound(network, ids, num_steps) - exact).abs() for num_steps in (64, 256)]
    assert (errors[1] < 0.5 * errors[0]).all()
    assert (errors[1] < 0.02 * exact).all()


# Noise


def noise_of(rows: int, length: int, vocab_size: int = 7, scored=None, seed: int = 0):
    """(clean ids, draws): one level in each of `rows` strata."""
    ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(seed)).expand(rows, -1)
    scored = torch.ones_like(ids, dtype=torch.bool) if scored is None else scored.expand(rows, -1)
    levels = (torch.arange(rows, dtype=torch.double) + 0.5) / rows
    return ids, draw_noise(ids, scored, torch.arange(rows) + seed * rows, levels, vocab_size)


@pytest.mark.parametrize("power", [0, 1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_the_weighted_mean_over_draws_is_the_integral_over_time(num_tokens, power):
    """Of t^power times the number k of tokens that differ, which is binomial: n t (V - 1)/V, so the integral is
    n (V - 1)/V / (power + 2); and of t^power alone. 5 standard errors: a false alarm for one seed in 1.7 million."""
    rows = 20_000
    ids, noise = noise_of(rows, num_tokens)
    changed = (noise.ids != ids).sum(1)
    for values, integral in [(changed, num_tokens * 6 / 7 / (power + 2)), (1 + 0 * changed, 1 / (power + 1))]:
        terms = noise.weight * noise.times**power * values
        assert abs(float(terms.mean()) - integral) < 5 * float(terms.std()) / rows**0.5


def test_a_term_of_a_replaced_token_that_grows_as_one_over_time_has_no_large_weight():
    """t/k takes the 1/t out: with k/t in place of f every draw that replaces something is n + 1."""
    _, noise = noise_of(5000, 4)
    count = (torch.arange(5000) + 0.5).div(1000).floor()
    terms = (noise.weight * count / noise.times)[count > 0]
    torch.testing.assert_close(terms, torch.full_like(terms, 5.0), rtol=1e-12, atol=0)


def test_the_number_of_replaced_tokens_is_stratified_and_replacements_are_uniform():
    """Of 4 tokens k = 0..4 are replaced equally often; a replacement is each of the V tokens with probability 1/V,
    their own included. 5 standard errors for each of 7 tokens and 5 counts: a false alarm for one seed in 140,000."""
    rows, vocab_size = 20_000, 7
    ids, noise = noise_of(rows, 4, vocab_size)
    different = (noise.ids != ids).sum(1).double()
    for k, part in enumerate(different.chunk(5)):
        assert abs(float(part.mean()) - k * 6 / 7) < 5 * (k * 6 / 49 / len(part)) ** 0.5 + 1e-12
    last = noise.ids[-rows // 5 :].flatten()  # all of them are replaced
    counts = last.bincount(minlength=vocab_size).double()
    expected = len(last) / vocab_size
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_times_without_a_replaced_token_follow_the_least_of_uniforms():
    """Kolmogorov-Smirnov against 1 - (1 - t)^(n + 1); levels are stratified, so the distance is far below chance."""
    _, noise = noise_of(8000, 3)
    first = noise.times[:2000]
    assert kstest(first.numpy(), lambda t: 1 - (1 - t) ** 4).statistic < 2e-3
    assert (noise.weight[:2000] == 1).all()
    assert kstest(noise.times[-2000:].numpy(), lambda t: t**3).pvalue > 1e-6, "k = n: the largest of n uniforms"


def test_noise_does_not_depend_on_where_padding_and_given_tokens_lie():
    ids, scored = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[False, True, False, True, True, False]])
    for key in range(50):
        keys, level = torch.tensor([key]), torch.tensor([(key + 0.5) / 50], dtype=torch.double)
        noise = draw_noise(ids, scored, keys, level, 7)
        alone = draw_noise(ids[:, scored[0]], torch.ones(1, 3, dtype=torch.bool), keys, level, 7)
        assert torch.equal(noise.ids[:, scored[0]], alone.ids)
        assert torch.equal(noise.ids[:, ~scored[0]], ids[:, ~scored[0]])
        assert (noise.times, noise.weight) == (alone.times, alone.weight)


def test_equal_keys_give_equal_noise_and_others_other():
    keys, levels = torch.tensor([1, 1, 2]), torch.full((3,), 0.9, dtype=torch.double)
    ids = torch.zeros(3, 40, dtype=torch.long)
    noise = draw_noise(ids, torch.ones_like(ids, dtype=torch.bool), keys, levels, 1000)
    assert torch.equal(noise.ids[0], noise.ids[1]) and noise.times[0] == noise.times[1]
    assert not torch.equal(noise.ids[0], noise.ids[2]) and noise.times[0] != noise.times[2]


@given(st.integers(0, 5), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0, 2**31))
def test_any_level_gives_a_time_and_a_weight_that_can_be_used(num_tokens, level, key):
    scored = torch.arange(6).unsqueeze(0) < num_tokens
    levels = torch.tensor([level], dtype=torch.double)
    noise = draw_noise(torch.zeros(1, 6, dtype=torch.long), scored, torch.tensor([key]), levels, 5)
    assert T_MIN <= float(noise.times) <= 1 - T_MIN
    assert 0 < float(noise.weight) <= num_tokens + 1
    assert 0 < float(excess(noise.times, 5)) < 1e17


def test_quadrature_nodes_integrate_logarithms_at_both_ends():
    times, weights = time_nodes(200)
    assert float((weights * times.log()).sum()) == pytest.approx(-1, abs=1e-8)
    assert float((weights * (1 - times).log()).sum()) == pytest.approx(-1, abs=1e-8)
