"""Samplers by their names: which config a name is, and what is refused in one sentence."""

import re

import pytest
from networks import small_model

from prime_v2 import (
    AncestralSamplerConfig,
    ConfidenceSamplerConfig,
    EntropyBoundSamplerConfig,
    PredictorCorrectorSamplerConfig,
    RemaskingSamplerConfig,
    ThresholdSamplerConfig,
)
from prime_v2.eval.samplers import by_name, description, named_config, named_sampler, parsed, sampler_name, sentence
from prime_v2.families import FAMILIES
from prime_v2.sampler_families_prime_v2 import FAMILY_SAMPLERS
from prime_v2.samplers_prime_v2 import SAMPLERS


@pytest.mark.parametrize(
    ("name", "options", "config"),
    [
        ("ancestral", {}, AncestralSamplerConfig()),
        ("confidence", {}, ConfidenceSamplerConfig()),
        ("confidence", {"score": "margin", "unit": "digit"}, ConfidenceSamplerConfig(score="margin", unit="digit")),
        ("probability", {}, ConfidenceSamplerConfig(score="probability")),
        ("margin", {"unit": "digit"}, ConfidenceSamplerConfig(score="margin", unit="digit")),
        ("entropy", {"unit": None}, ConfidenceSamplerConfig(score="entropy")),
        ("threshold", {"threshold": 0.8}, ThresholdSamplerConfig(threshold=0.8)),
        ("entropy-bound", {"entropy_bound": 0.2}, EntropyBoundSamplerConfig(entropy_bound=0.2)),
        ("remasking", {"eta": 0.1}, RemaskingSamplerConfig(eta=0.1)),
        ("predictor-corrector", {"t_on": 0.4}, PredictorCorrectorSamplerConfig(t_on=0.4)),
        ("ancestral", {"stage_passes": "0.75:0.25"}, AncestralSamplerConfig(stage_passes=(0.75, 0.25))),
    ],
)
def test_a_name_is_a_config(name, options, config):
    model = small_model("uniform" if name == "predictor-corrector" else "prime")
    assert named_sampler(name, model, **options) == config
    assert named_sampler(sampler_name(config), **options | ({"score": None} if "score" in options else {})) == config


def test_without_a_name_the_model_s_own_sampler_counts():
    model = small_model()
    assert named_sampler(None, model, unit=None) is None
    model.generation_config.sampler_config = ThresholdSamplerConfig(threshold=0.7)
    found = description(model, named_config(model, steps=5, top_p=0.5))
    assert found == {
        "sampler": "threshold",
        "unit": "token",
        "sampler_config": ThresholdSamplerConfig(threshold=0.7).to_dict(),
        "steps": 5,
        "block_length": None,
        "cache": "none",
        "temperature": 1.0,
        "top_p": 0.5,
    }
    assert sentence(found) == "threshold, unit token, threshold 0.7, 5 steps, top p 0.5"
    cached = sentence(found | {"block_length": 4, "cache": "prefix"})
    assert cached.endswith("5 steps, block length 4, cache prefix (approximate), top p 0.5")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magin", {}, "sampler='magin' is not one of ancestral, confidence, .*did you mean margin?"),
        (
            None,
            {"threshold": 0.5},
            "threshold=0.5 is an option of the sampler threshold; name it, e.g. sampler=threshold",
        ),
        (
            None,
            {"unit": "digit"},
            "unit='digit' is an option of the sampler confidence, threshold, entropy-bound; name it",
        ),
        ("margin", {"score": "entropy"}, "sampler=margin is confidence with score=margin; leave score out"),
        ("margin", {"threshold": 0.9}, "threshold=0.9 is an option of the sampler threshold, but margin takes unit, "),
        (
            "threshold",
            {"score": "margin"},
            "score='margin' is an option of the sampler confidence, but threshold takes unit,",
        ),
        ("ancestral", {"unit": "digit"}, "is an option of the sampler confidence.* but ancestral takes stage_passes"),
        ("margin", {"treshold": 0.9}, "treshold is no option of a sampler; did you mean threshold?"),
        ("margin", {"unit": "word"}, "unit=word is not one of token, digit, stage"),
        ("margin", {"unit": "stage"}, "sampler=confidence with unit=stage needs a model with stages"),
        ("threshold", {"threshold": 1.0}, r"threshold=1.0 is outside \(0, 1\); use 0.9"),
        ("margin", {"steps": 0}, "max_denoising_steps=0 must be an integer of at least 1"),
        ("margin", {"cache": "all"}, "cache=all is not one of none, prefix, dual"),
        ("margin", {"cache": "dual"}, "cache=dual keeps keys and values .* add block_length=32"),
        ("remasking", {"eta": 2}, r"sampler=remasking: eta=2 is outside \[0, 1\]; use 0.02"),
        ("margin", {"eta": 0.1}, "eta=0.1 is an option of the sampler remasking, but margin takes unit, stage_passes"),
        (
            "ancestral",
            {"stage_passes": "0.5,0.5"},
            "stage_passes='0.5,0.5' must be shares with colons .* use 0.75:0.25",
        ),
        ("ancestral", {"stage_passes": "0.5:0.7"}, "stage_passes=0.5:0.7 must be shares above 0 .* use 0.75:0.25"),
        ("ancestral", {"stage_passes": "0.5:0.5"}, "stage_passes is for models with reveal_order='coarse_first'"),
    ],
)
def test_what_is_no_sampler_or_no_option_of_it_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message.replace("?", re.escape("?"))):
        named_config(small_model(), name, **options)


def test_a_sentence_about_configs_is_one_about_names():
    for config, name in (
        ("use ConfidenceSamplerConfig()", "use sampler=confidence"),
        ("ConfidenceSamplerConfig(score='margin', unit='digit') shows", "sampler=margin with unit=digit shows"),
        (
            "it has AncestralSamplerConfig (ancestral), ThresholdSamplerConfig (threshold)",
            "it has ancestral, threshold",
        ),
        ("another sampler_config, e.g. RemaskingSamplerConfig()", "another sampler, e.g. sampler=remasking"),
        (
            "stage_passes=(0.5, 0.6) must add up to 1; use (0.75, 0.25)",
            "stage_passes=0.5:0.6 must add up to 1; use 0.75:0.25",
        ),
        ("threshold=1.0 is outside (0, 1); use 0.9", "threshold=1.0 is outside (0, 1); use 0.9"),
    ):
        assert by_name(config) == name == by_name(name)


def test_a_sampler_as_text_is_its_name_and_options():
    assert parsed("margin") == ("margin", {})
    assert parsed("ancestral, stage_passes=0.5:0.5,top_p=1") == ("ancestral", {"stage_passes": "0.5:0.5", "top_p": 1})
    with pytest.raises(ValueError, match=r"beside='margin,unit' has 'unit'; write NAME,OPTION=VALUE"):
        parsed("margin,unit", "beside")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampler_that_a_family_has_not_is_refused(family):
    model = small_model(family)
    names = FAMILY_SAMPLERS[model.config.model_type].names
    has = f"it has .*{names[-1]}" if names else "leave sampler out"
    for name, config in SAMPLERS.items():
        if name in names:
            assert named_sampler(name, model) == config()
            continue
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no sampler={name}: .*; {has}"):
            named_sampler(name, model)
    assert set(names) < set(SAMPLERS)
