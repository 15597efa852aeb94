"""PrimeV2Config: defaults that follow from others, every refusal, the round trip through a file."""

import json

import pytest
import transformers
import transformers.configuration_utils
from huggingface_hub.errors import StrictDataclassError

import prime_v2
from prime_v2.configuration_prime_v2 import PrimeV2Config
from prime_v2.families import FAMILIES
from prime_v2.validation_config_prime_v2 import VERSION

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
    ({"objective": "nll"}, "objective='nll' is not one of joint, marginal"),
    ({"loss_weight": "one"}, "loss_weight='one' is not one of elbo, low_variance"),
    ({"noise_form": "both"}, "noise_form='both' is not one of count, time"),
    ({"reveal_order": "word"}, "reveal_order='word' is not one of digit, token, nested, coarse_first, windows"),
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
    (
        {"reveal_order": "coarse_first"},
        r"stage_digits=None: .* use e.g. reveal_order='coarse_first' and stage_digits=\[2, 4\]",
    ),
    (
        {"reveal_order": "windows", "stage_digits": [2, 4]},
        r"'windows' with stage_windows=None: .* use e.g. .*and stage_windows=\[\[0, 1\], \[0, 1\]\]",
    ),
    (
        {"reveal_order": "nested", "stage_digits": [2, 4], "stage_windows": [[0, 1], [0, 1]]},
        r"'nested' with stage_windows=\[\[0, 1\], \[0, 1\]\]: 'windows' needs them, the others take none",
    ),
    (
        {"reveal_order": "windows", "stage_digits": [2, 4], "stage_windows": [[0, 1], [0.5, 0.5]]},
        r"stage_windows=.*0.5, 0.5.* must have a pair \[a, b\] with 0 <= a < b <= 1 for each of 2 stages",
    ),
    (
        {"reveal_order": "windows", "stage_digits": [2, 4], "stage_windows": [[0, 1]]},
        r"for each of 2 stages; use e.g. \[\[0, 1\], \[0, 1\]\]",
    ),
    ({"stage_digits": [2, 4]}, r"reveal_order='digit' with stage_digits=\[2, 4\]"),
    ({"training_order": "nested"}, "training_order='nested' with reveal_order='digit', which has no stages"),
    (
        {"reveal_order": "nested", "stage_digits": [2, 4], "training_order": "nestd"},
        "training_order='nestd' is not one of nested, coarse_first, windows; did you mean nested?",
    ),
    (
        {"reveal_order": "coarse_first", "stage_digits": [2, 4], "training_order": "windows"},
        "training_order='windows' with stage_windows=None: 'windows' needs them, .* use e.g. training_order='windows'",
    ),
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
        {"reveal_order": "nested", "stage_digits": [1, 3, 4], "objective": "marginal", "shuffle_ratio": 0.25},
        {"reveal_order": "coarse_first", "stage_digits": [1, 4]},
        {"reveal_order": "coarse_first", "stage_digits": [1, 4], "training_order": "nested"},
        {"reveal_order": "windows", "stage_digits": [1, 4], "stage_windows": [[0, 0.75], [0.25, 1]]},
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


# Fields that there are not


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hiden_size": 8}, r"hiden_size=8 is no field of PrimeV2\w*Config; did you mean hidden_size\?"),
        ({"rms_norm_epsilon": 1e-6}, r"did you mean rms_norm_eps\?"),
        ({"zygote": None}, "zygote=None is no field of .*; leave it out"),
        ({"causal": True}, "causal=True is no field"),  # of the class, not of a configuration
        ({"to_dict": 1}, "to_dict=1 is no field"),
        ({"temperature": 0.5}, r"temperature=0.5 is no field .*an option of generate\(\)"),
        ({"per_layer_config": {0: {"head_dim": 4}}}, "per_layer_config=.* is no field"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.* is no field"),
    ],
    ids=str,
)
def test_unknown_fields_are_refused_with_one_that_is_near(family, given, message):
    with pytest.raises(ValueError, match=message):
        family.config_class(**SMALL, **given)


def test_what_transformers_keeps_in_configurations_is_taken(family):
    metadata = {
        "architectures": ["X"],
        "transformers_version": "5.23.0",
        "torch_dtype": "float32",
        "name_or_path": "here",
        "_name_or_path": "here",
        "id2label": {"0": "a"},
        "label2id": {"a": 0},
        "tokenizer_class": "T",
        "use_cache": False,
        "output_hidden_states": True,
        "attn_implementation": "eager",
        "rope_theta": 100.0,
    }
    config = family.config_class(**SMALL, **metadata)
    assert config.rope_parameters["rope_theta"] == 100.0 and config.id2label == {0: "a"}
    for name, value in transformers.PreTrainedConfig().to_dict().items():
        assert family.config_class(**SMALL, **{name: value}).to_dict() is not None
    for name, value in {"use_cache": False, "is_causal": True, "pad_token_id": 3, "quantization_config": {}}.items():
        setattr(config, name, value)


def test_a_fields_name_misspelt_cannot_be_set_later(family):
    config = family.config_class(**SMALL)
    with pytest.raises(ValueError, match="hiden_size is no field of .*; did you mean hidden_size?"):
        config.hiden_size = 8


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "bos_token", "cls_token", "mask_token"])
def test_names_of_a_tokenizers_tokens_are_no_fields_misspelt(family, name, tmp_path):
    """AutoTokenizer passes them to the configuration."""
    config = family.config_class(**SMALL)
    setattr(config, name, "a name that Transformers may use")
    family.config_class(**SMALL).save_pretrained(tmp_path)
    assert family.config_class.from_pretrained(tmp_path, **{name: "x"}).vocab_size == 11


def test_arguments_of_loading_are_checked_and_not_misspelt(family, tmp_path):
    family.config_class(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hiden_size is no field of .*; did you mean hidden_size?"):
        family.config_class.from_pretrained(tmp_path, hiden_size=8)
    config, unused = family.config_class.from_pretrained(tmp_path, foo=1, return_unused_kwargs=True)
    assert unused["foo"] == 1 and config.vocab_size == 11
    with pytest.raises(StrictDataclassError, match="num_attention_heads=3 is not a multiple"):
        family.config_class.from_pretrained(tmp_path, num_attention_heads=3)
    loaded = family.config_class.from_pretrained(tmp_path, initializer_range=0.5, revision="main", pad_token="x")
    assert loaded.initializer_range == 0.5


def test_a_configuration_of_a_newer_version_is_refused_for_what_is_new_in_it(family, tmp_path):
    family.config_class(**SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    assert content["prime_v2_version"] == prime_v2.__version__ == VERSION
    file.write_text(json.dumps(content | {"prime_v2_version": "99.1.0"}))
    assert family.config_class.from_pretrained(tmp_path).prime_v2_version == VERSION  # nothing new is in it
    file.write_text(json.dumps(content | {"prime_v2_version": "99.1.0", "gates": 3}))
    with pytest.raises(
        ValueError, match=f"written by version 99.1.0 .* field gates, which version {VERSION} does not"
    ):
        family.config_class.from_pretrained(tmp_path)
    for version in ("0.0.1", "junk", 7, None):
        file.write_text(json.dumps(content | {"prime_v2_version": version, "gates": 3}))
        with pytest.raises(ValueError, match="gates=3 is no field"):
            family.config_class.from_pretrained(tmp_path)


def test_configurations_of_before_there_was_a_version_load(family, tmp_path):
    family.config_class(**SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    del content["prime_v2_version"]
    file.write_text(json.dumps(content))
    assert family.config_class.from_pretrained(tmp_path).to_dict() == family.config_class(**SMALL).to_dict()


def test_no_number_of_labels_is_as_if_none_was_given():
    assert PrimeV2Config(num_labels=None).num_labels == PrimeV2Config().num_labels


@pytest.mark.parametrize(("saved", "present"), [("token", "joint"), ("subtoken", "marginal"), ("joint", "joint")])
def test_a_saved_folder_with_an_earlier_name_of_the_objective_loads(tmp_path, saved, present):
    PrimeV2Config(vocab_size=11).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"objective": saved}))
    assert PrimeV2Config.from_pretrained(tmp_path).objective == present
