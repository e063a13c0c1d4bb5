"""The checkpoints that backups count from: which are whose, and clearing away those of no backup.

A checkpoint says in its description of which backup in which folder it is. One whose backup is not there, or is not
its folder's newest any more, is of no use: what killed or failed backups left is known by that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmctl import backup_plan, backup_store, qemu_img, snapshot_journal
from vmctl.errors import Conflict, VmctlError
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import backup, disks, snapshots
from vmctl.hypervisor.backup import Checkpoint
from vmctl.hypervisor.domain import Domain

PREFIX = "vmctl-"
SOCKET = "vmctl-backup-"
_OURS = re.compile(r"vmctl backup (\S+) in (/.+)")


def description(name: str, folder: Path) -> str:
    """What the checkpoint of a backup says of itself."""
    return f"vmctl backup {name} in {folder}"


def ours(found: Collection[Checkpoint]) -> dict[str, tuple[str, str]]:
    """The checkpoints that are of backups of vmctl's: id and folder of each."""
    told = {one.name: _OURS.fullmatch(one.description) for one in found if one.name.startswith(PREFIX)}
    return {name: (match[1], match[2]) for name, match in told.items() if match}


def _needed(folders: Collection[str]) -> dict[str, frozenset[str]]:
    """The checkpoints that the newest backup in each folder counts from; nothing of a folder that is not there now."""
    found = {}
    for folder in folders:
        if Path(folder).is_dir():
            with suppress(VmctlError):
                last = backup_store.shelf(Path(folder)).last
                found[folder] = frozenset({last.checkpoint} if last else ())
    return found


def needless(host: Host, vm: str) -> tuple[str, ...]:
    """The checkpoints of a VM that no backup counts from."""
    mine = ours(backup.checkpoints(host.conn, vm))
    return backup_plan.needless(mine, _needed({folder for _, folder in mine.values()}))


def own_job(host: Host, vm: str) -> bool:
    """Whether a backup job of vmctl's is in the VM. Raises Conflict for one of somebody else's."""
    text = backup.job(host.conn, vm)
    if text and SOCKET not in text:
        raise Conflict(f"cannot back up VM {vm}: another program backs it up just now", hint="wait for it to end")
    return bool(text)


def settle(host: Host, vm: Domain, report: Reporter) -> None:
    """End what killed backups of a VM left in it: a job, frozen file systems, checkpoints. Its name must be held."""
    snapshots.put_back(host.conn, vm.name, snapshot_journal.aside(host, vm.name))  # before one is taken for nobody's
    if vm.active and own_job(host, vm.name):
        backup.end(host.conn, vm.name)
        report(Step(f"ended a backup of {vm.name} that was cut off"))
    if (marker := _marker(host, vm)).exists():
        if vm.active:
            _thaw(host, vm, report)
        marker.unlink(missing_ok=True)
    for name in needless(host, vm.name):
        drop(host, vm, name)
    if not vm.active:
        _clear_bitmaps(host, vm)


def unsettled(host: Host, vm: Domain) -> list[str]:
    """What killed backups of a VM left in it, a line for each."""
    found = [f"checkpoint {name} of {vm.name} is of no backup" for name in needless(host, vm.name)]
    if vm.active and SOCKET in backup.job(host.conn, vm.name):
        found.append(f"a backup job is in {vm.name}")
    if _marker(host, vm).exists():
        found.append(f"a backup froze {vm.name} and was cut off")
    return found


def drop(host: Host, vm: Domain, name: str) -> None:
    """Delete a checkpoint; what was marked since then, its parent marks from now on.

    Where that cannot be, it and all before it are forgotten: they would tell of less than has changed.
    """
    known = {one.name: one for one in backup.checkpoints(host.conn, vm.name)}
    if name not in known:
        return
    try:
        if vm.active:
            backup.delete_checkpoint(host.conn, vm.name, name)
        else:
            _drop_stopped(host, vm, known[name])
            backup.delete_checkpoint(host.conn, vm.name, name, metadata_only=True)
    except VmctlError:
        at = name
        while at in known:
            backup.delete_checkpoint(host.conn, vm.name, at, metadata_only=True)
            at = known[at].parent


def give_up(host: Host, vm: Domain) -> bool:
    """Take all checkpoints from a VM and their bitmaps from its disks; returns whether there were any.

    The next backup takes all. Of a running VM, nothing is stopped for it.
    """
    known = backup.checkpoints(host.conn, vm.name)
    for one in reversed(known):
        backup.delete_checkpoint(host.conn, vm.name, one.name, metadata_only=not vm.active)
    if not vm.active:
        _clear_bitmaps(host, vm, frozenset(one.name for one in known))
    return bool(known)


def _drop_stopped(host: Host, vm: Domain, one: Checkpoint) -> None:
    for disk in disks.disks(host.conn, vm.name, inactive=True):
        path = Path(disk.source)
        if one.bitmaps.get(disk.target) is None or not path.is_file() or disk.format != "qcow2":
            continue
        known = qemu_img.bitmaps(path, disk.format)
        if one.name in known and one.parent in known:
            qemu_img.merge_bitmap(path, one.name, one.parent)
        if one.name in known:
            qemu_img.remove_bitmap(path, one.name)


def _clear_bitmaps(host: Host, vm: Domain, were: Collection[str] = ()) -> None:
    """Take bitmaps of no checkpoint from the disks of a stopped VM: ours, and those of checkpoints that ``were``."""
    known = {one.name for one in backup.checkpoints(host.conn, vm.name)}
    for disk in disks.disks(host.conn, vm.name, inactive=True):
        path = Path(disk.source)
        if disk.format != "qcow2" or disk.readonly or not path.is_file():
            continue
        with suppress(VmctlError):  # somebody else has it open
            for name in qemu_img.bitmaps(path, disk.format):
                if (name.startswith(PREFIX) or name in were) and name not in known:
                    qemu_img.remove_bitmap(path, name)


def _marker(host: Host, vm: Domain) -> Path:
    return host.folders.runtime / f"frozen.{vm.uuid}"


@contextmanager
def frozen(host: Host, vm: Domain, report: Reporter, *, wanted: bool) -> Iterator[None]:
    """The guest's file systems hold still within the block, if ``wanted``; they are thawed however it ends.

    A file remembers it for who comes after a kill. What was frozen before by somebody else stays so.
    """
    if not wanted:
        yield
        return
    from vmctl import agent  # late: most backups freeze nothing

    marker = _marker(host, vm)
    marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    marker.touch()
    try:
        count = agent.freeze(host, vm.name)
    except BaseException:
        marker.unlink(missing_ok=True)
        raise
    try:
        yield
    finally:
        if count:
            _thaw(host, vm, report)
        marker.unlink(missing_ok=True)


def _thaw(host: Host, vm: Domain, report: Reporter) -> None:
    from vmctl import agent  # late, as above

    try:
        agent.thaw(host, vm.name)
    except VmctlError:
        try:
            agent.thaw(host, vm.name)
        except VmctlError as error:
            report(
                Warned(f"the file systems of {vm.name} may be frozen still: {error.message}", f"vmctl thaw {vm.name}")
            )
