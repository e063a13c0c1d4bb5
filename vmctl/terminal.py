"""The user's terminal, raw while a guest has it, and its connection to a guest's console."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmctl import guest
from vmctl.errors import VmctlError
from vmctl.events import Reporter
from vmctl.hosts import Host
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.console import Console

LEAVE = b"\x1d"  # Ctrl-]
_TURN_S = 0.1
_SILENCE_S = 2.0
_SSH_FAILED = 255


@contextmanager
def raw_if(wanted: bool) -> Iterator[None]:
    """Hand keys through untouched inside the block, when ``wanted`` and stdin is a terminal."""
    if not wanted or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def size() -> tuple[str, int, int]:
    """Kind, columns and rows of this terminal."""
    columns, rows = shutil.get_terminal_size()
    return os.environ.get("TERM", "vt100"), columns, rows


def stdin_or_none() -> int | None:
    """The descriptor of our input; None when there is none."""
    try:
        os.fstat(0)
    except OSError:
        return None
    return 0


def writer(descriptor: int) -> Callable[[bytes], None]:
    """A function that writes all of its bytes to ``descriptor``, without a buffer of Python's between."""

    def write(data: bytes) -> None:
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BrokenPipeError:
                raise
            except OSError as error:
                raise VmctlError(f"cannot write the output: {error.strerror}") from error

    return write


def login(host: Host, name: str, words: list[str], *, user: str | None, report: Reporter) -> int:
    """Give the terminal to OpenSSH's client, in a shell of the guest or for one command; returns its exit code.

    Raises the reason when it ends because the guest does, panics, or no longer answers.
    """
    argv = guest.openssh_argv(host, name, words, user=user, report=report)
    # A Ctrl-C is the client's: it reaches the whole foreground group. A handler, unlike ignoring, is not inherited.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        process = subprocess.Popen(argv)
    except FileNotFoundError as error:
        raise VmctlError("cannot start ssh: it is not installed", hint="install openssh-client") from error
    try:
        with guest.watched(host, name, process) as failures:
            code = _waited(process)
    finally:
        signal.signal(signal.SIGINT, before)
        if process.poll() is None:
            process.terminate()
            process.wait()
    if failures:
        raise failures[0]
    if code == _SSH_FAILED and (why := guest.missing(host, name)):
        raise guest.unanswered(host, name, why)
    return code if code >= 0 else 128 - code


def _waited(process: subprocess.Popen[bytes]) -> int:
    """Its end; where it stops itself (~^Z), we stop with it, so that the shell takes over."""
    while True:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
        except ChildProcessError:  # who watches it saw the end first
            return process.wait()
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode
        os.kill(os.getpid(), signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)


def attach(conn: Connection, name: str, *, force: bool) -> None:
    """Connect our terminal to the console of ``name`` until Ctrl-], or the guest's end.

    Input that is no terminal (a file, a pipe) ends it too, once the guest has been silent for a moment after it.
    """
    with Console(conn, name, writer(1), force=force) as console, raw_if(True):
        ended_input = False
        while not console.ended.is_set():
            if ended_input:
                if not sys.stdin.isatty() and console.silent_s() > _SILENCE_S:
                    return
                console.ended.wait(_TURN_S)
                continue
            if not select.select([0], [], [], _TURN_S)[0]:
                continue
            data = os.read(0, 4096)
            before, leave, _ = data.partition(LEAVE)
            if before:
                console.send(before)
            if leave:
                return
            ended_input = not data
