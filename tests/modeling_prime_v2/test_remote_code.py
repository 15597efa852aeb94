"""A saved folder of every family in an environment that has transformers and lm-eval, but not this package.

A new entry of `FAMILIES` falls under all of this, as does a tree of codes with a head in stages. One process there
loads all folders: importing torch takes longest.
"""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from networks import small_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from prime_v2.families import FAMILIES
from prime_v2.tokenization import build_tokenizer
from prime_v2.tokenization.bpe import train_bpe

pytestmark = pytest.mark.slow  # a second process imports torch, transformers and lm-eval

TEXT = "Every token is written as binary digits, after a shuffle of the vocabulary. " * 3
CONTEXT, CONTINUATION = "Every token is", " written as binary digits"
FIELDS: dict[str, dict] = {
    "prime": {"shuffle_seed": 4, "subtoken_embedding": "sum"},
    "arm": {"num_subtokens": 9, "base": 2, "shuffle_seed": 4},  # so that its code table is saved too
    "interpolating": {"alpha_0": 0.4, "num_subtokens": 9, "base": 2, "shuffle_seed": 4},
}

TREE = {
    "shuffle_seed": 4, "objective": "joint", "reveal_order": "coarse_first", "stage_digits": [4, 9],
    "training_order": "nested", "subtoken_embedding": "ancestors", "tree_levels": [2, 4, 9], "head": "stages",
    "head_digits": [4, 9],
}  # fmt: skip
CASES = {name: (name, FIELDS.get(name, {})) for name in FAMILIES} | {"tree": ("prime", TREE)}  # folder: its model

# What a model computes, the same in both processes.
RESULTS = """
import inspect
import torch

NOISE = {"noise_keys": torch.arange(1), "noise_levels": torch.tensor([0.5], dtype=torch.double)}

def results(model, ids):
    times = {"times": torch.tensor([0.4])} if "times" in inspect.signature(model.forward).parameters else {}
    options, target = {"max_new_tokens": 6}, torch.arange(10)[None] >= 4
    with torch.no_grad():
        greedy = model.generate(ids[:, :4], do_sample=False, **options)
        return {
            "logits": model(ids, **times).logits,
            "loss": model(ids, labels=ids, **NOISE).loss,
            "log_likelihood": model.log_likelihood(ids, num_samples=4).value,
            "generated": model.generate(ids[:, :4], seed=3, **options),
            "greedy": greedy,
            "matches": model.greedy_matches(greedy, None, target).matches,
        }
"""

# For each folder below IN: loads it in every way, saves it below OUT, loads that; writes tensors and a line of JSON.
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

given, out, text, context, continuation = sys.argv[1:]
trust, printed = {"trust_remote_code": True}, {"package": importlib.util.find_spec("prime_v2") is not None}
for folder in sorted(Path(given).iterdir()):
    again = Path(out) / folder.name
    config = AutoConfig.from_pretrained(folder, **trust)
    autos = sorted(name for name in config.auto_map if name.startswith("AutoModel"))
    models = {name: getattr(transformers, name).from_pretrained(folder, **trust) for name in autos}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    fresh = AutoModel.from_config(config, **trust)
    models[autos[-1]].save_pretrained(again)
    tokenizer.save_pretrained(again)
    models["again"] = AutoModel.from_pretrained(again, **trust)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tensors = {"ids": ids, "digits": torch.as_tensor(tokenizer.encode_subtokens(ids))}
    for name, model in models.items():
        tensors |= {f"{name} {what}": each for what, each in results(model, ids).items()}
    tensors |= {f"fresh {name}": each for name, each in fresh.named_buffers()}
    save_file({name: each.clone().contiguous() for name, each in tensors.items()}, again.with_suffix(".tensors"))
    printed[folder.name] = {
        "models": {name: type(each).__name__ for name, each in models.items()},
        "classes": [type(each).__name__ for each in (config, fresh, tokenizer)],
        "bases": [[base.__name__ for base in type(each).__bases__] for each in models.values()],
        "decoded": tokenizer.decode(ids[0]),
        "ids_again": AutoTokenizer.from_pretrained(again, **trust)(text).input_ids == ids[0].tolist(),
        "can_generate": model.can_generate(),
    }
    if "AutoModelForCausalLM" in autos:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, **trust)
        pairs = [("", continuation), (context, continuation)]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        until = Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 6}), 0)
        printed[folder.name] |= {
            "lm": type(lm.model).__name__,
            "scores": lm.loglikelihood(requests, disable_tqdm=True),
            "text": lm.generate_until([until], disable_tqdm=True),
        }
print(json.dumps(printed))
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
def tokenizer():
    bpe = PreTrainedTokenizerFast(tokenizer_object=train_bpe([TEXT], 300), eos_token="<|endoftext|>")
    return build_tokenizer(bpe, shuffle_seed=4)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """(folder with one folder a case, models by case), saved as any model and tokenizer are."""
    folder, networks = tmp_path_factory.mktemp("saved"), {}
    end = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id) | {"bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer.code_table), "max_position_embeddings": 256}
    for name, (family, fields) in CASES.items():
        networks[name] = small_model(family, scale=0.1, **sizes, **end, **fields)
        networks[name].save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, networks


@pytest.fixture(scope="module")
def found(bare_python, saved, tmp_path_factory):
    """(what the script printed, the folder where it saved)."""
    work = tmp_path_factory.mktemp("work")
    (work / "out").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    command = [bare_python, "-I", "-c", RESULTS + SCRIPT, saved[0], work / "out", TEXT, CONTEXT, CONTINUATION]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), work / "out"


@pytest.fixture(params=list(CASES))
def family(request, found, saved):
    """(the family's entry, what was printed of it, its tensors, its folder, the one saved there, the model here)."""
    name = request.param
    (printed, out), (folder, models) = found, saved
    entry, tensors = FAMILIES[CASES[name][0]], load_file(out / f"{name}.tensors")
    return entry, printed[name], tensors, folder / name, out / name, models[name]


def test_the_package_is_not_importable_there(found, bare_python, tmp_path):
    assert not found[0]["package"]
    done = subprocess.run([bare_python, "-I", "-c", "import prime_v2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ModuleNotFoundError: No module named 'prime_v2'" in done.stderr


def test_every_auto_class_gives_the_right_class(family):
    entry, printed, *_ = family
    expected = entry.model[1]
    head = "AutoModelForCausalLM" if entry.config_class.causal else "AutoModelForMaskedLM"
    assert printed["models"] == dict.fromkeys(("AutoModel", head, "again"), expected)
    assert printed["classes"] == [entry.config[1], expected, "PrimeV2Tokenizer"]
    assert printed["can_generate"]
    # Transformers gives a remote class that it takes for autoregressive a second, unfit generate().
    assert printed["bases"] == [[base.__name__ for base in entry.model_class.__bases__]] * len(printed["models"])


def test_every_result_is_that_of_this_process(family):
    _, printed, tensors, _, _, model = family
    here = {}
    exec(RESULTS, here)
    for what, expected in here["results"](model, tensors["ids"]).items():
        for name in printed["models"]:
            # The same code and machine; the number of threads may differ, and with it the order of some sums.
            torch.testing.assert_close(tensors[f"{name} {what}"], expected, rtol=1e-5, atol=1e-5)
    assert tensors["again matches"].tolist() == [True]


def test_a_model_from_the_configuration_has_the_buffers_of_the_saved_one(family):
    """The code table is one."""
    *_, tensors, _, _, model = family
    for name, expected in model.named_buffers():
        assert torch.equal(tensors[f"fresh {name}"], expected)


def test_tokenizer_and_model_agree_on_the_digits(family, tokenizer):
    entry, printed, tensors, _, _, model = family
    assert tensors["ids"][0].tolist() == tokenizer(TEXT).input_ids
    assert printed["decoded"] == TEXT
    assert printed["ids_again"]
    if entry.digits:
        assert torch.equal(tensors["digits"], model.code_table.codes[tensors["ids"]])
        assert torch.equal(torch.as_tensor(tokenizer.code_table), model.code_table.codes[: len(tokenizer.code_table)])


def test_what_is_saved_there_is_complete(family):
    """The same files and the same map of classes, so that it can be passed on; no code of another family."""
    entry, *_, folder, again, _ = family
    names = [sorted(path.name for path in each.iterdir() if path.is_file()) for each in (folder, again)]
    assert names[0] == names[1]
    assert [name for name in names[0] if name.startswith("modeling_")] == [f"{entry.model[0]}.py"]
    assert "trainer.py" not in names[0]
    maps = [json.loads((each / "config.json").read_text())["auto_map"] for each in (folder, again)]
    assert maps[0] == maps[1]
    for path in again.glob("*.py"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize("name", [name for name, each in FAMILIES.items() if each.config_class.causal])
def test_lm_evals_own_model_scores_and_generates(name, found, saved, tokenizer):
    """It feeds a context as it is, an empty one as the EOS token, which is the start token here."""
    printed, model = found[0][name], saved[1][name]
    assert printed["lm"] == FAMILIES[name].model[1]
    context, continuation = (tokenizer(text, return_tensors="pt").input_ids for text in (CONTEXT, CONTINUATION))
    alone, after = (value for value, _ in printed["scores"])
    assert alone == pytest.approx(model.log_likelihood(continuation).value.item(), abs=1e-4)  # some 10 nats in float32
    whole = torch.cat([context, continuation], dim=1)
    log_p = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None]).squeeze(1)
    assert after == pytest.approx(log_p[-continuation.shape[1] :].sum().item(), abs=1e-4)
    new = model.generate(context, max_new_tokens=6, do_sample=False)[0, context.shape[1] :]
    assert printed["text"] == [tokenizer.decode(new, skip_special_tokens=True)]
