"""The autoregressive network against Transformers' Llama and Qwen3, its loss, sub-token inputs, saving, bad input."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from networks import SUBTOKENS, after_start, peer_name, peer_of, small_arm, small_config, some_ids
from torch import nn

from prime_v2.configuration_arm_prime_v2 import PrimeV2ArmConfig
from prime_v2.modeling_arm_prime_v2 import PrimeV2ForCausalLM

# float32 networks of two layers whose logits are of order 1: other orders of summation differ by some 1e-7 a step.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHAPES = [
    {},
    {"tie_word_embeddings": True},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 0.1},
    {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    {"qk_norm": True, "num_key_value_heads": 1, "attention_bias": True},
]


def disturbed(model: PrimeV2ForCausalLM) -> PrimeV2ForCausalLM:
    """Norms and biases off their initial 1 and 0, which would hide an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# Transformers' own


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_logits_loss_and_gradients_are_those_of_llama_and_qwen3(fields, implementation):
    model, ids = disturbed(small_arm(**fields)), some_ids()
    peer = peer_of(model)
    for each in (model, peer):
        each.set_attn_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, peer(ids).logits, **CLOSE)
    loss, reference = model(ids, labels=ids).loss, peer(after_start(ids), labels=after_start(ids)).loss
    torch.testing.assert_close(loss, reference, **CLOSE)
    loss.backward()
    reference.backward()
    gradients = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[peer_name(name)].grad, **CLOSE)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=str)
def test_training_takes_the_course_that_llamas_takes(fields):
    """Thirty steps of one optimiser from equal weights: this baseline is as good as Transformers' own."""
    model = small_arm(scale=0.02, **fields).train()
    peer = peer_of(model).train()
    batches = [some_ids(8, 12, seed=seed) ** 2 % 11 for seed in range(30)]
    curves = []
    for each, feed in ((model, lambda ids: ids), (peer, after_start)):
        optimiser = torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.1)
        losses = []
        for ids in batches:
            loss = each(feed(ids), labels=feed(ids)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        curves.append(losses)
    # Adam divides by the root of squared gradients, so rounding grows with the steps.
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
    assert curves[0][-1] < curves[0][0] - 0.3, "the squares modulo 11 are few"


@pytest.mark.parametrize("fields", [SHAPES[0], SHAPES[4], SUBTOKENS], ids=str)
def test_cached_steps_give_the_logits_of_one_pass(fields):
    model, ids = small_arm(**fields), some_ids(2, 9)
    expected, cache, logits = model(ids).logits, None, []
    for piece in ids.split([4, 1, 1, 3], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)
    assert cache.get_seq_length() == 9


def test_use_cache_is_the_configs_unless_the_call_says_otherwise():
    ids = some_ids()
    assert small_arm()(ids).past_key_values.get_seq_length() == 7
    assert small_arm()(ids, use_cache=False).past_key_values is None
    assert small_arm(use_cache=False)(ids).past_key_values is None
    assert small_arm()(ids, labels=ids).past_key_values is None


def test_a_logit_depends_on_earlier_tokens_alone():
    model, ids = small_arm(), some_ids(1, 8)
    for changed in range(8):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 11
        difference = (model(other).logits - model(ids).logits).abs().amax(-1)[0]
        assert (difference[:changed] < 1e-5).all()
        assert difference[changed] > 1e-3


def test_only_the_logits_that_are_asked_for_are_computed():
    model, ids = small_arm(), some_ids()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:], **CLOSE)
    picked = torch.tensor([4, 0])
    torch.testing.assert_close(model(ids, logits_to_keep=picked).logits, logits[:, picked], **CLOSE)


def test_vectors_can_be_given_in_place_of_ids():
    model, ids = small_arm(), some_ids()
    vectors = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=vectors).logits, model(ids).logits, rtol=0, atol=0)


def test_hidden_states_attentions_and_tuples_on_request():
    model, ids = small_arm(), some_ids()
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    torch.testing.assert_close(model.token_logits(outputs.hidden_states[-1]), outputs.logits)
    for attention in outputs.attentions:
        assert (attention.triu(1) == 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 7), **CLOSE)
    assert len(model(ids, labels=ids, output_hidden_states=True).hidden_states) == 3
    (logits, _) = model(ids, return_dict=False)
    torch.testing.assert_close(logits, outputs.logits, **CLOSE)
    loss, is_bound, _ = model(ids, labels=ids, return_dict=False)
    assert (loss, is_bound) == (model(ids, labels=ids).loss, True)


# Sub-tokens


@pytest.mark.parametrize("form", ["sum", "concat", "concat_shared"])
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_embedded_by_their_digits_and_predicted_whole(form, tied):
    fields = {"base": 3, "num_subtokens": 4} if form != "sum" else {"base": 3, "num_subtokens": 3}
    model, ids = small_arm(subtoken_embedding=form, tie_word_embeddings=tied, **fields), some_ids()
    table, codes, base = model.get_input_embeddings().weight, model.code_table.codes[:-1].tolist(), 3
    assert len(table) == (base if form == "concat_shared" else base * model.config.num_subtokens)
    vectors = []
    for code in codes:
        rows = [table[(0 if form == "concat_shared" else j * base) + digit] for j, digit in enumerate(code)]
        vectors.append(sum(rows) if form == "sum" else torch.cat(rows))
    vectors = torch.stack(vectors)
    torch.testing.assert_close(model(inputs_embeds=vectors[ids]).logits, model(ids).logits, **CLOSE)
    head = vectors if tied else model.lm_head.weight
    hidden_states = model.model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).logits, hidden_states @ head.T, **CLOSE)
    expected = nn.functional.cross_entropy(model(after_start(ids)).logits[:, :-1].flatten(0, 1), ids.flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, **CLOSE)


def test_whole_tokens_have_no_code_table_and_the_shuffle_changes_nothing():
    model, other = small_arm(), small_arm(shuffle_seed=9, subtoken_embedding="concat")
    assert model.code_table is None
    assert (model.config.num_subtokens, model.config.base) == (1, 11)
    assert not [name for name in model.state_dict() if "codes" in name]
    ids = some_ids()
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)


# The configuration


def test_the_configuration_of_a_causal_model(tmp_path):
    config = small_config("arm", num_subtokens=None, tie_word_embeddings=True)
    assert (config.num_subtokens, config.base, config.causal) == (4, 2, True)
    assert config.auto_map["AutoModelForCausalLM"] == "modeling_arm_prime_v2.PrimeV2ForCausalLM"
    config.save_pretrained(tmp_path)
    assert PrimeV2ArmConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "prime_v2_arm"
    with pytest.raises(StrictDataclassError, match=r"num_subtokens=1 digits of base 2 .* use num_subtokens=4"):
        small_config("arm", base=2)
    with pytest.raises(StrictDataclassError, match="num_attention_heads=3; use hidden_size=18"):
        small_config("arm", num_attention_heads=3)


@pytest.mark.parametrize(
    ("bos", "eos", "expected"), [(4, 5, 4), (None, 5, 5), (None, [6, 7], 6), (11, 5, 5), (None, None, None)]
)
def test_texts_start_with_bos_or_else_eos(bos, eos, expected):
    model, ids = small_arm(bos_token_id=bos, eos_token_id=eos), some_ids()
    if expected is None:
        with pytest.raises(ValueError, match=r"bos_token_id=None and eos_token_id=None: neither .* id in \[0, 10\]"):
            model(ids, labels=ids)
    else:
        fed = torch.cat([torch.full((3, 1), expected), ids], dim=1)
        reference = nn.functional.cross_entropy(model(fed).logits[:, :-1].flatten(0, 1), ids.flatten())
        torch.testing.assert_close(model(ids, labels=ids).loss, reference, **CLOSE)


# Transformers' trainer, adapters and precisions


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapter_of_peft_is_trained_and_generates(reentrant):
    from peft import LoraConfig, get_peft_model

    ids = some_ids()
    model = small_arm()
    before = model(ids, labels=ids).loss.item()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "table"], modules_to_save=["lm_head"], r=2)
    adapted = get_peft_model(model, lora).train()
    adapted.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    optimiser = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=0.5)
    for _ in range(10):
        optimiser.zero_grad()
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < before - 0.1
    trained = {name for name, each in adapted.named_parameters() if each.grad is not None and each.grad.any()}
    for part in ("q_proj", "table", "lm_head"):
        assert any(part in name for name in trained), part
    adapted.eval()
    new = adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(ids, max_new_tokens=4, do_sample=False), new)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_tokens_can_be_added(tied, tmp_path):
    model, ids = small_arm(tie_word_embeddings=tied), some_ids()
    before = model(ids).logits.detach()
    model.resize_token_embeddings(14, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits[..., :11], before, **CLOSE)
    new = some_ids(vocab_size=14)
    model(new, labels=new).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = PrimeV2ForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(new).logits, model(new).logits, **CLOSE)
    with pytest.raises(ValueError, match="vocab_size=11 is fixed by the code table"):
        small_arm(**SUBTOKENS).resize_token_embeddings(14)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[0, 11]])}, r"token ids span \[0, 11\], .* an autoregressive model has no mask"),
        ({}, "exactly one of input_ids .* and inputs_embeds"),
        (
            {"input_ids": torch.zeros(1, 1, dtype=torch.long), "inputs_embeds": torch.zeros(1, 1, 16)},
            "exactly one of input_ids .* and inputs_embeds",
        ),
    ],
    ids=str,
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_arm()(**arguments)
