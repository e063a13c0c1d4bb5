"""Pulls that were left in their middle (pull_journal.py): seen to their end, or the disk put back on what it was on.

That is always right: what was pulled reads as what it was pulled from, and what was written down in the disk's own file
hides what is below. So nothing is lost that was there when the pull began, whoever was killed when.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from vmctl import disk_chain, disk_guard, disk_xml, forgotten, identity, pull_journal, qemu_img
from vmctl.disk_chain import Chain
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, VmctlError, quietly, reason
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, pools, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.pull_journal import End, Entry, Found


def begin(host: Host, vm: Domain, target: str, chain: Chain, doing: str) -> Path:
    """Note what a running VM's disk, into which files below it are to be pulled, is based on."""
    top = chain.top
    backing, form = disk_chain.named(top.path, top.format, doing=doing)
    try:
        below = tuple(pull_journal.stamp(layer.path) for layer in chain.layers[1:])
        inode = pull_journal.stamp(top.path).inode
    except OSError as error:
        raise VmctlError(f"cannot {doing}: {reason(error)}") from error
    mark = forgotten.mark(host, vm.name)
    entry = Entry(host.conn.uri, vm.name, target, top.path, inode, top.format, backing, form, below, mark)
    return pull_journal.begin(host, entry)


def settle(host: Host, name: str, report: Reporter, *, deciding: bool = False) -> bool:
    """Bring what was left of pulls into disks of a VM, whose name is held, to its end. Whether there was anything.

    Raises Conflict where a disk may lack what is not to be had; ``deciding``, for one that is to be deleted: that is
    told, and it is given up.
    """
    found = tuple(_of(host, name))
    for path, entry in found:
        try:
            _settle(host, name, path, entry, report)
        except VmctlError as error:
            if not deciding:
                raise
            report(Warned(error.message))
        pull_journal.end(path)
    return bool(found)


def require_settled(host: Host, vm: Domain, doing: str) -> None:
    """Raise Conflict where a stopped VM's disk may lack what is in the file that it was based on."""
    for _, entry in _of(host, vm.name):
        if pull_journal.decide(_look(host, vm, entry)) in {End.PUT_BACK, End.CHANGED}:
            raise Conflict(f"cannot {doing}: {_lacking(entry)}", hint="vmctl doctor --fix")


def _of(host: Host, name: str) -> Iterator[tuple[Path, Entry]]:
    """The entries of a VM, and of the disks that it has: another program may have renamed it, or handed them on."""
    found = tuple(pull_journal.entries(host))
    named = _named(host, name) if found else set()
    yield from ((path, entry) for path, entry in found if entry.vm == name or os.path.realpath(entry.path) in named)


def _named(host: Host, name: str) -> set[str]:
    vm = domain.find_or_none(host.conn, name)
    if vm is None:
        return set()
    devices = disks.disks(host.conn, name, inactive=True)
    devices += disks.disks(host.conn, name, inactive=False) if vm.active else ()
    return {os.path.realpath(disk.source) for disk in devices if disk.source.startswith("/")}


def _look(host: Host, vm: Domain | None, entry: Entry) -> Found:
    if not pull_journal.there(entry):
        return Found(there=False)
    now = disk_chain.named(entry.path, entry.format, doing=_doing(entry))
    return Found(
        there=True,
        based=now == (entry.backing, entry.backing_format),
        running=_device(host, vm, entry) is not None,
        since=vm is not None and vm.active and forgotten.started_since(host, vm.name, entry.process),
        saved=vm is not None and vm.state is State.SAVED,
        changed=bool(pull_journal.changed(entry.below)),
    )


def _device(host: Host, vm: Domain | None, entry: Entry) -> DiskDevice | None:
    """The disk of a running VM that has the file open."""
    if vm is None or not vm.active:
        return None
    for disk in disks.disks(host.conn, vm.name, inactive=False):
        files = {os.path.realpath(one) for one in (disk.source, *disk.backing) if one.startswith("/")}
        of_a_pool = disk.target == entry.target and not disk.source.startswith("/")
        if os.path.realpath(entry.path) in files or of_a_pool:
            return disk
    return None


def _settle(host: Host, name: str, path: Path, entry: Entry, report: Reporter) -> None:
    vm = domain.find_or_none(host.conn, name)
    if vm is not None and not vm.active:
        forgotten.require_none(host, vm.name, vm.uuid, _doing(entry))
    device = _device(host, vm, entry)
    if device is not None:
        disks.end_pull(host.conn, name, device.target, _doing(entry))
    end = pull_journal.decide(_look(host, vm, entry))
    if end is End.FLUSH and device is not None:
        disks.flush(host.conn, name, device.target, _doing(entry))
    elif end is End.PUT_BACK:
        if vm is None:
            _require_not_elsewhere(host, entry, report)
        _put_back(host, entry)
        report(Step(f"disk {entry.target} of {name} is based on {entry.base} again: {_WHY}"))
    elif end is End.STARTED:
        raise Conflict(
            f"cannot {_doing(entry)}: {_lacking(entry)}, and it was started since",
            hint=f"vmctl stop {name}, then vmctl doctor --fix",
        )
    elif end is End.CHANGED:
        why = f"{_lacking(entry)}, and {_not_as_it_was(entry)}"
        raise Conflict(f"cannot {_doing(entry)}: {why}", hint=_mend(path, entry))


_WHY = "its QEMU may have been killed before what was pulled from there was on the disk"


def _doing(entry: Entry) -> str:
    return f"settle disk {entry.target} of VM {entry.vm}"


def _lacking(entry: Entry) -> str:
    return f"{entry.path} may lack what its QEMU, which was killed, had pulled from {entry.base}"


def _not_as_it_was(entry: Entry) -> str:
    files = pull_journal.changed(entry.below)
    told = [f"{one} {'was changed since' if Path(one).exists() else 'is not there any more'}" for one in files]
    return "; ".join(told)


def _mend(note: Path, entry: Entry) -> str:
    backing, file = shlex.quote(entry.backing), shlex.quote(entry.path)
    return (
        "bring it back as it was; or, where it reads as it did: "
        f"qemu-img rebase -u -f {entry.format} -b {backing} -F {entry.backing_format} {file}; "
        f"or give up what may be lacking: rm {shlex.quote(str(note))}"
    )


def _require_not_elsewhere(host: Host, entry: Entry, report: Reporter) -> None:
    """Raise Conflict where another program has brought the VM to a host that sees the file too."""
    for user in identity.needed_elsewhere(host, [entry.path], report).values():
        raise Conflict(f"cannot {_doing(entry)}: {_lacking(entry)}, and {user} needs it")


def _put_back(host: Host, entry: Entry) -> None:
    """Let the file, which no QEMU has open, be based on what it was based on; content and definition stay the same."""
    mine = [disk_guard.Use("", disk_guard.key(entry.path, local=host.conn.local), entry.path, writes=True)]
    if found := disk_guard.conflicts(mine, disk_guard.running_uses(host)):
        raise Conflict(f"cannot {_doing(entry)}: {'; '.join(found)}", hint="stop that VM, then vmctl doctor --fix")
    what = _doing(entry)
    qemu_img.repoint(Path(entry.path), entry.format, entry.backing, entry.backing_format, what=what)
    for name, running, devices in disks.all_disks(host.conn):
        for disk in devices:
            if not running and disk.source == entry.path and "<backingStore" in disk.xml:  # as it was for a moment
                text = domain.xml(host.conn, name, inactive=True)
                text = disk_xml.with_source(text, disk.target, disk.source, disk.format)
                domain.define(host.conn, text, name=name)
    for pool in pools.pools(host.conn):
        if pool.active and pool.path == str(Path(entry.path).parent):
            quietly(lambda name=pool.name: storage.refresh(host.conn, name))  # type: ignore[misc]
