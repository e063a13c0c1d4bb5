"""The files below a VM's disks and its snapshots: who needs which, what can go, and two of them made one.

A file goes only when no snapshot, no VM and no other disk needs it (snapshot_plan.tidy). Two become one by bringing
what the upper holds into the lower, whatever reads them seeing the same at every moment; then all that named the upper
comes to name the lower, and the upper goes. So whatever dies in between, the next look finds what is left to be done.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmctl import (
    disk_chain,
    disk_xml,
    durable,
    forgotten,
    image_users,
    layer_check,
    pull_settle,
    qemu_img,
    resolve,
    snapshot_journal,
    snapshot_settle,
    snapshot_xml,
)
from vmctl.disk_find import folders
from vmctl.disk_journal import remove_file
from vmctl.disk_replace import job_reporter, share_reporter
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, VmctlError, quietly
from vmctl.events import Reporter, Step, silent
from vmctl.hosts import Host, holding
from vmctl.hypervisor import disks, domain, pools, snapshots, storage
from vmctl.hypervisor.domain import Domain
from vmctl.identity import needed_elsewhere
from vmctl.image_users import Seen
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_plan import OURS, Files, Merge, tag, tidy
from vmctl.snapshot_xml import Snapshot

_LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class View:
    """A VM with its snapshots, its disks as it runs (as defined when it does not) and as defined, and all files."""

    vm: Domain
    found: tuple[Snapshot, ...]
    now: tuple[DiskDevice, ...]
    defined: tuple[DiskDevice, ...]
    seen: Seen

    @property
    def tops(self) -> frozenset[str]:
        """The files its disks have now or at its next start."""
        return frozenset(os.path.realpath(one.source) for one in (*self.now, *self.defined) if one.source)

    def chain(self, path: str) -> list[str]:
        """A file and all it is based on."""
        chain: list[str] = []
        at = os.path.realpath(path)
        while at and at not in chain:
            chain.append(at)
            at = self.seen.bases.get(at, "")
        return chain


def view(host: Host, name: str) -> View:
    """Everything that is there."""
    vm = domain.find(host.conn, name)
    defined = disks.disks(host.conn, vm.name, inactive=True)
    now = disks.disks(host.conn, vm.name, inactive=False) if vm.active else defined
    return View(vm, snapshots.snapshots(host.conn, vm.name), now, defined, image_users.look(host))


def _owned(host: Host, vm: Domain) -> frozenset[str]:
    record = vm.facts.record
    owned = record.owned if record else ()
    places = {pool.name: pool.path for pool in pools.pools(host.conn)} if owned else {}
    return frozenset(os.path.realpath(f"{places[one.pool]}/{one.volume}") for one in owned if one.pool in places)


def files_of(host: Host, seen: View, also: Iterable[str] = ()) -> Files:
    """Who needs which file of a VM's; ``also`` are its own besides, and they alone and what they are based on may go.

    A disk that was detached stays, though a snapshot made its file.
    """
    more = {os.path.realpath(one) for one in also}
    owned = _owned(host, seen.vm)
    pinned = {os.path.realpath(path) for one in seen.found for path in one.files}
    overlays = {os.path.realpath(disk.overlay) for one in seen.found for disk in one.external if disk.overlay}
    known = owned | pinned | more
    own: list[str] = []
    for start in sorted(seen.tops | pinned | more):
        chain = seen.chain(start)
        deepest = max((n for n, path in enumerate(chain) if path in known or OURS.search(path)), default=-1)
        own += [path for path in chain[: deepest + 1] if path not in own]
    mine: dict[str, set[str]] = {path: {"now"} for path in seen.tops}
    for one in seen.found:
        for path in one.files:
            mine.setdefault(os.path.realpath(path), set()).add(one.name)
    others = {path for path, names in seen.seen.named.items() if names - {seen.vm.name}}
    others |= {*needed_elsewhere(host, own, silent)}
    given_up = {path for one in more for path in seen.chain(one)}
    made = frozenset(path for path in own if path in given_up and (OURS.search(path) or path in overlays | owned))
    return Files(seen.seen.bases, {path: frozenset(pins) for path, pins in mine.items()}, others, own, made)


def merge(host: Host, seen: View, step: Merge, report: Reporter) -> None:
    """Make two files one. Whenever it ends, also by an error or Ctrl-C, their readers read what they read before."""
    what = f"merge {Path(step.top).name} into {Path(step.base).name}"
    chain = disk_chain.read(step.top, "qcow2", folders(host), doing=what)
    if chain.base is None or os.path.realpath(chain.base.path) != step.base:
        raise VmctlError(f"cannot {what}: it is based on another file by now")
    if qemu_img.info(Path(step.top), "qcow2", in_use=True).snapshots:
        raise VmctlError(f"cannot {what}: it holds internal snapshots, which would be lost")
    base, form = chain.base.path, chain.base.format
    live = _live_disk(seen, step.top)
    # At the end of a commit in a running VM nobody names the upper file any more, whether or not we live to see it.
    entry = Entry(host.conn.uri, seen.vm.name, "merge", Path(step.top).name, files=(step.top,), layers=(step.top,))
    path = snapshot_journal.begin(host, entry)
    if live is not None:
        _commit(host, seen.vm.name, live, (_as_named(live, base), _as_named(live, step.top)), path, entry, report)
    else:
        qemu_img.commit(
            Path(step.top), "qcow2", Path(base), what=what, moved=share_reporter(report, what, chain.top.virtual_size)
        )
        # Not by vmctl: the upper file may be written to by now. Of a VM that ran before it is one that it has not open.
        if not seen.vm.active and domain.find(host.conn, seen.vm.name).active:
            raise Conflict(f"cannot {what}: VM {seen.vm.name} has just been started")
    _repoint(host, seen, step, base, form, live)
    remove_file(host, step.top)
    path.unlink(missing_ok=True)
    report(Step(f"{Path(step.top).name} is merged into {Path(base).name}"))


def _commit(
    host: Host, name: str, disk: DiskDevice, files: tuple[str, str], path: Path, entry: Entry, report: Reporter
) -> None:
    """Merge in a running VM. Where it goes on in the lower file, that is noted: libvirt may die before it says so."""
    base, top = files
    moved = job_reporter(report, f"merge {Path(top).name} into {Path(base).name}")
    active = disk.source == top
    asked = replace(entry, unsure=True, process=forgotten.mark(host, name))

    def note(now: Entry) -> None:
        durable.write(path, asdict(now))

    def stayed() -> None:
        left = disks.find(host.conn, name, disk.target, inactive=False)
        if left.source == top and not left.mirror:  # as libvirt says, which lives then: nor will it go on below
            note(entry)

    try:
        disks.commit(host.conn, name, disk.target, base, top, moved, switching=lambda: note(asked))
    except BaseException:
        quietly(stayed)
        raise
    if active:
        note(replace(asked, switched=True))


def rewritten(seen: View, step: Merge) -> tuple[str, ...]:
    """The files that are based on the upper one of two that become one: then on the lower one."""
    return tuple(sorted(above for above, below in seen.seen.bases.items() if below == step.top))


def _as_named(disk: DiskDevice, path: str) -> str:
    """The name by which libvirt knows the file in this disk's chain."""
    return next((one for one in (disk.source, *disk.backing) if os.path.realpath(one) == os.path.realpath(path)), path)


def _live_disk(seen: View, path: str) -> DiskDevice | None:
    if not seen.vm.active:
        return None
    return next((disk for disk in seen.now if disk.source and path in seen.chain(disk.source)), None)


def _repoint(host: Host, seen: View, step: Merge, base: str, form: str, live: DiskDevice | None) -> None:
    """Let all that names the upper file name the lower one, which reads the same by now."""
    name = seen.vm.name
    running = {one for disk in seen.now if disk.source for one in seen.chain(disk.source)} if live else set()
    for above in rewritten(seen, step):
        if above not in running:  # QEMU itself rewrites those that it has open
            qemu_img.repoint(Path(above), "qcow2", Path(base), form, what=f"base {above} on {base}")
    moved = dict.fromkeys(_spellings(seen, step.top), (base, form))
    text = domain.xml(host.conn, name, inactive=True)
    if any(disk.source in moved for disk in disk_xml.read(text)):
        domain.define(host.conn, snapshot_xml.domain_with_files(text, moved), name=name)
    for one in snapshots.snapshots(host.conn, name):
        if one.files & moved.keys():
            snapshot_settle.redefine(host, name, snapshot_xml.with_files(one.xml, moved), current=one.current)


def _spellings(seen: View, path: str) -> set[str]:
    """All names by which the VM or its snapshots know a file."""
    named = {one.source for one in (*seen.now, *seen.defined)} | {path for one in seen.found for path in one.files}
    return {path} | {one for one in named if one and os.path.realpath(one) == path}


def plan_tidy(host: Host, seen: View, layers: Collection[str]) -> tuple[tuple[str, ...], tuple[Merge, ...]]:
    """Which of these files can go, and which of the VM's own can be made one."""
    return tidy(files_of(host, seen, also=[one for one in layers if Path(one).exists()]))


def tidied(seen: View, gone: Collection[str], merges: Sequence[Merge]) -> View:
    """The same when these files are gone and merged."""
    moved: dict[str, str] = {}
    for step in merges:
        moved = {top: step.base if base == step.top else base for top, base in moved.items()} | {step.top: step.base}

    def at(path: str) -> str:
        return moved.get(os.path.realpath(path), path) if path else path

    bases = {top: at(base) for top, base in seen.seen.bases.items() if top not in moved and top not in gone}
    named: dict[str, frozenset[str]] = {}
    for path, names in seen.seen.named.items():
        named[at(path)] = named.get(at(path), frozenset()) | names
    found = tuple(
        replace(one, disks=tuple(replace(disk, file=at(disk.file), overlay=at(disk.overlay)) for disk in one.disks))
        for one in seen.found
    )
    now = tuple(replace(one, source=at(one.source)) for one in seen.now)
    defined = tuple(replace(one, source=at(one.source)) for one in seen.defined)
    return View(seen.vm, found, now, defined, replace(seen.seen, bases=bases, named=named))


def tidy_up(host: Host, name: str, report: Reporter, layers: Collection[str]) -> None:
    """Remove what nobody needs of these and of the VM's own files, and make one what can be one."""
    if domain.find_or_none(host.conn, name) is None:
        return
    while True:
        seen = view(host, name)
        gone, merges = plan_tidy(host, seen, layers)
        for path in gone:
            remove_file(host, path)
        if not merges:
            return
        merge(host, seen, merges[0], report)


def shared(host: Host, name: str, one: Snapshot) -> bool:
    """Whether somebody else's disks are based on files of a snapshot, of which libvirt would not know."""
    seen = view(host, name)
    files = files_of(host, seen, also=one.files)
    real = {os.path.realpath(path) for path in one.files}
    return any(base in real and top not in files.own for top, base in files.bases.items()) or bool(
        real & {*files.others}
    )


def only_of(host: Host, vm: Domain) -> tuple[str, ...]:
    """The files that snapshots made and that only this VM needs: they go with it.

    They lie on top of disks that are its own, or did until they were flattened: then their names are this VM's.
    """
    seen = view(host, vm.name)
    aside = [path for one in seen.found for path in one.aside if Path(path).exists()]
    tops = {one.source for one in seen.defined} | {path for one in seen.found for path in one.files}
    owned, files = _owned(host, vm), files_of(host, seen, also=[one for one in tops if one])
    prefix = f"{resolve.volume_prefix(vm.name, vm.uuid)}-"

    def of_its_disks(path: str) -> bool:
        return bool(owned & set(seen.chain(path))) or Path(path).name.startswith(prefix)

    # Its own volumes go by themselves; a clone's layer may lie on what a snapshot made.
    going = [path for path in files.own if path in owned or (path in files.made and of_its_disks(path))]
    bases = dict(seen.seen.bases)
    mine: list[str] = []
    while True:  # from the top down: what somebody else's disk is based on stays, and all below it
        free = [path for path in going if path not in bases.values() and path not in files.others]
        if not free:
            return (*(path for path in mine if path not in owned), *aside)
        for path in free:
            going.remove(path)
            bases.pop(path, None)
        mine += free


@contextmanager
def working_on(host: Host, vm: str, report: Reporter) -> Iterator[Domain]:
    """The VM, nobody else's to change within the block; what a killed change left is settled first."""
    with holding(host, vm, timeout_s=_LOCK_TIMEOUT_S):
        pull_settle.settle(host, vm, report)  # before any file is merged that may need another below it
        settle(host, vm, report)
        found = domain.find(host.conn, vm)
        if not found.active:
            forgotten.require_none(host, vm, found.uuid, f"work on snapshots of VM {vm}")
        layer_check.require_known(host, found, f"work on snapshots of VM {vm}")
        yield found


def settle(host: Host, name: str, report: Reporter, *, merging: bool = False) -> None:
    """Bring what was begun on snapshots of a VM, whose name is held, to its end. ``merging``: also what takes long.

    Raises as snapshot_settle.settle.
    """
    snapshot_settle.settle(host, name, report)
    for path, entry in snapshot_journal.entries(host):
        if entry.vm == name and _tidied(host, entry, report, merging=merging):
            path.unlink(missing_ok=True)


def _tidied(host: Host, entry: Entry, report: Reporter, *, merging: bool) -> bool:
    """Whether the layers of a change are in order; ``merging`` brings them into it."""
    if domain.find_or_none(host.conn, entry.vm) is None:
        return True
    if merging:
        tidy_up(host, entry.vm, report, entry.layers)
        return True
    return plan_tidy(host, view(host, entry.vm), entry.layers) == ((), ())


def rename(host: Host, vm: str, name: str, new: str) -> None:
    """Give a snapshot that has no children yet another name."""
    (one,) = [one for one in snapshots.snapshots(host.conn, vm) if one.name == name]
    snapshot_settle.redefine(host, vm, snapshot_xml.with_name(one.xml, new), current=True)
    snapshots.forget(host.conn, vm, name)


def require_free(host: Host, vm: Domain, one: Snapshot, doing: str) -> None:
    """Raise Conflict unless the files that an internal snapshot lies in are the VM's disks, and no other's base."""
    now = {disk.source for disk in disks.disks(host.conn, vm.name, inactive=not vm.active)}
    if not one.files <= now:
        raise Conflict(
            f"cannot {doing}: it lies in {', '.join(sorted(one.files - now))}, which is not the VM's disk now",
            hint="external snapshots came after it: delete those first",
        )
    if not host.conn.local:
        return
    real = {os.path.realpath(path) for path in one.files}
    if based := sorted(top for top, base in image_users.look(host).bases.items() if base in real):
        raise Conflict(f"cannot {doing}: {', '.join(based)} needs its file as it is")


def new_tag(vm: Domain, what: str, beside: Collection[str]) -> str:
    """The word in the names of a VM's new files in the folders of these ones (snapshot_plan.tag)."""
    folders = {Path(path).parent for path in beside}
    prefix = glob.escape(resolve.volume_prefix(vm.name, vm.uuid))
    return tag(vm.uuid, what, lambda word: not any(any(one.glob(f"{prefix}*.snap-{word}*")) for one in folders))


def refresh_pools(host: Host, folder: str) -> None:
    """Let libvirt's pools of a folder know what is in it now."""
    for pool in pools.pools(host.conn):
        if pool.active and pool.path == folder:
            quietly(lambda name=pool.name: storage.refresh(host.conn, name))  # type: ignore[misc]


def write_aside(path: str, data: bytes) -> None:
    """Write a file for root alone, on the disk for good."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def settle_all(host: Host, report: Reporter, *, but: Collection[str] = ()) -> None:
    """The same for all VMs that nobody works on, ``but`` these, to the end."""
    failure = None
    for name in sorted(snapshot_journal.vms(host) - {*but}):
        try:
            with holding(host, name):
                settle(host, name, report, merging=True)
        except VmctlError as error:  # one that has to wait must not keep the others
            failure = failure or error
    if failure is not None:
        raise failure
