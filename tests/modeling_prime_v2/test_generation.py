"""`generate` of masked diffusion: its draws, EOS, temperature, processors, streamers and options."""

import json
import math

import pytest
import torch
from networks import one_layer, prompts
from observers import Favour, Recorder
from transformers import (
    AutoModel,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TextDiffusionStreamer,
)

from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.generation_draws_prime_v2 import draw_by_inverse_cdf, to_probabilities
from prime_v2.generation_process_prime_v2 import PrimeV2GenerationOutput
from prime_v2.modeling_prime_v2 import PrimeV2ForMaskedDiffusion

# Draws


def test_drawing_resolves_probabilities_that_float32_cannot():
    """p = (1 - 1e-12, 1e-12): float32 rounds a draw of 1 - 5e-13 to 1 and the first probability as well."""
    probabilities = to_probabilities(torch.tensor([[0.0, math.log(1e-12)]] * 2, dtype=torch.double))
    assert probabilities.dtype == torch.double
    draws = torch.tensor([1 - 2e-12, 1 - 5e-13], dtype=torch.double)
    assert draw_by_inverse_cdf(probabilities, draws).tolist() == [0, 1]


def test_a_draw_never_takes_a_token_of_probability_zero():
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.double)
    for draw in (5e-324, 0.3, 1 - 2**-53, 1.0):
        ids = draw_by_inverse_cdf(probabilities, torch.tensor([draw], dtype=torch.double))
        assert probabilities[0, ids] > 0


# Suffix, EOS


def test_a_suffix_may_be_padded():
    model, prompt, suffix = one_layer(), prompts(1, 4), prompts(1, 2, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    padded = model.generate(prompt, mask, torch.cat([suffix, torch.tensor([[49]])], 1), max_new_tokens=8, seed=0)
    assert torch.equal(padded[:, :-1], model.generate(prompt, suffix_ids=suffix, max_new_tokens=8, seed=0))


@pytest.mark.parametrize("order", ["digit", "token"])
def test_after_the_first_eos_comes_padding_and_the_row_stops_early_with_the_same_tokens(order):
    model, prompt = one_layer(reveal_order=order), prompts(40, 2)
    options = {"max_new_tokens": 12, "seed": 0, "max_denoising_steps": 64, "return_dict_in_generate": True}
    favour = LogitsProcessorList([Favour([7, 8], 4.0)])
    free = model.generate(prompt, logits_processor=favour, **options)
    stopped = model.generate(prompt, logits_processor=favour, eos_token_id=[7, 8], pad_token_id=3, **options)
    for row, kept in zip(free.sequences[:, 2:].tolist(), stopped.sequences[:, 2:].tolist(), strict=True):
        eos = min((row + [7]).index(7), (row + [8]).index(8))
        assert kept == row[: eos + 1] + [3] * (11 - eos)
    assert (stopped.num_forward <= free.num_forward).all()
    assert stopped.num_forward.sum() < free.num_forward.sum()
    assert (stopped.tokens_per_forward < 12).all()


# Temperature, top-p, processors, criteria, streamer


def test_low_temperature_and_low_top_p_give_the_likeliest_token():
    model, prompt = one_layer(reveal_order="token"), prompts(3, 4)
    masked = torch.cat([prompt, torch.full((3, 5), 50)], 1)
    likeliest = model(masked).logits[:, 4:].argmax(-1)
    options = {"max_new_tokens": 5, "max_denoising_steps": 1}
    for seed, narrow in enumerate(({"temperature": 1e-6}, {"temperature": 1e-300}, {"top_p": 1e-9})):
        assert torch.equal(model.generate(prompt, seed=seed, **options, **narrow)[:, 4:], likeliest)
    assert not torch.equal(model.generate(prompt, seed=0, **options)[:, 4:], likeliest)


def test_temperature_and_top_p_match_a_naive_computation():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -torch.inf
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.8), (2.0, 0.35)):
        got = to_probabilities(logits, temperature, top_p)
        for row, probabilities in zip(logits.tolist(), got.tolist(), strict=True):
            weights = [math.exp(each / temperature) for each in row]
            expected = [each / sum(weights) for each in weights]
            kept, mass = set(), 0.0
            for v in sorted(range(9), key=lambda v: -expected[v]):
                if mass < top_p:
                    kept.add(v)
                mass += expected[v]
            for v in range(9):
                assert math.isclose(probabilities[v], expected[v] if v in kept else 0.0, rel_tol=1e-12)


def test_logits_processors_decide_what_can_be_drawn_and_see_only_tokens_of_the_vocabulary():
    model, prompt = one_layer(), prompts(3, 4)
    favour = Favour([0], 0.0)
    banned = SuppressTokensLogitsProcessor(list(range(25, 50)))
    ids = torch.cat([torch.full((3, 1), 49), prompt], 1)
    mask = (torch.arange(5) > 0).long().repeat(3, 1)
    out = model.generate(ids, mask, max_new_tokens=10, seed=0, logits_processor=[banned, favour])
    assert out[:, 5:].max() < 25
    for seen, shape in favour.seen:
        assert seen.shape[1] == 15 and shape == (len(seen), 50)
        assert seen.min() >= 0 and seen.max() < 50
        assert {tuple(row) for row in seen[:, 1:5].tolist()} <= {tuple(row) for row in prompt.tolist()}
        assert torch.equal(seen[:, 0], seen[:, 1]), "padding copies its neighbour"


@pytest.mark.parametrize(
    "processor", [RepetitionPenaltyLogitsProcessor(2.0), NoRepeatNGramLogitsProcessor(1), Favour([0], 1e9)]
)
def test_a_token_partly_revealed_survives_processors_that_change_their_mind(processor):
    """`NoRepeatNGram(1)` bans every token seen so far, and may ban all that a partly visible token can become."""
    model = one_layer(12)
    out = model.generate(prompts(4, 2, 12), max_new_tokens=8, seed=0, logits_processor=[processor])
    assert out.min() >= 0 and out.max() < 12


def test_a_streamer_that_asks_for_states_gets_the_digits_before_the_first_pass_and_after_each():
    class States(Recorder):
        def put_states(self, ids, digits):
            self.calls.append(("states", (ids, digits)))

    model, prompt, recorder = one_layer(), prompts(1, 4), States()
    options = {"max_new_tokens": 8, "seed": 0, "return_dict_in_generate": True}
    padded = torch.cat([torch.zeros_like(prompt[:, :2]), prompt], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    out = model.generate(padded, mask, streamer=recorder, **options)
    states = [each for kind, each in recorder.calls if kind == "states"]
    assert len(states) == out.num_forward + 1
    assert torch.equal(states[0][0], torch.cat([prompt, torch.full((1, 8), 50)], dim=1))
    assert torch.equal(states[-1][0], out.sequences[:, 2:])
    base, codes = model.config.base, model.encode(out.sequences[:, 2:])
    for (ids, digits), (_, before) in zip(states[1:], states, strict=False):
        known = digits != base
        assert torch.equal(digits[known], codes[known]) and bool((known | (before == base)).all())
        assert torch.equal(ids == 50, ~known.all(2))


def test_a_streamer_without_padding_or_masks_in_what_is_settled():
    model, recorder = one_layer(), Recorder()
    ids, mask = torch.tensor([[9, 9, 3, 50, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    out = model.generate(ids, mask, max_new_tokens=2, seed=0, streamer=recorder)
    assert recorder.calls[0][1].tolist() == [[3]] and torch.equal(recorder.calls[-2][1], out[:, 3:])


def test_transformers_own_diffusion_streamer_prints_the_result(capsys):
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return "".join(f"<{int(each)}>" for each in ids)

    out = one_layer().generate(prompts(1, 2), max_new_tokens=3, seed=0, streamer=TextDiffusionStreamer(Tokenizer()))
    printed = capsys.readouterr().out
    assert "<50>" in printed and "\033[33m" in printed
    assert printed.rstrip().endswith("".join(f"<{each}>" for each in out[0].tolist()[2:]))


# Options


def test_the_call_wins_over_its_config_over_the_model_s_over_the_default():
    model = one_layer()
    model.generation_config = PrimeV2GenerationConfig(max_new_tokens=3, seed=5, return_dict_in_generate=True)
    assert model.generate().sequences.shape == (1, 3)
    assert torch.equal(model.generate().sequences, model.generate().sequences), "the model's seed"
    config = PrimeV2GenerationConfig(max_length=6, return_dict_in_generate=False)
    assert model.generate(generation_config=config).shape == (1, 6)
    assert model.generate(generation_config=config, max_new_tokens=2).shape == (1, 2)
    assert model.generate(generation_config=GenerationConfig(max_new_tokens=4)).sequences.shape == (1, 4)
    assert model.generate(max_new_tokens=None).sequences.shape == (1, 32)


def test_the_output_is_a_model_output():
    out = one_layer().generate(max_new_tokens=2, seed=0, return_dict_in_generate=True)
    assert isinstance(out, PrimeV2GenerationOutput)
    assert list(out) == ["sequences", "num_forward", "network_seconds", "sampling_seconds", "tokens_per_forward"]


def test_saving_and_loading_keeps_the_generation_config(tmp_path):
    model = one_layer()
    model.generation_config = PrimeV2GenerationConfig(
        max_new_tokens=6, temperature=0.5, eos_token_id=[7, 8], seed=3, return_dict_in_generate=False
    )
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    del stored["transformers_version"]
    assert stored == {
        "max_new_tokens": 6,
        "temperature": 0.5,
        "eos_token_id": [7, 8],
        "seed": 3,
        "return_dict_in_generate": False,
    }
    loaded = PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path)
    remote = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    for each in (loaded, remote):
        assert each.generation_config.to_dict() == model.generation_config.to_dict() | {
            "transformers_version": each.generation_config.to_dict()["transformers_version"]
        }
        assert torch.equal(each.generate(), model.generate())
    given = PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path, generation_config=PrimeV2GenerationConfig(seed=4))
    assert given.generation_config.seed == 4 and given.generation_config.max_new_tokens is None


def test_a_folder_without_generation_config_loads_and_one_with_a_broken_file_does_not(tmp_path):
    one_layer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path).generate(max_new_tokens=2).shape == (1, 2)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not JSON"):
        PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_k": 5}')
    with pytest.raises(ValueError, match="top_k=5 is not an option"):
        PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path)


BAD_OPTIONS = [
    ({"temperature": 0}, r"temperature=0 must be positive and finite; use 1\.0"),
    ({"temperature": -1.0}, r"temperature=-1\.0 must be positive"),
    ({"temperature": math.nan}, "temperature=nan must be positive"),
    ({"temperature": math.inf}, "temperature=inf must be positive and finite"),
    ({"temperature": "hot"}, "temperature='hot' must be a number"),
    ({"top_p": 0}, r"top_p=0 is outside \(0, 1\]; use 1\.0"),
    ({"top_p": 1.5}, r"top_p=1\.5 is outside \(0, 1\]"),
    ({"top_p": math.nan}, "top_p=nan is outside"),
    ({"top_p": True}, "top_p=True must be a number"),
    ({"max_denoising_steps": 0}, "max_denoising_steps=0 must be an integer of at least 1; use 256"),
    ({"max_denoising_steps": 2.5}, r"max_denoising_steps=2\.5 must be an integer"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1; use 256"),
    ({"max_new_tokens": True}, "max_new_tokens=True must be an integer"),
    ({"max_length": -3}, "max_length=-3 must be an integer of at least 1"),
    ({"seed": 1.5}, r"seed=1\.5 must be an integer"),
    ({"return_dict_in_generate": "yes"}, "return_dict_in_generate='yes' must be True or False"),
    ({"eos_token_id": [1, "a"]}, r"eos_token_id=\[1, 'a'\] must be a token id"),
    ({"pad_token_id": -1}, "pad_token_id=-1 must be a token id"),
    ({"top_k": 5}, "top_k=5 is not an option of this model's generate.*; leave it out"),
    ({"max_denoising_step": 5}, "max_denoising_step=5.*; did you mean max_denoising_steps"),
    ({"num_beams": 5}, "num_beams=5 is not an option"),
    ({"temperature": 0}, "or do_sample=False without a temperature, the deterministic decode"),
    ({"do_sample": "no"}, "do_sample='no' must be True or False"),
    ({"do_sample": 0}, "do_sample=0 must be True or False"),
    (
        {"do_sample": False, "temperature": 0},
        "do_sample=False, the deterministic decode, has no use for temperature=0",
    ),
    ({"do_sample": False, "top_p": 0.9, "seed": 3}, r"no use for top_p=0\.9, seed=3; leave top_p, seed out"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_bad_options_are_refused_by_the_config_and_by_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        PrimeV2GenerationConfig(**options)
    with pytest.raises(ValueError, match=message):
        one_layer().generate(prompts(1, 2), **options)


def test_a_plain_config_s_unsupported_option_and_an_attribute_set_later_are_refused():
    model = one_layer()
    with pytest.raises(ValueError, match="top_k=5 is not an option"):
        model.generate(generation_config=GenerationConfig(top_k=5))
    model.generation_config.top_kk = 5
    with pytest.raises(ValueError, match="top_kk=5 is not an option"):
        model.generate()


def test_options_do_not_come_from_a_model_config():
    with pytest.raises(NotImplementedError, match="PrimeV2Config holds no generation options"):
        PrimeV2GenerationConfig.from_model_config(one_layer().config)
