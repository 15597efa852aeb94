"""The public surface of every family: keywords, ids, masks and seeds that are taken, and those refused by name.

A new entry of `FAMILIES` falls under all of this.
"""

import inspect

import numpy as np
import pytest
import torch
from networks import LIMIT, TINY, VOCAB_SIZE, times_of
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerFast

from prime_v2.families import FAMILIES
from prime_v2.validation_keywords_prime_v2 import nearest

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
PROMPT = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
TARGET = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    """A small random network of each family, in evaluation mode; nobody changes it."""
    torch.manual_seed(0)
    family = FAMILIES[request.param]
    return family.model_class(family.config_class(**TINY, bos_token_id=3)).eval()


@pytest.fixture(params=["forward", "loss", "log_likelihood", "greedy_matches", "generate"])
def call(request, model):
    """(a public function as f(ids, mask, **keywords), its name, what it is called with in the first place)."""
    times = times_of(model, 2)
    labels = {"labels": IDS.masked_fill(PROMPT == 1, -100)}
    noise = {"noise_keys": torch.arange(2), "noise_levels": torch.full((2,), 0.5, dtype=torch.double)}
    return {
        "forward": (model, "forward", times),
        "loss": (model, "forward", labels | noise),
        "log_likelihood": (model.log_likelihood, "log_likelihood", {"prompt_mask": PROMPT, "num_samples": 2}),
        "greedy_matches": (model.greedy_matches, "greedy_matches", {"target_mask": TARGET}),
        "generate": (model.generate, "generate", {"max_new_tokens": 2, "seed": 1}),
    }[request.param]


def answer(call, ids=IDS, mask=None, **more):
    """What the function gives, as a list of tensors to compare."""
    function, _, keywords = call
    found = function(ids, mask, **(keywords | more))
    if isinstance(found, torch.Tensor):
        return [found]
    named = ("loss", "logits", "value", "stderr", "matches")
    return [getattr(found, name) for name in named if getattr(found, name, None) is not None]


def same(first, second) -> bool:
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Keywords


@pytest.mark.parametrize(("typo", "meant"), [("attention_mas", "attention_mask"), ("input_idss", "input_ids")])
def test_a_keyword_that_is_misspelt_is_refused_with_the_right_one(call, typo, meant):
    for value in (MASK, None, 0):
        with pytest.raises((ValueError, TypeError), match=f"{typo}.*{meant}"):
            answer(call, **{typo: value})


def test_a_keyword_that_is_like_no_other_is_refused_by_its_name_only(call):
    with pytest.raises((ValueError, TypeError), match="zygote") as refused:
        answer(call, zygote=1)
    assert "did you mean" not in str(refused.value)


def test_a_name_is_near_only_where_letters_are_shared():
    assert nearest("temprature", ["temperature", "top_p"]) == "temperature"
    assert nearest("steps", ["seed", "top_p", "max_denoising_steps"]) is None
    assert nearest("objectiv", ["objective", "loss_weight"]) == "objective"


def test_what_peft_and_transformers_pass_without_a_meaning_changes_nothing(model):
    times = times_of(model, 2)
    idle = {"inputs_embeds": None, "past_key_values": None, "token_type_ids": None, "task_ids": None}
    idle |= {"use_cache": False, "return_dict": True, "output_attentions": None, "output_hidden_states": False}
    assert torch.equal(model(IDS, **times, **idle).logits, model(IDS, **times).logits)
    assert isinstance(model(IDS, **times, return_dict=False), tuple)
    assert len(model(IDS, **times, output_hidden_states=True).hidden_states) == 2


def test_what_the_model_makes_no_use_of_is_refused_by_its_name(model):
    times = times_of(model, 2)
    given = {
        "token_type_ids": torch.zeros_like(IDS),
        "is_causal": not model.config.causal,
        "output_router_logits": True,
    }
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        given |= {"inputs_embeds": torch.zeros(2, 4, 16), "use_cache": True}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"forward makes no use of {name}="):
            model(IDS, **times, **{name: value})
    with pytest.raises(ValueError, match="cu_seq_lens_q=<tensor of shape .*> is read by flash attention only"):
        model(IDS, **times, cu_seq_lens_q=torch.tensor([0, 4, 8]))


def test_the_backbone_refuses_what_the_model_refuses(model):
    first = model.encode(IDS) if hasattr(model, "encode") else IDS
    for name, value in {"zygote": 1, "attention_maks": MASK}.items():
        with pytest.raises(ValueError, match=name):
            model.model(first, **{name: value})


def test_noise_without_labels_is_refused(model):
    if model.config.causal:
        return  # nothing is drawn, with labels or without
    times = times_of(model, 2)
    for name, value in {"noise_keys": torch.arange(2), "noise_levels": torch.full((2,), 0.5)}.items():
        with pytest.raises(ValueError, match=f"{name} was given without labels"):
            model(IDS, **times, **{name: value})


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_passes_nothing_that_is_refused(model, task_type):
    if task_type is not None and not hasattr(model, "prepare_inputs_for_generation"):
        return  # which peft asks for
    torch.manual_seed(0)
    family = next(each for each in FAMILIES.values() if each.model_class is type(model))
    base = family.model_class(model.config)
    wrapped = get_peft_model(base, LoraConfig(task_type=task_type, target_modules=["q_proj"]))
    wrapped(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss.backward()


# Ids


@pytest.mark.parametrize(
    "kind",
    [
        lambda ids: ids.tolist(),
        lambda ids: [tuple(row) for row in ids.tolist()],
        lambda ids: list(ids),
        lambda ids: ids.numpy(),
        lambda ids: ids.numpy().astype(np.uint16),
        lambda ids: ids.int(),
        lambda ids: BatchEncoding({"input_ids": ids}),
        lambda ids: {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()},
    ],
    ids=["lists", "tuples", "tensors", "array", "uint16", "int32", "BatchEncoding", "mapping"],
)
def test_ids_of_every_kind_that_says_which_they_are_are_taken(call, kind):
    assert same(answer(call, kind(IDS)), answer(call))


def test_a_single_list_of_ids_is_a_row(model):
    expected = model.log_likelihood(IDS[:1], num_samples=2).value
    for one in (IDS[0].tolist(), IDS[0].numpy(), {"input_ids": IDS[0].tolist(), "attention_mask": [1, 1, 1, 1]}):
        assert torch.equal(model.log_likelihood(one, num_samples=2).value, expected)


def test_a_mapping_brings_its_mask(call):
    batch = BatchEncoding({"input_ids": IDS, "attention_mask": MASK})
    more = {"labels": IDS.masked_fill(MASK == 0, -100)} if "labels" in call[2] else {}
    assert same(answer(call, batch, **more), answer(call, IDS, MASK, **more))
    with pytest.raises(ValueError, match="attention_mask was given twice"):
        answer(call, batch, MASK)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3], [4]], "the rows of input_ids have different lengths; pad them .*padding=True"),
        ({"input_ids": [[1, 2, 3], [4]]}, "the rows of input_ids have different lengths"),
        ("some text", "input_ids is text; give a tensor, as tokenizer"),
        (["some", "text"], "input_ids must be integers, not text"),
        ([[0.5, 1.0]], "input_ids must be integers, not float64"),
        (np.ones((2, 2, 2), dtype=int), r"input_ids has shape \(2, 2, 2\)"),
        ({"input_ids": IDS, "pixels": 3}, "input_ids is a mapping with 'input_ids', 'pixels'"),
        ({"ids": IDS}, "input_ids is a mapping with 'ids'"),
        (IDS.float(), "token ids must be integers, not torch.float32"),
        (IDS.to(torch.uint8), "token ids must be of 64 or 32 bits"),
        (IDS == 1, "token ids must be integers, not torch.bool"),
        (7, "input_ids is of type int"),
    ],
    ids=str,
)
def test_ids_that_could_be_anything_are_refused(call, ids, message):
    more = {"labels": ids} if "labels" in call[2] and isinstance(ids, torch.Tensor) else {}
    with pytest.raises(ValueError, match=message):
        answer(call, ids, **more)


# Masks


@pytest.mark.parametrize("name", ["attention_mask", "prompt_mask", "target_mask"])
@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.bool,
        torch.Tensor.float,
        torch.Tensor.int,
        lambda each: each.tolist(),
        lambda each: each.numpy() > 0,
    ],
    ids=["bool", "float", "int32", "lists", "array"],
)
def test_masks_of_zeros_and_ones_mean_the_same_in_every_form(call, name, change):
    if name != "attention_mask" and name not in call[2]:
        return
    more = {"labels": IDS.masked_fill(MASK == 0, -100)} if "labels" in call[2] else {}
    if name == "attention_mask":
        found, expected = answer(call, IDS, change(MASK), **more), answer(call, IDS, MASK, **more)
    else:
        found, expected = answer(call, **{name: change(call[2][name])}), answer(call)
    assert same(found, expected)


@pytest.mark.parametrize("name", ["attention_mask", "prompt_mask", "target_mask"])
def test_masks_of_other_conventions_are_refused_with_their_value(call, name):
    if name != "attention_mask" and name not in call[2]:
        return
    more = {"labels": torch.full_like(IDS, -100).index_put((torch.tensor(1), torch.tensor(1)), IDS[1, 1])}
    for value in (-INF, INF, NAN, -1, 0.5, 2, torch.finfo(torch.float32).min):
        for dtype in [torch.float32] if isinstance(value, float) else [torch.float32, torch.long, torch.int8]:
            mask = torch.tensor([[0, 0, value, value], [0, 0, 0, value]]).to(dtype)
            call_with = {"attention_mask": None, **call[2], name: mask} | (more if "labels" in call[2] else {})
            with pytest.raises(
                ValueError, match=rf"{name} holds {mask[0, 2].item()}, but a mask is bool, or 1".replace("+", r"\+")
            ):
                call[0](IDS, **call_with)


def test_masks_of_another_shape_are_refused(call):
    for mask in (MASK[:1], MASK[:, :3], MASK[0]):
        with pytest.raises(ValueError, match=r"attention_mask has shape"):
            answer(call, IDS, mask)


def test_a_mask_of_four_axes_is_taken_by_the_family_that_transformers_makes_it_for(model):
    times = times_of(model, 2)
    seen = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)
    if not model.config.causal:
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 4, 4\), but the input has \(2, 4\)"):
            model(IDS, seen, **times)
        return
    expected = model(IDS).logits
    added = torch.zeros(2, 1, 4, 4).masked_fill(~seen, -INF)
    for mask in (seen, added):
        torch.testing.assert_close(model(IDS, mask).logits, expected)
    with pytest.raises(ValueError, match="such a mask is bool, or 0 where it attends"):
        model(IDS, seen.float())
    with pytest.raises(ValueError, match="such a mask is bool, or 0 where it attends"):
        model(IDS, seen.long())
    eager = type(model)(type(model.config)(**TINY, attn_implementation="eager")).eval()
    with pytest.raises(ValueError, match="is bool, which eager attention would add"):
        eager(IDS, seen)


# Seeds and numbers


@pytest.mark.parametrize("seed", [1.0, 1.5, "0", True, np.bool_(True), [0], torch.tensor(1), 2**64, -(2**63) - 1])
def test_seeds_that_are_no_integers_are_refused(model, seed):
    with pytest.raises(ValueError, match="seed="):
        model.log_likelihood(IDS, seed=seed)
    with pytest.raises(ValueError, match="seed="):
        model.generate(IDS, max_new_tokens=2, seed=seed)


def test_integers_of_numpy_are_integers(model):
    options = {"num_samples": 4, "seed": 5, "tokens_per_pass": 64}
    numbers = {name: np.int64(value) for name, value in options.items()}
    assert torch.equal(model.log_likelihood(IDS, **numbers).value, model.log_likelihood(IDS, **options).value)
    drawn = [model.generate(IDS, max_new_tokens=kind(3), seed=kind(5)) for kind in (int, np.int32)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": True}, "num_samples=True must be an integer of at least 1"),
        ({"num_samples": 2.0}, "num_samples=2.0 must be an integer"),
        ({"num_samples": "4"}, "num_samples='4' must be an integer"),
        ({"num_samples": -1}, "num_samples=-1 must be an integer of at least 1"),
        ({"round_number": -1}, "round_number=-1 must be an integer of at least 0"),
        ({"round_number": 1.0}, "round_number=1.0 must be an integer"),
        ({"tokens_per_pass": 0}, "tokens_per_pass=0 must be an integer of at least 1"),
        ({"exhaustive": "no"}, "exhaustive='no' must be True or False"),
        ({"return_samples": 1}, "return_samples=1 must be True or False"),
        ({"keys": torch.arange(2.0)}, "keys=.* must be 2 integers of 64 bits"),
        ({"keys": torch.arange(3)}, "keys=.* must be 2 integers of 64 bits"),
        ({"keys": 3}, "keys=3 must be 2 integers of 64 bits"),
        ({"num_sample": 4}, r"log_likelihood has no argument num_sample=4; did you mean num_samples\?"),
        ({"method": "sampler", "cache": "dual"}, r"log_likelihood .*generation_config=PrimeV2GenerationConfig\(cache"),
    ],
    ids=str,
)
def test_other_numbers_of_a_likelihood_are_checked_too(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.log_likelihood(IDS, **options)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"noise_keys": torch.arange(3)}, r"noise_keys is torch.int64 of shape \(3,\); give a tensor of 2 integers"),
        ({"noise_keys": torch.arange(2.0)}, "noise_keys is torch.float32"),
        ({"noise_levels": torch.arange(2)}, "noise_levels is torch.int64"),
        ({"noise_levels": torch.full((2,), 1.5)}, r"noise_levels holds 1.5, outside \(0, 1\)"),
        ({"noise_levels": torch.full((2,), NAN)}, "noise_levels holds nan"),
        ({"noise_levels": 0.5}, "noise_levels is 0.5"),
    ],
    ids=str,
)
def test_noise_that_is_none_is_refused(model, noise, message):
    if model.config.causal:
        return  # nothing is drawn
    with pytest.raises(ValueError, match=message):
        model(IDS, labels=IDS, **noise)


# Options of generation


def test_copies_of_a_row_differ_repeat_with_the_seed_and_stand_together(model):
    """Three copies of eight tokens out of eleven agree by chance in 11**-8 of all cases, and the seed is fixed."""
    options = {"max_new_tokens": 8, "num_return_sequences": 3, "do_sample": True}
    prompts = IDS[:, :3]
    first, again, other = (model.generate(prompts, seed=seed, **options) for seed in (1, 1, 2))
    assert first.shape == (6, 11)
    assert torch.equal(first[:, :3], prompts.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in first[:3].tolist()}) == len({tuple(row) for row in first[3:].tolist()}) == 3
    assert torch.equal(first, again) and not torch.equal(first, other)
    padded = model.generate(prompts, MASK[:, 1:], seed=1, return_dict_in_generate=True, **options).sequences
    assert padded.shape == (6, 11)


def test_copies_are_what_the_rows_repeated_by_hand_give(model):
    options = {"max_new_tokens": 4, "seed": 3}
    asked = model.generate(IDS, num_return_sequences=2, **options)
    assert torch.equal(asked, model.generate(IDS.repeat_interleave(2, dim=0), **options))
    assert model.generate(num_return_sequences=2, **options).shape[0] == 2


def test_copies_of_a_result_that_is_not_drawn_are_refused(model):
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(IDS, max_new_tokens=2, do_sample=False, num_return_sequences=2)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, num_return_sequences=1).shape == (2, 6)
    with pytest.raises(ValueError, match="a streamer takes one sequence"):
        model.generate(IDS[:1], max_new_tokens=2, num_return_sequences=2, streamer=_Silent())
    for bad in (0, -1, 2.0, "2", True):
        with pytest.raises(ValueError, match="num_return_sequences=.* must be an integer of at least 1"):
            model.generate(IDS, max_new_tokens=2, num_return_sequences=bad)


class _Silent:
    def put(self, value):
        pass

    def end(self):
        pass


IDLE = {
    "use_cache": True,
    "num_beams": 1,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "num_return_sequences": np.int64(1),
    "temperature": np.float32(1.0),
    "top_p": np.float64(1.0),
    "output_scores": False,
    "early_stopping": False,
}


def test_options_that_change_nothing_are_taken_from_a_call_and_from_a_configuration(model):
    expected = model.generate(IDS, max_new_tokens=4, seed=5)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, seed=5, **IDLE), expected)
    for name, value in IDLE.items():
        config = GenerationConfig(max_new_tokens=4, do_sample=True, **{name: value})
        assert torch.equal(model.generate(IDS, generation_config=config, seed=5), expected), name


def test_options_at_work_are_refused_by_name_where_they_are_not_done(model):
    if model.config.causal:
        return  # Transformers' own generation does them
    for name, value in {"num_beams": 2, "top_k": 50, "repetition_penalty": 1.1, "min_p": 0.1}.items():
        with pytest.raises(ValueError, match=f"{name}={value} is not an option of this model's generate"):
            model.generate(IDS, **{name: value})
        with pytest.raises(ValueError, match=f"{name}={value} is not an option of this model's generate"):
            model.generate(IDS, generation_config=GenerationConfig(do_sample=True, **{name: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 0.5}, r"did you mean temperature\?"),
        ({"max_new_token": 3}, r"did you mean max_new_tokens\?"),
        ({"steps": 3}, "steps=3"),
        ({"labels": IDS}, "labels=<tensor of shape"),
        ({"num_samples": 3}, "num_samples=3"),
    ],
    ids=str,
)
def test_options_that_do_not_exist_are_refused_with_one_that_is_near(model, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        model.generate(IDS, **options)
    assert "did you mean seed" not in str(refused.value)
    if "labels" not in options:
        with pytest.raises(ValueError, match=message):
            model.generate(IDS, generation_config=GenerationConfig(**options))


def test_numbers_of_numpy_mean_what_they_are(model):
    plain = {"max_new_tokens": 4, "seed": 2, "temperature": 0.5, "top_p": 0.75, "eos_token_id": 3, "pad_token_id": 0}
    kinds = {float: np.float32, int: np.int64}
    numbers = {name: kinds[type(value)](value) for name, value in plain.items()}
    assert torch.equal(model.generate(IDS, **numbers), model.generate(IDS, **plain))
    assert torch.equal(model.generate(IDS, temperature=2, seed=1), model.generate(IDS, temperature=2.0, seed=1))


def test_the_limits_that_the_tests_use_hold(model):
    assert model.config.vocab_size == VOCAB_SIZE and model.config.max_position_embeddings == LIMIT


def test_what_a_chat_template_gives_is_a_prompt(model):
    """A BatchEncoding in Transformers 5, of lists or of tensors."""
    base = WordLevel({"the": 0, "cat": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(base))
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }} {% endfor %}"
    messages = [{"role": "user", "content": "the cat"}]
    options = {"max_new_tokens": 3, "seed": 1}
    expected = model.generate(torch.tensor([[0, 1]]), **options)
    for form in ({}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
        found = model.generate(tokenizer.apply_chat_template(messages, **form), **options)
        assert torch.equal(found, expected)
