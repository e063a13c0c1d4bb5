"""What a change of a disk's file has begun: two files of which the VM will name one. The other goes, whoever dies.

An entry is written before the new file is there and taken away after the last step. What is left of a killed change
is settled by the next change of that VM's disks, and by `vmctl doctor --fix`: by what the definition says, not by what
was planned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from vmctl import disk_xml, durable, forgotten, identity, image_users, pull_journal, pull_settle, switch_over
from vmctl.errors import Conflict, VmctlError, quietly
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host, holding
from vmctl.hypervisor import devices, disks, domain, pools, storage
from vmctl.hypervisor.domain import Domain
from vmctl.record import Owned
from vmctl.switch_over import Doubt


@dataclass(frozen=True, slots=True)
class Entry:
    """A change of disk ``target`` of a VM from the file ``old`` to ``new``. ``keep``: the old one stays in any case.

    ``old`` "": a file made for a VM that is not there yet, and goes unless the VM comes to name it. ``plug``: the XML
    of a disk that is attached, ``new`` the volume made for it, "" for none. ``unsure``: the running VM may have gone on
    in ``new``, which libvirt was asked for; ``switched``: it has, as libvirt said. ``process``: the mark of its QEMU
    then.
    """

    uri: str
    vm: str
    target: str
    old: str
    new: str
    format: str
    keep: bool = False
    plug: str = ""
    switched: bool = False
    unsure: bool = False
    process: str = ""

    @property
    def told(self) -> str:
        """For people."""
        if self.plug:
            return f"disk {self.target} of {self.vm}, which is half attached"
        return f"disk {self.target} of {self.vm}: {self.old} or {self.new}" if self.old else f"{self.new} of {self.vm}"


def _folder(host: Host) -> Path:
    return host.folders.data / "disk-journal"


def begin(host: Host, entry: Entry) -> None:
    """Write an entry, on the disk for good before this returns."""
    durable.write(_folder(host) / f"{uuid4()}.json", asdict(entry))


def note(host: Host, entry: Entry, now: Entry) -> None:
    """Write what has come true since an entry was begun."""
    for path, found in entries(host):
        if found == entry:
            durable.write(path, asdict(now))


def entries(host: Host) -> Iterator[tuple[Path, Entry]]:
    """What is begun on this host and not ended."""
    for path in sorted(_folder(host).glob("*.json")):
        try:
            entry = Entry(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if entry.uri == host.conn.uri:
            yield path, entry


def settle(host: Host, vm: str, report: Reporter, *, deciding: bool = False) -> bool:
    """Bring what was begun on disks of ``vm``, whose name is held, to its end. Whether there was anything.

    Raises Conflict where nobody can tell which of two files the VM wrote to last; ``deciding``, for one that is to be
    deleted: both stay then, and it is what the definition says.
    """
    pulled = bool(vm) and pull_settle.settle(host, vm, report, deciding=deciding)
    found = [(path, entry) for path, entry in entries(host) if entry.vm == vm and vm]
    for path, entry in found:
        _settle(host, entry, report, deciding=deciding)
        path.unlink(missing_ok=True)
    return bool(found) or pulled


def settle_all(host: Host, report: Reporter, *, but: Collection[str] = ()) -> list[str]:
    """The same for all VMs that nobody works on, ``but`` these. Returns what was settled."""
    told, failure = [], None
    begun = {entry.vm for _, entry in entries(host)} | {entry.vm for _, entry in pull_journal.entries(host)}
    for vm in sorted(begun - {*but}):
        try:
            with holding(host, vm):
                if settle(host, vm, report):
                    told.append(vm)
        except VmctlError as error:  # one that has to wait must not keep the others
            failure = failure or error
    if failure is not None:
        raise failure
    return told


def _settle(host: Host, entry: Entry, report: Reporter, *, deciding: bool) -> None:
    vm = domain.find_or_none(host.conn, entry.vm)
    if entry.plug:
        if vm is not None:
            _settle_plug(host, vm, entry, report)
        return
    if not entry.old:
        if vm is None or entry.new not in domain.xml(host.conn, entry.vm, inactive=True):
            _remove_unneeded(host, entry.new, report)
        return
    if vm is None:
        return  # deleted meanwhile, with its disks; which of the files was whose nobody can tell any more
    doing = f"settle disk {entry.target} of VM {vm.name}"
    if not vm.active:
        forgotten.require_none(host, vm.name, vm.uuid, doing)
        follow_stopped(host, entry)
    if found := doubt(host, vm, entry, noting=True):
        if not deciding:
            raise found.refusal(doing)
        report(Warned(f"disk {entry.target} of {entry.vm} is {entry.old}; {entry.new} may be newer, and stays"))
        return
    if vm.active:
        live = {disk.target: disk for disk in disks.disks(host.conn, vm.name, inactive=False)}.get(entry.target)
        if live is not None and live.mirror == entry.new:
            disks.abort_job(host.conn, vm.name, entry.target)
        else:
            follow(host, vm, entry)
        _require_in_sight(host, vm, entry)
    named = {disk.source for disk in disks.disks(host.conn, vm.name, inactive=True)}
    named |= {disk.source for disk in disks.disks(host.conn, vm.name, inactive=False)} if vm.active else set()
    if entry.new in named:
        if entry.old not in named:
            stays = not entry.keep and _needed(host, entry.old, report)
            _own(host, entry, stays=stays)  # before it goes: then libvirt does not know in which pool it was
            if not (entry.keep or stays):
                remove_file(host, entry.old)
        report(Step(f"disk {entry.target} of {entry.vm} is {entry.new}"))
    else:
        _remove_unneeded(host, entry.new, report)


def _require_in_sight(host: Host, vm: Domain, entry: Entry) -> None:
    """Raise Conflict where a running VM has the new file open, and libvirt, which was killed meanwhile, the old one."""
    live = {disk.target: disk.source for disk in disks.disks(host.conn, vm.name, inactive=False)}
    if live.get(entry.target) == entry.old and os.path.realpath(entry.new) in forgotten.opened(host):
        raise Conflict(
            f"cannot settle disk {entry.target} of VM {vm.name}: it may have gone on in {entry.new}, and libvirt, "
            f"which was killed as it went there, knows of {entry.old}",
            hint=f"vmctl stop {vm.name}, then vmctl doctor --fix",
        )


def follow(host: Host, vm: Domain, entry: Entry) -> None:
    """Let the definition of a running VM name the new file, if it has gone on in that."""
    live = {disk.target: disk.source for disk in disks.disks(host.conn, vm.name, inactive=False)}
    if live.get(entry.target) == entry.new and vm.persistent:
        _name_new(host, entry)


def follow_stopped(host: Host, entry: Entry) -> None:
    """Let the definition of a stopped VM name the new file, if it is known to have gone on in that."""
    if lags_stopped(host, entry):
        _name_new(host, entry)


def lags_stopped(host: Host, entry: Entry) -> bool:
    """Whether the definition of a stopped VM is known to name another file than it has gone on in."""
    if not (entry.switched and Path(entry.new).exists()):
        return False
    return entry.old in {d.source for d in disks.disks(host.conn, entry.vm, inactive=True) if d.target == entry.target}


def doubt(host: Host, vm: Domain, entry: Entry, *, noting: bool) -> Doubt | None:
    """What nobody can tell of the disk of a VM that has stopped since: whether it went on in the new file.

    One that differs. Where both read the same nobody is in doubt; ``noting``, which is for who holds the VM's name:
    from now on neither.
    """
    if not entry.unsure or not host.conn.local or not Path(entry.new).exists():
        return None
    if not forgotten.started_since(host, vm.name, entry.process) if vm.active else entry.switched:
        return None
    for disk in disks.disks(host.conn, entry.vm, inactive=not vm.active):
        if disk.target == entry.target and disk.source == entry.old:
            found = Doubt(entry.vm, entry.target, entry.old, entry.new, (disk.format, entry.format), vm.active)
            if vm.active or not switch_over.same(host, found):
                return found
            if noting:
                note(host, entry, replace(entry, unsure=False))
    return None


def keep(host: Host, path: Path, entry: Entry, *, new: bool) -> None:
    """End an entry of which there is a doubt: the disk is the ``new`` file or the old one. Both stay."""
    if new:
        _name_new(host, entry)
        _own(host, entry)
    path.unlink(missing_ok=True)


def _settle_plug(host: Host, vm: Domain, entry: Entry, report: Reporter) -> None:
    """What its guest has got already is in its definition too; a volume that came to no VM goes while it is empty."""
    (disk,) = disk_xml.read(f"<domain><devices>{entry.plug}</devices></domain>")
    later = {one.target: one.source for one in disks.disks(host.conn, vm.name, inactive=True)}
    now = {one.target: one.source for one in disks.disks(host.conn, vm.name, inactive=False)} if vm.active else {}
    if now.get(disk.target) == disk.source and disk.target not in later and vm.persistent:
        devices.attach(host.conn, vm.name, entry.plug, live=False)
        report(Step(f"disk {disk.target} of {vm.name} is attached, from its next start on too"))
    elif entry.new and disk.source not in {*later.values(), *now.values()}:
        _unmake(host, vm, entry)


def _unmake(host: Host, vm: Domain, entry: Entry) -> None:
    """Take back the volume made for a disk that was not attached. One in which there is anything stays."""
    from vmctl import qemu_img, render

    path = Path(entry.new)
    if not host.conn.local or any(disk.source == entry.new for _, _, f in disks.all_disks(host.conn) for disk in f):
        return
    if path.exists() and any(piece.data for piece in qemu_img.extents(path, entry.format)):
        return
    places = {pool.name for pool in pools.pools(host.conn) if pool.path == str(path.parent)}
    record = vm.facts.record
    if record is not None:
        left = tuple(one for one in record.owned if one.volume != path.name or one.pool not in places)
        if left != record.owned:
            domain.set_record(host.conn, vm.name, render.metadata(replace(record, owned=left)))
    remove_file(host, entry.new)


def _remove_unneeded(host: Host, path: str, report: Reporter) -> None:
    if not _needed(host, path, report):
        remove_file(host, path)


def _needed(host: Host, path: str, report: Reporter) -> bool:
    """Whether a VM names a file, a disk is based on it, a QEMU has it open, or another host needs it; then says so."""
    if not Path(path).exists():
        return False
    real = os.path.realpath(path)
    seen = image_users.look(host)
    users = set(seen.named.get(real, ())) | {Path(top).name for top, base in seen.bases.items() if base == real}
    users |= {"a running VM"} if real in forgotten.opened(host) else set()
    users |= set(identity.needed_elsewhere(host, [path], report).values())
    if users:
        report(Warned(f"{path} stays: {', '.join(sorted(users))} needs it"))
    return bool(users)


def _name_new(host: Host, entry: Entry) -> None:
    """Let the definition name the new file, which the VM has gone on in."""
    text = domain.xml(host.conn, entry.vm, inactive=True)
    here = {disk.target: disk.source for disk in disk_xml.read(text)}
    if here.get(entry.target) == entry.old:
        domain.define(host.conn, disk_xml.with_source(text, entry.target, entry.new, entry.format), name=entry.vm)


def _own(host: Host, entry: Entry, *, stays: bool = False) -> None:
    """If the old file was the VM's own, so is the new one; the old one too if it ``stays`` for those who need it."""
    from vmctl import render

    vm = domain.find(host.conn, entry.vm)
    old = pools.pool_of_path(host.conn, entry.old)
    if vm.facts.record is None or old is None or Owned(*old) not in vm.facts.record.owned:
        return
    for name in (pool.name for pool in pools.pools(host.conn) if pool.path == str(Path(entry.new).parent)):
        storage.refresh(host.conn, name)
    new = pools.pool_of_path(host.conn, entry.new)
    if new is None:
        return
    owned = tuple(Owned(*new) if one == Owned(*old) else one for one in vm.facts.record.owned)
    owned += (Owned(*old),) if stays else ()
    domain.set_record(host.conn, vm.name, render.metadata(replace(vm.facts.record, owned=owned)))


def remove_file(host: Host, path: str) -> None:
    """Delete a file, and let its pool know."""
    Path(path).unlink(missing_ok=True)
    for pool in pools.pools(host.conn):
        if pool.active and pool.path == str(Path(path).parent):
            quietly(lambda name=pool.name: storage.refresh(host.conn, name))  # type: ignore[misc]


def unsettled(host: Host, *, but: Collection[str] = ()) -> list[str]:
    """One line for each change that was begun and not ended, ``but`` of these VMs."""
    told = [(entry.vm, entry.told) for _, entry in entries(host)]
    told += [(entry.vm, entry.told) for _, entry in pull_journal.entries(host)]
    return [line for vm, line in told if vm not in but]
