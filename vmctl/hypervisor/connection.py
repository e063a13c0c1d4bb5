"""Opening and closing connections, and what a connection knows about its host."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import libvirt

from vmctl import unreached
from vmctl.errors import HostUnreachable, VmctlError
from vmctl.hypervisor.errors import calling, translated
from vmctl.hypervisor.waiting import Waiting

SYSTEM = "qemu:///system"
SESSION = "qemu:///session"
_WAKES_UP = 10_001_000
_OPEN_S = 30.0
_KEEPALIVE_S, _KEEPALIVE_COUNT = 5, 3


# libvirt prints each error to stderr unless told otherwise; vmctl reports them itself. It must be a function in C: one
# in Python is where an interrupt is raised that came while libvirt was at it, and SystemError is what comes of that.
libvirt.registerErrorHandler(operator.is_, None)


@dataclass(frozen=True, slots=True)
class Connection:
    """An open connection. ``handle`` is libvirt's and stays inside this room."""

    uri: str
    handle: Any
    way: str = ""
    _apart: dict[int, Connection] = field(default_factory=dict, compare=False, repr=False)

    def apart(self) -> Connection:
        """A connection of this thread's own to the same place, for what is asked beside a call that lasts.

        libvirt's client before 10.1 loses wake-ups: a call made while another thread's is under way on the connection
        may wait until that one ends (its commit "rpc: fix race in waking up client event loop").
        """
        if not self.qemu or libvirt.getVersion() >= _WAKES_UP:
            return self
        mine = threading.get_ident()
        if mine not in self._apart:
            self._apart[mine] = connect(self.uri, self.way)
        return self._apart[mine]

    def leave_apart(self) -> None:
        """Use this thread's own no more: a call on it was given up, which goes on in the daemon."""
        self._apart.pop(threading.get_ident(), None)

    @property
    def local(self) -> bool:
        """Whether the daemon is the one that serves this machine at its ordinary place."""
        parts = urlsplit(self.uri)
        return "+" not in parts.scheme and not parts.netloc and not parts.query

    @property
    def session(self) -> bool:
        """Whether guests run as the connecting user, without host networking. Root gets the system's daemon."""
        return urlsplit(self.uri).path.endswith("/session") and not (self.local and os.geteuid() == 0)

    @property
    def qemu(self) -> bool:
        """Whether real QEMU guests run there (not libvirt's test driver)."""
        return urlsplit(self.uri).scheme.split("+")[0] == "qemu"

    @property
    def host(self) -> str:
        """The host's name as users know it."""
        netloc = urlsplit(self.uri).hostname
        if netloc:
            return netloc
        return os.uname().nodename if self.qemu else str(self.handle.getHostname())

    def close(self) -> None:
        """Close it; closing twice, or after the daemon went away, is no error."""
        for one in self._apart.values():
            one.close()
        self._apart.clear()
        try:
            self.handle.close()
        except libvirt.libvirtError:
            return

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(uri: str, way: str = "") -> Connection:
    """Open ``uri``, or the same place by the URI ``way``. Raises HostUnreachable with what to do about it."""
    try:
        if urlsplit(uri).netloc:  # a daemon that is stopped takes calls and answers none
            handle = Waiting(lambda: libvirt.open(way or uri)).answer(_OPEN_S)
        else:
            handle = libvirt.open(way or uri)
    except libvirt.libvirtError as error:
        text = translated(error, f"connect to {uri}").message
        raise HostUnreachable(text, hint=_unreachable_hint(uri, text)) from error
    if handle is None:
        raise HostUnreachable(
            f"cannot connect to {uri}: no answer within {_OPEN_S:g} s", hint="vmctl host check says more"
        )
    return Connection(uri, handle, way)


def _unreachable_hint(uri: str, why: str) -> str:
    if uri == SYSTEM:
        if os.geteuid() != 0:
            return "is libvirtd running, and are you in group libvirt? without either, try -c qemu:///session"
        return "start libvirtd, or let `sh vmctl/bootstrap.sh` do it; `vmctl doctor` says more"
    if uri == SESSION:
        return "are libvirt-daemon and its QEMU driver installed?"
    ssh = "ssh" in urlsplit(uri).scheme
    return unreached.mend(why.partition(uri)[2], ssh=ssh) or "check the address, then `virsh -c URI version`"


def connect_default(fell_back: Callable[[str], None] = lambda _why: None) -> Connection:
    """qemu:///system if it answers to us, else qemu:///session, which needs no root; then ``fell_back`` hears why."""
    try:
        return connect(SYSTEM)
    except HostUnreachable as first:
        try:
            found = connect(SESSION)
        except VmctlError:
            raise first from None
        fell_back(first.message.partition(": ")[2])
        return found


class Versions(NamedTuple):
    """Version strings of libvirt (daemon) and the hypervisor it drives."""

    libvirt: str
    hypervisor: str


def _dotted(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def versions(conn: Connection) -> Versions:
    """What runs there."""
    with calling("ask for versions"):
        return Versions(_dotted(conn.handle.getLibVersion()), _dotted(conn.handle.getVersion()))


def keep_alive(conn: Connection) -> None:
    """Have a dead other side noticed within seconds. Needs libvirt's event loop."""
    with suppress(libvirt.libvirtError):
        conn.handle.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)


def is_alive(conn: Connection) -> bool:
    """Whether the daemon still answers."""
    try:
        return bool(conn.handle.isAlive())
    except libvirt.libvirtError:
        return False
