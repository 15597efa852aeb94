"""A saved uniform-state model in an environment that has transformers and torch, but not this package."""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from uniform_networks import small_model

pytestmark = pytest.mark.slow  # a second process imports torch and transformers

# Loads FOLDER in every way, saves it to AGAIN, loads that; writes tensors to OUT and a line of JSON to stdout.
SCRIPT = """
import importlib.util, json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

folder, again, out = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModel.from_pretrained(folder, **trust)
masked_lm = AutoModelForMaskedLM.from_pretrained(folder, **trust)
fresh = AutoModel.from_config(config, **trust)
masked_lm.save_pretrained(again)
model_again = AutoModel.from_pretrained(again, **trust)

ids, times = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), torch.tensor([0.4])
noise = {"noise_keys": torch.arange(1), "noise_levels": torch.tensor([0.5], dtype=torch.double)}
tensors = {}
for name, each in {"model": model, "masked_lm": masked_lm, "again": model_again}.items():
    tensors[f"{name}_logits"] = each(ids, times=times).logits
    tensors[f"{name}_loss"] = each(ids, labels=ids, **noise).loss
    tensors[f"{name}_log_likelihood"] = each.log_likelihood(ids, num_samples=4).value
    tensors[f"{name}_generated"] = each.generate(ids[:, :4], max_new_tokens=6, max_denoising_steps=5, seed=3)
    tensors[f"{name}_greedy"] = each.generate(ids[:, :4], max_new_tokens=6, do_sample=False)
    tensors[f"{name}_decodes"] = each.greedy_matches(
            tensors[f"{name}_greedy"], None, torch.arange(10)[None] > 3
        ).matches
tensors["fresh_time_scale"] = fresh.model.time_scale.weight
save_file({name: each.detach().clone().contiguous() for name, each in tensors.items()}, out)
print(json.dumps({
    "package": importlib.util.find_spec("prime_v2") is not None,
    "classes": [type(each).__name__ for each in (config, model, masked_lm, fresh, model_again)],
    "bases": [[base.__name__ for base in type(each).__bases__] for each in (model, masked_lm)],
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
    """(folder, model), saved as any model is."""
    folder, model = tmp_path_factory.mktemp("saved"), small_model()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def found(bare_python, saved, tmp_path_factory):
    """(what the script printed, the tensors that it wrote, the folder that it saved)."""
    work = tmp_path_factory.mktemp("work")
    again, out = work / "again", work / "out.safetensors"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [bare_python, "-I", "-c", SCRIPT, saved[0], again, out],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), load_file(out), again


def test_every_auto_class_gives_the_right_class(found):
    printed, tensors, _ = found
    assert not printed["package"]
    model = "PrimeV2ForUniformDiffusion"
    assert printed["classes"] == ["PrimeV2UniformConfig", model, model, model, model]
    assert printed["can_generate"]
    # Transformers gives a remote class that it takes for autoregressive a second, unfit generate().
    assert printed["bases"] == [["PrimeV2PreTrainedModel", "PrimeV2UniformGenerationMixin"]] * 2
    assert (tensors["fresh_time_scale"] == 0).all(), "a model from the config alone begins without the time"


def test_every_result_is_that_of_this_process(found, saved):
    _, tensors, _ = found
    _, model = saved
    ids, times = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), torch.tensor([0.4])
    noise = {"noise_keys": torch.arange(1), "noise_levels": torch.tensor([0.5], dtype=torch.double)}
    with torch.no_grad():
        expected = {
            "logits": model(ids, times=times).logits,
            "loss": model(ids, labels=ids, **noise).loss,
            "log_likelihood": model.log_likelihood(ids, num_samples=4).value,
            "generated": model.generate(ids[:, :4], max_new_tokens=6, max_denoising_steps=5, seed=3),
            "greedy": model.generate(ids[:, :4], max_new_tokens=6, do_sample=False),
            "decodes": torch.tensor([True]),
        }
    for name in ("model", "masked_lm", "again"):
        for what, each in expected.items():
            # The same code and machine; the number of threads may differ, and with it the order of some sums.
            torch.testing.assert_close(tensors[f"{name}_{what}"], each, rtol=1e-5, atol=1e-5)


def test_what_is_saved_there_is_complete(found, saved):
    """The same files and the same map of classes, so that it can be passed on."""
    _, _, again = found
    names = [sorted(path.name for path in folder.iterdir() if path.is_file()) for folder in (saved[0], again)]
    assert names[0] == names[1]
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (saved[0], again)]
    assert maps[0] == maps[1]
    for path in again.glob("*.py"):
        assert path.read_bytes() == (saved[0] / path.name).read_bytes()
