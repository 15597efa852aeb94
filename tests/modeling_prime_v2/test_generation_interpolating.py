"""`generate` of interpolating diffusion: its cache, temperature, the deterministic decode."""

import pytest
import torch
from enumeration import query_log_probabilities
from networks import small_interpolating, some_ids
from transformers import NoRepeatNGramLogitsProcessor

from prime_v2.generation_config_prime_v2 import merge_options
from prime_v2.generation_interpolating_prime_v2 import InterpolatingProcess
from prime_v2.generation_process_prime_v2 import DraftStream, make_canvas

MASK = 11  # of the networks here that do not say otherwise


# The cache


class _Recorded(InterpolatingProcess):
    """Keeps the hidden states of every pass, and (what its cache held before, what the rows knew, of each layer)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.stored = [], []
        if self.cache is not None:
            self.extend, self.cache.extend = self.cache.extend, self.watched_extend

    def hidden_states(self, picked, target_mask):
        self.seen.append(super().hidden_states(picked, target_mask))
        return self.seen[-1]

    def watched_extend(self, rows, new_positions):
        known = self.canvas.real[rows] & (self.passes[rows] < self.num_forward[int(rows[0])] - 1)
        order_ids, layers = self.extend(rows, new_positions)
        sizes = {layer.keys.shape[2] for layer in layers.layers}
        self.stored.append((order_ids.shape[1] - new_positions.shape[1], int(known.sum(1).max()), sizes))
        return order_ids, layers


@pytest.mark.parametrize("fields", [{}, {"alpha_0": 1.0}, {"num_key_value_heads": 1, "qk_norm": True}], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_cache_changes_no_logit_and_no_sample(fields, implementation):
    """Rows of different lengths, padding, masks inside prompts, a suffix, rows that end early by EOS."""
    model = small_interpolating(seed=3, **fields)
    model.set_attn_implementation(implementation)
    ids, mask = some_ids(5, 6, seed=1), torch.ones(5, 6, dtype=torch.long)
    ids[1, 2], ids[2, 5], mask[3, :4], mask[4, 3:] = MASK, MASK, 0, 0
    found = []
    for use_cache in (True, False):
        given = {"max_new_tokens": 12, "max_denoising_steps": 5, "seed": 4, "eos_token_id": 7, "pad_token_id": 0}
        given["use_cache"] = use_cache
        options = merge_options(model, None, given)
        canvas = make_canvas(model, ids, mask, some_ids(5, 2, seed=2), options)
        process = _Recorded(model, options, canvas, [])
        with torch.no_grad():
            process.run([], DraftStream(None, process.canvas))
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
    out = model.generate(some_ids(1, 4), suffix_ids=some_ids(1, 2), max_new_tokens=6, seed=0)
    assert widths == [7] + [2] * 5
    widths.clear()
    again = model.generate(some_ids(1, 4), suffix_ids=some_ids(1, 2), max_new_tokens=6, seed=0, use_cache=False)
    assert widths == [7, 8, 9, 10, 11, 12] and torch.equal(out, again)


# Temperature


def test_low_temperature_and_low_top_p_give_the_likeliest_token():
    model, prompt = small_interpolating(alpha_0=0.0), some_ids(3, 4)
    likeliest = model.generate(prompt, max_new_tokens=5, do_sample=False)
    for seed, narrow in enumerate(({"temperature": 1e-6}, {"top_p": 1e-9})):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, seed=seed, **narrow), likeliest)
    assert not torch.equal(model.generate(prompt, max_new_tokens=5, seed=0), likeliest)


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
