"""The command `prime-v2`: what it prints where, and one sentence with status 2 for bad input."""

import json
import subprocess
import sys

import pytest
import torch
from command_options import PARAMETERS
from command_runs import refused, run

from prime_v2 import (
    PrimeV2Config,
)
from prime_v2.commands.base import bad_input
from prime_v2.eval.loading import load_model_and_tokenizer


@pytest.mark.parametrize("command", dict.fromkeys(each.command for each in PARAMETERS), ids=" ".join)
def test_help_names_a_command_and_all_its_arguments_and_options(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: prime-v2 {' '.join(command)} ")
    flags = {each.flag or each.info.metavar for each in PARAMETERS if each.command == command}
    assert {flag for flag in flags if flag.split(" ")[0] not in result.stdout} == set()
    (line,) = (
        line for line in run(*command[:-1], "--help").stdout.splitlines() if line.startswith(f"  {command[-1]} ")
    )
    assert line.endswith(".") and not line.endswith("...")  # a whole sentence


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from prime_v2.commands.main import app\n"
        "try: app(['ppl', '--help'])\n"
        "except SystemExit: pass\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('prime_v2.')}\n"
        "print(*sorted(rooms | {'torch', 'transformers', 'numpy', 'datasets', 'rich', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "commands output"


def test_version_and_no_arguments():
    assert run("--version").stdout == "prime-v2 0.1.0\n"
    result = run()
    assert (result.exit_code, result.stderr) == (2, "")
    assert "Commands:" in result.stdout


def test_unknown_commands_and_options_are_refused_in_one_sentence(model_dir):
    result = run("train")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("prime-v2: error: No such command 'train'")
    assert "No such option: --speed" in refused("generate", model_dir, "--speed")
    assert "Missing argument 'SOURCE'" in refused("ppl", model_dir)
    assert "--method guess is not one of causal, chain" in refused("ppl", model_dir, "docs", "--method", "guess")
    assert "'--num-samples'" in refused("generate", model_dir, "--num-samples", 0)


def test_too_little_memory_is_a_sentence():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert bad_input(error).startswith("not enough memory; ask for less at once")


def test_faults_of_ours_keep_their_traceback():
    assert bad_input(RuntimeError("a fault")) is None
    assert bad_input(BrokenPipeError(32, "Broken pipe")) is None
    assert bad_input(OverflowError("a fault")) is None
    assert bad_input(ValueError("two\n lines.")) == "two lines"
    assert bad_input(FileNotFoundError(2, "No such file", "x.txt")) == "x.txt: No such file"
    with pytest.raises(Exception, match="does not fit in num_subtokens=2") as caught:
        PrimeV2Config(vocab_size=10, base=2, num_subtokens=2)
    assert bad_input(caught.value).startswith("vocab_size=10 does not fit in num_subtokens=2")


def test_the_real_command_keeps_stdout_json_and_stderr_one_line(model_dir, text_file, tmp_path):
    prime = [sys.executable, "-m", "prime_v2.commands.main"]
    scored = [*prime, "ppl", model_dir, text_file, "--json", "--num-samples", "2", "--method", "paper_loss"]
    done = subprocess.run(scored, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["evaluation"]["is_bound"] is False

    done = subprocess.run([*scored, "--output", "."], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("prime-v2 ppl: error: --output . exists")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- loading


def test_model_and_tokenizer_are_loaded_in_float32_on_the_cpu(model_dir):
    model, tokenizer = load_model_and_tokenizer(model_dir, device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert (model.code_table.codes[:-1].numpy() == tokenizer.code_table).all()
    assert load_model_and_tokenizer(str(model_dir), "cpu", "bfloat16")[0].dtype == torch.bfloat16


def test_folders_that_hold_no_whole_model_are_refused(broken):
    def refusal() -> str:
        return refused("generate", broken, "--max-new-tokens", 2)

    (broken / "tokenizer.json").rename(broken / "kept.json")
    assert "has no tokenizer" in refusal()
    (broken / "tokenizer.json").write_text('{"broken": true}')
    assert "does not hold a tokenizer that can be loaded" in refusal()
    (broken / "kept.json").rename(broken / "tokenizer.json")

    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:500])
    assert "cannot be loaded" in refusal()
    (broken / "model.safetensors").unlink()
    assert "has no weights (model.safetensors or" in refusal()
    (broken / "model.safetensors").write_bytes(weights)

    config = json.loads((broken / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "holds a model of type 'gpt2'"),
        ({"num_hidden_layers": 2}, "lack 9 tensors that config.json asks for"),
        ({"hidden_size": 32, "intermediate_size": 64}, "have other shapes for"),
        ({"shuffle_ratio": 2}, "shuffle_ratio=2 is outside [0, 1]"),
    ):
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        assert message in refusal()
    (broken / "config.json").write_text("[1")
    assert "config.json is not JSON" in refusal()
    (broken / "config.json").unlink()
    assert "has no config.json" in refusal()


def test_a_tokenizer_with_another_code_table_is_refused(broken):
    table = json.loads((broken / "code_table.json").read_text())
    table["codes"][5], table["codes"][9] = table["codes"][9], table["codes"][5]
    (broken / "code_table.json").write_text(json.dumps(table))
    assert "the codes are not those of codes_sha256=" in refused("generate", broken)
    del table["codes_sha256"]  # as in files of before there were hashes
    (broken / "code_table.json").write_text(json.dumps(table))
    assert "differs from the model's (2 of 280 tokens, the first being 5)" in refused("generate", broken)


def test_places_that_hold_nothing_are_refused(tmp_path, text_file):
    assert "does not exist; give a folder" in refused("generate", tmp_path / "nowhere")
    assert "is a file; give a folder" in refused("generate", text_file)
    assert "is neither a folder here nor a model" in refused("generate", "someone/something")
    assert "the name is empty" in refused("generate", "")


def test_devices_and_types_that_are_not_here_are_refused(model_dir):
    assert "--device nowhere cannot be used; here are cpu" in refused("generate", model_dir, "--device", "nowhere")
    assert "--dtype int8 is not a floating-point type" in refused("generate", model_dir, "--dtype", "int8")
