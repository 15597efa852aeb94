"""Any change of a run's checkpoints, sealed again or not: one that is as it was written is taken, or a sentence."""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Refusal, attempt, cases
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from tiny_runs import stopped_run

from prime_v2.training.checkpoint_checks import last_whole_checkpoint
from prime_v2.training.checkpoints import CHECKSUMS, seal

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tampering import tamper  # noqa: E402  # of the crash test, which changes whole runs in the same ways

STATES = ("optimizer", "scheduler", "random_0", "trainer_state")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return stopped_run(folder), folder


def content_of(checkpoint: Path) -> dict[str, bytes]:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS]
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}


def taken(run: tuple[Any, Path], copy: Path, change: Any) -> Any:
    """What is taken of a copy after a change: a checkpoint that is as it was written, checked here, or a refusal."""
    trainer, folder = run
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    changed = change(copy)
    found = attempt("checkpoint", lambda: last_whole_checkpoint(trainer, copy))
    if not isinstance(found, Refusal) and found is not None:
        assert content_of(Path(found)) == content_of(folder / Path(found).name), changed
    return found


def tampered(copy: Path, draw: random.Random) -> str:
    try:
        return tamper(copy, draw)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:  # of a file that was changed before
        return f"nothing more: {error}"


def test_what_is_taken_after_any_tampering_is_as_it_was_written(run, tmp_path):
    @cases(12, 3000)
    @given(st.integers(0, 2**32), st.integers(1, 3))
    def check(seed, times):
        draw = random.Random(seed)
        taken(run, tmp_path / "copy", lambda copy: [tampered(copy, draw) for _ in range(times)])

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$tensor", "$tuple", "$dict", "state", "param_groups", "global_step", "python", "a"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@st.composite
def changes(draw, content):
    """The JSON with another value, or none, somewhere in it; or another JSON."""
    if not draw(st.integers(0, 4)):
        return draw(JSON)
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
            place = place[key]
            continue
        if draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(JSON)
        return content


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_form_is_never_taken_though_it_is_sealed(name, run, tmp_path):
    """A value that the form allows, in place of another, cannot be told from it: a history, a count of draws."""
    path = run[1] / "checkpoint-4" / f"{name}.json"

    @cases(10, 1200)
    @given(st.data())
    def check(data):
        changed = data.draw(changes(json.loads(path.read_text())))

        def change(copy: Path) -> None:
            (copy / "checkpoint-4" / path.name).write_text(json.dumps(changed))
            seal(copy / "checkpoint-4")

        trainer, folder = run
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        change(copy)
        found = attempt(f"{name}.json", lambda: last_whole_checkpoint(trainer, copy))
        assert found in (str(copy / "checkpoint-4"), str(copy / "checkpoint-2"))
        if found.endswith("4") and name in ("optimizer", "scheduler"):
            before = json.loads(path.read_text())
            allowed = {"_step_count", "_get_lr_called_within_step", "_is_initial"}
            names = [key for key in before.keys() | changed.keys() if before.get(key) != changed.get(key)]
            assert set(names) <= allowed, names

    check()
