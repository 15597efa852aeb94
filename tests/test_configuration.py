"""PrimeV2Config: defaults that follow from others, every refusal, the round trip through a file."""

import json

import pytest
import transformers.configuration_utils
from huggingface_hub.errors import StrictDataclassError

from prime_v2.configuration_prime_v2 import PrimeV2Config

SMALL = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("given", "base", "num_subtokens"),
    [
        ({}, 2, 16),
        ({"vocab_size": 32_000}, 2, 15),
        ({"vocab_size": 32_768}, 2, 15),
        ({"vocab_size": 32_769}, 2, 16),
        ({"base": 3}, 3, 10),
        ({"num_subtokens": 1}, 50257, 1),
        ({"num_subtokens": 2}, 225, 2),
        ({"num_subtokens": 4}, 15, 4),
        ({"base": 4, "num_subtokens": 9}, 4, 9),
        ({"vocab_size": 1}, 2, 1),
    ],
)
def test_base_and_number_of_digits_follow_from_each_other(given, base, num_subtokens):
    config = PrimeV2Config(**given)
    assert (config.base, config.num_subtokens) == (base, num_subtokens)
    assert base**num_subtokens >= config.vocab_size


def test_sizes_that_are_left_out():
    config = PrimeV2Config(hidden_size=96, num_attention_heads=6)
    assert config.intermediate_size == 4 * 96
    assert config.num_key_value_heads == 6
    assert config.head_dim == 16
    assert config.mask_token_id == config.vocab_size == 50257
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_a_head_may_have_another_width_than_its_share():
    assert PrimeV2Config(hidden_size=18, num_attention_heads=4, head_dim=8).head_dim == 8


REFUSED = [
    ({"shuffle_domain": "tokens"}, "shuffle_domain='tokens' is not one of codes, vocab"),
    ({"subtoken_embedding": "mean"}, "subtoken_embedding='mean' is not one of sum, concat, concat_shared"),
    ({"objective": "nll"}, "objective='nll' is not one of token, subtoken"),
    ({"loss_weight": "one"}, "loss_weight='one' is not one of elbo, low_variance"),
    ({"noise_form": "both"}, "noise_form='both' is not one of count, time"),
    ({"reveal_order": "word"}, "reveal_order='word' is not one of digit, token, nested"),
    ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ({"vocab_size": -5, "num_subtokens": 2}, "vocab_size=-5 must be at least 1"),
    ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
    ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
    ({"head_dim": 0}, "head_dim=0 must be at least 1"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0 must be at least 1"),
    ({"num_subtokens": 0}, "num_subtokens=0 must be at least 1"),
    ({"num_attention_heads": 3}, "hidden_size=16 is not a multiple of num_attention_heads=3; use hidden_size=18"),
    (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "=4 is not a multiple of num_key_value_heads=3; use .*=4 or 1",
    ),
    ({"head_dim": 7}, "head_dim=7 must be even for rotary positions; use 8"),
    ({"attention_dropout": 1.0}, r"attention_dropout=1.0 is outside \[0, 1\); use 0.0"),
    ({"attention_dropout": -0.1}, "attention_dropout=-0.1 is outside"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be positive and finite; use 1e-5"),
    ({"initializer_range": float("nan")}, "initializer_range=nan must be positive and finite; use 0.02"),
    ({"base": 1}, "base=1 must be at least 2; use base=2"),
    (
        {"base": 2, "num_subtokens": 3},
        r"vocab_size=11 does not .*=3 digits of base 2 \(8 codes\); use .*=4, or base=3",
    ),
    ({"num_subtokens": 32}, "num_subtokens=32 digits of base 2 do not pack into 62 bits; use num_subtokens=4"),
    ({"shuffle_ratio": 1.5}, r"shuffle_ratio=1.5 is outside \[0, 1\]; use 1.0"),
    ({"shuffle_ratio": float("nan")}, "shuffle_ratio=nan is outside"),
    (
        {"num_subtokens": 30, "base": 2},
        "would permute 1073741824 codes.* use num_subtokens=4 or shuffle_domain='vocab'",
    ),
    ({"subtoken_embedding": "concat", "base": 3}, "hidden_size=16 to be a multiple .*=3; use hidden_size=18 or 'sum'"),
    ({"mask_token_id": 3}, "mask_token_id=3 must be vocab_size=11, the first id outside the vocabulary; leave it out"),
    ({"reveal_order": "nested"}, r"'nested' with stage_digits=None: .* stage_digits=\[2, 4\]"),
    ({"stage_digits": [2, 4]}, r"reveal_order='digit' with stage_digits=\[2, 4\]"),
    (
        {"reveal_order": "nested", "stage_digits": [2, 2, 4]},
        r"stage_digits=\[2, 2, 4\] must rise from at least 1 to .*4",
    ),
    ({"reveal_order": "nested", "stage_digits": [0, 4]}, r"stage_digits=\[0, 4\] must rise from at least 1"),
    (
        {"reveal_order": "nested", "stage_digits": [2, 3]},
        r"stage_digits=\[2, 3\] must rise .* num_subtokens=4; .*\[4\]",
    ),
    ({"reveal_order": "nested", "stage_digits": []}, r"stage_digits=\[\] must rise"),
    ({"whole_token_above": 1.5}, r"whole_token_above=1.5 is outside \[0, 1\]; use 0.5 or None"),
    (
        {"whole_token_above": 0.5, "reveal_order": "token"},
        "whole_token_above=0.5 needs reveal_order='digit', not 'token'",
    ),
    ({"base": 2.5}, "base"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_impossible_combinations_are_refused(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        PrimeV2Config(**(SMALL | {"base": None} | changes))


def test_a_loaded_config_is_checked_too(tmp_path):
    PrimeV2Config(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 17}))
    with pytest.raises(StrictDataclassError, match="vocab_size=17 does not fit in num_subtokens=4 digits of base 2"):
        PrimeV2Config.from_pretrained(tmp_path)


def test_a_shuffle_of_the_vocabulary_alone_may_have_many_unused_codes():
    assert PrimeV2Config(**SMALL, num_subtokens=30, base=2, shuffle_domain="vocab").num_subtokens == 30


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reveal_order": "nested", "stage_digits": [1, 3, 4], "objective": "subtoken", "shuffle_ratio": 0.25},
        {"num_subtokens": 1, "eos_token_id": [1, 2], "pad_token_id": 0, "rope_parameters": {"rope_theta": 500.0}},
        {"whole_token_above": 0.5, "qk_norm": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_a_saved_config_loads_equal(fields, tmp_path):
    config = PrimeV2Config(**SMALL, **fields)
    config.save_pretrained(tmp_path)
    loaded = PrimeV2Config.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for name, value in fields.items():
        if name != "rope_parameters":
            assert getattr(loaded, name) == value
    assert json.loads((tmp_path / "config.json").read_text())["mask_token_id"] == 11


def test_the_mask_id_outside_the_vocabulary_gives_no_warning_and_other_ids_do(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning_once", warnings.append)
    PrimeV2Config(**SMALL).save_pretrained(tmp_path)
    assert PrimeV2Config.from_pretrained(tmp_path).mask_token_id == 11
    assert warnings == []
    PrimeV2Config(**SMALL, eos_token_id=11)
    assert len(warnings) == 1
    assert "eos_token_id" in warnings[0]


def test_configs_do_not_share_their_auto_map():
    one, other = PrimeV2Config(**SMALL), PrimeV2Config(**SMALL)
    one.auto_map["AutoModel"] = "changed"
    assert other.auto_map["AutoModel"] == "modeling_prime_v2.PrimeV2ForMaskedDiffusion"
