"""Lines of JSON to QEMU's monitor and the guest agent, and plain lines from the guest: sockets that leave no file."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from vmctl.errors import VmctlError, WaitTimeout


class Gone(VmctlError):
    """The other end is no more."""


class Declined(VmctlError):
    """The other end would not do it."""


def telling(word: str, port: str) -> str:
    """What a guest's shell does to say a word at a port and go on when it was heard: when it is answered by a line.

    One command in brackets and without a semicolon: fio puts a redirection behind, and takes a semicolon for a comment.
    """
    return f"(echo {word} >&0 && read -r heard) <>{port}"


class Lines:
    """Whole lines from one end of a socket pair; QEMU inherits the other."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.ours, self.theirs = socket.socketpair()
        self._held = b""

    def close(self) -> None:
        """Close what is open yet."""
        self.ours.close()
        self.theirs.close()

    def send(self, data: bytes) -> None:
        """Send all of it. Raises Gone."""
        try:
            self.ours.sendall(data)
        except OSError as error:
            raise Gone(f"cannot reach {self._what}: it is gone") from error

    def next(self, deadline: float) -> str:
        """The next line, waited for until that time of the monotonic clock. Raises WaitTimeout, Gone."""
        while b"\n" not in self._held:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.ours], [], [], left)[0]:
                raise WaitTimeout(f"cannot hear {self._what}", after_s=max(0.0, -left))
            try:
                data = self.ours.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                raise Gone(f"cannot hear {self._what}: it is gone")
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return line.decode(errors="replace").strip("\r\xff\ufffd ")


class Asker:
    """Questions and answers, one after the other, as QMP and the guest agent's protocol have them."""

    def __init__(self, what: str, timeout_s: float) -> None:
        self.lines = Lines(what)
        self._what, self._timeout_s = what, timeout_s

    def ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What the command returns. Raises Declined, Gone, WaitTimeout."""
        self.send(command, arguments)
        return self.answer(lambda message: "return" in message or "error" in message)

    def send(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Send a command without waiting for its answer."""
        words = {"execute": command, **({"arguments": dict(arguments)} if arguments else {})}
        self.lines.send(json.dumps(words).encode() + b"\n")

    def answer(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float | None = None) -> Any:
        """The first answer that is wanted; events and answers to nobody are passed over."""
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        while True:
            try:
                message = json.loads(self.lines.next(deadline))
            except ValueError:
                continue
            if not isinstance(message, dict) or not wanted(message):
                continue
            if "error" in message:
                raise Declined(f"cannot ask {self._what}: {message['error'].get('desc', message['error'])}")
            return message.get("return", message)
