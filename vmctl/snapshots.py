"""Snapshots listed, shown, drawn and deleted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from vmctl import (
    domain_files,
    snapshot_journal,
    snapshot_layers,
    snapshot_plan,
    snapshot_settle,
    snapshot_xml,
)
from vmctl.errors import NotFound, SpecError, Unsupported, VmctlError, WrongState
from vmctl.events import Reporter, Step
from vmctl.hosts import Host, holding
from vmctl.hypervisor import connection, domain, snapshots
from vmctl.hypervisor.domain import Domain
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_plan import Ref
from vmctl.snapshot_xml import Snapshot, SnapshotDisk

_LOCK_TIMEOUT_S = 30.0


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


@dataclass(frozen=True, slots=True)
class Deleted:
    """A snapshot that was deleted, or would be."""

    vm: str
    name: str
    touches: tuple[str, ...]


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
    return tuple(listed(vm, one) for vm in sorted(vms) for one in snapshots.snapshots(host.conn, vm))


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


@contextmanager
def working_on(host: Host, vm: str, report: Reporter) -> Iterator[Domain]:
    """The VM, nobody else's to change within the block; what a killed change left is settled first."""
    with holding(host, vm, timeout_s=_LOCK_TIMEOUT_S):
        snapshot_layers.settle(host, vm, report)
        yield domain.find(host.conn, vm)


def version(host: Host) -> tuple[int, ...]:
    return tuple(int(part) for part in connection.versions(host.conn).libvirt.split("."))


def planned_delete(host: Host, vm: Domain, one: Snapshot) -> Deleted:
    """What deleting a snapshot would do. Raises for one that cannot be deleted."""
    _require_deletable(host, vm, one)
    if one.kind == "internal":
        return Deleted(vm.name, one.name, tuple(f"free its blocks in {path}" for path in sorted(one.files)))
    seen = snapshot_layers.view(host, vm.name)
    seen = replace(seen, found=tuple(other for other in seen.found if other.name != one.name))
    gone, merges = snapshot_layers.plan_tidy(host, seen, one.files)
    told = [f"delete {path}" for path in one.aside if Path(path).exists()]
    told += [f"merge {step.top} into {step.base}, and delete it" for step in merges]
    told += [f"delete {path}" for path in gone]
    return Deleted(vm.name, one.name, tuple(told))


def _require_deletable(host: Host, vm: Domain, one: Snapshot) -> None:
    doing = f"delete snapshot {vm.name}.{one.name}"
    if one.kind == "internal":
        snapshot_layers.require_free(host, vm, one, doing)
    elif one.kind != "none" and not host.conn.local:
        raise Unsupported(f"cannot {doing}: its files are on another machine", hint="run vmctl there")
    if "+" in one.kind:
        raise Unsupported(
            f"cannot {doing}: it lies in part in its disks' files and in part beside them",
            hint="virsh snapshot-delete --metadata lets libvirt forget it",
        )
    if vm.state is domain.State.SAVED and one.kind != "internal":
        raise WrongState(f"cannot {doing}: VM {vm.name} has saved memory", hint=f"vmctl start {vm.name}")


def delete(host: Host, text: str, report: Reporter, *, dry: bool = False) -> Deleted:
    """Delete a snapshot. What other snapshots, the VM and other disks need of its files stays."""
    ref = refer(host, text)
    with working_on(host, ref.vm, report) as vm:
        one = snapshot_plan.one_of(snapshots.snapshots(host.conn, vm.name), ref)
        told = planned_delete(host, vm, one)
        if not dry:
            remove(host, vm, one, report)
        return told


def delete_expired(host: Host, names: Collection[str], report: Reporter, *, dry: bool = False) -> tuple[Deleted, ...]:
    """Delete the expired snapshots of the VMs that match ``names`` (none: of all)."""
    now = datetime.now(UTC)
    old = [row for row in list_all(host, names) if row.expires is not None and row.expires <= now]
    return tuple(delete(host, f"{row.vm}.{row.name}", report, dry=dry) for row in old)


def remove(host: Host, vm: Domain, one: Snapshot, report: Reporter) -> None:
    _require_deletable(host, vm, one)
    by_libvirt = snapshot_plan.libvirts_own(version(host)) and not one.aside
    if one.kind == "internal" or (by_libvirt and not snapshot_layers.shared(host, vm.name, one)):
        snapshots.delete(host.conn, vm.name, one.name)
        report(Step(f"snapshot {vm.name}.{one.name} is deleted"))
        return
    entry = Entry(host.conn.uri, vm.name, "delete", one.name, one.aside, tuple(sorted(one.files)))
    path = snapshot_journal.begin(host, entry)
    xml = snapshot_xml.without_overlays(one.xml)
    if xml != one.xml:
        snapshots.redefine(host.conn, vm.name, xml, current=one.current)
    snapshots.forget(host.conn, vm.name, one.name)
    snapshot_settle.drop_unneeded(host, one.aside)
    try:
        snapshot_layers.tidy_up(host, vm.name, report, entry.layers)
    except (VmctlError, KeyboardInterrupt) as error:
        hint = "the snapshot is gone; its files wait to be merged, which vmctl doctor --fix does"
        if isinstance(error, VmctlError):
            error.hint = error.hint or hint
        else:
            report(Step(hint))
        raise
    path.unlink(missing_ok=True)
    report(Step(f"snapshot {vm.name}.{one.name} is deleted"))
