"""Devices of a domain that come and go: shared folders, and the memory they need."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

import libvirt

from vmctl.domain_xml import with_shared_memory
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.errors import calling


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """A folder of the host that a domain has. ``xml`` is its device, by which libvirt finds it.

    ``guard`` is the program in virtiofsd's place, "" for the usual one.
    """

    folder: str
    tag: str
    virtiofs: bool
    readonly: bool
    guard: str
    xml: str


def _definition(conn: Connection, name: str, *, inactive: bool) -> ET.Element:
    return ET.fromstring(domain.xml(conn, name, inactive=inactive))


def shares(conn: Connection, name: str, *, live: bool = False) -> tuple[SharedFolder, ...]:
    """The folders that ``name`` has from its next start on, or with ``live`` those it has now."""
    return _shares(_definition(conn, name, inactive=not live))


def shares_by_now(vm: Domain) -> tuple[tuple[SharedFolder, ...], tuple[SharedFolder, ...]]:
    """The folders that a domain has now, and those it has from its next start on."""
    found = _shares(ET.fromstring(vm.xml))
    if not (vm.active and vm.persistent):
        return (found, ()) if vm.active else ((), found)
    with calling(f"read the XML of VM {vm.name}"):
        return found, _shares(ET.fromstring(vm.handle.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))


def _shares(root: ET.Element) -> tuple[SharedFolder, ...]:
    found = []
    for one in root.iterfind("devices/filesystem"):
        source, target = one.find("source"), one.find("target")
        if source is not None and target is not None:
            virtiofs = one.find("driver[@type='virtiofs']") is not None
            text = ET.tostring(one, encoding="unicode")
            binary = one.find("binary")
            guard = "" if binary is None else binary.get("path", "")
            readonly = one.find("readonly") is not None
            found.append(SharedFolder(source.get("dir", ""), target.get("dir", ""), virtiofs, readonly, guard, text))
    return tuple(found)


def takes_virtiofs(conn: Connection, name: str) -> bool:
    """Whether virtiofs can be plugged into the running domain: its memory is open to a daemon beside QEMU.

    And it is in a cgroup. Where libvirt runs its guests without (in containers, or told to), plugging virtiofs in ends
    the whole libvirtd 9.0: it adds the daemon's process to the cgroup that is not there.
    """
    running = domain.xml(conn, name)
    if with_shared_memory(running) != running:
        return False
    with calling(f"look into VM {name}"):
        handle = domain.handle(conn, name)
        try:
            handle.schedulerType()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in {libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_OPERATION_UNSUPPORTED}:
                raise
            return False
    return True


def share_memory(conn: Connection, name: str) -> None:
    """Open the domain's memory to daemons beside QEMU from its next start on."""
    text = domain.xml(conn, name, inactive=True)
    shared = with_shared_memory(text)
    if shared != text:
        domain.define(conn, shared, name=name)


def _flags(*, live: bool) -> int:
    return int(libvirt.VIR_DOMAIN_AFFECT_LIVE if live else libvirt.VIR_DOMAIN_AFFECT_CONFIG)


def attach(conn: Connection, name: str, xml: str, *, live: bool) -> None:
    """Plug a device in, now or from the next start on."""
    with calling(f"attach a device to VM {name}"):
        domain.handle(conn, name).attachDeviceFlags(xml, _flags(live=live))


def detach(conn: Connection, name: str, xml: str, *, live: bool = True) -> None:
    """Unplug a device: ask the guest now, who may take its time, or have it gone from the next start on."""
    with calling(f"detach a device from VM {name}"):
        domain.handle(conn, name).detachDeviceFlags(xml, _flags(live=live))
