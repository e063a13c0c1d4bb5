"""The files a VM needs: which of them two hosts share, and what the target must be given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from enum import StrEnum

from vmctl import disk_xml, folder_pools, host_ssh, images
from vmctl.disk_xml import DiskDevice
from vmctl.errors import NotFound, VmctlError
from vmctl.folder_pools import Folder, shown
from vmctl.hosts import Host
from vmctl.hypervisor import disks, storage
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.folders import PASSING
from vmctl.hypervisor.migration import Copying
from vmctl.hypervisor.storage import VolumeFacts
from vmctl.migrate_problems import DiskNeed, PoolNeed

_DIGEST_S = 3600.0
MARK = ".migrating"  # the name of a file that is being made, with this after it, is a file as long as it is not whole


class Role(StrEnum):
    """What a file is to the VM."""

    DISK = "disk"
    READONLY = "read-only disk"
    BASE = "base image"
    KERNEL = "kernel"
    INITRD = "initrd"
    NVRAM = "UEFI variables"
    LOG = "console log"


@dataclass(frozen=True, slots=True)
class File:
    """One file. Bytes: ``capacity`` as the guest sees it, ``size`` of the file. ``target`` of a disk, for libvirt.

    ``later``: a running VM gets it at its next start, or what is based on it; libvirt sends nothing of it. ``missing``:
    it is named, and not there.
    """

    role: Role
    path: str
    target: str = ""
    format: str = "raw"
    capacity: int = 0
    size: int = 0
    backing: str = ""
    cache: str = "default"
    network: bool = False
    later: bool = False
    missing: bool = False

    @property
    def folder(self) -> str:
        """Where it lies."""
        return self.path.rpartition("/")[0]

    @property
    def leaf(self) -> str:
        """Its name there."""
        return self.path.rpartition("/")[2]

    @property
    def told(self) -> str:
        """What to call it."""
        return f"{self.role} {self.target}" if self.target and self.role is not Role.BASE else str(self.role)


_LOOKED_FOR = frozenset({Role.DISK, Role.READONLY, Role.BASE})  # in any folder of the host's


def nvram(vm: Domain) -> str:
    """Where its UEFI variables are, "" without; libvirt chooses a place by the name where the definition names none."""
    chosen = f"/var/lib/libvirt/qemu/nvram/{vm.name}_VARS.fd" if vm.facts.firmware != "bios" else ""
    return vm.facts.nvram or chosen


def files(host: Host, vm: Domain) -> tuple[File, ...]:
    """All that the VM needs, each once; what others are based on comes before them."""
    wanted = _disks(host, vm)
    with ExitStack() as looks:
        return _files(host, vm, wanted, _known(host, vm, wanted, looks))


def _known(
    host: Host, vm: Domain, named: Sequence[tuple[DiskDevice, bool]], looks: ExitStack
) -> dict[str, VolumeFacts]:
    """The volumes of all pools by path, and what lies in the folders of the VM's disks that are no pools.

    Those are shown as pools until ``looks`` is closed: without, not even the size of a disk is known.
    """
    known = {one.path: one for one in storage.all_volumes(host.conn) if not one.pool.startswith(PASSING)}
    wanted = {disk.source for disk, _ in named} | {nvram(vm)}
    looked: set[str] = {"", "/dev"}
    while folders := {path.rpartition("/")[0] for path in wanted if path[:1] == "/" and path not in known} - looked:
        looked |= folders
        for folder in folders:
            with suppress(NotFound):
                pool = looks.enter_context(shown(host, folder))
                known |= {one.path: one for one in storage.volumes(host.conn, pool)}
        wanted |= {known[path].backing for path in wanted if path in known}
    return known


def _disks(host: Host, vm: Domain) -> list[tuple[DiskDevice, bool]]:
    """The VM's disks, those of a running one as it runs; and whether it gets them only at its next start."""
    now = disk_xml.read(vm.xml)
    there = {disk.source for disk in now}
    then = disks.disks(host.conn, vm.name, inactive=True) if vm.active and vm.persistent else ()
    return [*((disk, False) for disk in now), *((disk, True) for disk in then if disk.source not in there)]


def _files(
    host: Host, vm: Domain, named: Sequence[tuple[DiskDevice, bool]], known: Mapping[str, VolumeFacts]
) -> tuple[File, ...]:
    paths = {f"{one.pool}/{one.name}": one.path for one in known.values()}
    found: dict[str, File] = {}
    for disk, later in named:
        source = paths.get(disk.source, disk.source)
        if not source or (later and source in found):
            continue
        role = Role.READONLY if disk.readonly or disk.device == "cdrom" else Role.DISK
        if not source.startswith("/"):
            found[source] = File(role, source, disk.target, network=True)
            continue
        plain = File(role, source, disk.target, disk.format, cache=disk.cache, later=later)
        top = _file(host, known.get(source), plain)
        for below in reversed(_below(host, top, known, disk.backing)):
            if later or below.path not in found:
                found[below.path] = replace(below, later=later)
        found[source] = top
    folders = {one.rpartition("/")[0] for one in known}
    for role, path in ((Role.KERNEL, vm.facts.kernel), (Role.INITRD, vm.facts.initrd), (Role.NVRAM, nvram(vm))):
        if path and (role is not Role.NVRAM or path in known):  # libvirt makes those at the first start
            missing = path not in known and path.rpartition("/")[0] in folders
            found.setdefault(path, _file(host, known.get(path), File(role, path, missing=missing)))
    if vm.facts.serial_log:
        found.setdefault(vm.facts.serial_log, File(Role.LOG, vm.facts.serial_log))
    return tuple(found.values())


def _file(host: Host, volume: VolumeFacts | None, plain: File) -> File:
    if volume is None:
        return replace(plain, missing=plain.missing or (plain.role in _LOOKED_FOR and plain.folder not in {"", "/dev"}))
    try:
        size = volume.physical or storage.volume_size(host.conn, volume.pool, volume.name)
    except NotFound:
        return replace(plain, missing=True)
    form = plain.format if plain.role is Role.DISK and plain.format else volume.format
    return replace(plain, format=form, capacity=volume.capacity, size=size, backing=volume.backing)


def _below(host: Host, top: File, known: Mapping[str, VolumeFacts], told: Sequence[str]) -> list[File]:
    """The files that a disk is based on, by what pools know, else by what the running VM's XML tells."""
    found: list[File] = []
    at = top.backing
    while at and at not in {one.path for one in found}:
        found.append(_file(host, known.get(at), File(Role.BASE, at, top.target)))
        at = found[-1].backing
    return found or [File(Role.BASE, path, top.target) for path in told if path.startswith("/")]


def pools(
    source: Host, target: Host, vm: Domain, found: Iterable[File], own: Mapping[str, str]
) -> tuple[PoolNeed, ...]:
    """The pools in which the VM has files of its own, by its record, and where those of that name are on the target.

    ``own`` are the folders of vmctl's pools there, by their names; one that is not there is made.
    """
    owned = vm.facts.record.owned if vm.facts.record else ()
    paths = {one.path for one in found}
    needs = []
    for name in dict.fromkeys(one.pool for one in owned):
        path = storage.running_path(source.conn, name)
        if not paths & {f"{path}/{one.volume}" for one in owned if one.pool == name}:
            continue
        there = own.get(name) or storage.running_path(target.conn, name)
        needs.append(PoolNeed(name, path, there))
    return tuple(needs)


def left_below(source: Host, vm: Domain, found: Sequence[File]) -> tuple[File, ...]:
    """What the disks of a VM that has moved are based on at its old host and no more where it is: they went whole.

    ``found`` are its files as they are now. Only its own, by its record, are told; what others are based on first.
    """
    own = {(one.pool, one.volume) for one in vm.facts.record.owned} if vm.facts.record else set()
    now = {one.path for one in found}
    volumes = {one.path: one for one in storage.all_volumes(source.conn)}
    left: dict[str, File] = {}
    for disk in found:
        if disk.path in volumes:
            for one in reversed(_below(source, replace(disk, backing=volumes[disk.path].backing), volumes, ())):
                known = volumes.get(one.path)
                if known is not None and (known.pool, known.name) in own and one.path not in now:
                    left.setdefault(one.path, one)
    return tuple(left.values())


def own_disks(left: Iterable[File], kept: Set[str], ours: Set[str], same: Set[str]) -> tuple[str, ...]:
    """The disks that a left definition has to itself: there, and not the one of its name that the VM has. Pure.

    ``kept``: the paths of what the VM has, where it stays; ``ours``: of what bears the mark of a move; ``same``: the
    folders in which a name means what it means there.
    """
    disks = (one for one in left if one.role is Role.DISK and not one.missing and one.path not in ours)
    return tuple(one.path for one in disks if one.path not in kept or not (one.network or one.folder in same))


# --- what the target has -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Make:
    """A file the target is given: with the source's bytes, or ``empty``, for libvirt to fill."""

    file: File
    empty: bool
    backing: str = ""
    backing_format: str = "qcow2"


@dataclass(frozen=True, slots=True)
class Look:
    """What was found: each file with what stands against it, and what is to be made.

    ``leavings``: what libvirt makes there by itself, and leaves when it fails; ``obsolete``: paths of what it makes
    there anew, with the same content, and leaves here.
    """

    needs: tuple[DiskNeed, ...]
    makes: tuple[Make, ...]
    shared: bool
    space: Mapping[str, int]
    leavings: tuple[File, ...] = ()
    obsolete: tuple[str, ...] = ()

    @property
    def disks(self) -> tuple[str, ...]:
        """The disks that libvirt fills."""
        return tuple(one.file.target for one in self.makes if one.empty)


def look(
    source: Host,
    target: Host,
    found: Sequence[File],
    in_use: Mapping[str, tuple[str, ...]],
    own: Set[str],
    *,
    live: bool,
    copying: Copying,
) -> Look:
    """Compare. Changes nothing but for tokens and pools that are gone again. ``own``: folders that vmctl makes."""
    local = [one for one in found if not one.network]
    folders = folder_pools.compared(source, target, (one.folder for one in local))
    both = {path for path, one in folders.items() if one.shared}
    needs: list[DiskNeed] = []
    makes: list[Make] = []
    leavings: list[File] = []
    obsolete: list[str] = []
    for one in found:
        if one.missing:
            below = one.target if one.role is Role.BASE else ""
            needs.append(DiskNeed(one.told, one.path, False, missing=True, later=one.later, below=below))
            continue
        if one.network or one.folder in both:
            users = in_use.get(one.path, ()) if one.role is Role.DISK else ()
            needs.append(DiskNeed(one.told, one.path, True, cache=one.cache, network=one.network, users=users))
            continue
        there = folders[one.folder]
        if one.role in {Role.LOG, Role.NVRAM} and live and not _has(there, one):
            leavings.append(one)
        if copying is not Copying.NONE:
            needs.append(_judged(source, target, one, there, own, live=live, copying=copying, makes=makes))
            if makes and makes[-1].file is one and makes[-1].backing:
                base = next((below.format for below in found if below.path == one.backing), "qcow2")
                makes[-1] = replace(makes[-1], backing_format=base)
        elif one.role is Role.LOG or (one.role is Role.NVRAM and live):
            obsolete.append(one.path)
        else:
            needs.append(DiskNeed(one.told, one.path, False, cache=one.cache))
    return Look(
        tuple(needs),
        tuple(makes),
        bool(both) or not local,
        {folder: space for one in makes if (space := folders[folder := one.file.folder].space) is not None},
        tuple(leavings),
        tuple(obsolete),
    )


def own_pools(host: Host) -> dict[str, str]:
    """The folders of vmctl's pools on a host, by their names, also of those that are yet to be made."""
    names = host.settings.pool, host.settings.image_pool
    return {name: images.pool_path(host, name) for name in names}


def in_use(target: Host) -> dict[str, tuple[str, ...]]:
    """The VMs that run on a host, by the path of each disk they have."""
    found: dict[str, tuple[str, ...]] = {}
    for vm, _, devices in disks.all_disks(target.conn, active_only=True):
        for disk in devices:
            found[disk.source] = (*found.get(disk.source, ()), vm)
    return found


def _judged(
    source: Host,
    target: Host,
    one: File,
    folder: Folder,
    own: Set[str],
    *,
    live: bool,
    copying: Copying,
    makes: list[Make],
) -> DiskNeed:
    """What must be made of a file on the target; what is, is added to ``makes``."""
    empty = one.role is Role.DISK and live and not one.later
    needless = one.role is Role.LOG or (one.role is Role.NVRAM and live)
    if one.role is Role.BASE and live and not one.later and copying is Copying.FULL:
        return DiskNeed(one.told, one.path, False, copied=True)
    missing = folder.space is None
    if needless:
        if one.role is Role.LOG and not _has(folder, one):
            makes.append(Make(one, empty=False))  # it tells that the first boot is over, too
        return DiskNeed(one.told, one.path, False, copied=True, folder_missing=missing and one.folder not in own)
    if _has(folder, one):
        same = not empty and _size(target, one) == one.size and digest(source, one) == digest(target, one)
        why = "" if same else "another file is"
        return DiskNeed(one.told, one.path, False, copied=True, in_the_way=why)
    backing = one.backing if copying is Copying.OVERLAY or not live or one.later else ""
    makes.append(Make(one, empty, backing))
    need = one.size if not empty else (one.capacity if copying is Copying.FULL else one.size)
    return DiskNeed(
        one.told, one.path, False, copied=True, space=need, folder_missing=missing and one.folder not in own
    )


def _has(folder: Folder, one: File) -> bool:
    """Whether a file of that name is there; a half made one is none."""
    return one.leaf in folder.names and one.leaf + MARK not in folder.names


def _size(host: Host, one: File) -> int | None:
    """The length of a file; None of one that has just gone."""
    try:
        with shown(host, one.folder) as pool:
            return storage.volume_size(host.conn, pool, one.leaf)
    except NotFound:
        return None


def digest(host: Host, one: File) -> str:
    """The SHA-256 of a file on a host: worked out there where SSH leads there, else of what libvirt sends."""
    if host.entry is not None and host_ssh.by_ssh(host.entry.uri):
        try:
            said = host_ssh.run(host.entry, host.folders.runtime, "sha256sum", "--", one.path, timeout_s=_DIGEST_S)
        except VmctlError:
            said = None
        if said is not None and said.code == 0:
            return said.out.split()[0].lstrip("\\")
    with shown(host, one.folder) as pool:
        storage.refresh(host.conn, pool)
        return storage.sha256(host.conn, pool, one.leaf)
