"""What `model(input_ids, labels=...)` promises whatever the family. A new entry of `FAMILIES` falls under all of it.

Logits, losses and gradients are held against plain loops and closed forms in the files of the families.
"""

import json
import sys

import pytest
import torch
from networks import (
    FAMILIES,
    KINDS,
    LIMIT,
    VOCAB_SIZE,
    fresh_network,
    network,
    padded,
    small_model,
    some_ids,
    some_noise,
    times_of,
)
from observers import LargestTensor
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

MASK = VOCAB_SIZE
# float32 networks of a layer whose logits are of order 1: other orders of summation differ by some 1e-7 a step.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
DIFFUSION = [kind for kind in KINDS if not network(kind).config.causal]
TABLES = [kind for kind in KINDS if any(name.endswith("codes") for name in network(kind).state_dict())]


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind):
    return fresh_network(kind)


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients, which are set to None."""
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def passes_of(model, *args, **kwargs) -> list[torch.Tensor]:
    """The hidden states that a call of the model computes, pass by pass."""
    seen = []
    hook = model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    model(*args, **kwargs)
    hook.remove()
    return seen


# Logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_batch_and_order_change_no_logits(model, implementation):
    model.set_attn_implementation(implementation)
    rows = [some_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
    if not model.config.causal and not times_of(model, 1):
        for row in rows:
            row[1] = MASK
    alone = [model(row[None], **times_of(model, 1)).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side, 9)
        for turn in ([0, 1, 2], [2, 0]):
            logits = model(ids[turn], mask[turn], **times_of(model, len(turn))).logits
            for each, row in zip(logits, turn, strict=True):
                torch.testing.assert_close(each[mask[row] == 1], alone[row], **CLOSE)


def test_hidden_states_attentions_and_tuples_on_request(model):
    ids, times = some_ids(), times_of(model, 3)
    model.set_attn_implementation("eager")
    outputs = model(ids, **times, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 2
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]), **CLOSE)
    plain = model(ids, **times)
    assert plain.hidden_states is None and plain.attentions is None and plain.is_bound is None
    torch.testing.assert_close(model(ids, **times, return_dict=False)[0], outputs.logits, rtol=0, atol=0)
    if len(passes_of(model, ids, labels=ids)) == 1:  # a loss of two terms has no one sequence of hidden states
        assert len(model(ids, labels=ids, output_hidden_states=True).hidden_states) == 2
    else:
        with pytest.raises(ValueError, match="output_hidden_states=True with labels"):
            model(ids, labels=ids, output_hidden_states=True)
    loss, is_bound, *_ = model(ids, labels=ids, **some_noise(3), return_dict=False)
    assert loss == model(ids, labels=ids, **some_noise(3)).loss and is_bound is model.loss_is_bound


# The loss


def test_the_loss_is_float32_says_whether_it_is_a_bound_and_comes_without_logits(model):
    ids = some_ids()
    output = model(ids, labels=ids)
    assert output.loss.dtype == torch.float32 and output.loss.shape == () and output.loss > 0
    assert output.is_bound is model.loss_is_bound and output.logits is None


def test_noise_comes_from_torchs_generator_where_any_is_drawn(model):
    ids, losses = some_ids(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] == losses[1] and (losses[1] == losses[2]) == model.config.causal
    state = torch.get_rng_state()
    assert model(ids, labels=ids, **some_noise(3)).loss == model(ids, labels=ids, **some_noise(3)).loss
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", DIFFUSION)
def test_inputs_that_are_masked_where_labels_are_scored_are_noised_from_the_labels(kind):
    """As other masked language models are called."""
    model, ids = network(kind), some_ids(2, 5)
    masked = torch.where(torch.arange(5) % 2 == 0, MASK, ids)
    expected = model(ids, labels=ids, **some_noise(2)).loss
    torch.testing.assert_close(model(masked, labels=ids, **some_noise(2)).loss, expected, rtol=0, atol=0)


def test_a_row_with_nothing_to_score_takes_no_part(model):
    ids, noise = some_ids(3, 5), some_noise(3)
    labels = ids.clone()
    labels[1] = -100
    rest = {name: each[[0, 2]] for name, each in noise.items()}
    expected = model(ids[[0, 2]], labels=labels[[0, 2]], **rest).loss
    torch.testing.assert_close(model(ids, labels=labels, **noise).loss, expected, **CLOSE)


def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(model):
    """Rows of unequal numbers of scored tokens: the mean of the micro-batches' means would differ."""
    ids, noise = some_ids(6, 7), some_noise(6)
    labels = ids.clone()
    labels[0, 1:] = labels[3, :5] = labels[5, 2:] = -100
    whole = model(ids, labels=labels, **noise).loss
    whole.backward()
    expected, total = gradients(model), 0.0
    for rows in torch.tensor([5, 0, 3, 2, 4, 1]).split(2):
        part = {name: each[rows] for name, each in noise.items()}
        loss = model(ids[rows], labels=labels[rows], num_items_in_batch=(labels != -100).sum(), **part).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)  # as CLOSE
    # Weights of up to n + 1 multiply what rounding leaves.
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-4)


def test_padding_changes_neither_loss_nor_gradient(model):
    """The noise of a row is that of its key, wherever its padding lies."""
    rows, noise = [some_ids(1, length, seed=length)[0] for length in (4, 7, 2, 5)], some_noise(4)
    total = torch.zeros(())
    for i, row in enumerate(rows):
        own = {name: each[i : i + 1] for name, each in noise.items()}
        total = total + model(row[None], labels=row[None], num_items_in_batch=18, **own).loss
    total.backward()
    expected = gradients(model)
    for side in ("left", "right"):
        ids, mask = padded(rows, side, 9)
        loss = model(ids, mask, labels=ids, **noise).loss
        torch.testing.assert_close(loss, total, **CLOSE)
        loss.backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_never_holds_a_tensor_of_batch_by_length_by_vocabulary(family, monkeypatch):
    vocab_size = 1024
    model, ids = small_model(family, vocab_size=vocab_size), some_ids(4, 32, vocab_size)
    for module in [each for name, each in sys.modules.items() if name.startswith("prime_v2.")]:
        if hasattr(module, "CHUNK_ELEMENTS_CPU"):
            monkeypatch.setattr(module, "CHUNK_ELEMENTS_CPU", 8 * vocab_size)
    limit = ids.numel() * vocab_size  # 131,072; the next largest, embedding and head, are 16,384
    noise = some_noise(4) | {"noise_levels": torch.full((4,), 0.9, dtype=torch.double)}  # most tokens are scored
    with LargestTensor() as chunked:
        model(ids, labels=ids, **noise).loss.backward()
    assert 8 * vocab_size <= chunked.numel <= limit / 4
    with LargestTensor() as full:
        nn.functional.cross_entropy(model(ids, **times_of(model, 4)).logits.flatten(0, 1), ids.flatten()).backward()
    assert full.numel >= limit, "the check sees full logits where there are any"


# Transformers' options


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(model, reentrant):
    ids, calls = some_ids(), []
    model.train().model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(ids, labels=ids, **some_noise(3)).loss.backward()
    expected, once = gradients(model), len(calls)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids, **some_noise(3)).loss.backward()
    assert len(calls) == 3 * once, "once, then once more for the backward pass"
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-4)


# Transformers' norm of queries and keys has float32 weights under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_a_bfloat16_network_and_autocast_are_close_to_float32(kind, tmp_path):
    """bfloat16 rounds each of some ten steps to 2**-9."""
    model, ids = fresh_network(kind, initializer_range=0.1), some_ids()
    call = {"labels": ids, **some_noise(3)}
    loss, logits = model(ids, **call).loss, model(ids, **times_of(model, 3)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(ids, **call).loss
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for found in (cast, half(ids, **call).loss):
        assert found.dtype == torch.float32 and found != loss
        torch.testing.assert_close(found, loss, rtol=0.03, atol=0)
        found.backward()
    assert {each.grad.dtype for each in half.parameters() if each.grad is not None} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, buffer in model.named_buffers():
        assert torch.equal(half.get_buffer(name), buffer), "the code table and the frequencies"
    found, finite = half(ids, **times_of(model, 3)).logits, logits.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert (found[finite] - logits[finite]).norm() < 0.05 * logits[finite].norm()


def test_trainer_trains_evaluates_and_predicts(kind, tmp_path):
    data = [{"input_ids": each, "labels": each} for each in some_ids(5)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(fresh_network(kind), arguments, train_dataset=data, eval_dataset=data)
    torch.manual_seed(0)
    before = trainer.evaluate()["eval_loss"]
    assert 0 < trainer.train().training_loss < 40
    torch.manual_seed(0)
    assert 0 < trainer.evaluate()["eval_loss"] != before
    assert 0 < trainer.predict(data).metrics["test_loss"] < 40


# Saving and loading


def test_a_saved_model_loads_equal_and_without_a_word(kind, tmp_path, caplog):
    model, ids = network(kind), some_ids()
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and not caplog.records
    remote = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    expected = model(ids, **times_of(model, 3)).logits
    for each in (loaded, remote):
        torch.testing.assert_close(each(ids, **times_of(model, 3)).logits, expected, rtol=0, atol=0)
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) == (not model.config.tie_word_embeddings)
    backbone = type(model.model).from_pretrained(tmp_path)
    for name, weight in model.model.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], weight), name


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_writes_safetensors_and_the_code_that_the_hub_needs(family, tmp_path):
    entry = FAMILIES[family]
    small_model(family).save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= written
    assert {f"{module}.py" for module in (entry.config[0], entry.model[0], "code_table_prime_v2")} <= written
    config, model_class = json.loads((tmp_path / "config.json").read_text()), ".".join(entry.model)
    assert config["architectures"] == [entry.model[1]] and config["model_type"] == entry.model_type
    head = "AutoModelForCausalLM" if entry.config_class.causal else "AutoModelForMaskedLM"
    assert config["auto_map"] == {"AutoConfig": ".".join(entry.config), "AutoModel": model_class, head: model_class}


@pytest.mark.parametrize("kind", TABLES)
def test_the_stored_code_table_wins_over_the_computed_one_and_a_missing_one_is_computed(kind, tmp_path):
    """The table is data: a checkpoint means the same for ever, whatever computes tables later."""
    model = fresh_network(kind, shuffle_seed=3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    (name,) = (each for each in weights if each.endswith("codes"))
    changed = weights[name].clone()
    changed[[0, 1]] = changed[[1, 0]]
    save_file(weights | {name: changed}, path, metadata={"format": "pt"})
    assert torch.equal(type(model).from_pretrained(tmp_path).code_table.codes, changed)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    assert torch.equal(type(model).from_pretrained(tmp_path).code_table.codes, model.code_table.build())


# Bad input

LONG = torch.zeros(1, LIMIT + 1, dtype=torch.long)
BAD_INPUT = {
    "large id": ({"input_ids": torch.tensor([[0, VOCAB_SIZE + 1]])}, r"token ids span \[0, 12\]"),
    "negative id": ({"input_ids": torch.tensor([[-1, 3]])}, r"token ids span \[-1, 3\]"),
    "floats": ({"input_ids": torch.tensor([[0.0, 1.0]])}, "token ids must be integers, not torch.float32"),
    "one axis": ({"input_ids": torch.tensor([1, 2])}, r"token ids (are )?\(B, L\)"),
    "no row": ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "the batch has 0 rows of 3 tokens|0 rows of 3"),
    "no token": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "1 rows of 0 tokens"),
    "too long": ({"input_ids": LONG}, "13 tokens, but max_position_embeddings=12"),
    "mask": ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\), but the input has \(1, 2\)"),
    "padding": ({"attention_mask": torch.zeros(1, 2)}, "row 0 of attention_mask has only padding; drop that row"),
}
BAD_LABELS = {
    "nothing scored": ({"labels": torch.full((2, 3), -100)}, "no label to score: every one is -100 or padding"),
    "padding": ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "row 1 of attention_mask has only padding"),
    "all padding": ({"attention_mask": torch.zeros(2, 3)}, "no label to score: every one is -100 or padding"),
    "large label": ({"labels": torch.tensor([[1, 2, 3], [4, 5, MASK]])}, r"token ids span \[1, 11\], .* in \[0, 10\]"),
    "negative label": ({"labels": torch.tensor([[1, 2, 3], [4, 5, -1]])}, r"token ids span \[-1, 5\]"),
    "shifted": ({"labels": torch.tensor([[2, 3, 4], [5, 6, 7]])}, r"labels\[0, 0\]=2 differs from input_ids=1"),
    "large id": (
        {"input_ids": torch.tensor([[1, 2, 3], [12, 5, 6]]), "labels": torch.tensor([[1, 2, 3], [-100, 5, 6]])},
        r"token ids span \[.*12\]",
    ),
    "fewer rows": ({"labels": torch.tensor([[1, 2, 3]])}, r"labels has shape \(1, 3\), but input_ids \(2, 3\)"),
    "mask": ({"attention_mask": torch.ones(2, 1)}, r"attention_mask has shape \(2, 1\), but input_ids \(2, 3\)"),
    "one axis": ({"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}, r"input_ids has shape \(2,\)"),
    "no row": (dict.fromkeys(("input_ids", "labels"), torch.zeros(0, 3, dtype=torch.long)), r"has shape \(0, 3\)"),
    "too long": (dict.fromkeys(("input_ids", "labels"), LONG), "13 tokens, but max_position_embeddings=12"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(kind, case):
    arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        network(kind)(**{"input_ids": torch.tensor([[1, 2]]), **times_of(network(kind), 1), **arguments})


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused(kind, case):
    changes, message = BAD_LABELS[case]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=message):
        network(kind)(**({"input_ids": ids, "labels": ids} | changes))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ARM"])
def test_a_vocabulary_that_codes_or_noise_fix_is_not_resized(kind):
    with pytest.raises(ValueError, match="vocab_size=11 is "):
        network(kind).resize_token_embeddings(12)
