"""`generate` of interpolating diffusion against enumerated distributions, and how many passes it takes."""

import itertools
import math

import pytest
import torch
from chi_square import ROWS, assert_follows
from enumeration import optimal_interpolating, query_log_probabilities
from networks import small_interpolating


@torch.no_grad()
def exact_distribution(model, given: list[int], num_steps: int) -> dict[tuple, float]:
    """Probability of each outcome: a sum over what falls to the diffusion, the steps, and the orders within one."""
    mask_id, alpha_0 = model.config.mask_token_id, model.config.alpha_0
    places = [i for i, each in enumerate(given) if each == mask_id]
    start = tuple((i, each) for i, each in enumerate(given) if each != mask_id)
    total, cache = {}, {}

    def chances(known: tuple, place: int) -> list[float]:
        if (known, place) not in cache:
            cache[known, place] = query_log_probabilities(model, list(known), place).double().exp().tolist()
        return cache[known, place]

    def reveal(known: tuple, groups: list[list[int]], chance: float) -> None:
        """All that can follow: each group of places is drawn at once and becomes known in any order."""
        if not groups:
            ids = tuple(id for _, id in sorted(known))
            total[ids] = total.get(ids, 0.0) + chance
            return
        laws = [chances(known, place) for place in groups[0]]
        for drawn in itertools.product(range(model.config.vocab_size), repeat=len(laws)):
            p = math.prod(law[id] for law, id in zip(laws, drawn, strict=True))
            new = tuple(zip(groups[0], drawn, strict=True))
            for order in itertools.permutations(new):
                reveal((*known, *order), groups[1:], chance * p / math.factorial(len(new)))

    for early in itertools.product([False, True], repeat=len(places)):
        first = [place for place, each in zip(places, early, strict=True) if each]
        late = [[place] for place, each in zip(places, early, strict=True) if not each]
        chance = alpha_0 ** len(first) * (1 - alpha_0) ** len(late)
        for steps in itertools.product(range(num_steps), repeat=len(first)):
            groups = [[i for i, when in zip(first, steps, strict=True) if when == step] for step in range(num_steps)]
            if chance:
                reveal(start, [each for each in groups if each] + late, chance / num_steps ** len(first))
    assert math.isclose(sum(total.values()), 1.0, rel_tol=1e-5)
    return {ids: p / sum(total.values()) for ids, p in total.items()}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("alpha_0", "num_steps"), [(0.5, 2), (0.5, 1), (1.0, 2), (0.0, 2)])
def test_samples_follow_the_enumerated_distribution_of_a_random_network(alpha_0, num_steps, use_cache):
    """Three tokens of three ids; finite steps, ties and orders are enumerated."""
    model = small_interpolating(seed=1, vocab_size=3, num_hidden_layers=1, alpha_0=alpha_0)
    exact = exact_distribution(model, [3, 3, 3], num_steps)
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    options = {"max_new_tokens": 3, "max_denoising_steps": num_steps, "seed": 1, "use_cache": use_cache}
    assert_follows(model.generate(empty, **options), exact)


def test_the_enumerated_distributions_differ_enough_for_the_test_to_tell_them_apart():
    """A distance of 0.02 adds at least 4 * ROWS * 0.02**2 = 32 to the chi-square statistic."""
    laws = []
    for alpha_0, num_steps in ((0.5, 2), (0.5, 1), (1.0, 2), (0.0, 2)):
        model = small_interpolating(seed=1, vocab_size=3, num_hidden_layers=1, alpha_0=alpha_0)
        laws.append(exact_distribution(model, [3, 3, 3], num_steps))
    for p, q in itertools.combinations(laws, 2):
        assert sum(abs(p[each] - q[each]) for each in p) / 2 > 0.02


def test_infilled_samples_follow_the_enumerated_distribution_between_prompt_and_suffix():
    """A masked token inside the prompt, one new token, and a suffix, with padding before the prompt."""
    model = small_interpolating(seed=2, vocab_size=4, num_hidden_layers=1)
    exact = exact_distribution(model, [2, 4, 4, 1], 2)
    prompt, mask = torch.tensor([[0, 2, 4]]).repeat(ROWS, 1), torch.tensor([[0, 1, 1]]).repeat(ROWS, 1)
    suffix = torch.tensor([[1]]).repeat(ROWS, 1)
    ids = model.generate(prompt, mask, suffix, max_new_tokens=1, max_denoising_steps=2, seed=3)
    assert_follows(ids[:, 1:], exact)


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_many_steps_with_the_optimal_denoiser_sample_the_data_distribution(alpha_0):
    """Correlated tokens. Of 4,096 steps two of three tokens share one with probability < 0.1%."""
    law = (torch.rand(4**3, dtype=torch.double, generator=torch.Generator().manual_seed(5)) ** 4 + 0.001).clone()
    law = law / law.sum()
    model = optimal_interpolating(law, 4, 3, alpha_0=alpha_0)
    out = model.generate(
        torch.empty(ROWS, 0, dtype=torch.long),
        max_new_tokens=3,
        max_denoising_steps=4096,
        seed=6,
        return_dict_in_generate=True,
    )
    assert_follows(out.sequences, dict(zip(map(tuple, model.model.sequences.tolist()), law.tolist(), strict=True)))
    assert out.num_forward.max() == 3 and out.num_forward.double().mean() > 2.99


def test_passes_are_the_steps_that_reveal_something_and_one_for_each_token_that_is_left():
    """n tokens over N steps, each with chance alpha_0: N (1 - (1 - alpha_0/N)^n) steps and n (1 - alpha_0) tokens.
    2,000 rows, 5 standard errors: 6e-7."""
    model, n, num_steps = small_interpolating(alpha_0=0.6, num_hidden_layers=1), 12, 4
    out = model.generate(
        torch.empty(2000, 0, dtype=torch.long),
        max_new_tokens=n,
        max_denoising_steps=num_steps,
        seed=0,
        return_dict_in_generate=True,
    )
    expected = num_steps * (1 - (1 - 0.6 / num_steps) ** n) + n * 0.4
    passes = out.num_forward.double()
    assert abs(float(passes.mean()) - expected) < 5 * float(passes.std()) / math.sqrt(2000)
    torch.testing.assert_close(out.tokens_per_forward, n / passes)
    assert out.network_seconds > 0 and out.sampling_seconds > 0
