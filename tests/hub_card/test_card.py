"""The model card: numbers from the record alone, bounds called bounds."""

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.diffusion_prime_v2 import KINDS
from prime_v2.eval.perplexity import score_windows
from prime_v2.hub_card.card import find_record, render_card, write_card
from prime_v2.hub_card.export import export_model
from prime_v2.hub_card.files import hub_files
from prime_v2.output.records import code_version, make_record
from prime_v2.tokenization.bpe import train_bpe


def score(model: PrimeV2ForMaskedDiffusion) -> dict:
    blocks = torch.randint(300, (6, 16), generator=torch.Generator().manual_seed(0))
    methods = {"bound": "subtoken", "paper_loss": "paper_loss"}
    return {
        name: score_windows(model, [(blocks, None)], method=method, text_bytes=400) for name, method in methods.items()
    }


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(train_bpe(["some text " * 50] * 3 + [chr(i) for i in range(97, 123)], 258))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=len(tokenizer.code_table), **shape))
    folder = tmp_path_factory.mktemp("card") / "my-model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scores() -> dict:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    models = [PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=300, num_subtokens=s, **shape)) for s in (None, 1)]
    return {"prime": score(models[0]), "mdm": score(models[1])}


@pytest.fixture
def record(scores: dict, model_dir: Path) -> dict:
    results = {
        "config": PrimeV2Config.from_pretrained(model_dir).to_dict(),
        "training": {
            "steps": 1201,
            "tokens": 4_915_203,
            "seconds": 643.0,
            "flops_6nd": 1.234e13,
            "flops_measured": 5.678e13,
            "parameters": 2_213_377,
            "parameters_non_embedding": 1_777_001,
            "objective": "marginal",
            "loss_is_bound": True,
        },
        "data": {
            "source": "docs",
            "fingerprint": "0123abcd",
            "documents": 77,
            "train_tokens": 8_001_234,
            "test_tokens": 160_987,
        },
        "evaluation": copy.deepcopy(scores["prime"]),
        "samples": ["first ``` sample", "second\nsample"],
    }
    return json.loads(
        json.dumps(make_record("train", results, seed=5, code=code_version(), command="python train.py --seed 5"))
    )


def test_card_states_the_numbers_of_the_record(record):
    text = render_card(record, model_name="my-model")
    bound = record["results"]["evaluation"]["bound"]
    loss = record["results"]["evaluation"]["paper_loss"]
    for expected in (
        "4,915,203 in 1,201 steps",
        "2,213,377 parameters",
        "1,777,001 of them",
        "8,001,234 training tokens, 160,987 test tokens",
        "1.23e+13 by 6 N D, 5.68e+13 counted",
        "10.7 min",
        "`0123abcd`",
        "`python train.py --seed 5`",
        f"{bound['nats_per_token']:.4f} ± {bound['stderr']:.4f}",
        f"≤ {bound['perplexity']:.2f} (95% interval",
        f"≤ {bound['bits_per_byte']:.4f}",
        f"{bound['unigram_entropy']:.4f}",
        f"{loss['nats_per_token']:.4f} ± {loss['stderr']:.4f}, **not a bound**",
        "withdrew the perplexities",
        "second\nsample",
    ):
        assert expected in text


REVEALED = {
    "digit": "the digits step by step, in any order.",
    "token": "whole tokens step by step, in any order.",
    "nested": "the tokens step by step, the leading digits of each before its others.",
    "coarse_first": "the leading digits of all tokens step by step, and then the others.",
    "windows": "the leading digits of each before its others, in windows of time.",
}


@pytest.mark.parametrize("order", KINDS)
def test_card_says_in_which_order_generation_reveals(record, order):
    record["results"]["config"]["reveal_order"] = order
    (said,) = re.findall("generation reveals (.*?) It has", render_card(record, model_name="my-model"))
    assert said.endswith(REVEALED[order])


def test_metadata_is_what_the_hub_reads(record):
    data = ModelCard(render_card(record, model_name="my-model")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert {"custom_code", "prime_v2"} <= set(data.tags)


def test_the_loss_of_plain_mdm_is_a_bound(record, scores):
    record["results"]["evaluation"] = scores["mdm"]
    text = render_card(record, model_name="my-model")
    rows = [line for line in text.splitlines() if line.startswith("| the paper's loss")]
    assert len(rows) == 1 and "not a bound" not in rows[0]
    assert f"{scores['mdm']['bound']['nats_per_token']:.4f}" in text


def paths_of(tree: dict, start: str = "") -> list[str]:
    """Dotted paths of all leaves, a list counting as one."""
    leaves = []
    for key, value in tree.items():
        path = f"{start}{key}"
        leaves += paths_of(value, f"{path}.") if isinstance(value, dict) else [path]
    return leaves


def without(record: dict, path: str) -> dict:
    changed = copy.deepcopy(record)
    *parents, last = path.split(".")
    inner = changed
    for key in parents:
        inner = inner[key]
    del inner[last]
    return changed


def test_every_missing_value_is_named_and_none_is_invented(record):
    """Drop each leaf in turn: either the card did not use it and stays the same, or it is refused by name."""
    whole = render_card(record, model_name="my-model")
    refused = set()
    for path in paths_of(record):
        try:
            text = render_card(without(record, path), model_name="my-model")
        except ValueError as error:
            assert path.split(".")[-1] in str(error)
            refused.add(path)
        else:
            # A package's version leaves the list of them, and bits per byte the table: not every text has bytes.
            # Records of earlier versions do not say what an interval is over: sequences.
            optional = ("bound.bits_per_byte", "bound.interval_over")
            assert text == whole or path.startswith("versions.") or path.endswith(optional)
    used = [f"results.training.{name}" for name in record["results"]["training"]]
    used += [f"results.evaluation.bound.{name}" for name in ("nats_per_token", "stderr", "perplexity", "is_bound")]
    used += ["results.evaluation.paper_loss.nats_per_token", "results.data.fingerprint", "results.samples"]
    used += ["command", "commit", "seed", "results.config.vocab_size", "results.data.train_tokens"]
    assert set(used) <= refused


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.tokens", float("nan"), "results.training.tokens=nan"),
        ("evaluation.bound.is_bound", False, "results.evaluation.bound of the record is not a bound"),
        ("evaluation.paper_loss.perplexity", 7.77, "has a perplexity, but is no bound"),
        ("evaluation.paper_loss.bits_per_byte", 0.5, "has a perplexity, but is no bound"),
        ("evaluation.bound", 3.0, "the record has no results.evaluation.bound.is_bound"),
    ],
)
def test_false_claims_are_refused(record, path, value, message):
    *parents, last = path.split(".")
    inner = record["results"]
    for key in parents:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(ValueError, match=message):
        render_card(record, model_name="my-model")


def test_card_is_written_beside_the_model_and_its_snippet_runs(model_dir, record, monkeypatch, capsys):
    (model_dir / "loss.png").write_bytes(b"png")
    path = write_card(model_dir, record)
    text = path.read_text(encoding="utf-8")
    assert path == model_dir / "README.md"
    assert "# my-model" in text
    assert "](loss.png)" in text
    assert not list(model_dir.glob(".README*"))
    (snippet,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(model_dir.parent)
    exec(compile(snippet, "snippet", "exec"), {})
    assert capsys.readouterr().out.startswith("The")


def test_a_record_of_another_model_or_no_model_is_refused(model_dir, record, tmp_path):
    path = model_dir / "README.md"
    before = path.read_bytes() if path.exists() else None
    record["results"]["config"]["hidden_size"] = 999
    with pytest.raises(ValueError, match="another model than .*: hidden_size is 999 there and 16 here"):
        write_card(model_dir, record)
    assert (path.read_bytes() if path.exists() else None) == before
    with pytest.raises(ValueError, match=r"has no config\.json"):
        write_card(tmp_path, record)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        write_card(tmp_path, record)
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]


def test_the_record_of_a_run_is_found_in_its_folder(tmp_path, record):
    with pytest.raises(ValueError, match="name the record of the run with --record FILE"):
        find_record(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "train.json").write_text(json.dumps(record))
    assert find_record(tmp_path) == tmp_path / "results" / "train.json"


def test_the_evaluation_is_one_table(record):
    text = render_card(record, model_name="my-model")
    table = text[text.index("| | this model |") :].split("\n\n")[0].splitlines()
    assert len(table) == 7 and {line.count("|") for line in table} == {3}


# Export

PICKLES = ("optimizer.pt", "training_args.bin", "rng_state.pth")
CODE = {
    "configuration_prime_v2.py",
    "configuration_backbone_prime_v2.py",
    "modeling_prime_v2.py",
    "code_table_prime_v2.py",
    "validation_weights_prime_v2.py",
    "tokenization_prime_v2.py",
}


@pytest.fixture
def run_dir(model_dir, tmp_path) -> Path:
    """The folder of a run: the model among things that only the run needs."""
    folder = shutil.copytree(model_dir, tmp_path / "run")
    for name in (*PICKLES, "run.json", "train.bin", "stray.py", "notes.txt", "loss.png", "results/train.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    (folder / "checkpoint-5").mkdir()
    return folder


def test_an_export_holds_what_loading_takes_and_its_card_has_their_hashes(run_dir, record, tmp_path):
    out = export_model(run_dir, tmp_path / "my-export", record)
    names = {path.name for path in out.iterdir()}
    data = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert data | CODE | {"code_table.json", "loss.png", "README.md"} <= names
    assert not names & {*PICKLES, "run.json", "train.bin", "stray.py", "notes.txt", "results", "checkpoint-5"}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# my-export" in card
    listed = dict(reversed(line.split("  ")) for line in re.findall(r"^[0-9a-f]{64}  \S+$", card, re.MULTILINE))
    assert listed == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names - {"README.md"}}
    assert all((out / name).read_bytes() == (run_dir / name).read_bytes() for name in listed)
    assert not list(tmp_path.glob(".my-export*"))
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    ids = AutoTokenizer.from_pretrained(out, trust_remote_code=True)("text", return_tensors="pt").input_ids
    assert model.log_likelihood(ids, num_samples=1).value.isfinite().all()


def test_an_export_of_half_a_model_or_over_something_is_refused_and_leaves_nothing(run_dir, record, tmp_path):
    def refused(out, message):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message):
            export_model(run_dir, out, record)
        assert sorted(tmp_path.rglob("*")) == before

    refused(run_dir, "exists; give the name of a new folder")
    refused(tmp_path / "no" / "where", "no does not exist; make it first")
    (run_dir / "validation_weights_prime_v2.py").unlink()
    refused(tmp_path / "out", "has no validation_weights_prime_v2.py; give the folder of a saved model")
    (run_dir / "config.json").write_text('{"auto_map": {"AutoModel": "../../secret.Class"}}')
    refused(tmp_path / "out", r"asks for '\.\./\.\./secret\.py', which is no file of the folder itself")
    (run_dir / "model.safetensors").rename(run_dir / "pytorch_model.bin")
    (run_dir / "config.json").write_text("{}")
    refused(tmp_path / "out", "has no model.safetensors")
    (run_dir / "model.safetensors.index.json").write_text('{"weight_map": {"a": "/etc/hostname"}}')
    refused(tmp_path / "out", "asks for '/etc/hostname', which is no file of the folder itself")


def test_shards_are_those_of_the_index(run_dir):
    (run_dir / "model.safetensors").rename(run_dir / "model-00001-of-00001.safetensors")
    (run_dir / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}'
    )
    names = hub_files(run_dir)
    assert [name for name in names if "safetensors" in name] == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
