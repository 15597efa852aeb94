"""Tokens/s of train.py from text on disk to the last step, against transformers' Trainer with its own causal Llama.

    python benchmarks/end_to_end.py                             # V = 2,048, D = 256, 4 layers; about 4 minutes
    python benchmarks/end_to_end.py --output results/end_to_end.json

Both train on the same packed blocks with Transformers' Trainer, batch and optimizer alike; ours adds noise by sample
number, the bound's loss and its logs. The runs take turns; time is what Trainer reports for `train()`, evaluation and
saving left out. The data pipeline by itself, without a model, is timed over the same samples beside a plain loader.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import HEAD_DIM, add_output, add_sizes, ratio, seconds_of
from torch.utils.data import DataLoader, default_collate
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.data.packing import PackedBlocks, TrainingOrder, pack_blocks
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record
from prime_v2.training.trainer import Collator, DiffusionTrainer

VOCAB_SIZE, NUM_SUBTOKENS = 2048, 11


def make_blocks(folder: Path, count: int, length: int, seed: int) -> PackedBlocks:
    """Random ids, packed like a text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB_SIZE, (count, length - 1), generator=generator).tolist()
    documents = (str(i) for i in range(count))
    return pack_blocks(
        documents,
        lambda texts: [ids[int(text)] for text in texts],
        block_size=length,
        eos_token_id=0,
        vocab_size=VOCAB_SIZE,
        path=folder / "blocks",
    )


def shape(options: argparse.Namespace) -> dict[str, int]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": options.hidden_size,
        "intermediate_size": 4 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden_size // HEAD_DIM,
        "max_position_embeddings": options.length,
    }


def trainers(options: argparse.Namespace, blocks: PackedBlocks, folder: Path) -> dict[str, Callable[[], float]]:
    """Functions that train and return the seconds that Trainer reports."""
    samples = TrainingOrder(blocks, options.steps * options.batch, options.seed)

    def arguments(name: str) -> TrainingArguments:
        return TrainingArguments(
            str(folder / name),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-4,
            logging_steps=options.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
        )

    def ours() -> float:
        torch.manual_seed(options.seed)
        trainer = DiffusionTrainer(
            model=PrimeV2ForMaskedDiffusion(PrimeV2Config(**shape(options), num_subtokens=NUM_SUBTOKENS)),
            args=arguments("prime"),
            tokens_per_step=options.batch * options.length,
            global_batch=options.batch,
            score=lambda model: {},
            train_dataset=samples,
            data_collator=Collator(options.batch, options.seed, 0.0),
        )
        return trainer.train().metrics["train_runtime"]

    def theirs() -> float:
        torch.manual_seed(options.seed)
        trainer = Trainer(
            model=LlamaForCausalLM(LlamaConfig(**shape(options), use_cache=False)),
            args=arguments("llama"),
            train_dataset=samples,
            data_collator=causal_batch,
        )
        return trainer.train().metrics["train_runtime"]

    return {"prime": ours, "causal": theirs}


def causal_batch(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = default_collate(samples)
    return {name: batch[name] for name in ("input_ids", "labels")}


def pipeline(options: argparse.Namespace, blocks: PackedBlocks) -> dict[str, float]:
    """Tokens/s of the loader by itself, with our collator and with PyTorch's."""
    samples = TrainingOrder(blocks, 200 * options.batch, options.seed)
    collators = {"prime": Collator(options.batch, options.seed, 0.01), "plain": causal_batch}
    rates = {}
    for name, collator in collators.items():
        loader = DataLoader(samples, batch_size=options.batch, collate_fn=collator)
        times = [seconds_of(lambda loader=loader: [None for _ in loader]) for _ in range(3)]
        rates[name] = len(samples) * options.length / statistics.median(times)
    return rates


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden_size=256, layers=4, length=256, batch=8, steps=30, repeats=3, seed=0)
    add_output(parser)
    options = parser.parse_args(arguments)
    code = code_version()
    with tempfile.TemporaryDirectory() as folder:
        blocks = make_blocks(Path(folder), 512, options.length, options.seed)
        ways = trainers(options, blocks, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):
            for name, train in ways.items():
                taken = train()
                if repeat:
                    seconds[name].append(taken)
        loading = pipeline(options, blocks)
    tokens = options.steps * options.batch * options.length
    times = ratio(seconds, "prime", "causal")
    rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    low, high = times["range"]
    print(f"train: {rates['prime']:,.0f} tokens/s, Trainer with Llama {rates['causal']:,.0f}; "
          f"time ratio {times['median']:.3f} ({low:.3f} to {high:.3f})")  # fmt: skip
    print(f"data alone: {loading['prime']:,.0f} tokens/s, plain loader {loading['plain']:,.0f}")
    if options.output:
        results: dict[str, Any] = {
            "shape": {key: value for key, value in vars(options).items() if key != "output"},
            "seconds": seconds,
            "tokens_per_second": rates,
            "time_ratio": times["median"],
            "time_ratio_range": times["range"],
            "pipeline_tokens_per_second": loading,
        }
        record = make_record("end_to_end", results, seed=options.seed, code=code)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
