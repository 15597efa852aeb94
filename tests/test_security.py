"""Poisoned and damaged folders: each is refused with a sentence, through Auto* and through the commands."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_runs import refused, run
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from prime_v2 import (
    PrimeV2Config,
    PrimeV2ForCausalLM,
    PrimeV2ForMaskedDiffusion,
    PrimeV2Model,
    PrimeV2Tokenizer,
    build_tokenizer,
)
from prime_v2.configuration_arm_prime_v2 import PrimeV2ArmConfig
from prime_v2.configuration_uniform_prime_v2 import PrimeV2UniformConfig
from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.tokenization.bpe import train_bpe
from prime_v2.validation_config_prime_v2 import MAPPINGS, readable_json
from prime_v2.validation_weights_prime_v2 import check_headers

TEXT = ["the quick brown fox jumps over the lazy dog"] * 3
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
TABLE = "code_table.codes"
JSON_FILES = (*MAPPINGS, "model.safetensors.index.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with nothing wrong."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(train_bpe(TEXT, 270), special_tokens={"eos_token": "<|endoftext|>"})
    model = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=len(tokenizer.code_table), **SHAPE))
    folder = tmp_path_factory.mktemp("security") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of it to poison."""
    return shutil.copytree(whole, tmp_path / "model")


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def without(name: str):
    return lambda weights: {each: value for each, value in weights.items() if each != name}


def changed(name: str, change):
    return lambda weights: weights | {name: change(weights[name].clone()).contiguous()}


def repeat_a_code(codes):
    codes[7] = codes[3]
    return codes


def set_entry(row: int, value: int):
    def change(codes):
        codes[row, 0] = value
        return codes

    return change


class Bomb:
    """Its pickle makes the file that it names, when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.weight"), "lack 1 tensor that config.json asks for, the first being lm_head.weight"),
        (without("model.layers.1.mlp.up_proj.weight"), "lack 1 tensor .* model.layers.1.mlp.up_proj.weight"),
        (
            changed("lm_head.weight", lambda each: each[:9]),
            r"other shapes for 1 .* with \[9, 16\] instead of \[270, 16\]",
        ),
        (changed("model.norm.weight", lambda each: each.long()), "other types for 1 .* I64 instead of floating-point"),
        (changed("model.norm.weight", lambda each: each > 0), "other types for 1 .* BOOL instead of floating-point"),
        (changed(TABLE, lambda each: each.float()), "other types for 1 .* F32 instead of integers"),
        (lambda weights: weights | {"model.layers.2.x": torch.zeros(1)}, "hold 1 tensor that .* does not ask for"),
        (changed(TABLE, repeat_a_code), "gives 270 tokens 269 codes; every token needs a code of its own"),
        (changed(TABLE, set_entry(3, 2)), r"has digits in \[0, 2\], but a digit of base 2 is in \[0, 1\]"),
        (changed(TABLE, set_entry(3, -1)), r"has digits in \[-1, 1\]"),
        (changed(TABLE, set_entry(-1, 0)), "last row of the code table .* is the mask token's, all 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused_everywhere(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=message):
        load_model_and_tokenizer(folder)


def test_a_command_needs_the_table_in_the_weights(folder):
    change_weights(folder, without(TABLE))
    assert "lack 1 tensors" in refused("ppl", folder, "docs")


def test_a_table_that_comes_with_the_weights_must_be_there(folder):
    change_json(folder / "config.json", code_source="data")
    PrimeV2ForMaskedDiffusion.from_pretrained(folder)
    change_weights(folder, without(TABLE))
    with pytest.raises(ValueError, match="lack 1 tensor that config.json asks for, the first being code_table.codes"):
        PrimeV2ForMaskedDiffusion.from_pretrained(folder)


def test_a_configuration_with_fewer_layers_than_the_weights_is_refused(folder):
    change_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match="hold 9 tensors that config.json does not ask for"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert "hold 9 tensors that config.json does not ask for" in refused("generate", folder)


def test_integers_of_any_width_are_a_code_table_and_floats_of_any_width_are_weights(folder):
    before = PrimeV2ForMaskedDiffusion.from_pretrained(folder, dtype=torch.float32)
    change_weights(folder, changed(TABLE, lambda each: each.to(torch.uint8)))
    change_weights(folder, changed("model.norm.weight", lambda each: each.double()))
    after = PrimeV2ForMaskedDiffusion.from_pretrained(folder, dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )


def test_missing_tensors_are_drawn_only_where_that_is_asked_for(folder):
    change_weights(folder, without("lm_head.weight"))
    model = PrimeV2ForMaskedDiffusion.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.isfinite().all()


def test_the_backbone_takes_its_part_of_the_weights_and_no_less(folder):
    assert len(PrimeV2Model.from_pretrained(folder).layers) == 2
    change_weights(folder, without("model.norm.weight"))
    with pytest.raises(ValueError, match="lack 1 tensor .* norm.weight"):
        PrimeV2Model.from_pretrained(folder)


def test_sharded_weights_are_checked_over_all_their_files(folder, tmp_path):
    model = PrimeV2ForMaskedDiffusion.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    again = PrimeV2ForMaskedDiffusion.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="lack .* tensors? that config.json asks for"):
        check_headers(model, map(str, files[:-1]), "one shard less")


def test_other_families_are_checked_alike(tmp_path):
    torch.manual_seed(0)
    model = PrimeV2ForCausalLM(PrimeV2ArmConfig(vocab_size=20, num_subtokens=5, base=2, **SHAPE))
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, changed(f"model.{TABLE}", repeat_a_code))
    for load in (PrimeV2ForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="gives 20 tokens 19 codes"):
            load.from_pretrained(tmp_path, trust_remote_code=True)
    change_weights(tmp_path, without("model.embed_subtokens.table.weight"))
    with pytest.raises(ValueError, match="lack 1 tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_no_number(folder, tmp_path, value):
    change_weights(folder, changed("model.norm.weight", lambda each: each.fill_(value)))
    (tmp_path / "text.txt").write_text(TEXT[0])
    assert "not finite" in refused("ppl", folder, tmp_path / "text.txt")
    for kind in ("--sample", "--greedy"):
        assert "logits are not finite" in refused("generate", folder, "--max-new-tokens", 2, kind)


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "consolidated.00.pth", "weights.pt"])
def test_a_pickle_is_never_read(folder, tmp_path, name):
    trap = tmp_path / "exploded"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(trap)))
    assert f"{name}, a pickle, which can run code when it is read" in refused("generate", folder)
    for load in (PrimeV2ForMaskedDiffusion, AutoModel):
        with pytest.raises(OSError, match=r"no file named model.safetensors"):
            load.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="use_safetensors=False asks for pickled weights"):
        PrimeV2ForMaskedDiffusion.from_pretrained(folder, use_safetensors=False)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Bomb(trap)))
    assert trap.exists()  # so the pickle would have shown that it was read


# Configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2**40, "head_dim": 8}, "hidden_size=1099511627776 is more than 262144"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 4096"),
        ({"vocab_size": 2**31, "mask_token_id": 2**31}, "vocab_size=2147483648 is more than 16777216"),
        ({"base": 2**40, "num_subtokens": 1}, "base=1099511627776 is more than 16777216"),
        ({"num_subtokens": 10**10}, "num_subtokens=10000000000 digits of base 2 do not pack into 62 bits"),
        (
            {"hidden_size": 2**17, "num_hidden_layers": 4000, "head_dim": 64, "intermediate_size": None},
            r"weights, more than 4.4e\+12",
        ),
        ({"num_hidden_layers": 402}, "lack 3600 tensors"),
        ({"hidden_size": 2**14, "head_dim": None, "intermediate_size": None}, "have other shapes for"),
        ({"rms_norm_eps": 1e400}, "rms_norm_eps=inf must be positive and finite"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral', not one of default, linear"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0, but it is a positive number"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "Missing required keys .* {'factor'}"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5, but whole heads"),
    ],
    ids=str,
)
def test_configurations_of_absurd_networks_are_refused_before_memory_is_taken(folder, changes, message):
    change_json(folder / "config.json", **changes)
    assert re.search(message, refused("generate", folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@v1:forward"},
        {"_attn_implementation_internal": "paged|someone/kernel"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"attn_implementation": "flash_attention_2"},  # where that is not installed, Transformers downloads a kernel
        {"experts_implementation": "someone/kernel"},
    ],
    ids=str,
)
def test_a_configuration_names_no_code(folder, changes):
    change_json(folder / "config.json", **changes)
    message = f"config.json has (a )?{next(iter(changes))}"
    for load in (PrimeV2ForMaskedDiffusion, AutoModel, PrimeV2Config):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=message):
        PrimeV2Config.from_json_file(folder / "config.json")
    assert re.search(message, refused("generate", folder))


def test_what_the_user_names_himself_is_his_choice(folder):
    change_json(folder / "config.json", attn_implementation="eager")
    assert PrimeV2ForMaskedDiffusion.from_pretrained(folder).config._attn_implementation == "eager"
    model = PrimeV2ForMaskedDiffusion.from_pretrained(folder, attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert PrimeV2Config.from_pretrained(folder, attn_implementation="own/code")._attn_implementation == "own/code"


@pytest.mark.parametrize("levels", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_of_any_depth_is_a_sentence(folder, name, levels):
    (folder / name).write_text(levels)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    assert re.search(f"({name}|JSON file of .*) is nested too deeply to be read", refused("generate", folder))
    of_tokenizer = "token" in name or name == "code_table.json"
    load = PrimeV2Tokenizer if of_tokenizer else PrimeV2ForMaskedDiffusion
    with pytest.raises(ValueError, match="is nested too deeply to be read"):
        load.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', '[["a"]]', '{"a":'])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_of_another_kind_is_a_sentence_that_names_the_file(folder, name, content):
    (folder / name).write_text(content)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    message = rf"{re.escape(name)} (holds .* must (hold|be) a mapping|is not JSON .*).* save .* again"
    with pytest.raises(ValueError, match=message):
        load_model_and_tokenizer(folder)
    of_tokenizer = "token" in name or name == "code_table.json"
    load = PrimeV2Tokenizer if of_tokenizer else PrimeV2ForMaskedDiffusion
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "code_table.json"])
def test_a_command_refuses_json_of_another_kind(folder, name):
    (folder / name).write_text("[]")
    assert re.search(f"{name} holds .* a mapping", refused("generate", folder))


def test_a_configuration_of_another_kind_is_refused_by_its_class(tmp_path):
    for load, name in ((PrimeV2Config, "config.json"), (PrimeV2GenerationConfig, "generation_config.json")):
        (tmp_path / name).write_text("[]")
        with pytest.raises(ValueError, match=f"{name} holds .* a mapping"):
            load.from_pretrained(tmp_path)


def test_an_error_of_another_cause_is_not_laid_to_json_that_is_not_read(folder):
    (folder / "notes.json").write_text("[]")
    with pytest.raises(TypeError, match="of another cause"), readable_json(folder):
        raise TypeError("of another cause")


def test_sizes_that_only_one_family_has_are_bounded_too():
    with pytest.raises(Exception, match="time_embedding_size=1073741824 must be even and at least 2, at most 262144"):
        PrimeV2UniformConfig(vocab_size=20, time_embedding_size=2**30, **SHAPE)


# Tokenizers


def test_the_table_of_the_tokenizer_is_held_against_its_hash(folder):
    path = folder / "code_table.json"
    codes = json.loads(path.read_text())["codes"]
    codes[3], codes[7] = codes[7], codes[3]
    change_json(path, codes=codes)
    with pytest.raises(ValueError, match="the codes are not those of codes_sha256="):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert "the codes are not those of codes_sha256=" in refused("generate", folder)
    change_json(path, codes_sha256=None)
    assert "differs from the model's (2 of 270 tokens, the first being 3)" in refused("generate", folder)
    codes[3] = codes[7]
    change_json(path, codes=codes)
    assert "270 tokens share 269 codes" in refused("generate", folder)
    codes[3] = [9] * 9
    change_json(path, codes=codes)
    assert "digits span [0, 9]" in refused("generate", folder)


def test_the_tokenizer_of_another_model_is_refused(folder, tmp_path):
    """As many tokens, all but a few the same."""
    other = build_tokenizer(
        train_bpe(["another text, about nothing in particular"] * 3, 270),
        special_tokens={"eos_token": "<|endoftext|>"},
    )
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", folder)
    with pytest.raises(ValueError, match="the vocabulary has 270 tokens .* not those that it was made for"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert "not those that it was made for" in refused("generate", folder)

    smaller = build_tokenizer(train_bpe(TEXT, 262), special_tokens={"eos_token": "<|endoftext|>"})
    smaller.save_pretrained(tmp_path / "smaller")
    shutil.copy(tmp_path / "smaller" / "tokenizer.json", folder)
    assert "the code table has 270 tokens" in refused("generate", folder)


def test_folders_of_before_there_were_hashes_still_load(folder):
    change_json(folder / "code_table.json", codes_sha256=None, vocabulary_sha256=None)
    result = run("generate", folder, "--max-new-tokens", 2, "--seed", 0)
    assert result.exit_code == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.save_pretrained(folder)
    assert {"codes_sha256", "vocabulary_sha256"} <= set(json.loads((folder / "code_table.json").read_text()))
    assert not {"codes_sha256", "vocabulary_sha256"} & set(tokenizer.code_table_parameters)
