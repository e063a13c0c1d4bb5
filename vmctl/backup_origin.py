"""What a backup would be restored to: worked out, looked at for what it would lose and reach; nothing done."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from vmctl import (
    backup_definition,
    backup_store,
    disk_find,
    domain_xml,
    identity,
    image_users,
    images,
    resolve,
    spec,
)
from vmctl.backup_manifest import Manifest, StoredDisk, StoredFile
from vmctl.backup_store import Shelf
from vmctl.domain_xml import DomainFacts
from vmctl.errors import Conflict, ImageError, SpecError, Unsupported, WrongState
from vmctl.events import Reporter
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, pools, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.record import Owned

_MACS_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Wish:
    """How a backup shall be restored. ``name`` "": under its own; ``pool`` "": the one for disks.

    ``new_identity``: its guest gets a new host name, host key and machine-id at its next boot. ``trust``: its
    definition may reach what it names of this host.
    """

    point: str = "latest"
    name: str = ""
    pool: str = ""
    new_identity: bool = False
    trust: bool = False


@dataclass(frozen=True, slots=True)
class Volume:
    """A file of the restored VM that will be made: from a disk or a file of the backup."""

    volume: str
    path: str
    format: str
    disk: StoredDisk | None = None
    file: StoredFile | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A restore worked out, nothing done yet. ``old``: the VM that it overwrites; ``text``: the backup's definition.

    ``gone``: its files that go with what it was.
    """

    manifest: Manifest
    name: str
    uuid: str
    pool: str
    old: Domain | None
    text: str
    facts: DomainFacts
    volumes: tuple[Volume, ...]
    log: str
    lost: tuple[str, ...]
    gone: tuple[str, ...] = ()

    @property
    def touches(self) -> tuple[str, ...]:
        """What it would make and destroy, a line for each."""
        made = [f"make {one.path}" for one in self.volumes] + (
            [f"make {self.log}"] if self.log and not self.old else []
        )
        gone = [f"delete {path}" for path in self.gone]
        changed = f"{'change' if self.old else 'define'} VM {self.name}"
        return (*made, changed, *gone, *(f"lose {one}" for one in self.lost))


@dataclass(frozen=True, slots=True)
class Restored:
    """A VM that was restored, or with a dry run would be."""

    vm: str
    uuid: str
    point: str
    disks: tuple[str, ...]
    touches: tuple[str, ...]
    lost: tuple[str, ...]


def plan(host: Host, folder: Path, wish: Wish, report: Reporter) -> Plan:
    """Work out a restore; changes nothing. Raises NotFound, ImageError, SpecError, WrongState, Conflict.

    Warns of hosts that cannot be asked whether the disks that it overwrites are their VMs'.
    """
    shelf = backup_store.shelf(folder)
    manifest = shelf.point(wish.point)
    text = _definition(shelf, manifest)
    facts = domain_xml.parse(text)
    name = wish.name or manifest.vm
    if found := spec.name_problems(name):
        raise SpecError(f"cannot restore VM {name}", problems=found)
    old = _old(host, manifest, name, wish, report)
    taken = {uuid for other, uuid in domain.identities(host.conn) if other != name}
    fresh = bool(wish.name and wish.name != manifest.vm) or wish.new_identity or manifest.uuid in taken
    if old is None and not fresh:
        fresh = identity.is_elsewhere(host, name, manifest.uuid, manifest.host, report)
    uuid = old.uuid if old else identity.free_uuid(host, name, [manifest.uuid]) if fresh else manifest.uuid
    pool = wish.pool or host.settings.pool
    where = images.pool_path(host, pool) if pool == host.settings.pool else _folder(host, pool)
    if not where:
        raise SpecError(f"cannot restore into pool {pool}: it has no folder")
    prefix = resolve.volume_prefix(name, uuid)
    taken_by = _Taken(host, pool, where)
    volumes = _volumes(host, manifest, prefix, taken_by)
    if not wish.trust:
        _require_harmless(host, text, manifest, volumes, old)
    if wish.new_identity and (facts.record is None or facts.record.ssh is None):
        raise Unsupported(f"cannot renew the identity of VM {name}: vmctl did not make it, so no seed tells it of one")
    log = ""
    if facts.record is not None and facts.record.console_log is not None:
        log = old.facts.serial_log if old else f"{where}/{_free(taken_by, f'{prefix}-console', '.log')}"
    gone = _gone(host, old, manifest, text) if old else ()
    return Plan(manifest, name, uuid, pool, old, text, facts, volumes, log, _lost(host, old, manifest), gone)


def old_files(host: Host, old: Domain) -> dict[Owned, str]:
    """What the old VM owns beside its disks and its log, as its seed, with the path of each."""
    if old.facts.record is None:
        return {}
    kept = {disk.source for disk in old.facts.disks if not disk.readonly} | {old.facts.serial_log}
    owned = [one for one in old.facts.record.owned if one != old.facts.record.console_log]
    paths = {one: f"{pools.pool(host.conn, one.pool).path}/{one.volume}" for one in owned}
    return {one: path for one, path in paths.items() if path not in kept}


def _gone(host: Host, old: Domain, manifest: Manifest, text: str) -> tuple[str, ...]:
    """The files of the old VM that nobody names any more then: its disks, its seed, its UEFI variables."""
    now = disks.disks(host.conn, old.name, inactive=True)
    found = [disk.source for disk in now if manifest.disk(disk.target) is not None]
    anew = {file.source for file in manifest.files if file.role != "boot"}  # restored beside it, under another name
    needed = image_users.needed(host)
    mine = old_files(host, old)
    ours = {old.name, *mine.values(), *found}
    free = [path for path in mine.values() if path in anew or path not in text]
    found += [path for path in free if not needed.by(path, but=ours)]
    nvram = old.facts.nvram
    return (*found, *([nvram] if nvram and (nvram in anew or nvram not in text) and host.conn.local else ()))


def _definition(shelf: Shelf, manifest: Manifest) -> str:
    stored = manifest.file("domain")
    if stored is None or stored.size > 4 << 20:
        raise ImageError(f"cannot use backup {manifest.id}: it holds no definition of its VM")
    path = shelf.folder / manifest.id / stored.file
    text = backup_store.proved(path, stored.size, stored.sha256).decode(errors="replace")
    backup_definition.require_same(text, manifest.vm, manifest.uuid)
    return text


def _old(host: Host, manifest: Manifest, name: str, wish: Wish, report: Reporter) -> Domain | None:
    """The VM that will be overwritten; None for a name that is free."""
    old = domain.find_or_none(host.conn, name)
    if old is None:
        return None
    if wish.name and wish.name != manifest.vm:
        raise Conflict(f"cannot restore VM {name}: there is one of that name already", hint="--as ANOTHER")
    if old.uuid != manifest.uuid:
        raise Conflict(
            f"cannot restore VM {name}: the one of that name here is not the one that was backed up",
            hint="--as NEWNAME restores it beside that one",
        )
    if wish.new_identity:
        raise SpecError(f"cannot restore VM {name} over the old one with a new identity", hint="--as NEWNAME")
    if old.active:
        raise WrongState(f"cannot restore VM {name}: it is {old.state}", hint=f"vmctl stop {name}, or --as NEWNAME")
    if disks.has_snapshots(host.conn, name):
        raise Conflict(f"cannot restore VM {name}: it has snapshots, which name its files", hint="delete them first")
    for disk in disks.disks(host.conn, name, inactive=True):
        if manifest.disk(disk.target) is not None:
            found = disk_find.locate(host, f"{name}:{disk.target}")
            disk_find.require_no_overlays(host, found, "overwrite")
            disk_find.require_not_elsewhere(host, found, "overwrite", report)
    return old


def _lost(host: Host, old: Domain | None, manifest: Manifest) -> tuple[str, ...]:
    if old is None:
        return ()
    lines = []
    for disk in disks.disks(host.conn, old.name, inactive=True):
        if manifest.disk(disk.target) is not None:
            lines.append(f"what VM {old.name} wrote to disk {disk.target} since {manifest.created}: {disk.source}")
        elif disk.source and not disk.readonly:
            lines.append(f"disk {disk.target} as a part of VM {old.name}; its file stays: {disk.source}")
    if old.state is State.SAVED:
        lines.append(f"the saved memory of VM {old.name}")
    return (*lines, f"the definition of VM {old.name} as it is now")


def _folder(host: Host, pool: str) -> str:
    found = pools.pool(host.conn, pool)
    if not found.active:
        raise WrongState(f"cannot restore into pool {pool}: it is not active", hint=f"virsh pool-start {pool}")
    return found.path


class _Taken:
    """Which names in a folder VMs or disks have, on this host or another that sees it."""

    def __init__(self, host: Host, pool: str, folder: str) -> None:
        self.host, self.folder = host, folder
        self.known: set[str] = set()
        if storage.pool_exists(host.conn, pool):
            storage.refresh(host.conn, pool)  # another host may have put files there
            self.known = set(storage.volume_names(host.conn, pool))
        self.used = {source for _, _, found in disks.all_disks(host.conn) for source in (one.source for one in found)}
        self.needed: image_users.Needed | None = None

    def __call__(self, name: str) -> bool:
        path = f"{self.folder}/{name}"
        if name not in self.known and not (self.host.conn.local and Path(path).exists()):
            return False
        if path in self.used:
            return True
        self.needed = self.needed or image_users.needed(self.host)
        return bool(self.needed.by(path, os.path.realpath(path))) or self._elsewhere(path)

    def _elsewhere(self, path: str) -> bool:
        """Whether a VM of another host needs it, or may: of one that cannot be asked nobody knows."""
        if not self.host.others:
            return False
        from vmctl import elsewhere  # late: most know one host

        found = elsewhere.look(self.host, [path])
        return bool(found.users or found.unasked)


def _free(taken: _Taken, stem: str, suffix: str) -> str:
    """The first of the names that nobody has.

    A file of such a name that nobody needs was left by a restore that was killed, and is written anew. No VM need
    have it for others to need it: what was restored may have been cloned since, and deleted.
    """
    names = (f"{stem}{n}{suffix}" for n in ("", *(f"-{n}" for n in range(2, 100))))
    return next(one for one in names if not taken(one))


def _volumes(host: Host, manifest: Manifest, prefix: str, taken: _Taken) -> tuple[Volume, ...]:
    """The files that the restored VM gets, under names nobody has."""
    found: list[Volume] = []

    def add(stem: str, form: str, suffix: str, disk: StoredDisk | None, file: StoredFile | None) -> None:
        name = _free(taken, f"{prefix}-{stem}-{manifest.id}", suffix)
        found.append(Volume(name, f"{taken.folder}/{name}", form, disk, file))

    for disk in manifest.disks:
        add(disk.target, disk.format, f".{disk.format}", disk, None)
    for number, file in enumerate(manifest.files):
        if file.role == "nvram":
            add("nvram", "raw", "_VARS.fd", None, file)
        elif file.role == "volume" or (file.role == "boot" and not _there(host, file)):
            # By that ending a seed is known, which clones and forks get one of their own instead of.
            suffix = "-seed.iso" if file.source.endswith("-seed.iso") else Path(file.source).suffix or ".raw"
            add(f"{file.role}{number}", "raw", suffix, None, file)
    return tuple(found)


def _there(host: Host, file: StoredFile) -> bool:
    """Whether the host has a kernel or initial ramdisk already, at its old place."""
    if host.conn.local:
        path = Path(file.source)
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    where = pools.pool_of_path(host.conn, file.source)
    return where is not None and storage.volume(host.conn, *where).capacity == file.size


def _require_harmless(
    host: Host, text: str, manifest: Manifest, volumes: tuple[Volume, ...], old: Domain | None
) -> None:
    """Raise SpecError for a definition that reaches more of the host than the VM there does now."""
    restored = {one.file.source for one in volumes if one.file} | {f.source for f in manifest.files if f.role == "boot"}
    facts = domain_xml.parse(text)
    restored |= {disk.source for disk in facts.disks if manifest.disk(disk.target)} | {facts.serial_log, facts.nvram}
    folders, emulator = storage.folders(host.conn), str(host.facts.emulator)
    found = backup_definition.reaches(text, restored, folders, emulator)
    twin = old or next(
        (domain.find(host.conn, name) for name, uuid in domain.identities(host.conn) if uuid == manifest.uuid), None
    )
    if found and twin is not None:
        now = domain.xml(host.conn, twin.name, inactive=True)
        found -= backup_definition.reaches(now, restored, folders, emulator)
    if found:
        raise SpecError(
            f"cannot restore VM {manifest.vm}: its definition reaches of this host {'; '.join(sorted(found))}",
            hint="--trust-definition, if the backup comes from hands you trust",
        )
