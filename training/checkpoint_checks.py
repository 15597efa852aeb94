"""Whether a checkpoint holds what this run would have written: looked at before anything of it is loaded.

A seal says that files are as they were written, not by whom. So names, shapes and types of all that a run continues
with are held against the run itself: weights against its model, optimizer and schedule against fresh ones; and what
no step changes, such as the code table, by value.
"""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from prime_v2.data.packing import StreamedBlocks
from prime_v2.output.seals import Damaged, check_no_pickles, read_json
from prime_v2.training.checkpoints import damage, load_state, random_state, set_damaged_aside, step_of
from prime_v2.training.processes import from_first_process
from prime_v2.validation_weights_prime_v2 import read_header

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
SHARDED_FOLDER = "pytorch_model_fsdp"  # in the names of what Trainer takes for weights of FSDP
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "BOOL": "bool"}


def last_whole_checkpoint(trainer: Any, folder: Path) -> str | None:
    """The newest checkpoint that this run can continue from, read by the first process for all; None without any.

    Newer ones that are damaged are set aside with a message. ValueError when none is whole.
    """
    last = from_first_process(lambda: set_damaged_aside(folder, lambda checkpoint: problem_of(trainer, checkpoint)))
    return None if last is None else str(last)


def problem_of(trainer: Any, checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of this run, a clause that begins with the name of a file; None for nothing.

    ValueError for one that is right but was written in another way, which is nothing to be set aside.
    """
    problem = damage(checkpoint)
    if problem is not None:
        return problem
    try:
        for path in sorted(checkpoint.rglob("*.json")):
            read_json(path)
        _check_author(trainer, checkpoint)
        _check_trainer_state(trainer, checkpoint)
        _check_random_states(checkpoint)
        if isinstance(trainer.train_dataset, StreamedBlocks):
            _check_stream(trainer, checkpoint)
        if trainer.is_sharded:  # an engine writes and reads formats of its own
            return None
        check_no_pickles(checkpoint)
        _check_weights(trainer.model, checkpoint)
        _check_optimizer(trainer, checkpoint)
    except Damaged as error:
        return str(error)
    return None


def _check_author(trainer: Any, checkpoint: Path) -> None:
    """ValueError for a whole checkpoint of others: nothing is wrong with it, but it cannot be continued here."""
    is_ours = any((checkpoint / f"{name}.json").exists() for name in ("optimizer", "scheduler"))
    if is_ours == trainer.is_sharded:
        author = "one process or DDP" if trainer.is_sharded else "FSDP, DeepSpeed or --save_only_model"
        raise ValueError(
            f"{checkpoint} was written by {author}: the state of its optimizer cannot be read here; continue it as it "
            f"was begun"
        )


def _check_trainer_state(trainer: Any, checkpoint: Path) -> None:
    content = read_json(checkpoint / TRAINER_STATE_NAME)
    try:
        state = TrainerState(**content)
    except (TypeError, AttributeError, ValueError):
        raise Damaged(f"{TRAINER_STATE_NAME} is no state of a trainer") from None
    if type(state.global_step) is not int or state.global_step != step_of(checkpoint):
        raise Damaged(f"{TRAINER_STATE_NAME} is of step {state.global_step}")
    fresh = TrainerState()
    for name in ("log_history", "stateful_callbacks"):
        if type(getattr(state, name)) is not type(getattr(fresh, name)):
            raise Damaged(f"{TRAINER_STATE_NAME} has {name} of another kind")
    if not all(_is_entry(entry) for entry in state.log_history):
        raise Damaged(f"{TRAINER_STATE_NAME} has a log_history of another kind")
    numbers = ("epoch", "max_steps", "num_train_epochs", "total_flos", "num_input_tokens_seen", "train_batch_size")
    for name in numbers:
        value = getattr(state, name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise Damaged(f"{TRAINER_STATE_NAME} has {name} of another kind")


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the history has what the record of the run is made from: its sums and its plot."""
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return False
    if not all(isinstance(value, int | float | str | None) for value in entry.values()):
        return False
    losses = ("loss", "tokens", "tokens_per_second") if "loss" in entry else ()
    bounds = ("eval_bound", "tokens") if "eval_bound" in entry else ()
    # A single sequence has no error; a bound that is not finite is left out of the plot.
    optional = [entry.get(name) for name in ("eval_bound_stderr", "eval_bound_degrees")]
    return (
        all(_is_number(entry.get(name)) and math.isfinite(entry[name]) for name in losses)
        and all(_is_number(entry.get(name)) for name in bounds)
        and all(value is None or _is_number(value) for value in optional)
        and (not losses or entry["tokens_per_second"] > 0)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_random_states(checkpoint: Path) -> None:
    """`Damaged` unless every process of the run has left random states that the generators take."""
    first = load_state(checkpoint, "random_0")
    count = first.get("processes") if isinstance(first, dict) else None
    if type(count) is not int or count < 1:
        raise Damaged("random_0.json holds no random states")
    form = random_state(count)
    for number in range(count):
        name = f"random_{number}"
        state = first if number == 0 else load_state(checkpoint, name)
        _same_keys(
            state, (form.keys() - {"cuda"}) | (state.keys() & {"cuda"} if isinstance(state, dict) else set()), name
        )
        try:
            random.Random().setstate(state["python"])
            np.random.RandomState().set_state(state["numpy"])
            torch.Generator().set_state(state["torch"])
        except (TypeError, ValueError, RuntimeError, OverflowError, LookupError, AttributeError):
            raise Damaged(f"{name}.json holds no random states") from None
        for key in {"processes", "cuda"} & state.keys() & form.keys():
            _same_form(state[key], form[key], f"{name}.json: {key}", values=True)


def _check_stream(trainer: Any, checkpoint: Path) -> None:
    position = load_state(checkpoint, "stream")
    right = isinstance(position, tuple) and len(position) == 4 and all(type(each) is int for each in position)
    if not right or min(position) < 0 or position[0] > step_of(checkpoint) * trainer.global_batch:
        raise Damaged("stream.json holds no place in the stream before this step")


def _check_weights(model: Any, checkpoint: Path) -> None:
    """The tensors of the model, or of its adapter if it has one: by name, shape and type, and no other; all finite.

    Buffers, such as the code table, are the run's own by value: no step changes them.
    """
    expected, may_lack = expected_weights(model)
    files = _weight_files(model, checkpoint)
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            header = read_header(str(checkpoint / file))
        except ValueError:
            raise Damaged(f"{file} is no safetensors file") from None
        if twice := sorted(found.keys() & header.keys()):
            raise Damaged(f"{file} holds {twice[0]}, which another file holds too")
        found |= header
    for name, (shape, dtype) in expected.items():
        if name not in found:
            if name in may_lack:
                continue
            raise Damaged(f"{files[0]} lacks {name}")
        if found[name][0] != shape:
            raise Damaged(f"{files[0]} has {name} with {list(found[name][0])} instead of {list(shape)}")
        if TYPES.get(found[name][1], found[name][1]) != dtype:
            raise Damaged(f"{files[0]} has {name} as {found[name][1]} instead of {dtype}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise Damaged(f"{files[0]} holds {unknown[0]}, which this model does not have")
    buffers = dict(model.named_buffers())
    for file in files:
        with safe_open(str(checkpoint / file), framework="pt") as weights:
            for name in sorted(weights.keys()):
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise Damaged(f"{file} has {name} that is not finite")
                if name in buffers and not torch.equal(tensor, buffers[name].cpu()):
                    raise Damaged(f"{file} has {name} with other values than this run")


def _weight_files(model: Any, checkpoint: Path) -> list[str]:
    """The names of the files that Trainer loads the weights from.

    `Damaged` if one is missing, or if there is another that Trainer would take before them or beside them.
    """
    is_adapter = hasattr(model, "merge_and_unload")
    is_split = not is_adapter and not (checkpoint / WEIGHTS).exists() and (checkpoint / INDEX).exists()
    loaded = ADAPTER if is_adapter else INDEX if is_split else WEIGHTS
    for path in sorted(checkpoint.rglob("*")):
        is_weights = path.name in (WEIGHTS, INDEX, ADAPTER) or SHARDED_FOLDER in path.name
        if is_weights and path != checkpoint / loaded:
            raise Damaged(f"{path.relative_to(checkpoint).as_posix()} is not part of it")
    files = [loaded]
    if is_split:
        index = read_json(checkpoint / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names or not all(_is_plain(each) for each in names.values()):
            raise Damaged(f"{INDEX} is damaged")
        files = sorted(set(names.values()))
    for file in files:
        if not (checkpoint / file).is_file():
            raise Damaged(f"{file} is missing")
    return files


def _is_plain(name: Any) -> bool:
    """Whether this names a safetensors file in the checkpoint's own folder, with nothing of a path."""
    return isinstance(name, str) and name.endswith(".safetensors") and "\0" not in name and Path(name).name == name


def expected_weights(model: Any) -> tuple[dict[str, tuple[tuple[int, ...], str]], set[str]]:
    """Shape and type by name of what `save_pretrained` writes, and the names of those that it leaves out if tied."""
    if hasattr(model, "merge_and_unload"):
        from peft import get_peft_model_state_dict

        tensors, may_lack = get_peft_model_state_dict(model), set()
    else:
        tensors, may_lack = model.state_dict(), set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: (tuple(each.shape), _name(each)) for name, each in tensors.items()}, may_lack


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Groups, moments and schedule as those of a fresh optimizer of this run, but for what steps change."""
    step = step_of(checkpoint)
    optimizer, scheduler = _fresh_optimizer(trainer)
    found, schedule = load_state(checkpoint, "optimizer"), load_state(checkpoint, "scheduler")
    _same_keys(found, {"state", "param_groups"}, "optimizer.json")
    groups = optimizer.state_dict()["param_groups"]
    _same_form(found["param_groups"], groups, "optimizer.json: param_groups", values=True)
    forms: dict[Any, Any] = {}
    expected = {}
    parameters = [(each, group) for group in optimizer.param_groups for each in group["params"]]
    for number, (parameter, group) in enumerate(parameters):
        key = (parameter.shape, parameter.dtype, id(group))
        if key not in forms:
            forms[key] = _fresh_state(trainer, parameter, group)
        if forms[key] is not None:
            expected[number] = forms[key]
    _same_keys(found["state"], set(expected), "optimizer.json: state")
    for number, form in expected.items():
        place = f"optimizer.json: state of parameter {number}"
        _same_form(found["state"][number], form, place, values=False)
        for name in NOT_NEGATIVE & form.keys():
            moment = found["state"][number][name]
            if isinstance(moment, Tensor) and (moment < 0).any():
                raise Damaged(f"{place}: {name} is negative")
        if float(found["state"][number].get("step", step)) != step:
            raise Damaged(f"{place} is of step {float(found['state'][number]['step'])}")
    _same_form(schedule, scheduler.state_dict(), "scheduler.json", values=False)
    if hasattr(scheduler, "lr_lambdas"):
        rates = [base * at(step) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        same = (schedule["last_epoch"], schedule["base_lrs"]) == (step, scheduler.base_lrs)
        # Another machine's cosine may end in another digit.
        if not same or not np.allclose(schedule["_last_lr"], rates, rtol=1e-9, atol=0):
            raise Damaged(f"scheduler.json is not that of step {step}")
    if [group["lr"] for group in found["param_groups"]] != schedule.get("_last_lr"):
        raise Damaged("optimizer.json has another learning rate than scheduler.json")


def _fresh_optimizer(trainer: Any) -> tuple[Any, Any]:
    """Optimizer and schedule as Trainer makes them, which the trainer forgets again."""
    kept = {name: getattr(trainer, name) for name in ("optimizer", "lr_scheduler", "_created_lr_scheduler")}
    try:
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
        return trainer.optimizer, trainer.lr_scheduler
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)


def _fresh_state(trainer: Any, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any] | None:
    """The state that this run's kind of optimizer has of a parameter like this one after a step; None for none."""
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    single = torch.nn.Parameter(torch.zeros_like(parameter, memory_format=torch.contiguous_format))
    single.grad = torch.zeros_like(single)
    optimizer = kind([{**group, "params": [single]}], **options)
    optimizer.step()
    return optimizer.state_dict()["state"].get(0)


# Options of an optimizer's group that the schedule changes from step to step.
CHANGING = ("lr",)
# What an optimizer keeps of squares or magnitudes: a negative one has a root that is no number.
NOT_NEGATIVE = {
    *("exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),  # Adam, Adafactor
    *("square_avg", "acc_delta", "sum", "exp_inf"),  # RMSprop, Adadelta, Adagrad, Adamax
}


def _same_keys(found: Any, expected: set, place: str) -> None:
    if not isinstance(found, dict) or found.keys() != expected:
        raise Damaged(f"{place} is not that of this run")


def _same_form(found: Any, fresh: Any, place: str, *, values: bool) -> None:
    """`Damaged` unless two trees have the same keys, kinds of leaves, shapes and types; and, with `values`, values."""
    if isinstance(fresh, dict):
        _same_keys(found, set(fresh), place)
        for key, value in fresh.items():
            _same_form(found[key], value, f"{place}: {key}", values=values and key not in CHANGING)
    elif isinstance(fresh, list | tuple):
        if type(found) is not type(fresh) or len(found) != len(fresh):
            raise Damaged(f"{place} is not that of this run")
        for number, value in enumerate(fresh):
            _same_form(found[number], value, f"{place}: {number}", values=values)
    elif isinstance(fresh, Tensor):
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (fresh.shape, fresh.dtype):
            raise Damaged(f"{place} is not that of this run")
        if found.is_floating_point() and not found.isfinite().all():
            raise Damaged(f"{place} is not finite")
    elif not _same_kind(found, fresh) or (values and found != fresh):
        raise Damaged(f"{place} is {found!r} instead of {fresh!r}"[:200])


def _same_kind(found: Any, fresh: Any) -> bool:
    numbers = (int, float)
    if type(fresh) in numbers:
        return type(found) in numbers and (abs(found) < float("inf") or found == fresh)
    return type(found) is type(fresh)
