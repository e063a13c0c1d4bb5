"""Snapshots as libvirt knows them: read, taken, described anew, forgotten; and memory brought back from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt

from vmctl import durable, snapshot_xml
from vmctl.errors import NotFound
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.snapshot_xml import Snapshot


def snapshots(conn: Connection, name: str) -> tuple[Snapshot, ...]:
    """All snapshots of a domain, oldest first."""
    with calling(f"list the snapshots of VM {name}"):
        dom = domain.handle(conn, name)
        try:
            all_ = dom.listAllSnapshots()
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:  # a driver without any, such as LXC's
                return ()
            raise
        current = dom.snapshotCurrent().getName() if all_ and dom.hasCurrentSnapshot() else ""
        found = []
        for one in all_:
            try:
                text = one.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:  # deleted since the list was made
                    raise
                continue
            found.append(snapshot_xml.read(text, current=one.getName() == current))
    return tuple(sorted(found, key=lambda one: (one.created, one.name)))


def names(conn: Connection) -> tuple[str, ...]:
    """VM.SNAPSHOT of all there are."""
    with calling("list snapshots"):
        return tuple(f"{dom.name()}.{name}" for dom in conn.handle.listAllDomains() for name in dom.snapshotListNames())


def take(conn: Connection, name: str, xml: str, aside: Path, *, disks_only: bool, live: bool) -> None:
    """Take a snapshot, checked against libvirt's schema; blocks until done. ``aside``: see ``put_back``."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_VALIDATE
    if disks_only:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    if live:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    with calling(f"take a snapshot of VM {name}"):
        dom = domain.handle(conn, name)
        with _beside_checkpoints(dom, aside):
            dom.snapshotCreateXML(xml, flags)


@contextmanager
def _beside_checkpoints(dom: libvirt.virDomain, aside: Path) -> Iterator[None]:
    """Forget the checkpoints of a stopped domain meanwhile; the file ``aside`` holds them.

    libvirt 9.0 describes no snapshot of a stopped domain that has any, not knowing then whether its QEMU could merge
    their bitmaps. Their bitmaps stay in the files; whether they are still good is looked at by each backup.
    """
    try:
        found = [] if dom.isActive() else dom.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
        found = []
    if not found:
        yield
        return
    kept = {one.getName(): one.getXMLDesc(0) for one in found}
    try:
        _set_aside(dom, found, kept, aside)
        yield
    finally:
        _put_back(dom, kept)
        aside.unlink(missing_ok=True)


def _set_aside(dom: libvirt.virDomain, found: Sequence[Any], kept: Mapping[str, str], aside: Path) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = aside.with_name(f"{aside.name}.new")
    with new.open("w") as file:
        json.dump({"uuid": dom.UUIDString(), "checkpoints": kept}, file)
        durable.sync(file)
    new.replace(aside)
    for one in reversed(found):
        one.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def _put_back(dom: libvirt.virDomain, kept: Mapping[str, str]) -> None:
    there = {one.getName() for one in dom.listAllCheckpoints()}
    for name, text in kept.items():
        if name not in there:
            dom.checkpointCreateXML(text, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)


def put_back(conn: Connection, name: str, aside: Path) -> None:
    """Let libvirt know again of the checkpoints that a killed ``take`` or ``redefine`` left in the file ``aside``."""
    try:
        noted = json.loads(aside.read_text())
    except FileNotFoundError:
        return
    dom = domain.find_or_none(conn, name)
    if dom is not None and dom.uuid == noted["uuid"]:
        with calling(f"put back the checkpoints of VM {name}"):
            _put_back(domain.handle(conn, name), noted["checkpoints"])
    aside.unlink(missing_ok=True)


def redefine(conn: Connection, name: str, xml: str, aside: Path, *, current: bool) -> None:
    """Describe a snapshot anew: only what libvirt knows of it changes. ``current``: the VM is there now.

    ``aside``: see ``put_back``.
    """
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if current else 0
    with calling(f"describe a snapshot of VM {name}"):
        dom = domain.handle(conn, name)
        with _beside_checkpoints(dom, aside):
            dom.snapshotCreateXML(xml, flags)


def _delete(conn: Connection, name: str, snapshot: str, flags: int) -> None:
    with calling(f"delete snapshot {name}.{snapshot}"):
        try:
            domain.handle(conn, name).snapshotLookupByName(snapshot).delete(flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
                raise NotFound(f"cannot delete snapshot {name}.{snapshot}: there is none") from error
            raise


def forget(conn: Connection, name: str, snapshot: str) -> None:
    """Let libvirt forget a snapshot; its children become its parent's, and all files stay."""
    _delete(conn, name, snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


def delete(conn: Connection, name: str, snapshot: str) -> None:
    """Have libvirt delete a snapshot with what it holds."""
    _delete(conn, name, snapshot, 0)


def revert(conn: Connection, name: str, snapshot: str, *, running: bool | None) -> None:
    """Have libvirt revert to a snapshot. ``running``: whether the VM runs then; None: as it was."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE
    if running is not None:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING if running else libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED
    with calling(f"revert to snapshot {name}.{snapshot}"):
        dom = domain.handle(conn, name)
        dom.revertToSnapshot(dom.snapshotLookupByName(snapshot), flags)
        # libvirt puts back all that was kept with it: its own expiry is not the VM's.
        for where in (libvirt.VIR_DOMAIN_AFFECT_CONFIG, libvirt.VIR_DOMAIN_AFFECT_LIVE)[: 1 + bool(dom.isActive())]:
            domain.note(dom, None, snapshot_xml.PREFIX, snapshot_xml.NAMESPACE, where)


def saved_xml(conn: Connection, path: str) -> str:
    """The XML of the domain whose memory is saved in a file. Raises what libvirt says of a file that is no such."""
    with calling(f"read the saved memory {path}"):
        return str(conn.handle.saveImageGetXMLDesc(path, libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE))


def restore(conn: Connection, path: str, xml: str | None, *, doing: str, paused: bool | None) -> None:
    """Let a domain go on from the memory saved in a file, with the disks that ``xml`` names; None: the file does.

    ``paused``: whether it stays paused; None: as it was.
    """
    flags = 0
    if paused is not None:
        flags = libvirt.VIR_DOMAIN_SAVE_PAUSED if paused else libvirt.VIR_DOMAIN_SAVE_RUNNING
    with calling(doing):
        conn.handle.restoreFlags(path, xml, flags)
