"""The published score: its expectation by enumeration, guidance and temperature by a naive loop, its settings."""

import pytest
import torch
from enumeration import nats_of_all_masks, time_form
from networks import small_model

from prime_v2.diffusion_prime_v2 import RevealOrder
from prime_v2.eval import published
from prime_v2.eval.published import (
    PublishedSettings,
    mask_unit_schedule,
    published_score,
    published_settings,
)


@pytest.fixture(scope="module")
def model():
    return small_model(seed=2, vocab_size=5, num_subtokens=3)


@pytest.mark.parametrize(("mask_unit", "kind"), [("1", "digit"), ("S", "token"), ("3", "token")])
def test_its_expectation_is_the_time_form_of_the_papers_loss(model, mask_unit, kind):
    """4 standard errors. The weight's offset of 1e-6 moves the mean by about 1e-5."""
    ids = torch.tensor([[3, 1]])
    exact = -float(time_form(*nats_of_all_masks(model, ids, RevealOrder(kind, 3), "joint")))
    draws = published_score(model, ids[0], 0, PublishedSettings(6400, mask_unit=mask_unit))
    means = draws.view(-1, 32).mean(1)  # of a batch, whose levels are spread evenly
    assert abs(means.mean() - exact) < 4 * means.std() / 200**0.5


@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("cfg", [0.0, 0.75])
def test_draws_are_those_of_a_naive_loop(monkeypatch, carry_over, cfg):
    """The masks are the function's own; logits, guidance, filter, temperature and weight are computed again."""
    model = small_model(seed=4, vocab_size=5, num_subtokens=3, carry_over=carry_over)
    seen, hidden_of = [], published._hidden
    monkeypatch.setattr(published, "_hidden", lambda t, *rest: seen.append((t, hidden_of(t, *rest))) or seen[-1][1])
    ids, given = torch.tensor([2, 4, 0, 3]), 2
    draws = published_score(model, ids, given, PublishedSettings(8, cfg=cfg, temperature=0.4))
    ((levels, masks),) = seen
    digits = model.encode(ids.unsqueeze(0))[0]
    weight = model.lm_head.weight
    for draw, t, hidden in zip(draws, levels, masks, strict=True):
        state = torch.where(hidden, 2, digits)
        assert not hidden[:given].any()
        with torch.no_grad():
            logits = model.model(state.unsqueeze(0)).last_hidden_state[0] @ weight.T
            if cfg:
                blind = state.clone()
                blind[:given] = 2
                other = model.model(blind.unsqueeze(0)).last_hidden_state[0] @ weight.T
                logits = other + (1 + cfg) * (logits - other)
        total = 0.0
        for i in range(given, 4):
            row = logits[i] / float(0.6 * t + 0.4)
            if carry_over:
                fits = [
                    all(hidden[i, j] or digits[i, j] == code[j] for j in range(3)) for code in model.code_table.codes
                ]
                row = row.masked_fill(~torch.tensor(fits[:-1]), -torch.inf)
            total += float(row.log_softmax(0)[ids[i]])
        assert draw.item() == pytest.approx(total / (float(t) + 1e-6), rel=1e-4)


def test_levels_are_spread_evenly_over_each_batch_of_32(model, monkeypatch):
    seen, hidden_of = [], published._hidden
    monkeypatch.setattr(published, "_hidden", lambda t, *rest: seen.append(t) or hidden_of(t, *rest))
    published_score(model, torch.tensor([1, 2]), 1, PublishedSettings(72))
    assert [len(t) for t in seen] == [32, 32, 8]
    for t in seen:
        steps = t.sort().values.diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / len(t)))
    assert seen[0].min() != seen[1].min()


def test_a_schedule_hides_whole_tokens_above_its_level(model):
    settings = PublishedSettings(mask_unit="0.0_0.5/1_S")
    levels = torch.linspace(0.02, 0.98, 400).double()
    hidden = published._hidden(levels, torch.ones(6, dtype=torch.bool), torch.tensor(3), settings, 3)
    partly = (hidden.any(-1) & ~hidden.all(-1)).any(1)
    assert not partly[levels > 0.5].any()
    assert partly[levels <= 0.5].double().mean() > 0.5
    pairs = published._hidden(
        levels, torch.ones(6, dtype=torch.bool), torch.tensor(3), PublishedSettings(mask_unit=6), 3
    )
    assert (pairs.flatten(1).unflatten(1, (3, 6)).double().mean(-1) % 1 == 0).all(), "two tokens at a time"


@pytest.mark.parametrize(
    ("mask_unit", "expected"),
    [(1, ([], [1])), ("S", ([], [15])), ("30", ([], [30])), ("0.0_0.75/1_15", ([0.75], [1, 15]))],
)
def test_mask_units_are_read_as_published(mask_unit, expected):
    assert mask_unit_schedule(mask_unit, 15) == expected


@pytest.mark.parametrize("mask_unit", ["", "0", "token", "0.0/1_15", "0.5_0.0/1_15", "0.0_1.0/1_15", "0.1_0.5/1_15"])
def test_other_mask_units_are_refused(mask_unit):
    with pytest.raises(ValueError, match=r"mask_unit='.*' is not 1, S, a number of digits, or a schedule"):
        mask_unit_schedule(mask_unit, 15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
        ({"cfg": -1.0}, r"cfg=-1.0 must be 0 \(off\) or positive"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PublishedSettings(**fields)


def test_the_published_settings_of_each_task():
    assert published_settings("sciq") == PublishedSettings(256, 0.25, 0.5, "0.0_0.75/1_S")
    assert published_settings("anli_r2", seed=3) == PublishedSettings(128, 0.25, 0.25, "S", 3)
    assert published_settings("truthfulqa_mc1").mask_unit == "30"
    with pytest.raises(
        ValueError, match="no settings were published for the task 'piqa', only for social_iqa, mc_taco"
    ):
        published_settings("piqa")
