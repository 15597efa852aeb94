"""Which values an option of a training run can have: of every number its range, of some options the one value.

The rules are by name; a numeric option without one, such as a later Transformers may add, has `USUAL`.
"""

import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any

MOST = 2**31 - 1  # what counts steps, tokens and sequences in int64 products of two


@dataclass(frozen=True)
class Range:
    """low <= value <= high, without the ends that are open; `use` is a value that works."""

    use: float
    low: float = 0
    high: float = MOST
    is_open: tuple[bool, bool] = (False, False)

    def holds(self, value: float) -> bool:
        above = value > self.low if self.is_open[0] else value >= self.low
        return above and (value < self.high if self.is_open[1] else value <= self.high)

    def __str__(self) -> str:
        if self.high == MOST:
            return f"must be {'above' if self.is_open[0] else 'at least'} {self.low}"
        return f"is outside {'[('[self.is_open[0]]}{self.low}, {self.high}{'])'[self.is_open[1]]}"


USUAL = Range(1)
COUNT = Range(8, low=1)
SHARE = Range(0.02, high=1, is_open=(True, True))
STEPS = Range(500, is_open=(True, False))  # below 1 a share of the run
RULES = {
    "block_size": Range(512, low=1),
    "global_batch": COUNT,
    "lora": COUNT,
    "max_documents": Range(1000, low=1),
    "bpe_vocab_size": Range(2048, low=1),
    "short_share": Range(0.01, high=1),
    "dev_share": SHARE,
    "test_share": SHARE,
    "eval_sequences": Range(256, low=1),
    "test_sequences": Range(1024, low=1),
    "eval_num_samples": COUNT,
    "sampler_sequences": Range(160, low=1),
    "num_generated": Range(3),
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": Range(1, low=1),
    "max_steps": Range(1000, low=1),
    "learning_rate": Range(2e-4, high=1000),
    "weight_decay": Range(0.1, high=1000),
    "warmup_steps": Range(100),
    "adam_beta1": Range(0.9, high=1, is_open=(False, True)),
    "adam_beta2": Range(0.95, high=1, is_open=(False, True)),
    "adam_epsilon": Range(1e-8, high=1, is_open=(True, False)),  # 0 divides 0 by 0 where there was no gradient yet
    "max_grad_norm": Range(1.0),
    "neftune_noise_alpha": Range(5, is_open=(True, False)),
    "logging_steps": STEPS,
    "eval_steps": STEPS,
    "save_steps": STEPS,
    "save_total_limit": Range(2, low=1),
    "torch_empty_cache_steps": Range(100, low=1),
    "seed": Range(0, high=2**32 - 1),
    "dataloader_num_workers": Range(2, high=1024),
    "dataloader_prefetch_factor": Range(2, low=1),
    "ddp_bucket_cap_mb": Range(25, low=1),
    "ddp_timeout": Range(1800, low=1),
    "local_rank": Range(-1, low=-1),
}

_ORDER = "the order of the samples and what continuing needs of it are train.py's own"
_EVALUATION = "evaluations are train.py's own"
# Options of TrainingArguments that would be ignored, or would break what train.py promises, and the one value that
# they have.
REFUSED: dict[str, tuple[Any, str]] = {
    "load_best_model_at_end": (False, "the model is the one of the last step"),
    "label_smoothing_factor": (0.0, "the loss would be no bound"),
    "fp16": (False, "noise levels and logits need the range of bf16 or float32"),
    "ignore_data_skip": (False, "a continued run would read other samples than those that are left"),
    "auto_find_batch_size": (False, "it changes --global_batch in the course of a run"),
    "use_liger_kernel": (False, "there are no such kernels for these models"),
    "liger_kernel_config": (None, "there are no such kernels for these models"),
    "train_sampling_strategy": ("sequential", _ORDER),
    "dataloader_in_order": (True, _ORDER),
    "dataloader_drop_last": (False, _ORDER),
    "data_seed": (None, f"{_ORDER}: --seed decides it"),
    "remove_unused_columns": (False, "the noise comes to the model as a column"),
    "resume_from_checkpoint": (None, "the same command continues from the last whole checkpoint"),
    "enable_jit_checkpoint": (False, "a signal has a checkpoint written in any case"),
    "save_on_each_node": (False, "the first process writes all"),
    "num_train_epochs": (3.0, "a run's length is counted in steps: --max_steps"),
    "do_predict": (False, _EVALUATION),
    "fp16_full_eval": (False, _EVALUATION),
    "bf16_full_eval": (False, _EVALUATION),
    "eval_accumulation_steps": (None, _EVALUATION),
    "eval_do_concat_batches": (True, _EVALUATION),
    "eval_use_gather_object": (False, _EVALUATION),
    "include_for_metrics": ([], _EVALUATION),
    "batch_eval_metrics": (False, _EVALUATION),
    "label_names": (None, _EVALUATION),
}


# Schedules that lower the learning rate by what an evaluation finds, and what one finds: all better where lower.
FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
MEASURED = ("bound", "perplexity", "bits_per_byte", "nats_per_answer")


def kinds_of(options: Any) -> dict[str, tuple[type, ...]]:
    """The types that each field of a dataclass can have."""
    hints = typing.get_type_hints(options)
    return {each.name: _types(hints[each.name]) for each in fields(options) if each.init}


def _types(hint: Any) -> tuple[type, ...]:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
    return tuple(typing.get_origin(each) or each for each in parts)


def is_numeric(kinds: tuple[type, ...]) -> bool:
    return set(kinds) <= {int, float, NoneType} and set(kinds) != {NoneType}


def check_values(values: dict[str, Any], options: Iterable[Any]) -> list[str]:
    """What is wrong with the numbers, switches and texts among the fields of these dataclasses, sentences.

    A number that a YAML file gives as 10.0 for a whole one becomes one, in `values`.
    """
    problems = []
    for name, kinds in {name: kinds for each in options for name, kinds in kinds_of(each).items()}.items():
        value = values.get(name)
        if value is None or name in REFUSED:
            continue
        if is_numeric(kinds):
            if isinstance(value, float) and float not in kinds and value.is_integer():
                values[name] = value = int(value)
            problem = _problem_of(value, RULES.get(name, USUAL), whole=float not in kinds)
        elif set(kinds) <= {bool, NoneType}:
            problem = None if isinstance(value, bool) else "must be true or false"
        elif set(kinds) <= {str, NoneType}:
            problem = None if isinstance(value, str) else "must be text"
        else:
            continue
        if problem is not None:
            problems.append(f"--{name} {value} {problem}")
    passes = values.get("sampler_passes") or []
    if not isinstance(passes, list) or any(_problem_of(each, COUNT, whole=True) for each in passes):
        problems.append(f"--sampler_passes {passes} must be whole numbers of at least 1; use 64 8 4")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = values.get(name)
        if isinstance(value, float) and math.isfinite(value) and value > 1 and not value.is_integer():
            problems.append(
                f"--{name} {value} is no whole number of steps, nor a share of the run; use {round(value)}"
            )
    return problems


def _problem_of(value: Any, rule: Range, whole: bool) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return f"must be a {'whole ' * whole}number; use {rule.use}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is not finite; use {rule.use}"
    if rule.holds(value):
        return None
    if value > rule.high == MOST:
        return f"is more than {MOST}; use {rule.use}"
    return f"{rule}; use {rule.use}"


def refused_values(training: Any) -> list[str]:
    """A sentence for each option of `REFUSED` that has another value; one that this Transformers lacks has none."""
    problems = []
    for name, (wanted, reason) in REFUSED.items():
        value = getattr(training, name, wanted)
        if value != wanted:
            problems.append(f"--{name} {value} is not supported here ({reason}); leave it at {wanted}")
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in MEASURED:
        problems.append(f"--metric_for_best_model {metric} is not measured; use one of {', '.join(MEASURED)}")
    if getattr(training.accelerator_config, "split_batches", False):
        problems.append("--accelerator_config split_batches is not supported here; use --global_batch")
    return problems
