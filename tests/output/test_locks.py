"""One process at a time in a folder: refusals, what gives way, and who holds the lock."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prime_v2.output import locks
from prime_v2.output.locks import LOCK, Locked, folder_lock

HOLDER = """
import sys, time
from pathlib import Path
from prime_v2.output.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "--out x"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen:
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    with process.stdout as output:
        assert output.readline() == "held\n"
    return process


def can_be_taken(folder: Path) -> bool:
    try:
        with folder_lock(folder, "--out x"):
            return True
    except Locked:
        return False


def test_a_second_process_is_refused_with_the_name_of_the_first_and_a_killed_one_gives_way(tmp_path):
    process = holder(tmp_path / "run")
    try:
        expected = rf"^--out x is in use by process {process.pid} on \S+ since \d{{4}}-\d\d-\d\d .*; wait for its end"
        with pytest.raises(Locked, match=expected), folder_lock(tmp_path / "run", "--out x"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "run" / LOCK).exists()  # what a kill leaves holds nothing
    with folder_lock(tmp_path / "run", "--out x"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_the_end_of_the_block_leaves_nothing_and_its_work_stays(tmp_path):
    with folder_lock(tmp_path / "empty", "--out x"):
        assert (tmp_path / "empty" / LOCK).exists()
    with pytest.raises(KeyError), folder_lock(tmp_path / "full", "--out x"):
        (tmp_path / "full" / "work").touch()
        raise KeyError
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["full", "work"]


def test_one_process_cannot_hold_a_folder_twice(tmp_path):
    with folder_lock(tmp_path, "--out x"):
        assert not can_be_taken(tmp_path)
    assert can_be_taken(tmp_path)


def test_a_forked_worker_does_not_hold_it(tmp_path):
    """A data loader's worker outlives its killed parent by seconds."""
    with folder_lock(tmp_path, "--out x"):
        (go, done), (ready, begun) = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            os.close(done)
            os.write(begun, b"x")
            os.read(go, 1)
            os._exit(0)
        os.close(go)
        os.read(ready, 1)
    try:
        assert can_be_taken(tmp_path)
    finally:
        os.close(done)
        os.waitpid(child, 0)


def test_a_child_that_was_given_the_descriptor_holds_it_on(tmp_path):
    """As the runs of a comparison do, whose parent may be killed."""
    with folder_lock(tmp_path, "--out x") as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock.descriptor,))
    try:
        assert (tmp_path / LOCK).exists() and not can_be_taken(tmp_path)
    finally:
        child.kill()
        child.wait()
    assert can_be_taken(tmp_path)


def test_a_lock_file_that_its_holder_removed_meanwhile_holds_nothing(tmp_path, monkeypatch):
    """Opened before, locked after the removal: such a file would be a lock that no third process sees."""
    inner, calls = locks._taken, []

    def removed_meanwhile(file):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        return inner(file)

    monkeypatch.setattr(locks, "_taken", removed_meanwhile)
    with folder_lock(tmp_path, "--out x") as lock:
        assert len(calls) == 2 and lock.is_in_place()
        assert not can_be_taken(tmp_path)


def test_a_folder_that_is_deleted_or_made_anew_is_no_longer_in_place(tmp_path):
    folder = tmp_path / "run"
    with folder_lock(folder, "--out x") as lock:
        assert lock.is_in_place()
        (folder / LOCK).unlink()
        folder.rmdir()
        assert not lock.is_in_place()
        with folder_lock(folder, "--out x"):
            assert not lock.is_in_place()


def test_a_file_system_without_locks_is_used_with_a_word(tmp_path, monkeypatch, capsys):
    def refused(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    with folder_lock(tmp_path, "--out x") as lock:
        assert lock.is_in_place() and lock.descriptor == -1
    assert "--out x cannot be locked (No locks available): see to it that no second" in capsys.readouterr().err


def test_whoever_waits_goes_on_when_the_first_has_ended(tmp_path, capsys):
    process = holder(tmp_path)
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({process.pid}, 9)"])
    started = time.monotonic()
    with folder_lock(tmp_path, "--out x", wait=True):
        assert time.monotonic() - started > 0.1
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    killer.wait()
    process.wait()
    assert f"--out x is in use by process {process.pid} on " in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_refused_and_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out x is not a folder"), folder_lock(tmp_path / "file", "--out x"):
        pass
    (tmp_path / LOCK).symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match="is a link"), folder_lock(tmp_path, "--out x"):
        pass
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.symlink_to(path.parent / "nowhere"), "a link"),
        (os.mkfifo, "no plain file"),
    ],
    ids=["folder", "link", "fifo"],
)
def test_what_is_no_file_in_place_of_the_lock_is_refused_in_a_sentence_and_stays(tmp_path, make, what):
    make(tmp_path / LOCK)
    message = f"{LOCK} is {what}, where the file .* belongs; move it away"
    with pytest.raises(ValueError, match=message), folder_lock(tmp_path, "--out x"):
        pass
    assert os.path.lexists(tmp_path / LOCK)
