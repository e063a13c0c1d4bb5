"""Snapshots deleted, alone or by their age; what others need of their files stays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vmctl import (
    domain_job,
    snapshot_journal,
    snapshot_layers,
    snapshot_plan,
    snapshot_settle,
    snapshot_xml,
)
from vmctl import snapshots as snapshot_verbs
from vmctl.errors import Interrupted, NotFound, Unsupported, VmctlError, WrongState, quietly
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import domain, snapshots
from vmctl.hypervisor.domain import Domain
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_layers import View
from vmctl.snapshot_plan import Ref
from vmctl.snapshot_xml import Snapshot


@dataclass(frozen=True, slots=True)
class Deleted:
    """A snapshot that was deleted, or would be."""

    vm: str
    name: str
    touches: tuple[str, ...]


def planned_deletes(host: Host, vm: Domain, ones: Sequence[Snapshot]) -> tuple[Deleted, ...]:
    """What deleting snapshots one after the other would do. Raises for one that cannot be deleted."""
    for number, one in enumerate(ones):
        if one.kind != "internal" or all(before.kind == "internal" for before in ones[:number]):
            _require_deletable(host, vm, one)  # what an external one before it frees is seen when that is gone
    told: list[Deleted] = []
    seen = snapshot_layers.view(host, vm.name) if any(one.kind != "internal" for one in ones) else None
    for one in ones:
        touches = [f"delete snapshot {vm.name}.{one.name}"]
        if seen is None or one.kind == "internal":
            touches += [f"free its blocks in {path}" for path in sorted(one.files)]
        else:
            seen, more = _without(host, seen, one)
            touches += more
        told.append(Deleted(vm.name, one.name, tuple(touches)))
    return tuple(told)


def _without(host: Host, seen: View, one: Snapshot) -> tuple[View, list[str]]:
    """What is there when a snapshot is deleted, and what that touches."""
    files = {path for other in seen.found if other.name == one.name for path in other.files}
    seen = replace(seen, found=tuple(other for other in seen.found if other.name != one.name))
    gone, merges = snapshot_layers.plan_tidy(host, seen, files)
    ended = snapshot_layers.tidied(seen, gone, merges)
    for path in (path for step in merges for path in (step.top, step.base)):
        if not Path(path).exists():  # else it is found when the snapshot is gone
            raise NotFound(
                f"cannot delete snapshot {seen.vm.name}.{one.name}: {path}, which is to be merged, is not there",
                hint="put it back; or restore a backup: vmctl backup list",
            )
    told = [f"delete {path}" for path in one.aside if Path(path).exists()]
    told += [f"delete {path}" for path in gone]
    told += [f"merge {step.top} into {step.base}, and delete it" for step in merges]
    told += [
        f"base {path} on {ended.seen.bases[path]}"
        for path, below in ended.seen.bases.items()
        if below != seen.seen.bases[path]
    ]
    told += [f"change VM {seen.vm.name}"] if ended.defined != seen.defined else []
    return ended, told


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


def delete(host: Host, texts: Sequence[str], report: Reporter, *, dry: bool = False) -> tuple[Deleted, ...]:
    """Delete snapshots. What other snapshots, the VMs and other disks need of their files stays.

    All are looked at before the first goes: one that is not there, or cannot go, leaves the others too.
    """
    refs: dict[str, list[Ref]] = {}
    for ref in dict.fromkeys(snapshot_verbs.refer(host, text) for text in texts):
        refs.setdefault(ref.vm, []).append(ref)
    told: list[Deleted] = []
    for name, here in refs.items():
        with snapshot_layers.working_on(host, name, report) as vm:
            found = snapshots.snapshots(host.conn, vm.name)
            told += planned_deletes(host, vm, [snapshot_plan.one_of(found, ref) for ref in here])
    for name, here in refs.items() if not dry else ():
        with snapshot_layers.working_on(host, name, report) as vm:
            for ref in here:
                # Read anew each time: when the one before it went, it got another parent, and perhaps another file.
                remove(host, vm, snapshot_plan.one_of(snapshots.snapshots(host.conn, vm.name), ref), report)
    return tuple(told)


def delete_expired(host: Host, names: Collection[str], report: Reporter, *, dry: bool = False) -> tuple[Deleted, ...]:
    """Delete the expired snapshots of the VMs that match ``names`` (none: of all)."""
    now = datetime.now(UTC)
    old = [row for row in snapshot_verbs.list_all(host, names) if row.expires is not None and row.expires <= now]
    return delete(host, [f"{row.vm}.{row.name}" for row in old], report, dry=dry)


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
    ended = domain_job.telling_end(host, vm, f"delete snapshot {vm.name}.{one.name}", "")
    try:
        with ended:
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
