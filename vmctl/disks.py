"""Disks listed, shown, made and deleted."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from vmctl import disk_chain, disk_guard, identity, image_users, render
from vmctl.choices import DiskFormat
from vmctl.disk_chain import Chain
from vmctl.disk_find import Located, folders, locate, require_idle, require_no_overlays, require_not_elsewhere
from vmctl.disk_spec import Ref, name_problem, parse_ref
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, HypervisorError, NotFound, SpecError, VmctlError, WrongState
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import disks, pools, storage
from vmctl.image_users import Seen
from vmctl.images import ensure_pools
from vmctl.locks import held
from vmctl.order import natural

_OF_FILES = frozenset({"dir", "fs", "netfs"})


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of the list. Sizes in bytes, 0 where they cannot be told; ``vm`` "": attached to none.

    ``needed_by``: who needs one that is attached to none: snapshots of which VMs, and the volumes that are based on it.
    """

    vm: str
    disk: str
    serial: str
    bus: str
    format: str
    capacity: int
    allocation: int
    pool: str
    source: str
    readonly: bool = False
    needed_by: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a user may call it by."""
        if self.vm:
            return f"{self.vm}:{self.disk}"
        return f"{self.pool}/{Path(self.source).name}" if self.pool else self.source


def list_disks(host: Host, names: Collection[str], *, pool: str = "") -> tuple[Listed, ...]:
    """Disks of the VMs that match ``names`` (none: all), and then the volumes of ``pool`` that none has attached."""
    found: list[Listed] = []
    volumes = {one.path: one for one in storage.all_volumes(host.conn)}
    by_name = {f"{one.pool}/{one.name}": one for one in volumes.values()}
    used = set()
    for vm, _, devices in sorted(disks.all_disks(host.conn), key=lambda one: natural(one[0])):
        for disk in devices:
            used |= {disk.source, *disk.backing}
            if names and not any(fnmatchcase(vm, one) for one in names):
                continue
            facts = volumes.get(disk.source) or by_name.get(disk.source)
            capacity, allocation = (facts.capacity, facts.allocation) if facts else _sizes(host, vm, disk)
            where = facts.pool if facts else ""
            words = (disk.serial, disk.bus, disk.format, capacity, allocation, where, disk.source, disk.readonly)
            found.append(Listed(vm, disk.target, *words))
    if pool != host.settings.pool:
        pools.pool(host.conn, pool)
    if names and not found:
        raise NotFound(f"cannot list disks of {', '.join(names)}: no VM of that name has any")
    if not names:
        for path in used.copy():  # of a stopped VM's disk libvirt does not tell what it is based on
            while (one := volumes.get(path)) is not None and (path := one.backing) and path not in used:
                used.add(path)
        loose = [
            one
            for one in sorted(volumes.values(), key=lambda volume: natural(volume.name))
            if one.path not in used and one.pool == pool and one.format in set(DiskFormat)
            if not one.name.endswith((".log", ".iso", ".json", ".memory", ".nvram"))
        ]
        seen = image_users.look(host) if loose else None
        for one in loose:
            users = _users(seen, os.path.realpath(one.path) if host.conn.local else one.path) if seen else ()
            sizes = (one.capacity, one.allocation)
            found.append(Listed("", one.name, "", "", one.format, *sizes, one.pool, one.path, needed_by=users))
    return tuple(found)


def _users(seen: Seen, path: str) -> tuple[str, ...]:
    """Who needs a file that no VM has attached: what names it then is snapshots or saved states."""
    named = [f"snapshots of {vm}" for vm in sorted(seen.named.get(path, ()))]
    return (*named, *sorted(image_users.leaf(one) for one in seen.volumes.get(path, ())))


def _sizes(host: Host, vm: str, disk: DiskDevice) -> tuple[int, int]:
    try:
        told = disks.sizes(host.conn, vm, disk.target)
    except VmctlError:
        return 0, 0  # a stopped VM's disk on a network: nobody has it open to tell
    return told.capacity, told.allocation


@dataclass(frozen=True, slots=True)
class Shown:
    """All about one disk. ``chain`` is empty where vmctl cannot read it; ``why`` says then why not."""

    name: str
    vm: str
    path: str
    pool: str
    volume: str
    disk: DiskDevice | None
    chain: Chain
    why: str
    users: tuple[str, ...]
    leases: str


def show(host: Host, text: str) -> Shown:
    """Everything about a disk. Raises NotFound."""
    found = locate(host, text)
    chain, why = Chain(()), ""
    if not host.conn.local or not Path(found.path).is_file():
        why = "it is no file of this machine"
    else:
        try:
            chain = disk_chain.read(found.path, found.format, folders(host), doing=f"read {text}")
        except VmctlError as error:
            why = error.message
    wanted = disk_guard.key(found.path, local=host.conn.local) if found.path else ""
    users = []
    for vm, _, devices in disks.all_disks(host.conn):
        here = [use for use in disk_guard.uses(vm, devices, local=host.conn.local) if use.key == wanted]
        users += [f"{vm} ({'writes' if use.writes else 'reads'})" for use in here]
    return Shown(
        found.ref, found.owner, found.path, found.pool, found.volume, found.disk, chain, why, tuple(users), leases(host)
    )


def leases(host: Host) -> str:
    """Which lock manager libvirt uses for disks, as far as can be read here; "" where it cannot."""
    path = Path.home() / ".config/libvirt/qemu.conf" if host.conn.session else Path("/etc/libvirt/qemu.conf")
    if not host.conn.local:
        return ""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition("=")
        if name.strip() == "lock_manager":
            return {"lockd": "virtlockd", "sanlock": "sanlock"}.get(value.split("#")[0].strip().strip('"'), "")
    return "none"


@dataclass(frozen=True, slots=True)
class Made:
    """A volume that was made, or with a dry run would be."""

    pool: str
    volume: str
    path: str
    format: str
    capacity: int
    backing: str = ""


def plan_create(host: Host, text: str, size: int | None, form: DiskFormat | None, backing: str) -> Made:
    """What creating would make. ``form`` None: qcow2 where the pool has files. Raises SpecError, Conflict, NotFound."""
    ref = parse_ref(text, host.settings.pool)
    if not ref.volume:
        raise SpecError(f"cannot create disk {text}: it is not VOLUME or POOL/VOLUME")
    _require_for_disks(host, ref.pool)
    kind = pools.pool(host.conn, ref.pool).type
    named = next((one for one in DiskFormat if ref.volume.endswith(f".{one}")), None) if kind in _OF_FILES else None
    form = form or named or (DiskFormat.QCOW2 if kind in _OF_FILES else DiskFormat.RAW)
    if "." not in ref.volume and kind in _OF_FILES:
        ref = Ref(pool=ref.pool, volume=f"{ref.volume}.{form}")
    below = locate(host, backing) if backing else None
    found = [problem] if (problem := name_problem(ref.volume)) else []
    if named not in {None, form}:
        found.append(f"its name says that it is {named}, and not {form}")
    if form is not DiskFormat.RAW and kind not in _OF_FILES:
        found.append(f"what is in a pool of type {kind} is raw")
    if size is None and below is None:
        found.append("it needs a size")
    if below is not None and form is not DiskFormat.QCOW2:
        found.append("only qcow2 can be based on another disk")
    if below is not None and below.disk is not None and not below.disk.readonly:
        found.append(f"VM {below.owner} writes to {backing}: from then on the new one would be wrong")
    if found:
        raise SpecError(f"cannot create disk {text}", problems=found)
    capacity = 0
    if below is not None:
        chain = disk_chain.read(below.path, below.format, folders(host), doing=f"base a disk on {backing}")
        capacity = chain.top.virtual_size
        if size is not None and size < capacity:
            raise SpecError(f"cannot create disk {text}: it would be smaller than {backing}, {capacity} bytes")
    folder = storage.pool_path(host.conn, ref.pool) or ref.pool
    if ref.volume in storage.volume_names(host.conn, ref.pool):
        raise Conflict(f"cannot create disk {text}: pool {ref.pool} has a volume {ref.volume} already")
    return Made(ref.pool, ref.volume, f"{folder}/{ref.volume}", form, size or capacity, below.path if below else "")


def create(host: Host, text: str, size: int | None, form: DiskFormat | None, backing: str, report: Reporter) -> Made:
    """Make an empty volume, or one based on another disk. libvirt takes back what it cannot finish."""
    if parse_ref(text, host.settings.pool).pool == host.settings.pool:
        ensure_pools(host)
    staying = disk_guard.unclaimed(host, locate(host, backing).path) if backing else nullcontext()
    with held(host.folders.runtime, f"new disk {text} on {host.lock_scope}", timeout_s=30.0), staying:
        made = plan_create(host, text, size, form, backing)
        below = locate(host, backing) if backing else None
        view = render.VolumeView(
            made.volume,
            made.capacity,
            made.format,
            backing=made.backing,
            backing_format=below.format if below else "qcow2",
        )
        try:
            storage.create_volume(host.conn, made.pool, render.volume(view), name=made.volume)
        except WrongState:
            if storage.pool_exists(host.conn, made.pool):  # and runs: another host that sees it may have made the file
                storage.refresh(host.conn, made.pool)
                plan_create(host, text, size, form, backing)
            raise
        except HypervisorError as error:
            error.hint = (
                error.hint or f"has pool {made.pool} room, and may it be written to? vmctl disk pool show {made.pool}"
            )
            raise
    report(Step(f"disk {made.pool}/{made.volume} is made"))
    return made


def deletable(host: Host, text: str, report: Reporter) -> Located:
    """The disk that deleting would destroy. Raises Conflict while anyone needs it, also on other hosts that see it."""
    found = locate(host, text, anything=True)
    if found.vm is not None:
        raise Conflict(
            f"cannot delete disk {text}: VM {found.owner} has it as {found.target}",
            hint=f"vmctl disk detach {found.owner}:{found.target}",
        )
    if not found.volume:
        raise NotFound(f"cannot delete disk {text}: it is in no storage pool")
    if found.volume in identity.moved(storage.volume_names(host.conn, found.pool)):
        raise Conflict(
            f"cannot delete disk {text}: its VM went to another host, which sees the same storage",
            hint="vmctl -c HOST delete NAME, there",
        )
    require_idle(host, found, "delete")
    require_no_overlays(host, found, "delete")
    require_not_elsewhere(host, found, "delete", report)
    return found


def delete(host: Host, text: str, report: Reporter) -> None:
    """Delete a volume that no VM has attached and no disk is based on."""
    with disk_guard.unclaimed(host, locate(host, text, anything=True).path):
        found = deletable(host, text, report)
        storage.delete_volume(host.conn, found.pool, found.volume)
    report(Step(f"disk {found.pool}/{found.volume} is deleted"))


def _require_for_disks(host: Host, pool: str) -> None:
    if pool == host.settings.image_pool:
        raise SpecError(
            f"cannot use pool {pool} for a disk: images are in it, and nothing else",
            hint=f"{host.settings.pool} is for disks; vmctl disk pool list shows all there are",
        )


def pool_folder(host: Host, pool: str) -> str:
    """The folder of an active pool of files, for a disk. Raises SpecError for other kinds, and for that of images."""
    _require_for_disks(host, pool)
    facts = pools.pool(host.conn, pool)
    if not facts.active or facts.type not in _OF_FILES:
        raise SpecError(f"cannot use pool {pool}: it is {facts.type}, {'active' if facts.active else 'not active'}")
    return facts.path
