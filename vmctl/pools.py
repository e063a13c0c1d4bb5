"""Storage pools of every kind libvirt has: what is asked for as what is rendered, and the verbs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vmctl import image_users, render
from vmctl.choices import PoolType
from vmctl.disk_spec import name_problem
from vmctl.errors import Conflict, HypervisorError, SpecError, Unsupported
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, pools, storage
from vmctl.hypervisor.pools import PoolFacts
from vmctl.render import PoolView

_UNSAFE = "[\x00-\x1f\x7f-\x9f\u2028\u2029]"
_LIBVIRT = {PoolType.NFS: "netfs"}
# What each kind needs beside its name, and what it may have.
_NEEDED = {
    PoolType.DIR: {"path"},
    PoolType.FS: {"path", "device"},
    PoolType.NFS: {"path", "host", "export"},
    PoolType.LOGICAL: {"source_name"},
    PoolType.ISCSI: {"host", "iqn"},
    PoolType.ISCSI_DIRECT: {"host", "iqn", "initiator"},
    PoolType.RBD: {"host", "source_name"},
}
_ALLOWED = {
    PoolType.FS: {"format"},
    PoolType.NFS: {"format"},
    PoolType.LOGICAL: {"device", "path"},
    PoolType.ISCSI: {"initiator", "path", "user", "secret", "port"},
    PoolType.ISCSI_DIRECT: {"user", "secret", "port"},
    PoolType.RBD: {"user", "secret", "port"},
}
_OPTION = {"source_name": "source-name"}


@dataclass(frozen=True, slots=True)
class NewPool:
    """A pool as asked for. ``path`` is its folder here; ``export`` is NFS's, ``iqn`` the iSCSI target's name."""

    name: str
    type: PoolType = PoolType.DIR
    path: str = ""
    device: tuple[str, ...] = ()
    host: str = ""
    port: int = 0
    export: str = ""
    iqn: str = ""
    initiator: str = ""
    source_name: str = ""
    format: str = ""
    user: str = ""
    secret: str = ""


def problems(wanted: NewPool) -> list[str]:
    """Everything wrong with it; empty when nothing is. Pure."""
    found = [problem] if (problem := name_problem(wanted.name)) else []
    fields = ("path", "device", "host", "port", "export", "iqn", "initiator", "source_name", "format", "user", "secret")
    given = {name for name in fields if getattr(wanted, name)}
    needed = _NEEDED[wanted.type]
    option = {name: "--" + _OPTION.get(name, name) for name in fields}
    found += [f"type {wanted.type} needs {option[name]}" for name in sorted(needed - given)]
    extra = given - needed - _ALLOWED.get(wanted.type, set())
    found += [f"type {wanted.type} has no {option[name]}" for name in sorted(extra)]
    paths = [("path", wanted.path), ("export", wanted.export), *(("device", one) for one in wanted.device)]
    for name, path in paths:
        if path and (not path.startswith("/") or ".." in path.split("/")):
            found.append(f"{option[name]} {path!r} is not absolute, or climbs with '..'")
        elif name == "path" and path and not path.strip("/"):
            found.append(f"{option[name]} {path!r} is the root of all folders")
    for name in given - {"device", "port"}:
        if re.search(_UNSAFE, getattr(wanted, name)):
            found.append(f"{option[name]} has control characters")
    if wanted.iqn and re.fullmatch(r"(?:iqn|eui|naa)\.\S+", wanted.iqn) is None:
        found.append(f"--iqn {wanted.iqn!r} is not like iqn.2024-01.org.example:disks")
    if bool(wanted.user) != bool(wanted.secret):
        found.append("--user and --secret belong together")
    if wanted.secret and re.fullmatch(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", wanted.secret) is None:
        found.append("--secret is not the UUID of one of libvirt's secrets")
    return found


def view(wanted: NewPool) -> PoolView:
    """What is rendered for it. Pure."""
    path = wanted.path
    if not path and wanted.type is PoolType.LOGICAL:
        path = f"/dev/{wanted.source_name}"
    if not path and wanted.type is PoolType.ISCSI:
        path = "/dev/disk/by-path"
    devices = wanted.device or ((wanted.iqn,) if wanted.iqn else ())
    form = wanted.format
    if not form:
        form = {PoolType.FS: "auto", PoolType.NFS: "nfs", PoolType.LOGICAL: "lvm2"}.get(wanted.type, "")
    return PoolView(
        name=wanted.name,
        type=_LIBVIRT.get(wanted.type, wanted.type),
        path=path,
        host=wanted.host,
        port=wanted.port,
        dir=wanted.export,
        devices=devices,
        source_name=wanted.source_name,
        format=form,
        initiator=wanted.initiator,
        auth="ceph" if wanted.type is PoolType.RBD else "chap",
        user=wanted.user,
        secret=wanted.secret,
    )


def definition(wanted: NewPool) -> str:
    """The XML of a pool. Raises SpecError with every problem."""
    if found := problems(wanted):
        raise SpecError(f"cannot create pool {wanted.name}", problems=found)
    return render.storage_pool(view(wanted))


def plan_create(host: Host, wanted: NewPool) -> str:
    """The XML of a pool that could be made. Raises SpecError, Conflict when the name is taken."""
    text = definition(wanted)
    pools.require_free(host.conn, wanted.name)
    _require_place(host, wanted)
    return text


def _require_place(host: Host, wanted: NewPool) -> None:
    """Raise unless its folder is one, or none yet, and no other pool's: libvirt refuses both, in words of its own."""
    if wanted.type is not PoolType.DIR:
        return
    if host.conn.local and Path(wanted.path).exists() and not Path(wanted.path).is_dir():
        raise SpecError(f"cannot create pool {wanted.name}: {wanted.path} is no folder")
    for one in pools.pools(host.conn):
        if one.path and os.path.normpath(one.path) == os.path.normpath(wanted.path):
            raise Conflict(
                f"cannot create pool {wanted.name}: {one.path} is the folder of pool {one.name}",
                hint=f"use that: vmctl disk pool show {one.name}",
            )


_MOUNTED = "is the {} there, and can this host mount it? nothing is left of the pool; --no-start only defines it"
_REACHED = "does the server answer, and does it offer that? nothing is left of the pool; --no-start only defines it"
_HINT = {
    PoolType.FS: _MOUNTED.format("device"),
    PoolType.NFS: _MOUNTED.format("server"),
    PoolType.LOGICAL: "is that volume group there? vgs shows them; nothing is left of the pool",
    PoolType.ISCSI: _REACHED + "; it takes iscsiadm (open-iscsi)",
    PoolType.ISCSI_DIRECT: _REACHED,
    PoolType.RBD: _REACHED,
}


def create(host: Host, wanted: NewPool, report: Reporter, *, start: bool = True) -> PoolFacts:
    """Define a pool and start it. A folder that is not there is made; a group of volumes or a file system is not."""
    text = plan_create(host, wanted)
    build = start and wanted.type in {PoolType.DIR, PoolType.FS, PoolType.NFS}
    with ExitStack() as undo:
        if build and host.conn.local:
            undo.callback(_unmake, [one for one in _upwards(wanted.path) if not one.exists()])
        try:
            pools.create(host.conn, text, wanted.name, build=build, start=start)
        except (HypervisorError, Unsupported) as error:
            error.hint = error.hint or _HINT.get(wanted.type, "")
            raise
        undo.pop_all()
    report(Step(f"pool {wanted.name} is {'active' if start else 'defined'}"))
    return pools.pool(host.conn, wanted.name)


def _upwards(path: str) -> tuple[Path, ...]:
    return (Path(path), *Path(path).parents)


def _unmake(folders: Sequence[Path]) -> None:
    """Take away those of the folders that libvirt has made and nothing lies in."""
    for one in folders:
        with suppress(OSError):
            one.rmdir()


@dataclass(frozen=True, slots=True)
class ShownPool:
    """A pool with its volumes, and the VMs that have disks there."""

    pool: PoolFacts
    volumes: tuple[storage.VolumeFacts, ...]
    users: tuple[str, ...]


def show(host: Host, name: str) -> ShownPool:
    """Everything about a pool. Raises NotFound."""
    facts = pools.pool(host.conn, name)
    if not facts.active:
        return ShownPool(facts, (), _users(host, facts, ()))
    try:
        storage.refresh(host.conn, name)
    except HypervisorError:  # what it lies in is gone, and it is not active any more
        return ShownPool(pools.pool(host.conn, name), (), _users(host, facts, ()))
    volumes = storage.volumes(host.conn, name)
    return ShownPool(pools.pool(host.conn, name), volumes, _users(host, facts, volumes))


def _users(host: Host, pool: PoolFacts, volumes: tuple[storage.VolumeFacts, ...]) -> tuple[str, ...]:
    """The VMs that have disks in a pool. One that is not active tells no volumes; its folder does."""
    here = f"{pool.path.rstrip('/')}/" if pool.path and not pool.active else ""
    paths = {one.path for one in volumes}
    users = set()
    for vm, _, found in disks.all_disks(host.conn):
        for disk in found:
            named = {disk.source, *disk.backing}
            if (
                disk.source.startswith(f"{pool.name}/")
                or paths & named
                or (here and any(one.startswith(here) for one in named))
            ):
                users.add(vm)
    vms = {name for name, _ in domain.identities(host.conn)}
    needed = image_users.needed(host)  # of a stopped VM's disk libvirt does not tell what it is based on
    return tuple(sorted(users | {user for path in paths for user in needed.by(os.path.realpath(path)) if user in vms}))


def deletable(host: Host, name: str) -> ShownPool:
    """The pool that deleting would forget. Raises Conflict while a VM has a disk there, and for vmctl's own."""
    if name in {host.settings.pool, host.settings.image_pool}:
        raise Conflict(f"cannot delete pool {name}: it is vmctl's own")
    found = show(host, name)
    if found.users:
        raise Conflict(
            f"cannot delete pool {name}: disks of {', '.join(found.users)} are there",
            hint="vmctl disk move VM:DISK --pool OTHER",
        )
    return found


def delete(host: Host, name: str, report: Reporter) -> None:
    """Stop a pool and forget it; its volumes stay where they are. Raises Conflict as deletable does."""
    deletable(host, name)
    pools.delete(host.conn, name)
    report(Step(f"pool {name} is deleted; what was in it stays"))


def list_pools(host: Host) -> tuple[PoolFacts, ...]:
    """All pools, by name."""
    return pools.pools(host.conn)
