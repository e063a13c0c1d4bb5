"""Going back to a snapshot: fresh files on top of those that hold its state, its definition, its memory.

What holds the state stays as it is, so that one can go back as often as one likes; what the VM had goes once the VM has
the other. libvirt below 9.10 can do this for internal snapshots only; those it does itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vmctl import (
    disk_guard,
    disk_xml,
    domain_files,
    hosts,
    identity,
    image_users,
    layer_check,
    memory_pipe,
    qcow2_overlay,
    record,
    resolve,
    saved_memory,
    snapshot_journal,
    snapshot_layers,
    snapshot_plan,
    snapshot_settle,
    snapshot_xml,
    snapshots,
)
from vmctl.disk_find import Located, require_not_elsewhere
from vmctl.disk_replace import PREFIX
from vmctl.errors import Conflict, Interrupted, NotFound, Unsupported, VmctlError, quietly
from vmctl.events import Reporter, Step, Warned, silent
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain
from vmctl.hypervisor import snapshots as known
from vmctl.hypervisor.domain import Domain, State
from vmctl.image_users import Seen
from vmctl.memory_pipe import SavedMemory
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_plan import OURS, Ref
from vmctl.snapshot_xml import Snapshot
from vmctl.wait import Worker
from vmctl.workspace import workspace

if TYPE_CHECKING:
    from vmctl.snapshot_create import Taken


@dataclass(frozen=True, slots=True)
class Reverted:
    """What a revert did, or would do. ``lost`` names what is given up, ``touches`` what is made, changed or gone."""

    vm: str
    snapshot: str
    state: str
    safety: str
    lost: tuple[str, ...]
    touches: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """``fresh``: the new file of each disk by target, with file and format it is made upon; ``old``: what goes."""

    vm: Domain
    one: Snapshot
    before: str
    definition: str
    fresh: dict[str, tuple[str, str, str]]
    old: tuple[str, ...]
    lost: tuple[str, ...]
    nvram: str = ""

    def moved(self, text: str) -> str:
        """A domain's XML of the snapshot's time with what vmctl knows of the VM now, and on the fresh files."""
        for target, (new, _file, _form) in self.fresh.items():
            text = disk_xml.with_source(text, target, new, "qcow2")
        text = snapshot_xml.with_record_of(snapshot_xml.with_name(text, self.vm.name), self.before)
        return record.with_homes_of(text, self.before)


def _plan(host: Host, vm: Domain, ref: Ref) -> _Plan:
    doing = f"revert to snapshot {ref}"
    one = snapshot_plan.one_of(known.snapshots(host.conn, vm.name), ref)
    if "+" in one.kind:
        raise Unsupported(f"cannot {doing}: it lies in part in its disks' files and in part beside them")
    if not vm.persistent:
        raise Unsupported(f"cannot {doing}: VM {vm.name} is transient and ends when it stops")
    before = domain.xml(host.conn, vm.name, inactive=True)
    if one.kind == "internal":
        snapshot_layers.require_free(host, vm, one, doing)
        return _Plan(vm, one, before, "", {}, (), _lost(host, vm, one))
    if not host.conn.local:
        raise Unsupported(f"cannot {doing}: its files are on another machine", hint="run vmctl there")
    definition = snapshot_xml.definition(one)
    if not definition or any(not disk.file for disk in one.external):
        raise Unsupported(f"cannot {doing}: libvirt kept no definition with it")
    if missing := [path for path in domain_files.named(one.xml) if path.startswith("/") and not Path(path).exists()]:
        raise NotFound(f"cannot {doing}: {', '.join(sorted(missing))} is not there any more")
    prefix = resolve.volume_prefix(vm.name, vm.uuid)
    what = f"back to {one.name} {one.created.isoformat()}"
    tag = snapshot_layers.new_tag(vm, what, [disk.file for disk in one.external])
    fresh = {
        disk.target: (
            f"{Path(disk.file).parent}/{prefix}-{disk.target}.snap-{tag}.qcow2",
            disk.file,
            disk.format,
        )
        for disk in one.external
    }
    old = _given_up(host, vm, one)
    return _Plan(vm, one, before, definition, fresh, old, _lost(host, vm, one), snapshot_settle.nvram_of(host, vm))


def _given_up(host: Host, vm: Domain, one: Snapshot) -> tuple[str, ...]:
    """The files of the VM's disks now that snapshots made, and with it those between them and what is kept."""
    targets = {disk.target for disk in one.external}
    now = {disk.source for disk in disks.disks(host.conn, vm.name, inactive=True) if disk.target in targets}
    if vm.active:
        now |= {disk.source for disk in disks.disks(host.conn, vm.name, inactive=False) if disk.target in targets}
    overlays = {disk.overlay for other in known.snapshots(host.conn, vm.name) for disk in other.external}
    return tuple(sorted(path for path in now - one.files if OURS.search(path) or path in overlays))


def _lost(host: Host, vm: Domain, one: Snapshot) -> tuple[str, ...]:
    lost = []
    if vm.active:
        lost.append(f"the memory of VM {vm.name}, which is {vm.state}")
    elif vm.state is State.SAVED:
        lost.append(f"the saved memory of VM {vm.name}")
    held = {disk.target for disk in one.disks if disk.kind != "no"}
    for disk in disks.disks(host.conn, vm.name, inactive=not vm.active):
        if disk.target in held:
            path = Path(disk.source)
            used = f", up to {path.stat().st_blocks * 512} bytes in {path.name}" if path.is_file() else ""
            lost.append(f"what was written to disk {disk.target} since {one.created:%Y-%m-%d %H:%M:%S}{used}")
        elif not disk.readonly and disk.source:
            lost.append(
                f"the place of disk {disk.target} in VM {vm.name}, if it was not there then; {disk.source} stays"
            )
    return tuple(lost)


def plan(
    host: Host, text: str, report: Reporter = silent, *, start: bool | None = None, safety: bool = False
) -> Reverted:
    """What a revert would give up and touch; touches nothing."""
    ref, _one = snapshots.named(host, text)
    vm = domain.find(host.conn, ref.vm)
    for doubt in layer_check.doubts(host, vm, noting=False) if host.conn.local else ():
        raise doubt.refusal(f"work on snapshots of VM {vm.name}")
    found = _plan(host, vm, ref)
    if found.one.kind != "internal" and _has_memory(found.one, start):
        _saved(host, found)  # raises where the run would
    kept = _safety(host, vm, report, dry=True) if safety else None
    if kept is not None:
        # What it has now is the safety snapshot's then; what goes is the layer made on it a moment before.
        layers = (one.removeprefix("make ") for one in kept.touches if one.endswith(".qcow2"))
        found = replace(found, old=tuple(layers) if found.fresh else (), lost=())
    touches = (*(kept.touches if kept else ()), *_touches(found, start))
    return Reverted(ref.vm, ref.snapshot, str(vm.state), kept.name if kept else "", found.lost, touches)


def _touches(found: _Plan, start: bool | None) -> tuple[str, ...]:
    told = [f"stop VM {found.vm.name}"] if found.vm.active else []
    told += [f"make {new} on {file}" for new, file, _form in found.fresh.values()]
    told += [f"change VM {found.vm.name}"]
    if found.one.kind == "internal":
        told += [f"put {path} back to it" for path in sorted(found.one.files)]
    if found.one.kept and found.one.kept.nvram and found.nvram:
        told.append(f"write {found.nvram}")
    told += [f"read {found.one.memory_file}"] if _has_memory(found.one, start) else []
    told += [f"start VM {found.vm.name}"] if _runs_then(found, start) else []
    return (*told, *(f"delete {path}" for path in found.old))


def _has_memory(one: Snapshot, start: bool | None) -> bool:
    """Whether it goes on from memory that is in a file of its own."""
    return one.memory == "external" and start is not False


def _runs_then(found: _Plan, start: bool | None) -> bool:
    """Whether its processors run after it."""
    wakes = start is None and found.one.memory != "no" and found.one.state == "running"
    return start or wakes


def revert(host: Host, text: str, report: Reporter, *, start: bool | None = None, safety: bool = False) -> Reverted:
    """Go back. ``start``: whether the VM runs then; None: as it did, when its memory is there, else it is stopped.

    ``safety``: take a snapshot of the present state before, so that nothing is lost.
    """
    ref, _one = snapshots.named(host, text)
    with snapshot_layers.working_on(host, ref.vm, report) as vm, ExitStack() as turn:
        found = _plan(host, vm, ref)
        if not vm.active and _runs_then(found, start):
            turn.enter_context(identity.alone(host, vm, f"revert to snapshot {ref} and start", report))
            found = replace(found, before=domain.xml(host.conn, vm.name, inactive=True))  # it has a new note
        if found.one.kind == "internal":  # in the files themselves; else what they are stays
            for disk in disks.disks(host.conn, vm.name, inactive=not vm.active):
                if disk.source in found.one.files:
                    here = Located(f"{vm.name}:{disk.target}", disk.source, disk.format)
                    require_not_elsewhere(host, here, "revert", report)
        kept = ""
        if safety:
            kept = _safety(host, vm, report).name
            found = _plan(host, domain.find(host.conn, vm.name), ref)
        if found.one.kind == "internal" or _by_libvirt(host, found.one):
            _libvirts(host, found, report, start)
        else:
            _external(host, found, report, start=start)
        state, _why = domain.state(host.conn, vm.name)
        report(Step(f"VM {vm.name} is at snapshot {ref.snapshot}, {state}"))
        return Reverted(vm.name, ref.snapshot, str(state), kept, () if kept else found.lost, _touches(found, start))


def _safety(host: Host, vm: Domain, report: Reporter, *, dry: bool = False) -> Taken:
    there = [one.name for one in known.snapshots(host.conn, vm.name)]
    name = snapshot_plan.free_name(datetime.now(UTC), there, "before-revert")
    from vmctl import snapshot_create  # late, and so is lifecycle: a test harness reverts before each of its tests

    order = snapshot_create.Order(description="before a revert")
    return snapshot_create.taken(host, vm, name, order, report, dry=dry)


def _by_libvirt(host: Host, one: Snapshot) -> bool:
    """libvirt's own way needs nothing of ours beside it, and a libvirt that has one."""
    return snapshot_plan.libvirts_own(snapshots.version(host)) and not (one.kept and one.kept.nvram)


def _libvirts(host: Host, found: _Plan, report: Reporter, start: bool | None) -> None:
    from vmctl import backup_marks  # late: most VMs that are put back have none

    # QEMU puts no file back that carries dirty bitmaps, and libvirt would end the VM before it finds out.
    if backup_marks.give_up(host, found.vm):
        report(Step(f"the next backup of {found.vm.name} will be a full one"))
    if record.homes(snapshot_xml.definition(found.one)) != record.homes(found.before):
        # libvirt defines what it keeps with the snapshot: that is to say which hosts have the VM now, not then.
        text = snapshot_xml.with_homes_of(found.one.xml, found.before)
        snapshot_settle.redefine(host, found.vm.name, text, current=found.one.current)
    memory = found.one.memory != "no"
    running = False if memory and start is False else None if memory and start is None else start or None
    known.revert(host.conn, found.vm.name, found.one.name, running=running)
    now = domain.find(host.conn, found.vm.name)
    if start is False and now.active:
        domain.power_off(host.conn, now.name)


def _external(host: Host, found: _Plan, report: Reporter, *, start: bool | None) -> None:
    vm, one = found.vm, found.one
    saved = _saved(host, found) if _has_memory(one, start) else ""
    fresh = tuple(new for new, _file, _form in found.fresh.values())
    nvram = (one.kept.nvram, found.nvram) if one.kept and one.kept.nvram and found.nvram else ()
    entry = Entry(host.conn.uri, vm.name, "revert", one.name, (*fresh, *found.old), nvram=nvram)
    path = snapshot_journal.begin(host, entry)
    with ExitStack() as undo:
        undo.callback(quietly, lambda: _tell_ended(host, found, report))
        undo.callback(_settled, host, vm.name, report)
        for new, file, form in found.fresh.values():
            qcow2_overlay.make(Path(new), Path(file), form)
        if vm.active:
            _stop(host, vm, for_good=not (saved or start))
        elif vm.state is State.SAVED:
            domain.drop_saved(host.conn, vm.name)
        elif domain.find(host.conn, vm.name).active:  # not by vmctl, which holds its name
            raise Conflict(f"cannot revert to snapshot {vm.name}.{one.name}: the VM has just been started")
        current = [other for other in known.snapshots(host.conn, vm.name) if other.current]
        undo.callback(quietly, lambda: _back(host, found, current))
        domain.define(host.conn, found.moved(found.definition), name=vm.name)
        snapshot_settle.redefine(host, vm.name, one.xml, current=True)
        if nvram:
            variables = Path(found.nvram).read_bytes()
            undo.callback(lambda: _keep_nvram(host, found, variables))
            snapshot_settle.put_nvram(*nvram)
        with _looking(host) as seen:
            _run(host, found, saved, start=start)
        undo.pop_all()
    snapshot_settle.drop_unneeded(host, found.old, seen[0] if seen else None)
    path.unlink(missing_ok=True)


@contextmanager
def _looking(host: Host) -> Iterator[list[Seen]]:
    """See who needs which file while the block runs: at its end it is in the list, unless that went wrong."""
    seen: list[Seen] = []

    def look() -> None:
        with suppress(VmctlError), hosts.another(host) as own:
            seen.append(image_users.look(own))

    thread = Worker(look, "look")
    thread.start()
    try:
        yield seen
    finally:
        thread.join()


def _tell_ended(host: Host, found: _Plan, report: Reporter) -> None:
    """What was running cannot be brought back once it was ended: then at least nobody takes it for running."""
    vm = found.vm
    if vm.active and not domain.find(host.conn, vm.name).active:
        again = f"vmctl snapshot revert {vm.name}.{found.one.name}, again, puts it back to the snapshot"
        report(Warned(f"VM {vm.name} is stopped, what was in its memory lost; its disks are as they were; {again}"))


def _keep_nvram(host: Host, found: _Plan, variables: bytes) -> None:
    """Undo what was put there, unless the VM runs with it already."""
    if not domain.find(host.conn, found.vm.name).active:
        Path(found.nvram).write_bytes(variables)


def _saved(host: Host, found: _Plan) -> str:
    """The XML to restore the memory with. Raises Unsupported where libvirt would refuse it."""
    text = known.saved_xml(host.conn, found.one.memory_file)
    if (was := snapshot_xml.name(text)) != found.vm.name:
        raise Unsupported(
            f"cannot revert to snapshot {found.vm.name}.{found.one.name}: its memory is that of a VM called {was}",
            hint=f"vmctl rename {found.vm.name} {was}; or --no-start, which puts back the disks alone",
        )
    return found.moved(text)


def _stop(host: Host, vm: Domain, *, for_good: bool) -> None:
    """End the VM at once: nothing of what it has is kept. One that stays stopped must not be called crashed."""
    if for_good or not domain.kill(host.conn, vm.name):
        from vmctl import lifecycle

        lifecycle.power_off(host, vm.name)


def _back(host: Host, found: _Plan, current: Sequence[Snapshot]) -> None:
    """Undo, unless the VM runs on the fresh files already: then it has happened."""
    name = found.vm.name
    if domain.find(host.conn, name).active:
        return
    domain.define(host.conn, found.before, name=name)
    for one in current:
        snapshot_settle.redefine(host, name, one.xml, current=True)


def _run(host: Host, found: _Plan, saved: str, *, start: bool | None) -> None:
    vm, one = found.vm, found.one
    if not saved and not start:
        return
    devices = disk_xml.read(found.moved(found.definition))
    doing = f"revert VM {vm.name} to snapshot {one.name}"
    with disk_guard.claimed(host, vm.name, devices, doing):
        if saved:
            with _memory(host, one.memory_file, saved) as path:
                known.restore(
                    host.conn,
                    path,
                    saved if path == one.memory_file else None,
                    doing=doing,
                    paused=None if start is None else False,
                )
        else:
            domain.start(host.conn, vm.name)


@contextmanager
def _memory(host: Host, file: str, xml: str) -> Iterator[str]:
    """What libvirt reads the memory from: a pipe without pages of zeros, where the file can be read; or the file."""
    with ExitStack() as until:
        path = file
        with suppress(VmctlError, OSError):
            if host.conn.local:
                memory = SavedMemory(Path(file))
                head = memory.head()
                own = saved_memory.head(memory_pipe.adapted(xml), head.cookie, was_running=head.was_running)
                # Beside the file, which is where libvirt's daemon surely sees what we make.
                folder = until.enter_context(workspace(memory.path.parent, PREFIX))
                path = str(until.enter_context(memory.piped(head.size, own, folder)))
        yield path


def _settled(host: Host, name: str, report: Reporter) -> None:
    try:
        quietly(lambda: snapshot_layers.settle(host, name, report))
    except (KeyboardInterrupt, Interrupted):
        quietly(lambda: snapshot_layers.settle(host, name, report))
        raise
