#!/usr/bin/python3
"""Runs a command as the first process of namespaces of its own; nothing outlives it.

    enter.py [--share-network] COMMAND [ARGUMENT...]

Like ``unshare --mount --net --uts --ipc --pid --fork --kill-child``, which util-linux 2.38 cannot interrupt:
it blocks SIGTERM until the command has ended by itself. Here a signal ends the command at once, and with it,
by the kernel's own hand, every process, mount and network in the namespaces. SIGKILL of this program does the
same, through the parent-death signal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where vmctl is not installed yet
from vmctl.builder.own_mounts import CLONE_NEWNS, call, own_the_mounts

CLONE_NEWUTS, CLONE_NEWIPC = 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def fail(reason: str, hint: str) -> NoReturn:
    sys.exit(f"cannot enter namespaces: {reason}\nhint: {hint}")


def main(arguments: Sequence[str]) -> int:
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    command = list(arguments)
    if command[:1] == ["--share-network"]:
        flags &= ~CLONE_NEWNET
        command = command[1:]
    if not command:
        fail("no command given", "enter.py [--share-network] COMMAND [ARGUMENT...]")
    if os.geteuid() != 0:
        fail("only root can make them", f"sudo {' '.join(command)}")
    try:
        call("unshare", libc.unshare(flags))
        own_the_mounts()
    except OSError as error:
        fail(str(error.strerror), "run this as real root; in a container, --privileged")

    alive, parents_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parents_end)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.read(alive, 1)  # the parent's word, or the end of file if it died before prctl
        os.close(alive)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and children would inherit that
        try:
            os.execvp(command[0], command)
        except OSError as error:
            fail(f"{command[0]}: {error.strerror}", "name a program that can be run")
    os.close(alive)

    def end(number: int, _frame: object) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, end)
    # Ctrl-C reaches the whole foreground group: the command hears it too and ends in its own good order.
    signal.signal(signal.SIGINT, lambda *_: None)
    os.write(parents_end, b"1")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
