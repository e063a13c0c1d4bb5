#!/usr/bin/python3
"""Runs commands side by side, each in a test host of its own; the first one's output as it comes, the others' after it.

    side_by_side.py COMMAND... -- COMMAND... [-- COMMAND...]

Ends with the first status that is not 0. Ended by a signal, even SIGKILL, it takes all of them with it.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import IO

PR_SET_PDEATHSIG = 1
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
libc = ctypes.CDLL(None, use_errno=True)


def split(words: Sequence[str]) -> list[list[str]]:
    """The commands between the dashes."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def tied() -> None:
    """In a new child: end when this program does, or when asked to."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


class AskedToEnd(BaseException):
    """A signal said so. Raised, not acted on in the handler: that may have cut into a wait, which holds a lock."""


def asked_to_end(number: int, _frame: FrameType | None) -> None:
    """The handler of those signals."""
    raise AskedToEnd(number)


def main(words: Sequence[str]) -> int:
    first, *others = split(words)
    logs = [tempfile.TemporaryFile() for _ in others]  # noqa: SIM115
    running: list[subprocess.Popen[bytes]] = []
    # Not heard while a child is made: one half made would be in no list of those to end.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    for number in ENDING:
        signal.signal(number, asked_to_end)
    signal.signal(signal.SIGINT, lambda *_: None)  # the whole foreground group hears it: they end in good order
    try:
        running.append(subprocess.Popen(first, preexec_fn=tied))
        for command, log in zip(others, logs, strict=True):
            running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=tied))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        return report(running, logs, others)
    except AskedToEnd as asked:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        return 128 + int(asked.args[0])


def report(
    running: Sequence[subprocess.Popen[bytes]], logs: Sequence[IO[bytes]], others: Sequence[Sequence[str]]
) -> int:
    """Wait for all and show what the others said; the first status that is not 0."""
    statuses = [running[0].wait()]
    for process, log, command in zip(running[1:], logs, others, strict=True):
        statuses.append(process.wait())
        sys.stdout.write(f"--- side by side with that: {' '.join(command[-4:])}\n")
        sys.stdout.flush()
        log.seek(0)
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
