"""Whether running VMs write to the files that libvirt names: one killed in the moment of a fork may not know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_chain, disk_xml, qemu_img
from vmctl.errors import VmctlError
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, inventory, storage


@dataclass(frozen=True, slots=True)
class Astray:
    """A running VM whose disk ``target`` is in the file ``real``, while libvirt names ``told``."""

    vm: str
    target: str
    told: str
    real: str


def find(host: Host) -> tuple[Astray, ...]:
    """All such disks, by what the processes have open. Only of VMs whose processes can be looked into."""
    found = []
    for vm, _, devices in disks.all_disks(host.conn, active_only=True) if host.conn.local else ():
        pid = inventory.process_id(host.conn, vm)
        record = domain.find(host.conn, vm).facts.record
        layers = [one for one in record.owned if "-layer" in one.volume] if record else []
        if pid is None or not layers:
            continue
        opened = _opened(pid)
        named = {source for disk in devices for source in (disk.source, *disk.backing)}
        for one in layers:
            path = f"{storage.pool_path(host.conn, one.pool)}/{one.volume}"
            if path in opened and path not in named:
                told = disk_chain.backing_path(_backing(path), path)
                found += [Astray(vm, disk.target, told, path) for disk in devices if disk.source == told]
    return tuple(found)


def _opened(pid: int) -> frozenset[str]:
    try:
        return frozenset(str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return frozenset()


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
        domain.define(host.conn, disk_xml.with_source(text, one.target, one.real, "qcow2"), name=one.vm)
