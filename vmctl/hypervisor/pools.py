"""Storage pools of any kind: listed, made, taken away."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import libvirt

from vmctl.errors import Conflict, NotFound
from vmctl.hypervisor import storage
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.order import natural


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """A pool. Sizes in bytes, 0 while it is not active; ``source`` is where its content comes from."""

    name: str
    type: str
    active: bool
    autostart: bool
    path: str
    source: str
    capacity: int
    allocation: int
    available: int


def _facts(pool: Any) -> PoolFacts:
    root = ET.fromstring(pool.XMLDesc())
    active = bool(pool.isActive())
    return PoolFacts(
        name=pool.name(),
        type=root.get("type", ""),
        active=active,
        autostart=bool(pool.autostart()),
        path=root.findtext("target/path") or "",
        source=_source(root.find("source")),
        capacity=int(root.findtext("capacity") or 0) if active else 0,
        allocation=int(root.findtext("allocation") or 0) if active else 0,
        available=int(root.findtext("available") or 0) if active else 0,
    )


def _source(source: ET.Element | None) -> str:
    if source is None:
        return ""
    hosts = [
        f"{one.get('name')}:{one.get('port')}" if one.get("port") else one.get("name", "")
        for one in source.iterfind("host")
    ]
    parts = [one.get("path", "") for one in (*source.iterfind("dir"), *source.iterfind("device"))]
    name = source.findtext("name") or ""
    return ":".join(one for one in (",".join(hosts), ",".join(parts), name if not parts else "") if one)


def pools(conn: Connection) -> tuple[PoolFacts, ...]:
    """All pools, by name."""
    with calling("list storage pools"):
        return tuple(
            sorted((_facts(pool) for pool in conn.handle.listAllStoragePools(0)), key=lambda one: natural(one.name))
        )


def pool(conn: Connection, name: str) -> PoolFacts:
    """One pool. Raises NotFound."""
    with calling(f"find storage pool {name}"):
        return _facts(storage.look_up(conn, name))


def ceph_login(conn: Connection, name: str) -> tuple[str, str]:
    """The user and the UUID of libvirt's secret with which a pool reaches its Ceph; "" for both where it needs none."""
    with calling(f"find storage pool {name}"):
        auth = ET.fromstring(storage.look_up(conn, name).XMLDesc()).find("source/auth[@type='ceph']")
    secret = auth.find("secret") if auth is not None else None
    return (auth.get("username", ""), secret.get("uuid", "")) if auth is not None and secret is not None else ("", "")


def require_free(conn: Connection, name: str) -> None:
    """Raise Conflict when there is a pool of that name."""
    with calling(f"create storage pool {name}"):
        try:
            storage.look_up(conn, name)
        except NotFound:
            pass
        else:
            raise Conflict(f"cannot create storage pool {name}: it exists already", hint=f"vmctl disk pool show {name}")


def create(conn: Connection, xml: str, name: str, *, build: bool, start: bool) -> None:
    """Define a pool, checked against libvirt's schema, and start it; nothing is left of one that does not start.

    ``build``: make what it lies in, such as its folder. Raises Conflict when the name is taken.
    """
    require_free(conn, name)
    with calling(f"create storage pool {name}"):
        made = conn.handle.storagePoolDefineXML(xml, libvirt.VIR_STORAGE_POOL_DEFINE_VALIDATE)
        try:
            if build:
                made.build(libvirt.VIR_STORAGE_POOL_BUILD_NEW)
            if start:
                made.create(0)
                made.setAutostart(1)
        except BaseException:
            with suppress(libvirt.libvirtError):
                if made.isActive():
                    made.destroy()
            with suppress(libvirt.libvirtError):
                made.undefine()
            raise


def delete(conn: Connection, name: str) -> None:
    """Stop a pool and forget it; what is in it stays."""
    with calling(f"delete storage pool {name}"):
        found = storage.look_up(conn, name)
        if found.isActive():
            found.destroy()
        if found.isPersistent():
            found.undefine()


def pool_of_path(conn: Connection, path: str) -> tuple[str, str] | None:
    """Pool and name of the volume at ``path``; None when no running pool knows it."""
    with suppress(libvirt.libvirtError):
        volume = conn.handle.storageVolLookupByPath(path)
        return volume.storagePoolLookupByVolume().name(), volume.name()
    return None
