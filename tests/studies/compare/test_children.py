"""Child processes of a comparison, and the signals that stop them."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from prime_v2.studies.compare.children import Children, Stopped, Task, stopping_on_signals


def test_a_signal_that_comes_while_a_child_is_begun_stops_that_child_too(tmp_path, monkeypatch):
    """Between its start and its entry in the list of running ones nobody would stop it."""
    begun, popen = [], subprocess.Popen

    def interrupted(*arguments, **options):
        begun.append(popen(*arguments, **options))
        signal.raise_signal(signal.SIGTERM)
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    children = Children(1, -1, lambda task: None, lambda task, seconds: None)
    with pytest.raises(Stopped), stopping_on_signals():
        children.run([Task("a", sleep, tmp_path / "log", tmp_path / "record")])
    assert begun[0].returncode == -signal.SIGTERM and not children.running


def test_children_may_be_run_in_a_thread(tmp_path):
    record = tmp_path / "record"
    task = Task("a", [sys.executable, "-c", f"open({str(record)!r}, 'w').close()"], tmp_path / "log", record)
    children = Children(1, -1, lambda task: None, lambda task, seconds: None)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(children.run, [task]).result() == {} and record.exists()


def test_what_runs_ends_when_no_other_may_be_begun(tmp_path):
    """As where the code has changed: the work of the others is not lost."""
    ended = []

    def on_start(task):
        if task.name == "c":
            raise ValueError("the code is another one")

    def task(name, seconds):
        record = tmp_path / f"{name}.json"
        program = f"import time; time.sleep({seconds}); open({str(record)!r}, 'w').close()"
        return Task(name, [sys.executable, "-c", program], tmp_path / name, record)

    children = Children(2, -1, on_start, lambda task, seconds: ended.append(task.name))
    with pytest.raises(ValueError, match="the code is another one"):
        children.run([task("a", 0), task("b", 1), task("c", 0), task("d", 0)])
    assert sorted(ended) == ["a", "b"]


def test_signals_stop_unless_they_are_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped, stopping_on_signals():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
