"""`generate` of uniform-state diffusion against enumerated laws; seeds, batches, EOS, hooks; the deterministic decode.

The chi-square tests reject at p < 1e-6 (FALSE_ALARM): that is their false-alarm probability for a fresh seed. With the
seeds fixed here their outcome does not change from run to run.
"""

import itertools

import pytest
import torch
from enumeration import (
    all_sequences,
    chain_law,
    correlated_law,
    estimates,
    naive_posterior,
    optimal_uniform,
    reverse_chain,
)
from networks import small_uniform
from observers import Favour, Recorder
from scipy.stats import chisquare
from transformers import LogitsProcessorList, StoppingCriteriaList, SuppressTokensLogitsProcessor

from prime_v2.generation_uniform_prime_v2 import PrimeV2GenerationConfig, PrimeV2GenerationOutput
from prime_v2.modeling_uniform_prime_v2 import PrimeV2ForUniformDiffusion

FALSE_ALARM = 1e-6
ROWS = 20_000
NOTHING = torch.empty(ROWS, 0, dtype=torch.long)
UNIFORM = torch.full((9,), 1 / 9, dtype=torch.double)  # over the sequences of two of three tokens


def prompts(rows: int, width: int, vocab_size: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, width), generator=torch.Generator().manual_seed(seed))


def assert_follows(samples: torch.Tensor, law: torch.Tensor, vocab_size: int) -> None:
    """Chi-square of samples (N, T) against a law over `all_sequences`; expected counts are 0 or at least 5."""
    powers = vocab_size ** torch.arange(samples.shape[1] - 1, -1, -1)
    counts = (samples * powers).sum(1).bincount(minlength=len(law)).double()
    possible, expected = law > 0, law * len(samples)
    assert (counts[~possible] == 0).all()
    assert float(expected[possible].min()) > 5
    assert chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > FALSE_ALARM


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
    assert_follows(samples, law, 3)


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
    assert_follows(samples, law, 3)


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
    assert_follows(samples[:, 2:4], law[possible], 3)


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
    assert_follows(samples, law, 3)
    assert distance(law, chain_law(reverse_chain(network, 2, 2), UNIFORM)) > 0.02


# Seeds, batches, padding


def test_a_seed_reproduces_and_another_one_differs():
    model, prompt = small_uniform(), prompts(3, 4)
    first = model.generate(prompt, max_new_tokens=12, seed=7, max_denoising_steps=8)
    assert torch.equal(first, model.generate(prompt, max_new_tokens=12, seed=7, max_denoising_steps=8))
    assert not torch.equal(first, model.generate(prompt, max_new_tokens=12, seed=8, max_denoising_steps=8))


def test_equal_rows_of_a_batch_differ_and_their_first_is_what_it_is_alone():
    model, prompt, options = (
        small_uniform(),
        prompts(1, 4),
        {"max_new_tokens": 12, "seed": 7, "max_denoising_steps": 8},
    )
    rows = model.generate(prompt.repeat(3, 1), **options)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    assert torch.equal(rows[:1], model.generate(prompt, **options))


@pytest.mark.parametrize("do_sample", [True, False])
def test_other_rows_their_order_and_padding_on_any_side_change_nothing(do_sample):
    model, lengths, full = small_uniform(), [5, 3, 1, 4], prompts(4, 5)
    options = {"max_new_tokens": 9, "max_denoising_steps": 6, "do_sample": do_sample}
    options |= {"seed": 7} if do_sample else {}
    alone = [model.generate(full[i : i + 1, :n], **options)[0, n:] for i, n in enumerate(lengths)]
    for side in ("left", "right", "both"):
        ids, mask = torch.full((4, 7), 9), torch.zeros(4, 7, dtype=torch.long)
        for i, n in enumerate(lengths):
            start = {"left": 7 - n, "right": 0, "both": 1}[side]
            ids[i, start : start + n], mask[i, start : start + n] = full[i, :n], 1
        for turn in ([0, 1, 2, 3], [3, 1, 0, 2]):
            out = model.generate(ids[turn], mask[turn], **options)
            assert torch.equal(out[:, :7], ids[turn]), "the padded prompt comes back as it was"
            for row, i in enumerate(turn):
                assert torch.equal(out[row, 7:], alone[i])


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    model, prompt, options = (
        small_uniform(),
        prompts(3, 4),
        {"max_new_tokens": 12, "seed": 7, "max_denoising_steps": 4},
    )
    whole = model.generate(prompt, **options)
    monkeypatch.setattr("prime_v2.generation_uniform_prime_v2.DRAW_ELEMENTS", 30)
    assert torch.equal(whole, model.generate(prompt, **options))


def test_generating_leaves_the_mode_and_the_input_as_they_were():
    model, prompt = small_uniform(attention_dropout=0.5).train(), prompts(2, 4)
    before = prompt.clone()
    first = model.generate(prompt, max_new_tokens=8, seed=0, max_denoising_steps=4)
    assert model.training and torch.equal(prompt, before)
    model.eval()
    assert torch.equal(first, model.generate(prompt, max_new_tokens=8, seed=0, max_denoising_steps=4))


# Layout, EOS, hooks


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


def test_after_the_first_eos_comes_padding_with_the_same_tokens_before_it():
    model, prompt = small_uniform(), prompts(20, 2)
    options = {"max_new_tokens": 12, "seed": 0, "max_denoising_steps": 8, "return_dict_in_generate": True}
    favour = LogitsProcessorList([Favour([7, 8], 2.0)])
    free = model.generate(prompt, logits_processor=favour, **options)
    stopped = model.generate(prompt, logits_processor=favour, eos_token_id=[7, 8], pad_token_id=3, **options)
    for row, kept in zip(free.sequences[:, 2:].tolist(), stopped.sequences[:, 2:].tolist(), strict=True):
        eos = min((row + [7]).index(7), (row + [8]).index(8))
        assert kept == row[: eos + 1] + [3] * (11 - eos)
    assert stopped.num_forward.eq(8).all(), "until the end any token can change"


def test_logits_processors_decide_what_can_be_drawn_and_see_only_tokens_of_the_vocabulary():
    model, prompt, favour = small_uniform(), prompts(3, 4), Favour([0], 0.0)
    banned = SuppressTokensLogitsProcessor([1, 2, 5, 6, 7, 8, 9, 10])
    ids = torch.cat([torch.full((3, 1), 10), prompt], 1)
    mask = (torch.arange(5) > 0).long().repeat(3, 1)
    options = {"max_new_tokens": 10, "seed": 0, "max_denoising_steps": 4}
    out = model.generate(ids, mask, logits_processor=[banned, favour], **options)
    assert set(out[:, 5:].flatten().tolist()) <= {0, 3, 4}
    assert len(favour.seen) == 4
    for seen, shape in favour.seen:
        assert seen.shape == (30, 15) and shape == (30, 11)
        assert seen.min() >= 0 and seen.max() < 11
        assert torch.equal(seen[:, 0], seen[:, 1]), "padding copies its neighbour"


def test_stopping_criteria_finish_their_rows_with_one_more_pass():
    model, prompt, seen = small_uniform(), prompts(2, 4), []

    def second_row(ids, scores):
        seen.append(ids)
        return torch.tensor([False, True])

    options = {"max_new_tokens": 10, "max_denoising_steps": 9, "seed": 0, "return_dict_in_generate": True}
    free = model.generate(prompt, **options)
    out = model.generate(prompt, stopping_criteria=StoppingCriteriaList([second_row]), **options)
    assert out.num_forward.tolist() == [9, 2]
    assert torch.equal(out.sequences[0], free.sequences[0])
    assert len(seen) == 9 and seen[0].shape == (2, 14)
    assert all(torch.equal(each[1], out.sequences[1]) for each in seen[1:])
    assert max(int(each.max()) for each in seen) < 11
    greedy = model.generate(prompt, stopping_criteria=[second_row], do_sample=False, max_new_tokens=10)
    assert greedy.max() < 11


def test_a_streamer_gets_prompt_drafts_and_result():
    model, prompt, recorder = small_uniform(), prompts(1, 4), Recorder()
    out = model.generate(
        prompt, suffix_ids=prompts(1, 2), max_new_tokens=8, seed=0, streamer=recorder, max_denoising_steps=6
    )
    assert [kind for kind, _ in recorder.calls] == ["put", *["draft"] * 6, "put", "end"]
    assert torch.equal(recorder.calls[0][1], prompt)
    drafts = [draft for kind, draft in recorder.calls if kind == "draft"]
    assert all(draft.shape == (1, 10) and draft.max() < 11 for draft in drafts)
    assert torch.equal(recorder.calls[-2][1], out[:, 4:]) and torch.equal(drafts[-1], out[:, 4:])
    assert not torch.equal(drafts[0], drafts[-1])


def test_saving_and_loading_keeps_the_generation_config(tmp_path):
    model = small_uniform()
    model.generation_config = PrimeV2GenerationConfig(max_new_tokens=6, temperature=0.5, max_denoising_steps=4, seed=3)
    model.save_pretrained(tmp_path)
    loaded = PrimeV2ForUniformDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(), model.generate())
    assert loaded.generate().shape == (1, 6)


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
        model, prompt = small_uniform(seed=seed), prompts(1, 3, seed=seed)
        expected, revised = naive_greedy(model, prompt[0].tolist(), 7, num_steps)
        out = model.generate(prompt, max_new_tokens=7, do_sample=False, max_denoising_steps=num_steps)
        assert out[0].tolist() == expected
        total += revised
    assert total > 0 or num_steps == 1, "a token that was taken is taken back"


def test_the_decode_has_no_randomness():
    model, prompt, found = small_uniform(), prompts(1, 4).repeat(2, 1), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(model.generate(prompt, max_new_tokens=9, do_sample=False))
    assert torch.equal(*found) and torch.equal(found[0][0], found[0][1])
    with pytest.raises(ValueError, match="do_sample=False, the deterministic decode, has no use for seed=3"):
        model.generate(prompt, do_sample=False, seed=3)


def test_greedy_matches_says_whether_the_decode_gives_the_targets():
    """Targets in the middle, padding on both sides, rows of different length, small passes."""
    model, lengths = small_uniform(eos_token_id=7), [9, 5, 7, 4]
    ids, mask = torch.full((4, 11), 2), torch.zeros(4, 11, dtype=torch.long)
    targets = torch.zeros(4, 11, dtype=torch.bool)
    for row, n in enumerate(lengths):
        start = row % 3
        text = prompts(1, n, seed=row)[0]
        hidden = torch.zeros(n, dtype=torch.bool)
        hidden[1 : 1 + row] = True
        filled = (
            model.generate(text.masked_fill(hidden, 11)[None], max_length=n, do_sample=False, eos_token_id=None)
            if row
            else text[None]
        )
        ids[row, start : start + n], mask[row, start : start + n] = filled[0], 1
        targets[row, start : start + n] = hidden
    before = ids.clone()
    for tokens_per_pass in (1, 12, 8192):
        result = model.greedy_matches(ids, mask, targets, tokens_per_pass=tokens_per_pass)
        assert result.matches.tolist() == [True] * 4
        assert result.num_forward.tolist() == [0, 1, 2, 3]
    wrong = ids.clone()
    wrong[2, 3] = (wrong[2, 3] + 1) % 11  # the first target of its row
    wrong[3, 3] = (wrong[3, 3] + 1) % 11  # the last target of its row
    assert model.greedy_matches(wrong, mask, targets).matches.tolist() == [True, True, False, False]
    assert torch.equal(ids, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\); give \(B, L\)"),
        ({"input_ids": torch.tensor([[1, 2, 11]])}, r"token ids span \[1, 11\], .* has no mask token"),
        ({"target_mask": torch.ones(1, 2)}, r"target_mask has shape \(1, 2\), but input_ids \(1, 3\)"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_compared_are_refused(arguments, message):
    ids = torch.tensor([[1, 2, 3]])
    defaults = {"input_ids": ids, "attention_mask": None, "target_mask": ids > 1}
    with pytest.raises(ValueError, match=message):
        small_uniform().greedy_matches(**(defaults | arguments))


# Bad input


IDS = torch.tensor([[1, 2, 3]])
BAD_INPUTS = [
    ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\)"),
    ({"input_ids": torch.tensor([[1, 12]])}, r"token ids span \[1, 12\]"),
    ({"input_ids": IDS, "attention_mask": torch.zeros(1, 3)}, "row 0 of attention_mask is padding alone"),
    ({"input_ids": IDS, "max_new_tokens": 40}, "43 tokens, but max_position_embeddings=32; use max_new_tokens=29"),
    ({"input_ids": IDS, "eos_token_id": 50}, r"eos_token_id=50 is no token of this model; use an id in \[0, 10\]"),
    ({"input_ids": IDS, "temperature": 0}, r"temperature=0 must be positive and finite; use 1\.0"),
    ({"input_ids": IDS, "top_k": 5}, "top_k=5 is not an option of this model's generate.*; leave it out"),
    ({"input_ids": IDS, "max_denoising_steps": 0}, "max_denoising_steps=0 must be an integer of at least 1; use 256"),
    ({"input_ids": IDS.repeat(2, 1), "streamer": Recorder()}, "a streamer takes one sequence, but the batch has 2"),
    (
        {"input_ids": IDS, "max_new_tokens": 2, "logits_processor": [lambda ids, scores: scores - torch.inf]},
        "a position has no possible token",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS, ids=[message[:40] for _, message in BAD_INPUTS])
def test_bad_inputs_are_refused_by_name_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_uniform().generate(**arguments)


def test_a_streamer_that_wants_logits_is_refused():
    recorder = Recorder()
    recorder._takes_logits = True
    with pytest.raises(ValueError, match="this streamer wants the logits of drafts"):
        small_uniform().generate(IDS, streamer=recorder)


def test_a_network_that_is_not_finite_is_reported():
    model = small_uniform()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the network's logits are not finite"):
        model.generate(IDS, max_new_tokens=2)
