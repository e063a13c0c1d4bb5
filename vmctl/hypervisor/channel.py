"""A channel of a running domain's to a program in its guest, which answers each message with a line."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import libvirt

from vmctl.errors import WaitTimeout, quietly
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling, translated


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
        answers: queue.Queue[str | libvirt.libvirtError] = queue.Queue()
        began = time.monotonic()
        # A stream that waits for what comes has no deadline of its own.
        threading.Thread(target=self._ask, args=(data, answers), name="channel", daemon=True).start()
        try:
            answer = answers.get(timeout=deadline_s)
        except queue.Empty:
            raise WaitTimeout(
                f"cannot {self._what}: its guest does not answer", after_s=time.monotonic() - began
            ) from None
        if isinstance(answer, str):
            return answer
        raise translated(answer, self._what) from answer

    def _ask(self, data: bytes, answers: queue.Queue[str | libvirt.libvirtError]) -> None:
        try:
            while data:
                data = data[self._stream.send(data) :]
            line = b""
            while not line.endswith(b"\n") and (more := self._stream.recv(4096)):
                line += more
            answers.put(line.decode("utf-8", "replace").rstrip("\n"))
        except libvirt.libvirtError as error:
            answers.put(error)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        quietly(self._close)

    def _close(self) -> None:
        with calling(self._what):
            self._stream.abort()
