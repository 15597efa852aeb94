"""A checkpoint that somebody has changed and sealed again: whatever is wrong with it, the one before is taken."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import stopped_run

from prime_v2.families import FAMILIES
from prime_v2.training.checkpoint_checks import last_whole_checkpoint, problem_of
from prime_v2.training.checkpoints import load_state, save_state, seal
from prime_v2.training.trainer import DiffusionTrainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[DiffusionTrainer, Path]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return stopped_run(folder), folder


def of_weights(change):
    def changed(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        change(weights)
        save_file(weights, checkpoint / "model.safetensors")

    return changed


def of_state(name: str, change):
    def changed(checkpoint: Path) -> None:
        state = load_state(checkpoint, name)
        changed_to = change(state)
        state = changed_to if isinstance(changed_to, list) and name == "scheduler" else state
        (checkpoint / f"{name}.safetensors").unlink(missing_ok=True)
        save_state(state, checkpoint, name)

    return changed


def of_text(name: str, content: str):
    return lambda checkpoint: (checkpoint / name).write_text(content)


def of_json(name: str, **changes: Any):
    def changed(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**content, **changes}))

    return changed


def pickled(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


NORM, CODES = "model.norm.weight", "code_table.codes"


def beside_an_index(names: str):
    """The whole weights and an index of them beside `model.safetensors`, which Trainer loads, without a tensor."""

    def changed(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        save_file(weights, checkpoint / names)
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, names)}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        of_weights(lambda each: each.pop(NORM))(checkpoint)

    return changed


def split(*names: str, other: str | None = None):
    """The weights in two files with an index; other: the name by which the index calls the second."""

    def changed(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").unlink()
        where = {name: names[number % 2] for number, name in enumerate(sorted(weights))}
        for file in names:
            save_file({name: weights[name] for name in where if where[name] == file}, checkpoint / file)
        called = {name: other if other and file == names[1] else file for name, file in where.items()}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": called}))

    return changed


def adapter_in_a_folder(checkpoint: Path) -> None:
    (checkpoint / "default").mkdir()
    save_file({"x": torch.ones(1)}, checkpoint / "default" / "adapter_model.safetensors")


def entry_of_a_loss(**changes: Any):
    entry = {"step": 1, "loss": 2.0, "tokens": 64, "tokens_per_second": 9.0} | changes
    return of_json("trainer_state.json", log_history=[{k: v for k, v in entry.items() if v is not None}])


MOMENTS = {
    "a reshaped moment": lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
    "a moment of another type": lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].bfloat16()),
    "a moment that is not finite": lambda s: s["state"][1]["exp_avg_sq"].view(-1)[:1].fill_(torch.nan),
    "a square below zero": lambda s: s["state"][1]["exp_avg_sq"].view(-1)[:1].fill_(-1.0),
    "a moment that is gone": lambda s: s["state"][2].pop("exp_avg"),
    "the state of a parameter gone": lambda s: s["state"].pop(3),
    "a step of another run": lambda s: s["state"][0].update(step=torch.tensor(3.0)),
    "another learning rate": lambda s: s["param_groups"][0].update(lr=1.0),
    "another weight decay": lambda s: s["param_groups"][0].update(weight_decay=0.0),
    "a group more": lambda s: s["param_groups"].append(s["param_groups"][0]),
    "numbers in place of moments": lambda s: s["state"].update({0: {"step": 4, "exp_avg": 0.0, "exp_avg_sq": 0.0}}),
    "a text in place of a group": lambda s: s.update(param_groups=["x"]),
}
SCHEDULES = {
    "another step of the schedule": lambda s: s.update(last_epoch=3),
    "another rate of the schedule": lambda s: s.update(_last_lr=[1.0, 1.0]),
    "a schedule of other rates": lambda s: s.update(base_lrs=[1.0, 1.0]),
    "a list in place of the schedule": lambda s: [1],
}
RANDOM = {
    "short random numbers": lambda s: s.update(torch=s["torch"][:10]),
    "no random numbers of Python": lambda s: s.pop("python"),
    "an empty state of Python": lambda s: s.update(python={}),
    "random numbers as text": lambda s: s.update(numpy="x"),
    "another number of processes": lambda s: s.update(processes=2),
    "no number of processes": lambda s: s.update(processes=0),
}
TAMPERED = {
    "a tensor gone": of_weights(lambda weights: weights.pop(NORM)),
    "a tensor more": of_weights(lambda weights: weights.update(more=torch.ones(2))),
    "a tensor of another shape": of_weights(lambda weights: weights.update({NORM: torch.ones(31)})),
    "a tensor of another type": of_weights(lambda weights: weights.update({NORM: weights[NORM].bfloat16()})),
    "a weight that is no number": of_weights(lambda weights: weights[NORM][:1].fill_(torch.nan)),
    "a weight that is infinite": of_weights(lambda weights: weights[NORM][:1].fill_(torch.inf)),
    "a code table of zeros": of_weights(lambda weights: weights[CODES].zero_()),
    "a code table in another order": of_weights(lambda weights: weights[CODES][:2].copy_(weights[CODES][:2].flip(0))),
    "an index beside the weights": beside_an_index("good.safetensors"),
    "an index of files elsewhere": split("a.safetensors", "b.safetensors", other="../checkpoint-4/b.safetensors"),
    "an index of a folder": split("a.safetensors", "b.safetensors", other="./b.safetensors"),
    "an index of another file": split("a.safetensors", "b.safetensors", other="c.safetensors"),
    "an adapter beside the weights": lambda c: save_file({"x": torch.ones(1)}, c / "adapter_model.safetensors"),
    "an adapter in a folder": adapter_in_a_folder,
    "weights that are a pickle": pickled,
    "a pickle beside the weights": lambda c: torch.save({}, c / "training_args.bin"),
    "weights that are text": of_text("model.safetensors", "x" * 100),
    "no weights": lambda c: (c / "model.safetensors").unlink(),
    "no optimizer": lambda c: (c / "optimizer.json").unlink(),
    "no schedule": lambda c: (c / "scheduler.json").unlink(),
    "no moments": lambda c: (c / "optimizer.safetensors").unlink(),
    "text in place of a dict": of_json("scheduler.json", lr_lambdas=[{"$dict": ""}, {}]),
    "no random states": lambda c: [(c / f"random_0.{end}").unlink() for end in ("json", "safetensors")],
    "no state of the trainer": lambda c: (c / "trainer_state.json").unlink(),
    "a state of another step": of_json("trainer_state.json", global_step=2),
    "a step that is a text": of_json("trainer_state.json", global_step="4"),
    "a history of texts": of_json("trainer_state.json", log_history=["x"]),
    "a loss that is text": entry_of_a_loss(loss="NaN"),
    "a loss that is not finite": entry_of_a_loss(loss=float("nan")),
    "a loss without its speed": entry_of_a_loss(tokens_per_second=None),
    "a speed of zero": entry_of_a_loss(tokens_per_second=0.0),
    "a bound that is text": entry_of_a_loss(loss=None, tokens_per_second=None, eval_bound="low"),
    "an error of a bound that is text": entry_of_a_loss(eval_bound=1.0, eval_bound_stderr="low"),
    "an unknown state": of_json("trainer_state.json", more=1),
    **{name: of_state("optimizer", change) for name, change in MOMENTS.items()},
    **{name: of_state("scheduler", change) for name, change in SCHEDULES.items()},
    **{name: of_state("random_0", change) for name, change in RANDOM.items()},
}
STATES = ("optimizer.json", "scheduler.json", "random_0.json", "trainer_state.json")
GARBAGE = {
    "a list": "[]",
    "null": "null",
    "a number": "1",
    "text": "x",
    "digits": "9" * 5000,
    "nothing": "",
    "depth": "[" * 100_000,
}
TAMPERED |= {f"{kind} as {name}": of_text(name, GARBAGE[kind]) for kind in GARBAGE for name in STATES}
TAMPERED |= {f"a dict as {name}": of_text(name, '{"$tuple": 1, "$dict": [[1]]}') for name in STATES}
TAMPERED["text as config.json"] = of_text("config.json", "x")


@pytest.mark.parametrize("name", TAMPERED)
def test_the_checkpoint_before_is_taken_whatever_was_changed_and_sealed_again(name, run, tmp_path, capsys):
    trainer, folder = run
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    TAMPERED[name](copy / "checkpoint-4")
    seal(copy / "checkpoint-4")
    assert last_whole_checkpoint(trainer, copy) == str(copy / "checkpoint-2")
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint-4 is damaged (" in line and line.endswith("it is now damaged-checkpoint-4") and len(line) < 500


NOT_SEALED = {
    "a file in its place": lambda c: [shutil.rmtree(c), c.write_text("x")],
    "a link in its place": lambda c: [c.rename(c.parent / "elsewhere"), c.symlink_to(c.parent / "elsewhere")],
    "an empty folder": lambda c: [shutil.rmtree(c), c.mkdir()],
    "a folder in place of the weights": lambda c: [
        (c / "model.safetensors").unlink(),
        (c / "model.safetensors").mkdir(),
    ],
    "a file that nobody listed": lambda c: (c / "pytorch_model.bin").touch(),
}


@pytest.mark.parametrize("name", NOT_SEALED)
def test_the_checkpoint_before_is_taken_when_the_folder_is_another(name, run, tmp_path, capsys):
    trainer, folder = run
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    NOT_SEALED[name](copy / "checkpoint-4")
    assert last_whole_checkpoint(trainer, copy) == str(copy / "checkpoint-2")
    assert "checkpoint-4 is damaged (" in capsys.readouterr().err


def test_weights_in_several_files_that_the_index_names_are_whole(run, tmp_path):
    trainer, folder = run
    copy = Path(shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4"))
    split("a.safetensors", "b.safetensors")(copy)
    seal(copy)
    assert problem_of(trainer, copy) is None


def test_a_tensor_in_two_files_of_an_index_is_damage(run, tmp_path):
    """Whichever Trainer loads last is taken, and the index does not say which."""
    trainer, folder = run
    copy = Path(shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4"))
    split("a.safetensors", "b.safetensors")(copy)
    first, second = load_file(copy / "a.safetensors"), load_file(copy / "b.safetensors")
    save_file(second | dict([next(iter(first.items()))]), copy / "b.safetensors")
    seal(copy)
    assert "which another file holds too" in str(problem_of(trainer, copy))


def test_looking_changes_neither_trainer_nor_folder(run):
    trainer, folder = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    kept, state = trainer.optimizer, torch.get_rng_state()
    assert problem_of(trainer, folder / "checkpoint-4") is None
    assert trainer.optimizer is kept and torch.equal(torch.get_rng_state(), state)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_every_family_are_whole(family, tmp_path):
    """And of an optimizer of another form, with the schedule of constant rates, and those that follow evaluations."""
    more = {
        "arm": ["--optim", "adafactor", "--lr_scheduler_type", "constant"],
        "uniform": ["--lr_scheduler_type", "reduce_lr_on_plateau"],
        "interpolating": ["--lr_scheduler_type", "greedy"],
    }.get(family, [])
    trainer = stopped_run(tmp_path / "run", "--family", family, *more)
    assert problem_of(trainer, tmp_path / "run" / "checkpoint-4") is None
