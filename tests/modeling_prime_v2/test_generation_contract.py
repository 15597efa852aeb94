"""What `generate` and `greedy_matches` promise whatever the family and the sampler.

A new entry of `FAMILIES`, and a new sampler of a family in `FAMILY_SAMPLERS`, falls under all of it.

The laws of the samples and what a decode chooses are held against enumerated ones in the files of the families.
"""

import sys
from functools import cache
from typing import Any

import pytest
import torch
from networks import KINDS, LIMIT, VOCAB_SIZE, fresh_network, network, padded, some_ids, times_of
from observers import Favour, Recorder
from transformers import AutoModel, GenerationConfig, MaxTimeCriteria, SuppressTokensLogitsProcessor

from prime_v2 import ConfidenceSamplerConfig, ThresholdSamplerConfig
from prime_v2.sampler_families_prime_v2 import FAMILY_SAMPLERS
from prime_v2.samplers_prime_v2 import SAMPLERS

MASK = VOCAB_SIZE
ROWS = [some_ids(1, length, seed=length)[0] for length in (5, 3, 1, 4)]
FIRST = {network(kind).config.model_type: kind for kind in reversed(KINDS)}  # the first kind of each family
# A network of each kind with its default options; one of each family with every sampler; other units, and blocks.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    **{
        f"{kind}, {name}": (kind, {"sampler_config": SAMPLERS[name]()})
        for family, kind in FIRST.items()
        for name in FAMILY_SAMPLERS[family].names
    },
    "digits, margin of digits": ("digits", {"sampler_config": ConfidenceSamplerConfig(score="margin", unit="digit")}),
    "stages, threshold": ("stages", {"sampler_config": ThresholdSamplerConfig(threshold=0.95, unit="stage")}),
    "digits, blocks": ("digits", {"sampler_config": ConfidenceSamplerConfig(), "block_length": 3}),
}
FILL_IN = [pair for pair, (kind, _) in PAIRS.items() if not network(kind).config.causal]


def fresh_pair(pair: str, **changes) -> Any:
    """A new network whose generation config holds the options of the pair."""
    kind, options = PAIRS[pair]
    model = fresh_network(kind, **changes)
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    return model


@cache
def shared(pair: str) -> Any:
    """The network of the pair; nobody changes it."""
    return fresh_pair(pair)


@pytest.fixture(params=list(PAIRS))
def pair(request) -> str:
    return request.param


@pytest.fixture
def model(pair):
    return shared(pair)


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def plain(kind):
    """A network with default options: what does not depend on the sampler."""
    return network(kind)


@pytest.fixture(params=FILL_IN)
def diffusion(request):
    """A network that fills in, and runs its passes itself."""
    return shared(request.param)


def kind_of_sampler(model) -> str:
    return getattr(getattr(model.generation_config, "sampler_config", None), "kind", "")


def greedy(model) -> dict[str, Any]:
    """The deterministic decode; a sampler that acts at random gives way to it."""
    return {"do_sample": False} | ({"sampler_config": None} if kind_of_sampler(model) not in ("", "rule") else {})


def few_steps(model) -> dict[str, int]:
    """Several tokens a pass, where the family has steps."""
    return {} if model.config.causal else {"max_denoising_steps": 4}


# Seeds, batches, padding


def test_a_seed_gives_its_tokens_and_another_others_and_torchs_generator_is_left_alone(model):
    prompt, state = some_ids(3, 4), torch.get_rng_state()
    first, again, other = (model.generate(prompt, max_new_tokens=8, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_a_seed_torchs_generator_decides(model):
    prompt, drawn = some_ids(3, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, max_new_tokens=8))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[2], model.generate(prompt, max_new_tokens=8))


def test_equal_rows_of_a_batch_differ_and_their_first_is_what_it_is_alone(model):
    options = {"max_new_tokens": 8, "seed": 7, **few_steps(model)}
    rows = model.generate(some_ids(1, 4).repeat(3, 1), **options)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    if not model.config.causal:  # there one generator draws for all rows, as in Transformers
        assert torch.equal(rows[:1], model.generate(some_ids(1, 4), **options))


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampled", "greedy"])
def test_other_rows_their_order_and_padding_on_any_side_change_nothing(model, do_sample):
    if model.config.causal and do_sample:
        return  # one generator draws for all rows
    options = {"max_new_tokens": 5, **({"seed": 7} if do_sample else greedy(model)), **few_steps(model)}
    alone = [model.generate(row[None], **options)[0, len(row) :] for row in ROWS]
    for side in ("left", "right", "both", "inside"):
        ids, mask = padded(ROWS, side, 7, fill=99)
        for turn in ([0, 1, 2, 3], [3, 1, 0, 2]):
            out = model.generate(ids[turn], mask[turn], **options)
            assert torch.equal(out[:, :7], ids[turn]), "the padded prompt comes back as it was"
            for row, each in zip(turn, out, strict=True):
                assert torch.equal(each[7:], alone[row])


def test_chunks_of_draws_change_nothing(model, monkeypatch):
    prompt, target = some_ids(3, 4), torch.arange(12).expand(3, -1) >= 4
    calls = [{"seed": 7, **few_steps(model)}, greedy(model)]

    def found():
        made = [model.generate(prompt, max_new_tokens=8, **options) for options in calls]
        return [*made, model.greedy_matches(made[1], None, target).matches]

    whole = found()
    for module in [each for name, each in sys.modules.items() if name.startswith("prime_v2.")]:
        if hasattr(module, "DRAW_ELEMENTS"):
            monkeypatch.setattr(module, "DRAW_ELEMENTS", 25)
    for first, second in zip(whole, found(), strict=True):
        assert torch.equal(first, second)


def test_the_mode_the_input_and_the_options_of_the_model_stay_and_dropout_is_off(pair):
    model, prompt = fresh_pair(pair, attention_dropout=0.5).train(), some_ids(2, 4)
    before, options = prompt.clone(), model.generation_config.to_dict()
    first = model.generate(prompt, max_new_tokens=6, seed=0)
    assert model.training and torch.equal(prompt, before) and model.generation_config.to_dict() == options
    assert torch.equal(first, model.eval().generate(prompt, max_new_tokens=6, seed=0))


def test_several_samples_of_a_row_follow_one_another(model):
    prompt, options = some_ids(2, 4), {"max_new_tokens": 5, "seed": 7, **few_steps(model)}
    rows = model.generate(prompt, num_return_sequences=3, **options)
    assert rows.shape == (6, 9) and len({tuple(row) for row in rows.tolist()}) > 3
    assert torch.equal(rows, model.generate(prompt.repeat_interleave(3, dim=0), **options))


def test_the_dict_output_has_passes_and_times(model):
    prompt, options = some_ids(3, 4), {"max_new_tokens": 5, "seed": 7, **few_steps(model)}
    out = model.generate(prompt, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, model.generate(prompt, **options))
    assert out.num_forward.shape == (3,) and ((out.num_forward > 0) & (out.num_forward <= 20)).all()
    torch.testing.assert_close(out.tokens_per_forward * out.num_forward, torch.full((3,), 5.0, dtype=torch.double))
    assert out.network_seconds > 0 and out.sampling_seconds > 0


# Layout, lengths, EOS


def test_the_prompt_comes_first_and_new_tokens_are_in_the_vocabulary(model):
    prompt = some_ids(2, 4)
    out = model.generate(prompt, max_new_tokens=6, seed=0)
    assert out.shape == (2, 10) and torch.equal(out[:, :4], prompt)
    assert out.min() >= 0 and out.max() < VOCAB_SIZE
    assert torch.equal(model.generate(prompt, max_length=10, seed=0), out)
    assert model.generate(prompt, seed=0).shape == (2, LIMIT), "by default what the context leaves"


def test_masks_are_filled_in_where_they_stand_between_prompt_and_suffix(diffusion):
    prompt, suffix = torch.tensor([[3, MASK, 7, MASK]]), torch.tensor([[MASK, 9]])
    out = diffusion.generate(prompt, suffix_ids=suffix, max_new_tokens=3, seed=0)
    assert out.shape == (1, 9) and out[0, [0, 2, 8]].tolist() == [3, 7, 9]
    assert out.min() >= 0 and out.max() < VOCAB_SIZE
    assert torch.equal(diffusion.generate(prompt, suffix_ids=suffix, max_length=9, seed=0), out)
    assert diffusion.generate(prompt, max_length=4, seed=0).shape == (1, 4)
    assert diffusion.generate(max_new_tokens=5, seed=0).shape == (1, 5)
    assert diffusion.generate(max_new_tokens=5, seed=0, bos_token_id=4)[0, 0] == 4
    assert diffusion.generate(suffix_ids=some_ids(3, 2), max_new_tokens=5, seed=0).shape == (3, 7)


def test_after_the_first_eos_comes_padding_with_the_same_tokens_before_it(model):
    prompt, favour = some_ids(20, 2), [Favour([7, 8], 1.5)]
    options = {"max_new_tokens": 9, "seed": 0, "logits_processor": favour, **few_steps(model)}
    free = model.generate(prompt, **options)
    stopped = model.generate(prompt, eos_token_id=[7, 8], pad_token_id=3, **options)
    ended = 0
    for row, kept in zip(free[:, 2:].tolist(), stopped[:, 2:].tolist(), strict=True):
        end = next((i for i, each in enumerate(row) if each in (7, 8)), len(row))
        assert kept == (row[: end + 1] + [3] * len(row))[: len(kept)]
        ended += end < len(row) - 1
    assert ended
    assert torch.equal(model.generate(prompt, eos_token_id=[], **options), free)


def test_eos_comes_from_the_configuration_pads_by_itself_and_none_turns_it_off(pair):
    model = fresh_pair(pair, eos_token_id=7)
    options = {"max_new_tokens": 5, "seed": 0, "logits_processor": [Favour([7], 40.0)]}
    for more, padding in (({}, 7), ({"pad_token_id": 1}, 1)):
        new = model.generate(some_ids(1, 2), **options, **more)[0, 2:].tolist()
        assert new == [7, *[padding] * (len(new) - 1)]
    off = model.generate(some_ids(1, 2), eos_token_id=None, pad_token_id=1, **options)
    assert off[0, 2:].tolist() == [7] * 5


def test_eos_ends_a_row_early_where_no_token_before_it_can_still_change(model):
    """Nearly every token is EOS. In the uniform-state family any token can change until the last pass."""
    options = {"max_new_tokens": 9, "seed": 0, "logits_processor": [Favour([7], 3.0)]}
    options |= {"return_dict_in_generate": True, "pad_token_id": 3}
    free, stopped = (model.generate(some_ids(20, 2), eos_token_id=eos, **options) for eos in (None, [7]))
    if times_of(model, 1) or kind_of_sampler(model) == "remasking":
        assert (stopped.num_forward <= free.num_forward).all()
    elif kind_of_sampler(model) != "rule":  # a rule may reveal all of these sure tokens in its first pass
        assert stopped.num_forward.sum() < free.num_forward.sum()


# Processors, criteria, streamers


def test_processors_decide_what_can_be_drawn_and_see_only_tokens_of_the_vocabulary(model):
    seen, banned = Favour([0], 0.0), SuppressTokensLogitsProcessor([1, 2, 5, 6, 7, 8, 9, 10])
    ids, mask = padded([some_ids(1, 4)[0], some_ids(1, 3)[0]], "left", 5, fill=99)
    options = {"max_new_tokens": 6, "logits_processor": [banned, seen], **few_steps(model)}
    for more in ({"seed": 0}, greedy(model)):
        out = model.generate(ids, mask, **options, **more)
        assert set(out[:, 5:].flatten().tolist()) <= {0, 3, 4}
    assert seen.seen
    for given, shape in seen.seen:
        assert shape == (len(given), VOCAB_SIZE)
        assert given.min() >= 0 and given.max() < VOCAB_SIZE


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampled", "greedy"])
def test_stopping_criteria_finish_their_rows_with_one_more_pass(diffusion, do_sample):
    prompt, seen, more = some_ids(2, 4), [], {"seed": 0} if do_sample else greedy(diffusion)

    def second_row(ids, scores):
        seen.append(ids)
        return torch.tensor([False, True])

    options = {"max_new_tokens": 8, "max_denoising_steps": 50, "return_dict_in_generate": True, **more}
    free = diffusion.generate(prompt, **options)
    out = diffusion.generate(prompt, stopping_criteria=[second_row], **options)
    assert out.num_forward.tolist() == [int(free.num_forward[0]), 2] and out.num_forward[0] > 2
    assert torch.equal(out.sequences[0], free.sequences[0]) and out.sequences.max() < VOCAB_SIZE
    assert len(seen) == out.num_forward[0] and seen[0].shape == (2, 12)
    assert torch.equal(seen[1][1], out.sequences[1])
    out = diffusion.generate(prompt, stopping_criteria=[MaxTimeCriteria(0.0)], **options)
    assert out.num_forward.tolist() == [2, 2]


@pytest.mark.parametrize("do_sample", [True, False], ids=["sampled", "greedy"])
def test_a_streamer_gets_the_prompt_a_draft_a_pass_and_the_result(diffusion, do_sample):
    prompt, suffix, recorder = some_ids(1, 4), some_ids(1, 2), Recorder()
    more = {"seed": 0} if do_sample else greedy(diffusion)
    options = {"suffix_ids": suffix, "max_new_tokens": 5, "return_dict_in_generate": True, **more}
    out = diffusion.generate(prompt, streamer=recorder, **options)
    assert [kind for kind, _ in recorder.calls] == ["put", *["draft"] * int(out.num_forward), "put", "end"]
    (_, start), *drafts, (_, result), _ = recorder.calls
    assert torch.equal(start, prompt) and torch.equal(result, out.sequences[:, 4:])
    for _, draft in drafts:
        assert draft.shape == (1, 7)
        # Where tokens stay as they are once they are known.
        if not times_of(diffusion, 1) and not (do_sample and kind_of_sampler(diffusion) == "remasking"):
            assert ((draft == MASK) | (draft == result)).all()
    assert torch.equal(drafts[-1][1], result) and not torch.equal(drafts[0][1], result)
    with pytest.raises(ValueError, match="a streamer takes one sequence, but the batch has 2"):
        diffusion.generate(some_ids(2, 4), streamer=Recorder())
    recorder._takes_logits = True
    with pytest.raises(ValueError, match="this streamer wants the logits of drafts"):
        diffusion.generate(prompt, streamer=recorder)


# Options


@pytest.mark.parametrize("kind", FIRST.values())
@pytest.mark.parametrize("option", ["block_length", "cache"])
def test_a_family_without_blocks_refuses_them_with_the_reason(kind, option):
    model, value = network(kind), {"block_length": 4, "cache": "prefix"}[option]
    has = FAMILY_SAMPLERS[model.config.model_type]
    if has.blocks:
        given = {"block_length": 4, option: value}
        assert model.generate(some_ids(1, 2), max_new_tokens=5, seed=0, **given).shape == (1, 7)
        return
    family = type(model).__name__
    with pytest.raises(ValueError) as found:
        model.generate(some_ids(1, 2), max_new_tokens=5, seed=0, **{option: value})
    assert str(found.value) == f"{option}={value!r} is not for {family}: {has.reason}; leave {option} out"
    config = GenerationConfig() if model.config.causal else type(model.generation_config)()
    setattr(config, option, value)
    with pytest.raises(ValueError, match=f"is not for {family}"):
        model.generate(some_ids(1, 2), max_new_tokens=5, generation_config=config)


@pytest.mark.parametrize("kind", FIRST.values())
def test_a_sampler_that_the_family_has_not_is_refused_with_the_reason_and_those_that_it_has(kind):
    model, refused = network(kind), 0
    has = FAMILY_SAMPLERS[model.config.model_type]
    for name in set(SAMPLERS) - set(has.names):
        with pytest.raises(ValueError) as found:
            model.generate(some_ids(1, 2), max_new_tokens=5, sampler_config=SAMPLERS[name]())
        sentence = str(found.value)
        assert sentence.startswith(f"{type(model).__name__} has no {SAMPLERS[name].__name__}: {has.reason}; ")
        assert all(f"({each})" in sentence for each in has.names)
        refused += 1
    assert refused


def test_the_call_wins_over_its_config_over_the_model_s_and_all_are_saved(kind, tmp_path):
    model, prompt = fresh_network(kind), some_ids(1, 4)
    model.generation_config.max_new_tokens, model.generation_config.do_sample = 3, False
    expected = model.generate(prompt)
    assert expected.shape == (1, 7)
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    assert model.generate(prompt, generation_config=config).shape == (1, 9)
    assert model.generate(prompt, generation_config=config, max_new_tokens=2).shape == (1, 6)
    model.save_pretrained(tmp_path)
    remote = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    for loaded in (type(model).from_pretrained(tmp_path), remote):
        assert loaded.generation_config.do_sample is False
        assert torch.equal(loaded.generate(prompt), expected)


def test_the_deterministic_decode_draws_nothing(plain):
    prompt, state = some_ids(1, 4).repeat(2, 1), torch.get_rng_state()
    first, again = (plain.generate(prompt, max_new_tokens=8, do_sample=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and torch.equal(first[0], first[1])
    with pytest.raises(ValueError, match="do_sample=False, the deterministic decode, has no use for seed=3"):
        plain.generate(prompt, do_sample=False, seed=3)


IDS = torch.tensor([[1, 2, 3]])
BAD_INPUT = {
    "one axis": ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\)"),
    "no row": ({"input_ids": torch.empty(0, 3, dtype=torch.long)}, r"input_ids has shape \(0, 3\)"),
    "large id": ({"input_ids": torch.tensor([[1, VOCAB_SIZE + 1]])}, r"ids span \[1, 12\]"),
    "negative id": ({"input_ids": torch.tensor([[-1, 3]])}, r"ids span \[-1, 3\]"),
    "floats": ({"input_ids": torch.tensor([[0.5]])}, "token ids must be integers"),
    "padding": ({"attention_mask": torch.zeros(1, 3)}, "row 0 of attention_mask has only padding"),
    "mask": ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\)"),
    "mask without ids": ({"input_ids": None, "attention_mask": torch.ones(1, 4)}, "attention_mask was given without"),
    "too many": ({"max_new_tokens": 40}, "43 tokens, but max_position_embeddings=12; use max_new_tokens=9"),
    "none": ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
    "no room": ({"max_length": 3}, "max_length=3 leaves no room"),
    "eos": ({"eos_token_id": 50}, r"eos_token_id=50 is no token of this model; use an id in \[0, 10\]"),
    "pad": ({"pad_token_id": 77}, "pad_token_id=77 is no token of this model"),
    "seed": ({"seed": 1.5}, "seed=1.5 must be an integer"),
}
BAD_INPUT_OF_DIFFUSION = {
    "suffix": ({"suffix_ids": torch.tensor([[1], [2]])}, r"suffix_ids has shape \(2, 1\)"),
    "room beside the suffix": ({"suffix_ids": IDS, "max_new_tokens": 40}, "use max_new_tokens=6"),
    "no room beside the suffix": ({"suffix_ids": IDS.repeat(1, 3)}, "cut the prompt or the suffix to 11 tokens"),
    "too long": ({"max_length": 40}, "use max_length=12"),
    "bos": ({"input_ids": None, "bos_token_id": 77}, "bos_token_id=77 is no token of this model"),
    "top_k": ({"top_k": 5}, "top_k=5 is not an option of this model's generate.*; leave it out"),
    "temperature": ({"temperature": 0}, r"temperature=0 must be positive and finite; use 1\.0"),
    "steps": ({"max_denoising_steps": 0}, "max_denoising_steps=0 must be an integer of at least 1; use 256"),
    "nothing possible": (
        {"max_new_tokens": 2, "logits_processor": [lambda ids, scores: scores - torch.inf]},
        "a position has no possible token",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(plain, case):
    arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        plain.generate(**{"input_ids": IDS, **arguments})


@pytest.mark.parametrize("case", BAD_INPUT_OF_DIFFUSION)
def test_bad_input_of_a_diffusion_model_is_refused(diffusion, case):
    arguments, message = BAD_INPUT_OF_DIFFUSION[case]
    with pytest.raises(ValueError, match=message):
        diffusion.generate(**{"input_ids": IDS, **arguments})


def test_a_network_that_is_not_finite_is_reported(kind):
    model = fresh_network(kind)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    if not model.config.causal:
        with pytest.raises(ValueError, match="the network's logits are not finite"):
            model.generate(IDS, max_new_tokens=2)
    with pytest.raises(ValueError, match="the network's logits are not finite"):
        model.greedy_matches(IDS, None, IDS == 3)
