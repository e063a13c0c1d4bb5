"""What backups there are, and what killed ones left."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vmctl import backup_manifest, backup_marks, backup_store
from vmctl.backup_manifest import Manifest
from vmctl.backup_store import Shelf
from vmctl.errors import Conflict, NotFound, VmctlError, close_to
from vmctl.events import Reporter
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain


@dataclass(frozen=True, slots=True)
class Listed:
    """One backup in a list. ``problem``: why it cannot be used, "" where nothing shows."""

    vm: str
    id: str
    created: str
    kind: str
    consistency: str
    size: int
    disks: int
    needs: tuple[str, ...]
    problem: str = ""


def list_backups(root: Path, names: Collection[str]) -> tuple[Listed, ...]:
    """The backups in a folder, of all VMs or of those named, oldest first."""
    found = []
    for vm in backup_store.vms(root):
        if names and vm not in names:
            continue
        shelf = backup_store.shelf(backup_store.vm_folder(root, vm))
        seen: set[int] = set()
        for name in sorted([*shelf.points, *shelf.damaged]):
            if name in shelf.damaged:
                found.append(Listed(vm, name, "", "damaged", "", 0, 0, (), shelf.damaged[name]))
                continue
            one = shelf.points[name]
            size = backup_store.size(shelf.folder / name, seen)
            needs = {m.id for d in one.disks for m, _ in _chain_or_nothing(shelf, name, d.target)} - {name}
            missing = sorted(p for p in one.parents if p not in shelf.points)
            problem = f"backup {', '.join(missing)} is missing" if missing else backup_store.seen_wanting(shelf, one)
            words = (one.created, one.kind, one.consistency, size, len(one.disks), tuple(sorted(needs)), problem)
            found.append(Listed(vm, name, *words))
    if names and (absent := sorted(set(names) - {one.vm for one in found})):
        raise NotFound(
            f"cannot find backups of {', '.join(absent)} in {root}",
            meant=close_to(absent[0], backup_store.vms(root)),
            hint="--folder names another place",
        )
    return tuple(found)


def _chain_or_nothing(shelf: Shelf, name: str, target: str) -> list[tuple[Manifest, object]]:
    try:
        return list(backup_manifest.chain(shelf.points, name, target))
    except VmctlError:
        return []


def cut_off(host: Host, root: Path, report: Reporter, *, fix: bool) -> tuple[str, ...]:
    """What killed backups left on this host, in VMs and in ``root``; ``fix``: cleared away, but for what is at work."""
    found: list[str] = []
    for name in backup_store.vms(root):
        folder = backup_store.vm_folder(root, name)
        found += [f"{one} is half-made" for one in backup_store.half_made(folder)]
        if fix:
            backup_store.clear_half_made(folder)
    if not host.conn.local or not host.conn.qemu:
        return tuple(found)
    for name, _ in domain.identities(host.conn):
        vm = domain.find_or_none(host.conn, name)
        if vm is None or not (left := backup_marks.unsettled(host, vm)):
            continue
        try:
            with holding(host, name):
                left = backup_marks.unsettled(host, vm)
                if fix:
                    backup_marks.settle(host, vm, report)
        except Conflict:  # a backup under way: its checkpoint is there before it is
            continue
        found += left
    return tuple(found)
