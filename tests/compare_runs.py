"""Tiny comparisons for the tests of `prime-v2 compare`: their text, their file, and runs in forks of this process."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from prime_v2.studies.compare import children as compare_children
from prime_v2.training import run as training

WORDS = ["the", "a", "one", "two", "red", "blue", "cat", "dog", "tree", "house", "runs", "sleeps", "sees", "finds"]
TOKENS_PER_STEP = 4 * 16
NETWORK = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WEIGHTS = 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32  # attention, SwiGLU and the norms of that network


class Fork:
    """What `Children` uses of subprocess.Popen, for `python -m prime_v2.training.run`, without a new Python."""

    def __init__(self, arguments: list[str], stdout, **options):
        assert arguments[:3] == [sys.executable, "-m", "prime_v2.training.run"]
        self.returncode: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks of processes with threads
            self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1) for each in (1, 2))
            os._exit(training.main(arguments[3:]))

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode


def use_forks(patch: pytest.MonkeyPatch, popen) -> None:
    """Only in the module of the children: others run git."""
    fake = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    patch.setattr(compare_children, "subprocess", fake)


def three_runs(folder: Path) -> dict:
    """A comparison of three runs of 25 steps, with its text in the folder."""
    path = folder / "text.jsonl"
    lines = []
    for i in range(80):
        chosen = [WORDS[(i * 7 + j * j * (i % 5 + 1)) % len(WORDS)] for j in range(40 + i)]
        lines.append(json.dumps({"text": " ".join(chosen) + "."}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    train = {
        "data": str(path), "bpe_vocab_size": 300, "block_size": 16, "global_batch": 4,
        "per_device_train_batch_size": 4, "eval_sequences": 8, "test_sequences": 12, "eval_num_samples": 2,
        "dev_share": 0.2, "test_share": 0.2, "learning_rate": 0.01, "warmup_steps": 0.1, "sampler_passes": [4, 2],
        "model": {**NETWORK, "objective": "marginal"},
    }  # fmt: skip
    return {
        "train": train,
        "budgets": [25.5 * 6 * WEIGHTS * TOKENS_PER_STEP],
        "runs": {"MDM": {"model": {"num_subtokens": 1}}, "Prime v2": {}, "ARM": {"family": "arm"}},
        "baseline": "MDM",
    }


def write(folder: Path, content: dict, **changes: object) -> Path:
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False), encoding="utf-8")
    return path
