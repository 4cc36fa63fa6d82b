"""Headless Chromium, driven through its own debugging pipe: no driver and no package is needed."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_SECONDS = 60


class Browser:
    """One window of a browser; messages are JSON objects that end with a zero byte."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._received = b""
        self._number = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.resize(1000, 20_000)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the DevTools protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            assert time.monotonic() < deadline, f"{method}: no answer"
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Set the window's size; by default so high that every card is in view."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Load a page anew, and wait until it says that it is ready and its cards are filled."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + _SECONDS
        ready = (
            "location.href !== 'about:blank' && document.body?.dataset.ready !== undefined"
            " && !document.querySelector('.waiting')"
        )
        while not self.evaluate(ready):
            assert time.monotonic() < deadline, f"{address} does not become ready"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, which must be plain."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            part = os.read(self._reads, 1 << 20)
            assert part, "the browser ended"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        content: dict[str, Any] = json.loads(message)
        return content


@contextmanager
def launched(profile: Path) -> Iterator[Browser]:
    """A browser of its own, which is gone afterwards with all its processes."""
    assert PROGRAM
    (reads, to_us), (from_us, writes) = os.pipe(), os.pipe()
    # the browser reads from 3 and writes to 4, whatever else bears these numbers here
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (from_us, to_us)]

    def place() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
    process = subprocess.Popen(
        [PROGRAM, *options, f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=place,
        start_new_session=True,
    )
    for end in (from_us, to_us, *theirs):
        os.close(end)
    try:
        yield Browser(reads, writes)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(reads)
        os.close(writes)
