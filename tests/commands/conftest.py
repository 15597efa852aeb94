"""A small model and a text for the commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_runs import DOCUMENTS

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.tokenization.bpe import train_bpe


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(train_bpe(DOCUMENTS, 280), special_tokens={"eos_token": "<|endoftext|>"})
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=280, eos_token_id=0, pad_token_id=0, **shape))
    folder = tmp_path_factory.mktemp("cli") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture
def broken(model_dir, tmp_path) -> Path:
    """A copy of the model to break."""
    return shutil.copytree(model_dir, tmp_path / "broken")
