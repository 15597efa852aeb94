"""The bound with learned rates against all orders, written out."""

import itertools
import math

import pytest
import torch

from prime_v2 import PrimeV2Config
from prime_v2.studies.learned_order.model import KINDS, LearnedOrderModel

LENGTH = 3
BEGIN = {"token": [1.0], "nested": [2.0, 1.0]}


def model_of(kind: str, reveal_order: str) -> LearnedOrderModel:
    torch.manual_seed(0)
    stages = {"stage_digits": [1, 2]} if reveal_order == "nested" else {}
    config = PrimeV2Config(
        vocab_size=4, base=2, num_subtokens=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, initializer_range=0.8, objective="joint", reveal_order=reveal_order,
        head="stages", head_digits=[1, 2], subtoken_embedding="ancestors", tree_levels=[1, 2],
        loss_weight="low_variance", **stages,
    )  # fmt: skip
    model = LearnedOrderModel(config)
    model.add_rates(kind, BEGIN[reveal_order], 10.0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.rates.parameters():
        parameter.data = 0.06 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def rates_at(model: LearnedOrderModel, ids: torch.Tensor, revealed: tuple[int, ...]):
    """Of a text's state: each token, forward rate of its next unit, the model's rate of it and of all instead."""
    table, ends = model.code_table, model.ends.tolist()
    codes = table.encode(ids)
    visible = torch.tensor([[[j < ends[m] for j in range(2)] for m in revealed]])
    states = torch.where(visible, codes, model.config.base)
    output = model.model(states).last_hidden_state
    log_p = model.head().call(output)[0].log_softmax(-1)
    nodes = table.codes[:-1, 0]
    forward = model.rates(nodes[ids])[0]
    own = model.rates.of_numbers(model.rates.own)[:, 0] if model.rates.kind == "node" else None
    rows = []
    for i, unit in enumerate(revealed):
        if ends[unit] == 2:
            continue
        chances = log_p[i].exp()
        same_before = (table.codes[:-1, : ends[unit]] == codes[0, i, : ends[unit]]).all(-1)
        same_after = (table.codes[:-1, : ends[unit + 1]] == codes[0, i, : ends[unit + 1]]).all(-1)
        q = chances[same_after].sum() / chances[same_before].sum()
        rate = forward[i, unit]
        if model.rates.kind == "given" or (model.rates.kind == "node" and unit):
            mine, whole = rate * q, rate
        elif model.rates.kind == "node":
            mine, whole = rate * q, (chances * own[nodes]).sum() / chances.sum()
        else:
            whole = model.rates.guessed(output)[0, i, unit]
            mine = whole * q
        rows.append((i, rate, mine, whole))
    return rows


def written_out(model: LearnedOrderModel, ids: torch.Tensor):
    """(bound, log-likelihood) of one text: over all orders of its units."""
    units = len(model.ends) - 1
    bound, likelihood = 0.0, 0.0
    for order in set(itertools.permutations(sorted([*range(LENGTH)] * units))):
        revealed, chance, mine_chance, terms = [0] * LENGTH, 1.0, 1.0, 0.0
        for token in order:
            rows = rates_at(model, ids, tuple(revealed))
            total, mine_total = sum(row[1] for row in rows), sum(row[3] for row in rows)
            f = sum(rate * (rate / mine).log() - rate + whole for _, rate, mine, whole in rows)
            terms = terms + f / total
            _, rate, mine, _ = next(row for row in rows if row[0] == token)
            chance, mine_chance = chance * rate / total, mine_chance * mine / mine_total
            revealed[token] += 1
        bound, likelihood = bound + chance * terms, likelihood + mine_chance
    return bound, likelihood.log()


@pytest.mark.parametrize("reveal_order", ["token", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_bound_is_that_of_all_orders_written_out_and_above_the_likelihood(kind, reveal_order):
    model = model_of(kind, reveal_order)
    ids = torch.tensor([[3, 0, 2]])
    with torch.no_grad():
        bound, log_likelihood = written_out(model, ids)
        count, rows = 4096, 8192
        levels = (torch.arange(rows, dtype=torch.double) % count + 0.5) / count
        _, bounds, _ = model.terms(ids.expand(rows, -1), torch.arange(rows), levels)
    assert bound > -log_likelihood + 1e-4
    error = bounds.std() / math.sqrt(rows)
    assert abs(bounds.mean() - bound) < 4 * error
    assert error < 0.02 * bound


@pytest.mark.parametrize("kind", KINDS)
def test_chances_of_all_texts_add_up_to_one(kind):
    """So that what the bound is above is a likelihood."""
    model = model_of(kind, "token")
    texts = itertools.product(range(4), repeat=LENGTH)
    with torch.no_grad():
        total = sum(written_out(model, torch.tensor([text]))[1].exp() for text in texts)
    assert total == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("reveal_order", ["token", "nested"])
@pytest.mark.parametrize("kind", ["node", "context"])
def test_learning_follows_the_gradient_of_the_bound(kind, reveal_order):
    model = model_of(kind, reveal_order)
    ids = torch.tensor([[3, 0, 2]])
    bound, _ = written_out(model, ids)
    (expected,) = torch.autograd.grad(bound, model.rates.own)
    rows, model.training = 2**14, True
    levels = (torch.arange(rows, dtype=torch.double) + 0.5) / rows
    keys = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    model._usual = lambda levels, bounds: torch.full_like(bounds, float(bounds.mean()))
    _, _, learning = model.terms(ids.expand(rows, -1), keys, levels)
    (found,) = torch.autograd.grad(learning * LENGTH, model.rates.own)
    assert torch.allclose(found, expected, atol=0.08 * float(expected.abs().max()))


def test_rates_of_one_are_the_order_of_the_library():
    model, ids = model_of("given", "token"), torch.tensor([[3, 0, 2]])
    with torch.no_grad():
        bound, _ = written_out(model, ids)
        library = -model.log_likelihood(ids, num_samples=4096).value
    assert float(library) == pytest.approx(float(bound), rel=0.01)


@pytest.mark.parametrize("kind", ["node", "context"])
def test_forgotten_rates_are_those_that_are_given(kind):
    model, given, ids = model_of(kind, "nested"), model_of("given", "nested"), torch.tensor([[3, 0, 2]])
    model.rates.forget()
    draws = (ids.expand(64, -1), torch.arange(64), (torch.arange(64, dtype=torch.double) + 0.5) / 64)
    assert torch.allclose(model.terms(*draws)[1], given.terms(*draws)[1], rtol=1e-5)
