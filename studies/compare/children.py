"""The training runs of a comparison as child processes: started, watched, stopped with a checkpoint."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.2
SHOWN_EVERY = 1.0  # seconds between two looks at the logs for the line of progress
LOG_TAIL = 4096  # bytes of a log that are looked at
LEFT_BEHIND_SECONDS = 60.0  # for a launcher's processes to end after the launcher itself


class Stopped(BaseException):
    """A signal asked this process to stop."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `Stopped` within this block, unless they are ignored, as under nohup."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = {each: signal.getsignal(each) for each in STOPPING}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that come within this block are handled at its end: what it begins, it also notes.

    Only the main thread has signals to handle.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            before[came[0]](came[0], None)


@dataclass
class Task:
    """One run to train: its name for people, its command, its log, and the file that marks it finished."""

    name: str
    command: list[str]
    log: Path
    record: Path


@dataclass
class _Child:
    task: Task
    process: subprocess.Popen
    file: IO[bytes]
    started: float


@dataclass
class Children:
    """Runs tasks, `jobs` at a time. on_start and on_end are told of each, on_end with its seconds.

    lock: a file descriptor that the children keep open, so that the lock on it outlives a killed parent; or -1.
    """

    jobs: int
    lock: int
    on_start: Callable[[Task], None]
    on_end: Callable[[Task, float], None]
    running: list[_Child] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    shown: float = 0.0

    def run(self, tasks: Sequence[Task]) -> dict[str, str]:
        """Run all; what failed, as sentences by the names of tasks. A failure does not keep the others from running.

        A signal is passed on to the running children, which save a checkpoint; then `Stopped` is raised. A ValueError
        of a start is raised when those that run have ended; no other is begun.
        """
        waiting, refused = list(tasks), None
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    try:
                        self._start(waiting.pop(0))
                    except ValueError as error:
                        waiting, refused = [], error
                time.sleep(POLL_SECONDS)
                for child in [each for each in self.running if each.process.poll() is not None]:
                    self._end(child)
                self._show()
        except BaseException:
            self._stop()
            raise
        finally:
            self._clear()
        if refused is not None:
            raise refused
        return self.failures

    def _start(self, task: Task) -> None:
        self.on_start(task)
        task.log.parent.mkdir(parents=True, exist_ok=True)
        file = open(task.log, "wb")  # noqa: SIM115 (open as long as the child runs)
        with _signals_wait():  # a child that nobody has noted would not be stopped
            try:
                process = subprocess.Popen(
                    task.command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | _threads(self.jobs),
                    pass_fds=(self.lock,) if self.lock >= 0 else (),
                    start_new_session=True,  # signals reach it only through this process, once
                )
            except OSError as error:
                file.close()
                raise ValueError(f"--launcher {task.command[0]}: {error.strerror}") from None
            self.running.append(_Child(task, process, file, time.monotonic()))

    def _end(self, child: _Child) -> None:
        self.running.remove(child)
        child.file.close()
        self._clear()
        if child.process.returncode == 0 and child.task.record.exists():
            self.on_end(child.task, time.monotonic() - child.started)
            return
        self.failures[child.task.name] = f"{_last_words(child)} (log: {child.task.log})"
        print(f"{child.task.name}: failed: {self.failures[child.task.name]}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        """SIGTERM to the children, and wait; another signal meanwhile is sent on, a third one kills.

        Not SIGINT, which a child inherits as ignored where a shell has put this process into the background.
        """
        numbers = [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
        while self.running:
            number = numbers.pop(0) if len(numbers) > 1 else numbers[0]
            try:
                for child in self.running:
                    _signal_group(child.process.pid, number)
                for child in list(self.running):
                    child.process.wait()
                    _wait_for_group(child.process.pid)
                    child.file.close()
                    self.running.remove(child)
            except (Stopped, KeyboardInterrupt):
                continue

    def _show(self) -> None:
        """On a terminal, the children's progress in one line of stderr."""
        if not sys.stderr.isatty() or time.monotonic() - self.shown < SHOWN_EVERY:
            return
        self.shown = time.monotonic()
        parts = [f"{child.task.name}: {progress_of(child.task.log)}" for child in self.running]
        line = " | ".join(parts)[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def progress_of(log: Path) -> str:
    """Where a run is, from the progress bar at the end of its log: "120/300, loss 6.234, 5,812 tokens/s"."""
    text = _tail(log)
    steps = re.findall(r"(\d+/\d+) \[", text)
    loss = re.findall(r"(loss [\d.]+, [\d,]+ tokens/s)", text)
    return ", ".join([*steps[-1:], *loss[-1:]]) or "starting"


def _tail(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
        return file.read().decode("utf-8", errors="replace")


def _last_words(child: _Child) -> str:
    """Why a child failed: the sentence of its refusal, or the last line of its log."""
    status = child.process.returncode
    lines = [line.strip() for line in re.split(r"[\r\n]", _tail(child.task.log)) if line.strip()]
    refusals = [line.partition("error: ")[2] for line in lines if line.startswith("train.py: error: ")]
    if refusals:
        return refusals[-1]
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}: {lines[-1] if lines else 'it printed nothing'}"


def _threads(jobs: int) -> dict[str, str]:
    """The environment that divides the threads over `jobs` processes; nothing for one."""
    if jobs == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return {"OMP_NUM_THREADS": str(max(1, (int(given) if given.isdigit() else cores) // jobs))}


def _signal_group(group: int, number: int) -> bool:
    """Whether there was a process in the group to send the signal to."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _wait_for_group(group: int) -> None:
    """A launcher may end before the processes that it launched, which are still saving."""
    end = time.monotonic() + LEFT_BEHIND_SECONDS
    while _signal_group(group, 0) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
