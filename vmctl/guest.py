"""Reaching into a guest: its address, commands, files, console log."""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmctl import agent, greeting
from vmctl.accel import timeout_scale
from vmctl.choices import Accel
from vmctl.errors import HostUnreachable, NotFound, VmctlError, WaitTimeout, WrongState, reason
from vmctl.events import Reporter, Warned, silent
from vmctl.hosts import Host
from vmctl.hypervisor import domain, inventory, network, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.hypervisor.states import MOVED
from vmctl.login import Target
from vmctl.record import SshAccess
from vmctl.seed import client_key
from vmctl.wait import pause, wait_until

if TYPE_CHECKING:
    from vmctl.login import Terminal

_LOG_TAIL = 256 * 1024
_FOLLOW_S = 0.3
# A pause of half a minute is a snapshot, a move to another host, a full disk being enlarged.
_PAUSED_S = 30.0
_SILENT_S = 120.0
_GONE_S = 35.0
_GREETING_S = 5.0
_SOON_S = 10.0
_AGAIN_S = 0.1
_PANIC_LINES = 5
_LOOK_S = 1.0
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|\][^\x07]*\x07|c)")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a guest's SSH server is reached from its host. ``network`` None: through a forward on loopback."""

    host: str
    port: int
    mac: str
    network: str | None

    @property
    def forwarded(self) -> bool:
        """Whether QEMU forwards a loopback port to the guest."""
        return self.network is None


def address(host: Host, vm: Domain) -> Address | None:
    """Where the guest is, or will be once it is up; None when nothing is known yet.

    The address kept for it counts before any lease, since it is known without the guest. In other networks the
    newest lease of one of its MACs counts.
    """
    record = vm.facts.record
    if record is not None and record.ssh is not None and record.ssh.forward_port is not None:
        return Address("127.0.0.1", record.ssh.forward_port, "", None)
    if record is not None and record.ssh is not None and record.ssh.address:
        return Address(record.ssh.address, 22, "", "")
    for nic in vm.facts.nics:
        facts = network.find(host.conn, nic.source)
        if facts is None:
            continue
        for entry in facts.reservations:
            if entry.mac == nic.mac:
                return Address(entry.address, 22, nic.mac, facts.name)
        if not facts.gateway:  # libvirt gives no addresses there
            continue
        held = [lease for lease in network.leases(host.conn, facts.name) if lease.mac == nic.mac]
        if held:
            return Address(max(held, key=lambda lease: lease.expiry).address, 22, nic.mac, facts.name)
    return _told_by_agent(host, vm)


def _told_by_agent(host: Host, vm: Domain) -> Address | None:
    """Where the guest says it is, on a network whose addresses libvirt does not give."""
    if vm.state is not State.RUNNING or not vm.facts.agent:
        return None
    macs = {nic.mac for nic in vm.facts.nics}
    found, mac = agent.glance(host, vm).reachable(macs)
    return Address(found, 22, mac, "") if found else None


class Vigil:
    """Whether an answer of a guest can still be expected. One for each wait; asked now and then while it is silent."""

    def __init__(self, host: Host, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._name, self._clock = host, name, clock
        self._paused_since: float | None = None

    def __call__(self, silent_s: float = 0.0) -> None:
        """Raises WrongState for a VM that ended, panicked or stays paused, HostUnreachable for one silent too long."""
        try:
            state, why = domain.state(self._host.conn, self._name)
        except HostUnreachable:
            state, why = State.RUNNING, ""  # libvirt's daemon went away, which says nothing of the guest
        except NotFound:
            if silent_s >= _GONE_S:
                raise
            state, why = State.RUNNING, ""  # it may have moved to another host, and its connections with it
        if why == MOVED and silent_s < _GONE_S:
            state = State.RUNNING
        now = self._clock()
        if state is not State.PAUSED:
            self._paused_since = None
        elif self._paused_since is None:
            self._paused_since = now
        paused_s = 0.0 if self._paused_since is None else now - self._paused_since
        if state not in domain.ACTIVE or paused_s >= _PAUSED_S:
            raise WrongState(
                f"cannot go on in VM {self._name}: it is {domain.told(state, why)} now",
                hint=domain.remedy(self._name, state, why),
            )
        if silent_s >= _SILENT_S:
            raise unanswered(self._host, self._name, f"no sign of life for {silent_s:.0f} s")


def unanswered(host: Host, name: str, why: str) -> VmctlError:
    """The error for a guest that does not answer, with the reason that is to be found."""
    vm = domain.find(host.conn, name)
    if vm.state is not State.RUNNING:
        text = f"cannot reach VM {name}: it is {domain.told(vm.state, vm.why)}"
        return WrongState(text, hint=domain.remedy(name, vm.state, vm.why))
    lines = console_tail(host, vm, _PANIC_LINES)
    if panic := panic_line(lines):  # a guest without a driver for the panic device, or from before it was loaded
        return WrongState(
            f"cannot reach VM {name}: its console ends in {panic!r}",
            hint=domain.remedy(name, vm.state, domain.PANICKED),
        )
    last = f"; last on its console: {lines[-1]}" if lines else ""
    hint = behind(host) or f"`vmctl wait {name}` shows each stage"
    return HostUnreachable(f"cannot reach VM {name} by SSH: {why}", hint=hint + last)


def behind(host: Host) -> str:
    """What may keep all guests of a host of another machine from being reached; "" for this machine's."""
    if host.conn.local:
        return ""
    return f"a network of {host.name}'s own, as vmctl's is, is not reached from here: exec --via agent needs none"


def panic_line(lines: Sequence[str]) -> str:
    """The last line that tells of a panic of Linux; "" without any."""
    return next((line.strip() for line in reversed(lines) if "Kernel panic - not syncing" in line), "")


def booting_left_s(host: Host, vm: Domain) -> float:
    """For how long not answering may still mean that it boots; as long as `vmctl wait` waits."""
    up = inventory.uptime_s(host.conn, vm.name)
    if up is None and vm.facts.agent_connected:  # of another machine's guest it is the sign of a boot that is over
        return _SOON_S
    up = up or 0.0
    if vm.facts.record is not None and vm.facts.record.restarted:
        up = min(up, max(0.0, time.time() - vm.facts.record.restarted))
    return 60.0 * timeout_scale(vm.facts.accel or Accel.KVM) - up


def reachable(host: Host, name: str, *, user: str | None = None, report: Reporter = silent) -> Target:
    """How to log in to a guest that answers SSH: one that is still booting is waited for. Raises as ``target`` does."""
    vm = domain.find(host.conn, name)
    domain.require(vm, frozenset({State.RUNNING}), "reach", f"vmctl start {name}")
    _require_login(vm)
    left_s = booting_left_s(host, vm)
    if left_s > 0:
        why = missing(host, name)
        if why:
            await_answer(host, vm, why, report)
    return target(host, vm, user=user)


def missing(host: Host, name: str) -> str:
    """Why no SSH server greets where the guest is; "" when one does."""
    where = address(host, domain.find(host.conn, name))
    return greeting.missing(where.host, where.port, patience_s=_GREETING_S) if where else "it has no address yet"


def await_answer(host: Host, vm: Domain, why: str, report: Reporter) -> None:
    """Wait for a guest that may be booting, and say so. Raises ``unanswered``; at once for one long up."""
    left_s = booting_left_s(host, vm)
    if left_s <= 0:
        raise unanswered(host, vm.name, why)
    report(Warned(f"{vm.name} does not answer yet ({why}): waiting for it to boot, at most {left_s:.0f} s"))
    vigil, last = Vigil(host, vm.name), why

    def answers() -> bool:
        nonlocal last
        vigil()
        last = missing(host, vm.name)
        return not last

    try:
        wait_until(answers, what="", timeout_s=left_s, interval_s=_AGAIN_S)
    except WaitTimeout as error:
        raise unanswered(host, vm.name, f"{last}, {error.after_s:.0f} s later still") from error


def target(host: Host, vm: Domain, *, user: str | None = None, known: Address | None = None) -> Target:
    """How to log in to a running guest, where it is ``known`` to be or found to be. Raises WrongState, NotFound."""
    domain.require(vm, frozenset({State.RUNNING}), "reach", f"vmctl start {vm.name}")
    ssh = _require_login(vm)
    where = known or address(host, vm)
    if where is None:
        raise NotFound(f"cannot reach VM {vm.name}: it has no address yet", hint=f"vmctl wait {vm.name} --for ip")
    return Target(where.host, where.port, user or ssh.user, ssh.host_key, private_key(host))


def _require_login(vm: Domain) -> SshAccess:
    """How its record says to log in. Raises NotFound for a VM that vmctl did not create."""
    if vm.facts.record is None or vm.facts.record.ssh is None:
        raise NotFound(
            f"cannot log in to VM {vm.name}: vmctl did not create it, so it knows no host key of its",
            hint=f"its console may do: vmctl console {vm.name}",
        )
    return vm.facts.record.ssh


def private_key(host: Host) -> Path:
    """The private key to log in with."""
    if host.settings.ssh_key:
        return Path(host.settings.ssh_key).expanduser()
    return client_key(host.folders.data, host.folders.runtime)


def execute(
    host: Host,
    name: str,
    argv: list[str],
    *,
    stdin: int | None,
    out: Callable[[bytes], object],
    err: Callable[[bytes], object],
    user: str | None = None,
    terminal: Terminal | None = None,
    report: Reporter | None = None,
) -> int:
    """Run a command in the guest over SSH, its words kept as they are; returns its exit code.

    With ``report`` a guest that is still booting is waited for, and the wait told.
    """
    from vmctl import ssh

    vm = domain.find(host.conn, name)

    def attempt(where: Target) -> int:
        words, judge = shlex.join(argv), Vigil(host, vm.name)
        return ssh.run(where, words, stdin=stdin, out=out, err=err, terminal=terminal, judge=judge)

    if report is None:
        return attempt(target(host, vm, user=user))
    try:
        # At once where an address is known: to ask first would cost the guest a connection for each command.
        known = address(host, vm)
        if known is None:
            return attempt(reachable(host, name, user=user, report=report))
        return attempt(target(host, vm, user=user, known=known))
    except ssh.NotAnswering as error:
        await_answer(host, vm, error.why, report)
    return attempt(target(host, vm, user=user))


def known_hosts(host: Host, name: str) -> Path:
    """The file that tells OpenSSH's client the one key to trust; written for each login, from the VM's record."""
    return host.folders.runtime / f"known_hosts.{name}"


def openssh_argv(
    host: Host, name: str, words: list[str], *, user: str | None = None, report: Reporter = silent
) -> list[str]:
    """The OpenSSH command line for a login, which trusts the planted host key and no other.

    A guest that is still booting is waited for; the client itself gives up one that shows no sign of life any more.
    """
    where = reachable(host, name, user=user, report=report)
    alias = f"vmctl-{name}"
    known = known_hosts(host, name)
    try:
        known.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        known.write_text(f"{alias} {where.host_key}\n")
    except OSError as error:
        raise VmctlError(
            f"cannot log in to VM {name}: {reason(error, path=True)}", hint="is XDG_RUNTIME_DIR yours and writable?"
        ) from error
    options = {
        "HostKeyAlias": alias,
        "UserKnownHostsFile": str(known),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "IdentityFile": str(where.key),
        "CheckHostIP": "no",
        "LogLevel": "ERROR",
        "ConnectTimeout": "20",
        "ServerAliveInterval": f"{_SILENT_S / 6:.0f}",
        "ServerAliveCountMax": "6",
    }
    argv = ["ssh", "-p", str(where.port), "-l", where.user]
    for key, value in options.items():
        argv += ["-o", f"{key}={value}"]
    return [*argv, where.host, *words]


@contextmanager
def watched(host: Host, name: str, process: subprocess.Popen[bytes]) -> Iterator[list[VmctlError]]:
    """Ends a client of OpenSSH's once nothing can be expected of the guest any more; the reason is in the list then."""
    over, failures, vigil = threading.Event(), list[VmctlError](), Vigil(host, name)

    def look() -> None:
        while not over.wait(_LOOK_S):
            try:
                vigil()
            except VmctlError as error:
                failures.append(error)
                process.kill()
                return

    watcher = threading.Thread(target=look, name="watch", daemon=True)
    watcher.start()
    try:
        yield failures
    finally:
        over.set()


@dataclass(frozen=True, slots=True)
class Place:
    """One side of a copy: a path here (``vm`` None) or in a guest."""

    vm: str | None
    path: str


def parse_place(text: str) -> Place:
    """``VM:PATH`` or a path; as with scp, a slash before the first colon means a path here."""
    head, colon, tail = text.partition(":")
    if not colon or "/" in head or not head:
        return Place(None, text)
    return Place(head, tail or ".")


def console_text(host: Host, vm: Domain) -> str:
    """What the guest has printed on its serial console, as far as it is kept. Raises NotFound without a log."""
    record = vm.facts.record
    if record is None or record.console_log is None:
        raise NotFound(f"cannot read the console log of VM {vm.name}: it keeps none")
    log = record.console_log
    return storage.tail(host.conn, log.pool, log.volume, limit=_LOG_TAIL).decode("utf-8", "replace")


def follow_console(host: Host, vm: Domain, *, start: int) -> Iterator[str]:
    """What the console log gains after its first ``start`` bytes, until the VM has stopped and all is told."""
    record = vm.facts.record
    if record is None or record.console_log is None:
        return
    log = record.console_log
    seen = start
    while True:
        over = domain.state(host.conn, vm.name)[0] not in domain.ACTIVE
        data = storage.download(host.conn, log.pool, log.volume)
        if len(data) < seen:  # the log daemon began a new file
            seen = 0
        if len(data) > seen:
            yield data[seen:].decode("utf-8", "replace")
            seen = len(data)
        elif over:
            return
        else:
            pause(_FOLLOW_S)


def plain(text: str) -> str:
    """Console text without terminal escapes and carriage returns."""
    return _ESCAPES.sub("", text).replace("\r", "")


def console_tail(host: Host, vm: Domain, lines: int) -> list[str]:
    """The last lines printed; none when there is no log to read."""
    try:
        text = console_text(host, vm)
    except VmctlError:
        return []
    return [line for line in plain(text).splitlines() if line.strip()][-lines:]
