"""All domains of a host at once, in a number of libvirt calls that does not grow with the number of domains.

The states come from one bulk call. It is asked for nothing else: for memory and vCPUs libvirt asks QEMU, which may
hang, and NOWAIT only spares one that another client waits for already. All else is in the status of running domains
and the definitions of others that libvirt keeps on disk, read where they can be (this machine's own daemon), and in
their XML, asked for per domain, where they cannot.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import libvirt

from vmctl.domain_brief import Brief, brief
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.hypervisor.states import State, state_of
from vmctl.order import natural


class Entry(NamedTuple):
    """One domain of the inventory. ``uptime_s`` None: not running, or not to be known from here."""

    name: str
    uuid: str
    state: State
    vcpus: int
    memory_mib: int
    uptime_s: float | None
    facts: Brief | None


def names(conn: Connection) -> tuple[str, ...]:
    """Names of all domains, sorted; one call."""
    with calling("list VMs"):
        return tuple(sorted((dom.name() for dom in conn.handle.listAllDomains()), key=natural))


def list_domains(conn: Connection) -> tuple[Entry, ...]:
    """Every domain, sorted by name."""
    with calling("list VMs"):
        stats = conn.handle.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE, 0)
        saved = _saved(conn)
    local = _Local(conn)
    found = (_entry(dom, values, saved, local) for dom, values in stats)
    return tuple(sorted(found, key=lambda entry: natural(entry.name)))


def _saved(conn: Connection) -> frozenset[str]:
    flags = libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE
    return frozenset(dom.UUIDString() for dom in conn.handle.listAllDomains(flags))


def _entry(dom: Any, values: dict[str, Any], saved: frozenset[str], local: _Local) -> Entry:
    name, uuid = dom.name(), dom.UUIDString()
    state, _ = state_of(values.get("state.state", 0), values.get("state.reason", 0), saved=uuid in saved)
    active = dom.ID() != -1
    facts = local.facts(name, uuid, active=active) or _asked(dom)
    return Entry(
        name=name,
        uuid=uuid,
        state=state,
        vcpus=facts.vcpus if facts else 0,
        memory_mib=facts.memory_mib if facts else 0,
        uptime_s=local.uptime_s(name) if active else None,
        facts=facts,
    )


def _asked(dom: Any) -> Brief | None:
    try:
        return brief(dom.XMLDesc())
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:  # deleted since the bulk answer
            return None
        raise


def process_id(conn: Connection, name: str) -> int | None:
    """The process of a running domain of this machine; None when it is not to be known from here."""
    if not (conn.local and conn.qemu):
        return None
    try:
        return int((Path(_folders(conn)[1]) / f"{name}.pid").read_text())
    except (OSError, ValueError):
        return None


class _Local:
    """libvirt's own files about its domains: definitions, and pid files of running ones."""

    def __init__(self, conn: Connection) -> None:
        self._folders: tuple[Path, Path] | None = _folders(conn) if conn.local and conn.qemu else None

    def facts(self, name: str, uuid: str, *, active: bool) -> Brief | None:
        if self._folders is None:
            return None
        path = f"{self._folders[active]}/{name}.xml"
        try:
            # libvirt replaces these files whole, so a reader sees the old one or the new one.
            # Unbuffered bytes: the other layers take longer than the read.
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                found = brief(file.read().decode())
        except (OSError, ValueError):
            return None
        return found if found.uuid == uuid else None

    def uptime_s(self, name: str) -> float | None:
        """Seconds since the QEMU process began, from /proc."""
        if self._folders is None:
            return None
        try:
            pid = int((self._folders[1] / f"{name}.pid").read_text())
            began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
            up = float(Path("/proc/uptime").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None
        return up - began / os.sysconf("SC_CLK_TCK")


def uptime_s(conn: Connection, name: str) -> float | None:
    """How long the domain's QEMU process has run; None when that cannot be known from here."""
    return _Local(conn).uptime_s(name)


def _folders(conn: Connection) -> tuple[Path, Path]:
    """Where this machine's daemon keeps definitions and the status of running domains."""
    if not conn.session:
        return Path("/etc/libvirt/qemu"), Path("/run/libvirt/qemu")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) if runtime else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return config / "libvirt/qemu", base / "libvirt/qemu/run"
