"""A client of NBD over a unix socket: reads an export, and asks which of its blocks are zero, allocated or dirty.

Source: the NBD project's doc/proto.md (fixed newstyle, structured replies, meta contexts). One connection serves one
thread; several make the server read ahead.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmctl.errors import VmctlError

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"

_OPTION, _OPTION_REPLY = 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _SIMPLE, _STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
_OPT_GO, _OPT_STRUCTURED, _OPT_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_CONTEXT = 1, 3, 4
_READ, _DISCONNECT, _BLOCK_STATUS = 0, 2, 7
_DONE, _DO_NOT_FRAGMENT = 1, 4
_DATA, _HOLE, _STATUS, _ERROR = 1, 2, 5, 1 << 15
_SENDS_DF = 1 << 7
_MOST_ASKED = 1 << 30
_LONGEST_REPLY = 64 << 20
ZERO = 2  # of base:allocation


class Broken(VmctlError):
    """The server went away, or said what it must not."""


@dataclass(frozen=True, slots=True)
class Span:
    """``length`` bytes from ``start`` on, of which the context says ``flags``."""

    start: int
    length: int
    flags: int


@dataclass(slots=True)
class _Reading:
    """A read that was asked for: where it goes, and how much has not come yet."""

    offset: int
    view: memoryview
    left: int


class Export:
    """A connection to one export of the server at a unix socket. ``contexts``: what may be asked of its blocks."""

    def __init__(self, path: Path, name: str, contexts: Sequence[str] = ()) -> None:
        self._name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._contexts: dict[int, str] = {}
        self._handle = 0
        self._reading: dict[int, _Reading] = {}
        try:
            self._socket.connect(str(path))
            self._greet(contexts)
        except OSError as error:
            self._socket.close()
            raise Broken(f"cannot read disk {name}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise
        missing = set(contexts) - set(self._contexts.values())
        if missing:
            self.close()
            raise Broken(f"cannot read disk {name}: its server does not tell {', '.join(sorted(missing))}")

    def close(self) -> None:
        """End it; from another thread too, which makes a read that waits fail."""
        with suppress(OSError):  # it was closed from the other end
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Export:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                got = self._socket.recv_into(view, len(view), socket.MSG_WAITALL)
            except OSError as error:
                raise Broken(f"cannot read disk {self._name}: {error.strerror}") from error
            if not got:
                raise Broken(f"cannot read disk {self._name}: who served it has gone away")
            view = view[got:]

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Broken(f"cannot read disk {self._name}: {error.strerror}") from error

    def _option(self, number: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Ask for an option; the replies before its acknowledgement."""
        self._send(struct.pack(">QII", _OPTION, number, len(data)) + data)
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._take(20))
            if magic != _OPTION_REPLY or length > _LONGEST_REPLY:
                raise Broken(f"cannot read disk {self._name}: its server speaks no NBD")
            said = self._take(length)
            if kind == _REP_ACK:
                return
            if kind >> 31:
                raise Broken(f"cannot read disk {self._name}: {said.decode(errors='replace') or 'it is refused'}")
            yield kind, said

    def _greet(self, contexts: Sequence[str]) -> None:
        first, second, flags = struct.unpack(">8sQH", self._take(18))
        if first != b"NBDMAGIC" or second != _OPTION:
            raise Broken(f"cannot read disk {self._name}: its server speaks no NBD")
        self._send(struct.pack(">I", flags & 3))
        name = self._name.encode()
        list(self._option(_OPT_STRUCTURED, b""))
        if contexts:
            asked = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts))
            asked += b"".join(struct.pack(">I", len(one)) + one.encode() for one in contexts)
            for kind, said in self._option(_OPT_CONTEXT, asked):
                if kind == _REP_CONTEXT:
                    self._contexts[int.from_bytes(said[:4], "big")] = said[4:].decode()
        self.size, self._flags = 0, 0
        for kind, said in self._option(_OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0"):
            if kind == _REP_INFO and said[:2] == b"\0\0":
                self.size, self._flags = struct.unpack(">QH", said[2:12])

    def _ask(self, command: int, offset: int, length: int, flags: int = 0) -> None:
        self._handle += 1
        self._send(struct.pack(">IHHQQI", _REQUEST, flags, command, self._handle, offset, length))

    def _piece(self) -> tuple[int, int, int, bool]:
        """The head of a piece of an answer: what it answers, its kind, its length, and whether it is the last one."""
        (magic,) = struct.unpack(">I", self._take(4))
        if magic != _STRUCTURED:
            raise Broken(f"cannot read disk {self._name}: its server answers in another form")
        flags, kind, handle, length = struct.unpack(">HHQI", self._take(16))
        if length > _LONGEST_REPLY:
            raise self._odd()
        if kind & _ERROR:
            number = int.from_bytes(self._take(length)[:4], "big")
            raise Broken(f"cannot read disk {self._name}: {os.strerror(number)}")
        return handle, kind, length, bool(flags & _DONE)

    def _odd(self) -> Broken:
        return Broken(f"cannot read disk {self._name}: its server answers what was not asked")

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what is at ``offset``."""
        self.finish(self.start(offset, view))

    def start(self, offset: int, view: memoryview) -> int:
        """Ask for what is at ``offset``; ``view`` holds it once the number returned is given to ``finish``."""
        self._ask(_READ, offset, len(view), _DO_NOT_FRAGMENT if self._flags & _SENDS_DF else 0)
        self._reading[self._handle] = _Reading(offset, view, len(view))
        return self._handle

    def finish(self, number: int) -> None:
        """Wait for what was asked for. Answers come in any order."""
        while number in self._reading:
            handle, kind, length, last = self._piece()
            reading = self._reading.get(handle)
            if reading is None:
                raise self._odd()
            self._receive(reading, kind, length)
            if last:
                del self._reading[handle]
                if reading.left:
                    raise Broken(f"cannot read disk {self._name}: the answer is cut short")

    def _receive(self, reading: _Reading, kind: int, length: int) -> None:
        if kind not in {_DATA, _HOLE}:
            if length:
                raise self._odd()
            return
        at = int.from_bytes(self._take(8), "big") - reading.offset
        count = length - 8 if kind == _DATA else int.from_bytes(self._take(4), "big")
        if at < 0 or at + count > len(reading.view):
            raise self._odd()
        if kind == _DATA:
            self._fill(reading.view[at : at + count])
        else:
            reading.view[at : at + count] = bytes(count)
        reading.left -= count

    def status(self, context: str) -> Iterator[Span]:
        """What ``context`` says of all blocks, in order."""
        (number,) = [key for key, name in self._contexts.items() if name == context]
        at = 0
        while at < self.size:
            self._ask(_BLOCK_STATUS, at, min(_MOST_ASKED, self.size - at))
            found: list[tuple[int, int]] = []
            last = False
            while not last:
                handle, kind, length, last = self._piece()
                data = self._take(length)
                if handle != self._handle:
                    raise self._odd()
                if kind == _STATUS and int.from_bytes(data[:4], "big") == number:
                    found = list(struct.iter_unpack(">II", data[4:]))
            if not found:
                raise Broken(f"cannot read disk {self._name}: its server does not tell {context}")
            for length, flags in found:
                length = min(length, self.size - at)
                yield Span(at, length, flags)
                at += length
