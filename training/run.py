"""A training run from its options to its record: prepare, train or continue, evaluate."""

import ctypes
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prime_v2.data.packing import StreamedBlocks, TrainingOrder
from prime_v2.data.preparation import CODE_OPTIONS, TextOptions, documents_by_side, prepare_text
from prime_v2.data.token_vectors import token_vectors
from prime_v2.families import family_named
from prime_v2.output.atomic import write_json
from prime_v2.output.locks import FolderLock, folder_lock
from prime_v2.output.records import code_version, read_record
from prime_v2.output.seals import disk_trouble, writing
from prime_v2.tokenization.plain_text import plain_ids
from prime_v2.training.checkpoint_checks import last_whole_checkpoint
from prime_v2.training.course import RECORD, RUN, Holds, check_folder, course_of
from prime_v2.training.finetuning import start_from
from prime_v2.training.initialisation import set_vectors
from prime_v2.training.options import RunOptions, parse_options
from prime_v2.training.processes import from_first_process
from prime_v2.training.report import bytes_held, estimate, finish, print_summary, score_dev
from prime_v2.training.sharding import prepare_sharding
from prime_v2.training.stage_passes import set_stage_passes
from prime_v2.training.trainer import Collator, DiffusionTrainer, Progress, StopOnSignal


def make_model(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any], tokenizer) -> Any:
    """A model of the run's family with fresh weights."""
    family = family_named(run.family)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    from_text = tokenizer.code_table_parameters.get("code_source") == "data"
    config = family.config_class(
        **{
            "vocab_size": tokenizer.code_table.shape[0],
            "max_position_embeddings": run.block_size,
            **special,
            **({"code_source": "data", "num_subtokens": tokenizer.code_table.shape[1]} if from_text else {}),
            **model_options,
        }
    )
    transformers.set_seed(training.seed)
    model = family.model_class(config)
    if from_text:
        model.code_table.set_codes(torch.from_numpy(tokenizer.code_table))
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
        lambda _: (document for side, document in documents_by_side(text) if side == "train"),
        partial(plain_ids, tokenizer),
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


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks of up to 32 MiB for the next step, not to get them anew from the kernel.

    Getting them anew, page by page, is a good part of a training step on a CPU.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
        libc.mallopt(m_mmap_threshold, 2**25)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def make_trainer(run: RunOptions, training: TrainingArguments, model, tokenizer, data, stop) -> DiffusionTrainer:
    trainer = DiffusionTrainer(
        model=model,
        args=training,
        tokens_per_step=run.global_batch * run.block_size,
        global_batch=run.global_batch,
        score=partial(
            score_dev,
            tokenizer=tokenizer,
            blocks=data["dev"].first(run.eval_sequences),
            draws=run.eval_num_samples,
            bytes_per_token=bytes_held(data["dev"]),
        ),
        train_dataset=training_set(run, training, tokenizer, data),
        eval_dataset=data["dev"],
        data_collator=Collator(run.global_batch, training.seed, run.short_share, traced=True, config=model.config),
        processing_class=tokenizer,
        callbacks=[stop],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    return trainer


def train(
    run: RunOptions,
    training: TrainingArguments,
    model_options: dict[str, Any],
    code: dict[str, Any],
    tell: Callable[[dict[str, Any], Path], None] = print_summary,
) -> int:
    """Prepare, train or continue, evaluate; the exit status. ValueError for bad input and for a folder in use.

    tell: called with the record and the folder of the finished run, by the first process.
    """
    folder = Path(training.output_dir)
    with held(folder) as is_in_place:
        return _train(run, training, model_options, code, folder, is_in_place, tell)


@contextmanager
def held(folder: Path) -> Iterator[Callable[[], bool]]:
    """The lock of the run's folder, taken by the first process for all; `Locked` on all of them if it is in use.

    Yields whether the folder still is the one that was locked; on the other processes always true.
    """
    locks: list[FolderLock] = []
    with ExitStack() as stack:
        # Nothing is returned: a lock cannot be sent.
        from_first_process(lambda: locks.append(stack.enter_context(folder_lock(folder, f"--output_dir {folder}"))))
        yield locks[0].is_in_place if locks else lambda: True


def _train(
    run: RunOptions,
    training: TrainingArguments,
    model_options: dict[str, Any],
    code: dict[str, Any],
    folder: Path,
    is_in_place: Callable[[], bool],
    tell: Callable[[dict[str, Any], Path], None],
) -> int:
    state, course = PartialState(), course_of(run, training, model_options)
    holds = check_folder(folder, course)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    if holds is Holds.finished:
        if state.is_main_process:
            print(f"{folder} holds this run, finished; for another, give a new --output_dir")
            tell(read_record(folder / RECORD), folder)
        return 0
    try:
        if state.is_main_process and holds is not Holds.unfinished:
            shutil.rmtree(folder / "data", ignore_errors=True)
            write_json(folder / RUN, course)
        state.wait_for_everyone()
        tokenizer, model, data = _inputs(run, training, model_options, folder)
    except Exception:
        if holds is Holds.nothing and state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    stop = StopOnSignal()
    trainer = make_trainer(run, training, model, tokenizer, data, stop)
    trainer.is_in_place = is_in_place
    last = last_whole_checkpoint(trainer, folder)
    numbers = estimate(trainer, run)
    prepare_sharding(trainer)
    if last and state.is_main_process:
        print(f"continuing from {last}")
    try:
        trainer.run_from(last)
    finally:
        stop.release()
    if stop.received is not None and trainer.state.global_step < training.max_steps:
        if state.is_main_process:
            print(f"stopped at step {trainer.state.global_step}; the same command continues from there")
        return 128 + stop.received
    trainer.check_place()
    with writing(f"the results in {folder}"):
        record = finish(trainer, run, tokenizer, data, numbers, folder, code)
    if record is not None:
        tell(record, folder)
    return 0


def _inputs(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any], folder: Path) -> tuple:
    """(tokenizer, model, splits of the data): prepared, or as they were prepared when the run began."""
    code_options = {key: model_options[key] for key in CODE_OPTIONS if key in model_options}
    if run.family != "prime":  # whose tokens are whole unless asked otherwise
        code_options.setdefault("num_subtokens", 1)
    shared = None if run.data_dir is None else Path(run.data_dir)
    text = text_options(run, training.seed)
    if run.init_from is None:
        num_samples = training.max_steps * run.global_batch
        tokenizer, data = prepare_text(text, code_options, folder / "data", shared, run.codes, num_samples)
        model = make_model(run, training, model_options, tokenizer)
        if run.embedding_init == "distributional":
            config, train = model.config, data["train"].path
            place = folder / "data" / "vectors"
            vectors = token_vectors(place, train, config.vocab_size, config.hidden_size, training.seed, num_samples)
            set_vectors(model, torch.from_numpy(vectors))
    else:
        model, tokenizer, data = start_from(run, training, model_options, text, folder)
    if run.stage_passes:
        set_stage_passes(model, run.stage_passes)
    return tokenizer, model, data


def main(arguments: list[str] | None = None, description: str | None = None) -> int:
    """The command line `train.py`; the exit status."""
    try:
        use_all_cores()
        keep_freed_memory()
        code = code_version()
        transformers.utils.logging.disable_progress_bar()  # one bar, ours
        run, training, model_options = parse_options(sys.argv[1:] if arguments is None else arguments, description)
        return train(run, training, model_options, code)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint, if there is one", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        return refuse(error)


def refuse(error: Exception) -> int:
    """One sentence for bad input, exit status 2; anything else is a fault of ours and keeps its traceback."""
    known = isinstance(error, ValueError | OSError) or type(error).__name__.startswith("StrictDataclass")
    if not known and disk_trouble(error) is None:
        raise error
    if PartialState().is_main_process:
        text = str(error).split("ValueError: ")[-1].split("TypeError: ")[-1]
        print(f"train.py: error: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
