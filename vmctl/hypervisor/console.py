"""The serial console of a domain over libvirt's stream, for a terminal or a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import libvirt

from vmctl.errors import Conflict, HypervisorError
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.wait import wait_until

_SEND_TIMEOUT_S = 10.0


@contextmanager
def _opening(name: str) -> Iterator[None]:
    try:
        with calling(f"open the console of VM {name}"):
            yield
    except HypervisorError as error:
        if "Active console session" not in error.message:  # libvirt has no code for it
            raise
        raise Conflict(
            f"cannot open the console of VM {name}: someone else has it open", hint="add --force to take it over"
        ) from error


class Console:
    """An open console. ``ended`` is set when the other side is gone. Use as a context manager."""

    def __init__(self, conn: Connection, name: str, received: Callable[[bytes], None], *, force: bool = False) -> None:
        """Open it; ``received`` is called, in libvirt's event thread, with what the guest prints.

        The connection must have been opened after events.start_loop(). ``force`` takes the console over from
        whoever has it; otherwise that is a Conflict.
        """
        self.ended = threading.Event()
        self._heard = time.monotonic()
        self._received = received
        self._stream: Any = None
        flags = libvirt.VIR_DOMAIN_CONSOLE_FORCE if force else libvirt.VIR_DOMAIN_CONSOLE_SAFE
        with _opening(name):
            stream = conn.handle.newStream(libvirt.VIR_STREAM_NONBLOCK)
            conn.handle.lookupByName(name).openConsole(None, stream, flags)
            interest = (
                libvirt.VIR_STREAM_EVENT_READABLE | libvirt.VIR_STREAM_EVENT_HANGUP | libvirt.VIR_STREAM_EVENT_ERROR
            )
            stream.eventAddCallback(interest, self._ready, None)
        self._stream = stream

    def _ready(self, stream: Any, events: int, _opaque: Any) -> None:
        try:
            if events & libvirt.VIR_STREAM_EVENT_READABLE:
                data = stream.recv(64 * 1024)
                if data == -2:  # nothing there after all
                    return
                if data:
                    self._heard = time.monotonic()
                    self._received(data)
                    return
        except libvirt.libvirtError:
            pass  # the guest is gone: the same as a hang-up
        self._close()

    def silent_s(self) -> float:
        """For how long the guest has said nothing, in seconds."""
        return time.monotonic() - self._heard

    def send(self, data: bytes) -> None:
        """Type ``data``. Waits, bounded, while the guest does not read."""
        while data and not self.ended.is_set():
            sent = wait_until(
                partial(self._try_send, data),
                what="the guest reading its console",
                timeout_s=_SEND_TIMEOUT_S,
                interval_s=0.01,
            )
            data = data[sent:]

    def _try_send(self, data: bytes) -> int | None:
        try:
            sent = int(self._stream.send(data))
        except libvirt.libvirtError:
            self.ended.set()
            return len(data)
        return sent if sent > 0 else None

    def _close(self) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        try:
            self._stream.eventRemoveCallback()
            self._stream.abort()
        except libvirt.libvirtError:
            return  # it was gone already

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
