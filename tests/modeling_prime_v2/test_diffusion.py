"""Noise: which units are hidden, with which chance and weight, as a pure function of keys."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prime_v2.diffusion_prime_v2 import (
    T_MIN,
    RevealOrder,
    draw_noise,
    hidden_counts_to_draw,
    stratified_levels,
)

DIGIT, TOKEN, NESTED = RevealOrder("digit", 4), RevealOrder("token", 4), RevealOrder("nested", 4, (1, 2, 4))
ORDERS = [DIGIT, TOKEN, NESTED]
# Random checks accept at this level: each raises a false alarm for one choice of keys in 10,000. The keys are fixed.
FALSE_ALARM = 1e-4


def order_name(order: RevealOrder) -> str:
    return order.kind


def levels_of(batch: int) -> torch.Tensor:
    return (torch.arange(batch, dtype=torch.double) + 0.5) / batch


def some_maskable(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    maskable = torch.rand(batch, length, generator=generator) < 0.7
    maskable[:, 0] = True
    return maskable


def same(noise, other, rows=slice(None), others=slice(None)) -> bool:
    """Whether two draws agree bit for bit in the given rows."""
    return all(
        torch.equal(getattr(noise, name)[rows], getattr(other, name)[others])
        for name in ("visible", "hidden_count", "weight")
    )


# Counts


@pytest.mark.parametrize("order", ORDERS, ids=order_name)
def test_count_form_hides_k_units_with_weight_n_over_k(order):
    maskable = some_maskable(200, 6)
    levels = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    noise = draw_noise(maskable, order, torch.arange(200), levels)
    units = maskable.sum(1) * order.units_per_token
    k = noise.hidden_count.sum(1)
    assert k.tolist() == [math.ceil(level * n) for level, n in zip(levels.tolist(), units.tolist(), strict=True)]
    torch.testing.assert_close(noise.weight, units.double() / k, rtol=0, atol=0)


@given(st.integers(1, 40), st.integers(1, 7))
def test_count_is_uniform_over_1_to_n_for_uniform_levels(num_units, repeats):
    levels = levels_of(num_units * repeats)
    counts = hidden_counts_to_draw(levels, torch.full((len(levels),), num_units))
    assert counts.bincount(minlength=num_units + 1).tolist() == [0] + [repeats] * num_units


@pytest.mark.parametrize("order", ORDERS, ids=order_name)
def test_count_form_hides_a_uniform_subset_of_the_units(order):
    """Chi-square over all k-subsets of the maskable units, or what they leave visible."""
    draws, k, maskable = 20_000, 3, torch.tensor([True, False, True])
    units = int(maskable.sum()) * order.units_per_token
    k = min(k, units - 1)
    level = torch.full((draws,), (k - 0.5) / units, dtype=torch.double)
    noise = draw_noise(maskable.expand(draws, -1), order, torch.arange(draws), level)
    assert noise.visible[:, 1].all()

    expected = {}
    for subset in itertools.combinations(range(units), k):
        hidden = torch.zeros(units, dtype=torch.bool)
        hidden[list(subset)] = True
        visible = tuple(order.visible_digits(hidden.view(2, -1)).flatten().tolist())
        expected[visible] = expected.get(visible, 0) + draws / math.comb(units, k)
    rows, counts = noise.visible[:, maskable].flatten(1).unique(dim=0, return_counts=True)
    observed = {tuple(row): count for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}
    assert observed.keys() <= expected.keys()
    p_value = stats.chisquare([observed.get(each, 0) for each in expected], list(expected.values())).pvalue
    assert p_value > FALSE_ALARM


@pytest.mark.parametrize("order", ORDERS, ids=order_name)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_time_form_hides_each_unit_on_its_own_with_chance_t_and_weight_one_over_t(order, t):
    """Chi-square of the joint distribution of the hidden units of two tokens against independent draws."""
    draws, length = 20_000, 2
    levels = torch.full((draws,), t, dtype=torch.double)
    noise = draw_noise(torch.ones(draws, length, dtype=torch.bool), order, torch.arange(draws), levels, "time")
    assert (noise.weight == 1 / t).all()
    units = order.units_per_token
    by_token = stats.binom.pmf(range(units + 1), units, t)
    expected = torch.outer(torch.tensor(by_token), torch.tensor(by_token)).flatten() * draws
    pairs = noise.hidden_count[:, 0] * (units + 1) + noise.hidden_count[:, 1]
    observed = pairs.bincount(minlength=len(expected))
    enough = expected >= 5  # the usual condition of the chi-square approximation; the rest is pooled
    pooled = [torch.cat([each[enough], each[~enough].sum()[None]]) for each in (observed, expected)]
    if pooled[1][-1] < 1e-9:
        pooled = [each[:-1] for each in pooled]
    assert stats.chisquare(*pooled).pvalue > FALSE_ALARM


def test_time_form_keeps_t_at_least_t_min():
    noise = draw_noise(torch.ones(1, 3, dtype=torch.bool), DIGIT, torch.tensor([0]), torch.tensor([1e-12]), "time")
    assert noise.weight.item() == pytest.approx(1 / T_MIN)


# Masks


@pytest.mark.parametrize("form", ["count", "time"])
@pytest.mark.parametrize("order", ORDERS, ids=order_name)
def test_visible_digits_and_hidden_count_tell_the_same(order, form):
    maskable = some_maskable(300, 5)
    noise = draw_noise(maskable, order, torch.arange(300), levels_of(300), form)
    hidden_digits = (~noise.visible).sum(-1)
    if order.kind == "digit":
        assert torch.equal(hidden_digits, noise.hidden_count)
    elif order.kind == "token":
        assert torch.equal(hidden_digits, 4 * noise.hidden_count)
    else:
        ends = torch.tensor([4, 2, 1, 0])  # visible digits with 0, 1, 2, 3 stages hidden
        assert torch.equal(4 - hidden_digits, ends[noise.hidden_count])
        assert (noise.visible.long().diff(dim=-1) <= 0).all(), "a prefix of the digits"
    assert noise.visible[~maskable].all()
    assert (noise.hidden_count[~maskable] == 0).all()


def test_next_visible_is_one_stage_more():
    hidden_count = torch.tensor([3, 2, 1])
    assert NESTED.next_visible(hidden_count).sum(-1).tolist() == [1, 2, 4]
    assert NESTED.next_visible(hidden_count)[1].tolist() == [True, True, False, False]
    assert TOKEN.next_visible(torch.tensor([1, 1])).all()


@pytest.mark.parametrize("form", ["count", "time"])
def test_whole_tokens_are_hidden_above_the_given_level_alone(form):
    maskable, keys, levels = some_maskable(400, 5), torch.arange(400), levels_of(400)
    noise = draw_noise(maskable, DIGIT, keys, levels, form, whole_token_above=0.6)
    above = levels > 0.6
    hidden_digits = (~noise.visible).sum(-1)
    assert set(hidden_digits[above].flatten().tolist()) == {0, 4}
    assert set(hidden_digits[~above].flatten().tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(hidden_digits, noise.hidden_count)
    assert same(noise, draw_noise(maskable, DIGIT, keys, levels, form), ~above, ~above)
    # The share of digits hidden stays the level's, within half a token of the row.
    if form == "count":
        share = hidden_digits.sum(1) / (4 * maskable.sum(1))
        assert ((share - levels).abs() <= 1 / maskable.sum(1)).all()


@pytest.mark.parametrize("form", ["count", "time"])
@pytest.mark.parametrize("order", ORDERS, ids=order_name)
def test_a_row_without_maskable_tokens_is_left_alone(order, form):
    maskable = torch.tensor([[False, False], [True, True]])
    noise = draw_noise(maskable, order, torch.arange(2), torch.tensor([0.5, 0.5], dtype=torch.double), form)
    assert noise.visible[0].all()
    assert noise.weight.isfinite().all()


def test_unknown_forms_and_orders_are_refused():
    arguments = torch.ones(1, 2, dtype=torch.bool), DIGIT, torch.arange(1), torch.tensor([0.5])
    with pytest.raises(ValueError, match="form='counts' is not one of"):
        draw_noise(*arguments, form="counts")
    with pytest.raises(ValueError, match="kind='word' is not one of"):
        RevealOrder("word", 4)


# Purity


@pytest.mark.parametrize("form", ["count", "time"])
@pytest.mark.parametrize("order", ORDERS, ids=order_name)
def test_a_rows_noise_depends_on_its_key_and_level_and_not_on_the_batch(order, form):
    maskable, keys, levels = some_maskable(32, 6), torch.arange(100, 132), levels_of(32)
    noise = draw_noise(maskable, order, keys, levels, form, whole_token_above=0.5 if order is DIGIT else None)
    chosen = torch.tensor([7, 3, 30])
    alone = draw_noise(
        maskable[chosen], order, keys[chosen], levels[chosen], form, whole_token_above=0.5 if order is DIGIT else None
    )
    assert same(noise, alone, chosen)
    torch.rand(5)  # torch's own generator plays no part
    assert same(
        noise, draw_noise(maskable, order, keys, levels, form, whole_token_above=0.5 if order is DIGIT else None)
    )
    others = draw_noise(maskable, order, keys + 1000, levels, form)
    assert not torch.equal(noise.visible, others.visible)


@pytest.mark.parametrize("order", ORDERS, ids=order_name)
def test_padding_and_given_tokens_do_not_change_the_noise_of_the_others(order):
    short = torch.tensor([[True, True, True, False]])
    padded = torch.tensor([[False, False, True, False, True, True, False]])
    key, level = torch.tensor([5]), torch.tensor([0.6], dtype=torch.double)
    noise, other = (draw_noise(each, order, key, level) for each in (short, padded))
    assert torch.equal(noise.visible[short], other.visible[padded])
    assert torch.equal(noise.weight, other.weight)


# Levels


@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 2**40))
def test_each_step_has_one_level_in_each_stratum(global_batch, step, seed):
    levels = stratified_levels(torch.arange(global_batch) + step * global_batch, global_batch, seed)
    assert (levels * global_batch).long().sort().values.tolist() == list(range(global_batch))
    assert levels.dtype == torch.double
    assert ((levels > 0) & (levels < 1)).all()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**40))
def test_levels_do_not_depend_on_how_the_batch_is_split_over_ranks(world, per_rank, seed):
    numbers = torch.arange(world * per_rank) + 7 * world * per_rank
    whole = stratified_levels(numbers, world * per_rank, seed)
    for rank in range(world):
        assert torch.equal(stratified_levels(numbers[rank::world], world * per_rank, seed), whole[rank::world])


@pytest.mark.parametrize("position", [0, 3, 7])
def test_the_level_of_a_sample_is_uniform(position):
    """Over the steps, Kolmogorov-Smirnov; and so is its stratum within a step."""
    steps, global_batch = 5000, 8
    levels = stratified_levels(torch.arange(steps) * global_batch + position, global_batch, seed=1)
    assert stats.kstest(levels.numpy(), "uniform").pvalue > FALSE_ALARM
    within = levels * global_batch % 1
    assert stats.kstest(within.numpy(), "uniform").pvalue > FALSE_ALARM
    # From one step to the next the levels are unrelated: |r| of 4,999 pairs exceeds 4 / sqrt(4999) once in 16,000.
    assert abs(float(torch.corrcoef(torch.stack([levels[:-1], levels[1:]]))[0, 1])) < 4 / math.sqrt(steps - 1)


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(64, 8), (256, 32), (96, 12), (30, 6)])
def test_each_micro_batch_of_neighbours_spreads_over_the_levels(global_batch, micro_batch):
    """Interleaved: each run of neighbours has a level in the lowest and in the highest third."""
    for step in range(20):
        levels = stratified_levels(torch.arange(global_batch) + step * global_batch, global_batch, seed=2)
        for part in levels.split(micro_batch):
            assert part.min() < 1 / 3
            assert part.max() > 2 / 3


def test_different_seeds_give_different_levels():
    numbers = torch.arange(16)
    assert not torch.equal(stratified_levels(numbers, 16, seed=0), stratified_levels(numbers, 16, seed=1))
