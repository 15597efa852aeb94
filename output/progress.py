"""Progress on stderr: bars on a terminal, lines everywhere; and quiet libraries beside them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Keep the bars and warnings of Transformers off stderr, which is for our progress and errors."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def say(text: str) -> None:
    """A line on stderr, at once: what a long command does next or has finished, also where stderr is a file."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yields show(done, total); total None shows a pulse. On stderr, gone at the end; nothing without a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
