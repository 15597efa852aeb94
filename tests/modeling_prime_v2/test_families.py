"""Every family through one trainer and one way of measuring: a few steps, then what a user does with the folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_runs import write_text
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from prime_v2.commands.main import app
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.families import FAMILIES, bound_method, check_method, family_named, label_of, methods_of
from prime_v2.training import run as training

OPTIONS = (
    "--bpe_vocab_size 300 --block_size 16 --max_steps 3 --global_batch 4 --per_device_train_batch_size 4 "
    "--save_steps 100 --eval_steps 3 --logging_steps 1 --eval_sequences 4 --test_sequences 6 "
    "--eval_num_samples 4 --num_generated 1 --dev_share 0.2 --test_share 0.2"
)
SHAPE = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=24"]
RUNS = {
    "arm": (["--family", "arm"], [], "ARM", "causal"),
    "arm_digits": (["--family", "arm"], ["num_subtokens=9"], "ARM over sub-tokens", "causal"),
    "mdm": ([], ["num_subtokens=1"], "MDM", "subtoken"),
    "prime": ([], ["base=7"], "MDM-Prime", "subtoken"),
    "uniform": (["--family", "uniform"], [], "uniform-state", "uniform"),
    "interpolating": (
        ["--family", "interpolating"],
        ["alpha_0=0.25"],
        "interpolating, alpha_0 = 0.25",
        "interpolating",
    ),
    "interpolating_tree": (
        ["--family", "interpolating", "--codes", "similarity"],
        ["alpha_0=0.25", "num_subtokens=9", "tree_levels=[4,9]", "subtoken_embedding=ancestors", "head=stages"],
        "interpolating, alpha_0 = 0.25, tree embedding, head in stages",
        "interpolating",
    ),
    "nested": (
        ["--codes", "similarity"],
        ["base=2", "reveal_order=nested", "stage_digits=[4,9]", "subtoken_embedding=ancestors", "head_ancestors=true"],
        "sub-tokens, nested order",
        "nested",
    ),
    "coarse_first": (
        ["--codes", "similarity"],
        ["base=2", "reveal_order=coarse_first", "stage_digits=[4,9]", "subtoken_embedding=ancestors"],
        "sub-tokens, coarse-first order",
        "coarse_first",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module", params=list(RUNS))
def run(request, source):
    """(name, folder of the finished run, its record); all runs share one prepared text."""
    options, model, *_ = RUNS[request.param]
    folder = source / request.param
    base = ["--data", str(source / "text.jsonl"), "--data_dir", str(source / "data"), "--output_dir", str(folder)]
    assert training.main([*base, *OPTIONS.split(), *options, "--model", *SHAPE, *model]) == 0
    record = json.loads((folder / "results" / "train.json").read_text(encoding="utf-8"))
    return request.param, folder, record["results"]


def test_its_record_names_the_family_and_holds_its_bound(run):
    name, _, results = run
    _, _, label, method = RUNS[name]
    bound = results["evaluation"]["bound"]
    assert results["family"] == results["label"] == label
    assert bound["method"] == method and bound["is_bound"]
    assert bound["is_exact"] == name.startswith("arm")
    assert len(bound["nats_of_sequences"]) == bound["num_sequences"] == 6
    assert sum(bound["nats_of_sequences"]) / bound["num_tokens"] == pytest.approx(bound["nats_per_token"], abs=1e-3)
    has_paper_loss = name in ("mdm", "prime")
    assert ("paper_loss" in results["evaluation"]) == has_paper_loss
    assert results["training"]["flops_measured"] > 0


def test_all_families_read_the_same_text(run, source):
    _, folder, results = run
    shared = json.loads((source / "data" / "train.json").read_text(encoding="utf-8"))
    assert results["data"]["fingerprints"]["train"] == shared["fingerprint"]
    assert sorted(each.name for each in (folder / "data").iterdir()) == ["tokenizer"]  # its own digits, nothing else


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"subtoken_embedding": "ancestors", "tree_levels": [4, 9]}, "MDM, tree embedding"),
        ({"subtoken_embedding": "ancestors"}, "MDM"),
        ({"subtoken_embedding": "ancestors", "head": "stages"}, "MDM, head in stages"),
        ({}, "MDM, sub-token embedding"),
    ],
)
def test_a_model_that_hides_whole_tokens_is_called_mdm(fields, label):
    config = FAMILIES["prime"].config_class(vocab_size=300, base=2, reveal_order="token", **fields)
    assert label_of(config) == label


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"reveal_order": "coarse_first"}, "sub-tokens, coarse-first order"),
        ({"reveal_order": "coarse_first", "training_order": "coarse_first"}, "sub-tokens, coarse-first order"),
        (
            {"reveal_order": "coarse_first", "training_order": "nested"},
            "sub-tokens, coarse-first order, trained nested",
        ),
        ({"reveal_order": "windows", "stage_windows": [[0, 1]] * 2}, "sub-tokens, stages in windows"),
    ],
)
def test_a_training_order_of_its_own_is_named(fields, label):
    config = FAMILIES["prime"].config_class(vocab_size=300, base=2, stage_digits=[4, 9], **fields)
    assert label_of(config) == label


def test_its_folder_loads_bounds_and_generates(run):
    name, folder, results = run
    model, tokenizer = load_model_and_tokenizer(folder, device="cpu")
    assert label_of(model.config) == results["family"]
    assert bound_method(model.config) == model.bound_method and model.bound_method in model.likelihood_methods
    ids = tokenizer("the red cat sees", return_tensors="pt")["input_ids"]
    assert model.log_likelihood(ids, method=model.bound_method, num_samples=8).is_bound
    first, again, other = (model.generate(ids, max_new_tokens=6, do_sample=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape[1] <= ids.shape[1] + 6 and torch.equal(first[:, : ids.shape[1]], ids)
    assert other.shape[0] == 1
    if name.startswith("arm"):
        assert (
            type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__ == "PrimeV2ForCausalLM"
        )


def test_lm_eval_scores_it_and_generates(run):
    name, folder, _ = run
    lm = PrimeV2LM(pretrained=str(folder), device="cpu", num_samples=16)
    answers = [(" sees", " sees the dog"), (" house", " under")]
    requests = [
        Instance("loglikelihood", {}, (f"the red cat {number}", answer), index, ("cats", number, 1))
        for number, each in enumerate(answers)
        for index, answer in enumerate(each)
    ]
    together = lm.loglikelihood(requests, disable_tqdm=True)
    alone = [lm.loglikelihood(requests[start : start + 2], disable_tqdm=True) for start in (0, 2)]
    assert [value for value, _ in together] == pytest.approx([value for each in alone for value, _ in each], abs=1e-4)
    assert all(value < 0 for value, _ in together)
    rolling = [Instance("loglikelihood_rolling", {}, ("the red cat sees a dog under the tree " * 3,), 0, ("t", 0, 1))]
    assert lm.loglikelihood_rolling(rolling, disable_tqdm=True)[0] < -10
    until = Instance("generate_until", {}, ("the red", {"until": ["."], "max_gen_toks": 4, "do_sample": False}), 0)
    assert isinstance(lm.generate_until([until], disable_tqdm=True)[0], str)


def test_the_commands_take_it(run, source, tmp_path):
    name, folder, results = run
    (tmp_path / "text.txt").write_text("the red cat sees a dog under the blue tree and the house " * 4)
    done = CliRunner().invoke(app, ["ppl", str(folder), str(tmp_path / "text.txt"), "--json", "--num-samples", "4"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["evaluation"]["is_bound"]
    done = CliRunner().invoke(
        app, ["generate", str(folder), "--prompt", "the red", "--max-new-tokens", "4", "--seed", "1"]
    )
    assert done.exit_code == 0 and done.stdout.startswith("the red")
    card = (folder / "README.md").read_text(encoding="utf-8")
    expected = {
        "arm": "An autoregressive language model",
        "uniform": "A uniform-state",
        "interpolating": "An interpolating",
    }
    assert expected.get(name.split("_")[0], "A masked diffusion language model over sub-tokens") in card
    assert ("≤" in card) != name.startswith("arm")


def test_options_of_another_family_are_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        training.main(["--family", "uniform", "--output_dir", str(tmp_path), "--model", "alpha_0=0.5"])
    error = capsys.readouterr().err
    assert re.search(r"--model alpha_0 is no field of PrimeV2UniformConfig .*belongs to --family interpolating", error)
    with pytest.raises(SystemExit):
        training.main(["--family", "rnn", "--output_dir", str(tmp_path)])
    assert "--family rnn is not one of prime, arm, uniform, interpolating" in capsys.readouterr().err


def test_each_familys_classes_and_methods_are_what_its_entry_says():
    for family in FAMILIES.values():
        config = family.config_class(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        model = family.model_class(config)
        assert config.model_type == family.model_type
        assert set(model.likelihood_methods) <= set(family.methods)
        assert model.bound_method == bound_method(config)
    with pytest.raises(ValueError, match="is not one of prime, arm, uniform, interpolating"):
        family_named("mamba")


TREE = {"num_subtokens": 4, "subtoken_embedding": "ancestors", "tree_levels": [2, 4]}
STAGES = {"stage_digits": [2, 4]}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("prime", {}),
        ("prime", {"num_subtokens": 1}),
        ("prime", {**STAGES, "reveal_order": "nested"}),
        ("prime", {**TREE, "reveal_order": "token"}),
        ("prime", {**TREE, **STAGES, "reveal_order": "coarse_first"}),
        ("prime", {**TREE, **STAGES, "reveal_order": "windows", "stage_windows": [[0, 0.8], [0.2, 1]]}),
        ("arm", TREE),
        ("uniform", {}),
        ("interpolating", TREE),
    ],
)
def test_the_methods_of_a_configuration_are_those_that_its_models_take(name, fields):
    family = FAMILIES[name]
    config = family.config_class(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, **fields)
    methods = methods_of(config)
    assert methods == family.model_class(config).likelihood_methods
    refused = []
    for method in family.methods:
        try:
            check_method(config, method)
        except ValueError as error:
            assert re.search("needs a config with|use one of", str(error))
            refused.append(method)
    assert set(refused) == set(family.methods) - set(methods)


def test_text_of_other_options_is_not_shared(run, source, capsys):
    base = [
        "--data",
        str(source / "text.jsonl"),
        "--data_dir",
        str(source / "data"),
        "--output_dir",
        str(source / "x"),
    ]
    assert training.main([*base, *OPTIONS.split(), "--block_size", "8", "--model", *SHAPE]) == 2
    assert "holds text with block_size=16, not 8" in capsys.readouterr().err
