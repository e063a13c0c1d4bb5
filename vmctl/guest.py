"""Reaching into a guest: its address, commands, files, console log."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmctl.errors import NotFound, VmctlError, WrongState
from vmctl.hosts import Host
from vmctl.hypervisor import domain, network, storage
from vmctl.hypervisor.domain import Domain, State
from vmctl.login import Target
from vmctl.seed import client_key
from vmctl.wait import pause

if TYPE_CHECKING:
    from vmctl.login import Terminal

_LOG_TAIL = 256 * 1024
_FOLLOW_S = 0.3
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
        held = [lease for lease in network.leases(host.conn, facts.name) if lease.mac == nic.mac]
        if held:
            return Address(max(held, key=lambda lease: lease.expiry).address, 22, nic.mac, facts.name)
    return None


def target(host: Host, vm: Domain, *, user: str | None = None) -> Target:
    """How to log in to a running guest. Raises WrongState, NotFound."""
    if vm.state is not State.RUNNING:
        hint = f"vmctl resume {vm.name}" if vm.state is State.PAUSED else f"vmctl start {vm.name}"
        raise WrongState(f"cannot reach VM {vm.name}: it is {vm.state}", hint=hint)
    record = vm.facts.record
    if record is None or record.ssh is None:
        raise NotFound(
            f"cannot log in to VM {vm.name}: vmctl did not create it, so it knows no host key of its",
            hint=f"its console may do: vmctl console {vm.name}",
        )
    where = address(host, vm)
    if where is None:
        raise NotFound(f"cannot reach VM {vm.name}: it has no address yet", hint=f"vmctl wait {vm.name} --for ip")
    return Target(where.host, where.port, user or record.ssh.user, record.ssh.host_key, private_key(host))


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
) -> int:
    """Run a command in the guest over SSH, its words kept as they are; returns its exit code."""
    from vmctl import ssh

    where = target(host, domain.find(host.conn, name), user=user)

    def alive() -> None:
        state, _ = domain.state(host.conn, name)
        if state not in domain.ACTIVE:
            raise WrongState(f"cannot go on in VM {name}: it is {state} now", hint=f"vmctl start {name}")

    return ssh.run(where, shlex.join(argv), stdin=stdin, out=out, err=err, terminal=terminal, alive=alive)


def known_hosts(host: Host, name: str) -> Path:
    """The file that tells OpenSSH's client the one key to trust; written for each login, from the VM's record."""
    return host.folders.runtime / f"known_hosts.{name}"


def openssh_argv(host: Host, name: str, words: list[str], *, user: str | None = None) -> list[str]:
    """The OpenSSH command line for an interactive login, which trusts the planted host key and no other."""
    where = target(host, domain.find(host.conn, name), user=user)
    host.folders.runtime.mkdir(parents=True, exist_ok=True, mode=0o700)
    alias = f"vmctl-{name}"
    known = known_hosts(host, name)
    known.write_text(f"{alias} {where.host_key}\n")
    options = {
        "HostKeyAlias": alias,
        "UserKnownHostsFile": str(known),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "IdentityFile": str(where.key),
        "CheckHostIP": "no",
        "LogLevel": "ERROR",
    }
    argv = ["ssh", "-p", str(where.port), "-l", where.user]
    for key, value in options.items():
        argv += ["-o", f"{key}={value}"]
    return [*argv, where.host, *words]


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
