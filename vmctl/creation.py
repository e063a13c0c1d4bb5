"""Creating a VM: worked out first, then made step by step, each with its undo."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from vmctl import (
    disk_guard,
    first_boot,
    host_fit,
    hosts,
    identity,
    images,
    networks,
    render,
    resolve,
    seed,
    share,
    spec,
)
from vmctl.accel import Decision
from vmctl.config import Settings
from vmctl.deletion import remove
from vmctl.errors import Conflict, HypervisorError, ImageError, SpecError, VmctlError, quietly
from vmctl.events import Reporter, Step, Warned
from vmctl.guest import private_key
from vmctl.hosts import Host, holding
from vmctl.hypervisor import disks, domain, storage
from vmctl.hypervisor.domain import Domain
from vmctl.images import Image
from vmctl.lifecycle import free_port
from vmctl.locks import held
from vmctl.record import Owned, Record, SshAccess
from vmctl.spec import VM, Accel, AccelChoice, Graphics, Nic

_MACS_TIMEOUT_S = 60.0
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """A creation worked out to the last detail, nothing done yet."""

    vm: VM
    uuid: str
    decision: Decision
    image: Image
    placement: resolve.Placement
    record: Record

    def xml(self, nics: tuple[Nic, ...], record: Record) -> str:
        """The domain XML with these cards and this record."""
        vm = replace(self.vm, nics=nics)
        accel = self.decision.chosen
        return render.domain(
            resolve.resolve(vm, vm_uuid=self.uuid, accel=accel, placement=self.placement, record=record)
        )


def _own_volumes(vm: VM, prefix: str, settings: Settings) -> tuple[tuple[Owned, ...], Owned | None, tuple[str, ...]]:
    """What the VM will own, its console log among it, and the names of its new disks."""
    disks = tuple(f"{prefix}-disk{number}.qcow2" for number, d in enumerate(vm.disks, 1) if d.size_mib is not None)
    log = Owned(settings.pool, f"{prefix}-console.log") if vm.console else None
    names = (f"{prefix}.qcow2", f"{prefix}-seed.iso", *((f"{prefix}-ignition.json",) if vm.ignition else ()), *disks)
    owned = tuple(Owned(settings.pool, name) for name in names)
    return (*owned, log) if log else owned, log, disks


def plan(host: Host, vm: VM) -> Plan:
    """Work out how ``vm`` would be created; reads the host, changes nothing there.

    Raises SpecError with every problem, NotFound for the image, Unsupported for the accelerator.
    """
    spec.validate(vm)
    image = images.find(host, vm.image)
    if found := [*first_boot.image_problems(vm, image.manifest), *host_fit.problems(host, vm, image.manifest)]:
        raise SpecError(f"cannot create VM {vm.name} from image {image.manifest.stem}", problems=found)
    decision = hosts.decide_accel(host, vm.accel)
    vm_uuid = identity.free_uuid(host, vm.name)
    prefix = resolve.volume_prefix(vm.name, vm_uuid)
    owned, log, disks = _own_volumes(vm, prefix, host.settings)
    folder = images.pool_path(host, host.settings.pool)
    port = free_port() if host.conn.session and vm.nics and vm.nics[0].network is None else None
    record = Record(
        image=image.manifest.name,
        image_digest=image.manifest.digest[:12],
        spec_digest=resolve.spec_digest(vm),
        accel_requested=vm.accel,
        accel_reason=decision.reason,
        labels=dict(vm.labels),
        owned=owned,
        console_log=log,
        ssh=SshAccess(vm.user or image.manifest.default_user, "", port, first_boot.static_address(vm)),
        creating=True,
        mounts={resolve.share_tag(one.mount): one.mount for one in vm.shares},
    )
    ways = tuple(share.way(host, one, image.manifest) for one in vm.shares)
    direct = first_boot.starts_directly(vm, image.manifest)
    placement = resolve.Placement(
        root=f"{folder}/{prefix}.qcow2",
        seed=f"{folder}/{prefix}-seed.iso",
        new_disks=tuple(f"{folder}/{name}" for name in disks),
        console_log=f"{folder}/{log.volume}" if log else "",
        nvram=_nvram(host, prefix),
        kernel=_kernel(vm, image) if direct else "",
        initrd=image.initrd if direct else "",
        cmdline=image.manifest.cmdline if direct else "",
        network=host.settings.network,
        forward_port=port,
        ignition=f"{folder}/{prefix}-ignition.json",
        share_ways=ways,
    )
    return Plan(vm, vm_uuid, decision, image, placement, record)


def addressed(host: Host, planned: Plan) -> tuple[Nic, ...]:
    """The cards of the VM, those on vmctl's network with a MAC that has an address there and that nobody uses."""
    net, nics = host.settings.network, []
    taken = {mac for mac, users in networks.macs_in_use(host).items() if users - {planned.uuid}}
    known = networks.macs(host.conn.host, net)
    away = identity.macs_away(host, known, planned.uuid)
    for nic in planned.vm.nics:
        mac = nic.mac
        if mac is None and (nic.network or net) == net and planned.placement.forward_port is None:
            mac = networks.pick_mac(known, planned.uuid, taken, away)
            taken.add(mac)
        nics.append(replace(nic, mac=mac))
    return tuple(nics)


def preview(host: Host, vm: VM) -> str:
    """The domain XML that creating ``vm`` now would define; changes nothing."""
    planned = plan(host, vm)
    return planned.xml(addressed(host, planned), planned.record)


def _nvram(host: Host, prefix: str) -> str:
    """Where a VM's UEFI variables are. libvirt's own choice goes by the name alone, which a rename frees for others."""
    folder = Path.home() / ".config/libvirt/qemu/nvram" if host.conn.session else Path("/var/lib/libvirt/qemu/nvram")
    return str(folder / f"{prefix}_VARS.fd")


def tell_accel(decision: Decision, report: Reporter) -> None:
    """Say why KVM is not used although it would have been welcome: a fallback is never silent."""
    if decision.requested is AccelChoice.AUTO and decision.chosen is Accel.TCG:
        report(Warned(f"running on TCG: {decision.reason}", "mend: vmctl host info"))
    elif decision.requested is AccelChoice.KVM and decision.kvm.verdict != "works":
        report(Warned(f"using KVM as asked: {decision.reason}", "mend: vmctl host info"))


@dataclass(frozen=True, slots=True)
class Created:
    """The outcome of a create. ``existed``: it was there already, and --exist-ok let that pass."""

    vm: Domain
    existed: bool


def create(host: Host, vm: VM, report: Reporter, *, exist_ok: bool = False, start_it: bool = True) -> Created:
    """Make a VM: volumes, seed, definition, start. Undoes all of it when any step fails or is interrupted.

    Raises Conflict when the name is taken or being made by another vmctl.
    """
    spec.validate(vm)
    with holding(host, vm.name, timeout_s=120.0 if exist_ok else 0.0):
        existing = domain.find_or_none(host.conn, vm.name)
        if existing is not None and existing.facts.record is not None and existing.facts.record.creating:
            report(Step(f"clearing what a cut-off creation of {vm.name} left"))
            remove(host, existing, report)
        elif existing is not None and exist_ok:
            return Created(existing, existed=True)
        elif existing is not None:
            raise Conflict(
                f"cannot create VM {vm.name}: it exists already, {existing.state}",
                hint=f"vmctl show {vm.name}; --exist-ok accepts it as it is",
            )
        images.ensure_pools(host)
        return Created(_make(host, plan(host, vm), report, start_it=start_it), existed=False)


def _make(host: Host, planned: Plan, report: Reporter, *, start_it: bool) -> Domain:
    vm = planned.vm
    tell_accel(planned.decision, report)
    if images.outdated(planned.image.manifest, as_named=vm.image):
        report(Warned(f"image {vm.image} is of an older recipe than vmctl has", f"mend: vmctl image build {vm.image}"))
    host_key = seed.new_host_key(vm.name)
    ssh = planned.record.ssh
    record = replace(planned.record, ssh=ssh._replace(host_key=host_key.public) if ssh else None)
    with ExitStack() as undo:
        _make_volumes(host, planned, undo)
        report(Step(f"disks of {vm.name} are made from image {planned.image.manifest.stem}"))
        # Registered before, for a signal may come between the call's end and the next line; takes back only our own.
        undo.callback(quietly, lambda: _undefine_own(host, planned, host_key.public))
        nics = _define(host, planned, record, report)
        _make_seed(host, planned, host_key, nics, undo)
        if vm.autostart:
            domain.set_autostart(host.conn, vm.name, on=True)
        if start_it:
            undo.callback(quietly, lambda: domain.power_off(host.conn, vm.name))
            _start(host, vm.name)
        domain.set_record(host.conn, vm.name, render.metadata(replace(record, creating=False)))
        undo.pop_all()
    report(Step(f"{vm.name} is {'running' if start_it else 'defined'}"))
    return domain.find(host.conn, vm.name)


def _start(host: Host, name: str) -> None:
    try:
        with disk_guard.claimed(host, name, disks.disks(host.conn, name, inactive=True), f"start VM {name}"):
            domain.start(host.conn, name)
    except VmctlError as error:
        # The VM will be gone when the user reads this: not "vmctl start" is what they should try.
        error.hint = error.hint or "nothing is left of it; mend what libvirt says, and create it again"
        raise


def _undefine_own(host: Host, planned: Plan, host_key: str) -> None:
    """Undefine the VM that this creation defined, known by its host key; nobody else's of that name."""
    vm = domain.find_or_none(host.conn, planned.vm.name)
    record = vm.facts.record if vm is not None and vm.uuid == planned.uuid else None
    if record is not None and record.ssh is not None and record.ssh.host_key == host_key:
        domain.undefine(host.conn, planned.vm.name)


def _define(host: Host, planned: Plan, record: Record, report: Reporter) -> tuple[Nic, ...]:
    """Define the domain, its MACs chosen and taken in one breath, so that two creations cannot choose the same.

    Returns the cards with their MACs.
    """
    net = host.settings.network
    if planned.placement.forward_port is None and any((nic.network or net) == net for nic in planned.vm.nics):
        networks.ensure(host, report)
    with held(host.folders.runtime, f"MACs on {host.lock_scope}", timeout_s=_MACS_TIMEOUT_S):
        nics = addressed(host, planned)
        domain.define(host.conn, planned.xml(nics, record), name=planned.vm.name)
    return nics


def _mounts(planned: Plan) -> tuple[str, ...]:
    """Commands for the first boot that mount the shared folders, then and at each later boot."""
    pairs = zip(planned.vm.shares, planned.placement.share_ways, strict=True)
    return tuple(share.mount_command(one, way.driver) for one, way in pairs)


def _kernel(vm: VM, image: Image) -> str:
    """The kernel to start: firmware sets up a screen, which the faster start without it does not."""
    return image.bzimage if vm.graphics is not Graphics.NONE and image.bzimage else image.kernel


def _make_seed(host: Host, planned: Plan, host_key: seed.KeyPair, nics: tuple[Nic, ...], undo: ExitStack) -> None:
    """Write what the guest is told at its first boot; after the definition, for it names the cards by their MACs."""
    vm, prefix = planned.vm, resolve.volume_prefix(planned.vm.name, planned.uuid)
    keys = (*seed.authorized_keys(private_key(host), Path.home()), *vm.ssh_keys)
    mounting = replace(vm, runcmd=(*_mounts(planned), *vm.runcmd))
    files = first_boot.seed_files(mounting, planned.uuid, nics, host_key, keys, planned.image.manifest)
    contents = {f"{prefix}-seed.iso": seed.build_iso(files)}
    if vm.ignition:
        contents[f"{prefix}-ignition.json"] = vm.ignition.encode()
    for name, data in contents.items():
        # QEMU reads the Ignition config itself, under its own user; the seed is a disk, which libvirt hands over.
        owner = host.facts.qemu_user or "" if name.endswith(".json") else ""
        _make_volume(host, host.settings.pool, render.VolumeView(name, len(data), "raw", owner=owner), undo)
        storage.upload_bytes(host.conn, host.settings.pool, name, data)


def _make_volumes(host: Host, planned: Plan, undo: ExitStack) -> None:
    vm, pool = planned.vm, host.settings.pool
    prefix = resolve.volume_prefix(vm.name, planned.uuid)
    size = max(planned.image.manifest.virtual_size, (vm.root_size_mib or 0) * _MIB)
    views = [render.VolumeView(f"{prefix}.qcow2", size, "qcow2", backing=planned.image.disk)]
    if vm.console:
        # libvirt's log daemon appends to it; made here so that it is a volume and can be read from anywhere.
        views.append(render.VolumeView(f"{prefix}-console.log", 0, "raw"))
    for number, disk in enumerate(vm.disks, 1):
        if disk.size_mib is not None:
            views.append(render.VolumeView(f"{prefix}-disk{number}.qcow2", disk.size_mib * _MIB, disk.format))
    try:
        for view in views:
            _make_volume(host, pool, view, undo)
    except HypervisorError as error:
        storage.refresh(host.conn, host.settings.image_pool)  # libvirt lists a file until it looks again
        if planned.image.disk in images.files(host, planned.image.manifest):
            raise
        raise ImageError(
            f"cannot create VM {vm.name}: image {planned.image.manifest.stem} has lost its disk",
            hint=f"`vmctl image verify {planned.image.manifest.stem}` tells all of it; build, pull or import it again",
        ) from error


def _make_volume(host: Host, pool: str, view: render.VolumeView, undo: ExitStack) -> None:
    # Registered before: a volume cut off half-way is there too. We hold the name, so it can only be ours.
    undo.callback(quietly, lambda: storage.delete_volume(host.conn, pool, view.name))
    text = render.volume(view)
    try:
        storage.create_volume(host.conn, pool, text, name=view.name)
    except Conflict:
        storage.delete_volume(host.conn, pool, view.name)
        storage.create_volume(host.conn, pool, text, name=view.name)
