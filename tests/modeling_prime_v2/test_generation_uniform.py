"""`generate` of uniform-state diffusion against enumerated laws; its passes; the deterministic decode."""

import itertools

import pytest
import torch
from chi_square import ROWS, assert_follows
from enumeration import (
    all_sequences,
    chain_law,
    correlated_law,
    estimates,
    naive_posterior,
    optimal_uniform,
    reverse_chain,
)
from networks import small_uniform, some_ids

from prime_v2.generation_process_prime_v2 import PrimeV2GenerationOutput

NOTHING = torch.empty(ROWS, 0, dtype=torch.long)
UNIFORM = torch.full((9,), 1 / 9, dtype=torch.double)  # over the sequences of two of three tokens


def law_of(law: torch.Tensor, sequences: torch.Tensor) -> dict[tuple, float]:
    """The probability of each of the sequences that have one."""
    return {tuple(each): p for each, p in zip(sequences.tolist(), law.tolist(), strict=True) if p > 0}


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().sum()) / 2


@pytest.fixture(scope="module")
def network():
    return small_uniform(seed=3, vocab_size=3, scale=0.3)


# The law of the samples


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_samples_follow_the_enumerated_chain_of_a_random_network(network, num_steps):
    law = chain_law(reverse_chain(network, num_steps, 2), UNIFORM)
    samples = network.generate(NOTHING, max_new_tokens=2, max_denoising_steps=num_steps, seed=1)
    assert_follows(samples, law_of(law, all_sequences(3, 2)))


def test_the_enumerated_chains_differ_enough_for_the_test_to_tell_them_apart(network):
    """A distance of 0.02 adds at least 4 * ROWS * 0.02**2 = 32 to the chi-square statistic."""
    laws = [chain_law(reverse_chain(network, num_steps, 2), UNIFORM) for num_steps in (1, 2, 3)]
    assert distance(laws[0], laws[2]) > 0.02 and distance(laws[1], laws[2]) > 0.02
    # A sampler that forgot to change tokens again would keep what the first of two steps has drawn.
    first = chain_law(reverse_chain(network, 2, 2)[:1], UNIFORM)
    assert distance(first, laws[1]) > 0.02


def test_many_steps_with_the_optimal_denoiser_sample_the_data_distribution():
    """Correlated tokens. Of 256 steps the enumerated law is 0.003 from the data's, which moves the chi-square
    statistic of 3,000 samples by less than 1."""
    law = correlated_law(3, 2, seed=2)
    law = 0.9 * law + 0.1 / 9
    model = optimal_uniform(law, 3, 2)
    chain = chain_law(reverse_chain(model, 256, 2), UNIFORM)
    assert distance(chain, law) < 0.003
    assert distance(law, UNIFORM) > 0.2
    samples = model.generate(NOTHING[:3000], max_new_tokens=2, max_denoising_steps=256, seed=6)
    assert_follows(samples, law_of(law, all_sequences(3, 2)))


def test_infilled_samples_follow_the_enumerated_chain_between_prompt_and_suffix(network):
    """A token to be generated inside the prompt, padding before it, one new token and a suffix: 2 ? ? 1."""
    given = torch.tensor([2, -1, -1, 1])
    states = all_sequences(3, 4)
    possible = (states[:, 0] == 2) & (states[:, 3] == 1)
    law = chain_law(reverse_chain(network, 2, 4, given), possible.double() / possible.sum())
    prompt, mask = torch.tensor([[0, 2, 3]]).repeat(ROWS, 1), torch.tensor([[0, 1, 1]]).repeat(ROWS, 1)
    suffix = torch.tensor([[1]]).repeat(ROWS, 1)
    samples = network.generate(prompt, mask, suffix, max_new_tokens=1, max_denoising_steps=2, seed=3)
    assert torch.equal(samples[:, [0, 1, 4]], torch.tensor([[0, 2, 1]]).expand(ROWS, -1))
    assert_follows(samples[:, 2:4], law_of(law[possible], all_sequences(3, 2)))


def sharpened(p: torch.Tensor) -> torch.Tensor:
    """Temperature 1/2."""
    return p**2 / (p**2).sum(-1, keepdim=True)


def cut(p: torch.Tensor) -> torch.Tensor:
    """top_p = 0.6: the likeliest tokens until 0.6 is reached, by loops."""
    kept = torch.zeros_like(p)
    for index in itertools.product(*map(range, p.shape[:-1])):
        mass = 0.0
        for token in sorted(range(p.shape[-1]), key=lambda v: -float(p[index][v])):
            if mass < 0.6:
                kept[index][token] = p[index][token]
            mass += float(p[index][token])
    return kept / kept.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("options", "change"), [({"temperature": 0.5}, sharpened), ({"top_p": 0.6}, cut)], ids=["temperature", "top_p"]
)
def test_temperature_and_top_p_change_the_estimate_of_every_step(network, options, change):
    law = chain_law(reverse_chain(network, 2, 2, change=change), UNIFORM)
    samples = network.generate(NOTHING, max_new_tokens=2, max_denoising_steps=2, seed=4, **options)
    assert_follows(samples, law_of(law, all_sequences(3, 2)))
    assert distance(law, chain_law(reverse_chain(network, 2, 2), UNIFORM)) > 0.02


# Passes


def test_every_row_takes_one_pass_a_step_and_the_network_never_sees_the_mask(monkeypatch):
    model, given = small_uniform(), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda ids, times, **kwargs: given.append((ids, times)) or forward(ids, times, **kwargs),
    )
    prompt = torch.tensor([[3, 11, 5], [1, 2, 4]])  # the second row has nothing to generate
    out = model.generate(prompt, max_length=3, seed=0, max_denoising_steps=5, return_dict_in_generate=True)
    assert isinstance(out, PrimeV2GenerationOutput) and out.num_forward.tolist() == [5, 0]
    assert torch.equal(out.sequences[1], prompt[1]) and out.sequences[0, [0, 2]].tolist() == [3, 5]
    assert [each.tolist() for _, each in given] == [[pytest.approx(1 - m / 5)] for m in range(5)]
    assert all(int(ids.max()) < 11 and ids[:, [0, 2]].tolist() == [[3, 5]] for ids, _ in given)


# The deterministic decode


def naive_greedy(model, prompt: list[int], num_new: int, num_steps: int) -> tuple[list[int], int]:
    """(The decode of a prompt, how often a token was revised), from the noise that the first pass shows; loops."""
    given, forward = [], model.model.forward
    model.model.forward = lambda ids, *args, **kwargs: given.append(ids.clone()) or forward(ids, *args, **kwargs)
    model.generate(torch.tensor([prompt]), max_new_tokens=num_new, do_sample=False, max_denoising_steps=1)
    del model.model.forward
    noise, revised, held = given[0][0].tolist(), 0, {}
    state, steps = list(noise), min(num_steps, num_new)
    for m in range(steps):
        t = torch.tensor([1 - m / steps], dtype=torch.double)
        z = torch.tensor([state])
        posterior = naive_posterior(estimates(model, z, t), z, t.unsqueeze(1))[0]
        best = posterior.max(-1)
        new = sorted(range(len(prompt), len(state)), key=lambda i: -float(best.values[i]))
        kept = new[: num_new * (m + 1) // steps]
        state = [int(best.indices[i]) if i in kept else noise[i] for i in range(len(state))]
        revised += sum(held.get(i, state[i]) != state[i] for i in kept)
        held |= {i: state[i] for i in kept}
    return state, revised


@pytest.mark.parametrize("num_steps", [1, 3, 7, 50])
def test_the_decode_is_that_of_plain_loops(num_steps):
    total = 0
    for seed in range(4):
        model, prompt = small_uniform(seed=seed), some_ids(1, 3, seed=seed)
        expected, revised = naive_greedy(model, prompt[0].tolist(), 7, num_steps)
        out = model.generate(prompt, max_new_tokens=7, do_sample=False, max_denoising_steps=num_steps)
        assert out[0].tolist() == expected
        total += revised
    assert total > 0 or num_steps == 1, "a token that was taken is taken back"
