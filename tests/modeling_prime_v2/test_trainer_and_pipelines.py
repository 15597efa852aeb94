"""Trainer's options and pipelines act on every family, or are refused with a sentence."""

import pytest
import torch
from outside import FIELDS, SHAPE, network, some_ids, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from prime_v2 import build_tokenizer
from prime_v2.families import FAMILIES

# A plain Trainer


@pytest.mark.parametrize("case", FIELDS)
def test_label_smoothing_which_takes_the_labels_away_is_refused(case, tmp_path):
    """Logits of known tokens have no loss to smooth: it was 0 or infinite, and the weights moved."""
    with pytest.raises(ValueError, match="num_items_in_batch was given without labels.*label_smoothing_factor"):
        train(case, tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("case", FIELDS)
def test_a_plain_trainer_predicts_the_nats_of_each_sequence(case, tmp_path):
    model, ids, found = network(case), some_ids(5), []
    data = [{"input_ids": each, "labels": each} for each in ids]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=3, report_to="none", use_cpu=True, disable_tqdm=True
    )

    def metrics(given) -> dict[str, float]:
        found.append(given.predictions)
        return {"nats": float(given.predictions.sum() / (given.label_ids != -100).sum())}

    torch.manual_seed(0)
    predicted = Trainer(model, arguments, compute_metrics=metrics).predict(data)
    assert predicted.predictions.shape == (5,) and predicted.predictions.dtype in ("float32", "float64")
    # Trainer's own loss is the mean over batches, weighted by their rows; every row has as many tokens.
    assert predicted.metrics["test_loss"] == pytest.approx(predicted.metrics["test_nats"], rel=1e-5)


@pytest.mark.parametrize("case", FIELDS)
def test_the_loss_is_the_sum_of_its_sequences(case):
    model, ids = network(case), some_ids()
    labels = ids.clone()
    labels[1, :5] = -100
    output = model(input_ids=ids, labels=labels)
    assert output.loss_per_sequence.shape == (3,) and not output.loss_per_sequence.requires_grad
    torch.testing.assert_close(output.loss_per_sequence.double().sum() / 19, output.loss.double(), rtol=1e-6, atol=0)
    assert model(input_ids=ids, labels=labels, num_items_in_batch=38).loss.item() > 0
    for wrong in (0, -5, float("nan"), torch.tensor(0)):
        with pytest.raises(ValueError, match="num_items_in_batch=.* must be a positive number"):
            model(input_ids=ids, labels=labels, num_items_in_batch=wrong)


@pytest.mark.parametrize("case", FIELDS)
def test_arguments_of_generate_that_mean_nothing_are_taken(case):
    model, options = network(case), {"max_new_tokens": 2, "seed": 0}
    idle = {"synced_gpus": False, "assistant_model": None, "token_type_ids": None, "prefix_allowed_tokens_fn": None}
    assert torch.equal(model.generate(some_ids(), **options, **idle), model.generate(some_ids(), **options))
    with pytest.raises(ValueError, match="token_type_ids"):
        model.generate(some_ids(), token_type_ids=torch.zeros(3, 8, dtype=torch.long), **options)


# Pipelines


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models with a tokenizer of bytes, by family."""
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({each: number for number, each in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer, bytes_only.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = build_tokenizer(PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>"))
    saved = {}
    for name, family in FAMILIES.items():
        saved[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        fields = SHAPE | {"vocab_size": tokenizer.code_table.shape[0], "max_position_embeddings": 64}
        family.model_class(family.config_class(**fields)).save_pretrained(saved[name])
        tokenizer.save_pretrained(saved[name])
    return saved


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pipeline_of_features_gives_hidden_states(name, folders, caplog):
    model = AutoModel.from_pretrained(folders[name], trust_remote_code=True)
    pipe = pipeline("feature-extraction", model=str(folders[name]), trust_remote_code=True)
    assert type(model).__name__ == FAMILIES[name].model[1], "the automatic class itself keeps the head"
    ids = pipe.tokenizer("some text", return_tensors="pt").input_ids
    expected = pipeline("feature-extraction", model=model.model, tokenizer=pipe.tokenizer)("some text")
    for features in (pipe("some text"), expected):
        found = torch.tensor(features)
        assert found.shape == (1, ids.shape[1], SHAPE["hidden_size"]) and found.isfinite().all()
        torch.testing.assert_close(found, model.model(input_ids=ids).last_hidden_state, rtol=0, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize("name", [name for name, each in FAMILIES.items() if not each.config_class.causal])
def test_the_pipeline_that_fills_masks_gives_the_probabilities_of_the_model(name, folders):
    pipe = pipeline("fill-mask", model=str(folders[name]), trust_remote_code=True, top_k=3)
    text = f"some {pipe.tokenizer.mask_token} text"
    if name == "uniform":
        with pytest.raises(ValueError, match="give times"):
            pipe(text)
        return
    ids = pipe.tokenizer(text, return_tensors="pt").input_ids
    probabilities = pipe.model(ids).logits[ids == pipe.tokenizer.mask_token_id].softmax(-1).squeeze(0)
    best = probabilities.topk(3)
    assert [each["token"] for each in pipe(text)] == best.indices.tolist()
    assert [each["score"] for each in pipe(text)] == pytest.approx(best.values.tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pipeline_that_generates_works_or_says_what_to_use(name, folders, caplog):
    if not FAMILIES[name].config_class.causal:
        with pytest.raises(ValueError, match=r"this is a diffusion model; use AutoModel\.from_pretrained.*generate"):
            pipeline("text-generation", model=str(folders[name]), trust_remote_code=True)
        return
    pipe = pipeline("text-generation", model=str(folders[name]), trust_remote_code=True)
    assert pipe("some text", max_new_tokens=3)[0]["generated_text"].startswith("some text")
    assert not caplog.records
