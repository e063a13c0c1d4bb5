"""Disks detached from VMs, while they run or not, and what they may do a second."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmctl import disk_guard, disk_journal, disk_spec, disk_xml, domain_files, layer_check, render
from vmctl.disk_find import Located, locate, require_no_overlays, require_not_elsewhere, waits
from vmctl.disk_spec import IoLimits
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, NotFound, SpecError, WrongState
from vmctl.events import Reporter, Step
from vmctl.hosts import Host, holding
from vmctl.hypervisor import disks, domain, snapshots
from vmctl.hypervisor.domain import Domain, State
from vmctl.record import Owned

_LOCK_S = 30.0


@dataclass(frozen=True, slots=True)
class Unplugged:
    """A disk that was taken from a VM, or with a dry run would be. ``kept``: the volume is there still.

    ``removed``: what goes from the VM with it, for nothing else hung on it.
    """

    vm: str
    target: str
    serial: str
    source: str
    when: str
    kept: bool
    removed: tuple[str, ...] = ()


def detach(
    host: Host, text: str, report: Reporter, *, timeout_s: float, next_start: bool, delete: bool, dry: bool
) -> Unplugged:
    """Take a disk from its VM: at once where it runs, its guest having let go of it, and from its definition.

    The connection must have been opened with events. The volume stays, and is nobody's own from then on, unless
    ``delete``. Killed in the middle: the same command again does the rest.
    """
    name = locate(host, text).owner
    if not name:
        raise SpecError(f"cannot detach {text}: no VM has it")
    with holding(host, name, timeout_s=_LOCK_S):
        vm = domain.find(host.conn, name)
        domain.require_persistent(vm, "detach a disk from")
        if vm.state is State.SAVED:
            raise WrongState(f"cannot detach {text}: VM {name} is saved", hint=f"vmctl start {name} first")
        if not dry:
            disk_journal.settle(host, name, report)
        layer_check.require_known(host, vm, f"detach {text}", noting=not dry)
        found = locate(host, text)
        disk = found.disk
        assert disk is not None
        running = vm.active and disk.target in {d.target for d in disks.disks(host.conn, name, inactive=False)}
        live = running and not next_start
        if live and disk.bus not in disk_spec.HOT:
            raise WrongState(
                f"cannot detach {text}: bus {disk.bus} lets no disk go while the VM runs",
                hint=f"vmctl stop {name}, or --next-start",
            )
        if live and "q35" in vm.facts.machine and disk_xml.on_root_bus(disk.xml):
            raise WrongState(
                f"cannot detach {text}: VM {name} was started with it, where its machine lets no disk go",
                hint=f"vmctl stop {name}, or --next-start",
            )
        if live and disks.job(host.conn, name, disk.target) is not None:
            raise WrongState(f"cannot detach {text}: a job works on it")
        if delete and running and not live:
            raise SpecError(f"cannot delete {text}: VM {name} goes on using it")
        if delete:
            _require_deletable(host, found, report)
        when = "now" if not running or live else "its next stop and start"
        thread = _idle_thread(host, name, disk.target, live=live)
        done = Unplugged(
            name, disk.target, disk.serial, disk.source, when, not delete, (f"I/O thread {thread}",) if thread else ()
        )
        if not dry:
            if live:
                report(Step(f"waiting for {name} to let go of disk {disk.target}"))
            _unplug(host, vm, found, disk, live=live, timeout_s=timeout_s, delete=delete)
            for now in (True, False) if thread and live else (False,) if thread else ():
                if thread in disk_xml.iothreads(domain.xml(host.conn, name, inactive=not now)):
                    disks.drop_iothread(host.conn, name, thread, live=now)
        return done


def _idle_thread(host: Host, name: str, target: str, *, live: bool) -> int:
    """The I/O thread that nothing uses once the disk is gone, from wherever it goes; 0 for none."""
    texts = [domain.xml(host.conn, name, inactive=not now) for now in ((True, False) if live else (False,))]
    found = {disk_xml.only_user(text, target) for text in texts}
    return (found.pop() or 0) if len(found) == 1 else 0


def _require_deletable(host: Host, found: Located, report: Reporter) -> None:
    """Raise unless the disk can be deleted once its VM has let go of it: told before, not when half is done."""
    if not found.volume:
        raise NotFound(f"cannot delete {found.ref}: it is in no storage pool", hint="without --delete it is detached")
    require_no_overlays(host, found, "delete")
    for one in snapshots.snapshots(host.conn, found.owner):
        if found.path in domain_files.named(one.xml):
            raise Conflict(
                f"cannot delete {found.ref}: snapshot {found.owner}.{one.name} needs it",
                hint=f"vmctl snapshot delete {found.owner}.{one.name}",
            )
    if others := disk_guard.conflicts(
        [disk_guard.Use(found.owner, disk_guard.key(found.path, local=host.conn.local), found.ref, writes=True)],
        disk_guard.running_uses(host),
    ):
        raise Conflict(f"cannot delete {found.ref}: {'; '.join(others)}")
    require_not_elsewhere(host, found, "delete", report)


def _unplug(
    host: Host, vm: Domain, found: Located, disk: DiskDevice, *, live: bool, timeout_s: float, delete: bool
) -> None:
    if live:
        disks.unplug(host.conn, vm.name, disk, timeout_s=timeout_s)
    domain.detach_disk(host.conn, vm.name, disk.target)
    record, owned = vm.facts.record, Owned(found.pool, found.volume)
    if record is not None and owned in record.owned:
        less = replace(record, owned=tuple(one for one in record.owned if one != owned))
        domain.set_record(host.conn, vm.name, render.metadata(less))
    if delete and found.volume:
        from vmctl.disks import delete as delete_disk

        delete_disk(host, f"{found.pool}/{found.volume}", lambda _event: None)


def limit(host: Host, text: str, limits: IoLimits, report: Reporter, *, dry: bool) -> dict[str, int]:
    """Limit what a disk may do a second, live where its VM runs; returns all limits it has then."""
    if found := disk_spec.limit_problems(limits):
        raise SpecError(f"cannot limit {text}", problems=found)
    here = locate(host, text)
    if here.vm is None or here.disk is None:
        raise SpecError(f"cannot limit {text}: no VM has it")
    values = {**here.disk.limits, **limits.given()}
    for kind in ("iops", "bytes"):
        if values.get(f"total_{kind}_sec") and (values.get(f"read_{kind}_sec") or values.get(f"write_{kind}_sec")):
            raise SpecError(
                f"cannot limit {text}: a total and one of reads or writes exclude each other",
                hint="0 takes a limit away",
            )
    values = {name: value for name, value in values.items() if value or name in limits.given()}
    if values and limits.given() and not dry:
        with holding(host, here.owner, timeout_s=_LOCK_S):
            disks.limit(host.conn, here.owner, here.target, values, live=here.live and not waits(host, here))
        report(Step(f"disk {here.target} of {here.owner} is limited"))
    return {name: value for name, value in values.items() if value}
