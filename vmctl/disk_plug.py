"""Disks attached to VMs, while they run or not."""

from __future__ import annotations

import stat
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from vmctl import disk_chain, disk_guard, disk_guest, disk_journal, disk_spec, disk_xml, render, resolve
from vmctl.choices import Aio, Bus, Cache, DiskFormat
from vmctl.disk_find import Located, folders, locate
from vmctl.disk_journal import Entry
from vmctl.disk_spec import Attachment, Source, SourceKind, parse_source
from vmctl.errors import (
    Conflict,
    HypervisorError,
    ImageError,
    Interrupted,
    NotFound,
    SpecError,
    Unsupported,
    VmctlError,
    WrongState,
    quietly,
)
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host, holding
from vmctl.hypervisor import capabilities, devices, disks, domain, pools, snapshots, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.record import Owned

_LOCK_S = 30.0


@dataclass(frozen=True, slots=True)
class Plug:
    """A disk as it was attached, or with a dry run would be.

    ``guest``: what the guest calls it, "" while it cannot be told. ``there``: from when on the guest has it. ``made``:
    its new volume; ``added``: what the VM gets besides, for it to hang on.
    """

    vm: str
    target: str
    serial: str
    bus: str
    source: str
    format: str
    there: str
    guest: str = ""
    made: str = ""
    added: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Plan:
    vm: Domain
    view: render.AttachedView
    source: str
    live: bool
    making: Owned | None = None
    size: int = 0


def attach(
    host: Host, name: str, what: str, wanted: Attachment, report: Reporter, *, next_start: bool = False, dry: bool
) -> Plug:
    """Attach a disk: a new one by its size (``10G``), a volume, a file, or one on a network.

    At once where the VM runs, and from each later start on. All of it is undone when a step fails.
    """
    if found := disk_spec.attachment_problems(wanted):
        raise SpecError(f"cannot attach {what} to VM {name}", problems=found)
    if host.conn.local and host.conn.qemu and what.startswith("/dev/"):
        _require_device(what, name)
    with holding(host, name, timeout_s=_LOCK_S):
        if not dry:
            disk_journal.settle(host, name, report)
        plan = _planned(host, name, what, wanted, next_start=next_start)
        xml = render.attached_disk(plan.view)
        (device,) = disk_xml.read(f"<domain><devices>{xml}</devices></domain>")
        there = "now" if plan.live else "its next stop and start" if plan.vm.active else "its next start"
        view = plan.view
        done = Plug(plan.vm.name, view.target, view.serial, view.bus, plan.source, view.format, there)
        made = f"{plan.making.pool}/{plan.making.volume}" if plan.making else ""
        done = replace(done, made=made, added=_added(host, plan))
        # One that is only read is nobody's alone: its claim keeps no other from deleting it.
        held = disk_guard.unclaimed(host, device.source) if device.readonly and not dry else nullcontext()
        with held, disk_guard.claimed(host, plan.vm.name, [device], f"attach {what} to VM {name}"):
            local = host.conn.local and host.conn.qemu and plan.making is None and device.source.startswith("/")
            if local and not Path(device.source).exists():  # it was, when it was looked at
                raise NotFound(f"cannot attach {what} to VM {name}: it has just been deleted")
            if not dry:
                _journalled(host, plan, xml, report)
    if dry:
        return done
    return replace(done, guest=_seen(host, plan, report)) if plan.live else done


def _seen(host: Host, plan: _Plan, report: Reporter) -> str:
    name, view = plan.vm.name, plan.view
    report(Step(f"{name} has disk {view.target}; waiting for its guest to see it"))
    if guest := disk_guest.seen(host, name, view.serial, timeout_s=disk_guest.SEE_S):
        return guest
    if view.serial and disk_guest.answers(host, name):
        within = f"within {disk_guest.SEE_S:.0f} s"
        report(Warned(f"{name}'s guest does not show disk {view.target} {within}", f"has it a driver for {view.bus}?"))
    return ""


def preview(host: Host, name: str, what: str, wanted: Attachment) -> str:
    """The XML of the disk that attaching it would give the VM."""
    return render.attached_disk(_planned(host, name, what, wanted, next_start=True).view)


def _planned(host: Host, name: str, what: str, wanted: Attachment, *, next_start: bool) -> _Plan:
    vm = domain.find(host.conn, name)
    domain.require_persistent(vm, "attach a disk to")
    if vm.state is State.SAVED:
        raise WrongState(f"cannot attach {what} to VM {name}: it is saved", hint=f"vmctl start {name} first")
    live = vm.active and not next_start
    if live and wanted.bus not in disk_spec.HOT:
        raise WrongState(
            f"cannot attach {what} to VM {name}: bus {wanted.bus} takes no disk while the VM runs",
            hint="bus virtio and scsi do; or --next-start",
        )
    machine = vm.facts.machine
    if live and "q35" in machine:
        _require_port(host, name, what, wanted.bus)
    buses = capabilities.disk_buses(host.conn, machine) if host.conn.qemu else frozenset()
    pc = "q35" not in machine
    if (buses and wanted.bus not in buses) or (wanted.bus is Bus.IDE and not pc) or (wanted.bus is Bus.SATA and pc):
        raise Unsupported(f"cannot attach {what} to VM {name}: its machine has no bus {wanted.bus} under this libvirt")
    here = disks.disks(host.conn, name, inactive=True)
    here += disks.disks(host.conn, name, inactive=False) if vm.active else ()
    view, source, making, size = _source(host, vm, what, wanted)
    target = wanted.target or disk_spec.next_target(wanted.bus, frozenset(d.target for d in here))
    serial = wanted.serial or disk_spec.next_serial(frozenset(d.serial for d in here))
    for disk in here:
        for kind, mine, its in (("target", target, disk.target), ("serial", serial, disk.serial)):
            if mine == its:
                raise Conflict(f"cannot attach {what} to VM {name}: {kind} {mine} is taken, by {disk.source}")
        if disk.source and disk_guard.key(disk.source, local=host.conn.local) == disk_guard.key(
            source, local=host.conn.local
        ):
            raise Conflict(f"cannot attach {what} to VM {name}: it has it already, as {disk.target}")
    return _Plan(vm, replace(view, target=target, serial=serial), source, live, making, size)


def _require_port(host: Host, name: str, what: str, bus: Bus) -> None:
    """Raise when the running machine has nowhere to plug a disk of the bus, or the controller it would hang on, in."""
    text = domain.xml(host.conn, name)
    if (bus is Bus.SCSI and disk_xml.has_any_scsi_controller(text)) or not disk_xml.without_free_port(text):
        return
    more = "" if bus is Bus.SCSI or not disk_xml.has_any_scsi_controller(text) else "--bus scsi has room; or "
    raise WrongState(
        f"cannot attach {what} to VM {name}: no PCIe port of its running machine is free",
        hint=f"{more}detach another disk, or --next-start",
    )


def _view(source: Source, form: str, wanted: Attachment) -> render.AttachedView:
    file = source.kind in {SourceKind.FILE, SourceKind.BLOCK}
    return render.AttachedView(
        type=str(source.kind) if file else "network",
        format=form,
        target="",
        bus=wanted.bus,
        serial="",
        path=source.path,
        protocol="" if file else str(source.kind),
        name=source.name,
        host=source.host,
        port=source.port,
        socket=source.socket,
        cache="" if wanted.cache is Cache.DEFAULT else wanted.cache,
        aio="" if wanted.aio is Aio.DEFAULT else wanted.aio,
        discard="" if wanted.readonly else wanted.discard,
        iothread=wanted.iothread or 0,
        readonly=wanted.readonly,
        limits={name: value for name, value in wanted.limits.given().items() if value},
    )


def _source(
    host: Host, vm: Domain, what: str, wanted: Attachment
) -> tuple[render.AttachedView, str, Owned | None, int]:
    """The disk without its place in the VM, its source, and the volume to make for it."""
    if what[:1].isdigit() and "/" not in what:
        size, form = disk_spec.parse_size(what), wanted.format or DiskFormat.QCOW2
        pool = host.settings.pool
        prefix = resolve.volume_prefix(vm.name, vm.uuid)
        known = set(storage.volume_names(host.conn, pool)) | {
            one.volume for one in (vm.facts.record.owned if vm.facts.record else ())
        }
        stems = {name.rpartition(".")[0] for name in known}
        number = next(n for n in range(1, 10_000) if f"{prefix}-disk{n}" not in stems)
        volume = f"{prefix}-disk{number}.{form}"
        path = f"{storage.pool_path(host.conn, pool)}/{volume}"
        return _view(Source(SourceKind.FILE, path=path), form, wanted), path, Owned(pool, volume), size
    if "://" in what:
        source = parse_source(what)
        return _view(source, wanted.format or DiskFormat.RAW, wanted), str(source), None, 0
    if ":" in what and not what.startswith("/"):
        raise SpecError(f"cannot attach {what}: it is a disk of a VM", hint="name its volume or file")
    return _existing(host, vm, what, wanted)


def _require_device(path: str, name: str) -> None:
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise NotFound(f"cannot attach {path} to VM {name}: {error.strerror}") from error
    if not stat.S_ISBLK(mode):
        raise SpecError(f"cannot attach {path} to VM {name}: it is no block device")


def _existing(host: Host, vm: Domain, what: str, wanted: Attachment) -> tuple[render.AttachedView, str, None, int]:
    if what.startswith("/dev/"):
        source = parse_source(what)
        return _view(source, wanted.format or DiskFormat.RAW, wanted), source.path, None, 0
    found = locate(host, what)
    if found.vm is not None and found.owner != vm.name and not wanted.readonly:
        raise Conflict(
            f"cannot attach {what} to VM {vm.name}: VM {found.owner} has it as {found.target}",
            hint=f"vmctl disk detach {found.owner}:{found.target}, or attach it --readonly to both",
        )
    form = wanted.format or found.format
    if wanted.format is None and form == DiskFormat.RAW and found.path.endswith(".qcow2"):
        raise ImageError(
            f"cannot attach {what} to VM {vm.name}: it is called qcow2 and has no header of one",
            hint=f"vmctl disk check {what}; or --format raw, if that is what it is",
        )
    source = parse_source(found.path)
    if form == DiskFormat.QCOW2 and host.conn.local and Path(found.path).is_file():
        disk_chain.read(found.path, form, folders(host), doing=f"attach {what} to VM {vm.name}")
    if not wanted.readonly and host.conn.local:
        _refuse_a_base(host, vm, found, what)
    view = _view(source, form, wanted)
    if source.kind is SourceKind.RBD:
        user, secret = pools.ceph_login(host.conn, found.pool)
        view = replace(view, user=user, secret=secret)
    return view, found.path, None, 0


def _refuse_a_base(host: Host, vm: Domain, found: Located, what: str) -> None:
    from vmctl import image_users  # late: it reads every pool

    others = [*image_users.needed(host).by(found.path, but=(vm.name, found.path))]
    for one in snapshots.snapshots(host.conn, vm.name):
        others += [f"snapshot {vm.name}.{one.name}"] if found.path in one.files else []
    if others:
        raise Conflict(
            f"cannot attach {what} to VM {vm.name}: {', '.join(others)} needs it as it is",
            hint=f"vmctl disk create NEW --backing {what} makes one to write to",
        )


def _added(host: Host, plan: _Plan) -> tuple[str, ...]:
    """What _plugged adds to the VM beside the disk."""
    name, view = plan.vm.name, plan.view
    texts = [domain.xml(host.conn, name, inactive=not live) for live in ((True, False) if plan.live else (False,))]
    bare = view.bus == Bus.SCSI and not all(disk_xml.has_any_scsi_controller(text) for text in texts)
    threadless = view.iothread and not all(view.iothread in disk_xml.iothreads(text) for text in texts)
    return (*(("SCSI controller",) if bare else ()), *((f"I/O thread {view.iothread}",) if threadless else ()))


def _journalled(host: Host, plan: _Plan, xml: str, report: Reporter) -> None:
    """Plug in; killed in the middle, the journal says what the running VM has and its definition has not."""
    made = plan.source if plan.making is not None else ""
    name, view = plan.vm.name, plan.view
    disk_journal.begin(host, Entry(host.conn.uri, name, view.target, "", made, view.format, plug=xml))
    try:
        _plugged(host, plan, xml)
    finally:
        try:
            disk_journal.settle(host, name, report)
        except (KeyboardInterrupt, Interrupted):
            disk_journal.settle(host, name, report)
            raise


def _plugged(host: Host, plan: _Plan, xml: str) -> None:
    name, view = plan.vm.name, plan.view
    with ExitStack() as undo:
        if plan.making is not None:
            _make(host, plan, plan.making, undo)
        text = domain.xml(host.conn, name, inactive=True)
        if view.bus == Bus.SCSI:
            _scsi_controller(host, name, live=plan.live, undo=undo)
        for live in (True, False) if plan.live else (False,):
            if view.iothread and view.iothread not in disk_xml.iothreads(domain.xml(host.conn, name) if live else text):
                disks.add_iothread(host.conn, name, view.iothread, live=live)
                undo.callback(_quiet_iothread, host, name, view.iothread, live)
        if plan.live:
            # Registered before: a signal may come between the call's end and the next line.
            undo.callback(quietly, lambda: devices.detach(host.conn, name, xml))
            try:
                devices.attach(host.conn, name, xml, live=True)
            except HypervisorError as error:
                raise _not_opened(error, plan) from error
        undo.callback(quietly, lambda: domain.detach_disk(host.conn, name, view.target))
        devices.attach(host.conn, name, xml, live=False)
        undo.pop_all()


def _not_opened(error: HypervisorError, plan: _Plan) -> VmctlError:
    """What QEMU or libvirt says of a disk it does not take: in words of the disk's, and with what to look at."""
    said = error.message.partition(": ")[2]
    remote = "://" in plan.source
    hint = "does its server run, and offer that name to this host?" if remote else error.hint
    return ImageError(
        f"cannot attach {plan.source} to VM {plan.vm.name}: its QEMU cannot open it or plug it in: {said}",
        hint=hint or "can the user that QEMU runs as read and write it? is it of that --format?",
    )


def _quiet_iothread(host: Host, name: str, number: int, live: bool) -> None:
    quietly(lambda: disks.drop_iothread(host.conn, name, number, live=live))


def _make(host: Host, plan: _Plan, owned: Owned, undo: ExitStack) -> None:
    """Make the VM's new volume; its record names it first, so that whatever is left of a kill goes with the VM."""
    record = plan.vm.facts.record
    if record is not None:
        undo.callback(quietly, lambda: domain.set_record(host.conn, plan.vm.name, render.metadata(record)))
        more = replace(record, owned=(*record.owned, owned))
        domain.set_record(host.conn, plan.vm.name, render.metadata(more))
    undo.callback(quietly, lambda: storage.delete_volume(host.conn, owned.pool, owned.volume))
    view = render.VolumeView(owned.volume, plan.size, plan.view.format)
    storage.create_volume(host.conn, owned.pool, render.volume(view), name=owned.volume)


_CONTROLLER = '<controller type="scsi" index="0" model="virtio-scsi"/>'


def _scsi_controller(host: Host, name: str, *, live: bool, undo: ExitStack) -> None:
    """A virtio-scsi controller where there is none: libvirt's own choice is one few guests have a driver for."""
    for now in (True, False) if live else (False,):
        if disk_xml.has_any_scsi_controller(domain.xml(host.conn, name, inactive=not now)):
            continue
        devices.attach(host.conn, name, _CONTROLLER, live=now)
        if now:
            undo.callback(quietly, lambda: devices.detach(host.conn, name, _CONTROLLER))
