"""Ends what a killed change of snapshots has begun, but for what takes long: thaws, writes down what was to be kept,
puts NVRAM back, removes files that nobody needs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from vmctl import agent, durable, forgotten, image_users, layer_check, snapshot_journal, snapshot_xml
from vmctl.disk_journal import remove_file
from vmctl.errors import Conflict, WrongState, quietly
from vmctl.events import Reporter, Step, Warned, silent
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, snapshots
from vmctl.hypervisor.domain import Domain
from vmctl.identity import needed_elsewhere
from vmctl.image_users import Seen
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_xml import Kept, Snapshot
from vmctl.wait import wait_until

_JOB_TIMEOUT_S = 600.0


def settle(host: Host, name: str, report: Reporter, *, deciding: bool = False) -> None:
    """Settle what was begun on a VM, whose name is held. What is left to be merged stays in the journal.

    Raises Conflict where nobody can tell which of two files the VM wrote to last; ``deciding``, for one that is to be
    deleted: both stay then, and it is what the definition says.
    """
    snapshots.put_back(host.conn, name, snapshot_journal.aside(host, name))
    there = domain.find_or_none(host.conn, name)
    if there is not None:
        _follow(host, there, report)
        _decide(host, there, report, deciding=deciding)
    for path, entry in snapshot_journal.entries(host):
        if entry.vm != name or not (entry.files or entry.frozen or entry.nvram):
            continue
        report(Step(f"ending the {entry.doing} of snapshot {entry.vm}.{entry.snapshot}, which was cut off"))
        vm = domain.find_or_none(host.conn, name)
        if vm is not None:
            _end(host, entry)
            if _never_made(host, entry):
                path.unlink(missing_ok=True)
                continue
            _require_in_sight(host, vm, entry)
            _follow(host, vm, report)  # it may have gone on while that was waited for
        written = layer_check.left_behind(host, vm, entry) if vm is not None else {}
        for newer, base in written.items():
            report(Warned(f"a disk of {name} is {base}; {newer} may be newer, and stays"))
        if vm is None:  # undefined, by virsh, which leaves its disks
            written = layer_check.written_to(host, entry.files)
            for layer in written:
                report(Warned(f"{layer} stays: VM {name}, which is not there any more, wrote to it"))
        drop_unneeded(host, [one for one in entry.files if one not in written])
        if entry.layers:
            # Its files are in order: if one of them is detached later, it must not be taken for a left-over.
            left = replace(entry, files=(), frozen=False, keep="", nvram=(), unsure=False, switched=False)
            durable.write(path, asdict(left))
        else:
            path.unlink(missing_ok=True)


def _never_made(host: Host, entry: Entry) -> bool:
    """Whether a snapshot that was to be taken was refused: what its layers are is no matter of this change then."""
    made = any(Path(one).exists() for one in entry.files)
    known = any(one.name == entry.snapshot for one in snapshots.snapshots(host.conn, entry.vm))
    return host.conn.local and entry.doing == "create" and not (made or known)


def _follow(host: Host, vm: Domain, report: Reporter) -> None:
    """Let the definition name what the running VM went on in, and libvirt died before it knew, or said so."""
    for one in layer_check.follow(host, vm):
        report(Warned(f"disk {one.target} of {vm.name} is {one.real}, which libvirt knows of when it starts anew"))


def _decide(host: Host, vm: Domain, report: Reporter, *, deciding: bool) -> None:
    """Let the definition of a stopped VM name what it wrote to last, where that is known; else raise, or give it up."""
    if not any(entry.vm == vm.name for _, entry in snapshot_journal.entries(host)):
        return
    doing = f"settle the snapshots of VM {vm.name}"
    if not vm.active:
        forgotten.require_none(host, vm.name, vm.uuid, doing)
    if not deciding:
        layer_check.require_none_newer(host, vm, doing)
        return
    layer_check.follow_stopped(host, vm)
    for path, doubt in layer_check.half_merged(host, vm, noting=True):
        report(Warned(f"disk {doubt.target} of {vm.name} is {doubt.told}; {doubt.other} may be newer"))
        keep_apart(host, vm.name, path)


def keep_apart(host: Host, name: str, merge: Path) -> None:
    """End the note of a merge, and let nobody merge what the VM's other notes name: the two files stay."""
    merge.unlink(missing_ok=True)
    for at, entry in snapshot_journal.entries(host):
        if entry.vm == name and entry.layers:
            durable.write(at, asdict(replace(entry, layers=())))
            if not (entry.files or entry.frozen or entry.nvram):
                at.unlink()


def _idle(host: Host, name: str) -> bool:
    """Whether libvirt works on no job of the domain: a snapshot is taken to its end though vmctl was killed."""
    try:
        return domain.job_progress(host.conn, name) is None
    except WrongState:
        return True  # it does not run


def _end(host: Host, entry: Entry) -> None:
    name = entry.vm
    wait_until(
        lambda: _idle(host, name),
        what=f"cannot settle VM {name}: a job of it is not over",
        timeout_s=_JOB_TIMEOUT_S,
    )
    if entry.frozen:
        quietly(lambda: agent.thaw(host, name))
    if entry.doing == "merge" and domain.find(host.conn, name).active:
        _give_up_merge(host, entry)
    private(host, (path for path in entry.files if entry.doing == "create"))
    if entry.keep:
        for one in snapshots.snapshots(host.conn, name):
            if one.name == entry.snapshot and one.kept is None and set(entry.files) & _overlays(one):
                keep(host, name, one, kept_of(entry))
    if entry.nvram and not domain.find(host.conn, name).active:
        now = {disk.source for disk in disks.disks(host.conn, name, inactive=True)}
        if now & set(entry.files) and Path(entry.nvram[0]).exists():
            put_nvram(*entry.nvram)


def _give_up_merge(host: Host, entry: Entry) -> None:
    """End the job of a merge, which else keeps what changes the disk from being done; it is begun anew later."""
    layers = {os.path.realpath(path) for path in entry.layers}
    for disk in disks.disks(host.conn, entry.vm, inactive=False):
        if layers & {os.path.realpath(path) for path in (disk.source, *disk.backing) if path}:
            disks.abort_job(host.conn, entry.vm, disk.target)


def _require_in_sight(host: Host, vm: Domain, entry: Entry) -> None:
    """Raise Conflict where libvirt still has the mark of a merge that was being switched over, its job given up.

    So it is when libvirt was killed as it switched over: the running VM may write to either of the two files.
    """
    if not (entry.unsure and vm.active):
        return
    layers = {os.path.realpath(path) for path in entry.layers}
    for disk in disks.disks(host.conn, vm.name, inactive=False):
        if disk.mirror and os.path.realpath(disk.source) in layers:
            raise Conflict(
                f"cannot settle disk {disk.target} of VM {vm.name}: it may have gone on in {disk.mirror}, and libvirt, "
                f"which was killed as it went there, knows of {disk.source}",
                hint=f"vmctl stop {vm.name}, then vmctl doctor --fix",
            )


def private(host: Host, paths: Iterable[str]) -> None:
    """Let none but their owner read files that a snapshot's writes go to: qemu-img, which libvirt runs, lets all."""
    for path in paths:
        if host.conn.local:
            with suppress(OSError):  # QEMU made it, which lets nobody, and its user is not ours
                Path(path).chmod(0o600)


def _overlays(one: Snapshot) -> set[str]:
    return {disk.overlay for disk in one.external} | {one.memory_file}


def kept_of(entry: Entry) -> Kept:
    """What an entry says is to be kept of its snapshot."""
    expires = datetime.fromisoformat(entry.expires) if entry.expires else None
    return Kept("" if entry.keep == "-" else entry.keep, expires)


def keep(host: Host, name: str, one: Snapshot, kept: Kept) -> None:
    """Write down what vmctl keeps of a snapshot."""
    redefine(host, name, snapshot_xml.with_kept(one.xml, kept), current=one.current)


def redefine(host: Host, name: str, xml: str, *, current: bool) -> None:
    """Describe a snapshot anew, as hypervisor.snapshots does."""
    snapshots.redefine(host.conn, name, xml, snapshot_journal.aside(host, name), current=current)


def nvram_of(host: Host, vm: Domain) -> str:
    """The file of a VM's UEFI variables, "" for none. A stopped VM's definition may not name it."""
    if not vm.facts.firmware.startswith("uefi") or not host.conn.local:
        return ""
    folder = Path.home() / ".config/libvirt/qemu/nvram" if host.conn.session else Path("/var/lib/libvirt/qemu/nvram")
    path = Path(vm.facts.nvram or folder / f"{vm.name}_VARS.fd")
    return str(path) if path.exists() else ""


def put_nvram(copy: str, place: str) -> None:
    """Put a copy of UEFI variables in the place of the file a VM has, whole or not at all."""
    was = Path(place).stat() if Path(place).exists() else None
    new = Path(f"{place}.new")
    new.write_bytes(Path(copy).read_bytes())
    if was is not None:
        new.chmod(was.st_mode & 0o7777)
        os.chown(new, was.st_uid, was.st_gid)
    new.replace(place)
    durable.sync_folder(Path(place).parent)


def drop_unneeded(host: Host, paths: Collection[str], seen: Seen | None = None) -> None:
    """Remove those of the files that nothing names, nothing is based on, and no QEMU has open."""
    there = [os.path.realpath(path) for path in paths if Path(path).exists()]
    if not there:
        return
    seen = seen or image_users.look(host)
    theirs = needed_elsewhere(host, there, silent)
    kept = {*theirs, *forgotten.opened(host)}
    there = [path for path in there if path not in kept]
    bases = dict(seen.bases)
    while True:
        free = [path for path in there if not seen.named.get(path) and path not in bases.values()]
        for path in free:
            remove_file(host, path)
            there.remove(path)
            bases.pop(path, None)
        if not free:
            return
