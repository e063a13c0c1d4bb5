"""Who a new VM is: a UUID that no VM has, and volumes' names of which no file is in use."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vmctl import image_users, resolve
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage


def volumes_of(host: Host, prefix: str) -> tuple[str, ...]:
    """Volumes in vmctl's pool whose names only a VM of that prefix gives."""
    pool = host.settings.pool
    if not storage.pool_exists(host.conn, pool):
        return ()
    names = storage.volume_names(host.conn, pool)
    return tuple(one for one in names if one == f"{prefix}.qcow2" or one.startswith(f"{prefix}-"))


def needed_of(host: Host, volumes: Collection[str]) -> frozenset[str]:
    """Those of the volumes that a VM, or a disk that is none of them, needs. Clones keep the disk of a deleted VM."""
    if not volumes:
        return frozenset()
    needed = image_users.needed(host.conn)
    folder = storage.pool_path(host.conn, host.settings.pool)
    return frozenset(one for one in volumes if set(needed.by(f"{folder}/{one}")) - set(volumes))


def free_uuid(host: Host, name: str, taken: Iterable[str] = ()) -> str:
    """The UUID for a new VM ``name``: the same each time, unless a VM has it, ``taken`` has, or its disks live on."""
    held = {uuid for other, uuid in domain.identities(host.conn) if other != name} | {*taken}
    while True:
        found = resolve.identity(host.conn.host, name, held)
        if not needed_of(host, volumes_of(host, resolve.volume_prefix(name, found))):
            return found
        held.add(found)
