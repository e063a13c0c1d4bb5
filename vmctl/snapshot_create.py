"""Snapshots taken: worked out first, then taken by libvirt, the guest frozen if asked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmctl import (
    agent,
    disk_chain,
    domain_job,
    forgotten,
    identity,
    render,
    resolve,
    snapshot_delete,
    snapshot_journal,
    snapshot_layers,
    snapshot_plan,
    snapshot_settle,
)
from vmctl import snapshots as snapshot_verbs
from vmctl.choices import Accel
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, HypervisorError, Interrupted, SpecError, Unsupported, quietly
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import agent as hypervisor_agent
from vmctl.hypervisor import disks, domain, snapshots, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_plan import DiskState, Kind, Mode, Ref, Situation, Wanted
from vmctl.snapshot_xml import Kept, Snapshot

_READONLY = {"cdrom", "floppy"}


@dataclass(frozen=True, slots=True)
class Order:
    """What a user asks of a new snapshot. ``reuse``: one of that name goes for it; ``most``: so many of ours stay."""

    wanted: Wanted = Wanted()
    description: str = ""
    expiry: timedelta | None = None
    reuse: bool = False
    most: int | None = None
    live: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot that was taken, or with a dry run would be. ``touches``: what is made, changed or gone."""

    vm: str
    name: str
    kind: str
    memory: bool
    why: str
    touches: tuple[str, ...]


def _state_of(host: Host, folders: Collection[str], disk: DiskDevice) -> DiskState:
    readonly = disk.readonly or disk.device in _READONLY or not disk.source
    there = disk.source.startswith("/") and not disk.source.startswith("/dev/")
    # What is above it must be in a pool, and its base with it, or no other command would read through it.
    return DiskState(disk.target, disk.format, there and disk_chain.inside(disk.source, folders), readonly)


def situation(host: Host, vm: Domain, found: Collection[Snapshot]) -> Situation:
    """What the choice of a kind hangs on."""
    xml = domain.xml(host.conn, vm.name)
    devices = disks.disks(host.conn, vm.name, inactive=not vm.active)
    folders = storage.folders(host.conn)
    kinds = {kind for one in found for kind in one.kind.split("+")}
    unsaveable = [
        word for word, sign in (("shared folders", "<filesystem "), ("host devices", "<hostdev ")) if sign in xml
    ]
    return Situation(
        state=str(vm.state),
        uefi=vm.facts.firmware.startswith("uefi"),
        nvram_qcow2="<nvram " in xml and "format='qcow2'" in xml.partition("<nvram ")[2].partition(">")[0],
        local=host.conn.local,
        libvirt=snapshot_verbs.version(host),
        disks=tuple(_state_of(host, folders, disk) for disk in devices),
        kinds=frozenset(kinds - {"none"}),
        unsaveable=tuple(unsaveable),
        persistent=vm.persistent,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    vm: Domain
    ref: Ref
    mode: Mode
    overlays: dict[str, str]
    memory: str
    nvram: str
    devices: tuple[DiskDevice, ...]
    replaced: tuple[Snapshot, ...]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(one for one in (*self.overlays.values(), self.memory, self.nvram) if one)


def _plan(host: Host, vm: Domain, name: str, order: Order) -> _Plan:
    found = snapshots.snapshots(host.conn, vm.name)
    ref = Ref(vm.name, name or snapshot_plan.free_name(datetime.now(UTC), [one.name for one in found]))
    doing = f"take snapshot {ref}"
    if problem := snapshot_plan.name_problem(ref.snapshot):
        raise SpecError(f"cannot {doing}: {problem}")
    same = [one for one in found if one.name == ref.snapshot]
    if same and not order.reuse:
        raise Conflict(f"cannot {doing}: there is one of that name", hint="--reuse takes its place")
    rest = [one for one in found if one not in same]
    expired, oldest = snapshot_plan.victims(rest, datetime.now(UTC), most=order.most - 1 if order.most else None)
    if order.live and vm.facts.accel is Accel.TCG:
        raise Unsupported(
            f"cannot {doing}: what QEMU saves of an emulated guest that runs on is not always of one moment",
            hint="without --live it is held while its memory is saved",
        )
    # A replaced one still counts: it goes only when the new one is there.
    mode = snapshot_plan.choose(doing, situation(host, vm, found), order.wanted)
    if order.wanted.freeze:
        hypervisor_agent.require(host.conn, vm.name, "freeze the file systems of")
    devices = disks.disks(host.conn, vm.name, inactive=not vm.active)
    if vm.active:  # libvirt refuses it too, but late: its memory may have been written by then
        disks.require_no_job(host.conn, vm.name, devices, doing)
    overlays, memory, nvram = {}, "", ""
    external = mode.kind is Kind.EXTERNAL
    if external or not vm.active:
        sources = [disk.source for disk in devices if disk.target in mode.disks]
        identity.require_no_twin(host, vm, sources, doing, reading=not external)
    if external:
        prefix = resolve.volume_prefix(vm.name, vm.uuid)
        taken = [disk for disk in devices if disk.target in mode.disks]
        sources = [disk.source for disk in taken]
        tag = snapshot_layers.new_tag(vm, f"on {' '.join(sources)}", sources)
        for disk in taken:
            overlays[disk.target] = f"{Path(disk.source).parent}/{prefix}-{disk.target}.snap-{tag}.qcow2"
        beside = f"{Path(next(iter(overlays.values()))).parent}/{prefix}.snap-{tag}"
        memory = f"{beside}.memory" if mode.memory else ""
        nvram = f"{beside}.nvram" if snapshot_settle.nvram_of(host, vm) else ""
    return _Plan(vm, ref, mode, overlays, memory, nvram, devices, (*same, *expired, *oldest))


def create(host: Host, text: str, order: Order, report: Reporter, *, dry: bool = False) -> Taken:
    """Take a snapshot. Raises, with nothing changed, for what cannot be done."""
    ref = snapshot_verbs.refer(host, text)
    with snapshot_layers.working_on(host, ref.vm, report) as vm:
        return taken(host, vm, ref.snapshot, order, report, dry=dry)


def taken(host: Host, vm: Domain, name: str, order: Order, report: Reporter, *, dry: bool = False) -> Taken:
    """The same of a VM whose name is held."""
    plan = _plan(host, vm, name, order)
    if plan.mode.lacks:
        report(
            Warned(
                f"snapshot {plan.ref} is without the memory of VM {vm.name}, which is {vm.state}: {plan.mode.lacks}",
                "after a revert to it the VM is stopped, its disks as after a loss of power",
            )
        )
    report(Step(f"snapshot {plan.ref}: {plan.mode}"))
    touches = tuple(f"make {path}" for path in plan.files)
    if order.wanted.freeze:
        touches += (f"freeze the file systems of VM {vm.name} for a moment",)
    if plan.mode.kind is Kind.INTERNAL:
        touches += tuple(f"write into {disk.source}" for disk in plan.devices if disk.target in plan.mode.disks)
    touches += (f"change VM {vm.name}",) if plan.overlays else ()
    for gone in snapshot_delete.planned_deletes(host, vm, plan.replaced):
        touches += gone.touches
    if not dry:
        _take(host, plan, order, report)
        for one in plan.replaced:
            if one.name != plan.ref.snapshot:
                # Read anew each time: when the one before it went, it got another parent, and perhaps another file.
                (now,) = [other for other in snapshots.snapshots(host.conn, vm.name) if other.name == one.name]
                snapshot_delete.remove(host, vm, now, report)
    told = plan.mode
    return Taken(vm.name, plan.ref.snapshot, told.kind, told.memory, told.why, touches)


def _take(host: Host, plan: _Plan, order: Order, report: Reporter) -> None:
    vm, ref = plan.vm, plan.ref
    expires = datetime.now(UTC) + order.expiry if order.expiry else None
    same = [one for one in plan.replaced if one.name == ref.snapshot]
    name = ref.snapshot
    if same and plan.mode.kind is Kind.INTERNAL:
        snapshot_delete.remove(host, vm, same[0], report)  # QEMU itself knows it by its name
    elif same:
        name = snapshot_plan.free_name(datetime.now(UTC), [one.name for one in snapshots.snapshots(host.conn, vm.name)])
    entry = Entry(
        uri=host.conn.uri,
        vm=vm.name,
        doing="create",
        snapshot=name,
        files=plan.files,
        layers=tuple(disk.source for disk in plan.devices if disk.target in plan.overlays),
        frozen=order.wanted.freeze,
        expires=expires.isoformat() if expires else "",
        keep=plan.nvram or "-",
        process=forgotten.mark(host, vm.name),
    )
    try:
        path = snapshot_journal.begin(host, entry)  # here: a Ctrl-C right after it leaves no entry behind
        _frozen(host, vm.name, lambda: _call(host, plan, name, order, report), freeze=order.wanted.freeze)
        (made,) = [one for one in snapshots.snapshots(host.conn, vm.name) if one.name == name]
        snapshot_settle.keep(host, vm.name, made, Kept(plan.nvram, expires))
    except BaseException:
        _settled(host, vm.name, report)
        quietly(lambda: _tell_made(host, Ref(vm.name, name), report))
        raise
    path.unlink(missing_ok=True)
    for folder in {str(Path(one).parent) for one in plan.files}:
        snapshot_layers.refresh_pools(host, folder)
    if name != ref.snapshot:
        snapshot_delete.remove(host, vm, same[0], report)
        snapshot_layers.rename(host, vm.name, name, ref.snapshot)


def _tell_made(host: Host, ref: Ref, report: Reporter) -> None:
    """Say that a snapshot is there all the same: libvirt had it when the rest of taking it failed or was stopped."""
    if any(one.name == ref.snapshot for one in snapshots.snapshots(host.conn, ref.vm)):
        report(Warned(f"snapshot {ref} is there, whole", f"vmctl snapshot delete {ref}, if it shall not stay"))


def _frozen(host: Host, name: str, work: Callable[[], None], *, freeze: bool) -> None:
    if not freeze:
        work()
        return
    agent.freeze(host, name)
    try:
        work()
    finally:
        agent.thaw(host, name)


def _settled(host: Host, name: str, report: Reporter) -> None:
    """Settle after a failure; a Ctrl-C that comes in the middle of it waits for its end."""
    try:
        quietly(lambda: snapshot_layers.settle(host, name, report, merging=True))
    except (KeyboardInterrupt, Interrupted):
        quietly(lambda: snapshot_layers.settle(host, name, report, merging=True))
        raise


def _call(host: Host, plan: _Plan, name: str, order: Order, report: Reporter) -> None:
    vm, mode = plan.vm, plan.mode
    kind = "external" if mode.kind is Kind.EXTERNAL else "internal"
    view = render.SnapshotView(
        name,
        order.description,
        ("external" if plan.memory else "internal") if mode.memory else "no",
        plan.memory,
        tuple(
            render.SnapshotDiskView(one.target, kind, plan.overlays.get(one.target, ""))
            if one.target in mode.disks
            else render.SnapshotDiskView(one.target, "no")
            for one in plan.devices
        ),
    )
    xml = render.snapshot(view)
    before = Path(snapshot_settle.nvram_of(host, vm)).read_bytes() if plan.nvram else b""
    only = mode.kind is Kind.EXTERNAL and not mode.memory
    live = order.live and mode.memory

    def take() -> None:
        try:
            snapshots.take(host.conn, vm.name, xml, snapshot_journal.aside(host, vm.name), disks_only=only, live=live)
        except HypervisorError as error:
            disk = f"{vm.name}:{mode.disks[0]}" if mode.disks else f"{vm.name}:DISK"
            error.hint = (
                error.hint or f"are all files of its disks there, and has their pool room? vmctl disk show {disk}"
            )
            raise

    ended = domain_job.telling_end(host, vm, f"take snapshot {plan.ref}", f"vmctl snapshot list {vm.name}")
    with ended, domain_job.running_on(host, vm.name) if vm.state is State.RUNNING else nullcontext():
        domain_job.blocking(host, vm.name, take, report, f"take snapshot {plan.ref}")
    snapshot_settle.private(host, plan.overlays.values())
    if plan.nvram:
        after = Path(snapshot_settle.nvram_of(host, vm)).read_bytes()
        snapshot_layers.write_aside(plan.nvram, before if before == after else after)
