"""A real browser for the tests of pages: headless Chromium, driven by its DevTools protocol over two pipes."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60  # for an answer of the browser, on a machine that does other things, too
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--force-color-profile=srgb", "--disable-background-networking", "--disable-extensions"),
)
# The browser reads commands from descriptor 3 and answers on 4.
LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# Keys whose name and virtual key code the page and the browser's own controls look at.
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, " ": 32}


class Browser:
    """One tab. What the page prints to the console, and what it refuses to run, is in `messages`."""

    def __init__(self, program: str, profile: Path):
        down, up = os.pipe(), os.pipe()
        # Above the two that the browser wants, so that none of them is overwritten.
        ends = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in (down[0], up[1])]
        flags = [*FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, *map(str, ends), program, *flags, "about:blank"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for each in (down[0], up[1], *ends):
            os.close(each)
        self.writer, self.reader = down[1], up[0]
        self.rest, self.number, self.session = b"", 0, None
        self.messages: list[str] = []

    def start(self) -> None:
        """Take hold of the first tab."""
        (target,) = [each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError):
            os.write(self.writer, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.writer)
        os.close(self.reader)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.reader], [], [], SECONDS)
            part = os.read(self.reader, 2**20) if ready else b""
            if not part:
                raise TimeoutError(f"no answer of the browser in {SECONDS} s")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        kind, values = message.get("method"), message.get("params", {})
        if kind == "Log.entryAdded":
            self.messages.append(values["entry"]["text"])
        elif kind == "Runtime.exceptionThrown":
            self.messages.append(str(values["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled":
            self.messages.append(str([each.get("value") for each in values["args"]]))
        elif kind == "Page.javascriptDialogOpening":
            self.messages.append(f"dialog: {values['message']}")
        return message

    def open(self, path: Path, *, at: str = "", width: int = 1200, height: int = 900, **media: str) -> None:
        """Open a file, scripts and all; media: features, e.g. prefers_color_scheme="dark"."""
        self.messages.clear()
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.as_uri() + at)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def evaluate(self, code: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true in the page."""
        until = time.monotonic() + SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < until, f"never true: {condition}"
            time.sleep(0.01)

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {}
        code = KEYS.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            given = {"type": kind, "key": key, "windowsVirtualKeyCode": code, **(text if kind == "keyDown" else {})}
            self.send("Input.dispatchKeyEvent", **given)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """What is seen, or the whole page, as PNG."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser, ended at the end; the test is skipped where none is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed (apt-get install chromium)")
    opened = Browser(program, profile)
    try:
        opened.start()
        yield opened
    finally:
        opened.close()
