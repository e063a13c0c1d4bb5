"""The life of a VM: start, stop and the rest, rename."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from functools import partial

from vmctl import (
    disk_guard,
    disk_journal,
    domain_job,
    forgotten,
    identity,
    layer_check,
    networks,
    pull_settle,
    render,
    snapshot_journal,
    snapshot_settle,
    spec,
)
from vmctl.accel import timeout_scale
from vmctl.errors import (
    Conflict,
    HypervisorError,
    Interrupted,
    NotFound,
    SpecError,
    VmctlError,
    WaitTimeout,
    WrongState,
    quietly,
)
from vmctl.events import Reporter, Step
from vmctl.hosts import Host, holding
from vmctl.hypervisor import agent, disks, domain, events
from vmctl.hypervisor.domain import ACTIVE, Domain, State
from vmctl.hypervisor.waiting import Waiting
from vmctl.seed_disk import detach_used
from vmctl.spec import Accel
from vmctl.wait import wait_until

_STATE_POLL_S = 0.05
_POWER_OFF_TIMEOUT_S = 30.0
_PRESS_AGAIN_S = 5.0
_FILES_S = 60.0
_ANSWER_S = 2.0  # a sound QEMU needs milliseconds; also where no time is given at all


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Started(StrEnum):
    """How a start went."""

    BOOTED = "booted"
    RESTORED = "resumed from its saved memory"
    ALREADY = "running already"


def start(host: Host, name: str, report: Reporter, *, take_over: bool = False) -> Started:
    """Boot it, or bring it back from its saved memory; one that runs is left alone, one on its way off waited for.

    ``take_over``: also where it is noted to be on a host that cannot be asked whether it runs there.
    """
    vm = domain.find(host.conn, name)
    if vm.facts.record is not None and vm.facts.record.creating:
        raise WrongState(
            f"cannot start VM {name}: its creation was cut off, and it may lack parts",
            hint=f"create it again, or vmctl delete {name}",
        )
    if vm.state is State.PAUSED or vm.panicked:
        raise WrongState(
            f"cannot start VM {name}: it is {domain.told(vm.state, vm.why)}",
            hint=domain.remedy(name, vm.state, vm.why),
        )
    if vm.state is State.STOPPING:
        report(Step(f"waiting for {name} to be off"))
        _ended(host, name, _POWER_OFF_TIMEOUT_S)
        vm = domain.find(host.conn, name)
    if vm.state is State.STOPPING:
        raise WrongState(
            f"cannot start VM {name}: it is {vm.state}", hint=f"if that has no end: vmctl stop {name} --force"
        )
    if vm.active:
        return Started.ALREADY
    # Who works on a stopped VM's files holds its name: they are nobody else's until the VM has them open.
    with holding(host, vm.name, timeout_s=_FILES_S):
        vm = domain.find(host.conn, vm.name)
        if vm.active:  # by another one meanwhile
            return Started.ALREADY
        with identity.alone(host, vm, "start", report, take_over=take_over):
            return _started(host, vm, report)


def _started(host: Host, vm: Domain, report: Reporter) -> Started:
    """Start one that is off, or saved."""
    name = vm.name
    forgotten.require_none(host, vm.name, vm.uuid, f"start VM {name}")
    pull_settle.settle(host, name, report)
    layer_check.require_none_newer(host, vm, f"start VM {name}")
    for nic in vm.facts.nics:
        if nic.source == host.settings.network:
            networks.ensure(host, report)
    _renew_forward(host, vm, report)
    if vm.state is not State.SAVED:
        detach_used(host, vm, report)
    try:
        with disk_guard.claimed(host, vm.name, disks.disks(host.conn, name, inactive=True), f"start VM {name}"):
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
            new = free_port()
    text = domain.xml(host.conn, vm.name, inactive=True)
    text = text.replace(f"hostfwd=tcp:127.0.0.1:{port}-:22", f"hostfwd=tcp:127.0.0.1:{new}-:22")
    domain.define(host.conn, text, name=vm.name)
    domain.set_record(host.conn, vm.name, render.metadata(replace(record, ssh=record.ssh._replace(forward_port=new))))
    report(Step(f"port {port} is taken: SSH to {vm.name} goes through {new} now"))


class Stopped(StrEnum):
    """Which way a VM stopped."""

    ACPI = "powered off by the guest (ACPI)"
    AGENT = "powered off by the guest (agent)"
    FORCED = "powered off by force"
    ALREADY = "stopped already"
    DROPPED = "its saved memory is dropped"


def default_stop_timeout_s(vm: Domain) -> float:
    """How long a stop waits for the guest unless told otherwise."""
    return 30.0 * timeout_scale(vm.facts.accel or Accel.KVM)


def stop(host: Host, name: str, report: Reporter, *, timeout_s: float | None = None, force: bool = False) -> Stopped:
    """Ask the guest to power off: by ACPI, half-way through the time by its agent, at the end by force if allowed.

    Raises WaitTimeout when the guest is still up and ``force`` was not given.
    """
    vm = domain.find(host.conn, name)
    if vm.state is State.SAVED and force:
        domain.drop_saved(host.conn, name)
        return Stopped.DROPPED
    if vm.state is State.SAVED:
        report(Step(f"{name} is saved: start goes on from there; stop --force drops its saved memory"))
    if not vm.active:
        return Stopped.ALREADY
    with suppress(VmctlError), holding(host, vm.name):
        layer_check.follow(host, vm)  # what it writes to now is what it starts with again
    deaf = vm.state is State.PAUSED or vm.panicked
    if deaf and not force:
        way = f"vmctl stop {name} --force pulls its plug"
        if not vm.panicked:
            way = f"{domain.remedy(name, vm.state, vm.why)}, or stop --force"
        raise WrongState(f"cannot stop VM {name}: it is {domain.told(vm.state, vm.why)} and cannot hear", hint=way)
    budget = default_stop_timeout_s(vm) if timeout_s is None else timeout_s
    for way in (Stopped.ACPI, Stopped.AGENT) if not deaf else ():
        try:
            if _asked_stop(host, vm, way, budget / 2):
                return way
        except _Unanswered as silent:
            if not force:
                raise WaitTimeout(
                    f"cannot stop VM {name}: its QEMU does not answer",
                    after_s=silent.after_s,
                    hint=f"vmctl stop {name} --force ends it",
                ) from None
            report(Step(f"the QEMU of {name} does not answer"))
            host = replace(host, conn=host.conn.apart())
            break  # nor would it pass on what its agent is asked
        except (KeyboardInterrupt, Interrupted) as early:
            why = f"{early}" or "interrupted"
            raise Interrupted(
                f"cannot wait for the end of VM {name}: {why}; its guest has been asked to power off, and goes on",
                hint=f"vmctl wait {name} --for stopped",
            ) from early
        if budget:
            means = "ACPI" if way is Stopped.ACPI else "its agent"
            report(Step(f"{name} did not stop by {means} in {budget / 2:.3g} s"))
    if not force:
        raise WaitTimeout(
            f"cannot stop VM {name}", after_s=budget, hint=f"vmctl stop {name} --force pulls its plug at the end"
        )
    power_off(host, name)
    return Stopped.FORCED


def _asked_stop(host: Host, vm: Domain, way: Stopped, timeout_s: float) -> bool:
    if way is Stopped.AGENT and agent.state(host.conn, vm.name) is not agent.AgentState.CONNECTED:
        return _ended(host, vm.name, timeout_s)  # no agent to ask: give the button's work the rest of the time
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if way is Stopped.ACPI:
                _answered(partial(domain.shutdown_acpi, host.conn, vm.name), deadline)
            else:
                agent.shutdown(host.conn, vm.name, deadline_s=deadline - time.monotonic())
        except NotFound:
            return True  # it ended just now
        except (WrongState, HypervisorError, WaitTimeout):
            # Of one that is on its way off libvirt says that it does not run: it is off when its QEMU has ended.
            return _ended(host, vm.name, deadline - time.monotonic())
        left = deadline - time.monotonic()
        # A guest still booting drops the button's event: press again.
        if _ended(host, vm.name, min(_PRESS_AGAIN_S, left)):
            return True
        if left <= _PRESS_AGAIN_S:
            return False


class _Unanswered(Exception):
    """libvirt waits for a QEMU that hangs, and will for as long as it does."""

    def __init__(self, after_s: float) -> None:
        super().__init__()
        self.after_s = after_s


def _answered(ask: Callable[[], None], deadline: float) -> None:
    """Do ``ask``, which QEMU must answer. Raises _Unanswered when it has not in time; the connection is busy then."""

    def asked() -> bool:
        ask()
        return True

    began = time.monotonic()
    if not Waiting(asked).answer(max(deadline - began, _ANSWER_S)):
        raise _Unanswered(time.monotonic() - began)


def _ended(host: Host, name: str, timeout_s: float) -> bool:
    def gone() -> bool:
        try:
            state, why = domain.state(host.conn, name)
        except NotFound:
            return True  # a transient one is gone altogether
        if why == domain.PANICKED:
            raise WrongState(
                f"cannot go on stopping VM {name}: its guest panicked", hint=f"vmctl stop {name} --force pulls its plug"
            )
        return state not in ACTIVE

    try:
        wait_until(gone, what=f"end of VM {name}", timeout_s=max(0.0, timeout_s), interval_s=_STATE_POLL_S)
    except WaitTimeout:
        return False
    return True


def power_off(host: Host, name: str) -> None:
    """Pull the plug and see it end. Raises WaitTimeout."""
    try:
        domain.power_off(host.conn, name)
    except (WrongState, NotFound):
        return  # it ended by itself just now
    if not _ended(host, name, _POWER_OFF_TIMEOUT_S):
        raise WaitTimeout(f"cannot power off VM {name}", after_s=_POWER_OFF_TIMEOUT_S)


def reboot(host: Host, name: str, *, timeout_s: float | None = None) -> None:
    """Ask the guest to restart, and see its machine start anew: what is asked of it next, the new system answers.

    The connection must have been opened with events. Raises WaitTimeout when the guest does not follow.
    """
    vm = domain.find(host.conn, name)
    domain.require(vm, frozenset({State.RUNNING}), "reboot", f"vmctl start {name}")
    budget = default_stop_timeout_s(vm) if timeout_s is None else timeout_s
    deadline = time.monotonic() + budget
    with events.reboot_of(host.conn, name) as begun:
        while True:
            try:
                _answered(partial(domain.reboot_acpi, host.conn, name), deadline)
            except _Unanswered:
                raise WaitTimeout(
                    f"cannot reboot VM {name}: its QEMU does not answer",
                    after_s=budget,
                    hint=f"vmctl stop {name} --force",
                ) from None
            left = deadline - time.monotonic()
            # A guest still booting drops the button's event: press again.
            if begun.wait(max(0.0, min(_PRESS_AGAIN_S, left))):
                _note_restart(host, name)
                return
            if left <= _PRESS_AGAIN_S:
                raise WaitTimeout(
                    f"cannot reboot VM {name}", after_s=budget, hint=f"vmctl reset {name} restarts it without asking"
                )


def reset(host: Host, name: str) -> None:
    """Restart it at once, without asking the guest."""
    vm = domain.find(host.conn, name)
    if not vm.panicked:
        domain.require(vm, frozenset({State.RUNNING, State.PAUSED}), "reset", f"vmctl start {name}")
    domain.reset(host.conn, name)
    if vm.panicked:
        domain.resume(host.conn, name)  # a reset lets a stopped machine stay stopped
    _note_restart(host, name)


def _note_restart(host: Host, name: str) -> None:
    """Remember that it boots, which the age of its process no longer tells: who comes next waits for it."""

    def write() -> None:
        value = domain.find(host.conn, name).facts.record
        if value is not None:
            text = render.metadata(replace(value, restarted=int(time.time())))
            domain.set_record(host.conn, name, text, only_live=True)

    quietly(write)  # it was restarted, whatever is remembered of it


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
    if vm.why == "migration" and host.others:
        _require_here_alone(host, vm)
    domain.resume(host.conn, name)
    return True


def _require_here_alone(host: Host, vm: Domain) -> None:
    """Raise Conflict when a VM that a migration has paused is on another host too, or may be."""
    from vmctl import elsewhere  # late: most know one host

    seen = elsewhere.look_for(host, vm.uuid)
    for other in (*seen.in_use, *seen.unasked):
        has = "has it too" if other in seen.in_use else "cannot be asked whether it has it"
        raise Conflict(
            f"cannot resume VM {vm.name}: a migration has paused it, and {other} {has}",
            hint=domain.remedy(vm.name, vm.state, vm.why),
        )


def save(host: Host, name: str, report: Reporter) -> bool:
    """Save its memory to disk and end it; the next start goes on from there. False when it was saved already.

    An interrupt cancels the save and the VM runs on. Raises Conflict while another vmctl works on it.
    """
    with holding(host, domain.find(host.conn, name).name):
        vm = domain.find(host.conn, name)
        if vm.state is State.SAVED:
            return False
        domain.require(vm, frozenset({State.RUNNING, State.PAUSED}), "save", f"vmctl start {name}")
        domain.require_persistent(vm, "save")
        layer_check.require_known(host, vm, f"save VM {name}")
        layer_check.follow(host, vm)
        domain_job.blocking(host, name, lambda: domain.save(host.conn, name), report, f"memory of {name}")
    return True


def autostart(host: Host, name: str, report: Reporter, *, on: bool) -> None:
    """Whether it starts with its host, which asks no other host whether it runs there by then.

    Raises Conflict for one that is in use on another host, or may be.
    """
    if on:
        vm = domain.find(host.conn, name)
        identity.require_off_elsewhere(host, vm, "set autostart of", report)
    domain.set_autostart(host.conn, name, on=on)


def rename(host: Host, name: str, new: str, report: Reporter) -> None:
    """Give a stopped VM another name. Its address, disks and host key stay its own.

    What a killed change left of it is settled first: that is noted by its name.
    """
    if found := spec.name_problems(new):
        raise SpecError(f"cannot rename VM {name}", problems=found)
    if name == new:
        raise SpecError(f"cannot rename VM {name}: that is its name")
    with holding(host, new), holding(host, name):
        vm = domain.find(host.conn, name)
        hint = f"vmctl stop {name}" + (" --force drops its saved memory" if vm.state is State.SAVED else "")
        domain.require(vm, frozenset({State.STOPPED} if vm.active else {State.STOPPED, State.CRASHED}), "rename", hint)
        if domain.find_or_none(host.conn, new) is not None:
            raise Conflict(f"cannot rename VM {name} to {new}: that name is taken")
        forgotten.require_none(host, name, vm.uuid, f"rename VM {name}")
        layer_check.require_none_newer(host, vm, f"rename VM {name}")
        disk_journal.settle(host, name, report)
        snapshot_settle.settle(host, name, report)
        domain.rename(host.conn, name, new)
        snapshot_journal.renamed(host, name, new)
