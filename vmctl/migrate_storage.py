"""Giving the target of a migration the files it lacks, and taking away what is of no use any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial

from vmctl import elsewhere, identity, image_users, images, render
from vmctl.errors import Conflict, ImageError, NotFound, quietly
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.folder_pools import shared_folders, shown
from vmctl.hosts import Host
from vmctl.hypervisor import storage
from vmctl.hypervisor.domain import Domain
from vmctl.locks import held
from vmctl.migrate_ends import Ends
from vmctl.migrate_files import MARK, File, Make, Role, digest
from vmctl.migrate_problems import DiskNeed
from vmctl.wait import pause

_MADE_S = 3600.0  # as long as a base image may take over a slow link
_UNMADE_S = 3.0  # who holds it for longer still makes it


@contextmanager
def made(ends: Ends, makes: Sequence[Make], report: Reporter, *, bandwidth: int = 0) -> Iterator[ExitStack]:
    """Make the files, each proved to be what the source has. What undoes it is in the stack, for the block to pop.

    ``bandwidth``: most bytes sent a second, 0 for all there is.

    Beside each stands a mark until all is over: whoever comes after a kill knows a file that is not whole by it.
    """
    with ExitStack() as undo:
        if makes:
            images.ensure_pools(ends.target)
        others = partial(_others, ends.target, makes)
        shared = [one.file for one in makes if _public(one.file)]
        for one in makes:
            if not _public(one.file):
                # Once a disk of ours is there, another move that is cut off leaves all that both need to us.
                while shared:
                    _on_undo(undo, ends.target, shared.pop(), others, report)
            _make(ends, one, others, undo, report, bandwidth)
        yield undo


def _others(target: Host, makes: Sequence[Make]) -> set[str]:
    """Who else on the target needs what VMs share of these files: of an image, its kernel too."""
    shared = [one.file.path for one in makes if _public(one.file)]
    return set(image_users.needed(target).by(*shared, but=[one.file.path for one in makes]))


def _mark(file: File) -> File:
    return replace(file, path=file.path + MARK)


def unmark(target: Host, makes: Sequence[Make]) -> None:
    """All is over, and well. A log goes first: what a kill leaves is found by the marks of disks."""
    for one in sorted(makes, key=lambda make: make.file.role is not Role.LOG):
        remove(target, _mark(one.file))


def lying(host: Host, files: Sequence[File]) -> frozenset[str]:
    """The paths of those of the files that a host has."""
    local = [file for file in files if not file.network]
    names = {folder: _names(host, folder) for folder in {file.folder for file in local}}
    return frozenset(file.path for file in local if file.leaf in names[file.folder])


def marked(host: Host, files: Sequence[File]) -> frozenset[str]:
    """The paths of those of the files beside which a host has a mark: a move made them, and was cut off."""
    local = [file for file in files if not file.network]
    names = {folder: _names(host, folder) for folder in {file.folder for file in local}}
    return frozenset(file.path for file in local if file.leaf + MARK in names[file.folder])


def clear_marked(stays: Host, target: Host, files: Sequence[File]) -> list[str]:
    """Delete what a killed migration left on the target of the files of a VM that is on ``stays``; their paths.

    Not where both see one folder: there they are the VM's own, and the marks are of a move that it came by. What others
    are based on comes last: by then nobody needs it but another VM, which is there with it, so it is whole.
    """
    there, found = marked(target, files), []
    both = shared_folders(stays, target, (file.folder for file in files if file.path in there))
    for file in reversed(files):
        if file.path not in there or file.folder in both:
            continue
        if not (_public(file) and image_users.needed(target).by(file.path)):
            remove(target, file)
            found.append(file.path)
        remove(target, _mark(file))
    return found


def _names(host: Host, folder: str) -> tuple[str, ...]:
    try:
        with shown(host, folder) as pool:
            storage.refresh(host.conn, pool)
            return storage.volume_names(host.conn, pool)
    except NotFound:
        return ()


def _make(
    ends: Ends, make: Make, others: Callable[[], set[str]], undo: ExitStack, report: Reporter, bandwidth: int
) -> None:
    file, target = make.file, ends.target
    with _alone(target, file, report), shown(target, file.folder) as pool:
        _on_undo(undo, target, file, others, report)
        storage.refresh(target.conn, pool)
        view = _view(make, store=file.folder == images.pool_path(target, target.settings.image_pool))
        mark, names = _mark(file).leaf, storage.volume_names(target.conn, pool)
        if _public(file) and file.leaf in names and digest(target, file) == digest(ends.source, file):
            return  # another move has made it since, or a killed one had
        if mark in names:  # a killed one was here
            storage.delete_volume(target.conn, pool, file.leaf)
        else:
            storage.create_volume(target.conn, pool, render.volume(render.VolumeView(mark, 1, "raw")), name=mark)
        storage.create_volume(target.conn, pool, render.volume(view), name=file.leaf)
        if not make.empty:
            _fill(ends.source, target, file, pool, report, bandwidth)


def _view(make: Make, *, store: bool) -> render.VolumeView:
    """How a file is made: those of the image store may be read by all, and a layer of a VM's disk by its QEMU alone."""
    file = make.file
    if not make.empty:
        return render.VolumeView(file.leaf, file.size, "raw", mode="0644" if store else "0600")
    return render.VolumeView(
        file.leaf, file.capacity, file.format, backing=make.backing, backing_format=make.backing_format
    )


@contextmanager
def _alone(target: Host, file: File, report: Reporter, *, timeout_s: float = _MADE_S) -> Iterator[None]:
    """Keep other moves of this user's from making, or taking away, a file that they need as well."""
    with ExitStack() as stack:
        if _public(file):
            lock = partial(held, target.folders.runtime, f"{file.path} on {target.lock_scope}")
            try:
                stack.enter_context(lock())
            except Conflict:
                report(Step(f"{file.told} {file.leaf}: waiting for another move, which makes it on {target.name}"))
                stack.enter_context(lock(timeout_s=timeout_s))
        yield


def _public(file: File) -> bool:
    """Whether VMs share it."""
    return file.role in {Role.BASE, Role.KERNEL, Role.INITRD}


def _fill(source: Host, target: Host, file: File, pool: str, report: Reporter, bandwidth: int) -> None:
    if file.role is Role.LOG:
        _begin_log(source, target, file, pool)
        return
    began = time.monotonic()

    def moved(done: int) -> None:
        report(Progress(f"{file.told} {file.leaf}", done, file.size))
        if bandwidth and (early := done / bandwidth - (time.monotonic() - began)) > 0:
            pause(early)

    with shown(source, file.folder) as there:
        sent = storage.transfer(source.conn, (there, file.leaf), target.conn, (pool, file.leaf), moved)
    if digest(target, file) != sent:
        raise ImageError(f"cannot copy {file.path} to {target.name}: what arrived has another SHA-256")
    storage.refresh(target.conn, pool)  # what it is, libvirt sees by its content


def _begin_log(source: Host, target: Host, file: File, pool: str) -> None:
    """What the guest has printed so far; the log daemon there goes on after it. It grows, so it has no digest."""
    with suppress(NotFound), shown(source, file.folder) as there:  # else somebody deleted it
        storage.refresh(source.conn, there)
        storage.transfer(source.conn, (there, file.leaf), target.conn, (pool, file.leaf), lambda _done: None)


def _on_undo(undo: ExitStack, target: Host, file: File, others: Callable[[], set[str]], report: Reporter) -> None:
    undo.callback(lambda: quietly(lambda: _unmake(target, file, others, report)))


def _unmake(target: Host, file: File, others: Callable[[], set[str]], report: Reporter) -> None:
    with _alone(target, file, report, timeout_s=_UNMADE_S):
        if file.leaf + MARK in _names(target, file.folder) and not (_public(file) and others()):
            remove(target, file)
            remove(target, _mark(file))


def remove(host: Host, file: File) -> None:
    """Delete a file of a host; one that is gone is no error."""
    try:
        with shown(host, file.folder) as pool:
            storage.refresh(host.conn, pool)
            storage.delete_volume(host.conn, pool, file.leaf)
    except NotFound:
        return


def mark_shared(source: Host, target: Host, vm: Domain, needs: Sequence[DiskNeed]) -> None:
    """Note beside the VM's own volumes that stay where they are, and are left without a VM here, whose they are.

    The target gets the pool in which they are then the VM's own, to be deleted with it.
    """
    folder = images.pool_path(source, source.settings.pool)
    shared = [need.path for need in needs if need.shared]
    prefixes = [one for one in identity.prefixes(vm) if any(path.startswith(f"{folder}/{one}") for path in shared)]
    for host in (source, target) if prefixes else ():
        images.ensure_pools(host)
    for prefix in prefixes:
        identity.mark_moved(source, prefix)


def unmark_shared(source: Host, vm: Domain, needs: Sequence[DiskNeed]) -> None:
    """It took all of its volumes along, also from where it shared them with another host before."""
    if not any(need.shared for need in needs):
        for prefix in identity.prefixes(vm):
            identity.unmark_moved(source, prefix)


_COPIED = frozenset({Role.DISK, Role.READONLY, Role.NVRAM})
_SHARED_S = 300.0


def clear_source(ends: Ends, vm: Domain, found: Sequence[File], left: Sequence[str], report: Reporter) -> None:
    """Delete what was the VM's own on its old host and lies on no storage that the target sees: ``left``.

    Others' disks stay, also what a VM of a third host needs that sees them, and so does what the target has not,
    whatever became of it there: it is all there is.

    What clones and forks share goes with the last of them. Of several that leave at once one must be the last, so they
    take turns.
    """
    record, source = vm.facts.record, ends.source
    own = {owned.volume for owned in record.owned} if record else set()
    local = [one for one in found if one.path in left]
    mine = [one.path for one in local if one.leaf in own or one.role in {Role.DISK, Role.NVRAM, Role.LOG}]
    theirs = elsewhere.needed(source, mine, report, but=ends.target)
    for path, others in theirs.items():
        report(Warned(f"kept {path} on {source.name}: {others} needs it, on storage that both see"))
    local = [one for one in local if one.path not in theirs]
    with held(source.folders.runtime, f"shared disks on {source.lock_scope}", timeout_s=_SHARED_S):
        needed, gone = image_users.needed(source), {vm.name}
        there = {folder: _names(ends.target, folder) for folder in {one.folder for one in local}}
        for one in reversed(local):  # what is based on a file goes before it
            if _public(one) or (one.role is Role.READONLY and one.leaf not in own):
                continue
            if one.role in _COPIED and one.leaf not in there[one.folder]:
                report(Warned(f"kept {one.path} on {source.name}: {ends.names[1]} has no such file"))
                continue
            if users := needed.by(one.path, but=(*gone, one.path)):
                report(Warned(f"kept {one.path} on {source.name}: {', '.join(users)} needs it"))
                continue
            remove(source, one)
            gone.add(one.path)
            if one.role is Role.LOG:
                _remove_older(source, one)
        layers = [one for one in reversed(local) if one.role is Role.BASE and one.leaf in own]
        _clear_layers(ends, layers, needed, gone, report)


def _remove_older(source: Host, log: File) -> None:
    """Delete what the log daemon put aside of a console log when it had become long."""
    for leaf in _names(source, log.folder):
        if leaf.startswith(f"{log.leaf}.") and leaf.removeprefix(f"{log.leaf}.").isdecimal():
            remove(source, replace(log, path=f"{log.folder}/{leaf}"))


def _clear_layers(
    ends: Ends, layers: Sequence[File], needed: image_users.Needed, gone: set[str], report: Reporter
) -> None:
    """Delete those files below the VM's disks that no image is made of and nobody needs any more; top ones first."""
    free: list[File] = []
    for one in layers:
        if not needed.by(one.path, but=(*gone, one.path)):
            free.append(one)
            gone.add(one.path)
    lacking = image_users.needed(ends.target).users if free else {}
    for one in free:
        if one.path in lacking and one.leaf not in _names(ends.target, one.folder):
            report(Warned(f"kept {one.path} on {ends.names[0]}: {ends.names[1]} has no such file"))
        else:
            remove(ends.source, one)
