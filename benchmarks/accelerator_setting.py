"""Sizes of what `accelerator.py` measures, full or tiny, and the memory of its device."""

import dataclasses
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.training.recipes import CONFIGS, find_recipe

STUDY = "accelerator"  # the recipe of configs/compare/ that is trained in the end


@dataclass(frozen=True)
class Setting:
    """Sizes of what is measured, and where.

    study: a comparison's file or recipe, trained in `out`; side: of the square products; batch and length: sequences
    and tokens of a step, the batch halved until it fits; shrunk: smaller fields of the 1.1B model; head_shape: D,
    layers, batch, length, V and S of the steps whose heads are compared; generated: sequences, new tokens, steps and
    tokens of a block; repeats: of what is timed; compiler: the backend of torch.compile.
    """

    device: torch.device
    seed: int
    study: str
    out: Path
    side: int = 8192
    batch: int = 8
    length: int = 2048
    vocab_size: int = 32_000
    shrunk: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    head_shape: tuple[int, ...] = (512, 8, 32, 512, 50_257, 16)
    generated: tuple[int, ...] = (8, 256, 64, 32)
    repeats: int = 8
    compiler: str = "inductor"

    @property
    def on_accelerator(self) -> bool:
        return self.device.type != "cpu"

    def model_fields(self) -> dict[str, Any]:
        """The model of configs/slimpajama_1b.yaml, of 1.1B parameters; `shrunk` wins."""
        recipe = yaml.safe_load((CONFIGS / "slimpajama_1b.yaml").read_text(encoding="utf-8"))
        fields = {"vocab_size": self.vocab_size, "max_position_embeddings": self.length}
        return fields | recipe["model"] | self.shrunk

    def model(self) -> PrimeV2ForMaskedDiffusion:
        """Fresh weights, made on the device; the same ones each time."""
        torch.manual_seed(self.seed)
        with self.device:
            return PrimeV2ForMaskedDiffusion(PrimeV2Config(**self.model_fields()))

    def ids(self, batch: int) -> torch.Tensor:
        """Random token ids (batch, length)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.vocab_size, (batch, self.length), generator=generator).to(self.device)

    def text(self) -> Path:
        """A small file of sums, for runs whose text does not matter."""
        path = self.out / "sums.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        sums = (f"{a} plus {b} make {a + b}, and {a} times {b} make {a * b}." for a in range(9) for b in range(9))
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in sums), encoding="utf-8")
        return path


def make_setting(device: str, seed: int, out: Path, study: str = STUDY, tiny: bool = False) -> Setting:
    """The sizes of the measurements, or tiny ones, with which they run on a CPU and say nothing."""
    if not tiny:
        return Setting(torch.device(device), seed, study, out)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes: dict[str, Any] = {"side": 64, "batch": 2, "length": 16, "vocab_size": 64, "shrunk": small, "repeats": 1}
    shapes: dict[str, Any] = {"head_shape": (64, 1, 2, 16, 64, 6), "generated": (2, 8, 4, 4), "compiler": "aot_eager"}
    setting = Setting(torch.device(device), seed, str(out / "study.yaml"), out, **sizes, **shapes)
    _write_tiny_study(setting, find_recipe(study, "compare", "--study"))
    return setting


def _write_tiny_study(setting: Setting, path: Path) -> None:
    """The recipe of the study with small sizes, and with sums for a text."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["train"] |= {"data": str(setting.text()), "bpe_vocab_size": 270, "block_size": 16, "global_batch": 4}
    content["train"] |= {"per_device_train_batch_size": 4, "dataloader_num_workers": 0, "eval_num_samples": 1}
    content["train"] |= {"dev_share": 0.2, "test_share": 0.2, "eval_sequences": 4, "test_sequences": 4}
    content["train"]["model"] |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    digits = {"num_subtokens": 9, "tree_levels": [5, 9], "stage_digits": [5, 9], "head_digits": [5, 9]}
    content["runs"]["nested 6-11"]["model"] |= digits
    content["budgets"] = [3.0e7]
    Path(setting.study).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class Measurement:
    """A row of the record.

    seconds: what must be left for it to be begun, about what it takes on an H200 (an estimate).
    work: gives the row; an error that it raises becomes the row.
    """

    name: str
    seconds: float
    work: Callable[[Setting], dict[str, Any]]


def free_memory(setting: Setting) -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(setting: Setting) -> None:
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(setting: Setting) -> dict[str, float | None]:
    """MiB that tensors took and that the allocator held at most since `reset_peak`; None on a CPU.

    A process's own peak never falls, so on a CPU only a process for each measurement could tell (training_step.py).
    """
    if setting.device.type != "cuda":
        return {"peak_mib": None, "reserved_mib": None}
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak_mib": peak / 2**20, "reserved_mib": reserved / 2**20}
