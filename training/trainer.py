"""transformers' Trainer for masked diffusion.

The noise is a pure function of the sample number, evaluation is the bound, checkpoints are put in place whole.
"""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from prime_v2.data.packing import StreamedBlocks, collate
from prime_v2.diffusion_prime_v2 import stratified_levels
from prime_v2.eval.intervals import half_width
from prime_v2.output.seals import disk_trouble
from prime_v2.random_prime_v2 import Stream, hash64
from prime_v2.training.checkpoints import (
    ASIDE,
    load_state,
    publish,
    random_state,
    save_state,
    set_random_state,
    step_of,
)
from prime_v2.training.processes import from_first_process

SAME_SIGNAL_SECONDS = 1.0  # launchers pass on a signal that the terminal has sent already
TRACE = ("sample_number", "position")  # of a batch, what says where it comes from; no input of the model


class Collator:
    """Samples to a batch with the noise's key and level: pure functions of (seed, sample number).

    config: of the model that is trained, for the checks of `collate`.
    traced: keep in the batch what `TRACE` names; the trainer takes it out.
    """

    def __init__(self, global_batch: int, seed: int, short_share: float, traced: bool = False, config: Any = None):
        self.seed, self.traced = seed, traced
        self.options = {"global_batch": global_batch, "seed": seed, "short_share": short_share, "config": config}

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collate(samples, **self.options)
        numbers = batch["sample_number"]
        batch["noise_keys"] = hash64(self.seed, Stream.TRAINING_NOISE, numbers)
        batch["noise_levels"] = stratified_levels(numbers, self.options["global_batch"], self.seed)
        return batch if self.traced else {key: value for key, value in batch.items() if key not in TRACE}


@dataclass
class DistributedOptions(DistributedDataParallelKwargs):
    """Options of DistributedDataParallel, with the name that it gives `broadcast_buffers` from PyTorch 2.13 on.

    The buffers are tables that no step changes: they are sent when training begins, not with each forward pass.
    """

    forward_sync_buffers: bool | None = None


class DiffusionTrainer(Trainer):
    """Trainer that evaluates the bound, reports tokens and FLOP/s, and puts checkpoints in place whole."""

    def __init__(
        self,
        *args,
        tokens_per_step: int,
        global_batch: int,
        score: Callable[[torch.nn.Module], dict[str, float]],
        **kwargs,
    ):
        """score: model to metrics on the dev split, among them eval_bound, eval_bound_stderr, eval_unigram_entropy."""
        super().__init__(*args, **kwargs)
        options = self.accelerator.ddp_handler
        if options is not None and self.args.ddp_broadcast_buffers is None:
            self.accelerator.ddp_handler = DistributedOptions(**vars(options), forward_sync_buffers=False)
        self.tokens_per_step, self.global_batch, self.score = tokens_per_step, global_batch, score
        self.flops_per_token = 0.0
        self.clock = (time.time(), 0)
        self.staging = False
        self.is_in_place: Callable[[], bool] = lambda: True  # whether the output folder is still the run's own
        self.not_finite: str | None = None  # what is not, in this step
        self.random_state: dict[str, Any] | None = None  # to set before the next step
        self.position: Tensor | None = None  # in the stream, of a sample that has been read

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The valid bound on the dev split, in nats per token, with its standard error; all ranks compute it."""
        started = time.time()
        metrics = self.score(self.accelerator.unwrap_model(self.model))
        self.log(dict(metrics))
        self.clock = (self.clock[0] + time.time() - started, self.clock[1])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = self.state.global_step
        self.state.epoch = step / self.args.max_steps  # a run is one epoch; on a resumed stream Trainer counts anew
        logs["tokens"] = step * self.tokens_per_step
        if "loss" in logs:
            seconds, tokens = time.time() - self.clock[0], (step - self.clock[1]) * self.tokens_per_step
            self.clock = (time.time(), step)
            logs["tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
            logs["flops_per_second"] = logs["tokens_per_second"] * self.flops_per_token
        super().log(logs, start_time)

    def run_from(self, checkpoint: str | None) -> None:
        """Train from a checkpoint, or from the start; only load it when it holds the last step."""
        step = step_of(checkpoint) if checkpoint else 0
        self.clock = (time.time(), step)
        if checkpoint and step >= self.args.max_steps:  # a stream has no length by which Trainer would see the end
            self._load_from_checkpoint(checkpoint)
            self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            self.state.is_world_process_zero = self.is_world_process_zero()
            return
        if checkpoint and isinstance(self.train_dataset, StreamedBlocks):
            self.train_dataset.resume(step * self.global_batch, load_state(Path(checkpoint), "stream"))
            self.args.ignore_data_skip = True  # Trainer would read all that is before
        self.train(resume_from_checkpoint=checkpoint)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        if self.random_state is not None:  # here, since a data loader draws a number when it starts
            set_random_state(self.random_state)
            self.random_state = None
        numbers, position = (inputs.pop(name, None) for name in TRACE)
        self.position = None if position is None else position[-1].cpu()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.not_finite is None and not loss.isfinite():
            self.not_finite = f"the loss is {float(loss)} at {self._place(int(numbers.min()), int(numbers.max()))}"
        return loss

    def _place(self, first: int, last: int) -> str:
        return f"step {self.state.global_step} (samples {first} to {last})"

    def _get_grad_norm(self, model, grad_norm=None):
        """The last call before the optimizer's step: what is not finite stops all processes here, with the weights
        and the checkpoints of the step before."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        first = self.state.global_step * self.global_batch
        if self.not_finite is None and not math.isfinite(grad_norm):
            place = self._place(first, first + self.global_batch - 1)
            self.not_finite = f"the norm of the gradient is {float(grad_norm)} at {place}"
        found = torch.tensor(self.not_finite is not None, dtype=torch.int32, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        if found:
            reports = gather_object([self.not_finite])
            last = get_last_checkpoint(self.args.output_dir)
            report = sorted(filter(None, reports))[0]  # a loss before a gradient
            raise ValueError(f"{report}; the last good checkpoint is {last or 'none'}")
        return grad_norm

    @property
    def is_sharded(self) -> bool:
        """Whether an engine holds the state in shards, which it writes and reads in formats of its own."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle. The options of the run are in run.json.
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save and self.position is not None:
            save_state(tuple(self.position.tolist()), Path(output_dir), "stream")
        if self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(self.optimizer.state_dict(), Path(output_dir), "optimizer")
            save_state(self.lr_scheduler.state_dict(), Path(output_dir), "scheduler")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As in Transformers, which reads config.json here as that of no model and warns of our mask token, id V."""
        reader = logging.get_logger("transformers.configuration_utils")
        level = reader.level
        reader.setLevel(logging.ERROR)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            reader.setLevel(level)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.optimizer.load_state_dict(load_state(Path(checkpoint), "optimizer"))
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint), "scheduler"))

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(random_state(self.args.world_size), Path(output_dir), f"random_{self.args.process_index}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        name = f"random_{self.args.process_index}"
        # Only dropout and NEFTune draw from it (see `course.SPLIT`). With more processes than before, which there
        # can be only without them, the new ones keep their seed.
        if checkpoint is not None and Path(checkpoint, f"{name}.json").exists():
            self.random_state = load_state(Path(checkpoint), name)

    def _get_output_dir(self, trial=None) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self.staging else folder

    def check_place(self) -> None:
        """ValueError on all processes when the output folder has been deleted, or made anew, while the run was on."""
        if not from_first_process(self.is_in_place):
            raise ValueError(
                f"--output_dir {self.args.output_dir} was deleted or replaced during the run, at or before step "
                f"{self.state.global_step}; nothing more is written there: start again, in a folder that stays"
            )

    def _save_checkpoint(self, model, trial=None) -> None:
        """Write aside, seal, then rename: a checkpoint folder that exists is whole, whatever stopped the last one."""
        self.check_place()
        final = Path(super()._get_output_dir(trial))
        aside = final / ASIDE
        self.staging = True
        try:
            if self.is_world_process_zero():
                shutil.rmtree(aside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish(aside, final, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            # What a full disk raises, by writer; RuntimeError is torch.save's, for engines that shard.
            if not isinstance(error, OSError | SafetensorError | RuntimeError) and disk_trouble(error) is None:
                raise
            last = get_last_checkpoint(str(final))
            raise ValueError(
                f"the checkpoint of step {self.state.global_step} could not be written "
                f"({getattr(error, 'strerror', None) or error}); the last good one is {last or 'none'}; make room and "
                f"start the same command again"
            ) from error
        finally:
            self.staging = False


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, save, stop, on all processes. A second one stops at once."""

    def __init__(self):
        self.received: int | None = None
        self.received_at = 0.0
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        """Signals act as before; also where training ended in an error."""
        while self.before:
            signal.signal(*self.before.popitem())

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self.received_at = number, time.time()
            print(
                "\nstopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr, flush=True
            )
        elif time.time() - self.received_at > SAME_SIGNAL_SECONDS:
            signal.default_int_handler(number, frame)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # the signal reaches the processes in different steps
            received = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received) or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.release()


class Progress(ProgressCallback):
    """Trainer's progress bar with the loss, tokens/s and FLOP/s behind it and a line per evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        bar: Any = self.training_bar
        if bar is None or not logs:  # only the first process has a bar
            return
        if "loss" in logs:
            bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s, "
                f"{logs['flops_per_second'] / 1e9:,.0f} GFLOP/s"
            )
        elif "eval_bound" in logs:
            half = half_width(logs.get("eval_bound_stderr"), logs.get("eval_bound_degrees"))
            interval = f" +- {half:.4f} (95%)" if half else ""
            bar.write(
                f"step {state.global_step}: held-out bound {logs['eval_bound']:.4f}{interval} nats/token "
                f"(unigram entropy {logs['eval_unigram_entropy']:.4f})"
            )
