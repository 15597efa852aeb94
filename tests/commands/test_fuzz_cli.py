"""Any flags of `prime-v2`: numbers or text with status 0, or one sentence with status 2, never a traceback."""

import json
import math
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import COUNTS, cases
from hypothesis import given
from hypothesis import strategies as st
from networks import TINY
from typer.testing import CliRunner

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.commands.main import app
from prime_v2.tokenization.bpe import train_bpe

TEXT = "the quick brown fox jumps over the lazy dog"
COUNT = ["1", "2", "3", "4", "5", "8", "0", "-1", "1.5", "x", "", "99999999999999999999"]
SEED = ["0", "7", "3", "12", "-1", "99999999999999999999999", "x", "0.5"]
NUMBER = ["1", "0.5", "0.9", "1.0", "0.25", "0", "-1", "nan", "inf", "1e-300", "1e300", "x", ""]
PATHS = [*["MODEL"] * 15, "NOTHING", "TEXT", "EMPTY", "FOLDER", "", ".", "a/b/c", "\0", "é"]
TEXTS = [*["TEXT", "JSONL"] * 8, "NOTHING", "EMPTY", "FOLDER", "MODEL", "BINARY", "", "\0"]
PLAIN = ["", "the", "the quick", "é漢\n", "<|mask|>", "<|endoftext|>", "\udce9", TEXT * 9]
DEVICE = {"--device": ["cpu", "cpu", "nowhere", "", "cpu:7"], "--dtype": ["float32", "bfloat16", "int8", "x", ""]}
WRITES = {"--output": ["OUT", "OUT", "TEXT", "", ".", "NOTHING/deep.json"]}
FLAG: list[str] = []
# Of each command: its arguments, then its options with values; FLAG for those that take none.
COMMANDS: dict[str, tuple[list[list[str]], dict[str, list[str]]]] = {
    "generate": (
        [PATHS],
        {
            "--prompt": PLAIN,
            "--suffix": PLAIN,
            "--max-new-tokens": COUNT,
            "--max-denoising-steps": COUNT,
            "--temperature": NUMBER,
            "--top-p": NUMBER,
            "--seed": SEED,
            "--num-samples": COUNT,
            "--greedy": FLAG,
            "--sample": FLAG,
            "--watch": FLAG,
            "--page": ["OUT", "OUT", "TEXT", "", ".", "NOTHING/deep.html"],
            "--beside": ["ancestral", "margin,unit=digit,steps=2", "margin,steps", "x", "", "threshold,threshold=nan"],
            **DEVICE,
        },
    ),
    "ppl": (
        [PATHS, TEXTS],
        {
            "--window": COUNT,
            "--stride": COUNT,
            "--method": [
                "subtoken",
                "token",
                "paper_loss",
                "chain",
                "orders",
                "nested",
                "causal",
                "uniform",
                "x",
                "",
            ],
            "--num-samples": COUNT,
            "--seed": SEED,
            "--split": ["train", "test", "x", ""],
            "--text-field": ["text", "x", ""],
            "--max-documents": COUNT,
            "--suite": ["zero-shot", "x"],
            "--data": ["FOLDER", "NOTHING"],
            "--only": ["ptb", "x"],
            **DEVICE,
            **WRITES,
        },
    ),
    "entropy": (
        [TEXTS],
        {
            "--tokenizer": PATHS,
            "--shuffle-seed": SEED,
            "--shuffle-domain": ["codes", "vocab", "x", ""],
            "--split": ["x"],
            "--text-field": ["text", "x"],
            "--max-documents": COUNT,
            **WRITES,
        },
    ),
    "overlap": (
        [PATHS, TEXTS],
        {"--split": ["test", "x", ""], "--text-field": ["text", "x"], "--max-documents": COUNT, **WRITES},
    ),
    "analyze": (
        [PATHS, TEXTS],
        {
            "--masked-share": NUMBER,
            "--max-windows": COUNT,
            "--window": COUNT,
            "--seed": SEED,
            **DEVICE,
            **WRITES,
        },
    ),
    "card": (
        [PATHS],
        {"--record": ["JSONL", "TEXT", "NOTHING", "EMPTY", "", "MODEL"], "--export": ["OUT", "FOLDER", ""]},
    ),
    "tasks": (
        [["FOLDER", "NOTHING", "TEXT", "MODEL", ""], ["OUT", "TEXT", "FOLDER", ""]],
        {"--tasks": ["sciq", "x", "", ","], "--split": ["test", "sciq=train", "=", "x", ""]},
    ),
    "scaling plan": (
        [["published", "published", "published", "NOTHING", "TEXT", "FOLDER", ""]],
        {
            "--flops": ["3e20", "1e17", *NUMBER],
            "--fit": ["JSONL", "TEXT", "NOTHING", ""],
            "--family": ["MDM", "x", ""],
            "--loss": ["bound", "paper_loss", "x"],
            "--bootstrap": ["0", "2", "-1", "x"],
            "--seed": SEED,
            **WRITES,
        },
    ),
    "compare": (
        [[*["families"] * 5, "TEXT", "JSONL", "NOTHING", "EMPTY", "FOLDER", "", "\0"]],
        {
            "--run": ["MDM", "mdm", "x", ""],
            "--shape": ["64x2", ""],
            "--seed": ["0", "7", "-1", "x"],
            "--jobs": COUNT,
            "--launcher": ["", "x"],
            "--out": ["OUT"],
            **WRITES,
        },
    ),
}
USUAL = {"generate": ["--max-new-tokens", "2"], "ppl": ["--max-documents", "2"], "compare": ["--dry-run"]}
USUAL |= {"entropy": ["--tokenizer", "MODEL"], "scaling plan": ["--bootstrap", "0", "--flops", "1e18"]}
USUAL |= {"analyze": ["--max-windows", "1"]}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """What the names in capital letters stand for."""
    root = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(train_bpe([TEXT] * 3, 262), special_tokens={"eos_token": "<|endoftext|>"})
    shape = TINY | {"vocab_size": len(tokenizer.code_table), "max_position_embeddings": 24}
    PrimeV2ForMaskedDiffusion(PrimeV2Config(**shape, eos_token_id=0)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "text.txt").write_text(f"{TEXT}\n{TEXT[::-1]}\n")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(5)))
    (root / "empty").touch()
    (root / "binary.txt").write_bytes(bytes(range(256)))
    (root / "folder").mkdir()
    names = {"MODEL": "model", "TEXT": "text.txt", "JSONL": "text.jsonl", "EMPTY": "empty", "BINARY": "binary.txt"}
    names |= {"FOLDER": "folder", "NOTHING": "nothing", "OUT": "out"}
    return {name: root / path for name, path in names.items()}


@st.composite
def lines(draw, command) -> list[str]:
    """Arguments of a command: its own with values of their lists, now and then one too few or an unknown option."""
    arguments, choices = COMMANDS[command]
    given_ = [draw(st.sampled_from(each)) for each in arguments]
    if not draw(st.integers(0, 15)):
        given_ = given_[:-1]
    options = list(USUAL.get(command, []))
    for name in draw(st.lists(st.sampled_from(sorted(choices)), max_size=3, unique=True)):
        options += [name] if not choices[name] else [name, draw(st.sampled_from(choices[name]))]
    if draw(st.booleans()):
        options.append("--json")
    if not draw(st.integers(0, 15)):
        options.append(draw(st.sampled_from(["--speed", "-q", "--seed", "---", "--"])))
    return [*command.split(), *given_, *options]


def check_finite(content: Any) -> None:
    """Every number of a JSON is one."""
    if isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            check_finite(each)
    assert not isinstance(content, float) or math.isfinite(content)


def listing(root: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("command", list(COMMANDS))
def test_any_line_ends_with_an_answer_or_a_sentence(command, places, monkeypatch):
    root = places["MODEL"].parent
    monkeypatch.chdir(places["FOLDER"])

    @cases(*((2, 40) if command == "compare" else (10, 150)))  # whose plan counts the FLOPs of every network
    @given(lines(command))
    def check(line):
        before = listing(root)
        result = CliRunner().invoke(app, [str(places.get(each, each)).replace("NOTHING", str(root)) for each in line])
        if not isinstance(result.exception, SystemExit | None):
            pytest.fail("".join(traceback.format_exception(result.exception))[-3000:])
        assert result.exit_code in (0, 2), result.output
        if result.exit_code == 2:
            COUNTS[f"prime-v2 {command}: refused"] += 1
            assert result.stdout == "", result.stdout
            found = result.stderr.splitlines()
            assert len(found) == 1 and found[0].startswith(f"prime-v2 {line[0]}") and ": error: " in found[0], found
            assert listing(root) == before
        else:
            COUNTS[f"prime-v2 {command}: answered"] += 1
            assert result.stdout.strip() or command == "generate"
            if "--json" in line:
                check_finite(json.loads(result.stdout))
            for written in root.glob("out*"):
                shutil.rmtree(written) if written.is_dir() else written.unlink()

    check()
