"""A host to work on: its connection with the settings that apply, its accelerator, and what it can tell of itself."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from vmctl import config
from vmctl.choices import AccelChoice
from vmctl.config import Folders, HostEntry, Settings
from vmctl.errors import HostUnreachable
from vmctl.events import Reporter, Warned, silent
from vmctl.hypervisor import connection
from vmctl.hypervisor.connection import Connection
from vmctl.locks import held

if TYPE_CHECKING:
    from vmctl.accel import Decision, KvmFindings
    from vmctl.hypervisor.capabilities import HostFacts


@dataclass(frozen=True)
class Host:
    """An open connection with the settings and folders to use on it. Use as a context manager."""

    conn: Connection
    settings: Settings
    folders: Folders
    entry: HostEntry | None = None

    @property
    def name(self) -> str:
        """What it is called: its name in the config file, or the one it has itself."""
        return (self.entry and self.entry.name) or self.conn.host

    @cached_property
    def facts(self) -> HostFacts:
        """What libvirt says the host is; asked once."""
        from vmctl.hypervisor import capabilities  # late, like accel: every command opens a host, few ask this

        return capabilities.host_facts(self.conn)

    @property
    def lock_scope(self) -> str:
        """What the names of this host's locks begin with."""
        return self.conn.uri

    @property
    def others(self) -> tuple[HostEntry, ...]:
        """The other hosts of the config file, as far as that tells them apart."""
        return tuple(one for one in self.settings.hosts.values() if one != self.entry and one.uri != self.conn.uri)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.conn.close()


def pool_folder(host: Host, leaf: str) -> str:
    """The folder that a pool of vmctl's is made with."""
    return str(host.folders.data / leaf) if host.conn.session else f"/var/lib/libvirt/vmctl/{leaf}"


def holding(host: Host, name: str, *, timeout_s: float = 0.0) -> AbstractContextManager[None]:
    """Hold the name of a VM against other vmctl processes. Raises Conflict when one still has it after that time."""
    return held(host.folders.runtime, f"VM {name} on {host.lock_scope}", timeout_s=timeout_s)


def open_host(connect: str | None = None, env: Mapping[str, str] = os.environ, report: Reporter = silent) -> Host:
    """Open the host that flag, environment or config name, or the one that answers. Raises HostUnreachable."""
    folders = config.folders(env)
    settings = config.load(folders.config / "config.toml")
    entry = config.chosen(connect, settings, env)

    def fell_back(why: str) -> None:
        text = f"using {connection.SESSION}, for {connection.SYSTEM} does not answer: {why}"
        report(Warned(text, "-c or VMCTL_CONNECT chooses"))

    if entry is not None:
        return open_entry(entry, settings, folders)
    try:
        return Host(connection.connect_default(fell_back), settings, folders)
    except HostUnreachable as error:
        raise _or_elsewhere(error, settings) from None


def _or_elsewhere(error: HostUnreachable, settings: Settings) -> HostUnreachable:
    """That this machine's own libvirt does not answer, with the hosts that may be meant."""
    if not settings.hosts:
        return error
    hint = f"{error.hint}; or on another host by -c HOST, known: {', '.join(settings.hosts)}"
    return HostUnreachable(error.message, hint=hint)


def open_entry(entry: HostEntry, settings: Settings, folders: Folders) -> Host:
    """Open a host, by SSH only with the key that is pinned for it. Raises HostUnreachable."""
    way, hint = "", ""
    try:
        if entry.host_key or "+ssh:" in entry.uri:
            from vmctl import host_ssh  # late: a host of this machine needs none

            way = host_ssh.through(entry, folders.runtime)
        return Host(connection.connect(entry.uri, way), settings, folders, entry)
    except HostUnreachable as error:
        if way and (hint := host_ssh.other_key(entry, error.message)):  # OpenSSH says it in fifteen lines, of our files
            error = HostUnreachable(f"cannot connect to {entry.uri}: Host key verification failed", hint=hint)
        error = HostUnreachable(config.by_name(error.message, entry), hint=error.hint)
        raise (_or_elsewhere(error, settings) if entry.uri == connection.SYSTEM else error) from None


def another(host: Host) -> Host:
    """The same host by a connection of its own, for a thread whose calls must not wait for another one's.

    libvirt 9.0's client can lose the wake-up that sends a call while another thread waits for a long one: the call is
    sent when that one is answered.
    """
    if host.entry is not None:
        return open_entry(host.entry, host.settings, host.folders)
    return Host(connection.connect(host.conn.uri), host.settings, host.folders)


def qemu_user_name(user: str | None) -> str | None:
    """The name of the user libvirt gives as a number; None when QEMU runs as the connecting user."""
    if user is None or not user.isdigit():
        return user
    try:
        return pwd.getpwuid(int(user)).pw_name
    except KeyError:
        return user


def kvm_findings(host: Host, *, refresh: bool = False) -> KvmFindings:
    """What is known of KVM on the host, by evidence."""
    from vmctl import accel

    if not host.conn.qemu:
        return accel.not_examined("the connection does not drive QEMU")
    if not host.conn.local:
        return _through_libvirt(host, refresh=refresh)
    facts = host.facts
    found = accel.examine(
        qemu_user=qemu_user_name(facts.qemu_user),
        qemu_binary=facts.emulator,
        cache_dir=host.folders.cache,
        refresh=refresh,
    )
    # QEMU may open the device, and we may not: then the probe runs as guests do, as that user.
    return accel.joined(found, _through_libvirt(host, refresh=refresh)) if found.only_we_are_refused else found


def _through_libvirt(host: Host, *, refresh: bool) -> KvmFindings:
    from vmctl import remote_kvm, render

    pool = host.settings.pool
    return remote_kvm.examine(
        host.conn,
        pool=pool,
        pool_xml=lambda: render.pool(pool, pool_folder(host, pool)),
        cache_dir=host.folders.cache,
        refresh=refresh,
    )


def decide_accel(host: Host, requested: AccelChoice, *, refresh: bool = False) -> Decision:
    """Which accelerator to use here, and why. Raises Unsupported when what was required is not to be had."""
    from vmctl import accel

    if requested is AccelChoice.TCG:  # no need to run a guest to learn what nobody wants to know
        return accel.choose(requested, accel.not_examined("TCG was asked for"))
    return accel.choose(requested, kvm_findings(host, refresh=refresh))


def known_accel(host: Host) -> Decision | None:
    """That decision, where it is known; None of a host elsewhere on which a guest would have to be started for it."""
    from vmctl import accel, remote_kvm

    if host.conn.local or not host.conn.qemu:
        return decide_accel(host, AccelChoice.AUTO)
    findings = remote_kvm.known(host.conn, cache_dir=host.folders.cache)
    return accel.choose(AccelChoice.AUTO, findings) if findings else None
