"""`generate` against enumerated distributions, with and without skipping the steps that reveal nothing."""

import itertools
import math

import pytest
import torch
from chi_square import ROWS, assert_follows, distance
from networks import ORDERS, one_layer
from torch import nn


def unit_digits(config) -> list[list[int]]:
    """The digits of each unit of a token, for "digit" and "token" as they are, for others stage by stage."""
    if config.reveal_order == "digit":
        return [[j] for j in range(config.num_subtokens)]
    ends = [config.num_subtokens] if config.reveal_order == "token" else config.stage_digits
    return [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def step_chances(config, num_steps: int) -> list[list[float]]:
    """The chance that each unit of a token is revealed in each of 1 or 3 steps."""
    if config.reveal_order == "coarse_first" and num_steps == 3:
        return [[1, 0, 0], [0, 1 / 2, 1 / 2]]  # half of three steps, rounded down, for each of two stages
    if config.reveal_order == "windows" and num_steps == 3:  # [0, 3/4] and [1/4, 1] cut at 1/3 and 2/3
        return [[4 / 9, 4 / 9, 1 / 9], [1 / 9, 4 / 9, 4 / 9]]
    if config.reveal_order in ("coarse_first", "windows"):
        assert num_steps == 1
    return [[1 / num_steps] * num_steps for _ in unit_digits(config)]


def posteriors(model, state: tuple, cache: dict) -> list[list[float]]:
    """q_i(v | state) for every token i of one state, a tuple of tuples of digits; the filter is a naive loop."""
    if state not in cache:
        with torch.no_grad():
            hidden_states = model.model(torch.tensor([state])).last_hidden_state[0]
            weights = (hidden_states @ model.head().T).double().exp().tolist()
        codes, base = model.code_table.codes[:-1].tolist(), model.config.base
        rows = []
        for digits, row in zip(state, weights, strict=True):
            fits = [all(y in (base, c) for y, c in zip(digits, code, strict=True)) for code in codes]
            kept = [weight * fit for weight, fit in zip(row, fits, strict=True)]
            rows.append([each / sum(kept) for each in kept])
        cache[state] = rows
    return cache[state]


def exact_distribution(model, given: list[int], num_steps: int) -> dict[tuple, float]:
    """Probability of each outcome: a sum over all assignments of the units to steps, and over all draws."""
    config, codes = model.config, model.code_table.codes.tolist()
    masked = [i for i, each in enumerate(given) if each == config.mask_token_id]
    units = [(i, digits) for i in masked for digits in unit_digits(config)]
    chances = step_chances(config, num_steps)
    start, cache, total = tuple(tuple(codes[each]) for each in given), {}, {}
    for assigned in itertools.product(range(num_steps), repeat=len(units)):
        each = len(chances)
        weight = math.prod(chances[number % each][step] for number, step in enumerate(assigned))
        if not weight:
            continue
        if config.stage_digits:
            assigned = [step for i in range(len(masked)) for step in sorted(assigned[i * each : (i + 1) * each])]
        beliefs = {start: 1.0}
        for step in sorted(set(assigned)):
            due = {}
            for (i, digits), when in zip(units, assigned, strict=True):
                if when == step:
                    due.setdefault(i, []).extend(digits)
            following = {}
            for state, chance in beliefs.items():
                q = posteriors(model, state, cache)
                for drawn in itertools.product(range(config.vocab_size), repeat=len(due)):
                    p, after = chance, [list(each) for each in state]
                    for (i, digits), v in zip(due.items(), drawn, strict=True):
                        p *= q[i][v]
                        for j in digits:
                            after[i][j] = codes[v][j]
                    after = tuple(map(tuple, after))
                    following[after] = following.get(after, 0.0) + p
            beliefs = {state: p for state, p in following.items() if p > 0}
        for state, p in beliefs.items():
            ids = tuple(codes.index(list(each)) for each in state)
            total[ids] = total.get(ids, 0.0) + p * weight
    assert math.isclose(sum(total.values()), 1.0, rel_tol=1e-9)
    return total


def all_steps_sampler(model, given: torch.Tensor, num_steps: int, seed: int) -> torch.Tensor:
    """The reverse process step by step, as the paper writes it: no step is skipped, no reveal step drawn ahead."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    states, units = model.encode(given), unit_digits(config)
    hidden = (given == config.mask_token_id).unsqueeze(-1).repeat(1, 1, len(units))
    waiting = hidden  # units by their own times; a token's stages are shown first to last, whichever is drawn
    chances = torch.tensor(step_chances(config, num_steps))  # (U, N)
    for step in range(num_steps):
        with torch.no_grad():
            probabilities = model(subtoken_ids=states).logits.double().softmax(-1)
        ids = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(given.shape)
        share = chances[:, step] / chances[:, step:].sum(1).clamp(min=1e-9)
        revealed = waiting & (torch.rand(hidden.shape, generator=generator) < share)
        waiting = waiting & ~revealed
        if config.stage_digits:  # as many stages as drawn, the first of the hidden ones
            revealed = hidden & (hidden.cumsum(-1) <= revealed.sum(-1, keepdim=True))
        hidden = hidden & ~revealed
        for u, digits in enumerate(units):
            for j in digits:
                due = revealed[:, :, u] & (states[:, :, j] == config.base)
                states[:, :, j] = torch.where(due, model.encode(ids)[:, :, j], states[:, :, j])
    return model.decode(states)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_samples_follow_the_enumerated_distribution_of_a_random_network(order, num_steps):
    """Two tokens of two binary digits, V = 3 so that a code is unused; finite steps, ties and all, are enumerated."""
    model = one_layer(3, **ORDERS[order])
    exact = exact_distribution(model, [3, 3], num_steps)
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    assert_follows(model.generate(empty, max_new_tokens=2, max_denoising_steps=num_steps, seed=1), exact)
    assert_follows(all_steps_sampler(model, torch.full((ROWS, 2), 3), num_steps, seed=2), exact)


def test_the_enumerated_distributions_differ_enough_for_the_test_to_tell_them_apart():
    """A distance of 0.02 adds at least 4 * ROWS * 0.02**2 = 32 to the chi-square statistic."""
    digit = exact_distribution(one_layer(3), [3, 3], 3)
    others = [exact_distribution(one_layer(3), [3, 3], 1)]
    others += [
        exact_distribution(one_layer(3, **ORDERS[order]), [3, 3], 3)
        for order in ("token", "nested", "coarse first", "windows")
    ]
    for other in others:
        assert distance(digit, other) > 0.02


def test_infilled_samples_follow_the_enumerated_distribution_between_prompt_and_suffix():
    """A masked token inside the prompt, one new token, and a suffix, with padding before the prompt."""
    model = one_layer(4)
    exact = exact_distribution(model, [2, 4, 4, 1], 2)
    prompt, mask = torch.tensor([[0, 2, 4]]).repeat(ROWS, 1), torch.tensor([[0, 1, 1]]).repeat(ROWS, 1)
    suffix = torch.tensor([[1]]).repeat(ROWS, 1)
    ids = model.generate(prompt, mask, suffix, max_new_tokens=1, max_denoising_steps=2, seed=3)
    assert_follows(ids[:, 1:], exact)


def test_without_carry_over_in_the_config_the_sampler_filters_all_the_same():
    model = one_layer(3, carry_over=False)
    exact = exact_distribution(model, [3, 3], 3)
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    assert_follows(model.generate(empty, max_new_tokens=2, max_denoising_steps=3, seed=4), exact)


class Oracle(nn.Module):
    """The optimal denoiser of a known distribution: its hidden states are log posteriors, the head the identity."""

    def __init__(self, codes: torch.Tensor, probabilities: torch.Tensor):
        super().__init__()
        self.outcomes = torch.cartesian_prod(*[torch.arange(n) for n in probabilities.shape])  # (K, T)
        self.digits, self.probabilities = codes[self.outcomes], probabilities.flatten()  # (K, T, S), (K,)
        self.base, self.calls = int(codes.max()), []

    def forward(self, states, attention_mask=None, position_ids=None, target_mask=None):
        self.calls.append(len(states))
        visible = states.unsqueeze(1) != self.base  # (B, 1, T, S)
        fits = ((states.unsqueeze(1) == self.digits) | ~visible).flatten(2).all(-1)  # (B, K)
        joint = fits * self.probabilities
        one_hot = nn.functional.one_hot(self.outcomes).double()  # (K, T, V)
        self.last_hidden_state = torch.einsum("bk,ktv->btv", joint, one_hot).log().clamp(min=-1e4)[target_mask]
        return self


@pytest.mark.parametrize("order", ORDERS)
def test_many_steps_with_the_optimal_denoiser_sample_the_data_distribution(order):
    """Correlated tokens and digits. Of 1,024 steps two of four units share one with probability < 0.6%, a distance of
    less than 0.006 that moves the chi-square statistic by less than 3."""
    model = one_layer(4, **ORDERS[order]).double()
    probabilities = torch.rand(4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(5)) ** 4 + 0.01
    probabilities /= probabilities.sum()
    model.model, model.lm_head = Oracle(model.code_table.codes, probabilities), nn.Linear(4, 4, bias=False)
    model.lm_head.weight.data = torch.eye(4, dtype=torch.double)
    out = model.generate(
        torch.empty(ROWS, 0, dtype=torch.long),
        max_new_tokens=2,
        max_denoising_steps=1024,
        seed=6,
        return_dict_in_generate=True,
    )
    exact = {tuple(each): p for each, p in zip(model.model.outcomes.tolist(), probabilities.flatten(), strict=True)}
    assert_follows(out.sequences, {each: float(p) for each, p in exact.items()})
    assert out.num_forward.max() <= 2 * len(unit_digits(model.config))
    assert sum(model.model.calls) == out.num_forward.sum(), "rows that reveal nothing are not in the batch"


def test_passes_are_as_few_as_the_steps_that_reveal_something():
    """n units over N steps occupy N (1 - (1 - 1/N)^n) of them on average; 2,000 rows, 5 standard errors: 6e-7."""
    model = one_layer(3)
    units, num_steps = 12, 8
    out = model.generate(
        torch.empty(2000, 0, dtype=torch.long),
        max_new_tokens=6,
        max_denoising_steps=num_steps,
        seed=0,
        return_dict_in_generate=True,
    )
    expected = num_steps * (1 - (1 - 1 / num_steps) ** units)
    standard_error = float(out.num_forward.double().std()) / math.sqrt(2000)
    assert abs(float(out.num_forward.double().mean()) - expected) < 5 * standard_error
    assert out.num_forward.min() >= 1 and out.num_forward.max() <= num_steps
    torch.testing.assert_close(out.tokens_per_forward, 6 / out.num_forward.double())
    assert out.network_seconds > 0 and out.sampling_seconds > 0
