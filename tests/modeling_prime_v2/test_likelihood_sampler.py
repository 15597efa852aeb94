"""`log_likelihood(method="sampler")` beyond the law of rules (test_samplers.py): drawn paths, prompts, refusals."""

import itertools
import math

import pytest
import torch
from enumeration import all_sequences
from networks import small_model

from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.likelihood_output_prime_v2 import jackknifed
from prime_v2.samplers_prime_v2 import ConfidenceSamplerConfig, RemaskingSamplerConfig, Units

RULE = ConfidenceSamplerConfig()


def score(model, ids, sampler=None, num_samples=8, mask=None, prompt=None, seed=0, keys=None, **options):
    found = {
        name: options.pop(name) for name in ("return_samples", "tokens_per_pass", "exhaustive") if name in options
    }
    config = PrimeV2GenerationConfig(sampler_config=sampler, **options)
    return model.log_likelihood(
        ids, mask, prompt, "sampler", config, num_samples=num_samples, seed=seed, keys=keys, **found
    )


def ancestral_law(model, steps: int) -> torch.Tensor:
    """Probabilities (16,) of the texts of two of four tokens: each token's step is uniform, and drawn by itself."""
    texts, mask = all_sequences(4, 2), model.config.mask_token_id
    law = torch.zeros(16, dtype=torch.double)
    with torch.no_grad():
        for first, second in itertools.product(range(steps), repeat=2):
            known = texts.clone()
            known[:, 0 if first >= second else 1] = mask  # shown in the later step, or in the same one
            if first == second:
                known[:] = mask
            nothing = torch.full_like(texts, mask)
            each = torch.ones(16, dtype=torch.double)
            for column, (own, other) in enumerate(((first, second), (second, first))):
                logits = model(known if own > other else nothing).logits[:, column].log_softmax(-1)
                each *= logits.gather(1, texts[:, column : column + 1]).squeeze(1).exp()
            law += each / steps**2
    return law


def test_the_drawn_paths_of_the_ancestral_sampler_average_to_its_law():
    """Against the sum over all pairs of steps; exp(value) is the mean of its paths' probabilities, which is unbiased.

    256 paths a text; 5 standard errors of that mean, over 16 texts: a false alarm in 1 of 100,000 runs.
    """
    model = small_model(seed=3, vocab_size=4, reveal_order="token").double()
    law = ancestral_law(model, steps=2)
    assert float(law.sum()) == pytest.approx(1, abs=1e-9)
    found = score(model, all_sequences(4, 2), num_samples=256, max_denoising_steps=2)
    assert found.is_bound and not found.is_exact and (found.stderr > 0).all()
    error = found.stderr * found.value.exp()  # of the mean, by the slope of exp
    assert ((found.value.exp() - law).abs() < 5 * error).all()


def test_a_prompt_is_what_generate_is_given():
    """p(new | prompt) of a rule: that of each continuation of a prompt, whose sum is 1, wherever the prompt stands."""
    model = small_model(seed=3, vocab_size=4).double()
    new = all_sequences(4, 2)
    for columns in ([0], [1], [0, 3]):
        texts = torch.full((16, 2 + len(columns)), 2)
        prompt = torch.zeros_like(texts)
        prompt[:, columns] = 1
        texts[:, prompt[0] == 0] = new
        found = score(model, texts, RULE, prompt=prompt, max_denoising_steps=1)
        assert float(found.value.exp().sum()) == pytest.approx(1, abs=1e-9)
        shown = texts[:1].masked_fill(prompt[:1] == 0, model.config.mask_token_id)
        with torch.no_grad():
            logits = model(shown).logits.log_softmax(-1)[0, prompt[0] == 0]  # (2, V): all is drawn in one pass
        expected = logits[0, new[:, 0]] + logits[1, new[:, 1]]
        torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sampler", [None, RULE], ids=["ancestral", "rule"])
def test_passes_of_any_size_and_padding_change_no_value(sampler):
    model = small_model(seed=4).double()
    rows = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 7]), torch.tensor([8, 9, 1])]
    single = [score(model, row[None], sampler, max_denoising_steps=3) for row in rows]
    ids = torch.stack([torch.cat([row.new_zeros(5 - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(5) >= 5 - len(row) for row in rows])
    for tokens_per_pass in (1, 12, 1000):
        found = score(model, ids, sampler, mask=mask, tokens_per_pass=tokens_per_pass, max_denoising_steps=3)
        torch.testing.assert_close(found.value, torch.cat([each.value for each in single]), rtol=1e-9, atol=0)
        assert found.num_forward.tolist() == [int(each.num_forward) for each in single]
        assert found.num_scored.tolist() == [5, 2, 3]


def test_paths_are_functions_of_the_keys_and_a_rule_has_one():
    model = small_model(seed=4).double()
    ids = torch.tensor([[1, 2, 3, 4]] * 3)
    found = score(model, ids, keys=torch.tensor([5, 6, 5]), return_samples=True)
    assert torch.equal(found.samples[0], found.samples[2]) and not torch.equal(found.samples[0], found.samples[1])
    assert [len(each) for each in found.samples] == [8] * 3
    rule = score(model, ids, RULE, keys=torch.tensor([5, 6, 5]), return_samples=True)
    assert rule.is_exact and rule.value.tolist() == pytest.approx([float(rule.value[0])] * 3, rel=1e-12)
    assert torch.equal(torch.cat(rule.samples), rule.value)
    assert rule.stderr.tolist() == [0] * 3 and rule.degrees.isinf().all()


def test_a_text_that_top_p_excludes_has_probability_0():
    """Exactly so under a rule; under drawn paths, which are not all there are, with no known error."""
    model = small_model(seed=3, vocab_size=4, reveal_order="token").double()
    options = {"top_p": 0.3, "max_denoising_steps": 2}
    texts = all_sequences(4, 2)
    rule = score(model, texts, RULE, **options)
    excluded = rule.value == -math.inf
    assert excluded.any() and not excluded.all() and not rule.stderr.any()
    drawn = score(model, texts, **options)
    assert drawn.stderr[drawn.value == -math.inf].isnan().all()
    assert not drawn.value.isnan().any() and (drawn.value > -math.inf).any()


@pytest.mark.parametrize(
    ("log_p", "stderr", "degrees"),
    [([-math.inf, -math.inf], math.nan, math.nan), ([-1.0, -math.inf, -math.inf], math.inf, 1.0)],
)
def test_the_error_of_paths_of_which_all_but_one_are_impossible_is_not_a_number_of_nats(log_p, stderr, degrees):
    """Without that one the value would be -inf; without any, nothing is known."""
    log_p = torch.tensor(log_p, dtype=torch.double)
    draws, value, found, freedom = jackknifed(log_p)
    assert float(value) == pytest.approx(float(log_p.exp().mean().log())) and len(draws) == len(log_p)
    for each, expected in ((float(found), stderr), (freedom, degrees)):
        assert each == expected or math.isnan(each) and math.isnan(expected)


def test_impossible_paths_count_as_0_in_the_jackknife():
    """Two of four paths: the delete-one values by hand."""
    log_p = torch.tensor([-1.0, -math.inf, -2.0, -math.inf], dtype=torch.double)
    draws, value, stderr, _ = jackknifed(log_p)
    p = log_p.exp()
    without = torch.tensor([float((p.sum() - each) / 3) for each in p], dtype=torch.double).log()
    moves = 3 * (without.mean() - without)
    torch.testing.assert_close(value, p.mean().log())
    torch.testing.assert_close(stderr, moves.std() / 2)
    torch.testing.assert_close(draws, value + moves)


def test_torchs_generator_is_left_alone():
    model, state = small_model(seed=4), torch.get_rng_state()
    score(model, torch.tensor([[1, 2]]), RULE)
    assert torch.equal(torch.get_rng_state(), state)


REFUSED = [
    ({"sampler": RemaskingSamplerConfig()}, "a text has many paths under remasking"),
    ({"do_sample": False}, "do_sample=False writes a single text, so no other has a likelihood; use do_sample=True"),
    ({"exhaustive": False}, "exhaustive=False of method='sampler': it belongs to methods that draw masks; leave it"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_has_no_law_and_options_of_other_methods_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score(small_model(seed=4), torch.tensor([[1, 2]]), **options)


def test_the_refusal_of_an_unknown_method_names_it_too_and_others_have_no_generation_config():
    model, ids = small_model(seed=4), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="method='samplers' is not one of subtoken, .*, orders, sampler"):
        model.log_likelihood(ids, method="samplers")
    with pytest.raises(ValueError, match="generation_config belongs to method='sampler', not 'token'; leave it out"):
        model.log_likelihood(ids, method="token", generation_config=PrimeV2GenerationConfig())
    model.generation_config.do_sample = False
    with pytest.raises(ValueError, match="do_sample=False writes a single text"):
        model.log_likelihood(ids, method="sampler")


def test_the_nodes_of_the_code_tree_are_numbered_once():
    """They are a sort of all codes, and a process has many passes; the last stage's nodes are the tokens."""
    model = small_model(seed=3, vocab_size=7, num_subtokens=3, reveal_order="nested", stage_digits=[1, 2, 3])
    units = Units("stage", model.code_table, (1, 2, 3))
    codes = model.code_table.codes[: model.config.vocab_size]
    for nodes, end in zip(units.nodes, (1, 2), strict=True):
        together = (codes[:, None, :end] == codes[None, :, :end]).all(-1)
        assert torch.equal(nodes[:, None] == nodes[None], together)
    assert units.nodes is units.nodes
