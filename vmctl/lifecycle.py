"""The life of a VM: create, start, stop and the rest, rename, delete."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from vmctl import hosts, images, networks, render, resolve, seed, spec
from vmctl.accel import Decision, timeout_scale
from vmctl.config import Settings
from vmctl.errors import Conflict, HypervisorError, NotFound, SpecError, VmctlError, WaitTimeout, WrongState
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.guest import known_hosts, private_key
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage
from vmctl.hypervisor.domain import ACTIVE, Domain, State
from vmctl.images import Image
from vmctl.locks import held
from vmctl.record import Owned, Record, SshAccess
from vmctl.spec import VM, Accel, AccelChoice, Nic
from vmctl.wait import wait_until

_STATE_POLL_S = 0.05
_POWER_OFF_TIMEOUT_S = 30.0
_PRESS_AGAIN_S = 5.0
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


def _lock_name(host: Host, name: str) -> str:
    return f"VM {name} on {host.lock_scope}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _own_volumes(vm: VM, prefix: str, settings: Settings) -> tuple[tuple[Owned, ...], Owned | None, tuple[str, ...]]:
    """What the VM will own, its console log among it, and the names of its new disks."""
    disks = tuple(f"{prefix}-disk{number}.qcow2" for number, d in enumerate(vm.disks, 1) if d.size_mib is not None)
    log = Owned(settings.pool, f"{prefix}-console.log") if vm.console else None
    names = (f"{prefix}.qcow2", f"{prefix}-seed.iso", *disks)
    owned = tuple(Owned(settings.pool, name) for name in names)
    return (*owned, log) if log else owned, log, disks


def plan(host: Host, vm: VM) -> Plan:
    """Work out how ``vm`` would be created; reads the host, changes nothing there.

    Raises SpecError with every problem, NotFound for the image, Unsupported for the accelerator.
    """
    spec.validate(vm)
    image = images.find(host, vm.image)
    decision = hosts.decide_accel(host, vm.accel)
    taken = {other.uuid for other in host_domains(host) if other.name != vm.name}
    vm_uuid = resolve.identity(host.conn.host, vm.name, taken)
    prefix = resolve.volume_prefix(vm.name, vm_uuid)
    owned, log, disks = _own_volumes(vm, prefix, host.settings)
    folder = images.pool_path(host, host.settings.pool)
    port = _free_port() if host.conn.session and vm.nics and vm.nics[0].network is None else None
    record = Record(
        image=image.manifest.name,
        image_digest=image.manifest.digest[:12],
        spec_digest=resolve.spec_digest(vm),
        accel_requested=vm.accel,
        accel_reason=decision.reason,
        labels=dict(vm.labels),
        owned=owned,
        console_log=log,
        ssh=SshAccess(image.manifest.default_user, "", port),
        creating=True,
    )
    placement = resolve.Placement(
        root=f"{folder}/{prefix}.qcow2",
        seed=f"{folder}/{prefix}-seed.iso",
        new_disks=tuple(f"{folder}/{name}" for name in disks),
        console_log=f"{folder}/{log.volume}" if log else "",
        nvram=_nvram(host, prefix),
        kernel=image.kernel,
        initrd=image.initrd,
        cmdline=image.manifest.cmdline,
        network=host.settings.network,
        forward_port=port,
    )
    return Plan(vm, vm_uuid, decision, image, placement, record)


def addressed(host: Host, planned: Plan) -> tuple[Nic, ...]:
    """The cards of the VM, those on vmctl's network with a MAC that has an address there and that nobody uses."""
    net, nics = host.settings.network, []
    taken = {mac for mac, users in networks.macs_in_use(host).items() if users - {planned.uuid}}
    for nic in planned.vm.nics:
        mac = nic.mac
        if mac is None and (nic.network or net) == net and planned.placement.forward_port is None:
            mac = networks.pick_mac(networks.macs(host.conn.host, net), planned.uuid, taken)
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


@dataclass(frozen=True, slots=True)
class NameAndUuid:
    """A domain's two names."""

    name: str
    uuid: str


def host_domains(host: Host) -> tuple[NameAndUuid, ...]:
    """Names and UUIDs of all domains; one call."""
    return tuple(NameAndUuid(name, uuid) for name, uuid in domain.identities(host.conn))


def tell_accel(decision: Decision, report: Reporter) -> None:
    """Say why KVM is not used although it would have been welcome: a fallback is never silent."""
    if decision.requested is AccelChoice.AUTO and decision.chosen is Accel.TCG:
        report(Warned(f"running on TCG: {decision.reason}", decision.mend))
    elif decision.requested is AccelChoice.KVM and decision.kvm.verdict != "works":
        report(Warned(f"using KVM as asked: {decision.reason}", decision.mend))


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
    with held(host.folders.runtime, _lock_name(host, vm.name), timeout_s=120.0 if exist_ok else 0.0):
        existing = domain.find_or_none(host.conn, vm.name)
        if existing is not None and existing.facts.record is not None and existing.facts.record.creating:
            report(Step(f"clearing what a cut-off creation of {vm.name} left"))
            _remove(host, existing, report)
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
    host_key = seed.new_host_key(vm.name)
    ssh = planned.record.ssh
    record = replace(planned.record, ssh=replace(ssh, host_key=host_key.public) if ssh else None)
    with ExitStack() as undo:
        _make_volumes(host, planned, host_key, undo)
        report(Step(f"disks of {vm.name} are made from image {planned.image.manifest.stem}"))
        # Registered before, for a signal may come between the call's end and the next line; takes back only our own.
        undo.callback(_quietly, lambda: _undefine_own(host, planned, host_key.public))
        _define(host, planned, record, report)
        if vm.autostart:
            domain.set_autostart(host.conn, vm.name, on=True)
        if start_it:
            undo.callback(_quietly, lambda: domain.power_off(host.conn, vm.name))
            domain.start(host.conn, vm.name)
        domain.set_record(host.conn, vm.name, render.metadata(replace(record, creating=False)))
        undo.pop_all()
    report(Step(f"{vm.name} is {'running' if start_it else 'defined'}"))
    return domain.find(host.conn, vm.name)


def _undefine_own(host: Host, planned: Plan, host_key: str) -> None:
    """Undefine the VM that this creation defined, known by its host key; nobody else's of that name."""
    vm = domain.find_or_none(host.conn, planned.vm.name)
    record = vm.facts.record if vm is not None and vm.uuid == planned.uuid else None
    if record is not None and record.ssh is not None and record.ssh.host_key == host_key:
        domain.undefine(host.conn, planned.vm.name)


def _define(host: Host, planned: Plan, record: Record, report: Reporter) -> None:
    """Define the domain, its MACs chosen and taken in one breath, so that two creations cannot choose the same."""
    net = host.settings.network
    if planned.placement.forward_port is None and any((nic.network or net) == net for nic in planned.vm.nics):
        networks.ensure(host, report)
    with held(host.folders.runtime, f"MACs on {host.lock_scope}", timeout_s=_MACS_TIMEOUT_S):
        domain.define(host.conn, planned.xml(addressed(host, planned), record), name=planned.vm.name)


def _quietly(act: Callable[[], object]) -> None:
    """Undo one step. What undoing meets must not hide why there was something to undo."""
    try:
        act()
    except VmctlError:
        return


def _make_volumes(host: Host, planned: Plan, host_key: seed.KeyPair, undo: ExitStack) -> None:
    vm, pool = planned.vm, host.settings.pool
    prefix = resolve.volume_prefix(vm.name, planned.uuid)
    size = max(planned.image.manifest.virtual_size, (vm.root_size_mib or 0) * _MIB)
    iso = seed.build_iso(
        render.SeedView(
            instance_id=planned.uuid,
            hostname=vm.name,
            ssh_keys=tuple(dict.fromkeys((*seed.authorized_keys(private_key(host), Path.home()), *vm.ssh_keys))),
            host_key_private=host_key.private,
            host_key_public=host_key.public,
            runcmd=vm.runcmd,
        )
    )
    views = [
        render.VolumeView(f"{prefix}.qcow2", size, "qcow2", backing=planned.image.disk),
        render.VolumeView(f"{prefix}-seed.iso", len(iso), "raw"),
    ]
    if vm.console:
        # libvirt's log daemon appends to it; made here so that it is a volume and can be read from anywhere.
        views.append(render.VolumeView(f"{prefix}-console.log", 0, "raw"))
    for number, disk in enumerate(vm.disks, 1):
        if disk.size_mib is not None:
            views.append(render.VolumeView(f"{prefix}-disk{number}.qcow2", disk.size_mib * _MIB, disk.format))
    for view in views:
        _make_volume(host, pool, view, undo)
    storage.upload_bytes(host.conn, pool, f"{prefix}-seed.iso", iso)


def _make_volume(host: Host, pool: str, view: render.VolumeView, undo: ExitStack) -> None:
    # Registered before: a volume cut off half-way is there too. We hold the name, so it can only be ours.
    undo.callback(_quietly, lambda: storage.delete_volume(host.conn, pool, view.name))
    text = render.volume(view)
    try:
        storage.create_volume(host.conn, pool, text, name=view.name)
    except Conflict:
        storage.delete_volume(host.conn, pool, view.name)
        storage.create_volume(host.conn, pool, text, name=view.name)


class Started(StrEnum):
    """How a start went."""

    BOOTED = "booted"
    RESTORED = "resumed from its saved memory"
    ALREADY = "running already"


def start(host: Host, name: str, report: Reporter) -> Started:
    """Boot it, or bring it back from its saved memory; one that runs is left alone."""
    vm = domain.find(host.conn, name)
    if vm.state is State.PAUSED:
        raise WrongState(f"cannot start VM {name}: it is paused", hint=f"vmctl resume {name}")
    if vm.active:
        return Started.ALREADY
    for nic in vm.facts.nics:
        if nic.source == host.settings.network:
            networks.ensure(host, report)
    _renew_forward(host, vm, report)
    try:
        domain.start(host.conn, name)
    except (WrongState, HypervisorError):
        if domain.find(host.conn, name).active:  # another one started it meanwhile
            return Started.ALREADY
        raise
    return Started.RESTORED if vm.state is State.SAVED else Started.BOOTED


def _renew_forward(host: Host, vm: Domain, report: Reporter) -> None:
    """Choose another loopback port when the one of a stopped VM has been taken by someone else."""
    record = vm.facts.record
    if record is None or record.ssh is None or record.ssh.forward_port is None or vm.state is State.SAVED:
        return
    port = record.ssh.forward_port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return
        except OSError:
            new = _free_port()
    text = domain.xml(host.conn, vm.name, inactive=True)
    text = text.replace(f"hostfwd=tcp:127.0.0.1:{port}-:22", f"hostfwd=tcp:127.0.0.1:{new}-:22")
    domain.define(host.conn, text, name=vm.name)
    domain.set_record(host.conn, vm.name, render.metadata(replace(record, ssh=replace(record.ssh, forward_port=new))))
    report(Step(f"port {port} is taken: SSH to {vm.name} goes through {new} now"))


class Stopped(StrEnum):
    """Which way a VM stopped."""

    ACPI = "powered off by the guest (ACPI)"
    AGENT = "powered off by the guest (agent)"
    FORCED = "powered off by force"
    ALREADY = "stopped already"


def default_stop_timeout_s(vm: Domain) -> float:
    """How long a stop waits for the guest unless told otherwise."""
    return 30.0 * timeout_scale(vm.facts.accel or Accel.KVM)


def stop(host: Host, name: str, report: Reporter, *, timeout_s: float | None = None, force: bool = False) -> Stopped:
    """Ask the guest to power off: by ACPI, half-way through the time by its agent, at the end by force if allowed.

    Raises WaitTimeout when the guest is still up and ``force`` was not given.
    """
    vm = domain.find(host.conn, name)
    if not vm.active:
        return Stopped.ALREADY
    if vm.state is State.PAUSED and not force:
        raise WrongState(
            f"cannot stop VM {name}: it is paused and cannot hear", hint=f"vmctl resume {name}, or stop --force"
        )
    budget = default_stop_timeout_s(vm) if timeout_s is None else timeout_s
    for way in (Stopped.ACPI, Stopped.AGENT) if vm.state is not State.PAUSED else ():
        if _asked_stop(host, vm, way, budget / 2):
            return way
        report(Step(f"{name} did not stop by {'ACPI' if way is Stopped.ACPI else 'its agent'} in {budget / 2:.0f} s"))
    if not force:
        raise WaitTimeout(
            f"cannot stop VM {name}", after_s=budget, hint=f"vmctl stop {name} --force pulls its plug at the end"
        )
    _power_off(host, name)
    return Stopped.FORCED


def _asked_stop(host: Host, vm: Domain, way: Stopped, timeout_s: float) -> bool:
    if way is Stopped.AGENT and not domain.agent_connected(host.conn, vm.name):
        return _ended(host, vm.name, timeout_s)  # no agent to ask: give the button's work the rest of the time
    ask = domain.shutdown_acpi if way is Stopped.ACPI else domain.shutdown_agent
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ask(host.conn, vm.name)
        except (WrongState, NotFound):
            return True  # it ended just now
        except (HypervisorError, WaitTimeout):
            return _ended(host, vm.name, deadline - time.monotonic())
        left = deadline - time.monotonic()
        # A guest still booting drops the button's event: press again.
        if _ended(host, vm.name, min(_PRESS_AGAIN_S, left)):
            return True
        if left <= _PRESS_AGAIN_S:
            return False


def _ended(host: Host, name: str, timeout_s: float) -> bool:
    def gone() -> bool:
        try:
            return domain.state(host.conn, name)[0] not in ACTIVE
        except NotFound:
            return True  # a transient one is gone altogether

    try:
        wait_until(gone, what=f"end of VM {name}", timeout_s=max(0.0, timeout_s), interval_s=_STATE_POLL_S)
    except WaitTimeout:
        return False
    return True


def _power_off(host: Host, name: str) -> None:
    try:
        domain.power_off(host.conn, name)
    except (WrongState, NotFound):
        return  # it ended by itself just now
    if not _ended(host, name, _POWER_OFF_TIMEOUT_S):
        raise WaitTimeout(f"cannot power off VM {name}", after_s=_POWER_OFF_TIMEOUT_S)


def reboot(host: Host, name: str) -> None:
    """Ask the guest to restart."""
    domain.require(domain.find(host.conn, name), frozenset({State.RUNNING}), "reboot", f"vmctl start {name}")
    domain.reboot_acpi(host.conn, name)


def reset(host: Host, name: str) -> None:
    """Restart it at once, without asking the guest."""
    domain.require(
        domain.find(host.conn, name), frozenset({State.RUNNING, State.PAUSED}), "reset", f"vmctl start {name}"
    )
    domain.reset(host.conn, name)


def pause(host: Host, name: str) -> bool:
    """Stop its vCPUs; False when they were stopped already."""
    vm = domain.find(host.conn, name)
    if vm.state is State.PAUSED:
        return False
    domain.require(vm, frozenset({State.RUNNING}), "pause", f"vmctl start {name}")
    domain.pause(host.conn, name)
    return True


def resume(host: Host, name: str) -> bool:
    """Let its vCPUs run on; False when they ran."""
    vm = domain.find(host.conn, name)
    if vm.state is State.RUNNING:
        return False
    domain.require(vm, frozenset({State.PAUSED, State.SUSPENDED}), "resume", f"vmctl start {name}")
    domain.resume(host.conn, name)
    return True


def save(host: Host, name: str, report: Reporter) -> bool:
    """Save its memory to disk and end it; the next start goes on from there. False when it was saved already.

    An interrupt cancels the save and the VM runs on.
    """
    vm = domain.find(host.conn, name)
    if vm.state is State.SAVED:
        return False
    domain.require(vm, frozenset({State.RUNNING, State.PAUSED}), "save", f"vmctl start {name}")
    domain.require_persistent(vm, "save")
    failure: list[VmctlError] = []

    def work() -> None:
        try:
            domain.save(host.conn, name)
        except VmctlError as error:
            failure.append(error)

    worker = threading.Thread(target=work, name="save", daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.1)
            _report_job(host, name, report)
    except BaseException:
        _quietly(lambda: domain.abort_job(host.conn, name))
        worker.join(_POWER_OFF_TIMEOUT_S)
        raise
    if failure:
        raise failure[0]
    return True


def _report_job(host: Host, name: str, report: Reporter) -> None:
    try:
        progress = domain.job_progress(host.conn, name)
    except VmctlError:
        return  # the job, and the process with it, has just ended
    if progress is not None and progress.total:
        report(Progress(f"memory of {name}", progress.done, progress.total))


def rename(host: Host, name: str, new: str) -> None:
    """Give a stopped VM another name. Its address, disks and host key stay its own."""
    if found := spec.name_problems(new):
        raise SpecError(f"cannot rename VM {name}", problems=found)
    with held(host.folders.runtime, _lock_name(host, new)), held(host.folders.runtime, _lock_name(host, name)):
        vm = domain.find(host.conn, name)
        domain.require(vm, frozenset({State.STOPPED, State.CRASHED}), "rename", f"vmctl stop {name}")
        if domain.find_or_none(host.conn, new) is not None:
            raise Conflict(f"cannot rename VM {name} to {new}: that name is taken")
        domain.rename(host.conn, name, new)


@dataclass(frozen=True, slots=True)
class Doomed:
    """What a delete destroys: the VM, and the volumes that are its own. ``vm`` None: only left-overs are there."""

    name: str
    vm: Domain | None
    volumes: tuple[Owned, ...]

    @property
    def lines(self) -> list[str]:
        """What to show before asking."""
        what = [f"VM {self.name} ({self.vm.state})"] if self.vm else [f"left-overs of VM {self.name}"]
        return [*what, *(f"volume {owned.volume}" for owned in self.volumes)]


def doomed(host: Host, name: str) -> Doomed:
    """What deleting ``name`` would destroy. Raises NotFound when there is nothing."""
    vm = domain.find_or_none(host.conn, name)
    if vm is not None:
        return Doomed(vm.name, vm, _deletable(host, vm))
    volumes = _leftovers(host, name)
    if not volumes:
        raise NotFound(f"cannot find VM {name}: {host.conn.uri} has none of that name", hint="see `vmctl list`")
    return Doomed(name, None, volumes)


def _leftovers(host: Host, name: str) -> tuple[Owned, ...]:
    """Volumes that a killed creation of ``name`` left: named by its identity, with no VM of that identity there."""
    pool = host.settings.pool
    if not storage.pool_exists(host.conn, pool) or spec.name_problems(name):
        return ()
    present = {other.uuid for other in host_domains(host)}
    vm_uuid = resolve.identity(host.conn.host, name, present)
    return _with_prefix(host, resolve.volume_prefix(name, vm_uuid))


def _with_prefix(host: Host, prefix: str) -> tuple[Owned, ...]:
    pool = host.settings.pool
    return tuple(
        Owned(pool, volume)
        for volume in storage.volume_names(host.conn, pool)
        if volume == f"{prefix}.qcow2" or volume.startswith(f"{prefix}-")
    )


def _deletable(host: Host, vm: Domain) -> tuple[Owned, ...]:
    """The VM's own volumes that nobody else uses."""
    record = vm.facts.record
    if record is None or not record.owned:
        return ()
    storage.refresh(host.conn, host.settings.pool)  # the log daemon rotates the console log by itself
    log = record.console_log
    owned = list(record.owned)
    if log is not None:
        owned += [o for o in _with_prefix(host, log.volume) if o not in owned]
        rotated = {o.volume for o in owned}
        owned += [
            Owned(log.pool, v)
            for v in storage.volume_names(host.conn, log.pool)
            if v.startswith(f"{log.volume}.") and v not in rotated
        ]
    used = {disk.source for other in domain.all_facts(host.conn) if other.uuid != vm.uuid for disk in other.disks}
    free = []
    for one in owned:
        path = f"{storage.pool_path(host.conn, one.pool)}/{one.volume}"
        if path in used or f"{one.pool}/{one.volume}" in used or set(storage.disk_users(host.conn, path)):
            continue
        free.append(one)
    return tuple(free)


def delete(host: Host, name: str, report: Reporter) -> None:
    """Delete a VM with its own disks, seed, NVRAM, saved state and snapshot metadata; nobody else's, no base image.

    Works on what a killed create or delete left, too. Raises Conflict while another vmctl works on that name.
    """
    with held(host.folders.runtime, _lock_name(host, name)):
        what = doomed(host, name)
        if what.vm is not None:
            _remove(host, what.vm, report)
            return
        for owned in what.volumes:
            storage.delete_volume(host.conn, owned.pool, owned.volume)


def _remove(host: Host, vm: Domain, report: Reporter) -> None:
    """Take a VM apart, its definition last: whatever interrupts this, a second delete finds the rest."""
    volumes = _deletable(host, vm)
    kept = [o for o in vm.facts.record.owned if o not in volumes] if vm.facts.record else []
    if vm.active:
        _power_off(host, vm.name)
    known_hosts(host, vm.name).unlink(missing_ok=True)
    for owned in volumes:
        storage.delete_volume(host.conn, owned.pool, owned.volume)
    for owned in kept:
        report(Warned(f"kept volume {owned.volume}: another VM uses it"))
    if vm.persistent:
        domain.undefine(host.conn, vm.name)
