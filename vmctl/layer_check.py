"""Whether running VMs write to the files that libvirt names: killed as one went on in a new layer, it may not know.

QEMU has switched over then, and libvirt, when it is back, knows of the old file alone, which it would start the VM with
the next time, and copy, save or merge until then. Or it knows, and was killed before the definition, which it writes
last, said so: then it is right until the VM stops, and the next start takes the old file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmctl import (
    disk_chain,
    disk_journal,
    disk_xml,
    durable,
    forgotten,
    image_users,
    pull_settle,
    qemu_img,
    snapshot_journal,
    switch_over,
)
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, VmctlError
from vmctl.events import silent
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, inventory, storage
from vmctl.hypervisor.domain import Domain
from vmctl.record import Owned, Record
from vmctl.switch_over import Doubt

_OURS = ("-layer", ".snap-")  # in the names of layers that vmctl makes: other files may be open for a job


@dataclass(frozen=True, slots=True)
class Astray:
    """A running VM whose disk ``target`` is in the file ``real``, while libvirt names ``told``."""

    vm: str
    target: str
    told: str
    real: str
    format: str = "qcow2"


def find(host: Host) -> tuple[Astray, ...]:
    """All such disks, by what the processes have open. Only of VMs whose processes can be looked into."""
    running = disks.all_disks(host.conn, active_only=True) if host.conn.local else ()
    return tuple(one for vm, _, devices in running for one in _misnamed(host, vm, devices))


def follow(host: Host, vm: Domain) -> tuple[Astray, ...]:
    """Let the definition of a running VM name the files that it is in; those disks of which it did not."""
    if not (vm.active and vm.persistent and host.conn.local):
        return ()
    found = _misnamed(host, vm.name, disks.disks(host.conn, vm.name, inactive=False))
    for one in found:
        mend(host, one)
    for _, entry in disk_journal.entries(host):
        if entry.vm == vm.name and entry.old:
            disk_journal.follow(host, vm, entry)
    return found


def require_known(host: Host, vm: Domain, doing: str, *, noting: bool = True) -> None:
    """Raise Conflict where libvirt would take another file for the VM's disk than the one it is in, or was in last.

    ``noting``: as require_none_newer.
    """
    require_none_newer(host, vm, doing, noting=noting)
    if not vm.active:
        return
    devices = disks.disks(host.conn, vm.name, inactive=False)
    for one in _astray(vm.name, devices, _open_in(host, vm.name)):
        raise Conflict(
            f"cannot {doing}: VM {one.vm} has its disk {one.target} in {one.real}, and libvirt, which was killed as it "
            f"went there, knows of {one.told}",
            hint=f"vmctl doctor --fix, then vmctl stop {one.vm}, and start it",
        )


def require_followed(host: Host, vm: Domain, doing: str) -> None:
    """Raise Conflict where the definition of a VM that runs on another machine, where follow() does nothing, lags."""
    if host.conn.local or not (vm.active and vm.persistent):
        return
    defined = {disk.target: disk.source for disk in disks.disks(host.conn, vm.name, inactive=True)}
    for disk in disks.disks(host.conn, vm.name, inactive=False):
        told = defined.get(disk.target) or disk.source
        names = f"{Path(told).name} {Path(disk.source).name}"
        if told != disk.source and any(mark in names for mark in _OURS):
            raise Conflict(
                f"cannot {doing}: VM {vm.name} has its disk {disk.target} in {disk.source}, and its definition, which "
                f"would go along, says {told}",
                hint="on its host: vmctl doctor --fix",
            )


def require_none_newer(host: Host, vm: Domain, doing: str, *, noting: bool = True) -> None:
    """Raise Conflict where a VM, before it stopped, may have gone on in another file than its definition names.

    Where it is known to have, and has not been started since, the definition names that file from now on. That is for
    who holds the VM's name; else, not ``noting``, nothing is changed, and that is a Conflict, too.
    """
    if not host.conn.local:
        return
    if not vm.active:
        pull_settle.require_settled(host, vm, doing)
    elif noting:
        pull_settle.settle(host, vm.name, silent)  # it may go to another host, where nobody knows of the note
    if noting:
        follow_stopped(host, vm)
    elif _lags_stopped(host, vm):
        raise Conflict(
            f"cannot {doing}: its definition does not name yet what its disk has gone on in", hint="vmctl doctor --fix"
        )
    for found in doubts(host, vm, noting=noting):
        raise found.refusal(doing)


def doubts(host: Host, vm: Domain, *, noting: bool) -> Iterator[Doubt]:
    """The disks of which nobody can tell in which of two files the VM was last, as far as the journals tell.

    In a layer that a snapshot, which was cut off, made for it, or where it was being switched over to. Who holds the
    VM's name has it noted where both read the same (``noting``); nobody else changes a journal.
    """
    for _, copy in disk_journal.entries(host):
        if copy.vm == vm.name and (found := disk_journal.doubt(host, vm, copy, noting=noting)):
            yield found
    for _, merged in half_merged(host, vm, noting=noting):
        yield merged
    for _, entry in snapshot_journal.entries(host):
        if entry.vm == vm.name:
            yield from unlayered(host, vm, left_behind(host, vm, entry))


def unlayered(host: Host, vm: Domain, layers: Mapping[str, str]) -> Iterator[Doubt]:
    """Those of a VM's disks that are based on, or are, what these layers are based on."""
    for disk in disks.disks(host.conn, vm.name, inactive=True):
        here = {os.path.realpath(one) for one in (disk.source, *below(disk.source))} if disk.source else set()
        for path, base in layers.items():
            if os.path.realpath(base) in here:
                yield Doubt(vm.name, disk.target, disk.source, path, (disk.format, "qcow2"), vm.active)


def left_behind(host: Host, vm: Domain, entry: snapshot_journal.Entry) -> dict[str, str]:
    """The layers of a snapshot, which was cut off, that the VM may have gone on in before it stopped, as newer()."""
    if entry.doing != "create" or vm.active and not forgotten.started_since(host, vm.name, entry.process):
        return {}
    return newer(host, vm.name, entry.files)


def follow_stopped(host: Host, vm: Domain) -> None:
    """Let the definition of a stopped VM, whose name is held, name the files that it is known to have gone on in."""
    if vm.active:
        return
    for _, copy in disk_journal.entries(host):
        if copy.vm == vm.name:
            disk_journal.follow_stopped(host, copy)
    for _, entry in snapshot_journal.entries(host):
        if entry.vm == vm.name and entry.switched:
            for one in _merging(host, vm, entry):
                switch_over.name_other(host, one)


def _lags_stopped(host: Host, vm: Domain) -> bool:
    """Whether follow_stopped would change the definition."""
    if vm.active:
        return False
    copies = [entry for _, entry in disk_journal.entries(host) if entry.vm == vm.name]
    merges = [entry for _, entry in snapshot_journal.entries(host) if entry.vm == vm.name and entry.switched]
    return any(disk_journal.lags_stopped(host, entry) for entry in copies) or any(
        any(_merging(host, vm, entry)) for entry in merges
    )


def half_merged(host: Host, vm: Domain, *, noting: bool) -> Iterator[tuple[Path, Doubt]]:
    """The disks of which nobody can tell whether the VM, before it stopped, went on below a layer that was merged.

    With each where that is noted. Where both read the same nobody is in doubt; ``noting``: from now on neither.
    """
    for path, entry in snapshot_journal.entries(host):
        if entry.vm != vm.name or not entry.unsure:
            continue
        if not forgotten.started_since(host, vm.name, entry.process) if vm.active else entry.switched:
            continue
        found = [one for one in _merging(host, vm, entry) if vm.active or not switch_over.same(host, one)]
        if noting and not (found or vm.active):
            durable.write(path, asdict(replace(entry, unsure=False)))
        yield from ((path, one) for one in found)


def _merging(host: Host, vm: Domain, entry: snapshot_journal.Entry) -> Iterator[Doubt]:
    """The disks of which the definition names the upper one of two files that were being merged, in doubt or not."""
    layers = {os.path.realpath(path) for path in entry.layers}
    for disk in disks.disks(host.conn, vm.name, inactive=True):
        there = os.path.realpath(disk.source) in layers and Path(disk.source).exists()
        base = switch_over.below(host, disk.source) if there else None
        if base:
            yield Doubt(vm.name, disk.target, disk.source, base[0], ("qcow2", base[1]), vm.active)


def newer(host: Host, vm: str, paths: Collection[str]) -> dict[str, str]:
    """Those of the files that a VM, now stopped, may have gone on in, unknown to libvirt, and what each is based on.

    There is something in such a layer, nobody names it, and the VM's definition names what is below. Now that its
    QEMU has ended nobody can tell for sure: the VM may have been started since, or be at another place on purpose.
    """
    layers = [path for path in paths if path.endswith(".qcow2") and Path(path).exists()] if host.conn.local else []
    if not layers:
        return {}
    seen = image_users.look(host)
    here = set[str]()  # a clone may have been made since, on what it is based on
    ends = [os.path.realpath(disk.source) for disk in disks.disks(host.conn, vm, inactive=True) if disk.source]
    while ends := [path for path in ends if path and path not in here]:
        here |= {*ends}
        ends = [seen.bases.get(path, "") for path in ends]
    found = {}
    for path in layers:
        real = os.path.realpath(path)
        if seen.named.get(real) or real in seen.bases.values():
            continue
        with suppress(VmctlError):  # cut off before it was whole: nobody has gone on in it
            base = disk_chain.backing_path(qemu_img.info(Path(path), "qcow2").backing_file, path)
            # Looked into only on what is known to be the VM's disk: a header may name any file.
            if os.path.realpath(base) in here and _has_own(Path(path)):
                found[path] = base
    return found


def written_to(host: Host, paths: Collection[str]) -> dict[str, str]:
    """Those of the files that are layers in which there is something, and what each is based on, whoever names them."""
    found = {}
    for path in paths if host.conn.local else ():
        if path.endswith(".qcow2") and Path(path).exists():
            with suppress(VmctlError):  # cut off before it was whole
                base = switch_over.below(host, path)
                if base is not None and _has_own(Path(path)):
                    found[path] = base[0]
    return found


def newer_than_stopped(host: Host) -> dict[str, tuple[str, str]]:
    """The same of the layers that forks made, of all stopped VMs; by path the VM and what it is based on."""
    found: dict[str, tuple[str, str]] = {}
    for facts in domain.all_facts(host.conn) if host.conn.local else ():
        paths = _layers_of_forks(host, facts.record)
        if paths and not domain.find(host.conn, facts.name).active:
            found |= {path: (facts.name, base) for path, base in newer(host, facts.name, paths).items()}
    return found


def of_fork(volume: str) -> bool:
    """Whether a volume has the name of a layer that a fork or a clone made. A VM may be called web-layer."""
    return re.search(r".-layer\d+\.qcow2\Z", volume) is not None


def _layers_of_forks(host: Host, known: Record | None) -> dict[str, Owned]:
    """The volumes of a VM that forks made for it, by their files."""
    owned = [one for one in known.owned if of_fork(one.volume)] if known else []
    there = [one for one in owned if storage.pool_exists(host.conn, one.pool)]
    return {f"{storage.pool_path(host.conn, one.pool)}/{one.volume}": one for one in there}


def give_up(host: Host, vm: Domain, path: str) -> None:
    """Let a layer that a fork made for a VM, whose name is held, be its own no more: it is not looked for again."""
    from vmctl import render

    volume = _layers_of_forks(host, vm.facts.record).get(path)
    if vm.facts.record is not None and volume is not None:
        left = tuple(one for one in vm.facts.record.owned if one != volume)
        domain.set_record(host.conn, vm.name, render.metadata(replace(vm.facts.record, owned=left)))


def _has_own(layer: Path) -> bool:
    """Whether there is something in the layer itself."""
    return any(extent.depth == 0 and extent.data for extent in qemu_img.extents(layer, "qcow2"))


def _misnamed(host: Host, vm: str, devices: Sequence[DiskDevice]) -> tuple[Astray, ...]:
    """Disks that are not where libvirt says, or not where the definition says."""
    opened = _open_in(host, vm)
    return (*_astray(vm, devices, opened), *_behind(host, vm, devices, opened))


def _astray(vm: str, devices: Sequence[DiskDevice], opened: frozenset[str]) -> tuple[Astray, ...]:
    """Disks that went on in a layer of which libvirt does not know."""
    found = {path for path in opened if any(mark in Path(path).name for mark in _OURS)}
    found -= {os.path.realpath(path) for disk in devices for path in (disk.source, *disk.backing, disk.mirror)}
    above = {os.path.realpath(base): path for path in found if (base := disk_chain.backing_path(_backing(path), path))}
    astray = []
    for disk in devices:
        real = os.path.realpath(disk.source)
        while real in above:
            real = above.pop(real)
        if disk.source and real != os.path.realpath(disk.source):
            astray.append(Astray(vm, disk.target, disk.source, real))
    return tuple(astray)


def _behind(host: Host, vm: str, devices: Sequence[DiskDevice], opened: frozenset[str]) -> tuple[Astray, ...]:
    """Disks of which the definition names what is below their file, or above it: a layer that was merged into it."""
    defined = {disk.target: disk for disk in disks.disks(host.conn, vm, inactive=True)}
    found = []
    for disk in devices:
        told = defined.get(disk.target)
        if told is None or not (told.source and disk.source) or told.source == disk.source:
            continue
        if os.path.realpath(disk.source) not in opened:
            continue
        if told.source in disk.backing:
            upper = disk.source
        elif os.path.realpath(told.source) in opened:
            continue  # it is where the definition says: libvirt is who does not know
        elif told.format == "qcow2" and disk.source in below(told.source):
            upper = told.source
        else:
            continue
        if any(mark in Path(upper).name for mark in _OURS):
            found.append(Astray(vm, disk.target, told.source, disk.source, disk.format))
    return tuple(found)


def below(path: str) -> tuple[str, ...]:
    """What a file is based on, and that is based on, as their headers tell."""
    found: list[str] = []
    while (path := disk_chain.backing_path(_backing(path), path)) and path not in found:
        found.append(path)
    return tuple(found)


def _open_in(host: Host, vm: str) -> frozenset[str]:
    """The files that a VM's QEMU has open; none where its process cannot be looked into."""
    pid = inventory.process_id(host.conn, vm)
    return forgotten.opened_by(pid) if pid else frozenset()


def _backing(path: str) -> str:
    try:
        return qemu_img.info(Path(path), "qcow2", in_use=True).backing_file
    except VmctlError:
        return ""


def mend(host: Host, one: Astray) -> None:
    """Let the definition name the file that is written to, so that the next start takes it."""
    text = domain.xml(host.conn, one.vm, inactive=True)
    here = {disk.target: disk.source for disk in disk_xml.read(text)}
    if here.get(one.target) == one.told:
        domain.define(host.conn, disk_xml.with_source(text, one.target, one.real, one.format), name=one.vm)
