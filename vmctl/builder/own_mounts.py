"""A process's mounts made its own, so that nothing mounted from then on is seen by others or outlives it.

    own_mounts.py COMMAND [ARGUMENT...]     runs a command so

As ``unshare --mount`` does, which cannot do it in a chroot.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


def call(what: str, result: int) -> None:
    """Raise OSError for a C function that did not return 0."""
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def own_the_mounts() -> None:
    """Keep every mount made from here on out of the namespace that this one, just made, was copied from.

    Only the mount tree's own root can be made private with all below it, and only from there does libvirt find
    the guests' /dev again (it enters their namespaces by setns, which leads to that root). In a chroot it is out
    of sight. So leave the chroot by the same door, and put what it showed on top of that root. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    folder = Path.cwd()
    root, namespace = os.open("/", os.O_RDONLY), os.open("/proc/self/ns/mnt", os.O_RDONLY)
    call("entering the own mount namespace", libc.setns(namespace, CLONE_NEWNS))
    call("making the mounts private", libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    if not os.path.samestat(os.fstat(root), os.stat("/")):  # noqa: PTH116
        os.fchdir(root)
        call("binding the chroot over the root", libc.mount(b".", b"/", None, _MS_BIND | _MS_REC, None))
        call("entering the own mount namespace", libc.setns(namespace, CLONE_NEWNS))
    os.close(root)
    os.close(namespace)
    os.chdir(folder)


def main(command: list[str]) -> None:
    """Become the command, in a mount namespace of its own."""
    try:
        call("unshare", ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS))
        own_the_mounts()
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]} with mounts of its own: {error.strerror or error}")


if __name__ == "__main__":
    main(sys.argv[1:])
