"""Nested order with rates of its own for each stage, and noise that hides whole tokens at times."""

import itertools

import pytest
import torch
from enumeration import (
    all_sequences,
    correlated_law,
    entropy,
    gauss_legendre,
    optimal_model,
    small_config,
    small_model,
)
from scipy.stats import chisquare

from prime_v2.diffusion_prime_v2 import Noise, RevealOrder, draw_noise
from prime_v2.draws_prime_v2 import sampled_rows
from prime_v2.generation_prime_v2 import draw_schedule
from prime_v2.likelihood_prime_v2 import score_rows

FALSE_ALARM = 1e-6  # of each chi-square test for a fresh seed; the seeds are fixed
NESTED = {"reveal_order": "nested", "noise_form": "time", "base": 2}
RATES = [(2.0, 1.0), (4.0, 1.0), (1.0, 3.0)]


def stage_law(t: float, rates: tuple[float, float]) -> list[float]:
    """Probability that a token has 0, 1, 2 stages revealed at time t: two exponential waits in -log t."""
    first, second = rates
    done = 1 - (first * t**second - second * t**first) / (first - second)
    return [t**first, 1 - t**first - done, done]


def bound(model, ids: torch.Tensor, rates: tuple[float, float]) -> torch.Tensor:
    """(B,) nats: the integral over t of 1/t times the mean over states of the sum of a_j times the next stage's nats.

    Quadrature over t, every state enumerated, each stage's nats from the filtered logits by plain sums.
    """
    ends, codes, length = (0, *model.config.stage_digits), model.code_table.codes[:-1], ids.shape[1]
    total = torch.zeros(len(ids), dtype=torch.double)
    for stages in itertools.product(range(3), repeat=length):
        states = model.encode(ids)
        for i, stage in enumerate(stages):
            states[:, i, ends[stage] :] = model.config.base
        with torch.no_grad():
            q = model(subtoken_ids=states).logits.double().softmax(-1)
        nats = torch.zeros(len(ids), dtype=torch.double)
        for i, stage in enumerate(stages):
            if stage < 2:
                shown = ends[stage + 1]
                agrees = (codes[:, :shown] == codes[ids[:, i], None, :shown]).all(-1)
                nats -= rates[stage] * (q[:, i] * agrees).sum(1).log()
        for t, weight in zip(*gauss_legendre(40), strict=True):
            law = stage_law(float(t), rates)
            total += weight / t * nats * torch.tensor([law[stage] for stage in stages]).prod()
    return total


@pytest.mark.parametrize("rates", [(2.5, 1.0), (4.0, 1.0), (1.0, 3.0)], ids=str)
def test_with_any_rates_the_bound_of_the_optimal_denoiser_is_the_entropy(rates):
    law, ids = correlated_law(5, 2, seed=1), all_sequences(5, 2)
    model = optimal_model(
        law, 2, vocab_size=5, num_subtokens=3, stage_digits=[1, 3], stage_rates=list(rates), **NESTED
    )
    assert float((law * bound(model, ids, rates)).sum()) == pytest.approx(entropy(law), abs=1e-6)  # the quadrature's


@pytest.mark.parametrize("rates", [(4.0, 1.0), (1.0, 3.0)], ids=str)
def test_draws_estimate_that_bound(rates):
    """A random network: the mean of 2,000 draws is within 5 standard errors, a false alarm in under 1e-5 of seeds."""
    model = small_model(
        seed=2, vocab_size=5, num_subtokens=3, stage_digits=[1, 3], stage_rates=list(rates), **NESTED
    ).double()
    ids = torch.tensor([[3, 0, 4], [1, 1, 2]])
    found = model.log_likelihood(ids, method="nested", num_samples=2000)
    assert found.is_bound
    error = (found.value + bound(model, ids, rates)).abs()
    assert (error < 5 * found.stderr).all()
    assert (found.stderr < 0.4).all()


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_noise_shows_each_stage_with_its_probability(rates):
    order = RevealOrder("nested", 3, (1, 3), rates)
    for t in (0.2, 0.7):
        levels = torch.full((4000,), t, dtype=torch.double)
        noise = draw_noise(torch.ones(4000, 2, dtype=torch.bool), order, torch.arange(4000), levels, "time")
        seen = noise.visible.sum(-1).flatten()
        counts = [(seen == shown).sum().item() for shown in (0, 1, 3)]
        limit = stage_law(t, rates) if rates != (2.0, 1.0) else [t**2, 2 * t * (1 - t), (1 - t) ** 2]
        assert chisquare(counts, [8000 * each for each in limit]).pvalue > FALSE_ALARM


def test_rates_of_sorted_uniform_times_are_the_default():
    """(J, ..., 2, 1) and no rates are one process: the same weighted nats in expectation, here by their draws' law."""
    plain, rated = RevealOrder("nested", 4, (1, 2, 4)), RevealOrder("nested", 4, (1, 2, 4), (3.0, 2.0, 1.0))
    hidden = torch.arange(4)
    assert rated.rate(hidden).tolist() == plain.rate(hidden).tolist() == [0, 1, 2, 3]
    levels = torch.full((20_000,), 0.4, dtype=torch.double)
    counts = []
    for order in (plain, rated):
        noise = draw_noise(torch.ones(20_000, 1, dtype=torch.bool), order, torch.arange(20_000), levels, "time")
        counts.append(noise.hidden_count.flatten().bincount(minlength=4))
    limit = [20_000 * each for each in (0.6**3, 3 * 0.6**2 * 0.4, 3 * 0.6 * 0.4**2, 0.4**3)]
    assert all(chisquare(each.tolist(), limit).pvalue > FALSE_ALARM for each in counts)


@pytest.mark.parametrize("rates", [(4.0, 1.0), (1.0, 3.0)], ids=str)
def test_the_sampler_reveals_stages_at_the_times_of_the_rates(rates):
    from prime_v2.denoising_prime_v2 import Canvas

    rows, steps = 8000, 6
    blank = torch.zeros(rows, 1, dtype=torch.long)
    yes = torch.ones(rows, 1, dtype=torch.bool)
    canvas = Canvas(blank, blank, yes, blank, yes, blank, slice(0, 1))
    schedule = draw_schedule(torch.arange(rows), canvas, RevealOrder("nested", 3, (1, 3), rates), steps)
    when = schedule.steps.gather(1, schedule.passes[:, 0])  # (rows, 2)
    assert (when[:, 0] <= when[:, 1]).all()
    edges = [1 - step / steps for step in range(steps + 1)]
    hidden = [[stage_law(t, rates)[0] for t in edges], [1 - stage_law(t, rates)[2] for t in edges]]
    for stage in range(2):
        limit = [rows * (before - after) for before, after in itertools.pairwise(hidden[stage])]
        assert chisquare(when[:, stage].bincount(minlength=steps).tolist(), limit).pvalue > FALSE_ALARM


def test_a_share_of_the_rows_hides_whole_tokens_whose_nats_are_the_tokens():
    model = small_model(seed=4, vocab_size=5, num_subtokens=3, stage_digits=[1, 3], reveal_order="nested", base=2)
    order = RevealOrder.from_config(model.config)
    maskable = torch.ones(400, 3, dtype=torch.bool)
    levels = torch.linspace(0.05, 0.95, 400, dtype=torch.double)
    keys = torch.arange(400)
    noise = draw_noise(maskable, order, keys, levels, "count", None, 0.5)
    partly = ((noise.visible.sum(-1) == 1).any(1)).sum()
    assert 60 < partly < 200  # of about 200 nested rows those that stop between stages
    ids = torch.arange(1200).view(400, 3) % 5
    states = torch.where(noise.visible, model.encode(ids), model.config.base)
    hidden_states = model.model(states).last_hidden_state
    _, nats = model.nats_of_hidden(hidden_states, ids, noise, order, "subtoken", torch.ones(400).double())
    plain = draw_noise(maskable, order, keys, levels, "count")
    whole = draw_noise(maskable, RevealOrder("token", 3), keys, levels, "count")
    for other, kind in ((plain, order), (whole, RevealOrder("token", 3))):
        same = (noise.visible == other.visible).flatten(1).all(1)
        states = torch.where(other.visible, model.encode(ids), model.config.base)
        hidden_states = model.model(states).last_hidden_state
        _, expected = model.nats_of_hidden(hidden_states, ids, other, kind, "subtoken", torch.ones(400).double())
        chosen = same & (noise.weight == other.weight)
        assert chosen.sum() > 100
        ambiguous = (plain.visible == whole.visible).flatten(1).all(1)
        torch.testing.assert_close(nats[chosen & ~ambiguous], expected[chosen & ~ambiguous], rtol=1e-5, atol=1e-5)


def test_the_share_is_no_bound_and_rates_have_no_count_form():
    model = small_model(
        vocab_size=5, num_subtokens=3, stage_digits=[1, 3], objective="subtoken", token_order_share=0.5,
        reveal_order="nested", base=2,
    )  # fmt: skip
    assert not model.loss_is_bound
    order = RevealOrder("nested", 3, (1, 3), (4.0, 1.0))
    one = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="stage_rates have no count form; use the time form"):
        draw_noise(one, order, torch.zeros(1, dtype=torch.long), torch.full((1,), 0.5).double(), "count")
    rows = next(sampled_rows(torch.tensor([1, 2]), one[0], 0, order, 4, torch.tensor(7)))
    assert isinstance(rows.noise, Noise)
    assert (rows.factor > 1).all()  # 1 / t
    assert callable(score_rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage_rates": [1.0, 2.0]}, r"stage_rates=\[1.0, 2.0\] needs one rate for each of stage_digits=None"),
        ({**NESTED, "stage_digits": [1, 4], "stage_rates": [1.0]}, "needs one rate for each"),
        ({**NESTED, "stage_digits": [1, 4], "stage_rates": [1.0, 0.0]}, "must be positive"),
        (
            {**NESTED, "stage_digits": [1, 4], "stage_rates": [2.0, 1.0], "noise_form": "count"},
            "need noise_form='time', not 'count'",
        ),
        ({"token_order_share": 0.5}, "needs reveal_order='nested', not 'digit'"),
        ({"token_order_share": 1.5}, r"token_order_share=1.5 is outside \[0, 1\]"),
    ],
)
def test_impossible_stages_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        small_config(**fields)
