"""`generate` of interpolating diffusion: its cache, seeds and batches, hooks, the deterministic decode."""

import pytest
import torch
from enumeration import query_log_probabilities
from networks import small_interpolating
from observers import Favour
from transformers import MaxTimeCriteria, NoRepeatNGramLogitsProcessor, SuppressTokensLogitsProcessor

from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig, merge_options
from prime_v2.generation_interpolating_prime_v2 import InterpolatingProcess
from prime_v2.generation_process_prime_v2 import make_canvas

MASK = 11  # of the networks here that do not say otherwise


def prompts(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(11, (rows, width), generator=torch.Generator().manual_seed(seed))


# The cache


class _Recorded(InterpolatingProcess):
    """Keeps the hidden states of every pass, and (what its cache held before, what the rows knew, of each layer)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.stored = [], []
        if self.cache is not None:
            self.extend, self.cache.extend = self.cache.extend, self.watched_extend

    def query_states(self, picked, asked):
        self.seen.append(super().query_states(picked, asked))
        return self.seen[-1]

    def watched_extend(self, rows, new_positions):
        known = self.canvas.real[rows] & (self.passes[rows] < self.num_forward[int(rows[0])] - 1)
        order_ids, layers = self.extend(rows, new_positions)
        sizes = {layer.keys.shape[2] for layer in layers.layers}
        self.stored.append((order_ids.shape[1] - new_positions.shape[1], int(known.sum(1).max()), sizes))
        return order_ids, layers


class _NoStream:
    def start(self):
        pass

    draft = finish = lambda self, ids: None


@pytest.mark.parametrize("fields", [{}, {"alpha_0": 1.0}, {"num_key_value_heads": 1, "qk_norm": True}], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_cache_changes_no_logit_and_no_sample(fields, implementation):
    """Rows of different lengths, padding, masks inside prompts, a suffix, rows that end early by EOS."""
    model = small_interpolating(seed=3, **fields)
    model.set_attn_implementation(implementation)
    ids, mask = prompts(5, 6), torch.ones(5, 6, dtype=torch.long)
    ids[1, 2], ids[2, 5], mask[3, :4], mask[4, 3:] = MASK, MASK, 0, 0
    found = []
    for use_cache in (True, False):
        given = {"max_new_tokens": 12, "max_denoising_steps": 5, "seed": 4, "eos_token_id": 7, "pad_token_id": 0}
        given["use_cache"] = use_cache
        options = merge_options(model, None, given)
        canvas = make_canvas(model, ids, mask, prompts(5, 2, seed=2), options)
        process = _Recorded(model, options, canvas, [])
        with torch.no_grad():
            process.run([], _NoStream())
        found.append((process.seen, process.result()[0], process.num_forward, process.stored))
    (cached, ids_cached, passes, stored), (plain, ids_plain, plain_passes, _) = found
    assert len(cached) == len(plain) >= 5 and len(set(passes)) > 1 and passes == plain_passes
    for ours, expected in zip(cached, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids_cached, ids_plain)
    for held, known, sizes in stored:
        assert held == known and sizes <= {held}, "neither queries nor more than the row with most tokens needs"


def test_the_network_is_fed_new_tokens_and_queries_alone(monkeypatch):
    """One row, left to right: the prompt and a query, then a token and a query in each pass."""
    model, widths = small_interpolating(alpha_0=0.0), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda ids, **rest: widths.append(ids.shape[1]) or forward(ids, **rest)
    )
    out = model.generate(prompts(1, 4), suffix_ids=prompts(1, 2), max_new_tokens=6, seed=0)
    assert widths == [7] + [2] * 5
    widths.clear()
    again = model.generate(prompts(1, 4), suffix_ids=prompts(1, 2), max_new_tokens=6, seed=0, use_cache=False)
    assert widths == [7, 8, 9, 10, 11, 12] and torch.equal(out, again)


# Seeds, batches, padding


def test_a_seed_reproduces_and_another_one_differs():
    model, prompt = small_interpolating(), prompts(3, 4)
    first = model.generate(prompt, max_new_tokens=12, seed=7)
    assert torch.equal(first, model.generate(prompt, max_new_tokens=12, seed=7))
    assert not torch.equal(first, model.generate(prompt, max_new_tokens=12, seed=8))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, max_new_tokens=12))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_equal_rows_of_a_batch_differ_and_their_first_is_what_it_is_alone():
    model, prompt = small_interpolating(), prompts(1, 4)
    rows = model.generate(prompt.repeat(3, 1), max_new_tokens=12, seed=7)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    assert torch.equal(rows[:1], model.generate(prompt, max_new_tokens=12, seed=7))


@pytest.mark.parametrize("options", [{"seed": 7, "max_denoising_steps": 4}, {"do_sample": False}], ids=str)
def test_other_rows_their_order_and_padding_on_any_side_change_nothing(options):
    model, lengths, full = small_interpolating(), [5, 3, 1, 4], prompts(4, 5)
    options = options | {"max_new_tokens": 9}
    alone = [model.generate(full[i : i + 1, :n], **options)[0, n:] for i, n in enumerate(lengths)]
    for side in ("left", "right", "both"):
        ids, mask = torch.full((4, 7), -1), torch.zeros(4, 7, dtype=torch.long)
        for i, n in enumerate(lengths):
            start = {"left": 7 - n, "right": 0, "both": 1}[side]
            ids[i, start : start + n], mask[i, start : start + n] = full[i, :n], 1
        for turn in ([0, 1, 2, 3], [3, 1, 0, 2]):
            out = model.generate(ids[turn], mask[turn], **options)
            assert torch.equal(out[:, :7], ids[turn]), "the padded prompt comes back as it was"
            for row, i in enumerate(turn):
                assert torch.equal(out[row, 7:], alone[i])


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    model, prompt, target = small_interpolating(), prompts(3, 4), torch.arange(16).expand(3, -1) >= 4
    whole = model.generate(prompt, max_new_tokens=12, seed=7, max_denoising_steps=2)
    found = model.greedy_matches(whole, None, target)
    monkeypatch.setattr("prime_v2.generation_interpolating_prime_v2.DRAW_ELEMENTS", 25)
    assert torch.equal(whole, model.generate(prompt, max_new_tokens=12, seed=7, max_denoising_steps=2))
    assert torch.equal(found.matches, model.greedy_matches(whole, None, target).matches)


def test_generating_leaves_the_mode_and_the_input_as_they_were():
    model, prompt = small_interpolating(attention_dropout=0.5).train(), prompts(2, 4)
    before = prompt.clone()
    first = model.generate(prompt, max_new_tokens=8, seed=0)
    assert model.training and torch.equal(prompt, before)
    assert torch.equal(first, model.eval().generate(prompt, max_new_tokens=8, seed=0)), "no dropout while sampling"


# Layout, EOS, temperature, hooks


def test_prompt_and_suffix_are_kept_in_order_and_masks_are_filled_in_where_they_stand():
    model, prompt, suffix = small_interpolating(), prompts(2, 4), prompts(2, 3, seed=2)
    out = model.generate(prompt, suffix_ids=suffix, max_new_tokens=8, seed=0)
    assert torch.equal(out[:, :4], prompt) and torch.equal(out[:, 12:], suffix) and out.shape == (2, 15)
    assert out.min() >= 0 and out.max() < MASK
    out = model.generate(torch.tensor([[3, MASK, 7, MASK, 9]]), max_length=5, seed=0)
    assert out.shape == (1, 5) and out[0, [0, 2, 4]].tolist() == [3, 7, 9] and out.max() < MASK
    assert model.generate(max_new_tokens=5, seed=0).shape == (1, 5)
    assert model.generate(max_new_tokens=5, seed=0, bos_token_id=4)[0, 0] == 4


def test_after_the_first_eos_comes_padding_and_the_row_stops_early_with_the_same_tokens():
    model, prompt = small_interpolating(), prompts(40, 2)
    options = {"max_new_tokens": 12, "seed": 0, "max_denoising_steps": 6, "return_dict_in_generate": True}
    options["logits_processor"] = [Favour([7, 8], 1.0)]
    free = model.generate(prompt, **options)
    stopped = model.generate(prompt, eos_token_id=[7, 8], pad_token_id=3, **options)
    for row, kept in zip(free.sequences[:, 2:].tolist(), stopped.sequences[:, 2:].tolist(), strict=True):
        eos = min((row + [7]).index(7), (row + [8]).index(8))
        assert kept == row[: eos + 1] + [3] * (11 - eos)
    assert (stopped.num_forward <= free.num_forward).all()
    assert stopped.num_forward.sum() < free.num_forward.sum()


def test_low_temperature_and_low_top_p_give_the_likeliest_token():
    model, prompt = small_interpolating(alpha_0=0.0), prompts(3, 4)
    likeliest = model.generate(prompt, max_new_tokens=5, do_sample=False)
    for seed, narrow in enumerate(({"temperature": 1e-6}, {"top_p": 1e-9})):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, seed=seed, **narrow), likeliest)
    assert not torch.equal(model.generate(prompt, max_new_tokens=5, seed=0), likeliest)


def test_logits_processors_decide_what_can_be_drawn_and_see_only_tokens_of_the_vocabulary():
    model, prompt, favour = small_interpolating(), prompts(3, 4), Favour([0], 0.0)
    banned = SuppressTokensLogitsProcessor(list(range(5, 11)))
    out = model.generate(prompt, max_new_tokens=10, seed=0, logits_processor=[banned, favour])
    assert out[:, 4:].max() < 5
    assert sum(shape[0] for _, shape in favour.seen) == 30, "each new token once"
    for seen, shape in favour.seen:
        assert seen.shape[1] == 14 and shape == (len(seen), 11)
        assert seen.min() >= 0 and seen.max() < MASK
    assert not torch.equal(out, model.generate(prompt, max_new_tokens=10, seed=0))


def test_stopping_criteria_finish_their_rows_with_one_more_pass():
    model, prompt, seen = small_interpolating(), prompts(2, 4), []

    def second_row(ids, scores):
        seen.append(ids)
        return torch.tensor([False, True])

    options = {"max_new_tokens": 10, "max_denoising_steps": 50, "seed": 0, "return_dict_in_generate": True}
    free = model.generate(prompt, **options)
    for use_cache in (True, False):
        seen.clear()
        out = model.generate(prompt, stopping_criteria=[second_row], use_cache=use_cache, **options)
        assert out.num_forward.tolist() == [int(free.num_forward[0]), 2]
        assert torch.equal(out.sequences[0], free.sequences[0]) and out.sequences.max() < MASK
        assert (seen[0] == MASK).any() and (seen[1][1] < MASK).all()
    out = model.generate(prompt, stopping_criteria=[MaxTimeCriteria(0.0)], **options)
    assert out.num_forward.tolist() == [2, 2]


def test_a_streamer_gets_prompt_drafts_and_result():
    calls = []

    class Recorder:
        def put(self, value):
            calls.append(("put", value))

        def put_draft(self, value):
            calls.append(("draft", value))

        def end(self):
            calls.append(("end", None))

    model, prompt = small_interpolating(), prompts(1, 4)
    out = model.generate(
        prompt, suffix_ids=prompts(1, 2), max_new_tokens=8, seed=0, streamer=Recorder(), return_dict_in_generate=True
    )
    assert [kind for kind, _ in calls] == ["put", *["draft"] * int(out.num_forward), "put", "end"]
    assert torch.equal(calls[0][1], prompt) and torch.equal(calls[-2][1], out.sequences[:, 4:])
    for _, draft in calls[1:-2]:
        assert ((draft == MASK) | (draft == out.sequences[:, 4:])).all()
    with pytest.raises(ValueError, match="a streamer takes one sequence, but the batch has 2"):
        model.generate(prompts(2, 4), streamer=Recorder())
    recorder = Recorder()
    recorder._takes_logits = True
    with pytest.raises(ValueError, match="this streamer wants the logits of drafts"):
        model.generate(prompt, streamer=recorder)


# The deterministic decode


def nearest_known(ids: list[int]) -> list[int]:
    """What logits processors see: a hidden token copies the nearest known one to its left, else to its right."""
    known = [i for i, each in enumerate(ids) if each != MASK]
    return [ids[max((k for k in known if k <= i), default=known[0])] for i in range(len(ids))]


@torch.no_grad()
def naive_decode(model, ids: list[int], processor=None) -> list[int]:
    """Left to right, the most probable id of each mask, given the other tokens left to right and then the new ones."""
    known, ids = [(i, each) for i, each in enumerate(ids) if each != MASK], list(ids)
    for place in [i for i, each in enumerate(ids) if each == MASK]:
        scores = query_log_probabilities(model, known, place)
        if processor is not None:
            scores = processor(torch.tensor([nearest_known(ids)]), scores[None])[0]
        ids[place] = int(scores.argmax())
        known.append((place, ids[place]))
    return ids


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_the_deterministic_decode_is_left_to_right_whatever_alpha_0_and_steps_are(alpha_0):
    model = small_interpolating(seed=5, alpha_0=alpha_0)
    rows = [[3, MASK, 4, MASK], [1, 2, 3, 4], [MASK, MASK, 5, 9]]
    expected = [naive_decode(model, [*row, *[MASK] * 5, 8]) for row in rows]
    options = {"suffix_ids": torch.full((3, 1), 8), "max_new_tokens": 5, "return_dict_in_generate": True}
    state = torch.get_rng_state()
    for steps in (1, 300):
        for use_cache in (True, False):
            out = model.generate(
                torch.tensor(rows), max_denoising_steps=steps, do_sample=False, use_cache=use_cache, **options
            )
            assert out.sequences.tolist() == expected
            assert out.num_forward.tolist() == [7, 5, 7]
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_tokens_fall_to_the_lowest_id():
    model = small_interpolating()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert model.generate(torch.tensor([[5, MASK, 6]]), max_length=3, do_sample=False).tolist() == [[5, 0, 6]]


def test_a_processor_takes_part_in_the_decode():
    model, processor = small_interpolating(seed=5), NoRepeatNGramLogitsProcessor(1)
    row = [3, MASK, 4, *[MASK] * 4]
    out = model.generate(torch.tensor([row]), max_length=7, do_sample=False, logits_processor=[processor])
    assert out[0].tolist() == naive_decode(model, row, processor)


def texts(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[bool]]:
    """Texts with targets in different places, padded: what the decode gives, and the same with one target changed."""
    rows, targets, expected = [], [], []
    generator = torch.Generator().manual_seed(0)
    for length, places in ((3, [2]), (8, [1, 3, 4]), (8, [3, 4, 5, 6, 7]), (5, [0, 1, 2, 3, 4]), (6, [])):
        given = torch.randint(11, (length,), generator=generator).tolist()
        decoded = naive_decode(model, [MASK if i in places else each for i, each in enumerate(given)])
        for changed in (None, *places):
            rows.append([(each + 1) % 11 if i == changed else each for i, each in enumerate(decoded)])
            targets.append([i in places for i in range(length)])
            expected.append(changed is None)
    ids, mask = torch.full((len(rows), 10), 99), torch.zeros(len(rows), 10, dtype=torch.long)
    target = torch.ones(len(rows), 10, dtype=torch.bool)  # padding is no target, whatever the mask says
    for i, row in enumerate(rows):
        part = slice(i % 3, i % 3 + len(row)) if len(row) <= 7 else slice(1, 1 + len(row))
        ids[i, part], mask[i, part], target[i, part] = torch.tensor(row), 1, torch.tensor(targets[i])
    return ids, mask, target, expected


def test_greedy_matches_says_what_the_decode_gives_in_one_row_a_text(monkeypatch):
    model, sizes = small_interpolating(seed=5), []
    ids, mask, target, expected = texts(model)
    generated = []
    for row in range(len(ids)):
        text, hidden = ids[row][mask[row] == 1], target[row][mask[row] == 1]
        if hidden.any():
            out = model.generate(text.masked_fill(hidden, MASK)[None], max_length=len(text), do_sample=False)
            generated.append(torch.equal(out[0], text))
        else:
            generated.append(True)
    assert generated == expected
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids, **rest: sizes.append(len(ids)) or forward(ids, **rest))
    for tokens_per_pass in (1, 20, 8192):
        found = model.train().greedy_matches(ids, mask, target, tokens_per_pass=tokens_per_pass)
        assert found.matches.tolist() == expected and model.training
        assert torch.equal(found.num_forward, (target & mask.bool()).any(1).long())
        assert sum(sizes) == found.num_forward.sum()
        sizes.clear()


# Options and bad input


IDS = torch.tensor([[1, 2, 3]])
BAD_INPUTS = [
    ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\)"),
    ({"input_ids": torch.tensor([[1, 12]])}, r"token ids span \[1, 12\]"),
    ({"input_ids": IDS, "attention_mask": torch.zeros(1, 3)}, "row 0 of attention_mask is padding alone"),
    ({"input_ids": IDS, "max_new_tokens": 40}, "43 tokens, but max_position_embeddings=32; use max_new_tokens=29"),
    ({"input_ids": IDS, "eos_token_id": 11}, r"eos_token_id=11 is no token of this model; use an id in \[0, 10\]"),
    ({"input_ids": IDS, "top_k": 5}, "top_k=5 is not an option of this model's generate"),
    ({"input_ids": IDS, "do_sample": False, "seed": 3}, "do_sample=False, the deterministic decode, has no use for"),
    (
        {"input_ids": IDS, "max_new_tokens": 2, "logits_processor": [lambda ids, scores: scores - torch.inf]},
        "a position has no possible token",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS, ids=[message[:40] for _, message in BAD_INPUTS])
def test_bad_inputs_are_refused_by_name_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_interpolating().generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([1, 2]), None, IDS == 3), r"input_ids has shape \(2,\); give \(B, L\)"),
        ((IDS, None, torch.ones(1, 2, dtype=torch.bool)), r"target_mask has shape \(1, 2\), but input_ids \(1, 3\)"),
        ((torch.tensor([[1, MASK, 3]]), None, IDS == 3), r"span \[1, 11\].*a text to compare with has no mask token"),
        ((torch.zeros(1, 33, dtype=torch.long), None, torch.arange(33)[None] > 2), "33 tokens, but max_position"),
    ],
    ids=lambda each: each[:30] if isinstance(each, str) else "",
)
def test_bad_texts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_interpolating().greedy_matches(*arguments)


def test_a_network_that_is_not_finite_is_reported():
    model = small_interpolating()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the network's logits are not finite"):
        model.generate(IDS, max_new_tokens=2)
    with pytest.raises(ValueError, match="the network's logits are not finite"):
        model.greedy_matches(IDS, None, IDS == 3)


def test_options_are_kept_with_the_model(tmp_path):
    model = small_interpolating()
    model.generation_config = PrimeV2GenerationConfig(max_new_tokens=6, temperature=0.5, seed=3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.temperature == 0.5
    assert torch.equal(loaded.generate(IDS), model.generate(IDS)) and loaded.generate(IDS).shape == (1, 9)
