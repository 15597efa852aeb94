"""Corrector steps of uniform-state diffusion, enumerated: the law that they leave as it is, and what they bring."""

import itertools

import pytest
import torch
from chi_square import ROWS, assert_follows
from enumeration import (
    all_sequences,
    chain_law,
    correlated_law,
    estimates,
    forward_chances,
    optimal_uniform,
    reverse_chain,
)
from networks import small_uniform

from prime_v2 import PredictorCorrectorSamplerConfig
from prime_v2.generation_uniform_process_prime_v2 import with_correctors

V, LENGTH = 3, 3
STATES = all_sequences(V, LENGTH)
NOTHING = torch.empty(ROWS, 0, dtype=torch.long)
UNIFORM = torch.full((len(STATES),), 1 / len(STATES), dtype=torch.double)


@pytest.fixture(scope="module")
def law() -> torch.Tensor:
    return correlated_law(V, LENGTH, seed=2)


@pytest.fixture(scope="module")
def optimal(law):
    return optimal_uniform(law, V, LENGTH)


def noised(law: torch.Tensor, t: float) -> torch.Tensor:
    """q_t (Z,): the law of texts of which each token is kept with probability 1 - t, else replaced."""
    return law @ forward_chances(STATES[:, None], STATES[None], 1 - t, V).prod(-1)


def corrector(model, t: float, num_redrawn: int) -> torch.Tensor:
    """Transition matrix (Z, Z) of a corrector step that redraws so many tokens, each set equally likely; loops."""
    p = estimates(model, STATES, torch.full((len(STATES),), t, dtype=torch.double))
    sets = list(itertools.combinations(range(LENGTH), num_redrawn))
    matrix = torch.zeros(len(STATES), len(STATES), dtype=torch.double)
    for z, chosen in itertools.product(range(len(STATES)), sets):
        row = torch.ones(len(STATES), dtype=torch.double)
        for column in range(LENGTH):
            if column in chosen:
                row *= (1 - t) * p[z, column][STATES[:, column]] + t / V
            else:
                row *= STATES[:, column] == STATES[z, column]
        matrix[z] += row / len(sets)
    return matrix


def chain(model, sampler, num_passes: int) -> list[torch.Tensor]:
    """The transition matrices of all passes, with one step of `reverse_chain` for each predictor step."""
    plan = with_correctors(sampler, num_passes)
    predictors = iter(reverse_chain(model, sum(t != s for t, s in plan), LENGTH))
    redrawn = max(1, round(sampler.corrector_share * LENGTH))
    return [corrector(model, t, redrawn) if t == s else next(predictors) for t, s in plan]


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Total variation."""
    return float((first - second).abs().sum()) / 2


def ancestral(model, num_passes: int) -> torch.Tensor:
    return chain_law(reverse_chain(model, num_passes, LENGTH), UNIFORM)


# What a corrector step leaves as it is


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.95])
def test_redrawing_one_token_leaves_the_law_of_noised_texts_as_it_is(law, optimal, t):
    """To 1e-12: sums of 27 float64 terms."""
    q = noised(law, t)
    assert distance(q @ corrector(optimal, t, 1), q) < 1e-12
    assert distance(UNIFORM @ corrector(optimal, t, 1), UNIFORM) > 1e-3, "it does move other laws"


def test_repeated_it_leads_from_any_law_to_that_of_noised_texts(law, optimal):
    """A Gibbs sampler of a positive law has no other law that stays."""
    matrix, q = corrector(optimal, 0.3, 1), noised(law, 0.3)
    distances = [distance(UNIFORM @ torch.linalg.matrix_power(matrix, n), q) for n in (0, 1, 4, 16, 64, 512)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1 and distances[-1] < 1e-6


def test_the_leave_one_out_posterior_gets_there_sooner_than_the_one_that_has_seen_the_token(law, optimal):
    """x ~ p(x | z) and then z ~ q(z | x) leave q_t as it is, too, but are held back by the token that they replace."""
    q, laws = noised(law, 0.3), {}
    for own in (False, True):
        matrix = corrector(optimal_uniform(law, V, LENGTH, own=own), 0.3, 1)
        assert distance(q @ matrix, q) < 1e-12
        laws[own] = UNIFORM @ torch.linalg.matrix_power(matrix, 8)
    assert distance(laws[False], q) < 0.7 * distance(laws[True], q)


def test_several_at_once_leave_it_only_nearly_and_the_error_shrinks_with_noise(law, optimal):
    """Measured, in total variation, on three strongly dependent tokens."""
    errors = {}
    for t in (0.1, 0.3, 0.8):
        q = noised(law, t)
        errors[t] = [distance(q @ corrector(optimal, t, k), q) for k in (2, 3)]
        assert 1e-3 < errors[t][0] < errors[t][1]
    assert errors[0.1][0] == pytest.approx(0.132, abs=1e-3) and errors[0.8][0] == pytest.approx(0.004, abs=1e-3)
    assert errors[0.1] > errors[0.3] > errors[0.8]


# What corrector steps bring

ONE_TOKEN = PredictorCorrectorSamplerConfig(corrector_share=0.34)  # one of three


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_after_the_same_predictor_steps_the_samples_are_nearer_to_the_law(law, optimal, num_steps):
    plans = (with_correctors(ONE_TOKEN, num_passes) for num_passes in itertools.count(1))
    plan = next(plan for plan in plans if sum(t != s for t, s in plan) == num_steps and plan[-2][0] == plan[-2][1])
    corrected = chain_law(chain(optimal, ONE_TOKEN, len(plan)), UNIFORM)
    assert len(plan) < 1.3 * num_steps
    assert distance(corrected, law) < 0.8 * distance(ancestral(optimal, num_steps), law)


@pytest.mark.parametrize("num_passes", [8, 16, 32])
def test_with_fewer_predictor_steps_in_as_many_passes_the_samples_are_nearer_to_the_law(law, optimal, num_passes):
    matrices = chain(optimal, ONE_TOKEN, num_passes)
    assert len(matrices) <= num_passes
    assert distance(chain_law(matrices, UNIFORM), law) < 0.8 * distance(ancestral(optimal, num_passes), law)


@pytest.mark.parametrize(
    "sampler",
    [
        PredictorCorrectorSamplerConfig(corrector_steps=2, corrector_share=0.1, t_on=0.7),
        PredictorCorrectorSamplerConfig(corrector_share=0.6, t_on=0.7),
    ],
    ids=["one token", "two at once"],
)
def test_samples_of_a_random_network_follow_the_enumerated_chain(sampler):
    network = small_uniform(seed=3, vocab_size=V, scale=0.3)
    matrices = chain(network, sampler, 5)
    exact = chain_law(matrices, UNIFORM)
    assert distance(exact, ancestral(network, 5)) > 0.02 and len(matrices) > 3
    samples = network.generate(NOTHING, max_new_tokens=LENGTH, max_denoising_steps=5, sampler_config=sampler, seed=1)
    assert_follows(samples, dict(zip(map(tuple, STATES.tolist()), exact.tolist(), strict=True)))


# Passes


def test_the_passes_are_those_of_the_predictor_with_its_correctors_and_no_more_than_asked_for():
    sampler = PredictorCorrectorSamplerConfig(corrector_steps=2, t_on=0.6, t_off=0.2)
    assert with_correctors(sampler, 9) == [
        (1.0, 0.8),
        (0.8, pytest.approx(0.6)),
        *[(pytest.approx(0.6), pytest.approx(0.6))] * 2,
        (pytest.approx(0.6), pytest.approx(0.4)),
        *[(pytest.approx(0.4), pytest.approx(0.4))] * 2,
        (pytest.approx(0.4), pytest.approx(0.2)),
        (pytest.approx(0.2), 0.0),
    ]
    for each in (sampler, ONE_TOKEN, PredictorCorrectorSamplerConfig(corrector_steps=50, t_on=1.0)):
        for num_passes in range(1, 40):
            plan = with_correctors(each, num_passes)
            assert 1 <= len(plan) <= num_passes and plan[0][0] == 1 and plan[-1][1] == 0
            assert all(before[1] == after[0] for before, after in itertools.pairwise(plan))


def test_a_corrector_step_changes_its_share_of_the_tokens_and_none_that_is_given(monkeypatch):
    model, given = small_uniform(), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda ids, times, **more: given.append((ids, times)) or forward(ids, times, **more)
    )
    sampler = PredictorCorrectorSamplerConfig(corrector_share=0.25, t_on=1.0)
    out = model.generate(
        torch.tensor([[3, 11, 11, 11], [11, 5, 1, 2]]),
        max_new_tokens=9,
        max_denoising_steps=15,
        sampler_config=sampler,
        seed=0,
        return_dict_in_generate=True,
    )
    assert out.num_forward.tolist() == [15, 15] and len(given) == 15
    changed = torch.zeros(2, dtype=torch.long)
    for number in range(1, 14, 2):
        (before, time), (after, next_time) = given[number], given[number + 1]
        assert torch.equal(time, next_time)
        moved = before != after
        assert (moved.sum(1) <= torch.tensor([3, 2])).all(), "a quarter of 12 tokens, of 10"
        assert not moved[0, 0] and not moved[1, 1:4].any()
        changed += moved.sum(1)
    assert (changed > 7).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corrector_steps": 0}, "corrector_steps=0 must be an integer of at least 1; use 1"),
        ({"corrector_steps": 1.5}, "corrector_steps=1.5 must be an integer"),
        ({"corrector_share": 0}, r"corrector_share=0 is outside \(0, 1\]; use 0.1"),
        ({"corrector_share": 1.5}, r"corrector_share=1.5 is outside \(0, 1\]; use 0.1"),
        ({"t_on": 0.2, "t_off": 0.3}, "t_on=0.2 and t_off=0.3 must be 0 <= t_off < t_on <= 1; use 0.2 and 0.0"),
        ({"t_on": float("nan")}, "t_on=nan and t_off=0.0 must be"),
    ],
)
def test_what_a_corrector_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"PredictorCorrectorSamplerConfig: {message}"):
        PredictorCorrectorSamplerConfig(**fields)
