"""A saved folder in an environment that has transformers and torch, but not this package."""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from enumeration import small_model
from safetensors.torch import load_file

from prime_v2.tokenization import build_tokenizer
from prime_v2.tokenization.bpe import train_bpe

pytestmark = pytest.mark.slow  # a second process imports torch and transformers

TEXT = "Every token is written as binary digits, after a shuffle of the vocabulary. " * 3

# Loads FOLDER in every way, saves it to AGAIN, loads that; writes tensors to OUT and a line of JSON to stdout.
SCRIPT = """
import importlib.util, json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

folder, again, out, text = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust)
masked_lm = AutoModelForMaskedLM.from_pretrained(folder, **trust)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
fresh = AutoModel.from_config(config, **trust)
masked_lm.save_pretrained(again)
tokenizer.save_pretrained(again)
model_again = AutoModel.from_pretrained(again, **trust)
tokenizer_again = AutoTokenizer.from_pretrained(again, **trust)

batch = tokenizer(text, return_tensors="pt")
ids = batch["input_ids"]
tensors = {"ids": ids, "digits": torch.as_tensor(tokenizer.encode_subtokens(ids))}
with torch.no_grad():
    for name, each in {"model": model, "masked_lm": masked_lm, "again": model_again}.items():
        tensors[name] = each(**batch).logits
        tensors[f"{name}_generated"] = each.generate(ids[:, :4], max_new_tokens=6, seed=3)
        tensors[f"{name}_greedy"] = each.generate(ids[:, :4], max_new_tokens=6, do_sample=False)
noise = {"noise_keys": torch.arange(1), "noise_levels": torch.tensor([0.5], dtype=torch.double)}
tensors["loss"] = model(**batch, labels=ids, **noise).loss.detach()
tensors["log_likelihood"] = model.log_likelihood(ids, num_samples=4).value
tensors["fresh_codes"] = fresh.code_table.codes
save_file({name: each.clone().contiguous() for name, each in tensors.items()}, out)
print(json.dumps({
    "package": importlib.util.find_spec("prime_v2") is not None,
    "classes": [type(each).__name__ for each in (config, model, masked_lm, fresh, tokenizer, model_again)],
    "bases": [[base.__name__ for base in type(each).__bases__] for each in (model, masked_lm)],
    "decoded": tokenizer.decode(ids[0]),
    "ids_again": tokenizer_again(text).input_ids == ids[0].tolist(),
    "can_generate": model.can_generate(),
}))
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """Python of a new environment that sees this one's packages by a path file. Such a file does not process the path
    files of the folder that it names, and an editable install is one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return home / "bin" / "python"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, tokenizer), saved as any model and tokenizer are."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = build_tokenizer(train_bpe([TEXT], 300), shuffle_seed=4)
    model = small_model(
        vocab_size=len(tokenizer.code_table),
        shuffle_seed=4,
        max_position_embeddings=256,
        subtoken_embedding="sum",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def found(bare_python, saved, tmp_path_factory):
    """(what the script printed, the tensors that it wrote, the folder that it saved)."""
    work = tmp_path_factory.mktemp("work")
    again, out = work / "again", work / "out.safetensors"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [bare_python, "-I", "-c", SCRIPT, saved[0], again, out, TEXT],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), load_file(out), again


def test_the_package_is_not_importable_there(bare_python, tmp_path):
    done = subprocess.run([bare_python, "-I", "-c", "import prime_v2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ModuleNotFoundError: No module named 'prime_v2'" in done.stderr


def test_every_auto_class_gives_the_right_class(found):
    printed, _, _ = found
    assert not printed["package"]
    model = "PrimeV2ForMaskedDiffusion"
    assert printed["classes"] == ["PrimeV2Config", model, model, model, "PrimeV2Tokenizer", model]
    assert printed["can_generate"]
    # Transformers gives a remote class that it takes for autoregressive a second, unfit generate().
    assert printed["bases"] == [["PrimeV2PreTrainedModel", "PrimeV2GenerationMixin"]] * 2


def test_logits_loss_and_likelihood_are_those_of_this_process(found, saved):
    _, tensors, _ = found
    _, model, _ = saved
    # The same code and machine; the number of threads may differ, and with it the order of some sums.
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        logits = model(tensors["ids"]).logits
        for name in ("model", "masked_lm", "again"):
            torch.testing.assert_close(tensors[name], logits, **close)
        noise = {"noise_keys": torch.arange(1), "noise_levels": torch.tensor([0.5], dtype=torch.double)}
        loss = model(tensors["ids"], labels=tensors["ids"], **noise).loss
    torch.testing.assert_close(tensors["loss"], loss, **close)
    likelihood = model.log_likelihood(tensors["ids"], num_samples=4).value
    torch.testing.assert_close(tensors["log_likelihood"], likelihood, **close)


def test_a_seed_generates_the_same_text_there(found, saved):
    _, tensors, _ = found
    expected = saved[1].generate(tensors["ids"][:, :4], max_new_tokens=6, seed=3)
    greedy = saved[1].generate(tensors["ids"][:, :4], max_new_tokens=6, do_sample=False)
    for name in ("model", "masked_lm", "again"):
        assert torch.equal(tensors[f"{name}_generated"], expected)
        assert torch.equal(tensors[f"{name}_greedy"], greedy)


def test_tokenizer_and_model_agree_on_the_digits(found, saved):
    printed, tensors, _ = found
    _, model, tokenizer = saved
    assert tensors["ids"][0].tolist() == tokenizer(TEXT).input_ids
    assert printed["decoded"] == TEXT
    assert printed["ids_again"]
    assert torch.equal(tensors["digits"], model.encode(tensors["ids"]))
    assert torch.equal(torch.as_tensor(tokenizer.code_table), model.code_table.codes[:-1])
    assert torch.equal(tensors["fresh_codes"], model.code_table.codes), "a model from the config alone has the table"


def test_what_is_saved_there_is_complete(found, saved):
    """The same files and the same map of classes, so that it can be passed on."""
    _, _, again = found
    names = [sorted(path.name for path in folder.iterdir() if path.is_file()) for folder in (saved[0], again)]
    assert names[0] == names[1]
    assert not (saved[0] / "trainer.py").exists()
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (saved[0], again)]
    assert maps[0] == maps[1]
    for folder in (saved[0], again):
        for path in folder.glob("*.py"):
            assert path.read_bytes() == (saved[0] / path.name).read_bytes()
