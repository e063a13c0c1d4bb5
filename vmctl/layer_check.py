"""Whether running VMs write to the files that libvirt names: killed as one went on in a new layer, it may not know.

QEMU has switched over then, and libvirt, when it is back, knows of the old file alone, which it would start the VM with
the next time, and copy, save or merge until then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_chain, disk_xml, forgotten, qemu_img
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, VmctlError
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, inventory
from vmctl.hypervisor.domain import Domain

_OURS = ("-layer", ".snap-")  # in the names of layers that vmctl makes: other files may be open for a job


@dataclass(frozen=True, slots=True)
class Astray:
    """A running VM whose disk ``target`` is in the file ``real``, while libvirt names ``told``."""

    vm: str
    target: str
    told: str
    real: str


def find(host: Host) -> tuple[Astray, ...]:
    """All such disks, by what the processes have open. Only of VMs whose processes can be looked into."""
    running = disks.all_disks(host.conn, active_only=True) if host.conn.local else ()
    return tuple(one for vm, _, devices in running for one in _astray(host, vm, devices))


def of(host: Host, vm: str) -> tuple[Astray, ...]:
    """The same of one running VM."""
    return _astray(host, vm, disks.disks(host.conn, vm, inactive=False))


def require_known(host: Host, vm: Domain, doing: str) -> None:
    """Raise Conflict where libvirt would take another file for the running VM's disk than the one it is in."""
    for one in of(host, vm.name) if vm.active else ():
        raise Conflict(
            f"cannot {doing}: VM {one.vm} has its disk {one.target} in {one.real}, and libvirt, which was killed as it "
            f"went there, knows of {one.told}",
            hint=f"vmctl doctor --fix, then vmctl stop {one.vm}, and start it",
        )


def opened(host: Host) -> frozenset[str]:
    """All files that this host's QEMUs have open, as far as they can be seen from here."""
    return frozenset(path for pid in forgotten.processes(host).values() for path in _opened(pid))


def _astray(host: Host, vm: str, devices: Sequence[DiskDevice]) -> tuple[Astray, ...]:
    pid = inventory.process_id(host.conn, vm)
    found = {path for path in _opened(pid) if any(mark in Path(path).name for mark in _OURS)} if pid else set()
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
