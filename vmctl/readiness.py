"""Waiting for a VM to become something, in named stages, with evidence when it does not."""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from vmctl import cloud_init, greeting
from vmctl.accel import timeout_scale
from vmctl.cloud_init import Outcome, Status
from vmctl.errors import GuestCommandFailed, Unsupported, VmctlError, WaitTimeout, WrongState, reason
from vmctl.events import Reporter, StageBegan, StageDone, StageGoesOn, Warned
from vmctl.guest import Address, address, behind, console_tail, execute, panic_line
from vmctl.hosts import Host
from vmctl.hypervisor import domain, inventory, network
from vmctl.hypervisor.agent import AgentState, Ping
from vmctl.hypervisor.agent import state as agent_state
from vmctl.hypervisor.domain import Domain, State
from vmctl.hypervisor.network import Lease
from vmctl.spec import Accel
from vmctl.wait import wait_until

_POLL_S = 0.03
_CONNECT_S = 0.15
_BANNER_S = 5.0
_LEASE_S = 3600  # what libvirt's dnsmasq grants where the network says nothing else
_FORWARD_BANNER_S = 0.3
_PING_S = 2.0
_STATE_EVERY_S = 0.5
_TICK_S = 1.0
_LOG_LINES = 15
_TRACE_LINES = 100  # a panic's own line stands above the trace


class Goal(StrEnum):
    """What can be waited for."""

    RUNNING = "running"
    IP = "ip"
    SSH = "ssh"
    AGENT = "agent"
    CLOUD_INIT = "cloud-init"
    STOPPED = "stopped"


_STAGES = {
    Goal.RUNNING: (Goal.RUNNING,),
    Goal.IP: (Goal.RUNNING, Goal.IP),
    Goal.SSH: (Goal.RUNNING, Goal.IP, Goal.SSH),
    Goal.AGENT: (Goal.RUNNING, Goal.AGENT),
    Goal.CLOUD_INIT: (Goal.RUNNING, Goal.IP, Goal.SSH, Goal.CLOUD_INIT),
    Goal.STOPPED: (Goal.STOPPED,),
}


def default_timeout_s(vm: Domain, goal: Goal = Goal.SSH) -> float:
    """How long a wait lasts unless told otherwise; longer under TCG, and for a whole set-up."""
    return (300.0 if goal is Goal.CLOUD_INIT else 60.0) * timeout_scale(vm.facts.accel or Accel.KVM)


@dataclass(slots=True)
class _Watch:
    """One wait in progress."""

    host: Host
    vm: Domain
    clock: Callable[[], float]
    took: list[tuple[str, float]] = field(default_factory=list)
    state: State = State.STOPPED
    looked: float = float("-inf")
    where: Address | None = None
    last_error: str = ""
    answered: bool = False
    patience_s: float = _FORWARD_BANNER_S
    set_up: Outcome | None = None
    ping: Ping | None = None

    def look(self) -> State:
        """The state, asked for at most every half second: the guest's own answers are what is waited for."""
        now = self.clock()
        if now - self.looked >= _STATE_EVERY_S:
            self.state, why = domain.state(self.host.conn, self.vm.name)
            self.looked = now
            if why == domain.PANICKED or (self.took and self.state not in domain.ACTIVE):
                raise _in_vain(self.host, self.vm, self.state, why)
        return self.state

    def running(self) -> bool:
        self.looked = float("-inf")
        return self.look() is State.RUNNING

    def stopped(self) -> bool:
        state, why = domain.state(self.host.conn, self.vm.name)
        if why == domain.PANICKED:
            raise _in_vain(self.host, self.vm, state, why)
        return state not in domain.ACTIVE

    def agent(self) -> bool:
        self.look()
        self.ping = self.ping or Ping(self.host.conn, self.vm.name)
        return agent_state(self.host.conn, self.vm.name) is AgentState.CONNECTED and self.ping(_PING_S)

    def ip(self) -> bool:
        """Whether the guest uses its address: it answers there, be it with a refusal, or holds a fresh lease."""
        self.look()
        self.where = self.where or address(self.host, self.vm)
        return self.where is not None and (self._touch(self.where) or self._leased(self.where))

    def _touch(self, where: Address) -> bool:
        if where.forwarded:
            return self._greeted(where)
        try:
            with socket.create_connection((where.host, where.port), timeout=_CONNECT_S):
                self.answered = True
        except OSError as error:
            self.last_error = reason(error)
            self.answered = error.errno == errno.ECONNREFUSED
        return self.answered

    def _greeted(self, where: Address) -> bool:
        """Whether the guest is behind the forward: QEMU accepts at once, and only the guest greets, or hangs up."""
        try:
            with socket.create_connection((where.host, where.port), timeout=_CONNECT_S) as sock:
                self.answered = bool(select.select([sock], [], [], self.patience_s)[0])
        except OSError as error:
            self.last_error = reason(error)
            self.answered = isinstance(error, ConnectionResetError)
        else:
            self.last_error = "QEMU's forward was connected to, but no guest answered behind it"
            self.patience_s = min(_BANNER_S, self.patience_s * 1.3)
        return self.answered

    def _leased(self, where: Address) -> bool:
        if not where.network:
            return False
        up = inventory.uptime_s(self.host.conn, self.vm.name)
        since = time.time() - up - 1.0 if up is not None else 0.0
        return any(
            lease.mac == where.mac and lease.address == where.host and lease.expiry - _LEASE_S >= since
            for lease in network.leases(self.host.conn, where.network)
        )

    def ssh(self) -> bool:
        self.look()
        return self.where is not None and self._banner(self.where)

    def cloud_init(self) -> bool:
        """Whether cloud-init is through, asked inside the guest; how it went is in ``set_up``."""
        self.look()
        said = bytearray()
        try:
            code = execute(
                self.host, self.vm.name, ["sh", "-c", cloud_init.script()], stdin=None, out=said.extend, err=said.extend
            )
        except (VmctlError, OSError) as error:
            self.last_error = reason(error)  # the user or the key may not be there yet
            return False
        if code == cloud_init.ABSENT:
            raise Unsupported(f"cannot wait for cloud-init in VM {self.vm.name}: its image has none")
        if code == cloud_init.DISABLED:
            raise Unsupported(
                f"cannot wait for cloud-init in VM {self.vm.name}: it is disabled there, or found no seed"
            )
        if code == 0:
            self.set_up = cloud_init.read(said.decode(errors="replace"))
        return code == 0

    def _banner(self, where: Address) -> bool:
        """Whether an SSH server greets.

        A forward accepts before the guest can: there a silent connection is soon given up, and later less soon.
        """
        patience = self.patience_s if where.forwarded else _BANNER_S
        why = greeting.missing(where.host, where.port, patience_s=patience)
        if why:
            self.last_error = why
            self.patience_s = min(_BANNER_S, self.patience_s * 1.3)
        return not why

    def evidence(self) -> list[str]:
        """What is known when a wait runs out."""
        try:
            state, why = domain.state(self.host.conn, self.vm.name)
        except VmctlError as error:
            return [error.message]
        self.where = self.where or address(self.host, self.vm)
        lines = [f"state: {state} {why}".rstrip()]
        lines += [f"stage {name}: {took:.1f} s" for name, took in self.took]
        if self.where is not None:
            lines.append(f"address: {self.where.host} port {self.where.port} (MAC {self.where.mac})")
            if self.where.network:
                held = [
                    lease for lease in network.leases(self.host.conn, self.where.network) if lease.mac == self.where.mac
                ]
                lines.append(f"DHCP lease: {_told(held[0], time.time())}" if held else "DHCP lease: none, so far")
        else:
            sources = dict.fromkeys(nic.source for nic in self.vm.facts.nics)
            cards = ", ".join("user networking" if source == "user" else source for source in sources)
            lines.append(f"address: none known; its network cards: {cards or 'none'}")
        if self.last_error:
            lines.append(f"last try: {self.last_error}")
        if far := behind(self.host):
            lines.append(far)
        tail = console_tail(self.host, self.vm, _LOG_LINES)
        lines += ["console, last lines:", *(f"  {line}" for line in tail)] if tail else ["console: nothing printed"]
        return lines


def _ticking(
    probe: Callable[[], bool | None], stage: Goal, began: float, report: Reporter, clock: Callable[[], float]
) -> Callable[[], bool | None]:
    """The probe, telling each second that the stage goes on."""
    last = clock()

    def ask() -> bool | None:
        nonlocal last
        if clock() - last >= _TICK_S:
            last = clock()
            report(StageGoesOn(stage, last - began))
        return probe()

    return ask


def wait_for(
    host: Host,
    vm: Domain,
    goal: Goal,
    *,
    timeout_s: float | None,
    report: Reporter,
    clock: Callable[[], float] = time.monotonic,
) -> Address | None:
    """Wait until ``vm`` reaches ``goal``; returns its address where a stage found one. A ``timeout_s`` of None: the
    default.

    Raises WaitTimeout, naming the stage, with evidence; WrongState when the VM stops meanwhile, for then no
    waiting helps; GuestCommandFailed when cloud-init failed, Unsupported when the guest has none.
    """
    began = clock()
    timeout_s = default_timeout_s(vm, goal) if timeout_s is None else timeout_s
    watch = _Watch(host, vm, clock)
    _require_possible(host, vm, goal)
    for stage in _STAGES[goal]:
        stage_began = clock()
        report(StageBegan(stage, stage_began - began))
        tick = _ticking(getattr(watch, stage.name.lower()), stage, began, report, clock)
        try:
            wait_until(
                tick,
                what=f"VM {vm.name} to reach {goal}, in stage {stage}",
                timeout_s=max(0.0, began + timeout_s - clock()),
                interval_s=_POLL_S,
                clock=clock,
            )
        except WaitTimeout as error:
            watch.took.append((f"{stage} (not reached)", clock() - stage_began))
            raise WaitTimeout(
                f"cannot finish waiting for VM {vm.name}: stage {stage}",
                after_s=clock() - began,
                evidence=watch.evidence(),
                hint=f"the VM was left as it is; go on with `vmctl wait {vm.name} --for {goal} --timeout …`",
            ) from error
        took = clock() - stage_began
        watch.took.append((stage, took))
        detail = watch.where.host if stage in {Goal.IP, Goal.SSH} and watch.where else ""
        if watch.set_up is not None:
            detail = watch.set_up.status
        report(StageDone(stage, took, clock() - began, detail))
    if watch.set_up is not None:
        _judge(vm.name, watch.set_up, report)
    return watch.where


def reach(host: Host, vm: Domain, *, timeout_s: float, report: Reporter) -> Address | None:
    """Wait for SSH as wait_for() does, without a knock before the one that is answered: each costs the guest a process.

    For a guest that is up already. Raises as wait_for().
    """
    watch = _Watch(host, vm, time.monotonic)
    watch.where = address(host, vm)
    watch.took.append((Goal.RUNNING, 0.0))
    if watch.where is not None:
        try:
            wait_until(watch.ssh, what="", timeout_s=timeout_s, interval_s=_POLL_S)
        except WaitTimeout:
            timeout_s = 0.0  # once more, for what is known then
        else:
            return watch.where
    return wait_for(host, vm, Goal.SSH, timeout_s=timeout_s, report=report)


def _told(lease: Lease, now: float) -> str:
    """A lease for people: its address, until when by this machine's clock, and how long that is from ``now``."""
    if not lease.expiry:
        return f"{lease.address}, for ever"
    until = datetime.fromtimestamp(lease.expiry).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    left = lease.expiry - now
    return f"{lease.address}, until {until}, " + (f"{left / 60:.0f} min left" if left > 0 else "over")


def _in_vain(host: Host, vm: Domain, state: State, why: str) -> WrongState:
    lines = console_tail(host, vm, _TRACE_LINES)
    last = (panic_line(lines) if why == domain.PANICKED else "") or (lines[-1] if lines else "nothing")
    text = f"cannot go on waiting for VM {vm.name}: it is {domain.told(state, why)}"
    return WrongState(text, hint=f"last on its console: {last}")


def _require_possible(host: Host, vm: Domain, goal: Goal) -> None:
    """Raise at once where waiting is bound to be in vain. For a VM that others will start, wait --for running."""
    if vm.panicked:
        raise _in_vain(host, vm, vm.state, vm.why)
    if goal is Goal.AGENT and not vm.facts.agent:
        raise Unsupported(f"cannot wait for the agent of VM {vm.name}: it has no channel for one")
    if goal not in {Goal.RUNNING, Goal.STOPPED}:
        domain.require(vm, frozenset({State.RUNNING, State.STOPPING}), f"wait for {goal} of", f"vmctl start {vm.name}")


def _judge(name: str, set_up: Outcome, report: Reporter) -> None:
    """Tell of a degraded set-up; raise GuestCommandFailed for a failed one."""
    if set_up.status is Status.DEGRADED:
        report(Warned(f"cloud-init is done, but degraded: {'; '.join(set_up.lines)}"))
    elif set_up.status is Status.FAILED:
        raise GuestCommandFailed(
            f"cannot use VM {name} as asked: cloud-init failed in it",
            evidence=set_up.lines,
            hint=f"the VM runs; vmctl exec {name} -- sudo cat /var/log/cloud-init-output.log",
        )
