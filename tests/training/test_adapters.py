"""LoRA through peft on every family."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, Trainer, TrainingArguments

from prime_v2.families import FAMILIES, bound_method
from prime_v2.training.finetuning import LORA_TARGETS, with_lora

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def small(name: str, **changes):
    torch.manual_seed(0)
    digits = {"num_subtokens": 5} if name == "prime" else {}
    config = FAMILIES[name].config_class(**SHAPE | digits | {"initializer_range": 0.3} | changes)
    return FAMILIES[name].model_class(config).eval()


def some_ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 30, (rows, 8), generator=torch.Generator().manual_seed(1))


def value_of(model, ids=None) -> torch.Tensor:
    ids = some_ids() if ids is None else ids
    return model.log_likelihood(ids, num_samples=4, method=bound_method(model.config)).value


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_trained_alone_saved_reloaded_and_merged(name, tmp_path):
    model = small(name)
    model.save_pretrained(tmp_path / "base")
    untouched = value_of(model)
    adapted = with_lora(model, 2)
    before = {key: each.detach().clone() for key, each in adapted.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in some_ids(8)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=6, learning_rate=0.05, per_device_train_batch_size=4, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(adapted, arguments, train_dataset=rows).train()
    moved = {key for key, each in adapted.named_parameters() if not torch.equal(each, before[key])}
    assert moved == {key for key in before if "lora_" in key}
    assert {key.split(".lora_")[0].rsplit(".", 1)[1] for key in moved} == set(LORA_TARGETS)

    adapted.eval()
    value = value_of(adapted)
    assert (value - untouched).abs().max() > 1e-2
    prompt = some_ids()[:, :3]
    new = adapted.generate(prompt, max_new_tokens=4, seed=0)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "adapter").glob("*.bin"))
    base = AutoModel.from_pretrained(tmp_path / "base", trust_remote_code=True)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(value_of(again), value, rtol=0, atol=1e-6)  # the same products
    merged = again.merge_and_unload()
    torch.testing.assert_close(value_of(merged), value, rtol=1e-5, atol=1e-5)  # B A added before or after the product
    assert torch.equal(merged.generate(prompt, max_new_tokens=4, seed=0), new)


# peft advises to untie; here a tied head is the adapted embedding itself.
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "name, target, changes",
    [
        ("prime", "lm_head", {}),
        ("prime", "table", {"subtoken_embedding": "concat", "num_subtokens": 4}),
        ("prime", "table", {"num_subtokens": 1, "base": None, "tie_word_embeddings": True}),
        ("arm", "lm_head", {}),
        ("arm", "table", {"tie_word_embeddings": True}),
        ("uniform", "lm_head", {"tie_word_embeddings": False}),
        ("interpolating", "lm_head", {"tie_word_embeddings": False}),
        ("interpolating", "embed_tokens", {"tie_word_embeddings": True}),
    ],
)
def test_an_adapter_of_head_or_embedding_is_trained_and_has_the_effect_of_its_merged_weights(name, target, changes):
    adapted = get_peft_model(small(name, **changes), LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    adapted(input_ids=some_ids(), labels=some_ids()).loss.backward()
    assert all(each.grad.any() for key, each in adapted.named_parameters() if "lora" in key)
    value = value_of(adapted)
    with adapted.disable_adapter():
        assert not torch.allclose(value_of(adapted), value, atol=1e-3)
    # B A added before or after the product
    torch.testing.assert_close(value_of(adapted.merge_and_unload()), value, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_table_that_is_summed_is_refused_by_peft():
    with pytest.raises(ValueError, match="EmbeddingBag.* is not supported"):
        get_peft_model(small("prime", subtoken_embedding="sum"), LoraConfig(r=2, target_modules=["table"]))


def test_the_head_is_trained_whole_beside_an_adapter():
    model = small("prime")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    adapted(input_ids=some_ids(), labels=some_ids()).loss.backward()
    gradients = {key for key, each in adapted.named_parameters() if each.grad is not None and each.grad.any()}
    assert any("lm_head" in key for key in gradients) and any("lora_B" in key for key in gradients)
