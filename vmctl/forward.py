"""Ports of this machine that lead to ports of a guest, through its SSH server."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from vmctl import guest
from vmctl.errors import Conflict, HostUnreachable, SpecError, VmctlError, reason
from vmctl.events import Reporter, Warned
from vmctl.hosts import Host
from vmctl.ssh import Stream, Tunnel, tunnel
from vmctl.wait import pause

_SPEC = r"(?:(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<four>[0-9.]+)):)?(?P<here>\d{1,5}):(?P<there>\d{1,5})"
_CHUNK = 64 * 1024
_LOOK_S = 0.3
# Closing with nothing lingering sends a reset: the nearest to a refusal for one whose connection was accepted.
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Forward:
    """From ``port`` (0: a free one) at address ``bind`` to ``guest_port`` of the guest's own loopback."""

    bind: str
    port: int
    guest_port: int

    def __str__(self) -> str:
        """As it is told."""
        bind = f"[{self.bind}]" if ":" in self.bind else self.bind
        return f"{bind}:{self.port} -> {self.guest_port}"


def parse(text: str) -> Forward:
    """``8080:80``, ``127.0.0.1:8443:443`` or ``[::1]:8080:80``. Raises SpecError."""
    match = re.fullmatch(_SPEC, text, re.ASCII)
    try:
        if match is None:
            raise ValueError("it is not [ADDRESS:]PORT:GUESTPORT")
        bind = str(ipaddress.ip_address(match["six"] or match["four"] or "127.0.0.1"))
        here, there = int(match["here"]), int(match["there"])
        if here > 65535 or not 1 <= there <= 65535:
            raise ValueError("a port is beyond 65535, or the guest's is 0")
    except ValueError as error:
        raise SpecError(f"cannot forward {text!r}: {error}", hint="for example 8080:80") from error
    return Forward(bind, here, there)


def _listen(wanted: Forward) -> socket.socket:
    family = socket.AF_INET6 if ":" in wanted.bind else socket.AF_INET
    try:
        return socket.create_server((wanted.bind, wanted.port), family=family, backlog=64)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "the port is taken",
            errno.EACCES: "ports below 1024 are root's",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }
        why = reasons.get(error.errno or 0, reason(error))
        hint = "0 as the port takes a free one" if error.errno != errno.EADDRNOTAVAIL else ""
        raise Conflict(f"cannot forward {wanted}: {why}", hint=hint) from error


class Forwarding:
    """All forwards of one run, over one SSH connection. ``served`` has real ports where 0 was asked for."""

    def __init__(self, name: str, through: Tunnel, report: Reporter) -> None:
        self._name, self._through, self._report = name, through, report
        self.served: list[Forward] = []

    def hold(self) -> NoReturn:
        """Wait for the end of the SSH connection, and raise HostUnreachable then."""
        while self._through.alive:
            pause(_LOOK_S)
        raise HostUnreachable(f"cannot go on forwarding to VM {self._name}: its SSH server is gone")

    def serve(self, listener: socket.socket, wanted: Forward) -> None:
        """Accept until the listener is closed."""
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(sock, wanted), daemon=True).start()

    def _one(self, sock: socket.socket, wanted: Forward) -> None:
        with sock:
            try:
                stream = self._through.open(wanted.guest_port)
            except VmctlError as error:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self._report(Warned(error.message))
                return
            with stream:
                back = threading.Thread(target=_to_client, args=(stream, sock), daemon=True)
                back.start()
                _to_guest(sock, stream)
                back.join()


def _to_guest(sock: socket.socket, stream: Stream) -> None:
    """What the client sends, until it has sent all; its end is passed on and the answer can still come."""
    try:
        while data := sock.recv(_CHUNK):
            stream.sendall(data)
        stream.shutdown_write()
    except OSError:
        stream.close()  # the client is gone: nobody reads an answer


def _to_client(stream: Stream, sock: socket.socket) -> None:
    """What the guest sends, until it has sent all."""
    try:
        while data := stream.recv(_CHUNK):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR if stream.ended_well else socket.SHUT_RDWR)
    except OSError:
        stream.close()


@contextmanager
def forwarding(
    host: Host, name: str, wanted: Sequence[Forward], report: Reporter, *, user: str | None = None
) -> Iterator[Forwarding]:
    """Forward inside the block.

    Raises Conflict for a port that is not to be had, HostUnreachable when the guest does not let us in.
    """
    where = guest.reachable(host, name, user=user, report=report)
    with ExitStack() as stack:
        listeners = [stack.enter_context(_listen(one)) for one in wanted]
        through = stack.enter_context(tunnel(where, guest.Vigil(host, name)))
        work = Forwarding(name, through, report)
        for listener, one in zip(listeners, wanted, strict=True):
            served = replace(one, port=listener.getsockname()[1])
            work.served.append(served)
            if not ipaddress.ip_address(one.bind).is_loopback:
                report(Warned(f"{served} is open to whoever reaches {one.bind}"))
            threading.Thread(target=work.serve, args=(listener, served), daemon=True).start()
        try:
            yield work
        finally:
            for listener in listeners:
                listener.close()
