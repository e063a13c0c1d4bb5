"""Snapshots taken, listed, shown and deleted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from uuid import uuid4

from vmctl import (
    agent,
    disk_chain,
    domain_job,
    render,
    resolve,
    snapshot_journal,
    snapshot_layers,
    snapshot_plan,
    snapshot_settle,
    snapshot_xml,
)
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, Interrupted, NotFound, SpecError, Unsupported, VmctlError, WrongState, quietly
from vmctl.events import Reporter, Step
from vmctl.hosts import Host, holding
from vmctl.hypervisor import agent as hypervisor_agent
from vmctl.hypervisor import connection, disks, domain, snapshots, storage
from vmctl.hypervisor.domain import Domain
from vmctl.snapshot_journal import Entry
from vmctl.snapshot_plan import DiskState, Kind, Mode, Ref, Situation, Wanted
from vmctl.snapshot_xml import Kept, Snapshot, SnapshotDisk

_LOCK_TIMEOUT_S = 30.0
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
class Listed:
    """One snapshot as it is listed. ``size`` in bytes is what goes with it: saved memory and NVRAM, not its disks."""

    vm: str
    name: str
    parent: str
    current: bool
    created: datetime
    expires: datetime | None
    state: str
    kind: str
    memory: bool
    disks: tuple[str, ...]
    size: int
    ours: bool
    description: str


@dataclass(frozen=True, slots=True)
class Shown:
    """All about one snapshot. ``revert`` says why it cannot be reverted to, "" when it can."""

    snapshot: Listed
    children: tuple[str, ...]
    disks: tuple[SnapshotDisk, ...]
    memory_file: str
    nvram: str
    revert: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A line of the tree: the snapshot, or where the VM is now ("" for its name), and how it is drawn."""

    name: str
    parent: str
    current: bool
    line: str


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot that was taken, or with a dry run would be. ``touches``: what is made, changed or gone."""

    vm: str
    name: str
    kind: str
    memory: bool
    why: str
    touches: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deleted:
    """A snapshot that was deleted, or would be."""

    vm: str
    name: str
    touches: tuple[str, ...]


def refer(host: Host, text: str) -> Ref:
    """What ``VM`` or ``VM.SNAPSHOT`` names. Raises NotFound when there is no such VM."""
    return snapshot_plan.address(text, [name for name, _ in domain.identities(host.conn)])


def named(host: Host, text: str) -> tuple[Ref, Snapshot]:
    """The snapshot that is named. Raises NotFound, SpecError."""
    ref = refer(host, text)
    if not ref.snapshot:
        raise SpecError(f"cannot use snapshot {text}: that is a VM", hint=f"vmctl snapshot list {text}")
    return ref, snapshot_plan.one_of(snapshots.snapshots(host.conn, ref.vm), ref)


def listed(vm: str, one: Snapshot) -> Listed:
    """A snapshot as it is listed."""
    size = sum(Path(path).stat().st_blocks * 512 for path in one.aside if Path(path).exists())
    return Listed(
        vm=vm,
        name=one.name,
        parent=one.parent,
        current=one.current,
        created=one.created,
        expires=one.kept.expires if one.kept else None,
        state=one.state,
        kind=one.kind,
        memory=one.memory != "no",
        disks=tuple(disk.target for disk in one.disks if disk.kind != "no"),
        size=size,
        ours=one.kept is not None,
        description=one.description,
    )


def list_all(host: Host, names: Collection[str]) -> tuple[Listed, ...]:
    """The snapshots of the VMs that match ``names`` (none: of all)."""
    vms = [vm for vm, _ in domain.identities(host.conn) if not names or any(fnmatchcase(vm, one) for one in names)]
    if names and not vms:
        raise NotFound(f"cannot list snapshots of {', '.join(names)}: no VM of that name")
    return tuple(listed(vm, one) for vm in sorted(vms) for one in snapshots.snapshots(host.conn, vm))


def show(host: Host, text: str) -> Shown:
    """Everything about a snapshot. Raises NotFound."""
    ref, one = named(host, text)
    children = tuple(other.name for other in snapshots.snapshots(host.conn, ref.vm) if other.parent == one.name)
    missing = [path for path in sorted({*one.files, *one.aside}) if host.conn.local and not Path(path).exists()]
    why = f"cannot: {', '.join(missing)} is not there any more" if missing else ""
    nvram = one.kept.nvram if one.kept else ""
    return Shown(listed(ref.vm, one), children, one.disks, one.memory_file, nvram, why)


def tree(host: Host, vm: str) -> tuple[Leaf, ...]:
    """The snapshots of a VM as they come from each other."""
    found = snapshots.snapshots(host.conn, domain.find(host.conn, vm).name)
    leaves = []
    current = next((one.name for one in found if one.current), "")
    for branch in snapshot_plan.tree(found):
        one = branch.snapshot
        if one is None:
            leaves.append(Leaf("", current, True, f"{branch.lead}* you are here"))
        else:
            what = f"{one.kind}{', memory' if one.memory != 'no' else ''}"
            line = f"{branch.lead}{one.name}  {one.created.astimezone():%Y-%m-%d %H:%M:%S}  {what}"
            leaves.append(Leaf(one.name, one.parent, False, line))
    return tuple(leaves)


@contextmanager
def working_on(host: Host, vm: str, report: Reporter) -> Iterator[Domain]:
    """The VM, nobody else's to change within the block; what a killed change left is settled first."""
    with holding(host, vm, timeout_s=_LOCK_TIMEOUT_S):
        snapshot_layers.settle(host, vm, report)
        yield domain.find(host.conn, vm)


def _version(host: Host) -> tuple[int, ...]:
    return tuple(int(part) for part in connection.versions(host.conn).libvirt.split("."))


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
        libvirt=_version(host),
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
    # A replaced one still counts: it goes only when the new one is there.
    mode = snapshot_plan.choose(doing, situation(host, vm, found), order.wanted)
    if order.wanted.freeze:
        hypervisor_agent.require(host.conn, vm.name, "freeze the file systems of")
    devices = disks.disks(host.conn, vm.name, inactive=not vm.active)
    overlays, memory, nvram = {}, "", ""
    if mode.kind is Kind.EXTERNAL:
        prefix = resolve.volume_prefix(vm.name, vm.uuid)
        for disk in devices:
            if disk.target in mode.disks:
                overlays[disk.target] = (
                    f"{Path(disk.source).parent}/{prefix}-{disk.target}.snap-{uuid4().hex[:8]}.qcow2"
                )
        beside = f"{Path(next(iter(overlays.values()))).parent}/{prefix}.snap-{uuid4().hex[:8]}"
        memory = f"{beside}.memory" if mode.memory else ""
        nvram = f"{beside}.nvram" if vm.facts.nvram and Path(vm.facts.nvram).exists() else ""
    return _Plan(vm, ref, mode, overlays, memory, nvram, devices, (*same, *expired, *oldest))


def create(host: Host, text: str, order: Order, report: Reporter, *, dry: bool = False) -> Taken:
    """Take a snapshot. Raises, with nothing changed, for what cannot be done."""
    ref = refer(host, text)
    with working_on(host, ref.vm, report) as vm:
        return taken(host, vm, ref.snapshot, order, report, dry=dry)


def taken(host: Host, vm: Domain, name: str, order: Order, report: Reporter, *, dry: bool = False) -> Taken:
    """The same of a VM whose name is held."""
    plan = _plan(host, vm, name, order)
    report(Step(f"snapshot {plan.ref}: {plan.mode}"))
    touches = tuple(f"make {path}" for path in plan.files)
    if order.wanted.freeze:
        touches += (f"freeze the file systems of VM {vm.name} for a moment",)
    if plan.mode.kind is Kind.INTERNAL:
        touches += tuple(f"write into {disk.source}" for disk in plan.devices if disk.target in plan.mode.disks)
    touches += (f"change VM {vm.name}",) if plan.overlays else ()
    for one in plan.replaced:
        touches += (f"delete snapshot {vm.name}.{one.name}", *planned_delete(host, vm, one).touches)
    if not dry:
        _take(host, plan, order, report)
        for one in plan.replaced:
            if one.name != plan.ref.snapshot:
                _remove(host, vm, one, report)
    told = plan.mode
    return Taken(vm.name, plan.ref.snapshot, told.kind, told.memory, told.why, touches)


def _take(host: Host, plan: _Plan, order: Order, report: Reporter) -> None:
    vm, ref = plan.vm, plan.ref
    expires = datetime.now(UTC) + order.expiry if order.expiry else None
    same = [one for one in plan.replaced if one.name == ref.snapshot]
    name = ref.snapshot
    if same and plan.mode.kind is Kind.INTERNAL:
        _remove(host, vm, same[0], report)  # QEMU itself knows it by its name
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
    )
    path = snapshot_journal.begin(host, entry)
    try:
        _frozen(host, vm.name, lambda: _call(host, plan, name, order, report), freeze=order.wanted.freeze)
        (made,) = [one for one in snapshots.snapshots(host.conn, vm.name) if one.name == name]
        snapshot_settle.keep(host, vm.name, made, Kept(plan.nvram, expires))
    except BaseException:
        _settled(host, vm.name, report)
        raise
    path.unlink(missing_ok=True)
    for folder in {str(Path(one).parent) for one in plan.files}:
        snapshot_layers.refresh_pools(host, folder)
    if name != ref.snapshot:
        _remove(host, vm, same[0], report)
        snapshot_layers.rename(host, vm.name, name, ref.snapshot)


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
    before = Path(vm.facts.nvram).read_bytes() if plan.nvram else b""
    only = mode.kind is Kind.EXTERNAL and not mode.memory
    live = order.live and mode.memory

    def take() -> None:
        snapshots.take(host.conn, vm.name, xml, disks_only=only, live=live)

    domain_job.blocking(host, vm.name, take, report, f"take snapshot {plan.ref}")
    if plan.nvram:
        after = Path(vm.facts.nvram).read_bytes()
        snapshot_layers.write_aside(plan.nvram, before if before == after else after)


def planned_delete(host: Host, vm: Domain, one: Snapshot) -> Deleted:
    """What deleting a snapshot would do. Raises for one that cannot be deleted."""
    _require_deletable(host, vm, one)
    if one.kind == "internal":
        return Deleted(vm.name, one.name, tuple(f"free its blocks in {path}" for path in sorted(one.files)))
    seen = snapshot_layers.view(host, vm.name)
    seen = replace(seen, found=tuple(other for other in seen.found if other.name != one.name))
    gone, merges = snapshot_layers.plan_tidy(host, seen, one.files)
    told = [f"delete {path}" for path in one.aside if Path(path).exists()]
    told += [f"merge {step.top} into {step.base}, and delete it" for step in merges]
    told += [f"delete {path}" for path in gone]
    return Deleted(vm.name, one.name, tuple(told))


def _require_deletable(host: Host, vm: Domain, one: Snapshot) -> None:
    doing = f"delete snapshot {vm.name}.{one.name}"
    if one.kind == "internal":
        snapshot_layers.require_free(host, vm, one, doing)
    elif one.kind != "none" and not host.conn.local:
        raise Unsupported(f"cannot {doing}: its files are on another machine", hint="run vmctl there")
    if "+" in one.kind:
        raise Unsupported(
            f"cannot {doing}: it lies in part in its disks' files and in part beside them",
            hint="virsh snapshot-delete --metadata lets libvirt forget it",
        )
    if vm.state is domain.State.SAVED and one.kind != "internal":
        raise WrongState(f"cannot {doing}: VM {vm.name} has saved memory", hint=f"vmctl start {vm.name}")


def delete(host: Host, text: str, report: Reporter, *, dry: bool = False) -> Deleted:
    """Delete a snapshot. What other snapshots, the VM and other disks need of its files stays."""
    ref = refer(host, text)
    with working_on(host, ref.vm, report) as vm:
        one = snapshot_plan.one_of(snapshots.snapshots(host.conn, vm.name), ref)
        told = planned_delete(host, vm, one)
        if not dry:
            _remove(host, vm, one, report)
        return told


def delete_expired(host: Host, names: Collection[str], report: Reporter, *, dry: bool = False) -> tuple[Deleted, ...]:
    """Delete the expired snapshots of the VMs that match ``names`` (none: of all)."""
    now = datetime.now(UTC)
    old = [row for row in list_all(host, names) if row.expires is not None and row.expires <= now]
    return tuple(delete(host, f"{row.vm}.{row.name}", report, dry=dry) for row in old)


def _remove(host: Host, vm: Domain, one: Snapshot, report: Reporter) -> None:
    _require_deletable(host, vm, one)
    by_libvirt = snapshot_plan.libvirts_own(_version(host)) and not one.aside
    if one.kind == "internal" or (by_libvirt and not snapshot_layers.shared(host, vm.name, one)):
        snapshots.delete(host.conn, vm.name, one.name)
        report(Step(f"snapshot {vm.name}.{one.name} is deleted"))
        return
    entry = Entry(host.conn.uri, vm.name, "delete", one.name, one.aside, tuple(sorted(one.files)))
    path = snapshot_journal.begin(host, entry)
    xml = snapshot_xml.without_overlays(one.xml)
    if xml != one.xml:
        snapshots.redefine(host.conn, vm.name, xml, current=one.current)
    snapshots.forget(host.conn, vm.name, one.name)
    snapshot_settle.drop_unneeded(host, one.aside)
    try:
        snapshot_layers.tidy_up(host, vm.name, report, entry.layers)
    except (VmctlError, KeyboardInterrupt) as error:
        hint = "the snapshot is gone; its files wait to be merged, which vmctl doctor --fix does"
        if isinstance(error, VmctlError):
            error.hint = error.hint or hint
        else:
            report(Step(hint))
        raise
    path.unlink(missing_ok=True)
    report(Step(f"snapshot {vm.name}.{one.name} is deleted"))
