"""What a process sets before torch is loaded. Nothing but the standard library is imported here."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# How often a thread that waits for the others looks again before it sleeps. By default libgomp looks 300,000 times,
# some milliseconds, which a busy machine does not have: it takes the core from whoever is waited for.
SPINS = "3000"
CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")


def bound_spinning() -> None:
    """Bound how long waiting threads spin, unless the user has set how they wait. Without effect after torch."""
    if not any(name in os.environ for name in CHOSEN_BY_USER):
        os.environ["GOMP_SPINCOUNT"] = SPINS


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Ctrl-C within the block ends the process at once, with the signal's status and without a traceback.

    For imports, which have nothing to lose. Where SIGINT is ignored or handled already, that stays.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command() -> None:
    """Entry point of the console command `prime-v2`."""
    bound_spinning()
    with quiet_interrupt():
        from prime_v2.commands.main import main
    main()
