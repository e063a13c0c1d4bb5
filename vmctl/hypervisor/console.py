"""The serial console of a domain over libvirt's stream, for a terminal or a script; and a domain that lives to talk."""

from __future__ import annotations

import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import libvirt

from vmctl.errors import Conflict, HypervisorError, Unsupported, WaitTimeout
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.wait import wait_until

_SEND_TIMEOUT_S = 10.0
_LISTEN_S = 0.05
_LEAVE_S = 2.0
_HEAR_OUT_S = 0.5


@contextmanager
def _opening(conn: Connection, name: str) -> Iterator[None]:
    try:
        with calling(f"open the console of VM {name}"):
            yield
    except HypervisorError as error:
        root = ET.fromstring(domain.xml(conn, name))
        if root.find("devices/console") is None and root.find("devices/serial") is None:
            raise Unsupported(
                f"cannot open the console of VM {name}: it has none", hint=f"its screen may do: vmctl view {name}"
            ) from error
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
        with _opening(conn, name):
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


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a domain said on its serial line, and whether it stopped by itself, or ran out of time.

    ``gone``: it had ended altogether, and with it went what it had said in its last moment.
    """

    said: bytes
    stopped: bool
    timed_out: bool
    gone: bool = False


def transcript(
    conn: Connection,
    xml: str,
    *,
    until: Callable[[bytes], bool],
    timeout_s: float,
    waited: Callable[[float | None], None] | None = None,
    goodbye: bytes = b"",
    paused: bool = True,
    doing: str = "run a probe",
) -> Transcript:
    """Run a transient domain and listen until it has said enough, stops, or the time is over; then it is gone.

    ``goodbye`` is typed when it has said enough, to a guest that then ends by itself, which is quicker than to end it.
    ``waited``, called before each ``until``, hears for how many seconds its first vCPU has waited for a CPU so far;
    None where the host does not tell. libvirt ends the domain too when the connection ends first. Needs no event loop:
    each question for the domain's state brings along what its console has printed. ``paused`` holds it until it is
    heard, which containers cannot. Raises what libvirt says when it cannot be started.
    """
    flags = libvirt.VIR_DOMAIN_START_AUTODESTROY | libvirt.VIR_DOMAIN_START_VALIDATE
    flags |= libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
    said = bytearray()
    with calling(doing):
        dom = conn.handle.createXML(xml, flags)
        try:
            stream = conn.handle.newStream(libvirt.VIR_STREAM_NONBLOCK)
            dom.openConsole(None, stream, 0)
            try:
                if paused:
                    dom.resume()  # not before somebody listens
                stopped = wait_until(
                    partial(_heard, dom, stream, said, _telling(conn, dom, waited, until)),
                    what="the probe",
                    timeout_s=timeout_s,
                    interval_s=_LISTEN_S,
                )
                if goodbye and stopped == "enough":
                    _take_leave(dom, stream, goodbye)
                if stopped == "stopped":
                    _hear_out(dom, stream, said)
            except WaitTimeout:
                return Transcript(bytes(said), stopped=False, timed_out=True)
            finally:
                with suppress(libvirt.libvirtError):
                    stream.abort()
            return Transcript(bytes(said), stopped != "enough", timed_out=False, gone=stopped == "gone")
        finally:
            with suppress(libvirt.libvirtError):
                dom.destroy()


def _take_leave(dom: Any, stream: Any, goodbye: bytes) -> None:
    with suppress(libvirt.libvirtError, WaitTimeout):
        stream.send(goodbye)
        wait_until(lambda: not dom.isActive(), what="its end", timeout_s=_LEAVE_S, interval_s=_LISTEN_S)


def _hear_out(dom: Any, stream: Any, said: bytearray) -> None:
    """Take what is still on the way from a domain that has stopped and is there yet."""
    with suppress(libvirt.libvirtError, WaitTimeout):
        wait_until(
            lambda: _heard(dom, stream, said, lambda _said: False) == "gone",
            what="its end",
            timeout_s=_HEAR_OUT_S,
            interval_s=_LISTEN_S,
        )


def _telling(
    conn: Connection, dom: Any, waited: Callable[[float | None], None] | None, until: Callable[[bytes], bool]
) -> Callable[[bytes], bool]:
    if waited is None:
        return until

    def look(said: bytes) -> bool:
        waited(_waited_s(conn, dom))
        return until(said)

    return look


def _waited_s(conn: Connection, dom: Any) -> float | None:
    try:
        ((_, stats),) = conn.handle.domainListGetStats([dom], libvirt.VIR_DOMAIN_STATS_VCPU)
    except (libvirt.libvirtError, ValueError):
        return None  # it has ended
    delay = stats.get("vcpu.0.delay")
    return None if delay is None else delay / 1e9


def _heard(dom: Any, stream: Any, said: bytearray, until: Callable[[bytes], bool]) -> str | None:
    """Take what has come: "enough", "stopped", "gone", or None for none of these yet."""
    try:
        state = dom.state()[0]
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        state = libvirt.VIR_DOMAIN_SHUTOFF
    with suppress(libvirt.libvirtError):  # the stream ends with the domain
        while isinstance(data := stream.recv(64 * 1024), bytes) and data:
            said += data
    if until(bytes(said)):
        return "enough"
    if state == libvirt.VIR_DOMAIN_RUNNING:
        return None
    return "gone" if state in {libvirt.VIR_DOMAIN_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF} else "stopped"
