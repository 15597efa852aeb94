"""A saved autoregressive model in an environment that has transformers and lm-eval, but not this package."""

import json
import os
import subprocess

import pytest
import torch
from arm_networks import small_arm
from safetensors.torch import load_file
from test_remote_code import TEXT, bare_python  # noqa: F401 (a fixture)
from transformers import PreTrainedTokenizerFast

from prime_v2.tokenization import build_tokenizer
from prime_v2.tokenization.bpe import train_bpe

pytestmark = pytest.mark.slow  # a second process imports torch, transformers and lm-eval

CONTEXT = "Every token is"
CONTINUATION = " written as binary digits"

# Loads FOLDER in every way, saves it to AGAIN, loads that; runs lm-eval's own model on FOLDER; writes tensors to OUT
# and a line of JSON to stdout.
SCRIPT = """
import importlib.util, json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

folder, again, out, text, context, continuation = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust)
causal_lm = AutoModelForCausalLM.from_pretrained(folder, **trust)
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
fresh = AutoModelForCausalLM.from_config(config, **trust)
causal_lm.save_pretrained(again)
tokenizer.save_pretrained(again)
model_again = AutoModelForCausalLM.from_pretrained(again, **trust)

batch = tokenizer(text, return_tensors="pt")
ids = batch["input_ids"]
tensors = {"ids": ids, "fresh_codes": fresh.code_table.codes}
with torch.no_grad():
    for name, each in {"model": model, "causal_lm": causal_lm, "again": model_again}.items():
        tensors[name] = each(**batch).logits
        tensors[f"{name}_generated"] = each.generate(ids[:, :4], max_new_tokens=6, seed=3)
        tensors[f"{name}_greedy"] = each.generate(ids[:, :4], max_new_tokens=6, do_sample=False)
tensors["loss"] = model(**batch, labels=ids).loss.detach()
tensors["log_likelihood"] = model.log_likelihood(ids).value
targets = torch.arange(10)[None] >= 4
tensors["matches"] = model.greedy_matches(tensors["model_greedy"], None, targets).matches

lm = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2, **trust)
pairs = [("", continuation), (context, continuation)]
requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
scores = lm.loglikelihood(requests, disable_tqdm=True)
options = {"until": [], "max_gen_toks": 6}
generated = lm.generate_until([Instance("generate_until", {}, (context, options), 0)], disable_tqdm=True)
save_file({name: each.clone().contiguous() for name, each in tensors.items()}, out)
print(json.dumps({
    "package": importlib.util.find_spec("prime_v2") is not None,
    "classes": [type(each).__name__ for each in (config, model, causal_lm, fresh, tokenizer, model_again, lm.model)],
    "bases": [[base.__name__ for base in type(each).__bases__] for each in (model, causal_lm)],
    "can_generate": model.can_generate(),
    "scores": scores,
    "generated": generated,
}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, tokenizer): a model of sub-tokens, so that its code table is saved too."""
    folder = tmp_path_factory.mktemp("saved")
    bpe = PreTrainedTokenizerFast(tokenizer_object=train_bpe([TEXT], 300), eos_token="<|endoftext|>")
    tokenizer = build_tokenizer(bpe, shuffle_seed=4)
    model = small_arm(
        scale=0.1,
        **tokenizer.code_table_parameters,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def found(bare_python, saved, tmp_path_factory):  # noqa: F811
    """(what the script printed, the tensors that it wrote, the folder that it saved)."""
    work = tmp_path_factory.mktemp("work")
    out, again = work / "out.safetensors", work / "again"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [bare_python, "-I", "-c", SCRIPT, saved[0], again, out, TEXT, CONTEXT, CONTINUATION],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), load_file(out), again


def test_every_auto_class_gives_the_right_class(found):
    printed, _, _ = found
    assert not printed["package"]
    model = "PrimeV2ForCausalLM"
    assert printed["classes"] == ["PrimeV2ArmConfig", model, model, model, "PrimeV2Tokenizer", model, model]
    assert printed["can_generate"]
    assert printed["bases"] == [["PrimeV2PreTrainedModel", "PrimeV2ArmGenerationMixin"]] * 2


def test_logits_loss_and_likelihood_are_those_of_this_process(found, saved):
    _, tensors, _ = found
    _, model, _ = saved
    ids = tensors["ids"]
    # The same code and machine; the number of threads may differ, and with it the order of some sums.
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        logits = model(ids).logits
        for name in ("model", "causal_lm", "again"):
            torch.testing.assert_close(tensors[name], logits, **close)
        torch.testing.assert_close(tensors["loss"], model(ids, labels=ids).loss, **close)
    torch.testing.assert_close(tensors["log_likelihood"], model.log_likelihood(ids).value, **close)
    assert torch.equal(tensors["fresh_codes"], model.code_table.codes), "a model from the config alone has the table"


def test_a_seed_generates_the_same_text_there(found, saved):
    _, tensors, _ = found
    expected = saved[1].generate(tensors["ids"][:, :4], max_new_tokens=6, seed=3)
    greedy = saved[1].generate(tensors["ids"][:, :4], max_new_tokens=6, do_sample=False)
    for name in ("model", "causal_lm", "again"):
        assert torch.equal(tensors[f"{name}_generated"], expected)
        assert torch.equal(tensors[f"{name}_greedy"], greedy)
    assert tensors["matches"].tolist() == [True]


def test_lm_evals_own_model_scores_and_generates(found, saved):
    """It feeds a context as it is, an empty one as the EOS token, which is the start token here."""
    printed, _, _ = found
    _, model, tokenizer = saved
    context, continuation = (tokenizer(text, return_tensors="pt").input_ids for text in (CONTEXT, CONTINUATION))
    alone, after = (value for value, _ in printed["scores"])
    assert alone == pytest.approx(model.log_likelihood(continuation).value.item(), abs=1e-4)  # some 10 nats in float32
    whole = torch.cat([context, continuation], dim=1)
    log_p = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None]).squeeze(1)
    assert after == pytest.approx(log_p[-continuation.shape[1] :].sum().item(), abs=1e-4)
    new = model.generate(context, max_new_tokens=6, do_sample=False)[0, context.shape[1] :]
    assert printed["generated"] == [tokenizer.decode(new, skip_special_tokens=True)]


def test_what_is_saved_there_is_complete(found, saved):
    """The same files and the same map of classes, so that it can be passed on."""
    _, _, again = found
    names = [sorted(path.name for path in folder.iterdir() if path.is_file()) for folder in (saved[0], again)]
    assert names[0] == names[1]
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (saved[0], again)]
    assert maps[0] == maps[1]
    for folder in (saved[0], again):
        for path in folder.glob("*.py"):
            assert path.read_bytes() == (saved[0] / path.name).read_bytes()
