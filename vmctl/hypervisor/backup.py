"""Backup jobs of running domains, and checkpoints: the dirty bitmaps by which the next backup knows what changed."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

import libvirt

from vmctl.errors import VmctlError
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.wait import wait_until

_END_TIMEOUT_S = 60.0
_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of a domain. ``bitmaps``: name of the bitmap of each disk, by target."""

    name: str
    parent: str
    description: str
    bitmaps: Mapping[str, str]


def _read(text: str) -> Checkpoint:
    root = ET.fromstring(text)
    marked = {d.get("name", ""): d.get("bitmap", "") for d in root.iterfind("disks/disk") if d.get("bitmap")}
    return Checkpoint(
        root.findtext("name") or "", root.findtext("parent/name") or "", root.findtext("description") or "", marked
    )


def checkpoints(conn: Connection, name: str) -> tuple[Checkpoint, ...]:
    """The checkpoints of a domain, each after its parent."""
    doing = f"list the checkpoints of VM {name}"
    with calling(doing):
        dom = domain.handle(conn, name)
        try:
            found = dom.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
            return tuple(_read(one.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)) for one in found)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                return ()
            raise


def dirty(conn: Connection, name: str, checkpoint: str) -> dict[str, int]:
    """Bytes changed since a checkpoint of a running domain, by disk; a disk whose bitmaps are no good is not there."""
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
    with calling(f"read checkpoint {checkpoint} of VM {name}"):
        found = domain.handle(conn, name).checkpointLookupByName(checkpoint, 0)
        try:
            text = found.getXMLDesc(flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() in {libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT, libvirt.VIR_ERR_INTERNAL_ERROR}:
                return {}
            raise
    disks = ET.fromstring(text).iterfind("disks/disk")
    return {one.get("name", ""): int(one.get("size", "0")) for one in disks if one.get("size") is not None}


def begin(conn: Connection, name: str, backup: str, checkpoint: str) -> None:
    """Begin a job by its XML, and in the same moment a checkpoint ("": none)."""
    with calling(f"back up VM {name}"):
        domain.handle(conn, name).backupBegin(backup, checkpoint or None, 0)


def job(conn: Connection, name: str) -> str:
    """The XML of the backup job that a domain has; "" for none."""
    with calling(f"ask for the backup job of VM {name}"):
        try:
            return str(domain.handle(conn, name).backupGetXMLDesc(0))
        except libvirt.libvirtError as error:
            if error.get_error_code() in {libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_NO_SUPPORT}:
                return ""
            if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:
                return ""  # it does not run
            raise


def end(conn: Connection, name: str) -> None:
    """End the backup job of a domain and see it gone; none is no error."""
    if not job(conn, name):
        return
    try:
        with calling(f"end the backup of VM {name}"):
            domain.handle(conn, name).abortJob()
    except VmctlError:
        if job(conn, name):
            raise
    wait_until(
        lambda: not job(conn, name),
        what=f"end of the backup of VM {name}",
        timeout_s=_END_TIMEOUT_S,
        interval_s=_POLL_S,
    )


def delete_checkpoint(conn: Connection, name: str, checkpoint: str, *, metadata_only: bool = False) -> None:
    """Delete a checkpoint with its bitmaps, of a running domain; or, of any, only what libvirt knows of it."""
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if metadata_only else 0
    with calling(f"delete checkpoint {checkpoint} of VM {name}"):
        try:
            domain.handle(conn, name).checkpointLookupByName(checkpoint, 0).delete(flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                raise


def redefine_checkpoint(conn: Connection, name: str, text: str) -> None:
    """Let libvirt know of a checkpoint whose bitmaps are there."""
    with calling(f"note a checkpoint of VM {name}"):
        domain.handle(conn, name).checkpointCreateXML(text, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
