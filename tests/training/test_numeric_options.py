"""No value of a numeric option of any command is a traceback: an answer, or one sentence with status 2."""

import contextlib
import json
import signal
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from command_options import NUMBERS, Parameter
from command_runs import DOCUMENTS, prepared
from typer.testing import CliRunner

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.commands.main import app
from prime_v2.tokenization.bpe import train_bpe

TEXT = "the quick brown fox jumps over the lazy dog"
HUGE = "100000000000"  # more than any memory holds and any patience waits for, and an integer of 64 bits
BAD = ["0", "-1", HUGE, f"-{HUGE}", "1" + "0" * 30, "nan", "inf", "-inf", "1e-320", "1.5", "text", "", "True", "0x1"]
SECONDS = 60  # of one call; the slowest takes about a second

COMPARISON = {
    "train": {
        "data": "TEXT",
        "tokenizer": "bpe",
        "bpe_vocab_size": 262,
        "block_size": 8,
        "global_batch": 2,
        "per_device_train_batch_size": 2,
    },
    "budgets": [1e9],
    "runs": {"MDM": {"model": {"num_subtokens": 1}}},
}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# A call of every command that has a numeric option, to which the option is added.
CALLS = {
    "generate": ["MODEL", "--max-new-tokens", "2"],
    "ppl": ["MODEL", "TEXT", "--max-documents", "1", "--num-samples", "1"],
    "entropy": ["TEXT", "--tokenizer", "MODEL"],
    "overlap": ["PREPARED", "TEXT"],
    "quality": [
        *("MODEL", "--law-only", "--text", "TEXT", "--length", "8", "--passes", "2", "--samples", "8", "--draws", "1"),
        *("--out", "OUT"),
    ],
    "analyze": ["MODEL", "TEXT", "--max-windows", "1"],
    "compare": ["COMPARISON", "--dry-run"],
    "convert": ["NOTHING", "OUT", "--tokenizer", "MODEL"],
    "scaling fit": ["--family", "MDM", "--approach", "2", "--bootstrap", "1"],
    "scaling plan": ["--family", "MDM", "--bootstrap", "1", "--flops", "1e18"],
    "scaling efficiency": ["ARM", "MDM", "--bootstrap", "1", "--flops", "1e18"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What the names in capital letters stand for."""
    root = tmp_path_factory.mktemp("numbers")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(train_bpe([TEXT] * 3, 262), special_tokens={"eos_token": "<|endoftext|>"})
    config = PrimeV2Config(**SHAPE, vocab_size=len(tokenizer.code_table), max_position_embeddings=24, eos_token_id=0)
    PrimeV2ForMaskedDiffusion(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "text.txt").write_text(f"{TEXT}\n{TEXT[::-1]}\n" * 20)
    comparison = json.loads(json.dumps(COMPARISON).replace("TEXT", str(root / "text.txt")))
    comparison["train"]["model"] = SHAPE
    (root / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    names = {"MODEL": "model", "TEXT": "text.txt", "COMPARISON": "comparison.yaml", "NOTHING": "nothing", "OUT": "out"}
    return {name: str(root / path) for name, path in names.items()} | {"PREPARED": str(prepared(root, DOCUMENTS))}


class Slow(BaseException):
    """A call took longer than SECONDS."""


@contextlib.contextmanager
def limited():
    def stop(*_):
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def without(line: list[str], flag: str) -> list[str]:
    """The call without the usual value of this option."""
    if flag not in line:
        return line
    place = line.index(flag)
    return [*line[:place], *line[place + 2 :]]


def test_every_command_with_a_numeric_option_has_a_call():
    assert {" ".join(each.command) for each in NUMBERS} - {"scaling plot"} == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_themselves_are_answered(call, places, tmp_path, monkeypatch):
    """But for `convert`, whose options are checked before its file is looked for."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*call.split(), *(places.get(each, each) for each in CALLS[call])])
    assert result.exit_code == (2 if call == "convert" else 0), result.output


@pytest.mark.parametrize("parameter", NUMBERS, ids=str)
def test_any_value_of_a_numeric_option_is_an_answer_or_a_sentence(
    parameter: Parameter, places, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = " ".join(parameter.command)
    call = [places.get(each, each) for each in without(CALLS[command], parameter.flag)]
    problems = []
    for value in BAD:
        try:
            with limited():
                result = CliRunner().invoke(app, [*parameter.command, *call, f"{parameter.flag}={value}"])
        except Slow:
            problems.append(f"{value}: more than {SECONDS} seconds")
            continue
        lines = result.stderr.splitlines()
        if command == "quality":  # whose progress comes before a refusal
            lines = [line for line in lines if line.startswith("prime-v2")] or lines
        if not isinstance(result.exception, SystemExit | None):
            problems.append(f"{value}: {''.join(traceback.format_exception(result.exception))[-600:]}")
        elif result.exit_code not in (0, 2):
            problems.append(f"{value}: status {result.exit_code}")
        elif result.exit_code == 0 and value in ("nan", "text", "", "True", "0x1"):
            problems.append(f"{value}: taken as a number")
        elif result.exit_code == 2 and (len(lines) != 1 or not lines[0].startswith(f"prime-v2 {command}: error: ")):
            problems.append(f"{value}: {result.stderr}")
        elif result.exit_code == 2 and command != "convert":
            said = lines[0].split("error: ")[1]
            if parameter.flag not in said and parameter.name not in said:
                problems.append(f"{value}: the option is not named: {said}")
    assert not problems, "\n".join(problems)
    assert list(tmp_path.iterdir()) == []
