"""Two running VMs never write one disk, and none writes what another reads: our own check, whatever the disk is on.

QEMU locks local files itself and virtlockd leases them where it is set up; neither knows of a disk on a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict
from vmctl.hosts import Host
from vmctl.hypervisor import disks
from vmctl.locks import held

_CLAIM_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Use:
    """A VM's use of a disk. ``key`` is equal for two names of the same content."""

    vm: str
    key: str
    name: str
    writes: bool
    shared: bool = False


def key(source: str, *, local: bool) -> str:
    """What tells whether two sources are the same: for a file here its inode, which links and mounts do not change."""
    if local and source.startswith("/"):
        try:
            found = Path(source).stat()
        except OSError:
            return os.path.realpath(source)
        return f"inode {found.st_dev}:{found.st_ino}"
    return source


def uses(vm: str, found: Iterable[DiskDevice], *, local: bool, paths: Mapping[str, str] | None = None) -> list[Use]:
    """What a VM's disks use: their sources, and read only, what is below them. ``paths``: files of POOL/VOLUME."""
    made = []
    for disk in found:
        for position, source in enumerate((disk.source, *disk.backing)):
            if source:
                where = (paths or {}).get(source, source)
                writes = position == 0 and not disk.readonly
                made.append(Use(vm, key(where, local=local), source, writes, disk.shareable and position == 0))
    return made


def conflicts(mine: Iterable[Use], others: Iterable[Use]) -> list[str]:
    """Why ``mine`` cannot be used beside what others use now; empty when they can. Pure."""
    by_key: dict[str, list[Use]] = {}
    for other in others:
        by_key.setdefault(other.key, []).append(other)
    found = []
    for use in mine:
        for other in by_key.get(use.key, ()):
            if other.vm == use.vm or not (use.writes or other.writes) or (use.shared and other.shared):
                continue
            how = "writes" if other.writes else "reads"
            found.append(f"{use.name} is in use: running VM {other.vm} {how} it")
    return list(dict.fromkeys(found))


def running_uses(host: Host) -> list[Use]:
    """What the VMs that run now use."""
    found = []
    for vm, _, devices in disks.all_disks(host.conn, active_only=True):
        found += uses(vm, devices, local=host.conn.local)
    return found


class Watch:
    """Sees whether a file was in use since: what was made of its content may lack what a guest wrote."""

    def __init__(self, host: Host, path: str) -> None:
        self._host, self._path, self._was = host, path, _stamp(path)

    def require_idle(self, doing: str) -> None:
        """Raise Conflict if it is written to, or was. vmctl starts no VM meanwhile; virsh and autostart do."""
        mine = [Use("", key(self._path, local=True), self._path, writes=True)]
        found = conflicts(mine, running_uses(self._host))
        if not found and _stamp(self._path) != self._was:
            found = [f"{self._path} was written to meanwhile"]
        if found:
            raise Conflict(f"cannot {doing}: {'; '.join(found)}", hint="the disk is as it was; once it is idle, again")


def _stamp(path: str) -> tuple[int, int, int]:
    info = Path(path).stat()
    return info.st_ino, info.st_size, info.st_mtime_ns


def _held(host: Host, disk: str) -> AbstractContextManager[None]:
    return held(host.folders.runtime, f"disk {disk} on {host.lock_scope}", timeout_s=_CLAIM_TIMEOUT_S)


def unclaimed(host: Host, path: str) -> AbstractContextManager[None]:
    """A block in which no other vmctl gives a disk that no VM has to one, nor removes it."""
    return _held(host, key(path, local=host.conn.local))


@contextmanager
def claimed(host: Host, vm: str, devices: Iterable[DiskDevice], doing: str) -> Iterator[None]:
    """Within the block no other vmctl makes a VM use these disks, and none does. Raises Conflict with all there are.

    The block is where the VM gets them: starts, or has one plugged in.
    """
    mine = uses(vm, devices, local=host.conn.local)
    with ExitStack() as locks:
        for one in sorted({use.key for use in mine if use.writes}):
            locks.enter_context(_held(host, one))
        if mine and (found := conflicts(mine, running_uses(host))):
            raise Conflict(
                f"cannot {doing}: {'; '.join(found)}", hint="stop that VM, or give this one a copy of the disk"
            )
        yield
