"""The options, text and losses of training runs of some steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from prime_v2.training import run as training
from prime_v2.training.trainer import DiffusionTrainer

TINY = (
    "--bpe_vocab_size 300 --block_size 16 --max_steps 6 --global_batch 4 --per_device_train_batch_size 2 "
    "--save_steps 2 --eval_steps 3 --logging_steps 1 --eval_sequences 4 --test_sequences 4 "
    "--eval_num_samples 2 --num_generated 1 --dev_share 0.2 --test_share 0.2"
)
WORDS = "the a one two red blue cat dog tree house runs sleeps sees finds and or but under over near"
MODEL = ["--model", "hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=64"]


def write_text(path: Path) -> Path:
    words = WORDS.split()
    lines = []
    for i in range(60):
        chosen = [words[(i * 7 + j * j * (i % 5 + 1)) % len(words)] for j in range(40 + i)]
        lines.append(json.dumps({"text": " ".join(chosen) + "."}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "results" / "train.json").read_text())["results"]["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def stopped_run(folder: Path, *more: str) -> DiffusionTrainer:
    """The trainer of a run that was stopped in its sixth step, with dropout and the checkpoints of steps 2 and 4."""
    trainers: list[Any] = []
    text = write_text(folder.parent / "text.jsonl")
    arguments = ["--data", str(text), "--output_dir", str(folder), *more, *TINY.split(), *MODEL]
    with pytest.MonkeyPatch.context() as patched:
        make, step = training.make_trainer, DiffusionTrainer.training_step

        def stopping(self, *args, **kwargs):
            if self.state.global_step >= 5:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patched.setattr(training, "make_trainer", lambda *args: trainers.append(make(*args)) or trainers[0])
        patched.setattr(DiffusionTrainer, "training_step", stopping)
        assert training.main([*arguments, "attention_dropout=0.1"]) == 130
    return trainers[0]
