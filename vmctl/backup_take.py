"""Taking a backup of each disk of a VM: while it runs, by libvirt's backup job; while it does not, from its files."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmctl import backup_copy, backup_index, backup_marks, backup_store, durable, qemu_img, qemu_nbd, render
from vmctl.backup_copy import Copy
from vmctl.backup_index import CLUSTER, Index
from vmctl.backup_manifest import StoredDisk
from vmctl.backup_plan import DiskPlan
from vmctl.backup_store import Shelf
from vmctl.choices import Compression
from vmctl.errors import NotFound, Unsupported, VmctlError, quietly
from vmctl.events import Progress, Reporter, Step, bytes_in_words
from vmctl.hosts import Host
from vmctl.hypervisor import backup, disks, domain
from vmctl.hypervisor.domain import Domain
from vmctl.nbd import ALLOCATION, ZERO, Export, Span
from vmctl.qcow2_writer import Qcow2Writer
from vmctl.render import BackedUpView, BackupView, CheckpointView

_DIRTY = "dirty"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done. ``made``: the folder that the files go to; ``shelf``: the backups there are.

    ``below``: the digests of what each disk is laid over, by target.
    """

    vm: Domain
    plans: tuple[DiskPlan, ...]
    shelf: Shelf
    made: Path
    id: str
    compression: Compression
    freeze: bool
    below: Mapping[str, Index]

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that the next backup counts from; "" where no disk can be marked."""
        if not any(plan.disk.marks for plan in self.plans):
            return ""
        where = hashlib.sha256(str(self.shelf.folder).encode()).hexdigest()[:6]
        return f"{backup_marks.PREFIX}{self.id}-{where}"

    @property
    def marked(self) -> tuple[str, ...]:
        """The disks that get a bitmap."""
        return tuple(plan.disk.target for plan in self.plans if plan.disk.marks)


def take(host: Host, order: Order, report: Reporter) -> tuple[StoredDisk, ...]:
    """Take all disks. Failing or interrupted, it leaves the VM as it was."""
    sources = _live(host, order, report) if order.vm.active else _stopped(host, order)
    with sources as served:
        return _copied(order, served, report)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a disk's content is to be had. ``bitmap``: what tells the changed blocks, "" for all."""

    socket: Path
    export: str
    bitmap: str


def _daemon_folder(host: Host, vm: Domain) -> Path:
    """The folder that libvirt keeps for the running VM and clears when it ends; its QEMU can make files there."""
    base = Path.home() / ".config/libvirt/qemu/lib" if host.conn.session else Path("/var/lib/libvirt/qemu")
    found = sorted(base.glob(f"domain-{vm.id}-*"))
    if len(found) != 1:
        raise NotFound(f"cannot back up VM {vm.name}: its folder in {base} is not there", hint="is that folder yours?")
    return found[0]


@contextmanager
def _live(host: Host, order: Order, report: Reporter) -> Iterator[tuple[_Source, ...]]:
    vm, folder, tag = order.vm, _daemon_folder(host, order.vm), secrets.token_hex(4)
    socket = folder / f"{backup_marks.SOCKET}{tag}"
    if len(str(socket)) > 107:
        raise Unsupported(f"cannot back up VM {vm.name}: the path {socket} is too long for a socket")
    planned = {plan.disk.target: plan for plan in order.plans}
    everything = [one.target for one in disks.disks(host.conn, vm.name, inactive=False)]
    views = []
    for target in everything:
        plan = planned.get(target)
        scratch = f"{folder}/{backup_marks.SOCKET}{tag}-{target}" if plan else ""
        views.append(BackedUpView(target, scratch, plan.since if plan else "", _DIRTY if plan and plan.since else ""))
    checkpoint = ""
    if order.checkpoint:
        rest = tuple(target for target in everything if target not in order.marked)
        said = backup_marks.description(order.id, order.shelf.folder)
        checkpoint = render.checkpoint(CheckpointView(order.checkpoint, said, order.marked, rest))
    try:
        with backup_marks.frozen(host, vm, report, wanted=order.freeze):
            backup.begin(host.conn, vm.name, render.backup(BackupView(str(socket), tuple(views))), checkpoint)
        yield tuple(
            _Source(socket, plan.disk.target, f"qemu:dirty-bitmap:{_DIRTY}" if plan.since else "")
            for plan in order.plans
        )
        backup.end(host.conn, vm.name)
    except BaseException:
        quietly(lambda: _undo_live(host, order, tag))
        raise


def _undo_live(host: Host, order: Order, tag: str) -> None:
    now = domain.find(host.conn, order.vm.name)
    if now.id == order.vm.id and tag in backup.job(host.conn, now.name):
        backup.end(host.conn, now.name)
    backup_marks.drop(host, now, order.checkpoint)


@contextmanager
def _stopped(host: Host, order: Order) -> Iterator[tuple[_Source, ...]]:
    """The files, served; at the end they are marked, so that the next backup can be an increment."""
    with ExitStack() as stack:
        found = []
        for plan in order.plans:
            tree = qemu_nbd.plain_tree(plan.disk.source, plan.disk.format)
            what = f"read disk {plan.disk.target} of VM {order.vm.name}"
            socket, export = stack.enter_context(qemu_nbd.served(tree, what=what, bitmap=plan.since))
            found.append(_Source(socket, export, f"qemu:dirty-bitmap:{plan.since}" if plan.since else ""))
        yield tuple(found)
    if not order.checkpoint:
        return
    try:
        for plan in order.plans:
            if plan.disk.marks:
                qemu_img.add_bitmap(Path(plan.disk.source), order.checkpoint)
        known = backup.checkpoints(host.conn, order.vm.name)
        view = CheckpointView(
            order.checkpoint,
            backup_marks.description(order.id, order.shelf.folder),
            order.marked,
            created=int(time.time()),
            parent=known[-1].name if known else "",
        )
        backup.redefine_checkpoint(host.conn, order.vm.name, render.checkpoint(view))
    except BaseException:
        quietly(lambda: backup_marks.settle(host, order.vm, lambda _event: None))
        raise


def _runs(source: _Source, plan: DiskPlan) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The size of a disk, and the clusters of it that are to be read."""
    context = source.bitmap or ALLOCATION
    with Export(source.socket, source.export, [context]) as export:
        numbers: list[tuple[int, int]] = []
        for span in export.status(context):
            if bool(span.flags & 1) if source.bitmap else not span.flags & ZERO:
                _add(numbers, span)
        return export.size, tuple(numbers)


def _add(runs: list[tuple[int, int]], span: Span) -> None:
    """Add the clusters that a span touches to runs that come before it."""
    first, end = span.start // CLUSTER, -(-(span.start + span.length) // CLUSTER)
    if runs and runs[-1][0] + runs[-1][1] >= first:
        runs[-1] = (runs[-1][0], max(end, runs[-1][0] + runs[-1][1]) - runs[-1][0])
    else:
        runs.append((first, end - first))


def _copied(order: Order, sources: Sequence[_Source], report: Reporter) -> tuple[StoredDisk, ...]:
    asked = [_runs(source, plan) for source, plan in zip(sources, order.plans, strict=True)]
    total = sum(count for _, runs in asked for _, count in runs) * CLUSTER
    done = 0

    def moved(amount: int) -> None:
        nonlocal done
        done += amount
        report(Progress(f"back up {order.vm.name}", min(done, total), total))

    found = []
    for source, plan, (size, runs) in zip(sources, order.plans, asked, strict=True):
        if size != plan.disk.size:
            raise VmctlError(f"cannot back up VM {order.vm.name}: disk {plan.disk.target} was resized just now")
        found.append(_disk(order, source, plan, runs, moved))
    report(
        Step(f"{order.vm.name}: {bytes_in_words(total)} read from {len(found)} disk{'s' if len(found) != 1 else ''}")
    )
    return tuple(found)


def _disk(
    order: Order, source: _Source, plan: DiskPlan, runs: tuple[tuple[int, int], ...], moved: Callable[[int], None]
) -> StoredDisk:
    disk, path = plan.disk, order.made / f"{plan.disk.target}.qcow2"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        writer = Qcow2Writer(handle, disk.size, order.compression)
        copy = Copy(
            source.socket, source.export, disk.size, runs, writer, f"disk {disk.target}", keep_zeros=bool(plan.parent)
        )
        with durable.written_as_it_grows(path):
            index = backup_copy.run(copy, moved)
        file_size = writer.finish()
    finally:
        os.close(handle)
    whole = backup_index.laid_over([index, order.below[disk.target]] if plan.parent else [index])
    packed = backup_index.pack(index)
    backup_store.write(order.made / f"{disk.target}.digests", packed)
    return StoredDisk(
        target=disk.target,
        serial=disk.serial,
        format=disk.format,
        size=disk.size,
        digest=backup_index.digest(whole, disk.size),
        file=path.name,
        file_size=file_size,
        index=f"{disk.target}.digests",
        index_sha256=hashlib.sha256(packed).hexdigest(),
        clusters=len(index),
        parent=plan.parent,
        why=plan.why,
        source=disk.source,
    )
