"""Orders that are given and orders that are learned, on the network of MDM with a tree embedding, at equal FLOPs.

    python -m prime_v2.studies.learned_order.run study_levers --budget 1e12 --out runs/learned_order \\
        --output results/learned_order.json        # some 25 minutes on a core; needs ./manuals.parquet

Text, tokenizer, codes, first weights, optimiser, rate and order of the samples are those of the recipe's first run. A
setting that is finished is not trained again.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from prime_v2.data.packing import PackedBlocks, TrainingOrder
from prime_v2.eval.intervals import Clusters, cluster
from prime_v2.output.atomic import write_json
from prime_v2.output.progress import say
from prime_v2.output.records import code_version, make_record, read_record
from prime_v2.random_prime_v2 import Stream, hash64
from prime_v2.studies.compare.config import Run, read_comparison
from prime_v2.studies.compare.plan import all_options, parsed
from prime_v2.studies.learned_order.model import LearnedOrderModel
from prime_v2.training.flops import COUNTED_BATCHES, flops_per_token
from prime_v2.training.run import _inputs, keep_freed_memory
from prime_v2.training.trainer import Collator

COUNTED_STEPS = 2000  # whose text the codes of the counted network know, about as many as are trained
NESTED = {"reveal_order": "nested", "stage_digits": [6, 11]}
# (fields of the model, kind of rates, the rates that are given or begun with, how fast they are learned)
SETTINGS: dict[str, tuple[dict[str, Any], str, list[float], float]] = {
    "token": ({}, "given", [1.0], 0.0),
    "token, by node": ({}, "node", [1.0], 10.0),
    "token, by node, slowly": ({}, "node", [1.0], 1.0),
    "token, by context": ({}, "context", [1.0], 10.0),
    "token, by context, slowly": ({}, "context", [1.0], 1.0),
    "nested": (NESTED, "given", [2.0, 1.0], 0.0),
    "nested, by node": (NESTED, "node", [2.0, 1.0], 10.0),
    "nested, by node, slowly": (NESTED, "node", [2.0, 1.0], 1.0),
}


def made(run: Run, setting: str, steps: int, out: Path) -> tuple[Any, Any, LearnedOrderModel, dict[str, PackedBlocks]]:
    """(options of the run, training arguments, model, splits of the text)."""
    fields, kind, begin, speed = SETTINGS[setting]
    options, _, _ = parsed(run.options | {"max_steps": 1}, setting)
    everything = all_options(run, options, steps, out) | {"output_dir": str(out / f"inputs{steps}")}
    everything["model"] = everything["model"] | fields
    options, training, model_options = parsed(everything, setting)
    _, drawn, data = _inputs(options, training, model_options, Path(training.output_dir))
    model = LearnedOrderModel(drawn.config)
    model.load_state_dict(drawn.state_dict())
    model.add_rates(kind, begin, speed)
    return options, training, model, data


def batches(options: Any, training: Any, model: LearnedOrderModel, data: dict[str, PackedBlocks], steps: int):
    samples = TrainingOrder(data["train"], steps * options.global_batch, training.seed)
    collate = Collator(options.global_batch, training.seed, options.short_share, config=model.config)
    for step in range(steps):
        first = step * options.global_batch
        yield collate([samples[number] for number in range(first, first + options.global_batch)])


def train(model: LearnedOrderModel, training: Any, samples: Any, steps: int) -> float:
    """AdamW, as Trainer sets it up; seconds."""
    decayed = [each for name, each in model.named_parameters() if each.dim() > 1 and not name.startswith("rates.")]
    others = [each for name, each in model.named_parameters() if each.dim() <= 1 or name.startswith("rates.")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        fused=True,
    )
    schedule = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    model.train()
    started = time.monotonic()
    for batch in samples:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return time.monotonic() - started


@torch.no_grad()
def bounds(model: LearnedOrderModel, blocks: Tensor, num_samples: int) -> Tensor:
    """Blocks (N, L) to bounds in nats (N,), each the mean of draws at stratified counts."""
    model.eval()
    strata, total = torch.arange(num_samples, dtype=torch.double), torch.zeros(len(blocks), dtype=torch.double)
    for number, block in enumerate(blocks):
        levels = (strata + (0.5 + number * (math.sqrt(5) - 1) / 2) % 1) / num_samples
        keys = hash64(0, Stream.SEQUENCE, number * num_samples + torch.arange(num_samples))
        total[number] = model.terms(block.expand(num_samples, -1), keys, levels)[1].mean()
    return total


def clusters_of(blocks: Tensor, eos_token_id: int) -> Clusters:
    return cluster([blocks.shape[1]] * len(blocks), (blocks == eos_token_id).flatten().numpy())


def score(nats: Tensor, clusters: Clusters, length: int) -> dict[str, Any]:
    """Nats per token with its 95% interval over documents."""
    found = clusters.ratio(nats.numpy(), [length] * len(nats))
    return {"nats_per_token": found.value, "stderr": found.stderr, "interval_95": found.interval()}


def rates_learned(model: LearnedOrderModel) -> dict[str, list[float]] | None:
    """Smallest, middle and largest rate of each unit over nodes (of "context": what the token itself adds)."""
    if model.rates.kind == "given":
        return None
    rates = model.rates.of_numbers(model.rates.own.detach())
    return {
        name: rates.quantile(share, 0).tolist() for name, share in (("least", 0.0), ("median", 0.5), ("most", 1.0))
    }


def measure(run: Run, setting: str, budget: float, num_samples: int, out: Path) -> dict[str, Any]:
    """A row of the record, with the test bounds of the sequences."""
    options, training, model, data = made(run, setting, COUNTED_STEPS, out)
    model.train()
    first = batches(options, training, model, data, COUNTED_BATCHES)
    counted = flops_per_token(lambda batch: model(**batch).loss, first)
    tokens = options.global_batch * options.block_size
    steps = int(budget // (counted * tokens))
    options, training, model, data = made(run, setting, steps, out)
    say(f"{setting}: {steps:,} steps")
    seconds = train(model, training, batches(options, training, model, data, steps), steps)
    splits = {"dev": data["dev"].first(options.eval_sequences), "test": data["test"].first(options.test_sequences)}
    nats = {name: bounds(model, blocks, num_samples) for name, blocks in splits.items()}
    scores = {
        name: score(nats[name], clusters_of(blocks, data[name].eos_token_id), options.block_size)
        for name, blocks in splits.items()
    }
    rates = rates_learned(model)
    model.rates.forget()
    begun = bounds(model, splits["test"], num_samples)
    clusters = clusters_of(splits["test"], data["test"].eos_token_id)
    scores["test_as_begun"] = score(begun, clusters, options.block_size)
    scores["minus_as_begun"] = score(nats["test"] - begun, clusters, options.block_size)
    row = {"steps": steps, "tokens": steps * tokens, "flops_measured": counted * steps * tokens, "seconds": seconds}
    return row | scores | {"rates": rates, "test_nats": nats["test"].tolist()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="whose first run is taken, e.g. study_levers")
    parser.add_argument("--budget", type=float, default=1e12, help="measured FLOPs of a setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--num-samples", type=int, default=16, help="draws for the bound of a sequence")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is finished")
    parser.add_argument("--output", help="write the record here (JSON)")
    given, code = parser.parse_args(arguments), code_version()
    keep_freed_memory()
    run = read_comparison(given.recipe).runs[0]
    rows = {}
    for setting in given.settings:
        path = given.out / f"{setting.replace(', ', '_').replace(' ', '_')}.json"
        if not path.exists():
            row = measure(run, setting, given.budget, given.num_samples, given.out)
            write_json(path, make_record("learned_order_setting", row, seed=run.seed, code=code))
        rows[setting] = read_record(path)["results"]
    options, _, _ = parsed(run.options | {"max_steps": 1}, str(run))
    test = PackedBlocks(given.out / "data" / f"seed{run.seed}" / "test")
    clusters = clusters_of(test.first(options.test_sequences), test.eos_token_id)
    first = torch.tensor(next(iter(rows.values()))["test_nats"], dtype=torch.double)
    for setting, row in rows.items():
        own = torch.tensor(row.pop("test_nats"), dtype=torch.double)
        row["minus_first"] = score(own - first, clusters, options.block_size)
        half = row["minus_first"]["interval_95"][1] - row["minus_first"]["nats_per_token"]
        say(
            f"{setting}: dev {row['dev']['nats_per_token']:.3f}, test {row['test']['nats_per_token']:.3f}; minus "
            f"{next(iter(rows))} {row['minus_first']['nats_per_token']:+.3f} +- {half:.3f}; {row['rates']}"
        )
    results = {"run": str(run), "budget": given.budget, "num_samples": given.num_samples, "settings": rows}
    if given.output:
        write_json(given.output, make_record("learned_order", results, seed=run.seed, code=code))


if __name__ == "__main__":
    main()
