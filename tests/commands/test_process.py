"""What a process sets before torch is loaded: how OpenMP's threads wait, and what Ctrl-C does meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prime_v2.commands.process import CHOSEN_BY_USER, SPINS, bound_spinning, quiet_interrupt

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = {
    "train.py": [str(ROOT / "train.py"), "--max_steps", "1"],
    "prime-v2": ["-c", "from prime_v2.commands.process import run_command; run_command()", "generate", "nowhere"],
}


@pytest.mark.parametrize("chosen", [None, *CHOSEN_BY_USER])
def test_spinning_is_bounded_unless_the_user_says_how_threads_wait(chosen, monkeypatch):
    for name in CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "7")
    bound_spinning()
    expected = {"GOMP_SPINCOUNT": SPINS} if chosen is None else {chosen: "7"}
    assert {name: os.environ[name] for name in CHOSEN_BY_USER if name in os.environ} == expected


@pytest.mark.parametrize("entry", ENTRIES)
def test_spinning_is_bounded_before_torch_is_loaded(entry, tmp_path):
    """A torch.py in place of torch says what it finds."""
    (tmp_path / "torch.py").write_text("import os, sys; sys.exit('spins ' + os.environ['GOMP_SPINCOUNT'])")
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    environment |= {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *ENTRIES[entry]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert f"spins {SPINS}" in done.stderr


@pytest.mark.parametrize("entry", ENTRIES)
def test_ctrl_c_during_imports_ends_without_a_traceback(entry, tmp_path):
    """Sent when the first part of torch has been imported."""
    command = [sys.executable, "-X", "importtime", *ENTRIES[entry]]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    seen = []
    for line in started.stderr:
        if not seen and "| " in line and line.split("|")[-1].strip().startswith("torch"):
            started.send_signal(signal.SIGINT)
        if seen or line.split("|")[-1].strip().startswith("torch"):
            seen.append(line)
    started.stderr.close()
    assert started.wait() in (-signal.SIGINT, 130)
    assert seen and not [line for line in seen if "Traceback" in line or "Exception ignored" in line]


def test_a_signal_that_is_ignored_or_handled_stays_so(monkeypatch):
    """As in the background of a shell, where nohup has it ignored."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGINT, handler)
            with quiet_interrupt():
                assert signal.getsignal(signal.SIGINT) is handler
            assert signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with quiet_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_but_the_standard_library_is_imported():
    code = "import sys; import prime_v2.commands.process; print('torch' in sys.modules, 'typer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "False False\n"
    )
