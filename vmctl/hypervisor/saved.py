"""A running domain's memory in a file, with its disks as they were then; and domains that go on from such a file."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping

import libvirt

from vmctl.errors import VmctlError, quietly
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.wait import Worker

_LIVE_S = 8.0
_ABORT_S = 60.0


def _snapshot_xml(memory: str, disks: Mapping[str, str], left: tuple[str, ...]) -> str:
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "memory", {"snapshot": "external", "file": memory})
    listed = ET.SubElement(root, "disks")
    for target, path in disks.items():
        disk = ET.SubElement(listed, "disk", {"name": target, "snapshot": "external", "type": "file"})
        ET.SubElement(disk, "driver", {"type": "qcow2"})
        ET.SubElement(disk, "source", {"file": path})
    for target in left:
        ET.SubElement(listed, "disk", {"name": target, "snapshot": "no"})
    return ET.tostring(root, encoding="unicode")


def save_and_go_on(
    conn: Connection, name: str, memory: str, disks: Mapping[str, str], left: tuple[str, ...], *, live: bool
) -> None:
    """Write a running domain's memory to the file ``memory``; from that moment its disks go on in other files.

    ``disks`` are those overlays by target, which must be there; ``left`` the targets that stay as they are. It is held
    meanwhile. ``live``: most is written while it runs; one that changes its memory faster than that is held, too.
    """
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
    flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE if live else 0
    doing = f"save the memory of VM {name}"
    handle = domain.handle(conn, name)
    text = _snapshot_xml(memory, disks, left)
    failure: list[VmctlError] = []

    def work() -> None:
        try:
            with calling(doing):
                handle.snapshotCreateXML(text, flags)
        except VmctlError as error:
            failure.append(error)

    worker = Worker(work, "save memory")
    worker.start()
    held = False
    try:
        worker.join(_LIVE_S)
        if worker.is_alive() and live:
            held = True
            quietly(lambda: domain.pause(conn.apart(), name))
        while worker.is_alive():
            worker.join(0.2)
    except BaseException:
        quietly(lambda: domain.abort_job(conn.apart(), name))
        worker.join(_ABORT_S)
        raise
    finally:
        if held:
            quietly(lambda: domain.resume(conn, name))
    if failure:
        raise failure[0]


def save_and_end(conn: Connection, name: str, memory: str) -> None:
    """Write a running domain's memory to a file; it has ended then."""
    with calling(f"save the memory of VM {name}"):
        domain.handle(conn, name).saveFlags(memory, None, libvirt.VIR_DOMAIN_SAVE_RUNNING)


def restore_paused(conn: Connection, path: str, *, name: str) -> None:
    """Bring the domain that the head of the file describes to where its memory is, its processors held."""
    with calling(f"bring VM {name} to the saved state"):
        conn.handle.restoreFlags(path, None, libvirt.VIR_DOMAIN_SAVE_PAUSED)


def set_links(conn: Connection, name: str, *, up: bool, macs: Collection[str] | None = None) -> None:
    """Plug the cables of cards of a running domain in, or pull them: of those with these MACs, or of all."""
    handle = domain.handle(conn, name)
    with calling(f"{'connect' if up else 'disconnect'} VM {name}"):
        for card in ET.fromstring(handle.XMLDesc()).iterfind("devices/interface"):
            link, mac = card.find("link"), card.find("mac")
            if macs is not None and (mac is None or mac.get("address") not in macs):
                continue
            if link is None:
                link = ET.SubElement(card, "link")
            link.set("state", "up" if up else "down")
            handle.updateDeviceFlags(ET.tostring(card, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)
