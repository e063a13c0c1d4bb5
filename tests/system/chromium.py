"""A real browser without a display, driven by its DevTools protocol over two pipes."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = "chromium-headless-shell"


class Page:
    """One page of a browser of its own. The protocol goes over descriptors 3 and 4, messages ended by a zero."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which(PROGRAM)
        assert program, f"{PROGRAM} is not installed: vmctl/packages.debian names it"
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        # As 3 and 4 in the browser, whatever they are here.
        script = f'exec 3<&{to_read} 4>&{from_write}; exec "$@"'
        flags = [
            "--no-sandbox",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--window-size=1000,800",
            f"--user-data-dir={folder}",
        ]
        self._browser = subprocess.Popen(
            ["bash", "-c", script, "bash", program, *flags, "about:blank"],
            pass_fds=(to_read, from_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self._seen, self._number, self._rest = [], 0, b""  # type: list[dict[str, Any]], int, bytes
        self.session = ""
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._browser.terminate()
        self._browser.wait(20)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, /, **params: Any) -> Any:
        """One command of the protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + 60
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self, deadline: float) -> Any:
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], max(0, deadline - time.monotonic()))[0], "the browser is silent"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def go(self, url: str) -> None:
        """Open a page."""
        failed = self.call("Page.navigate", url=url).get("errorText")
        assert not failed, failed

    def value(self, expression: str) -> Any:
        """What an expression is worth in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def type(self, text: str) -> None:
        """Press and release the keys of ``text``; a newline is Enter."""
        for letter in text:
            enter = letter == "\n"
            code = (
                "Enter" if enter else "Space" if letter == " " else "Slash" if letter == "/" else f"Key{letter.upper()}"
            )
            keys = {
                "key": "Enter" if enter else letter,
                "code": code,
                "windowsVirtualKeyCode": 13 if enter else ord(letter.upper()),
            }
            self.call("Input.dispatchKeyEvent", type="rawKeyDown", **keys)
            self.call("Input.dispatchKeyEvent", type="keyUp", **keys)
