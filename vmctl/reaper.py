"""Starts a daemon and stays to reap what it leaves behind, as pid 1 would of a machine that has a proper one.

libvirt's QEMU processes are pid 1's children, and libvirt waits for a killed one until it has been reaped: in a
container whose pid 1 is slow to do so, or never does, each `destroy` and each revert to a snapshot waits with it.
vmctl/bootstrap.sh runs this file by any python3 before there is an environment, so it imports nothing of vmctl's.

Usage: python3 reaper.py DAEMON ARGUMENT…   Ends as the daemon's first process does; the reaper ends with the last.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_CHILD_SUBREAPER = 36


def main(words: Sequence[str]) -> int:
    """Start ``words`` below a process of ours, and return the exit code."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        told = os.read(reading, 1)
        return told[0] if told else 1
    os.close(reading)
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    code = subprocess.run(words, check=False).returncode
    os.write(writing, bytes([code & 0xFF]))
    os.close(writing)
    _let_go()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)


def _let_go() -> None:
    """Hold nobody's terminal, files or folder."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nothing, handle)
    os.close(nothing)
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
