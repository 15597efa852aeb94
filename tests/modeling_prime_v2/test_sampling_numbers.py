"""Scores of units and draws of tokens, which take float32 logits a few rows at a time, against their definitions."""

import pytest
import torch
from networks import small_model

from prime_v2.generation_draws_prime_v2 import DRAW_BLOCK, draw_by_inverse_cdf, draw_from_logits, to_probabilities
from prime_v2.samplers_prime_v2 import SCORES, Units


def definition(p: torch.Tensor, score: str) -> torch.Tensor:
    ordered = p.sort(descending=True).values
    if score == "entropy":
        return (p * p.clamp(min=1e-300).log()).sum()
    return ordered[0] - (ordered[1] if score == "margin" else 0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ["token", "digit", "stage"])
def test_scores_are_those_of_the_units_distributions(kind, score):
    """Sums over the tokens of each value, in float64 by a loop; float32 logits round to 1e-6."""
    model = small_model(reveal_order="nested", stage_digits=[2, 4])
    table, units = model.code_table, Units(kind, model.code_table, (2, 4))
    states = model.encode(torch.tensor([[1, 5, 9]]))[0]
    states[0] = states[1, 2:] = 2
    states[2, 3:] = 2
    logits = (3 * torch.randn(3, 11, generator=torch.Generator().manual_seed(0))).masked_fill(
        ~table.consistent(states), -torch.inf
    )
    found = units.scores(logits, states, score)
    codes, hidden = table.codes[:11], units.hidden(states)
    for row, p in enumerate(logits.double().softmax(-1)):
        for unit in hidden[row].nonzero().flatten().tolist():
            end = 2 if bool((states[row, :2] == 2).any()) else 4
            keys = {"token": codes, "digit": codes[:, unit : unit + 1], "stage": codes[:, :end]}[kind].tolist()
            values = {tuple(key): 0.0 for key in keys}
            for token, key in enumerate(keys):
                values[tuple(key)] += float(p[token])
            expected = definition(torch.tensor(list(values.values()), dtype=torch.double), score)
            value, size = found[row, unit].tolist()
            assert value == pytest.approx(float(expected), abs=1e-6)
            largest = max(values.values())
            assert size == pytest.approx(1 - float(expected) if score == "entropy" else largest, abs=1e-6)


@pytest.mark.parametrize("size", [3, DRAW_BLOCK, 5 * DRAW_BLOCK + 7])
def test_draws_from_logits_are_those_of_the_inverse_cdf(size):
    """The same tokens in float64, where rounding moves a boundary by 1e-16; in float32 all but a few of 2,000."""
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(2000, size, generator=generator, dtype=torch.double)
    logits = logits.masked_fill(torch.rand(2000, size, generator=generator) < 0.3, -torch.inf)
    logits[:, 1] = 0
    draws = torch.rand(2000, generator=generator, dtype=torch.double).clamp(min=1e-9)
    for temperature in (1.0, 0.7):
        expected = draw_by_inverse_cdf(to_probabilities(logits, temperature), draws)
        assert draw_from_logits(logits, draws, temperature).equal(expected)
        ids = draw_from_logits(logits.float(), draws, temperature)
        assert (ids != expected).float().mean() < 0.005  # 1e-7 of the mass a boundary
        assert logits.gather(1, ids.unsqueeze(1)).isfinite().all()
