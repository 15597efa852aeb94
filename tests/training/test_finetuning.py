"""Runs of train.py that start from a trained folder: on text, on questions with answers, with adapters."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from prime_v2.data.supervised import Supervision, read_splits
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.training import run as training
from prime_v2.training.finetuning import LORA_TARGETS, check_start
from prime_v2.training.options import RunOptions

ROWS = [(f"What is {i} plus {j}?", "so " * (i % 4) + f"{i} and {j} make {i + j}") for i in range(8) for j in range(6)]
TINY = (
    "--block_size 48 --max_steps 6 --global_batch 4 --per_device_train_batch_size 2 --save_steps 3 --eval_steps 3 "
    "--logging_steps 1 --eval_sequences 4 --test_sequences 4 --eval_num_samples 2 --num_generated 1 --dev_share 0.2 "
    "--test_share 0.2 --learning_rate 0.01 --warmup_steps 0"
)
SUMS = ["--prompt_field", "question", "--answer_field", "answer", "--example_template", "Q: {prompt}\nA: {answer}"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{q} {a}. " * 4}) + "\n" for q, a in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(text, tmp_path_factory) -> Path:
    """A trained folder."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    model = ["--model", "hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=64"]
    options = ["--data", str(text), "--output_dir", str(folder), "--bpe_vocab_size", "270", *TINY.split(), *model]
    assert training.main(options) == 0
    return folder


def record_of(folder: Path) -> dict:
    return json.loads((folder / "results" / "train.json").read_text())["results"]


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in record_of(folder)["history"] if "loss" in entry]


@pytest.fixture(scope="module")
def tuned(base, sums, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    options = ["--init_from", str(base), "--data", str(sums), *SUMS, "--output_dir", str(folder), *TINY.split()]
    assert training.main(options) == 0
    return folder


def test_a_run_on_questions_reports_the_bound_of_the_answers_given_the_questions(tuned, base, sums):
    bound = record_of(tuned)["evaluation"]["bound"]
    model, tokenizer = load_model_and_tokenizer(tuned, "cpu")
    supervision = Supervision(str(sums), "question", "answer", SUMS[-1], None, 48, False, 0.2, 0.2, 0)
    test = read_splits(supervision, tokenizer)["test"]
    total = count = 0
    for i in range(4):  # one by one, with the padding and its mask in place
        row = {key: each.unsqueeze(0) for key, each in test[i].items()}
        given = (row["labels"] == -100) & row["attention_mask"].bool()
        output = model.log_likelihood(
            row["input_ids"], row["attention_mask"], given, method=bound["method"], num_samples=2, seed=0
        )
        total, count = total - float(output.value), count + int(output.num_scored)
    assert count == bound["num_tokens"] == int((test.lengths - test.prompt_lengths)[:4].sum())
    assert bound["nats_per_token"] == pytest.approx(total / count, rel=1e-5)
    assert bound["nats_per_answer"] == pytest.approx(total / 4, rel=1e-5)
    assert bound["text_bytes"] == round(test.bytes_per_token * count)
    assert record_of(tuned)["data"]["train_dropped"] == 0
    assert record_of(tuned)["samples"][0].startswith("Q: What is")
    assert not torch.equal(model.lm_head.weight, load_model_and_tokenizer(base, "cpu")[0].lm_head.weight)


def test_answers_of_unequal_lengths_weigh_the_same_in_any_accumulation_split(tuned, base, sums, tmp_path):
    options = [
        "--init_from",
        str(base),
        "--data",
        str(sums),
        *SUMS,
        *TINY.split(),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert training.main([*options, "--per_device_train_batch_size", "1"]) == 0
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tuned), abs=1e-4)  # float32 sums


def test_scored_padding_is_in_the_bound_of_an_answer(base, sums, tmp_path):
    options = [
        "--init_from",
        str(base),
        "--data",
        str(sums),
        *SUMS,
        "--score_padding",
        *TINY.split(),
        "--max_steps",
        "1",
    ]
    assert training.main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    bound = record_of(tmp_path / "run")["evaluation"]["bound"]
    tokenizer = load_model_and_tokenizer(base, "cpu")[1]
    supervision = Supervision(str(sums), "question", "answer", SUMS[-1], None, 48, True, 0.2, 0.2, 0)
    test = read_splits(supervision, tokenizer)["test"].first(4)
    assert bound["num_tokens"] == int((48 - test.prompt_lengths).sum())


def test_the_recipe_for_gsm8k_runs_on_its_format(base, sums, tmp_path):
    recipe = Path(training.__file__).resolve().parent.parent / "configs" / "sft_gsm8k.yaml"
    options = ["--config", str(recipe), "--init_from", str(base), "--data", str(sums), *TINY.split()]
    assert training.main([*options, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]) == 0
    course = json.loads((tmp_path / "run" / "run.json").read_text())
    assert course["example_template"] == "Question: {prompt}\nAnswer: {answer}" and course["score_padding"]
    assert record_of(tmp_path / "run")["samples"][0].startswith("Question: What is")


def test_other_data_in_the_same_run_is_refused(tuned, base, sums, tmp_path, capsys):
    folder = tmp_path / "run"
    copy = tmp_path / "sums.jsonl"
    copy.write_text(sums.read_text())
    options = ["--init_from", str(base), "--data", str(copy), *SUMS, "--output_dir", str(folder), *TINY.split()]
    assert training.main(options) == 0
    (folder / "results" / "train.json").unlink()
    copy.write_text(sums.read_text().replace("make", "give"))
    assert training.main(options) == 2
    assert "has changed since this run began; use a new --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["init_from.json", "examples.json"])
@pytest.mark.parametrize(
    "content",
    ["[]", "", "[" * 100_000, '{"files": 1}', '{"files": {"model.safetensors": 3}}'],
    ids=["list", "nothing", "depth", "other", "file"],
)
def test_what_a_run_noted_of_its_beginning_is_damaged_in_a_sentence(
    name, content, tuned, base, sums, tmp_path, capsys
):
    folder = Path(shutil.copytree(tuned, tmp_path / "run"))
    (folder / "results" / "train.json").unlink()
    options = ["--init_from", str(base), "--data", str(sums), *SUMS, "--output_dir", str(folder), *TINY.split()]
    (folder / "data" / name).write_text(content)
    assert training.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"({name} is damaged); put a copy of {name} back" in line


def test_another_model_in_the_folder_that_the_run_began_from_is_refused(base, sums, tmp_path, capsys):
    copy, folder = Path(shutil.copytree(base, tmp_path / "base")), tmp_path / "run"
    options = ["--init_from", str(copy), "--data", str(sums), *SUMS, "--output_dir", str(folder), *TINY.split()]
    assert training.main(options) == 0
    (folder / "results" / "train.json").unlink()
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert training.main(options) == 2
    assert "has changed since this run began (model.safetensors has another content)" in capsys.readouterr().err


def test_training_goes_on_from_the_weights_of_a_folder(text, base, tmp_path):
    """A learning rate of 0 leaves them as they are; the tokenizer is the folder's."""
    folder = tmp_path / "run"
    options = [
        "--init_from",
        str(base),
        "--data",
        str(text),
        "--output_dir",
        str(folder),
        *TINY.split(),
        "--max_steps",
        "2",
    ]
    assert training.main([*options, "--learning_rate", "0"]) == 0
    expected, found = (load_file(each / "model.safetensors") for each in (base, folder))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    for name in ("tokenizer.json", "code_table.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    bound, before = (record_of(each)["evaluation"]["bound"] for each in (folder, base))
    assert bound["nats_per_token"] == pytest.approx(before["nats_per_token"], rel=1e-6)  # the same test blocks


# LoRA in train.py


@pytest.fixture(scope="module")
def adapted(base, sums, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    options = [
        "--init_from",
        str(base),
        "--lora",
        "2",
        "--data",
        str(sums),
        *SUMS,
        "--output_dir",
        str(folder),
        *TINY.split(),
    ]
    assert training.main(options) == 0
    return folder


def test_a_lora_run_leaves_its_adapter_and_the_merged_model(adapted, base):
    adapter = load_file(adapted / "adapter" / "adapter_model.safetensors")
    expected, found = (load_file(each / "model.safetensors") for each in (base, adapted))
    assert expected.keys() == found.keys()
    for key, weight in expected.items():
        name = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" in adapter:
            weight = weight + 2 * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]  # alpha / r = 2
            torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[key], weight)
    assert len(adapter) == 2 * len(LORA_TARGETS)
    assert not (adapted / "adapter_model.safetensors").exists()
    assert (adapted / "README.md").exists()
    trained = record_of(adapted)["training"]["parameters_trained"]
    assert trained == sum(each.numel() for each in adapter.values())


def test_lm_eval_scores_the_adapter_on_its_base_as_the_merged_model(adapted, base):
    requests = [
        Instance("loglikelihood", {}, (f"Q: {ROWS[i][0]}\nA:", f" {ROWS[j][1]}"), j, ("sums", i, 1))
        for i in range(2)
        for j in range(2)
    ]
    options = {"num_samples": 4, "adaptive": "off", "method": "subtoken"}
    merged = PrimeV2LM(pretrained=str(adapted), **options).loglikelihood(requests, disable_tqdm=True)
    lm = PrimeV2LM(pretrained=str(base), peft=str(adapted / "adapter"), **options)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in merged], rel=1e-5)
    plain = PrimeV2LM(pretrained=str(base), **options).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in plain] != pytest.approx([value for value, _ in merged], rel=1e-3)


def test_a_stopped_lora_run_continues_to_the_same_adapter(adapted, base, sums, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    options = [
        "--init_from",
        str(base),
        "--lora",
        "2",
        "--data",
        str(sums),
        *SUMS,
        "--output_dir",
        str(folder),
        *TINY.split(),
    ]
    end = training.StopOnSignal.on_step_end

    def stopped(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.received = signal.SIGINT
        return end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(training.StopOnSignal, "on_step_end", stopped)
        assert training.main(options) == 128 + signal.SIGINT
    assert training.main(options) == 0
    expected, found = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (adapted, folder))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora", "2"], "--lora 2 needs a trained model; add --init_from DIR"),
        (["--prompt_field", "q", "--answer_field", "a"], "--prompt_field q needs a trained model"),
        (["--init_from", "x", "--prompt_field", "q"], "--prompt_field and --answer_field belong together; give both"),
        (["--init_from", "x", "--lora", "0"], "--lora 0 must be at least 1; use 8"),
        (["--init_from", "x", "--tokenizer", "gpt2"], "--tokenizer is decided by the folder of --init_from; leave"),
        (
            ["--init_from", "x", "--codes=shuffle"],
            "--codes is decided by the folder of --init_from; leave",
        ),
        (
            ["--init_from", "x", "--embedding_init", "random"],
            "--embedding_init is decided by the folder of",
        ),
        (["--score_padding"], "--score_padding is of questions with answers"),
        (["--init_from", "x", *SUMS[:4], "--short_share", "0.1"], "are not for questions with answers; leave out"),
        (["--init_from", "x", *SUMS[:4], "--example_template", "{prompt}"], "must hold {prompt} before one {answer}"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(options, message, capsys):
    with pytest.raises(SystemExit):
        training.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_adapters_are_not_sharded(engine, monkeypatch):
    run = RunOptions(init_from="x", lora=2)
    assert check_start(run) == []
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    assert check_start(run) == [f"--lora does not run with {engine} here; use configs/accelerate/ddp.yaml"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--family", "arm"], "holds a model of --family prime, not arm"),
        (["--block_size", "64"], "--block_size 64 is more than max_position_embeddings=48 of --init_from"),
        (["--model", "hidden_size=8"], "--model hidden_size=8 is fixed at 32 by the weights of --init_from; only"),
        (["--model", "objective=best"], "objective='best' is not one of joint, marginal"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_leaves_nothing(base, sums, options, message, tmp_path, capsys):
    start = [
        "--init_from",
        str(base),
        "--data",
        str(sums),
        *SUMS,
        *TINY.split(),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert training.main([*start, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_sizes_of_a_recipe_give_way_to_those_of_the_weights(base, sums, tmp_path):
    """A size that a flag gives may be that of the weights; what only training reads is the recipe's."""
    kept = json.loads((base / "config.json").read_text())
    start = ["--config", "configs/tiny.yaml", "--init_from", str(base), "--data", str(sums), *SUMS, *TINY.split()]
    start += ["--max_steps", "1", "--num_generated", "0", "--output_dir", str(tmp_path / "run")]
    assert training.main([*start, "--model", f"hidden_size={kept['hidden_size']}"]) == 0
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert found["hidden_size"] == kept["hidden_size"] and found["num_hidden_layers"] == kept["num_hidden_layers"]
    assert (found["objective"], found["loss_weight"]) == ("marginal", "low_variance")


def test_an_unknown_field_of_a_recipe_is_refused_beside_init_from(base, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_steps: 1\nmodel: {hiden_size: 8}\n")
    with pytest.raises(SystemExit):
        training.main(["--config", str(recipe), "--init_from", str(base), "--output_dir", str(tmp_path / "run")])
    assert "--model hiden_size is no field of PrimeV2Config" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused(sums, tmp_path, capsys):
    start = ["--init_from", str(tmp_path / "none"), "--data", str(sums), *SUMS, *TINY.split()]
    assert training.main([*start, "--output_dir", str(tmp_path / "run")]) == 2
    assert "is no folder; give one that train.py or save_pretrained wrote" in capsys.readouterr().err
