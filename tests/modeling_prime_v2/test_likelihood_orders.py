"""`method="orders"`: against the any-order likelihood of a random network, enumerated over all n! orders."""

import itertools

import pytest
import torch

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion

CONFIGS = {
    "digit": {},
    "digit without carry-over": {"carry_over": False},
    "token": {"reveal_order": "token"},
    "nested": {"reveal_order": "nested", "stage_digits": [1, 2]},
}
IDS = torch.tensor([[2, 0], [1, 3]])


def small(**fields) -> PrimeV2ForMaskedDiffusion:
    torch.manual_seed(3)
    shape = {"vocab_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PrimeV2Config(**shape, initializer_range=1.0, max_position_embeddings=4, **fields)
    return PrimeV2ForMaskedDiffusion(config).double().eval()


def reveals(kind: str, order: tuple[int, ...]) -> list[set[tuple[int, int]]]:
    """The (token, digit) pairs that each step of an order of the units reveals; two tokens of two digits."""
    if kind == "token":
        return [{(unit, 0), (unit, 1)} for unit in order]
    if kind.startswith("digit"):
        return [{(unit // 2, unit % 2)} for unit in order]
    seen = {0: 0, 1: 0}
    steps = []
    for unit in order:  # whichever stage of a token is drawn, its first hidden one is revealed
        token = unit // 2
        steps.append({(token, seen[token])})
        seen[token] += 1
    return steps


@torch.no_grad()
def log_p_of_every_order(model, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """log p(x given order) for each order, by naive conditionals from full logits; ids (L,)."""
    codes, base = model.code_table.codes[:-1], model.config.base
    num_units = 2 if kind == "token" else 4
    results = []
    for order in itertools.permutations(range(num_units)):
        state, total = torch.full((2, 2), base), 0.0
        for step in reveals(kind, order):
            token = next(iter(step))[0]
            q = model(subtoken_ids=state.unsqueeze(0)).logits[0, token].softmax(-1)
            wanted = [v for v in range(4) if all(codes[v, j] == codes[ids[token], j] for _, j in step)]
            total += q[wanted].sum().log()
            for i, j in step:
                state[i, j] = codes[ids[i], j]
        results.append(total)
    return torch.stack(results)


@pytest.mark.parametrize("kind", CONFIGS)
def test_orders_converge_to_the_any_order_likelihood(kind):
    model = small(**CONFIGS[kind])
    found = model.log_likelihood(IDS, method="orders", num_samples=2000, exhaustive=False)
    exhaustive = model.log_likelihood(IDS, method="orders", num_samples=24)
    assert found.is_bound
    num_units = 2 if kind == "token" else 4
    assert found.num_forward.tolist() == [2000 * num_units] * 2
    for row, ids in enumerate(IDS):
        every = log_p_of_every_order(model, kind, ids)
        exact = every.logsumexp(0) - torch.tensor(float(len(every))).log()
        # Eight comparisons at 5 standard errors: false-alarm rate below 1e-5.
        assert abs(found.value[row] - exact) < 5 * found.stderr[row] + 1e-9
        assert exhaustive.value[row] == pytest.approx(exact.item(), abs=1e-6)  # the rotary angles are float32
    assert exhaustive.stderr.tolist() == [0, 0]
    assert exhaustive.num_forward.tolist() == ([4, 4] if kind == "token" else [96, 96]), "n! orders of n units"


@pytest.mark.parametrize("kind", ["digit", "token", "nested"])
def test_the_bounds_rise_with_the_number_of_orders_towards_the_likelihood(kind):
    """In expectation, over the enumerated orders: K = 1 is the NELBO, K = 2 is above it, all below the exact value."""
    model = small(**CONFIGS[kind])
    method = {"digit": "subtoken", "token": "token", "nested": "nested"}[kind]
    for ids in IDS:
        every = log_p_of_every_order(model, kind, ids)
        one = every.mean()
        pairs = torch.stack([torch.stack(pair).logsumexp(0) for pair in itertools.product(every, repeat=2)])
        two = (pairs - torch.tensor(2.0).log()).mean()
        exact = every.logsumexp(0) - torch.tensor(float(len(every))).log()
        assert one < two < exact
        nelbo = model.log_likelihood(ids.unsqueeze(0), method=method, num_samples=4000, exhaustive=False)
        assert abs(nelbo.value - one) < 5 * nelbo.stderr + 1e-9  # false-alarm rate below 1e-6
        # The estimator's own mean over seeds is that of the enumeration.
        options = {"method": "orders", "num_samples": 2, "exhaustive": False}
        seeds = [model.log_likelihood(ids.unsqueeze(0), seed=i, **options) for i in range(300)]
        values = torch.cat([each.value for each in seeds])
        assert abs(values.mean() - two) < 5 * values.std() / 300**0.5 + 1e-9


def test_one_order_has_no_standard_error_and_draws_depend_on_the_seed():
    model = small()
    values = [model.log_likelihood(IDS, method="orders", num_samples=1, seed=seed) for seed in (0, 0, 1)]
    assert values[0].stderr.isnan().all()
    assert torch.equal(values[0].value, values[1].value)
    assert not torch.equal(values[0].value, values[2].value)
