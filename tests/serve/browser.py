"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = "chromium", "chromium-browser", "google-chrome"


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._numbers = connection, itertools.count()
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.problems: list[str] = []
        """What the page's console has complained of, violations of its policy included."""
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """A command of the protocol to this tab."""
        return self._send(method, self._session, **params)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, or of its promise."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> Any:
        """The value of an expression once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, f"{script} stays {value!r}: {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        """Goes to a page and waits until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith('{url}')")

    def click(self, selector: str) -> None:
        """Clicks into the middle of an element, as a hand would: what lies above it takes the click."""
        place = self.evaluate(
            f"(() => {{ const r = document.querySelector('{selector}').getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Types into an element."""
        self.evaluate(f"document.querySelector('{selector}').focus()")
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Presses Enter where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def _send(self, method: str, session: str | None = None, **params: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._connection.send(json.dumps(message))
        while (answer := json.loads(self._connection.recv(timeout=60))).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _note(self, event: dict[str, Any]) -> None:
        entry = event["params"]["entry"] if event.get("method") == "Log.entryAdded" else None
        if entry is not None and entry["level"] in ("warning", "error") and entry["source"] != "network":
            self.problems.append(entry["text"])
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(event["params"]["exceptionDetails"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A tab of a fresh Chromium; where there is none, the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium: .ci/run installs Debian's")
    # A container allows Chromium no sandbox of its own, and little shared memory.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [found, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / "chromium.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HOME": str(profile.parent)})
    try:
        port, path = _address(profile / "DevToolsActivePort", child)
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
            yield Page(connection)
    finally:
        child.kill()
        child.wait()


def _address(file: Path, child: subprocess.Popen[bytes]) -> list[str]:
    """The port and the path that Chromium writes once it listens."""
    deadline = time.monotonic() + 60
    while not (file.exists() and len(lines := file.read_text().splitlines()) == 2):
        assert child.poll() is None, (file.parent.parent / "chromium.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return lines
