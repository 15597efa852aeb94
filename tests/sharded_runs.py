"""Training runs in two processes: their options, their copies stopped at a checkpoint, and how they are compared."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "accelerate"
TINY = (
    "--bpe_vocab_size 270 --block_size 24 --max_steps 6 --global_batch 4 --per_device_train_batch_size 2 "
    "--save_steps 3 --eval_steps 3 --logging_steps 1 --eval_sequences 5 --test_sequences 5 --eval_num_samples 2 "
    "--num_generated 1 --dev_share 0.2 --test_share 0.2 --learning_rate 0.01 --warmup_steps 0"
)
MODEL = ["--model", "hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=64"]
ROWS = [(f"What is {i} plus {j}?", "so " * (i % 4) + f"{i} and {j} make {i + j}") for i in range(8) for j in range(6)]


def cut(source: str | Path, target: str | Path) -> None:
    """A copy of a finished run as it was after its first checkpoint."""
    shutil.copytree(source, target)
    shutil.rmtree(Path(target) / "results")
    shutil.rmtree(Path(target) / "checkpoint-6")


def record_of(folder: Path) -> dict:
    return json.loads((folder / "results" / "train.json").read_text())["results"]


def check_same_run(folder: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Losses, held-out bounds and weights agree. Processes add gradients in another order: float32 sums."""
    found, expected = record_of(folder), record_of(reference)
    for name in ("loss", "eval_bound"):
        values, others = ([entry[name] for entry in each["history"] if name in entry] for each in (found, expected))
        assert len(others) > 1 and values == pytest.approx(others, rel=tolerance)
    bound, other = (each["evaluation"]["bound"] for each in (found, expected))
    assert bound["nats_per_token"] == pytest.approx(other["nats_per_token"], rel=tolerance)
    assert bound["nats_of_sequences"] == pytest.approx(other["nats_of_sequences"], rel=tolerance)
    assert bound["stderr"] == pytest.approx(other["stderr"], rel=10 * tolerance)
    weights, others = (load_file(each / "model.safetensors") for each in (folder, reference))
    assert weights.keys() == others.keys()
    for key, weight in weights.items():  # Adam divides by the gradient's size, where rounding may be all there is
        torch.testing.assert_close(weight, others[key], rtol=0, atol=100 * tolerance)
