"""Checkpoints: states bit for bit, damage that is found, and folders that outlive a kill at any call."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from prime_v2.training.checkpoints import (
    damage,
    load_state,
    publish,
    random_state,
    save_state,
    seal,
    set_damaged_aside,
    set_random_state,
)

# States


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))


def trained(model, optimizer, scheduler, steps: range) -> list[torch.Tensor]:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return [each.detach().clone() for each in model.parameters()]


OPTIMIZERS = {
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_the_saved_optimizer_and_scheduler_to_the_same_bits(name, tmp_path):
    def parts():
        model = network()
        groups = [{"params": list(model[0].parameters()), "weight_decay": 0.1}, {"params": model[1].parameters()}]
        optimizer = OPTIMIZERS[name](groups)
        rates = {"min_lr_rate": 0.1}
        scheduler = get_scheduler("cosine_with_min_lr", optimizer, 2, 9, scheduler_specific_kwargs=rates)
        return model, optimizer, scheduler

    model, optimizer, scheduler = parts()
    weights = trained(model, optimizer, scheduler, range(4))
    save_state(optimizer.state_dict(), tmp_path, "optimizer")
    save_state(scheduler.state_dict(), tmp_path, "scheduler")
    expected = trained(model, optimizer, scheduler, range(4, 8))

    model, again, scheduler_again = parts()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    again.load_state_dict(load_state(tmp_path, "optimizer"))
    scheduler_again.load_state_dict(load_state(tmp_path, "scheduler"))
    found = trained(model, again, scheduler_again, range(4, 8))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    states = [each.state_dict() for each in (optimizer, again)]
    for number, state in states[0]["state"].items():
        for key, value in state.items():
            other = states[1]["state"][number][key]
            assert (value.dtype, value.shape) == (other.dtype, other.shape) and torch.equal(value, other)
    assert str(states[0]["param_groups"]) == str(states[1]["param_groups"])
    assert scheduler.state_dict() == scheduler_again.state_dict()


def test_nested_states_keep_types_keys_and_bits(tmp_path):
    state = {
        "ids": {0: [1, (2.5, None)], 7: {"a b": float("inf"), "c": True}},
        "empty": {},
        "x": [torch.tensor(3.0), torch.arange(6).view(2, 3).T, torch.tensor([0.1, -0.0], dtype=torch.bfloat16)],
    }
    save_state(state, tmp_path, "state")
    found = load_state(tmp_path, "state")
    assert found["ids"] == state["ids"] and found["empty"] == {}
    for before, after in zip(state["x"], found["x"], strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)
    assert torch.signbit(found["x"][2][1])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


def test_what_is_no_tensor_number_or_text_is_refused_by_its_place(tmp_path):
    with pytest.raises(
        ValueError, match=r"optimizer.groups.0.scale is of type dtype, but checkpoints hold only tensors"
    ):
        save_state({"groups": [{"scale": torch.float32}]}, tmp_path, "optimizer")
    assert not list(tmp_path.iterdir())


def test_all_generators_draw_on_from_where_they_were(tmp_path):
    def draw():
        return random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.rand(3).tolist()

    kept = random_state()
    try:
        draw()  # leaves half a pair of normal numbers in Python's and NumPy's generators
        save_state(random_state(), tmp_path, "random_0")
        expected = [draw() for _ in range(3)]
        set_random_state(load_state(tmp_path, "random_0"))
        assert [draw() for _ in range(3)] == expected
    finally:
        set_random_state(kept)


# Folders


def write(folder: Path, name: str) -> Path:
    """What a finished but unsealed checkpoint looks like."""
    checkpoint = folder / name
    (checkpoint / "sub").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (checkpoint / "sub" / "code.py").write_text(name)
    return checkpoint


def sealed(folder: Path, *steps: int) -> list[Path]:
    found = [write(folder, f"checkpoint-{step}") for step in steps]
    for each in found:
        seal(each)
    return found


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "a flipped bit": (lambda c: flip(c / "model.safetensors", 5000), "model.safetensors is not as it was written"),
    "a torn file": (lambda c: os.truncate(c / "model.safetensors", 9000), "model.safetensors is not as it was"),
    "an emptied file": (lambda c: os.truncate(c / "sub" / "code.py", 0), "sub/code.py is not as it was written"),
    "a missing file": (lambda c: (c / "sub" / "code.py").unlink(), "sub/code.py is missing"),
    "a missing folder": (lambda c: shutil.rmtree(c / "sub"), "sub/code.py is missing"),
    "no seal": (lambda c: (c / "checksums.json").unlink(), "checksums.json is missing"),
    "a torn seal": (lambda c: os.truncate(c / "checksums.json", 60), "checksums.json is damaged"),
    "an emptied seal": (lambda c: (c / "checksums.json").write_text("{}"), "checksums.json is damaged"),
    "a binary seal": (lambda c: (c / "checksums.json").write_bytes(b"\xff\xfe"), "checksums.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_by_name_and_the_one_before_is_taken(name, tmp_path, capsys):
    before, last = sealed(tmp_path, 2, 10)
    assert damage(before) is None and damage(last) is None
    make, message = DAMAGES[name]
    make(last)
    assert set_damaged_aside(tmp_path) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{last} is damaged ({message}") and line.endswith("it is now damaged-checkpoint-10")
    assert (tmp_path / "damaged-checkpoint-10" / "trainer_state.json").exists() and not last.exists()
    assert set_damaged_aside(tmp_path) == before and capsys.readouterr().err == ""


def test_every_flipped_bit_and_every_cut_of_every_file_is_found(tmp_path):
    """Of the seal too, but for a bit of its white space that leaves it the same JSON."""
    (checkpoint,) = sealed(tmp_path, 1)
    (checkpoint / "model.safetensors").write_bytes(b"some weights")
    seal(checkpoint)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    for path in sorted(each for each in checkpoint.rglob("*") if each.is_file()):
        content = path.read_bytes()
        for offset in range(len(content)):
            path.write_bytes(content)
            flip(path, offset)
            try:
                same = path.name == "checksums.json" and json.loads(path.read_text()) == sums
            except ValueError:
                same = False
            assert same or damage(checkpoint) is not None, (path, offset)
            path.write_bytes(content[:offset])
            end = path.name == "checksums.json" and offset == len(content) - 1  # its last line end
            assert end or damage(checkpoint) is not None, (path, offset)
        path.write_bytes(content)
    assert damage(checkpoint) is None


def test_when_no_checkpoint_is_whole_nothing_is_touched(tmp_path):
    first, second = sealed(tmp_path, 1, 2)
    (first / "sub" / "code.py").unlink()
    flip(second / "model.safetensors", 0)
    before = sorted(tmp_path.rglob("*"))
    expected = (
        r"holds no whole checkpoint: checkpoint-2 \(model.safetensors is not as it was written\), "
        r"checkpoint-1 \(sub/code.py is missing\); put a copy of one back, or move them away to start from the beg"
    )
    with pytest.raises(ValueError, match=expected):
        set_damaged_aside(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_checkpoints_has_none(tmp_path):
    write(tmp_path / ".incomplete", "checkpoint-3")
    write(tmp_path, "checkpoint-three")
    assert set_damaged_aside(tmp_path) is None
    assert not (tmp_path / ".incomplete").exists()
    assert set_damaged_aside(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("keep", "left"), [(1, [12]), (2, [4, 12]), (9, [2, 4, 12]), (None, [2, 4, 12])])
def test_the_newest_are_kept_by_number(keep, left, tmp_path):
    sealed(tmp_path, 2, 4)
    aside = write(tmp_path / ".incomplete", "checkpoint-12").parent
    publish(aside, tmp_path, keep)
    assert {each.name for each in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}
    assert damage(tmp_path / "checkpoint-12") is None


class Killed(BaseException):
    pass


class Countdown:
    """Lets so many calls through, then kills."""

    def __init__(self, calls: int):
        self.left = calls

    def of(self, function):
        def counted(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*args, **kwargs)

        return counted


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_call_of_publishing_leaves_the_newest_whole_one(keep, tmp_path, monkeypatch):
    """Killed before the n-th system call that writes, for every n: there always is a whole checkpoint, the new one
    from its rename on, and the next start takes it without a complaint."""
    names = ["fsync", "replace", "unlink", "rmdir", "chmod"]
    outcomes = []
    for limit in range(200):
        folder = tmp_path / str(limit)
        sealed(folder, 2, 4)
        aside = write(folder / ".incomplete", "checkpoint-6").parent
        countdown = Countdown(limit)
        with monkeypatch.context() as patched:
            for name in names:
                patched.setattr(os, name, countdown.of(getattr(os, name)))
            try:
                publish(aside, folder, keep)
                finished = True
            except Killed:
                finished = False
        outcomes.append(set_damaged_aside(folder).name)
        assert not list(folder.glob("damaged-*"))
        if finished:
            break
    assert finished and len(outcomes) > 12
    assert outcomes == sorted(outcomes) and set(outcomes) == {"checkpoint-4", "checkpoint-6"}
