"""The runs of a comparison before they are trained: what a step costs, how many of them a budget buys, the options."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from prime_v2.data.preparation import WHOLE_TOKENS
from prime_v2.output.records import read_record
from prime_v2.studies.compare.config import Comparison, Run, number
from prime_v2.studies.compare.search import Trained
from prime_v2.tokenization.tokenization_prime_v2 import PrimeV2Tokenizer
from prime_v2.training.flops import COUNTED_BATCHES, count_parameters, flops_per_token
from prime_v2.training.options import RaisingParser, RunOptions, parse_options
from prime_v2.training.run import make_model
from prime_v2.training.trainer import Collator

POINTS = 10  # evaluations of the dev bound in the course of a run, and checkpoints; the last at its end
LOGS = 100  # logged losses of a run, about
START_SECONDS = 15.0  # of a run before its first step, for estimates
TIMED_STEPS = 3  # the fastest of which counts: others on the machine slow down some of them
FORWARD_SHARE = 1 / 3  # of the time of a training step
# Options that change no product of a step: of runs that differ in nothing else one is measured.
COST_NOTHING = ("learning_rate", "embedding_init", "label")


@dataclass(frozen=True)
class Cost:
    """What a network costs a token: its parameters, FLOPs by the 6 N rule and as measured, seconds; None: unknown."""

    parameters: int
    non_embedding: int
    measured: float | None
    seconds: float | None

    def flops(self, count: str) -> float:
        """FLOPs a token by a count of `config.COUNTS`."""
        if count == "measured":
            assert self.measured is not None, "cost_of was asked to measure"
            return self.measured
        return 6 * self.non_embedding


@dataclass(frozen=True)
class PlannedRun:
    """A run with what follows from its budget: `options` are all of train.py."""

    run: Run
    cost: Cost
    steps: int
    tokens: int
    options: dict[str, Any]

    @property
    def seconds(self) -> float | None:
        """Estimated, evaluations included."""
        if self.cost.seconds is None:
            return None
        scored = self.options["eval_sequences"] * POINTS + 2 * self.options["test_sequences"]
        rows = scored * self.options["eval_num_samples"] * self.options["block_size"]
        return START_SECONDS + self.cost.seconds * (self.tokens + FORWARD_SHARE * rows)


def parsed(options: dict[str, Any], place: str) -> tuple[RunOptions, TrainingArguments, dict[str, Any]]:
    """Options of train.py, checked as train.py checks them; ValueError that begins with `place`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(options), encoding="utf-8")
        try:
            return parse_options(["--config", str(path)], parser_class=RaisingParser)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{place}: {str(error).replace(f'--config {path}: ', '')}") from None


def plan(comparison: Comparison, out: Path, *, measure: bool, recorded: Sequence[Trained] = ()) -> list[PlannedRun]:
    """Steps and costs of the runs that are not recorded; nothing is written.

    measure: also measure FLOPs and time of a micro-batch, which `count: measured` does in any case. All seeds of a run
    and all runs of one network (`COST_NOTHING`) have the same steps at a budget: those of a recorded one, or what the
    noise of the comparison's `cost_seed` costs, whether or not that seed is among the runs.
    Raises ValueError for options that train.py or the model refuses, and for a budget that is too small for a step.
    """
    records = dict(recorded)
    steps_recorded = {
        (_network_of(run, comparison), run.budget): record["results"]["training"]["steps"] for run, record in recorded
    }
    costs: dict[tuple[str, str], Cost] = {}
    known: dict[str, Cost] = {}
    planned, too_small = [], []
    for run in comparison.runs:
        place = f"run {run.name}" + (f", shape {run.shape}" if run.shape else "")
        options, *_ = parsed(run.options | {"max_steps": 1}, place)
        network = _network_of(run, comparison)
        if (run.name, run.shape) not in costs:
            if run in records and not measure:
                cost = _cost_of_record(records[run])
            else:
                vocab_size = vocabulary_of(options, data_folder(out, run.seed))
                needed = measure or comparison.count == "measured"
                cost = known.get(network)
                if cost is None:
                    cost = cost_of(*parsed(_costing(run, comparison), place), vocab_size, needed, place)
                if run in records:
                    cost = dataclasses.replace(cost, measured=_cost_of_record(records[run]).measured)
            costs[run.name, run.shape] = known[network] = cost
        if run in records:
            continue
        cost, tokens_per_step = costs[run.name, run.shape], options.global_batch * options.block_size
        step_flops = cost.flops(comparison.count) * tokens_per_step
        steps = steps_recorded.get((network, run.budget), int(run.budget // step_flops))
        if steps < 1:
            too_small.append((step_flops, run))
            continue
        planned.append(PlannedRun(run, cost, steps, steps * tokens_per_step, all_options(run, options, steps, out)))
    if too_small:
        step_flops, run = max(too_small, key=lambda each: each[0])
        raise ValueError(
            f"run {run.name}: the budget {number(run.budget)} is less than one step of {step_flops:.4g} FLOPs"
            f"{f' with shape {run.shape}' if run.shape else ''}; the smallest budget that works for all runs is "
            f"{_rounded_up(step_flops)}"
        )
    return planned


def _costing(run: Run, comparison: Comparison) -> dict[str, Any]:
    """The run's options at the seed whose noise decides what a step costs."""
    seed = run.seed if comparison.cost_seed is None else comparison.cost_seed
    return run.options | {"seed": seed, "max_steps": 1}


def _network_of(run: Run, comparison: Comparison) -> str:
    """Equal for runs whose steps cost the same."""
    options = _costing(run, comparison)
    return repr(sorted((name, value) for name, value in options.items() if name not in COST_NOTHING))


def _cost_of_record(record: dict[str, Any]) -> Cost:
    """What a trained run has cost a token; its time was that of another machine."""
    training = record["results"]["training"]
    measured = training["flops_measured"] / training["tokens"]
    return Cost(training["parameters"], training["parameters_non_embedding"], measured, None)


def _rounded_up(flops: float) -> str:
    """To three digits, so that what is printed suffices."""
    scale = 10.0 ** (math.floor(math.log10(flops)) - 2)
    return number(math.ceil(flops / scale) * scale)


def all_options(run: Run, options: RunOptions, steps: int, out: Path) -> dict[str, Any]:
    """All options of train.py for a run of so many steps."""
    every = math.ceil(steps / POINTS)
    text = {name: getattr(options, name) for name in ("eval_sequences", "test_sequences", "eval_num_samples")}
    return run.options | text | {
        "block_size": options.block_size,
        "output_dir": str(out / run.folder),
        "data_dir": str(data_folder(out, run.seed)),
        "max_steps": steps,
        "eval_steps": every,
        "save_steps": every,
        "logging_steps": max(1, steps // LOGS),
    }  # fmt: skip


def vocabulary_of(options: RunOptions, data: Path) -> int:
    """V of the tokenizer: of prepared text as it is, otherwise as asked for."""
    if (data / "complete").exists():
        return PrimeV2Tokenizer.from_pretrained(data / WHOLE_TOKENS).code_table.shape[0]
    if options.tokenizer == "bpe":
        return options.bpe_vocab_size
    from prime_v2.tokenization.build import build_tokenizer

    return build_tokenizer(options.tokenizer, num_subtokens=1).code_table.shape[0]


def cost_of(
    run: RunOptions,
    training: TrainingArguments,
    model_options: dict[str, Any],
    vocab_size: int,
    measure: bool,
    place: str,
) -> Cost:
    """The cost of a run's network, measured on the micro-batches that train.py measures; ids are random.

    FLOPs depend on what the noise hides, not on the ids; with a head in stages also on how many children the nodes of
    the hidden tokens have. Grown codes have as many for each node, give or take one, and shuffled ones, standing for
    them, nearly so in the mean. Raises ValueError, beginning with `place`, for a model that cannot be.
    """
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    # What make_model asks a tokenizer for; which digits a token has costs nothing, see above.
    tokenizer = SimpleNamespace(code_table=SimpleNamespace(shape=(vocab_size, 1)), code_table_parameters={}, **special)
    try:
        with torch.device(training.device if measure else "meta"):
            model = make_model(run, training, model_options, tokenizer)
    except Exception as error:
        if not (isinstance(error, ValueError) or type(error).__name__.startswith("StrictDataclass")):
            raise
        text = str(error).split("ValueError: ")[-1].split("TypeError: ")[-1]
        raise ValueError(f"{place}: {' '.join(text.split())}") from None
    counts = count_parameters(model)
    if not measure:
        return Cost(counts["total"], counts["non_embedding"], None, None)
    batches = _micro_batches(run, training, vocab_size)
    model.train()

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(training.device.type, torch.bfloat16, enabled=training.bf16):
            return model(**batch).loss

    measured = flops_per_token(step, batches)
    seconds = []
    for _ in range(TIMED_STEPS):
        started = time.monotonic()
        step(batches[0]).backward()
        if training.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return Cost(counts["total"], counts["non_embedding"], measured, min(seconds) / batches[0]["input_ids"].numel())


def _micro_batches(run: RunOptions, training: TrainingArguments, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """Random ids under the noise of the first micro-batches of a run."""
    generator, size = torch.Generator().manual_seed(training.seed), training.per_device_train_batch_size
    collate, made = Collator(run.global_batch, training.seed, run.short_share), []
    for first in range(0, COUNTED_BATCHES * size, size):
        ids = torch.randint(vocab_size, (size, run.block_size), generator=generator)
        samples = [
            {"input_ids": row, "labels": row, "sample_number": torch.tensor(first + i)} for i, row in enumerate(ids)
        ]
        made.append({key: value.to(training.device) for key, value in collate(samples).items()})
    return made


def record_path(planned: PlannedRun) -> Path:
    return Path(planned.options["output_dir"]) / "results" / "train.json"


def data_folder(out: Path, seed: int) -> Path:
    return out / "data" / f"seed{seed}"


def with_times_of_records(planned: list[PlannedRun]) -> list[PlannedRun]:
    """The plan with the time a token of finished runs of the same network, where there are any."""
    timed: dict[tuple[str, str], float] = {}
    for each in planned:
        if record_path(each).exists():
            training = read_record(record_path(each))["results"]["training"]
            if training["seconds"]:
                timed[each.run.name, each.run.shape] = training["seconds"] / training["tokens"]
    return [
        dataclasses.replace(each, cost=dataclasses.replace(each.cost, seconds=timed[each.run.name, each.run.shape]))
        if (each.run.name, each.run.shape) in timed
        else each
        for each in planned
    ]
