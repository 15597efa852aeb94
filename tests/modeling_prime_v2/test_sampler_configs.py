"""Configs of samplers: saved and loaded, and what is refused in one sentence that names the form that works."""

import copy
import pickle

import numpy as np
import pytest
import torch
from networks import small_arm, small_model

from prime_v2 import (
    AncestralSamplerConfig,
    ConfidenceSamplerConfig,
    EntropyBoundSamplerConfig,
    PredictorCorrectorSamplerConfig,
    PrimeV2ForMaskedDiffusion,
    PrimeV2GenerationConfig,
    RemaskingSamplerConfig,
    ThresholdSamplerConfig,
)

STAGES = {"reveal_order": "nested", "stage_digits": [1, 2]}


def test_a_config_comes_back_from_its_file(tmp_path):
    config = PrimeV2GenerationConfig(sampler_config=ThresholdSamplerConfig(threshold=0.8, unit="digit"))
    config.save_pretrained(tmp_path)
    assert '"_cls_name": "ThresholdSamplerConfig"' in (tmp_path / "generation_config.json").read_text()
    assert PrimeV2GenerationConfig.from_pretrained(tmp_path).sampler_config == config.sampler_config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThresholdSamplerConfig(threshold=1.0), r"threshold=1.0 is outside \(0, 1\); use 0.9"),
        (lambda: EntropyBoundSamplerConfig(entropy_bound=float("nan")), "entropy_bound=nan must be positive"),
        (lambda: ConfidenceSamplerConfig(score="luck"), "score='luck' is not one of probability, margin, entropy"),
        (lambda: ConfidenceSamplerConfig(unit="word"), "unit='word' is not one of token, digit, stage"),
        (lambda: ConfidenceSamplerConfig(stage_passes=(0.5, 0.5)), "stage_passes belongs to unit='stage'"),
        (
            lambda: ConfidenceSamplerConfig(unit="stage", stage_passes=(0.9, 0.9)),
            "must be shares above 0 that add up to 1",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config={"_cls_name": "ConfidenceSamplerConfig", "threshold": 0.5}),
            "ConfidenceSamplerConfig has no option threshold; it is an option of ThresholdSamplerConfig",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config="margin"),
            r"sampler_config='margin' is no sampler's config; use ConfidenceSamplerConfig\(score='margin'\)",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config="treshold"),
            r"is no sampler's config; use ThresholdSamplerConfig\(\)",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config=RemaskingSamplerConfig),
            r"is no sampler's config; use RemaskingSamplerConfig\(\)",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config={"score": "entropy", "unit": "digit"}),
            r"is no sampler's config; use ConfidenceSamplerConfig\(score='entropy', unit='digit'\)",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config={"_cls_name": "ThresholdSampler"}),
            r"is no sampler's config; use ThresholdSamplerConfig\(\)",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config=3),
            r"sampler_config=3 is no sampler's config; use ConfidenceSamplerConfig\(score='margin'\)",
        ),
        (lambda: PrimeV2GenerationConfig(sampler="entropy"), r"use sampler_config=Conf.*\(score='entropy'\)"),
        (lambda: PrimeV2GenerationConfig(steps=8), "use max_denoising_steps=8"),
        (
            lambda: ConfidenceSamplerConfig(scroe="margin"),
            r"ConfidenceSamplerConfig has no option scroe; did you mean score\?",
        ),
        (
            lambda: AncestralSamplerConfig(unit="digit"),
            "AncestralSamplerConfig has no option unit; it is an option of ConfidenceSamplerConfig, Thres",
        ),
        (lambda: PrimeV2GenerationConfig(block_length=0), "block_length=0"),
        (lambda: PrimeV2GenerationConfig(cache="both"), "cache='both' is not one of none, prefix, dual"),
        (lambda: RemaskingSamplerConfig(eta=1.5), r"eta=1.5 is outside \[0, 1\]; use 0.02"),
        (
            lambda: RemaskingSamplerConfig(t_on=0.1, t_off=0.5),
            "t_on=0.1 and t_off=0.5 must be 0 <= t_off < t_on <= 1; use 0.55 and 0.05",
        ),
        (
            lambda: PredictorCorrectorSamplerConfig(corrector_share=0),
            r"corrector_share=0 is outside \(0, 1\]; use 0.1",
        ),
        (
            lambda: PrimeV2GenerationConfig(sampler_config={"_cls_name": "RemaskingSamplerConfig", "etta": 0.5}),
            "RemaskingSamplerConfig has no option etta; did you mean eta",
        ),
    ],
)
def test_what_a_sampler_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


ANCESTORS = {"reveal_order": "nested", "stage_digits": [1, 2], "subtoken_embedding": "ancestors"}


@pytest.mark.parametrize(
    ("sampler", "form", "more", "message"),
    [
        (ConfidenceSamplerConfig(unit="stage"), {}, {}, "unit=.stage.. needs a model .*use unit=.token."),
        (ThresholdSamplerConfig(unit="digit"), ANCESTORS, {}, "has vectors for leading digits only; use unit='stage'"),
        (
            ConfidenceSamplerConfig(unit="stage", stage_passes=(0.5, 0.25, 0.25)),
            STAGES,
            {},
            "stage_passes has 3 shares, but the model has 2 stages",
        ),
        (
            RemaskingSamplerConfig(),
            {},
            {"do_sample": False},
            "do_sample=False draws nothing, but RemaskingSamplerConfig acts at random; use ConfidenceSamplerConfig",
        ),
    ],
    ids=["stage", "digit", "shares", "greedy"],
)
def test_a_sampler_that_does_not_suit_the_model_or_the_call_is_refused(sampler, form, more, message):
    with pytest.raises(ValueError, match=message):
        small_model(vocab_size=4, **form).generate(max_new_tokens=2, sampler_config=sampler, **more)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"sampler": "margin"},
            r"no argument sampler='margin'; use sampler_config=ConfidenceSamplerConfig\(score='margin'\)",
        ),
        ({"sampler": "remasking"}, r"use sampler_config=RemaskingSamplerConfig\(\)"),
        (
            {"sampler": ThresholdSamplerConfig(threshold=0.5)},
            r"use sampler_config=ThresholdSamplerConfig\(.*threshold=0.5\)",
        ),
        ({"eta": 0.1}, r"no argument eta=0.1; use sampler_config=RemaskingSamplerConfig\(eta=0.1\)"),
        ({"steps": 4}, "no argument steps=4; use max_denoising_steps=4"),
    ],
)
def test_a_sampler_s_name_or_option_as_a_keyword_of_generate_is_answered_with_its_config(given, message):
    with pytest.raises(ValueError, match=message):
        small_model().generate(max_new_tokens=2, **given)


def test_an_arm_says_that_it_has_no_samplers():
    for given in ({"sampler": "margin"}, {"unit": "digit"}):
        with pytest.raises(ValueError, match="an autoregressive model has no samplers; leave it out"):
            small_arm().generate(torch.tensor([[1]]), max_new_tokens=2, **given)


def test_an_arm_refuses_a_sampler_of_its_saved_options_too_and_takes_no_cache_of_blocks_as_none():
    model, prompt = small_arm(), torch.tensor([[1]])
    expected = model.generate(prompt, max_new_tokens=3, seed=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=3, seed=0, cache="none"), expected)
    model.generation_config.sampler_config = ConfidenceSamplerConfig()
    with pytest.raises(ValueError, match="PrimeV2ForCausalLM has no ConfidenceSamplerConfig"):
        model.generate(prompt, max_new_tokens=3, seed=0)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    for sampler in (
        ThresholdSamplerConfig(threshold=np.float32(0.5)),
        RemaskingSamplerConfig(eta=np.float64(0.5)),
        PredictorCorrectorSamplerConfig(corrector_steps=np.int64(2)),
        ConfidenceSamplerConfig(unit="stage", stage_passes=(np.float32(0.75), np.float32(0.25))),
    ):
        PrimeV2GenerationConfig(sampler_config=sampler).save_pretrained(tmp_path)
        assert PrimeV2GenerationConfig.from_pretrained(tmp_path).sampler_config == sampler


def test_a_cache_without_blocks_is_refused_in_a_call_and_kept_in_saved_options(tmp_path):
    model, prompt = small_model(seed=4), torch.tensor([[1, 2, 3, 4]])
    sentence = "cache='prefix' keeps keys .*; add block_length=32, or as many as max_new_tokens"
    own = PrimeV2GenerationConfig(cache="prefix")
    for given in ({"cache": "prefix"}, {"generation_config": own}):
        with pytest.raises(ValueError, match=sentence):
            model.generate(prompt, max_new_tokens=4, seed=0, **given)
    with pytest.raises(ValueError, match=sentence):
        model.log_likelihood(prompt, method="sampler", generation_config=own)
    blocks = {"max_new_tokens": 4, "seed": 0, "block_length": 4}
    expected = model.generate(prompt, cache="prefix", **blocks)
    assert not torch.equal(model.generate(prompt, **blocks), expected), "the prompt's keys and values are approximate"

    model.generation_config = own
    model.save_pretrained(tmp_path)
    loaded = PrimeV2ForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.generation_config.cache == "prefix"
    assert torch.equal(loaded.generate(prompt, max_new_tokens=4, seed=0), expected), "as it was saved, in one block"
    assert loaded.generate(prompt, max_new_tokens=4, seed=0, cache="none").shape == (1, 8)


def test_a_config_is_copied_and_pickled():
    config = ConfidenceSamplerConfig(score="margin", unit="digit")
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
