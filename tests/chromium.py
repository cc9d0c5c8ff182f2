"""Pages tried in a real browser: a headless Chromium driven over the DevTools protocol, which needs nothing but Chromium."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """headless no-sandbox disable-gpu no-first-run disable-sync disable-quic
    disable-background-networking disable-component-update"""
_WITH_PIPES = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One page of a browser that lives within a `with` block; `errors` holds all that the page complained of."""

    def __init__(self, folder: Path) -> None:
        self.errors: list[str] = []
        self._session: str | None = None
        self._number, self._received = 0, b""
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]  # Chromium wants them to be 3 and 4
        flags = [f"--{flag}" for flag in (*FLAGS.split(), "remote-debugging-pipe", f"user-data-dir={folder}")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PIPES, *map(str, given), str(PROGRAM), *flags],
            pass_fds=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (commands, answers, *given):
            os.close(fd)

    def __enter__(self) -> Self:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, **params: Any) -> Any:
        """The answer to one command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while b"\0" not in self._received:
            ready = select.select([self._read], [], [], max(0, deadline - time.monotonic()))[0]
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._received += part
        line, _, self._received = self._received.partition(b"\0")
        message = json.loads(line)
        params, method = message.get("params", {}), message.get("method")
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")) or (
            method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")
        ):
            self.errors.append(str(params))
        return message

    def open(self, page: Path, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Load a page and wait until it and its script are done."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=page.resolve().as_uri())
        while self.js(f"location.href === {json.dumps(page.resolve().as_uri())} && document.readyState") != "complete":
            time.sleep(0.01)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, *keys: str, shift: bool = False) -> None:
        for key in keys:
            typed = {"text": {"Enter": "\r"}.get(key, key)} if len(key) == 1 or key == "Enter" else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=8 * shift, **typed)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=8 * shift)

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of the first element that the selector finds."""
        middle = "(r => [r.x + r.width / 2, r.y + r.height / 2])"
        x, y = self.js(f"{middle}(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
