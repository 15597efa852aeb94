"""What decides the course of a training run, and whether a folder holds this very run. Looks, and changes nothing."""

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from prime_v2.output.locks import LOCK
from prime_v2.output.seals import Damaged, read_json
from prime_v2.training.checkpoints import checkpoints_in
from prime_v2.training.option_checks import FOLLOWS_EVALUATION
from prime_v2.training.options import TRAINING_DEFAULTS, RunOptions

RUN, RECORD = "run.json", Path("results", "train.json")

# Options in RunOptions of where things lie and what they are called; changing these continues the same run.
MACHINE_OPTIONS = {"record", "config", "data_dir", "label"}
# Options in TrainingArguments that cannot change the weights beyond the rounding of sums. Everything else is compared,
# also what a later Transformers adds. docs/resume.md has the table.
NO_INFLUENCE = {
    # Names, places and hub repositories.
    *("output_dir", "run_name", "project", "report_to", "hub_token", "hub_private_repo", "hub_model_id"),
    *("hub_strategy", "hub_always_push", "hub_revision", "push_to_hub", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "logging_dir"),
    # What is said.
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "skip_memory_metrics"),
    # When checkpoints are written, and how many stay.
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
    # When the dev split is scored: it draws no random number that training reads (see `EVALUATION`).
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "metric_for_best_model"),
    *("greater_is_better", "per_device_eval_batch_size", "prediction_loss_only"),
    # How the sequences of a step come to the processes: --global_batch and their numbers count; but see `SPLIT`.
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_timeout", "local_rank", "torch_empty_cache_steps"),
    # Memory for time: what is computed twice is the same both times. (The old and the new name.)
    *("gradient_checkpointing", "activation_checkpointing"),
}
# Those among them that decide the course where the schedule follows the evaluations.
EVALUATION = {
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "metric_for_best_model",
    "greater_is_better",
}

# Those among them that say, with --global_batch, which sequences one process passes through the model at once: they
# decide the course where the model draws random numbers as it trains. The number of processes follows from the three.
SPLIT = {"per_device_train_batch_size", "gradient_accumulation_steps"}


class Holds(StrEnum):
    """What a folder holds, seen from one run."""

    nothing = "nothing"
    other = "another run that has no checkpoint, thus nothing to lose"
    unfinished = "this run, to be continued"
    finished = "this run, finished"


def course_of(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any]) -> dict[str, Any]:
    """The options that decide the course of the run, JSON-ready."""
    of_run = {key: value for key, value in dataclasses.asdict(run).items() if key not in MACHINE_OPTIONS}
    of_training = training.to_dict()
    left_out = NO_INFLUENCE - (EVALUATION if of_training["lr_scheduler_type"] in FOLLOWS_EVALUATION else set())
    left_out -= SPLIT if draws(run, training, model_options) else set()
    of_training = {key: value for key, value in of_training.items() if key not in left_out}
    return json.loads(json.dumps({**of_run, **of_training, "model": model_options}, default=str))


def draws(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any]) -> bool:
    """Whether the model draws from torch's generator as it trains: dropout and NEFTune; the noise is no such draw.

    Adapters have no dropout of their own, see `finetuning.with_lora`.
    """
    dropout = model_options.get("attention_dropout")
    if dropout is None and run.init_from is not None:
        try:
            config = read_json(Path(run.init_from) / "config.json")
        except Damaged:  # whoever loads the model says it
            config = None
        dropout = config.get("attention_dropout") if isinstance(config, dict) else None
    return bool(dropout) or bool(training.neftune_noise_alpha)


def is_new(folder: Path) -> bool:
    """Whether there is nothing in the folder except its lock and what a kill leaves while run.json is written."""
    return not folder.exists() or all(
        each.name == LOCK or each.name.startswith(f".{RUN}.") for each in folder.iterdir()
    )


def check_folder(folder: Path, course: dict[str, Any]) -> Holds:
    """What the folder holds; ValueError when it is anything that this run would have to overwrite."""
    if is_new(folder):
        return Holds.nothing
    if not (folder / RUN).exists():
        raise ValueError(f"--output_dir {folder} is not empty and holds no run; use a new folder")
    try:
        found = read_json(folder / RUN)
        if not isinstance(found, dict):
            raise Damaged(f"{RUN} is damaged")
    except Damaged as error:
        raise ValueError(
            f"--output_dir {folder} holds a run whose options cannot be read ({error}); put a copy of {RUN} back, or "
            f"use a new folder"
        ) from None
    differing = differences(found, course)
    if not differing:
        return Holds.finished if (folder / RECORD).exists() else Holds.unfinished
    if not (folder / RECORD).exists() and not checkpoints_in(folder):
        return Holds.other
    key = differing[0]
    more = f" (and {len(differing) - 1} more options differ)" if len(differing) > 1 else ""
    if key not in course:
        raise ValueError(
            f"--output_dir {folder} holds a run with {key}={found[key]!r}, an option that this version does not know"
            f"{more}; continue it with the version that it was begun with, or use another folder"
        )
    before = found.get(key, defaults(course).get(key))
    if key in SPLIT:
        raise ValueError(
            f"--output_dir {folder} holds a run with {key}={before!r}, not {course[key]!r}{more}; its dropout or "
            f"NEFTune draws other numbers when a batch is divided in another way: use the same {key} and number of "
            f"processes to continue it, or another folder"
        )
    raise ValueError(
        f"--output_dir {folder} holds a run with {key}={before!r}, not {course[key]!r}{more}; use another folder, or "
        f"the same options to continue it"
    )


def differences(found: dict[str, Any], course: dict[str, Any]) -> list[str]:
    """The options in which a recorded course differs.

    One that came with a later version, of ours or of a dependency, has been at its default; one that is gone since
    differs unless it was off. Where several differ, the split of the batches comes last.
    """
    if json.dumps(found, sort_keys=True) == json.dumps(course, sort_keys=True):
        return []
    before = defaults(course)
    # A run that has not recorded its split drew nothing; an option that makes it draw differs by itself.
    compared = [key for key in course if key not in SPLIT] + sorted(SPLIT & course.keys() & found.keys())[::-1]
    known = [key for key in compared if not _same(found, course, key, before)]
    return known + [key for key in found if key not in {*course, *NO_INFLUENCE, *MACHINE_OPTIONS} and found[key]]


def _same(found: dict[str, Any], now: dict[str, Any], key: str, default: Any) -> bool:
    default = default.get(key) if isinstance(default, dict) else None
    first, second = found.get(key, default), now.get(key, default)
    if isinstance(first, dict) and isinstance(second, dict) and key != "model":  # such as accelerator_config
        return all(_same(first, second, each, default) for each in first.keys() | second.keys())
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def defaults(course: dict[str, Any]) -> dict[str, Any]:
    """The course of a run in which no option is given."""
    options: dict[str, Any] = {"output_dir": "none", **TRAINING_DEFAULTS, "max_steps": course.get("max_steps", 1)}
    training = TrainingArguments(**options)
    return course_of(RunOptions(), training, {})
