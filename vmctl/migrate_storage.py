"""Giving the target of a migration the files it lacks, and taking away what is of no use any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from vmctl import image_users, images, render
from vmctl.errors import ImageError, NotFound, quietly
from vmctl.events import Progress, Reporter, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import storage
from vmctl.hypervisor.domain import Domain
from vmctl.migrate_ends import Ends
from vmctl.migrate_files import MARK, File, Make, Role, digest


def _pool_xml(folder: str, name: str) -> str:
    return render.pool(name, folder)


@contextmanager
def made(ends: Ends, makes: Sequence[Make], report: Reporter) -> Iterator[ExitStack]:
    """Make the files, each proved to be what the source has. What undoes it is in the stack, for the block to pop.

    Beside each stands a mark until all is over: whoever comes after a kill knows a file that is not whole by it.
    """
    with ExitStack() as undo:
        if makes:
            images.ensure_pools(ends.target)
        for one in makes:
            _make(ends, one, undo, report)
        yield undo


def _mark(file: File) -> File:
    return replace(file, path=file.path + MARK)


def unmark(target: Host, makes: Sequence[Make]) -> None:
    """All is over, and well."""
    for one in makes:
        remove(target, _mark(one.file))


def clear_marked(target: Host, files: Sequence[File]) -> list[str]:
    """Delete what a killed migration left of these files, and return their paths."""
    found = []
    for folder in dict.fromkeys(file.folder for file in files if not file.network):
        for name in _names(target, folder):
            marked = [file for file in files if file.folder == folder and file.leaf + MARK == name]
            for file in marked:
                remove(target, file)
                remove(target, _mark(file))
                found.append(file.path)
    return found


def _names(host: Host, folder: str) -> tuple[str, ...]:
    try:
        with storage.folder_as_pool(host.conn, folder, lambda name: _pool_xml(folder, name)) as pool:
            storage.refresh(host.conn, pool)
            return storage.volume_names(host.conn, pool)
    except NotFound:
        return ()


def _make(ends: Ends, make: Make, undo: ExitStack, report: Reporter) -> None:
    file, source, target = make.file, ends.source, ends.target
    undo.callback(lambda: quietly(lambda: _unmake(ends.target, file)))
    with storage.folder_as_pool(target.conn, file.folder, lambda name: _pool_xml(file.folder, name)) as pool:
        if make.empty:
            view = render.VolumeView(
                file.leaf, file.capacity, file.format, backing=make.backing, backing_format=make.backing_format
            )
        else:
            view = render.VolumeView(file.leaf, file.size, "raw", mode="0644" if _public(file) else "0600")
        mark = render.VolumeView(file.leaf + MARK, 1, "raw")
        storage.refresh(target.conn, pool)
        if mark.name in storage.volume_names(target.conn, pool):  # a killed one was here
            storage.delete_volume(target.conn, pool, file.leaf)
        else:
            storage.create_volume(target.conn, pool, render.volume(mark), name=mark.name)
        storage.create_volume(target.conn, pool, render.volume(view), name=file.leaf)
        if not make.empty:
            _fill(source, target, file, pool, report)


def _public(file: File) -> bool:
    return file.role in {Role.BASE, Role.KERNEL, Role.INITRD}


def _fill(source: Host, target: Host, file: File, pool: str, report: Reporter) -> None:
    with storage.folder_as_pool(source.conn, file.folder, lambda name: _pool_xml(file.folder, name)) as there:
        sent = storage.transfer(
            source.conn,
            (there, file.leaf),
            target.conn,
            (pool, file.leaf),
            lambda done: report(Progress(f"{file.told} {file.leaf}", done, file.size)),
        )
    if digest(target, file) != sent:
        raise ImageError(f"cannot copy {file.path} to {target.name}: what arrived has another SHA-256")
    storage.refresh(target.conn, pool)  # what it is, libvirt sees by its content


def _unmake(target: Host, file: File) -> None:
    if file.leaf + MARK in _names(target, file.folder):
        remove(target, file)
        remove(target, _mark(file))


def remove(host: Host, file: File) -> None:
    """Delete a file of a host; one that is gone is no error."""
    try:
        with storage.folder_as_pool(host.conn, file.folder, lambda name: _pool_xml(file.folder, name)) as pool:
            storage.refresh(host.conn, pool)
            storage.delete_volume(host.conn, pool, file.leaf)
    except NotFound:
        return


def clear_source(source: Host, vm: Domain, found: Sequence[File], left: Sequence[str], report: Reporter) -> None:
    """Delete what was the VM's own on its old host and lies on no shared storage: ``left``. Others' disks stay."""
    record = vm.facts.record
    own = {owned.volume for owned in record.owned} if record else set()
    needed = image_users.needed(source.conn)
    for one in found:
        if one.path not in left or one.role in {Role.BASE, Role.KERNEL, Role.INITRD}:
            continue
        if one.role is Role.READONLY and one.leaf not in own:
            continue
        users = set(needed.by(one.path)) - {vm.name, one.leaf}
        if users:
            report(Warned(f"kept {one.path} on {source.name}: {', '.join(sorted(users))} needs it"))
            continue
        remove(source, one)
