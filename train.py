"""Train MDM-Prime-v2.

    accelerate launch train.py                                              # CPU: configs/tiny.yaml, a small real run
    accelerate launch train.py --config configs/owt.yaml                    # one GPU
    accelerate launch --num_processes 8 train.py --config configs/slimpajama_1b.yaml    # eight GPUs

Options: those of transformers.TrainingArguments and of RunOptions below; `--config FILE.yaml` holds any of them, flags
go on top, and `--model key=value ...` sets fields of PrimeV2Config. The same command again continues a stopped run.
"""

import dataclasses
import difflib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.eval.records import code_version, write_json
from prime_v2.eval.trainer import Collator, DiffusionTrainer, Progress, StopOnSignal
from prime_v2.eval.training_report import estimate, finish, first_blocks, print_summary, score_dev
from prime_v2.tokenization.packing import StreamedBlocks, TrainingOrder
from prime_v2.tokenization.prepare import CODE_OPTIONS, TextOptions, documents_of, encode_batch, prepare_text

HERE = Path(__file__).resolve().parent
# Where a run's results also go; changing these continues the same run.
MACHINE_OPTIONS = {"record", "config"}
# Of TrainingArguments, what decides the course of a run; a folder whose run differs in one of them is not continued.
COURSE = (
    "learning_rate",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "seed",
    "bf16",
)


# Options of TrainingArguments that would be ignored or would make results wrong, and the value that they must keep.
REFUSED = {"load_best_model_at_end": False, "label_smoothing_factor": 0.0, "fp16": False}


@dataclass
class RunOptions:
    """What TrainingArguments does not hold."""

    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options, or FILE.yaml:ENTRY."}
    )
    data: str = field(
        default="docs",
        metadata={"help": "docs, a .txt/.jsonl/.parquet file, a folder of them, or a hub data set name[:config]."},
    )
    data_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    text_field: str = field(default="text", metadata={"help": "Field of the text in .jsonl, .parquet, hub data."})
    streaming: bool = field(default=False, metadata={"help": "Read training text from the hub as it is needed."})
    max_documents: int | None = field(default=None, metadata={"help": "Read at most so many documents."})
    tokenizer: str = field(default="bpe", metadata={"help": "Name or folder of a fast tokenizer; bpe trains one."})
    bpe_vocab_size: int = field(default=2048, metadata={"help": "Vocabulary of tokenizer=bpe, EOS included."})
    block_size: int = field(default=1024, metadata={"help": "Tokens per training sequence."})
    global_batch: int | None = field(default=None, metadata={"help": "Sequences per optimiser step, all processes."})
    short_share: float = field(default=0.0, metadata={"help": "Share of steps cut to a random length."})
    dev_share: float = field(default=0.02, metadata={"help": "Share of the documents for evaluation in training."})
    test_share: float = field(default=0.02, metadata={"help": "Share of the documents for the reported bound."})
    eval_sequences: int = field(default=256, metadata={"help": "Blocks of the dev split per evaluation."})
    test_sequences: int = field(default=1024, metadata={"help": "Blocks of the test split in the final evaluation."})
    eval_num_samples: int = field(default=8, metadata={"help": "Noise draws per sequence in evaluations."})
    num_generated: int = field(default=3, metadata={"help": "Samples generated at the end."})
    record: str | None = field(default=None, metadata={"help": "A further place for the record of the run (JSON)."})


# ---------------------------------------------------------------------------------------------------- options


class Parser(HfArgumentParser):
    """HfArgumentParser that answers a bad option with one sentence, not with all of its options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_options(arguments: list[str]) -> tuple[RunOptions, TrainingArguments, dict[str, Any]]:
    """Command line (and its YAML file) to options; exits with status 2 and one sentence for a bad one."""
    parser = Parser((RunOptions, TrainingArguments), prog="train.py", description=__doc__)
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE", help="Fields of PrimeV2Config.")
    known = {action.dest for action in parser._actions} - {"help"}
    config_path, entry = _config_path(arguments)
    options = read_config(config_path, entry, known, parser)
    model_options = options.pop("model", None) or {}
    if not isinstance(model_options, dict):
        parser.error(f"--config {config_path}: model={model_options!r} must hold fields such as `hidden_size: 256`")
    name = entry or config_path.stem
    defaults: dict[str, Any] = {"output_dir": f"runs/{name}", "per_device_eval_batch_size": 8} | TRAINING_DEFAULTS
    parser.set_defaults(**defaults | options)
    run, training, extra, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        flag = unknown[0]
        near = difflib.get_close_matches(flag.lstrip("-").split("=")[0], known, n=1)
        parser.error(f"unknown option {flag}" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
    model_options |= _key_values(extra.model, parser)
    try:
        check_options(run, training, model_options)
    except ValueError as error:
        parser.error(str(error))
    return run, training, model_options


TRAINING_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "learning_rate": 2e-4,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "logging_strategy": "steps",
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "ddp_timeout": 24 * 3600,  # the first process prepares the text while the others wait
    "use_cpu": not torch.cuda.is_available(),  # Apple's accelerator has no float64, which the noise is drawn in
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    "report_to": "none",
    "seed": 0,
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    "train_sampling_strategy": "sequential",
    "ddp_broadcast_buffers": False,
    "ddp_find_unused_parameters": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def _config_path(arguments: list[str]) -> tuple[Path, str]:
    """The YAML file and, for FILE.yaml:NAME, the name of its entry."""
    given = str(HERE / "configs" / "tiny.yaml")
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            given = arguments[i + 1]
        elif argument.startswith("--config="):
            given = argument.split("=", 1)[1]
    file, separator, entry = given.rpartition(":")
    return (Path(file), entry) if separator and file.endswith(".yaml") else (Path(given), "")


def read_config(path: Path, entry: str, known: set[str], parser: HfArgumentParser) -> dict[str, Any]:
    """The options of a YAML file; exits with status 2 for a missing file, bad YAML or an unknown option."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        parser.error(f"--config {path} does not exist; configs/ holds {', '.join(sorted(_configs()))}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"--config {path} holds no options; write lines such as `learning_rate: 2.0e-4`")
    if entry:
        entries = {key: value for key, value in options.items() if not key.startswith(".")}
        if entry not in entries:
            parser.error(f"--config {path} has no entry {entry}; it has {', '.join(entries)}")
        options = entries[entry]
    elif any(key.startswith(".") for key in options):
        names = [key for key in options if not key.startswith(".")]
        parser.error(f"--config {path} holds several runs; add one of them, e.g. --config {path}:{names[0]}")
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            parser.error(f"--config {path}: unknown option {key}" + (f"; did you mean {near[0]}?" if near else ""))
    return options


def _configs() -> Iterator[str]:
    return (str(each.relative_to(HERE)) for each in (HERE / "configs").rglob("*.yaml"))


def _key_values(pairs: list[str], parser: HfArgumentParser) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            parser.error(f"--model {pair} is not KEY=VALUE; use e.g. --model num_subtokens=1")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            parser.error(f"--model {pair}: the value is not YAML; use e.g. --model stage_digits='[6, 11]'")
    return values


def check_options(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any]) -> None:
    """Check everything that can be checked before data and model exist; ValueError with all problems at once."""
    problems = []
    fields = {each.name for each in dataclasses.fields(PrimeV2Config)}
    for key in model_options:
        if key not in fields or key in ("vocab_size", "mask_token_id"):
            near = difflib.get_close_matches(key, fields, n=1)
            problems.append(
                f"--model {key} is no field of PrimeV2Config that can be set; try {near or sorted(fields)}"
            )
    for name in ("block_size", "eval_num_samples", "eval_sequences", "test_sequences"):
        if getattr(run, name) < 1:
            problems.append(f"--{name} {getattr(run, name)} must be at least 1")
    if not 0 <= run.short_share <= 1:
        problems.append(f"--short_share {run.short_share} is outside [0, 1]; use 0.01")
    if not (run.dev_share > 0 and run.test_share > 0 and run.dev_share + run.test_share < 1):
        problems.append(
            f"--dev_share {run.dev_share} and --test_share {run.test_share} must be positive and sum below 1; use 0.02"
        )
    if training.max_steps < 1:
        problems.append(f"--max_steps {training.max_steps} must be at least 1; a run's length is counted in steps")
    if training.n_gpu > 1:
        problems.append(f"one process sees {training.n_gpu} GPUs; start one for each with accelerate launch")
    for name, wanted in REFUSED.items():
        if getattr(training, name) != wanted:
            problems.append(f"--{name} {getattr(training, name)} is not supported here; leave it at {wanted}")
    if run.streaming and (run.data == "docs" or run.tokenizer == "bpe"):
        problems.append("--streaming needs a hub data set and a ready tokenizer; use e.g. --tokenizer gpt2")
    micro = training.per_device_train_batch_size * training.world_size
    if run.global_batch is None:
        run.global_batch = micro * training.gradient_accumulation_steps
    elif run.global_batch % micro:
        down, up = run.global_batch // micro * micro, -(-run.global_batch // micro) * micro
        problems.append(
            f"--global_batch {run.global_batch} is not a multiple of {micro} ({training.world_size} processes x "
            f"{training.per_device_train_batch_size}); use {' or '.join(str(each) for each in (down, up) if each)}"
        )
    else:
        training.gradient_accumulation_steps = run.global_batch // micro
    if problems:
        raise ValueError("; ".join(problems))


# ---------------------------------------------------------------------------------------------------- the run


def course_of(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any]) -> dict[str, Any]:
    """The options that decide the course of the run, JSON-ready."""
    of_run = {key: value for key, value in dataclasses.asdict(run).items() if key not in MACHINE_OPTIONS}
    of_training = {key: training.to_dict()[key] for key in COURSE}
    return json.loads(json.dumps({**of_run, **of_training, "model": model_options}))


def check_folder(folder: Path, course: dict[str, Any]) -> bool:
    """Whether the folder holds this very run, finished; ValueError when it holds anything that is not this run.

    A run without a checkpoint has nothing to lose: it gives way to another.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "run.json").exists():
        raise ValueError(f"--output_dir {folder} is not empty and holds no run; use a new folder")
    found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    differing = [key for key in course if found.get(key) != course[key]]
    finished = (folder / "results" / "train.json").exists()
    if differing and not finished and get_last_checkpoint(str(folder)) is None:
        shutil.rmtree(folder / "data", ignore_errors=True)
        return False
    if differing:
        key = differing[0]
        raise ValueError(
            f"--output_dir {folder} holds a run with {key}={found.get(key)!r}, not {course[key]!r}"
            f"{f' (and {len(differing) - 1} more options differ)' if len(differing) > 1 else ''}; "
            f"use another folder, or the same options to continue it"
        )
    return finished


def make_model(run: RunOptions, training: TrainingArguments, model_options, tokenizer) -> PrimeV2ForMaskedDiffusion:
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = PrimeV2Config(
        **{
            "vocab_size": tokenizer.code_table.shape[0],
            "max_position_embeddings": run.block_size,
            **special,
            **model_options,
        }
    )
    transformers.set_seed(training.seed)
    model = PrimeV2ForMaskedDiffusion(config)
    model.generation_config.update(**special)
    return model


def text_options(run: RunOptions, seed: int) -> TextOptions:
    names = [each.name for each in dataclasses.fields(TextOptions) if each.name != "seed"]
    return TextOptions(**{name: getattr(run, name) for name in names}, seed=seed)


def training_set(run: RunOptions, training: TrainingArguments, tokenizer, data):
    num_samples = training.max_steps * run.global_batch
    if not run.streaming:
        return TrainingOrder(data["train"], num_samples, training.seed)
    text = text_options(run, training.seed)
    return StreamedBlocks(
        lambda _: documents_of(text, "train"),
        encode_batch(tokenizer),
        block_size=run.block_size,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.code_table.shape[0],
        num_samples=num_samples,
    )


def use_all_cores() -> None:
    """`accelerate launch` gives a CPU process one thread; take this process's share of the cores instead."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def make_trainer(run: RunOptions, training: TrainingArguments, model, tokenizer, data, stop) -> DiffusionTrainer:
    trainer = DiffusionTrainer(
        model=model,
        args=training,
        tokens_per_step=run.global_batch * run.block_size,
        global_batch=run.global_batch,
        score=partial(
            score_dev,
            blocks=first_blocks(data["dev"], run.eval_sequences),
            draws=run.eval_num_samples,
            bytes_per_token=data["dev"].bytes_per_token,
        ),
        train_dataset=training_set(run, training, tokenizer, data),
        eval_dataset=data["dev"],
        data_collator=Collator(run.global_batch, training.seed, run.short_share),
        processing_class=tokenizer,
        callbacks=[stop],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    return trainer


def train(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any], code: dict[str, Any]) -> int:
    """Prepare, train or continue, evaluate; the exit status. ValueError for bad input."""
    folder, state = Path(training.output_dir), PartialState()
    course = course_of(run, training, model_options)
    finished = check_folder(folder, course)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    if finished:
        if state.is_main_process:
            print(f"{folder} holds this run, finished; for another, give a new --output_dir")
            print_summary(json.loads((folder / "results" / "train.json").read_text(encoding="utf-8")), folder)
        return 0
    new = not folder.exists() or not any(folder.iterdir())
    try:
        if state.is_main_process:
            write_json(folder / "run.json", course)
        state.wait_for_everyone()
        code_options = {key: model_options[key] for key in CODE_OPTIONS if key in model_options}
        tokenizer, data = prepare_text(text_options(run, training.seed), code_options, folder / "data")
        model = make_model(run, training, model_options, tokenizer)
    except Exception:
        if new and state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    stop = StopOnSignal()
    trainer = make_trainer(run, training, model, tokenizer, data, stop)
    numbers = estimate(trainer, run)
    last = get_last_checkpoint(str(folder))
    if last and state.is_main_process:
        print(f"continuing from {last}")
    trainer.run_from(last)
    if stop.received is not None and trainer.state.global_step < training.max_steps:
        if state.is_main_process:
            print(f"stopped at step {trainer.state.global_step}; the same command continues from there")
        return 128 + stop.received
    finish(trainer, run, tokenizer, data, numbers, folder, code)
    return 0


def main(arguments: list[str] | None = None) -> int:
    use_all_cores()
    code = code_version()
    transformers.utils.logging.disable_progress_bar()  # one bar, ours
    run, training, model_options = parse_options(sys.argv[1:] if arguments is None else arguments)
    try:
        return train(run, training, model_options, code)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        return refuse(error)


def refuse(error: Exception) -> int:
    """One sentence for bad input, exit status 2; anything else is a fault of ours and keeps its traceback."""
    known = isinstance(error, ValueError | OSError) or type(error).__name__.startswith("StrictDataclass")
    if not known:
        raise error
    if PartialState().is_main_process:
        text = str(error).split("ValueError: ")[-1].split("TypeError: ")[-1]
        print(f"train.py: error: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
