"""Bad input that other suites do not reach: one sentence with the value, the rule and what works."""

import pytest
import torch
from networks import small_arm, small_config, small_model, small_uniform

import prime_v2
from prime_v2 import tokenization
from prime_v2.code_table_prime_v2 import build_code_table
from prime_v2.eval.lm_requests import check_ids
from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.tokenization.codes import codes_from_text

IDS = torch.tensor([[1, 2]])
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small_model()(), r"give exactly one of input_ids \(B, L\) and subtoken_ids"),
        (lambda: small_model().model(), r"give exactly one of input_ids \(B, L\) and subtoken_ids"),
        (lambda: small_model()(labels=IDS, subtoken_ids=small_model().encode(IDS)), "labels need input_ids, clean"),
        (
            lambda: small_model().log_likelihood(IDS, generation_config=PrimeV2GenerationConfig()),
            "generation_config belongs to method='sampler'; leave it out",
        ),
        (
            lambda: small_model().log_likelihood(IDS, attention_mask="x"),
            "attention_mask is of type str; give a tensor",
        ),
        (lambda: small_model()(IDS, attention_mask="x"), "attention_mask is of type str; give a tensor"),
        (lambda: small_model().generate(IDS[None]), r"input_ids has shape \(1, 1, 2\); give token ids"),
        (lambda: small_model().generate([["a"]]), "input_ids must be integers, not text"),
        (
            lambda: small_model().generate(max_new_tokens=2, bos_token_id=99),
            r"bos_token_id=99 is no token of this model; use an id in \[0, 10\], or None",
        ),
        (lambda: small_arm().generate(attention_mask=torch.ones(1, 3)), "attention_mask was given without input_ids"),
        (lambda: small_uniform().model(input_ids=IDS[0]), r"input_ids has shape \(2,\); give token ids \(B, L\)"),
        (lambda: PrimeV2GenerationConfig(eos_token_id=-1), "eos_token_id=-1 must be a token id, an integer of at lea"),
        (lambda: PrimeV2GenerationConfig(temperature="hot"), "temperature='hot' must be a number; use 1.0"),
        (lambda: build_code_table(0, 2, 1), "vocab_size=0, base=2, num_subtokens=1: these must be at least 1, 2 and"),
        (lambda: small_config(rope_parameters=LONG), r"short_factor=\[1.0\], but it is a list of 4 numbers"),
        (
            lambda: small_config(rope_parameters=DYNAMIC, hidden_size=8, num_attention_heads=4),
            "needs a head of more than head_dim=2; use head_dim=4",
        ),
        (lambda: check_ids(("", [1], []), "request 0", 9, "<mask>"), "request 0 has a continuation without a token"),
        (lambda: codes_from_text("luck", IDS.numpy(), 3, 2, 2), "codes='luck' is not one of"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(Exception, match=message) as found:  # a configuration's refusal has a class of its library
        call()
    assert "ValueError" in str(found.value) or isinstance(found.value, ValueError)


@pytest.mark.parametrize("package", [prime_v2, tokenization])
def test_a_name_that_a_package_has_not_is_refused_with_those_that_it_has(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'; it has "):
        _ = package.nothing
