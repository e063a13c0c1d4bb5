"""Snapshots listed, shown and drawn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from vmctl import (
    domain_files,
    snapshot_plan,
)
from vmctl.errors import NotFound, SpecError
from vmctl.hosts import Host
from vmctl.hypervisor import connection, domain, snapshots
from vmctl.order import natural
from vmctl.snapshot_plan import Ref
from vmctl.snapshot_xml import Snapshot, SnapshotDisk


@dataclass(frozen=True, slots=True)
class Listed:
    """One snapshot as it is listed. ``size`` in bytes is what goes with it: saved memory and NVRAM, not its disks."""

    vm: str
    name: str
    parent: str
    current: bool
    created: datetime
    expires: datetime | None
    state: str
    kind: str
    memory: bool
    disks: tuple[str, ...]
    size: int
    ours: bool
    description: str


@dataclass(frozen=True, slots=True)
class Shown:
    """All about one snapshot. ``revert`` says why it cannot be reverted to, "" when it can."""

    snapshot: Listed
    children: tuple[str, ...]
    disks: tuple[SnapshotDisk, ...]
    memory_file: str
    nvram: str
    revert: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A line of the tree: the snapshot, or where the VM is now ("" for its name), and how it is drawn."""

    name: str
    parent: str
    current: bool
    line: str


def refer(host: Host, text: str) -> Ref:
    """What ``VM`` or ``VM.SNAPSHOT`` names. Raises NotFound when there is no such VM."""
    return snapshot_plan.address(text, [name for name, _ in domain.identities(host.conn)])


def named(host: Host, text: str) -> tuple[Ref, Snapshot]:
    """The snapshot that is named. Raises NotFound, SpecError."""
    ref = refer(host, text)
    if not ref.snapshot:
        raise SpecError(f"cannot use snapshot {text}: that is a VM", hint=f"vmctl snapshot list {text}")
    return ref, snapshot_plan.one_of(snapshots.snapshots(host.conn, ref.vm), ref)


def listed(vm: str, one: Snapshot) -> Listed:
    """A snapshot as it is listed."""
    size = sum(Path(path).stat().st_blocks * 512 for path in one.aside if Path(path).exists())
    return Listed(
        vm=vm,
        name=one.name,
        parent=one.parent,
        current=one.current,
        created=one.created,
        expires=one.kept.expires if one.kept else None,
        state=one.state,
        kind=one.kind,
        memory=one.memory != "no",
        disks=tuple(disk.target for disk in one.disks if disk.kind != "no"),
        size=size,
        ours=one.kept is not None,
        description=one.description,
    )


def list_all(host: Host, names: Collection[str]) -> tuple[Listed, ...]:
    """The snapshots of the VMs that match ``names`` (none: of all)."""
    vms = [vm for vm, _ in domain.identities(host.conn) if not names or any(fnmatchcase(vm, one) for one in names)]
    if names and not vms:
        raise NotFound(f"cannot list snapshots of {', '.join(names)}: no VM of that name")
    return tuple(listed(vm, one) for vm in sorted(vms, key=natural) for one in snapshots.snapshots(host.conn, vm))


def show(host: Host, text: str) -> Shown:
    """Everything about a snapshot. Raises NotFound."""
    ref, one = named(host, text)
    children = tuple(other.name for other in snapshots.snapshots(host.conn, ref.vm) if other.parent == one.name)
    named_ = sorted(path for path in domain_files.named(one.xml) if path.startswith("/"))
    missing = [path for path in named_ if host.conn.local and not Path(path).exists()]
    why = f"cannot: {', '.join(missing)} is not there any more" if missing else ""
    nvram = one.kept.nvram if one.kept else ""
    return Shown(listed(ref.vm, one), children, one.disks, one.memory_file, nvram, why)


def tree(host: Host, vm: str) -> tuple[Leaf, ...]:
    """The snapshots of a VM as they come from each other."""
    found = snapshots.snapshots(host.conn, domain.find(host.conn, vm).name)
    leaves = []
    current = next((one.name for one in found if one.current), "")
    for branch in snapshot_plan.tree(found):
        one = branch.snapshot
        if one is None:
            leaves.append(Leaf("", current, True, f"{branch.lead}* you are here"))
        else:
            what = f"{one.kind}{', memory' if one.memory != 'no' else ''}"
            line = f"{branch.lead}{one.name}  {one.created.astimezone():%Y-%m-%d %H:%M:%S}  {what}"
            leaves.append(Leaf(one.name, one.parent, False, line))
    return tuple(leaves)


def version(host: Host) -> tuple[int, ...]:
    return tuple(int(part) for part in connection.versions(host.conn).libvirt.split("."))
