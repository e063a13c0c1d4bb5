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

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


def fail(reason: str, hint: str) -> NoReturn:
    sys.exit(f"cannot enter namespaces: {reason}\nhint: {hint}")


def call(what: str, result: int) -> None:
    if result:
        fail(f"{what}: {os.strerror(ctypes.get_errno())}", "run this as real root; in a container, --privileged")


def own_the_mounts() -> None:
    """Keep every mount made from here on out of the namespace this one was copied from.

    Only the mount tree's own root can be made private with all below it, and only from there does libvirt find
    the guests' /dev again (it enters their namespaces by setns, which leads to that root). In a chroot it is out
    of sight. So leave the chroot by the same door, and put what it showed on top of that root.
    """
    folder = Path.cwd()
    root, namespace = os.open("/", os.O_RDONLY), os.open("/proc/self/ns/mnt", os.O_RDONLY)
    call("entering the own mount namespace", libc.setns(namespace, CLONE_NEWNS))
    call("making the mounts private", libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    if not os.path.samestat(os.fstat(root), os.stat("/")):  # noqa: PTH116
        os.fchdir(root)
        call("binding the chroot over the root", libc.mount(b".", b"/", None, MS_BIND | MS_REC, None))
        call("entering the own mount namespace", libc.setns(namespace, CLONE_NEWNS))
    os.close(root)
    os.close(namespace)
    os.chdir(folder)


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
    call("unshare", libc.unshare(flags))
    own_the_mounts()

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
