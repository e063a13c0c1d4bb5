"""Restoring a VM from a backup: over the old one, or beside it under a new name, here or on another host.

Disks become new files, which name no file of the backup; the definition names them in one step. Until then all is as
before, and after it the old files go (disk_journal.py), whoever dies between.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from vmctl import (
    backup_definition,
    backup_marks,
    backup_origin,
    backup_read,
    backup_store,
    backup_volumes,
    disk_journal,
    forgotten,
    identity,
    image_users,
    images,
    networks,
    render,
    resolve,
    seed,
)
from vmctl.backup_definition import Changes
from vmctl.backup_manifest import Manifest, StoredDisk
from vmctl.backup_origin import Plan, Restored, Volume, Wish
from vmctl.backup_read import Layer
from vmctl.backup_store import Shelf
from vmctl.disk_journal import Entry
from vmctl.errors import Conflict, quietly
from vmctl.events import Reporter
from vmctl.guest import known_hosts, private_key
from vmctl.hosts import Host, holding
from vmctl.hypervisor import backup, disks, domain, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.locks import held
from vmctl.record import Owned, Record, with_homes_of

_MACS_TIMEOUT_S = 60.0


def restore(host: Host, folder: Path, wish: Wish, report: Reporter, *, start: bool = False) -> Restored:
    """Restore a VM; each cluster is proved on the way. Failing or interrupted, it leaves all as it was."""
    name = wish.name or folder.name
    with backup_store.locked(folder, shared=True), holding(host, name):
        if not wish.pool:
            images.ensure_pools(host)
        if host.conn.local:
            disk_journal.settle(host, name, report)
        planned = backup_origin.plan(host, folder, wish, report)
        if planned.old is not None:
            forgotten.require_none(host, name, planned.old.uuid, f"restore VM {name}")
            backup_marks.settle(host, planned.old, report)
        shelf = backup_store.shelf(folder)
        parts = {disk.target: _proved(shelf, planned.manifest, disk) for disk in planned.manifest.disks}
        with backup_store.telling_os_errors(f"restore VM {name}"):
            _do(host, shelf, planned, wish, parts, report)
    if start:
        from vmctl import lifecycle  # late: only where asked

        lifecycle.start(host, name, report)
    return told(planned, start=start)


def told(planned: Plan, *, start: bool) -> Restored:
    """A plan as a result."""
    paths = tuple(one.path for one in planned.volumes if one.disk)
    touches = planned.touches + ((f"start VM {planned.name}",) if start else ())
    return Restored(planned.name, planned.uuid, planned.manifest.id, paths, touches, planned.lost)


def _proved(shelf: Shelf, manifest: Manifest, disk: StoredDisk) -> tuple[Layer, ...]:
    parts = backup_read.layers(shelf, manifest.id, disk.target)
    backup_read.require_recorded(parts, disk, manifest.id)
    return parts


def _do(
    host: Host, shelf: Shelf, planned: Plan, wish: Wish, parts: dict[str, tuple[Layer, ...]], report: Reporter
) -> None:
    old = planned.old
    sources = {one.target: one.source for one in disks.disks(host.conn, old.name, inactive=True)} if old else {}
    with ExitStack() as undo:
        undo.callback(disk_journal.settle, host, planned.name, report)
        if old is None and host.conn.local:
            for new in _paths(planned):
                disk_journal.begin(host, Entry(host.conn.uri, planned.name, "", "", new, ""))
        elif old is not None:
            for one in planned.volumes:
                if one.disk is not None and one.disk.target in sources:
                    entry = Entry(
                        host.conn.uri, planned.name, one.disk.target, sources[one.disk.target], one.path, one.format
                    )
                    disk_journal.begin(host, entry)
        for one in planned.volumes:
            undo.callback(quietly, lambda one=one: _unmake(host, planned, one))  # type: ignore[misc]
            if one.disk is not None:
                backup_volumes.disk(
                    host, shelf.folder, planned.pool, one.volume, one.path, one.disk, parts[one.disk.target], report
                )
            elif one.file is not None:
                path = shelf.folder / planned.manifest.id / one.file.file
                data = backup_store.proved(path, one.file.size, one.file.sha256)
                backup_volumes.file(host, planned.pool, one.volume, data)
        changes, owned = _changes(host, planned)
        if old is None and planned.log:
            backup_volumes.file(host, planned.pool, Path(planned.log).name, b"", undo=undo)
        _define(host, planned, wish, changes, owned, report, undo)
        undo.pop_all()
    if old is not None:
        for name in backup_marks.ours(backup.checkpoints(host.conn, planned.name)):
            backup.delete_checkpoint(host.conn, planned.name, name, metadata_only=True)
    disk_journal.settle(host, planned.name, report)
    if old is not None:
        _clear_old(host, planned, old)
        if old.state is State.SAVED:
            domain.drop_saved(host.conn, planned.name)


def _paths(planned: Plan) -> tuple[str, ...]:
    """The files that a VM which is not there yet would get."""
    folder = Path(planned.volumes[0].path).parent
    prefix = resolve.volume_prefix(planned.name, planned.uuid)
    found = [*(one.path for one in planned.volumes), str(folder / f"{prefix}-seed.iso"), planned.log]
    return tuple(dict.fromkeys(one for one in found if one))


def _clear_old(host: Host, planned: Plan, old: Domain) -> None:
    """Delete what of the old VM's own files is neither a disk nor named by the new definition: seed, UEFI variables.

    What clones and forks of it are based on stays, its own still, and goes with the last of them.
    """
    text = domain.xml(host.conn, planned.name, inactive=True)
    files = {one: path for one, path in backup_origin.old_files(host, old).items() if path not in text}
    needed = image_users.needed(host) if files else image_users.Needed({})
    gone: list[Owned] = []
    while free := [
        one for one, path in files.items() if one not in gone and not needed.by(path, but=[files[it] for it in gone])
    ]:
        for one in free:
            storage.delete_volume(host.conn, one.pool, one.volume)
        gone += free
    record = domain.find(host.conn, planned.name).facts.record
    if gone and record is not None:
        owned = tuple(one for one in record.owned if one not in gone)
        domain.set_record(host.conn, planned.name, render.metadata(replace(record, owned=owned)))
    if old.facts.nvram and old.facts.nvram not in text and host.conn.local:
        Path(old.facts.nvram).unlink(missing_ok=True)


def _unmake(host: Host, planned: Plan, one: Volume) -> None:
    """Delete a volume, unless the VM was defined with it after all."""
    vm = domain.find_or_none(host.conn, planned.name)
    if vm is None or one.path not in domain.xml(host.conn, planned.name, inactive=True):
        storage.refresh(host.conn, planned.pool)
        storage.delete_volume(host.conn, planned.pool, one.volume)


def _changes(host: Host, planned: Plan) -> tuple[Changes, tuple[Owned, ...]]:
    """What changes of the definition, and the volumes the VM owns then."""
    paths = {one.file.source: one.path for one in planned.volumes if one.file}
    if planned.log and planned.facts.serial_log:
        paths[planned.facts.serial_log] = planned.log
    targets = {one.disk.target: (one.path, one.format) for one in planned.volumes if one.disk}
    owned = tuple(
        Owned(planned.pool, one.volume) for one in planned.volumes if one.file is None or one.file.role != "nvram"
    )
    if planned.old:  # it owns them until they are deleted
        owned += tuple(backup_origin.old_files(host, planned.old))
    if planned.log:
        log = planned.old.facts.record.console_log if planned.old and planned.old.facts.record else None
        owned += (log or Owned(planned.pool, Path(planned.log).name),)
    return Changes(planned.name, planned.uuid, targets, paths), owned


def _record(planned: Plan, owned: tuple[Owned, ...]) -> Record | None:
    record = planned.facts.record
    if record is None:
        return None
    log = owned[-1] if planned.log else None
    return replace(record, owned=owned, console_log=log, creating=False)


def _define(
    host: Host,
    planned: Plan,
    wish: Wish,
    changes: Changes,
    owned: tuple[Owned, ...],
    report: Reporter,
    undo: ExitStack,
) -> None:
    net = host.settings.network
    if any(nic.source == net for nic in planned.facts.nics):
        networks.ensure(host, report)
    record = _record(planned, owned)
    with held(host.folders.runtime, f"MACs on {host.lock_scope}", timeout_s=_MACS_TIMEOUT_S):
        macs = _macs(host, planned)
        if wish.new_identity and record is not None:
            record, path = _new_identity(host, planned, record, undo)
            seeds = [one for one in planned.volumes if one.file and one.volume.endswith(".iso")]
            changes = replace(changes, seed=path) if not seeds else changes
        changes = replace(changes, macs=macs, record=render.record_element(record) if record else "")
        text = backup_definition.changed(planned.text, changes)
        if planned.old is not None and domain.find(host.conn, planned.name).active:  # not by vmctl
            raise Conflict(
                f"cannot restore VM {planned.name}: it has been started meanwhile",
                hint=f"it is as it was; vmctl stop {planned.name}, or --as NEWNAME",
            )
        if planned.old is None:
            undo.callback(quietly, lambda: _undefine(host, planned))
        else:  # which hosts have it now, not when it was backed up
            text = with_homes_of(text, domain.xml(host.conn, planned.name, inactive=True))
        domain.define(host.conn, text, name=planned.name)
    known_hosts(host, planned.name).unlink(missing_ok=True)


def _undefine(host: Host, planned: Plan) -> None:
    made = domain.find_or_none(host.conn, planned.name)
    if made is not None and made.uuid == planned.uuid:
        domain.undefine(host.conn, planned.name)


def _macs(host: Host, planned: Plan) -> dict[str, str]:
    """New MACs for the cards whose own another VM has, or that the network keeps no address for."""
    taken = {mac for mac, users in networks.macs_in_use(host).items() if users - {planned.uuid}}
    known = networks.macs(host.conn.host, host.settings.network)
    away = identity.macs_away(host, known, planned.uuid)
    found: dict[str, str] = {}
    for position, nic in enumerate(planned.facts.nics):
        ours = nic.source == host.settings.network
        if planned.uuid == planned.manifest.uuid and nic.mac not in taken and (not ours or nic.mac in known):
            continue
        if ours:
            mac = networks.pick_mac(known, planned.uuid, taken, away)
        else:
            mac = resolve.mac_address(planned.uuid, position)
        taken.add(mac)
        found[nic.mac] = mac
    return found


def _new_identity(host: Host, planned: Plan, record: Record, undo: ExitStack) -> tuple[Record, str]:
    """A seed that makes the guest another machine at its next boot; the record with it, and the seed's path."""
    assert record.ssh is not None
    key = seed.new_host_key(planned.name)
    view = render.SeedView(
        instance_id=planned.uuid,
        hostname=planned.name,
        ssh_keys=seed.authorized_keys(private_key(host), Path.home()),
        host_key_private=key.private,
        host_key_public=key.public,
        user=record.ssh.user if record.ssh.user != "root" else "",
    )
    data = seed.build_iso({"user-data": render.user_data(view), "meta-data": render.meta_data(view)})
    seeds = [one for one in planned.volumes if one.file and one.volume.endswith(".iso")]
    name = seeds[0].volume if seeds else f"{resolve.volume_prefix(planned.name, planned.uuid)}-seed.iso"
    backup_volumes.file(host, planned.pool, name, data, undo=undo)
    path = seeds[0].path if seeds else f"{Path(planned.volumes[0].path).parent}/{name}"
    made = record.owned if seeds else (Owned(planned.pool, name), *record.owned)
    return replace(record, owned=made, ssh=record.ssh._replace(host_key=key.public)), path
