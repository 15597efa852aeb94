"""Rules that choose what a pass reveals: their law by enumeration, their samples against it, their refusals."""

import itertools
import math

import pytest
import torch
from chi_square import FALSE_ALARM, ROWS, assert_follows
from enumeration import all_sequences
from networks import small_model
from scipy.stats import chi2_contingency

from prime_v2.diffusion_prime_v2 import RevealOrder
from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig, merge_options
from prime_v2.generation_prime_v2 import draw_schedule
from prime_v2.generation_process_prime_v2 import Blocks, make_canvas
from prime_v2.generation_rules_prime_v2 import RuleProcess
from prime_v2.samplers_prime_v2 import (
    AncestralSamplerConfig,
    ConfidenceSamplerConfig,
    EntropyBoundSamplerConfig,
    RemaskingSamplerConfig,
    ThresholdSamplerConfig,
    best_first,
    choose,
)

STAGES = {"reveal_order": "nested", "stage_digits": [1, 2]}
RULES = {
    **{f"confidence, {s}": (ConfidenceSamplerConfig, {"score": s}) for s in ("probability", "margin", "entropy")},
    "threshold": (ThresholdSamplerConfig, {"threshold": 0.5}),
    "entropy bound": (EntropyBoundSamplerConfig, {"entropy_bound": 0.8}),
}
COARSE_FIRST = STAGES | {"reveal_order": "coarse_first"}
UNITS = {"token": {}, "digit": {}, "stage": STAGES}
CASES = [(rule, unit) for rule in RULES for unit in UNITS]


def sampler_of(rule: str, unit: str, **more):
    kind, fields = RULES[rule]
    return kind(unit=unit, **fields, **more)


def law(model, length: int, **options):
    """The log-likelihood of every text of `length` tokens under the sampler."""
    config = PrimeV2GenerationConfig(**options)
    return model.log_likelihood(
        all_sequences(model.config.vocab_size, length), method="sampler", generation_config=config
    )


@pytest.mark.parametrize(("rule", "unit"), CASES)
def test_the_probabilities_of_all_texts_add_up_to_1(rule, unit):
    """For every number of passes, block length, temperature and nucleus."""
    model = small_model(seed=3, vocab_size=4, **UNITS[unit]).double()
    shares = [None, (0.75, 0.25)] if unit == "stage" else [None]
    for share, steps, block in itertools.product(shares, (1, 3, 20), (None, 2)):
        sampler = sampler_of(rule, unit, stage_passes=share)
        for filters in ({}, {"temperature": 0.7, "top_p": 0.8}):
            found = law(model, 3, sampler_config=sampler, max_denoising_steps=steps, block_length=block, **filters)
            assert float(found.value.exp().sum()) == pytest.approx(1, abs=1e-9)
            phases = math.ceil(3 / (block or 3)) * (2 if unit == "stage" else 1)
            assert int(found.num_forward.max()) <= max(steps, phases)


@pytest.mark.parametrize("rule", RULES)
def test_stages_of_a_coarse_first_model_are_revealed_as_those_of_a_nested_one(rule):
    """The rules read states only; the two models have the same weights."""
    options = {"sampler_config": sampler_of(rule, "stage", stage_passes=(0.75, 0.25)), "max_denoising_steps": 4}
    found = [law(small_model(seed=3, vocab_size=4, **each).double(), 3, **options) for each in (STAGES, COARSE_FIRST)]
    assert float(found[1].value.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert torch.equal(found[0].value, found[1].value)


@pytest.mark.parametrize(
    ("shares", "steps", "first"),
    [(None, 4, 2), ((0.75, 0.25), 4, 3), ((0.9, 0.1), 4, 3), ((0.1, 0.9), 4, 1), ((0.75, 0.25), 16, 12), (None, 1, 1)],
)
def test_ancestral_stages_get_their_share_of_the_steps(shares, steps, first):
    """Each stage has a step at least, if there are enough; nothing of a later stage is shown before."""
    model, order = small_model(seed=3, vocab_size=4, **COARSE_FIRST), RevealOrder("coarse_first", 2, (1, 2))
    options = merge_options(model, None, {"max_new_tokens": 20, "max_denoising_steps": steps, "seed": 0})
    canvas = make_canvas(model, torch.empty(50, 0, dtype=torch.long), None, None, options)
    blocks = Blocks.make(canvas, None, steps)
    schedule = draw_schedule(torch.arange(50), canvas, order, blocks, shares)
    drawn = schedule.steps.gather(1, schedule.passes.flatten(1)).view_as(schedule.passes)  # (B, T, U)
    assert set(drawn[..., 0].unique().tolist()) == set(range(first))
    assert set(drawn[..., 1].unique().tolist()) == set(range(first, steps) if steps > 1 else [0])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shares", [None, (0.75, 0.25)])
def test_the_ancestral_law_of_a_coarse_first_model_adds_up_to_1(shares, steps):
    """One pass has one path, so that its law is exact; with more, 2,000 drawn paths come near it."""
    model = small_model(seed=3, vocab_size=4, **COARSE_FIRST).double()
    options = {"sampler_config": AncestralSamplerConfig(stage_passes=shares), "max_denoising_steps": steps}
    config = PrimeV2GenerationConfig(**options)
    texts = all_sequences(4, 2)
    found = model.log_likelihood(texts, method="sampler", generation_config=config, num_samples=2000)
    total, error = float(found.value.exp().sum()), float((found.value.exp() * found.stderr).square().sum().sqrt())
    assert abs(total - 1) < 5 * error + 1e-9  # false alarm 6e-7, for a fresh seed
    samples = model.generate(torch.empty(ROWS, 0, dtype=torch.long), max_new_tokens=2, seed=1, **options)
    if steps == 1:
        assert_follows(samples, pairs(found.value.exp()))


def test_samplers_that_a_model_in_phases_has_not_are_refused():
    model = small_model(reveal_order="coarse_first", stage_digits=[1, 4])
    windows = small_model(reveal_order="windows", stage_digits=[1, 4], stage_windows=[[0, 0.75], [0.25, 1]])
    for each in (model, windows):
        with pytest.raises(ValueError, match="hides any unit again, but reveal_order='.*' never shows a later stage"):
            each.generate(max_new_tokens=2, sampler_config=RemaskingSamplerConfig())
    shares = AncestralSamplerConfig(stage_passes=(0.75, 0.25))
    for each, kind in ((small_model(), "digit"), (windows, "windows")):
        message = f"stage_passes is for models with reveal_order='coarse_first', not '{kind}'; leave it out"
        with pytest.raises(ValueError, match=message):
            each.generate(max_new_tokens=2, sampler_config=shares)
    with pytest.raises(
        ValueError, match="AncestralSamplerConfig: stage_passes has 3 shares, but the model has 2 stages"
    ):
        model.generate(max_new_tokens=2, sampler_config=AncestralSamplerConfig(stage_passes=(0.5, 0.25, 0.25)))
    with pytest.raises(ValueError, match="AncestralSamplerConfig: stage_passes=.* must be shares above 0"):
        AncestralSamplerConfig(stage_passes=(0.9, 0.9))


def pairs(probabilities: torch.Tensor) -> dict[tuple, float]:
    """The probability of each text of two of four tokens, by text."""
    return dict(zip(map(tuple, all_sequences(4, 2).tolist()), probabilities.tolist(), strict=True))


@pytest.mark.parametrize(("rule", "unit"), CASES)
@pytest.mark.parametrize("form", [{"max_denoising_steps": 2}, {"max_denoising_steps": 5, "block_length": 1}], ids=str)
def test_samples_follow_the_law(rule, unit, form):
    model = small_model(seed=3, vocab_size=4, **UNITS[unit]).double()
    options = {"sampler_config": sampler_of(rule, unit), "temperature": 1.3, "top_p": 0.95, **form}
    exact = law(model, 2, **options).value.exp()
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    samples = model.generate(empty, max_new_tokens=2, seed=1, eos_token_id=None, **options)
    assert_follows(samples, pairs(exact))


def naive_choice(kind: str, scores: list[float], quota: int, bound: float) -> set[int]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen, total = [], 0.0
    for i in order:
        total += -scores[i] if kind == "entropy bound" else 0
        free = kind == "threshold" and scores[i] > bound
        free |= kind == "entropy bound" and total - (-scores[i]) <= bound
        if len(chosen) < quota or free:
            chosen.append(i)
    return set(chosen)


@pytest.mark.parametrize("rule", ["confidence", "threshold", "entropy bound"])
def test_the_choice_is_that_of_a_plain_loop(rule):
    """Scores on a grid, so that many are equal: ties are decided by position."""
    sampler = {
        "confidence": ConfidenceSamplerConfig(),
        "threshold": ThresholdSamplerConfig(threshold=0.5),
        "entropy bound": EntropyBoundSamplerConfig(entropy_bound=0.7),
    }[rule]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        grid = torch.randint(1, 10, (4, 6), generator=generator).double() / 10
        scores = -grid if rule == "entropy bound" else grid
        quota = torch.randint(1, 4, (4,), generator=generator)
        found = choose(sampler, scores, torch.ones(4, 6, dtype=torch.bool), quota)
        for row in range(4):
            bound = {"threshold": 0.5, "entropy bound": 0.7}.get(rule, 0)
            expected = naive_choice(rule, scores[row].tolist(), int(quota[row]), bound)
            assert set(found[row].nonzero().flatten().tolist()) == expected


def test_whole_tokens_in_blocks_of_one_token_are_left_to_right():
    """Blocks of one token leave one token to choose, so the law is that of the left-to-right chain."""
    model = small_model(seed=4, vocab_size=4).double()
    found = law(model, 3, sampler_config=ConfidenceSamplerConfig(), max_denoising_steps=3, block_length=1)
    chain = model.log_likelihood(all_sequences(4, 3), method="chain").value
    torch.testing.assert_close(found.value, chain, rtol=1e-10, atol=0)  # sums of three float64 terms


def remasking_by_steps(model, num_steps: int, sampler, seed: int) -> torch.Tensor:
    """ReMDM step by step for rows of two hidden tokens, with no step skipped and torch's own random numbers."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    order = RevealOrder.from_config(config)
    hidden = torch.ones(ROWS, 2, order.units_per_token, dtype=torch.bool)
    digits = torch.zeros(ROWS, 2, config.num_subtokens, dtype=torch.long)
    for step in range(num_steps):
        t, alpha_t, alpha_s = 1 - step / num_steps, step / num_steps, (step + 1) / num_steps
        inside = sampler.t_off < t <= sampler.t_on
        sigma = min(sampler.eta, (1 - alpha_s) / alpha_t) if inside and alpha_t else 0.0
        draws = torch.rand(hidden.shape, generator=generator, dtype=torch.double)
        hide, reveal = ~hidden & (draws < sigma), hidden & (draws < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
        kept = order.visible_digits(hidden)  # the network reads the state before the step
        states = torch.where(kept, digits, config.base)
        with torch.no_grad():
            probabilities = model(subtoken_ids=states).logits.double().softmax(-1)
        ids = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(ROWS, 2)
        digits = torch.where(kept, digits, model.code_table.codes[ids])
        hidden = (hidden | hide) & ~reveal
    return model.decode(digits)


@pytest.mark.parametrize("order", [{}, {"reveal_order": "token"}, STAGES], ids=str)
def test_remasking_has_the_law_of_its_steps(order):
    """The sampler that skips idle steps against the plain one: chi-square of two samples, at FALSE_ALARM."""
    model = small_model(seed=3, vocab_size=4, **order)
    sampler = RemaskingSamplerConfig(eta=0.5, t_on=0.9, t_off=0.1)
    found = model.generate(
        torch.empty(ROWS, 0, dtype=torch.long), max_new_tokens=2, max_denoising_steps=4, sampler_config=sampler, seed=2
    )
    plain = remasking_by_steps(model, 4, sampler, seed=3)
    tables = [torch.bincount(each @ torch.tensor([4, 1]), minlength=16) for each in (found, plain)]
    both = torch.stack(tables).numpy()
    assert chi2_contingency(both[:, both.sum(0) > 9]).pvalue > FALSE_ALARM


def test_without_remasking_probability_the_sampler_is_the_ancestral_one_in_law():
    model = small_model(seed=3, vocab_size=4)
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    options = {"max_new_tokens": 2, "max_denoising_steps": 3, "seed": 2}
    found = [
        torch.bincount(model.generate(empty, **options, sampler_config=each) @ torch.tensor([4, 1]), minlength=16)
        for each in (RemaskingSamplerConfig(eta=0.0), None)
    ]
    both = torch.stack(found).numpy()
    assert chi2_contingency(both[:, both.sum(0) > 9]).pvalue > FALSE_ALARM


SAMPLERS = {
    "ancestral": None,
    "confidence": ConfidenceSamplerConfig(),
    "digits": ThresholdSamplerConfig(unit="digit"),
    "remasking": RemaskingSamplerConfig(eta=0.5, t_on=1.0, t_off=0.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_blocks_are_finished_from_left_to_right(name):
    """No token of a later block is known, even in part, before those of an earlier one are; the streamer sees it."""
    model = small_model(seed=5)
    drafts = []

    class Drafts:
        def put(self, ids): ...
        def put_draft(self, ids):
            drafts.append(ids[0].tolist())

        def end(self): ...

    prompt = torch.tensor([[1, 2]])
    options = {"max_new_tokens": 7, "block_length": 3, "max_denoising_steps": 9, "sampler_config": SAMPLERS[name]}
    model.generate(prompt, seed=1, streamer=Drafts(), **options)
    assert len(drafts) <= 9
    mask = model.config.mask_token_id
    for draft in drafts:
        known = [each != mask for each in draft]
        for block in (1, 2):
            if any(known[block * 3 :]):
                assert all(known[: block * 3])


@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_stopping_at_eos_changes_no_text(name, block_length):
    """Equal to the text of the same seed without EOS, cut at its first EOS: no token before it could still change."""
    model = small_model(seed=5).double()
    options = {"max_new_tokens": 4, "max_denoising_steps": 32, "block_length": block_length, "seed": 1}
    options |= {"sampler_config": SAMPLERS[name], "return_dict_in_generate": True}
    prompt = torch.tensor([[1, 2]] * 64)
    free = model.generate(prompt, eos_token_id=None, **options)
    stopped = model.generate(prompt, eos_token_id=[7, 8], pad_token_id=0, **options)
    new = free.sequences[:, 2:]
    eos = (new == 7) | (new == 8)
    after = eos.long().cumsum(1) - eos.long() > 0
    assert torch.equal(stopped.sequences[:, 2:], new.masked_fill(after, 0))
    if name != "remasking" or block_length:  # in a single block remasking ends at t = 0 only
        assert int(stopped.num_forward.sum()) < int(free.num_forward.sum())


CACHED = [("prefix", 2), ("dual", 2), ("prefix", 3), ("dual", 1)]


@pytest.mark.parametrize(("cache", "block_length"), CACHED)
@pytest.mark.parametrize("unit", UNITS)
def test_with_a_cache_too_the_law_adds_up_to_1_and_samples_follow_it(cache, block_length, unit):
    model = small_model(seed=3, vocab_size=4, **UNITS[unit]).double()
    options = {"sampler_config": ConfidenceSamplerConfig(unit=unit), "block_length": block_length, "cache": cache}
    assert float(law(model, 3, max_denoising_steps=4, **options).value.exp().sum()) == pytest.approx(1, abs=1e-9)
    exact = law(model, 2, max_denoising_steps=4, **options).value.exp()
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    samples = model.generate(empty, max_new_tokens=2, max_denoising_steps=4, seed=1, **options)
    assert_follows(samples, pairs(exact))


def test_a_cache_that_keeps_nothing_changes_nothing():
    """In one block, without a prompt and a suffix, there is nothing to keep: every pass runs every token."""
    model = small_model(seed=4).double()
    options = {"max_new_tokens": 6, "max_denoising_steps": 4, "sampler_config": ConfidenceSamplerConfig(), "seed": 1}
    expected = model.generate(torch.empty(2, 0, dtype=torch.long), **options)
    for cache in ({"cache": "prefix", "block_length": 6}, {"cache": "dual", "block_length": 9}):
        assert torch.equal(model.generate(torch.empty(2, 0, dtype=torch.long), **cache, **options), expected)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cached_pass_is_that_of_a_plain_loop(cache):
    """Keys and values kept by hand: the network is run on everything, with the states of the kept columns frozen."""
    model = small_model(seed=5, num_hidden_layers=1).double()
    prompt, suffix = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    given = {"max_new_tokens": 4, "block_length": 2, "cache": cache, "sampler_config": ConfidenceSamplerConfig()}
    options = merge_options(model, None, given)
    canvas = make_canvas(model, prompt, None, suffix, options)
    process = RuleProcess(model, options, canvas, [])
    row, targets = torch.tensor([0]), canvas.fillable & (process.blocks.of == 0)
    with torch.no_grad():
        process.hidden_states(row, targets)
        before = process.states.clone()
        canvas.ids[0, 3], process.states[0, 3] = 7, model.encode(torch.tensor([7]))[0]
        process.states[0, 8] = model.encode(torch.tensor([9]))[0]  # a token of the suffix: only "prefix" sees it anew
        found = process.hidden_states(row, targets)
        frozen = before.clone()
        frozen[0, 3] = process.states[0, 3]
        if cache == "prefix":
            frozen[0, 3:] = process.states[0, 3:]
        # With one layer keys and values are functions of a token's own state, so freezing states is freezing them.
        expected = model.model(frozen).last_hidden_state[targets]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_of_a_batch_is_what_it_is_by_itself(name, cache):
    """Prompts of different lengths, padded left, with blocks: rows are at different blocks and passes."""
    model = small_model(seed=6).double()
    options = {"max_new_tokens": 6, "block_length": 2, "max_denoising_steps": 7, "sampler_config": SAMPLERS[name]}
    rows = [[3, 1, 4, 1], [5], [9, 2]]
    ids = torch.tensor([[0] * (4 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (4 - len(row)) + [1] * len(row) for row in rows])
    suffix = torch.tensor([[6, 7]] * 3)
    batch = model.generate(ids, mask, suffix, seed=4, cache=cache, **options)
    for row, found in zip(rows, batch, strict=True):
        single = model.generate(torch.tensor([row]), None, suffix[:1], seed=4, cache=cache, **options)
        assert found[4:].tolist() == single[0, len(row) :].tolist()


def test_scores_within_rounding_are_equal_and_ordered_by_position():
    """A chain of neighbours counts as one; relative to the score, so that small probabilities are told apart."""
    scores = torch.tensor([[0.5, 0.5 + 1e-7, 0.7, 0.5 - 1e-7, -math.inf, 0.5001], [1e-6, 2e-6, 3e-6, 0, 0, 1e-5]])
    ordered, index = best_first(scores.double())
    assert index.tolist() == [[2, 5, 0, 1, 3, 4], [5, 2, 1, 0, 3, 4]]
    assert torch.equal(ordered, scores.double().gather(1, index))


def test_a_small_difference_of_large_numbers_is_rounded_as_they_are():
    """Margins of 1e-4 between probabilities of 0.5: 1e-7 apart they are equal, though 1e-3 of the margin."""
    scores = torch.tensor([[1e-4, 1e-4 + 1e-7, 3e-4]], dtype=torch.double)
    assert best_first(scores)[1].tolist() == [[2, 1, 0]]
    assert best_first(scores, torch.full_like(scores, 0.5))[1].tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("unit", ["token", "digit"])
def test_where_all_is_hidden_the_first_unit_is_the_leftmost_in_every_batch(score, unit):
    """All positions have one distribution there, and its roundings differ; here two values are nearly as likely."""
    sampler = ConfidenceSamplerConfig(score=score, unit=unit)
    for seed, rows in itertools.product((0, 4), (1, 2, 5)):
        model = small_model(seed=seed, scale=0.2, vocab_size=500, hidden_size=64, num_attention_heads=4)
        options = merge_options(
            model, None, {"max_new_tokens": 17, "max_denoising_steps": 200, "sampler_config": sampler, "seed": 0}
        )
        canvas = make_canvas(model, torch.empty(rows, 0, dtype=torch.long), None, None, options)
        process = RuleProcess(model, options, canvas, [])
        with torch.no_grad():
            process.run_pass(list(range(rows)))
        assert ((process.states != 2).any(-1) == (torch.arange(17) == 0)).all()
