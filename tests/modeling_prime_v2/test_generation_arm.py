"""`generate` of autoregressive models: its law, seeds, start token, lengths, and what Transformers calls back."""

import pytest
import torch
from chi_square import ROWS, assert_follows
from enumeration import causal_law
from networks import START, SUBTOKENS, after_start, padded, peer_of, small_arm, some_ids
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def model():
    return small_arm()


def greedy_by_hand(model, prompt: list[int], count: int) -> list[int]:
    """The most probable token after another, each from a pass over the whole text after the start token."""
    text = prompt if prompt[:1] == [START] else [START, *prompt]
    for _ in range(count):
        text = [*text, int(model(torch.tensor([text])).logits[0, -1].argmax())]
    return text[len(text) - count :]


# What is drawn


@pytest.mark.parametrize(
    ("fields", "length", "prompt"),
    [
        ({"vocab_size": 4}, 3, ()),
        ({"vocab_size": 5, "num_subtokens": 3, "base": 2}, 3, ()),
        ({"vocab_size": 5}, 2, (1, 4)),
        ({"vocab_size": 5}, 2, (START, 2)),
    ],
    ids=str,
)
def test_samples_follow_the_enumerated_law(fields, length, prompt):
    """That law is `log_likelihood`'s: of all texts, or of what follows the prompt."""
    model = small_arm(**fields)
    exact = causal_law(model, length, prompt[1:] if prompt[:1] == (START,) else prompt)
    exact = {(*prompt, *each[len(each) - length :]): p for each, p in exact.items()}
    every = torch.tensor(list(exact))
    given = (torch.arange(every.shape[1]) < len(prompt)).expand(len(every), -1)
    likelihood = model.log_likelihood(every, prompt_mask=given).value.exp()
    torch.testing.assert_close(likelihood, torch.tensor(list(exact.values())).double(), rtol=1e-4, atol=1e-7)
    rows = torch.tensor([prompt], dtype=torch.long).expand(ROWS, -1)
    assert_follows(model.generate(rows, max_new_tokens=length, seed=1), exact)


def test_another_start_would_be_another_law():
    """A distance of 0.02 adds at least 4 * ROWS * 0.02**2 = 32 to the chi-square statistic."""
    model = small_arm(vocab_size=5)
    with torch.no_grad():
        once, never, twice = (
            model(torch.tensor([[*[START] * number, 1, 4]])).logits[0, -1].softmax(-1) for number in (1, 0, 2)
        )
    assert (once - never).abs().sum() / 2 > 0.02
    assert (once - twice).abs().sum() / 2 > 0.02


def test_draws_are_cut_by_nothing_unless_asked():
    """Transformers' own default keeps the 50 most probable tokens. 20,000 draws of 100 nearly equal tokens."""
    model = small_arm(vocab_size=100, scale=0.01)
    empty = torch.empty(ROWS, 0, dtype=torch.long)
    assert len(model.generate(empty, max_new_tokens=1, seed=0).unique()) == 100
    assert len(model.generate(empty, max_new_tokens=1, seed=0, top_k=7).unique()) == 7
    nucleus = model.generate(empty, max_new_tokens=1, seed=0, top_p=0.5).unique()
    assert 40 < len(nucleus) <= 52, "half of the mass of nearly equal tokens"
    config = GenerationConfig(max_new_tokens=1, repetition_penalty=1.1)
    assert len(model.generate(empty, generation_config=config, seed=0).unique()) == 100
    config.update(do_sample=True, top_k=7)
    assert len(model.generate(empty, generation_config=config, seed=0).unique()) == 7
    model.generation_config.top_k = 9
    assert len(model.generate(empty, max_new_tokens=1, seed=0).unique()) == 9


# The deterministic decode, and Transformers' own


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, **SUBTOKENS}], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_the_most_probable_tokens_whatever_the_padding_and_the_other_rows(fields, side):
    model, rows = small_arm(**fields), [some_ids(1, length, seed=length)[0] for length in (2, 6, 4)]
    rows.append(torch.tensor([START, 7]))
    ids, mask = padded(rows, side, 8, fill=99)
    out = model.generate(ids, mask, max_new_tokens=5, **GREEDY)
    assert torch.equal(out[:, :8], ids), "padding is returned as it came"
    expected = [greedy_by_hand(model, row.tolist(), 5) for row in rows]
    assert out[:, 8:].tolist() == expected
    assert torch.equal(model.generate(ids, mask, max_new_tokens=5, use_cache=False, **GREEDY), out)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "num_key_value_heads": 1}], ids=str)
def test_llama_generates_the_same_after_the_start_token(fields):
    model, ids = small_arm(**fields), some_ids(3)
    peer = peer_of(model)
    for options in (GREEDY, {"num_beams": 3, **GREEDY}, {"do_sample": True, "top_k": 0}):
        torch.manual_seed(3)
        expected = peer.generate(after_start(ids), max_new_tokens=9, **options)[:, 1:]
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, max_new_tokens=9, **options), expected)


# Prompts and lengths


def test_without_ids_the_start_token_is_the_prompt(model):
    out = model.generate(max_new_tokens=4, **GREEDY)
    assert out.tolist() == [[START, *greedy_by_hand(model, [], 4)]]
    assert (
        model.generate(torch.empty(2, 0, dtype=torch.long), max_new_tokens=4, **GREEDY).tolist()
        == [greedy_by_hand(model, [], 4)] * 2
    )
    assert torch.equal(model.generate(inputs=some_ids(), max_new_tokens=4, **GREEDY)[:, :7], some_ids())


@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({"max_new_tokens": 5}, 5),
        ({"max_length": 10}, 3),
        ({}, 25),
        ({"generation_config": GenerationConfig(max_new_tokens=6)}, 6),
        ({"generation_config": GenerationConfig(max_length=11)}, 4),
        ({"generation_config": GenerationConfig(max_new_tokens=6), "max_length": 10}, 3),
        ({"generation_config": GenerationConfig(max_length=10), "max_new_tokens": 2}, 2),
    ],
    ids=str,
)
def test_lengths_count_the_prompt_as_it_was_given(model, options, new):
    """By default as many tokens as max_position_embeddings = 32 leaves room for, 256 at most."""
    assert model.generate(some_ids(), seed=0, **options).shape == (3, 7 + new)


def test_eos_ends_a_row_and_padding_follows():
    model = small_arm(eos_token_id=5, pad_token_id=9)
    out = model.generate(torch.empty(50, 0, dtype=torch.long), seed=0, max_new_tokens=20)
    ended = 0
    for row in out.tolist():
        if 5 in row:
            ended += 1
            assert set(row[row.index(5) + 1 :]) <= {9}
    assert 10 < ended < 50
    free = model.generate(torch.empty(50, 0, dtype=torch.long), seed=0, max_new_tokens=20, eos_token_id=None)
    assert any(set(row[row.index(5) + 1 :]) > {9} for row in free.tolist() if 5 in row)
    late = model.generate(some_ids(50, 3), seed=0, max_new_tokens=20, min_length=10)
    assert all(5 not in row[3:10] for row in late.tolist())
    assert any(row[10] == 5 for row in late.tolist()), "the first place where it is allowed"


def test_several_sequences_a_prompt_and_transformers_own_output(model):
    ids = some_ids(2)
    out = model.generate(
        ids, seed=0, max_new_tokens=4, num_return_sequences=3, return_dict_in_generate=True, output_logits=True
    )
    assert out.sequences.shape == (6, 11)
    assert torch.equal(out.sequences[:, :7], ids.repeat_interleave(3, dim=0))
    assert out.past_key_values.get_seq_length() == 1 + 7 + 4 - 1, "the start token's keys included"
    fed = after_start(out.sequences)
    torch.testing.assert_close(
        torch.stack(out.logits, dim=1), model(fed).logits[:, 7:-1], rtol=1e-5, atol=1e-5
    )  # float32, in other orders
    plain = model.generate(ids, seed=0, max_new_tokens=4, num_return_sequences=3)
    assert torch.equal(plain, out.sequences)


def test_the_dict_output_counts_the_passes_until_eos_and_their_time(model, monkeypatch):
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    options = {"seed": 0, "max_new_tokens": 9, "eos_token_id": [5, 6], "return_dict_in_generate": True}
    out = model.generate(some_ids(20, 3), **options)
    ends = [next((i + 1 for i, each in enumerate(row) if each in (5, 6)), 9) for row in out.sequences[:, 3:].tolist()]
    assert min(ends) < 9 and out.num_forward.tolist() == ends and len(calls) == max(ends)
    assert out.tokens_per_forward.tolist() == [1.0] * 20
    assert out.network_seconds > 0 and out.sampling_seconds > 0
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_given_cache_or_vectors_are_passed_on_as_they_are(model):
    ids, cache = some_ids(2), DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    expected = peer_of(model).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4, **GREEDY), expected)
    vectors = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=vectors, max_new_tokens=4, **GREEDY), expected[:, 7:])


# What is called back


class Watch(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Records the ids that it is given."""

    def __init__(self, answer):
        self.answer, self.seen, self.ended = answer, [], False

    def __call__(self, ids, scores):
        self.seen.append(ids.clone())
        return self.answer(ids, scores)

    def put(self, ids):
        self.seen.append(ids)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("prompt", [[1, 2], [START, 2]])
def test_processors_criteria_and_streamers_see_no_token_that_was_not_given(model, prompt):
    ids = torch.tensor([prompt])
    processor = Watch(lambda ids, scores: scores.index_fill(1, ids[0, -1:], 1e9))  # the last token again
    criterion = Watch(lambda ids, scores: torch.tensor([ids.shape[1] >= 5]))
    streamer = Watch(None)
    calls = {"logits_processor": [processor], "stopping_criteria": criterion, "streamer": streamer}
    out = model.generate(ids, max_new_tokens=9, seed=0, **calls)
    assert out.tolist() == [[*prompt, 2, 2, 2]]
    assert [each.tolist() for each in processor.seen] == [[[*prompt, *[2] * n]] for n in range(3)]
    assert [each.tolist() for each in criterion.seen] == [[[*prompt, *[2] * n]] for n in range(1, 4)]
    assert [each.flatten().tolist() for each in streamer.seen] == [prompt, [2], [2], [2]]
    assert streamer.ended


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suffix_ids": torch.tensor([[1]])}, "cannot fill in, so it has no use for suffix_ids; leave suffix_ids out"),
        ({"max_denoising_steps": 4}, "max_denoising_steps=4 is for diffusion models; .* leave it out"),
        ({"input_ids": torch.tensor([[1, 11]])}, r"ids span \[1, 11\], .* an autoregressive model fills in no mask"),
    ],
    ids=str,
)
def test_bad_options_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.tensor([[1, 2]]), **arguments})


def test_a_start_token_is_needed():
    with pytest.raises(ValueError, match="bos_token_id=None and eos_token_id=None: neither"):
        small_arm(bos_token_id=None).generate(some_ids())


@pytest.mark.parametrize("rows", [1, 2])
def test_no_token_ends_a_row_where_the_list_of_them_is_empty(model, rows):
    """Each token is EOS some time; with [] as with a token that is never drawn, rows go on."""
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    assert model.generate(prompt, max_new_tokens=5, seed=0).shape == (rows, 2)
    assert model.generate(prompt, max_new_tokens=5, seed=0, eos_token_id=[]).shape == (rows, 6)
    model.generation_config.eos_token_id = None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"eos_token_id": "2"}, "eos_token_id='2' must be a token id, an integer of at least 0, or None"),
        ({"eos_token_id": [-1]}, r"eos_token_id=\[-1\] must be a token id"),
        ({"pad_token_id": "0"}, "pad_token_id='0' must be a token id"),
        ({"pad_token_id": 10**9}, r"pad_token_id=1000000000 is no token of this model; use an id in \[0, "),
    ],
)
def test_special_tokens_that_are_none_are_refused(model, option, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=2, **option)
