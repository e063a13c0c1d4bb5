"""A channel of a running domain's to a program in its guest, which answers each message with a line."""

from __future__ import annotations

import time
from typing import Any

import libvirt

from vmctl.errors import WaitTimeout, quietly
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.hypervisor.waiting import Waiting


def connected(text: str, channel: str) -> bool:
    """Whether, by a running domain's XML, a program in the guest has the channel open."""
    return f"name='{channel}' state='connected'" in text


class Channel:
    """An open channel. Use as a context manager. Nobody else can have it open meanwhile."""

    def __init__(self, conn: Connection, name: str, channel: str, doing: str) -> None:
        """Open it. ``doing`` ("renew the identity of") and the VM's name make the errors' text."""
        self._what = f"{doing} VM {name}"
        with calling(self._what):
            self._stream: Any = conn.handle.newStream()
            domain.handle(conn, name).openChannel(channel, self._stream, libvirt.VIR_DOMAIN_CHANNEL_FORCE)

    def ask(self, data: bytes, *, deadline_s: float) -> str:
        """The line that answers ``data``. Raises WaitTimeout when none comes in time."""
        began = time.monotonic()
        with calling(self._what):
            answer = Waiting(lambda: self._ask(data)).answer(deadline_s)
        if answer is None:
            raise WaitTimeout(f"cannot {self._what}: its guest does not answer", after_s=time.monotonic() - began)
        return answer

    def _ask(self, data: bytes) -> str:
        while data:
            data = data[self._stream.send(data) :]
        line = b""
        while not line.endswith(b"\n") and (more := self._stream.recv(4096)):
            line += more
        return line.decode("utf-8", "replace").rstrip("\n")

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        quietly(self._close)

    def _close(self) -> None:
        with calling(self._what):
            self._stream.abort()
