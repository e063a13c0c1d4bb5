"""A look into any folder of a host, by a pool that is there as long as a vmctl of this user looks into it.

And whether two hosts see one folder, which is proved by a token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vmctl import render
from vmctl.errors import NotFound, quietly
from vmctl.hosts import Host
from vmctl.hypervisor import folders, storage
from vmctl.locks import shared

_OF_ONE_MACHINE = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "tmpfs", "overlay"}
)
_MANY_ROOTS = frozenset({"btrfs", "zfs"})  # whose parts are mounted by themselves
_BUSY_S = 60.0  # another one is just taking the pool away


@contextmanager
def shown(host: Host, folder: str) -> Iterator[str]:
    """The name of a pool that shows a folder: the one that is there, else one for the time of the block.

    Several may look at once, also from other processes: the last takes the pool away, and one that a killed process
    left, too. Raises NotFound where there is no such folder.
    """
    with shared(host.folders.runtime, f"folder {folder} on {host.lock_scope}", timeout_s=_BUSY_S) as is_last:
        name = folders.pool_of(host.conn, folder)
        name = name or folders.show(host.conn, folder, lambda name: render.pool(name, folder))
        try:
            yield name
        finally:
            if name.startswith(folders.PASSING) and is_last():
                folders.hide(host.conn, name)


class Folder(NamedTuple):
    """A folder as the target has it. ``shared``: it is the source's; ``space``: bytes left, None: there is none."""

    shared: bool = False
    names: frozenset[str] = frozenset()
    space: int | None = None


def shared_folders(source: Host, target: Host, paths: Iterable[str]) -> frozenset[str]:
    """Those of the folders that both hosts see: a file with a random content made on one is read on the other."""
    return frozenset(path for path, one in compared(source, target, paths).items() if one.shared)


def compared(source: Host, target: Host, paths: Iterable[str]) -> dict[str, Folder]:
    """Each of the folders as the target has it, and whether it is the source's."""
    return {path: _folder(source, target, path) for path in dict.fromkeys(paths)}


def _folder(source: Host, target: Host, path: str) -> Folder:
    try:
        with shown(target, path) as there:
            return _look(source, target, path, there)
    except NotFound:
        return Folder()  # it is made later, on a file system that is not known yet


def _look(source: Host, target: Host, path: str, there: str) -> Folder:
    """Look into a folder, which the pool ``there`` shows on the target, while the source has a token in its own."""
    token, name = secrets.token_hex(16).encode(), f"vmctl-token-{secrets.token_hex(8)}"
    text = render.volume(render.VolumeView(name, len(token), "raw", mode="0600"))
    try:
        with shown(source, path) as here, storage.passing(source.conn, here, text, name, token):
            names, space = storage.listing(target.conn, there)
            both = name in names and storage.download(target.conn, there, name) == token
    except NotFound:  # the source has none such, or the token went early
        names, space = storage.listing(target.conn, there)
        return Folder(names=names, space=space.available)
    if both:
        quietly(lambda: storage.refresh(target.conn, there))  # the token is no more
    return Folder(both, names - {name}, space.available)


def ours_alone(folder: str) -> bool:
    """Whether a folder of this machine, by its real path, is surely seen by no other.

    Not when a VM on its storage went to a host that sees it, whatever else is known.
    """
    if any(Path(folder).glob("*.moved")):
        return False
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return False
    exports = ""
    with suppress(OSError):
        exports = Path("/var/lib/nfs/etab").read_text()
    return of_one_machine(mounts, exports, folder)


def of_one_machine(mounts: str, exports: str, folder: str) -> bool:
    """Whether a folder lies on a file system of one machine, whole, and is not given to others by NFS. Pure.

    ``mounts``: /proc/self/mountinfo (proc_pid_mountinfo(5)); ``exports``: what exportfs(8) keeps of those in effect. A
    part of a file system that is mounted by itself has another place, which others may see: so have containers.
    """
    place, root, kind = "", "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        words = left.split()
        if len(words) > 4 and right and len(at := _unescaped(words[4])) >= len(place) and _within(folder, at):
            place, root, kind = at, words[3], right.split()[0]
    whole = root == "/" or kind in _MANY_ROOTS
    given = (_unescaped(line.split()[0]) for line in exports.splitlines() if line.strip())
    return kind in _OF_ONE_MACHINE and whole and not any(_within(folder, one) or _within(one, folder) for one in given)


def _within(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
