"""`prime-v2 convert`: the converted network gives the logits of the published one, and OUT is whole or not there."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_options import NUMBERS
from command_runs import of_command
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from prime_v2 import build_tokenizer
from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.hub_card.convert import sizes_of
from prime_v2.tokenization.bpe import train_bpe

ROOT = Path(__file__).resolve().parents[2]
V, D, FFN, HEADS, LAYERS, BASE, DIGITS = 300, 24, 40, 4, 2, 2, 9
TEXT = [f"document {i} says that the quick brown fox jumps over {i * 7} lazy dogs" for i in range(12)]
run, refused = of_command("convert")


def published(groups=HEADS, rows=V, table=(BASE + 1) * DIGITS, width=D, seed=0) -> dict[str, torch.Tensor]:
    """A random checkpoint in the published layout; logits vary by about 1, so that a wrong order of rows shows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.4):
        return torch.randn(shape, generator=generator) * scale

    tensors = {"lm_head.weight": draw(rows, D), "transformer.wte.weight": draw(table, width, scale=1.0)}
    tensors["transformer.ln_f.weight"] = 1 + draw(D)
    for i in range(LAYERS):
        layer = {
            "norm_1.weight": 1 + draw(D),
            "attn.attn.weight": draw((HEADS + 2 * groups) * D // HEADS, D),
            "attn.proj.weight": draw(D, D),
            "norm_2.weight": 1 + draw(D),
            "mlp.swiglu.w1.weight": draw(FFN, D),
            "mlp.swiglu.w2.weight": draw(FFN, D),
            "mlp.swiglu.w3.weight": draw(D, FFN),
        }
        tensors |= {f"transformer.h.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(head):
    """head (L, size): dimensions i and i + size / 2 are the parts of a complex number, turned by position / theta."""
    half = head.shape[1] // 2
    angle = torch.arange(len(head)).double()[:, None] * 10_000.0 ** -(torch.arange(half).double() / half)
    turned = torch.complex(head[:, :half], head[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=1)


def published_logits(tensors, vectors, groups=HEADS):
    """The published forward pass for one text: its input vectors (L, D) to logits (L, rows), a head at a time."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x, size, each = vectors.double(), D // HEADS, HEADS // groups
    for i in range(LAYERS):
        part = {name.split(f"h.{i}.")[1]: t for name, t in tensors.items() if f".h.{i}." in name}
        fused = norm(x, part["norm_1.weight"]) @ part["attn.attn.weight"].T
        outputs = []
        for head in range(HEADS):
            start = (head // each) * (each + 2) * size  # a group: its queries, its key, its value
            query = fused[:, start + (head % each) * size :][:, :size]
            key, value = (fused[:, start + (each + k) * size :][:, :size] for k in range(2))
            scores = rotate(query) @ rotate(key).T / size**0.5
            outputs.append(scores.softmax(-1) @ value)  # to both sides
        x = x + torch.cat(outputs, dim=1) @ part["attn.proj.weight"].T
        y = norm(x, part["norm_2.weight"])
        gate, up = y @ part["mlp.swiglu.w1.weight"].T, y @ part["mlp.swiglu.w2.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ part["mlp.swiglu.w3.weight"].T
    return norm(x, tensors["transformer.ln_f.weight"]) @ tensors["lm_head.weight"].T


def digit_vectors(tensors, permutation, ids, hidden, join):
    """Input vectors of tokens as published: row j * (base + 1) + digit j of the permuted id, `base` if hidden."""
    table, rows = tensors["transformer.wte.weight"], []
    for i, token in enumerate(ids):
        code = int(permutation[token])
        digits = [int(c) for c in format(code, f"0{DIGITS}b")]
        digits = [BASE if hidden[i][j] else digits[j] for j in range(DIGITS)]
        rows.append(join([table[j * (BASE + 1) + digits[j]] for j in range(DIGITS)]))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A plain fast tokenizer of V tokens."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    backend = train_bpe(TEXT, V)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def permutation() -> torch.Tensor:
    """As published: of all codes, the tokens' ids permuted among themselves."""
    values = torch.arange(BASE**DIGITS)
    values[:V] = torch.randperm(V, generator=torch.Generator().manual_seed(5))
    return values


@pytest.fixture
def files(tmp_path, permutation, tokenizer_dir):
    """(checkpoint, options) of a model over sub-tokens, as published."""
    torch.save({"model": published()}, tmp_path / "model.pth")
    torch.save(permutation, tmp_path / "perm.pt")
    options = ["--permutation", tmp_path / "perm.pt", "--tokenizer", tokenizer_dir, "--num-heads", HEADS]
    return tmp_path / "model.pth", options


IDS = torch.tensor([[7, 299, 0, 41, 41, 150, 12, 88]])


@pytest.mark.parametrize(("width", "groups"), [(D, HEADS), (D, 2), (D, 1)])
def test_logits_are_those_of_the_published_network(files, tmp_path, permutation, width, groups):
    checkpoint, options = files
    tensors = published(groups)
    torch.save({"model": tensors, "iter_num": 3}, checkpoint)
    result = run(checkpoint, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    model, tokenizer = load_model_and_tokenizer(tmp_path / "out", "cpu", "float64")
    states = model.encode(IDS)
    hidden = torch.rand(states.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    vectors = digit_vectors(tensors, permutation, IDS[0].tolist(), hidden[0], sum)
    with torch.no_grad():
        found = model(subtoken_ids=torch.where(hidden, BASE, states)).logits[0]
    expected = published_logits(tensors, vectors, groups)
    assert expected.std() > 1
    # Cosine and sine are float32 here; the rest is float64.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(tokenizer.code_table) == V


def test_vectors_side_by_side_are_expressed_too(tmp_path, tokenizer_dir):
    """`concat` of D / S columns a digit: here 12 digits of two columns, of codes given for the tokens alone."""
    tensors = published(table=(BASE + 1) * 12, width=2)
    codes = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[:V]
    save_file(tensors, tmp_path / "model.safetensors")
    np.save(tmp_path / "perm.npy", codes.numpy())
    options = ["--permutation", tmp_path / "perm.npy", "--tokenizer", tokenizer_dir, "--num-heads", HEADS]
    assert run(tmp_path / "model.safetensors", tmp_path / "out", *options).exit_code == 0
    model, _ = load_model_and_tokenizer(tmp_path / "out", "cpu", "float64")
    table = tensors["transformer.wte.weight"]
    vectors = [
        torch.cat([table[j * 3 + int(c)] for j, c in enumerate(format(int(codes[token]), "012b"))])
        for token in IDS[0].tolist()
    ]
    with torch.no_grad():
        found = model(IDS).logits[0]
    torch.testing.assert_close(found, published_logits(tensors, torch.stack(vectors)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 4])
def test_a_model_of_whole_tokens_is_one_digit_a_token(tmp_path, tokenizer_dir, padding):
    """SMDM: a row of `wte` a token, the mask's last, behind the padding of the head."""
    tensors = published(rows=V + padding, table=V + padding + 1)
    save_file(tensors, tmp_path / "mdm.safetensors")
    options = ["--tokenizer", tokenizer_dir, "--num-heads", HEADS]
    if padding:
        sentence = refused(tmp_path / "mdm.safetensors", tmp_path / "out", *options)
        assert "has 304 rows, but the tokenizer has 300 tokens" in sentence
        options.append("--drop-padding")
    result = run(tmp_path / "mdm.safetensors", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert ("4 rows of the head were dropped" in result.stdout) == bool(padding)
    model, tokenizer = load_model_and_tokenizer(tmp_path / "out", "cpu", "float64")
    assert (model.config.base, model.config.num_subtokens) == (V, 1)
    ids, theirs = IDS.clone(), IDS[0].clone()
    ids[0, [1, 4]], theirs[[1, 4]] = tokenizer.mask_token_id, V + padding
    with torch.no_grad():
        found = model(ids).logits[0]
    expected = published_logits(tensors, tensors["transformer.wte.weight"][theirs])[:, :V]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_folder_loads_by_auto_classes_and_has_what_was_published(files, tmp_path, permutation):
    checkpoint, options = files
    out = tmp_path / "out"
    out.mkdir()  # an empty one is taken
    result = run(checkpoint, out, *options, "--max-length", 64, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["files"] == sorted(path.name for path in out.iterdir())
    assert {"README.md", "config.json", "model.safetensors", "code_table.json", "modeling_prime_v2.py"} <= set(
        printed["files"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "out", "perm.pt"]
    model = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert printed["parameters"] == sum(tensor.numel() for tensor in published().values())
    values = model.encode(torch.arange(V)) @ torch.tensor([2**j for j in reversed(range(DIGITS))])
    assert values.tolist() == permutation[:V].tolist()
    config = model.config
    assert (config.base, config.num_subtokens, config.code_source) == (2, DIGITS, "data")
    assert (config.objective, config.whole_token_above, config.rms_norm_eps) == ("joint", 0.5, 1e-5)
    assert (config.carry_over, config.noise_form, config.max_position_embeddings) == (False, "time", 64)
    assert config.eos_token_id == tokenizer.eos_token_id == 0
    ids = tokenizer(TEXT[3], return_tensors="pt").input_ids
    likelihood = model.log_likelihood(ids, num_samples=4)
    assert torch.isfinite(likelihood.value).all()
    assert (likelihood.value < 0).all()
    assert model.generate(ids[:, :4], max_new_tokens=4, max_denoising_steps=4, seed=0).shape == (1, 8)
    card = (out / "README.md").read_text()
    assert printed["sha256"] in card
    assert "\n\n## Limits\n\n" in card
    assert "9 digits of base 2 by the permutation `perm.pt`" in card
    assert str(tmp_path) not in card


def test_the_published_sizes_give_the_configuration_of_the_published_run():
    """Only the 1.1B model, without its weights: shapes as its code makes them."""
    tall = {"D": 1792, "F": 7168, "Q": 3 * 1792, "P": 32000, "E": 45}
    shapes = {"transformer.wte.weight": "ED", "transformer.ln_f.weight": "D", "lm_head.weight": "PD"}
    layer = {"norm_1": "D", "norm_2": "D", "attn.attn": "QD", "attn.proj": "DD"}
    layer |= {"mlp.swiglu.w1": "FD", "mlp.swiglu.w2": "FD", "mlp.swiglu.w3": "DF"}
    shapes |= {f"transformer.h.{i}.{name}.weight": axes for i in range(20) for name, axes in layer.items()}
    tensors = {name: torch.empty([tall[axis] for axis in axes], device="meta") for name, axes in shapes.items()}
    sizes = sizes_of(tensors, base=2, coded=True)
    assert (sizes.num_subtokens, sizes.base, sizes.rows, sizes.num_key_value_heads) == (15, 2, 32000, 14)
    run_config = yaml.safe_load((ROOT / "configs" / "slimpajama_1b.yaml").read_text())["model"]
    found = sizes.config_fields(2048)
    shared = found.keys() & run_config.keys()
    assert len(shared) >= 10
    for name in shared - {"initializer_range"}:
        assert found[name] == run_config[name], name
    assert found["initializer_range"] == pytest.approx(run_config["initializer_range"], rel=1e-3)


class Poison:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["archive", "pickle of protocol 2", "pickle of protocol 4"])
def test_a_poisoned_file_is_refused_and_runs_nothing(files, tmp_path, how):
    checkpoint, options = files
    mark = tmp_path / "touched"
    content = {"hparams": Poison(mark), "model": published()}
    if how == "archive":
        torch.save(content, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    sentence = refused(checkpoint, tmp_path / "out", *options)
    assert not mark.exists()
    assert "is no file that can be read without running code of it" in sentence
    assert ("does not know its form" if how.endswith("4") else "it calls posix.system") in sentence
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Poison(mark)))
    assert mark.exists(), "the poison works where nothing stops it"


@pytest.mark.parametrize("name", ["perm.pt", "perm.npy"])
def test_a_poisoned_permutation_is_refused_and_runs_nothing(files, tmp_path, name):
    checkpoint, options = files
    mark = tmp_path / "touched"
    if name == "perm.pt":
        torch.save(Poison(mark), tmp_path / name)
    else:
        np.save(tmp_path / name, np.array([Poison(mark)], dtype=object), allow_pickle=True)
    options[1] = tmp_path / name
    assert "nothing was run" in refused(checkpoint, tmp_path / "out", *options)
    assert not mark.exists()


def test_nothing_is_left_where_writing_fails(files, tmp_path, monkeypatch):
    checkpoint, options = files
    from prime_v2.tokenization import PrimeV2Tokenizer

    def fail(*arguments, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrimeV2Tokenizer, "save_pretrained", fail)  # after the model was written
    assert refused(checkpoint, tmp_path / "out", *options) == "No space left on device"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "perm.pt"]


def test_what_is_there_is_not_written_over(files, tmp_path):
    checkpoint, options = files
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    assert "is not an empty folder" in refused(checkpoint, tmp_path / "out", *options)
    assert "is not a folder; give a folder, which may be new" in refused(checkpoint, tmp_path / "perm.pt", *options)
    assert "does not exist; make it first" in refused(checkpoint, tmp_path / "a" / "b", *options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


@pytest.mark.parametrize("value", ["100000000000", "1" + "0" * 30])
@pytest.mark.parametrize("option", [each for each in NUMBERS if each.command == ("convert",)], ids=str)
def test_sizes_that_do_not_fit_the_file_are_refused(option, value, files, tmp_path):
    """tests/training/test_numeric_options.py has values that are refused before the file is read."""
    checkpoint, options = files
    refused(checkpoint, tmp_path / "out", *options, option.flag, value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["mdlm", "megatron"])
def test_other_layouts_say_what_is_in_the_way(files, tmp_path, layout):
    checkpoint, options = files
    names = {"mdlm": "backbone.blocks.0.adaLN_modulation.weight", "megatron": "decoder.layers.0.linear_qkv.weight"}
    part = {"mdlm": "LayerNorm with a shift, scale and gate made from the noise level", "megatron": "could not be"}
    torch.save({"state_dict": {names[layout]: torch.zeros(2)}}, checkpoint)
    assert part[layout] in refused(checkpoint, tmp_path / "out", *options)


def test_a_tokenizer_of_another_model_is_refused(files, tmp_path):
    checkpoint, options = files
    build_tokenizer(train_bpe(TEXT, V)).save_pretrained(tmp_path / "ours")
    backend = train_bpe(TEXT, 310)
    backend.save(str(tmp_path / "tokenizer.json"))
    options[3] = tmp_path / "tokenizer.json"
    sentence = refused(checkpoint, tmp_path / "out", *options)
    assert "the tokenizer has 310 tokens, but lm_head.weight has 300 rows" in sentence
    options[3] = tmp_path / "ours"
    assert "is a PrimeV2Tokenizer already" in refused(checkpoint, tmp_path / "out", *options)
