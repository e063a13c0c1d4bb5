"""A saved memory, read by several VMs through pipes, each behind a head of its own; also while it is still written.

Pages of zeros are left out: who reads has them (ram_stream.py).
Who restores it starts its QEMU meanwhile. The last bytes are held back until the file is whole: until then the VM that
was saved still writes to its disks, and no other may begin to use them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmctl import domain_xml, saved_memory
from vmctl.errors import VmctlError
from vmctl.ram_stream import RamStream
from vmctl.saved_memory import Head
from vmctl.wait import wait_until

_PIPE = 1 << 20
_CHUNK = 8 << 20
_HELD_BACK = 4096
_NO_STREAM = bytes(8)  # QEMU 7.2 waits for ever for the first byte of a pipe that is closed; this one it refuses
_LOOK_S = 0.005
_READER_S = 60.0
_BEGIN_S = 60.0
_KSM = Path("/sys/kernel/mm/ksm/run")


def adapted(xml: str) -> str:
    """The XML of a domain that is to read its memory, so that it holds no more of it than is in use.

    As it is where KSM runs, which finds what is equal only in memory that is no file's.
    """
    try:
        merging = _KSM.read_text().strip() == "1"
    except OSError:
        merging = False
    return xml if merging else domain_xml.with_small_pages(xml)


class SavedMemory:
    """The memory in a file. ``whole``: it is written to its end; else ``end`` is to be called, whatever happens."""

    def __init__(self, path: Path, *, whole: bool = True) -> None:
        self.path = path
        self._over = threading.Event()
        self._good = whole
        self._reading = threading.Lock()
        self._stream, self._needed = (
            RamStream(),
            list[tuple[int, int]](),
        )  # read once, for all pipes; from its first byte
        if whole:
            self._over.set()

    def end(self, *, good: bool) -> None:
        """It is written, or will not be: then who reads it finds it cut off."""
        self._good = good
        self._over.set()

    def wait(self) -> None:
        """Until it is written."""
        self._over.wait()

    def head(self) -> Head:
        """Its head, as soon as that is there. Raises Unsupported for what is not known, VmctlError where none comes."""
        return wait_until(self._head, what="head of the saved memory", timeout_s=_BEGIN_S, interval_s=_LOOK_S)

    def _head(self) -> Head | None:
        over = self._over.is_set()
        try:
            with self.path.open("rb") as file:
                header = file.read(saved_memory.HEADER)
                if over and self._good:
                    rest = file.read(saved_memory.length(header) - len(header) + 4)
                    return saved_memory.parse(header + rest)
                if over:
                    raise VmctlError("cannot use the saved memory: it was not written to its end")
                if len(header) < saved_memory.HEADER:
                    return None
                length = saved_memory.length(header, partial=True)
                data = header + file.read(length - len(header) + 4)
        except FileNotFoundError:
            if over:
                raise VmctlError("cannot use the saved memory: it was not written") from None
            return None
        return saved_memory.parse(data, partial=True) if len(data) == length + 4 else None

    @contextmanager
    def piped(self, start: int, head: bytes, folder: Path | None = None) -> Iterator[Path]:
        """A pipe from which ``head`` can be read, and behind it the file from ``start`` on. Who reads it may die.

        It is in ``folder``, or beside the file.
        """
        pipe = (folder or self.path.parent) / f"{secrets.token_hex(8)}.pipe"
        os.mkfifo(pipe, 0o600)
        left = threading.Event()

        def opened() -> int | None:
            if left.is_set():
                return -1
            with suppress(OSError):  # nobody reads yet
                return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return None

        def feed() -> None:
            out = wait_until(opened, what="reader of the memory", timeout_s=_READER_S, interval_s=_LOOK_S)
            if out < 0:
                return
            try:
                os.set_blocking(out, True)
                with suppress(OSError):
                    fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, _PIPE)
                with suppress(BrokenPipeError):
                    self._pour(start, head, out)
            finally:
                os.close(out)

        threading.Thread(target=feed, name="memory", daemon=True).start()
        try:
            yield pipe
        finally:
            left.set()
            pipe.unlink()

    def _pour(self, start: int, head: bytes, out: int) -> None:
        view = memoryview(head)
        while view:
            view = view[os.write(out, view) :]
        try:
            whole = self._pour_stream(start, out)
        except FileNotFoundError:  # libvirt removes what it could not write to its end
            whole = False
        if not whole:
            os.write(out, _NO_STREAM)

    def _pour_stream(self, start: int, out: int) -> bool:
        told = 0
        with self.path.open("rb") as file:
            while True:
                over = self._over.is_set()  # before the size is looked at
                if over and not self._good:
                    return False
                end = os.fstat(file.fileno()).st_size - (0 if over else _HELD_BACK)
                more = self._read_on(file.fileno(), start, end, last=over)
                while told < len(self._needed):
                    begin, upto = self._needed[told]
                    told += 1
                    while begin < upto:
                        begin += os.sendfile(out, file.fileno(), start + begin, min(_CHUNK, upto - begin))
                if over and not more:
                    return True
                if not more:
                    self._over.wait(_LOOK_S)

    def _read_on(self, file: int, start: int, end: int, *, last: bool) -> bool:
        """Look at the next piece of the stream, which begins at ``start`` of the file; whether there was one."""
        with self._reading:
            at = start + self._stream.at
            data = os.pread(file, min(_CHUNK, end - at), at) if at < end else b""
            before = self._stream.at
            self._needed += self._stream.read(data, last=last and at + len(data) >= end)
            return self._stream.at > before
