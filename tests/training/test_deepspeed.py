"""DeepSpeed's ZeRO on two CPU processes, by `accelerate launch` with the files of configs/accelerate.

Where DeepSpeed is not installed nothing here runs: `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed` first.
"""

import os
import subprocess
import sys

import pytest
from sharded_runs import CONFIGS, MODEL, ROOT, ROWS, TINY, check_same_run, cut

from prime_v2.training import run as training

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

TREE = ["reveal_order=nested", "stage_digits=[4,9]", "subtoken_embedding=ancestors", "head_ancestors=true"]
VARIANTS = {
    "plain": MODEL,
    "tied": [*MODEL, "tie_word_embeddings=true"],
    "tree": [*MODEL, *TREE, "tree_levels=[4,6,9]"],
    "uniform": [*MODEL, "--family", "uniform"],
    "interpolating": [*MODEL, "--family", "interpolating"],
}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("".join(f'{{"text": "{(q + " " + a + ". ") * 4}"}}\n' for q, a in ROWS), encoding="utf-8")
    return ["--data", str(text), *TINY.split()]


def launch(stage: int, arguments: list[str]) -> str:
    """train.py on two processes; what it prints."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(CONFIGS / f"zero{stage}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": ""}  # it has deprecated calls of its own
    done = subprocess.run(
        [*command, "train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize(("stage", "variant"), [(2, "plain"), *((3, variant) for variant in VARIANTS)])
def test_shards_train_as_one_process_and_continue_their_checkpoint(stage, variant, options, tmp_path, capsys):
    arguments = [*options, *VARIANTS[variant], "--output_dir"]
    one, shards, again, alone = (tmp_path / name for name in ("one", "shards", "again", "alone"))
    assert training.main([*arguments, str(one)]) == 0
    assert "on 2 x cpu" in launch(stage, [*arguments, str(shards)])
    check_same_run(shards, one)
    cut(shards, again)
    assert f"continuing from {again / 'checkpoint-3'}" in launch(stage, [*arguments, str(again)])
    assert (again / "model.safetensors").read_bytes() == (shards / "model.safetensors").read_bytes()
    cut(shards, alone)
    capsys.readouterr()
    assert training.main([*arguments, str(alone)]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-3 was written by FSDP, DeepSpeed or" in error and len(error.strip().splitlines()) == 1
