"""Snapshots deleted, alone or by their age; what others need of their files stays."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vmctl import (
    snapshot_journal,
    snapshot_layers,
    snapshot_plan,
    snapshot_settle,
    snapshot_xml,
)
from vmctl import snapshots as snapshot_verbs
from vmctl.errors import Interrupted, Unsupported, VmctlError, WrongState, quietly
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import domain, snapshots
from vmctl.hypervisor.domain import Domain
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_xml import Snapshot


@dataclass(frozen=True, slots=True)
class Deleted:
    """A snapshot that was deleted, or would be."""

    vm: str
    name: str
    touches: tuple[str, ...]


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
    ref = snapshot_verbs.refer(host, text)
    with snapshot_layers.working_on(host, ref.vm, report) as vm:
        one = snapshot_plan.one_of(snapshots.snapshots(host.conn, vm.name), ref)
        told = planned_delete(host, vm, one)
        if not dry:
            remove(host, vm, one, report)
        return told


def delete_expired(host: Host, names: Collection[str], report: Reporter, *, dry: bool = False) -> tuple[Deleted, ...]:
    """Delete the expired snapshots of the VMs that match ``names`` (none: of all)."""
    now = datetime.now(UTC)
    old = [row for row in snapshot_verbs.list_all(host, names) if row.expires is not None and row.expires <= now]
    return tuple(delete(host, f"{row.vm}.{row.name}", report, dry=dry) for row in old)


def remove(host: Host, vm: Domain, one: Snapshot, report: Reporter) -> None:
    _require_deletable(host, vm, one)
    by_libvirt = snapshot_plan.libvirts_own(snapshot_verbs.version(host)) and not one.aside
    if one.kind == "internal" or (by_libvirt and not snapshot_layers.shared(host, vm.name, one)):
        snapshots.delete(host.conn, vm.name, one.name)
        report(Step(f"snapshot {vm.name}.{one.name} is deleted"))
        return
    entry = Entry(host.conn.uri, vm.name, "delete", one.name, one.aside, tuple(sorted(one.files)))
    path = snapshot_journal.begin(host, entry)
    xml = snapshot_xml.without_overlays(one.xml)
    if xml != one.xml:
        snapshot_settle.redefine(host, vm.name, xml, current=one.current)
    snapshots.forget(host.conn, vm.name, one.name)
    snapshot_settle.drop_unneeded(host, one.aside)
    try:
        snapshot_layers.tidy_up(host, vm.name, report, entry.layers)
    except (VmctlError, KeyboardInterrupt, Interrupted) as error:
        hint = "the snapshot is gone; its files wait to be merged, which vmctl doctor --fix does"
        if isinstance(error, VmctlError):
            error.hint = error.hint or hint
        else:
            quietly(lambda: snapshot_settle.settle(host, vm.name, report))
            report(Step(hint))
        raise
    path.unlink(missing_ok=True)
    report(Step(f"snapshot {vm.name}.{one.name} is deleted"))
