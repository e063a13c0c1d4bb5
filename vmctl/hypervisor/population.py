"""All VMs of a host with what they use of it, and what processors it can give them; a hung guest holds nothing up."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection
from typing import Any, NamedTuple

import libvirt

from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.hypervisor.states import State, state_of
from vmctl.hypervisor.waiting import Waiting
from vmctl.order import natural

_PATIENCE_S = 2.0


class Guest(NamedTuple):
    """One VM. ``xml`` is of the running one where it runs; ``snapshots``: whether libvirt knows any of it."""

    name: str
    uuid: str
    state: State
    why: str
    xml: str
    snapshots: bool


class Measure(NamedTuple):
    """What a running VM has used: processor time since its start, and the memory that QEMU holds now."""

    cpu_ns: int
    resident_mib: int


def guests(conn: Connection) -> tuple[Guest, ...]:
    """Every VM, by name. None of it is asked of QEMU."""
    found = []
    with calling("read all VMs"):
        with_snapshots, saved = (
            {dom.UUIDString() for dom in conn.handle.listAllDomains(flag)}
            for flag in (libvirt.VIR_CONNECT_LIST_DOMAINS_HAS_SNAPSHOT, libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)
        )
        for dom, values in conn.handle.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE, 0):
            uuid = dom.UUIDString()
            state, why = state_of(values.get("state.state", 0), values.get("state.reason", 0), saved=uuid in saved)
            try:
                found.append(Guest(dom.name(), uuid, state, why, dom.XMLDesc(), uuid in with_snapshots))
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # deleted since the bulk answer
                    raise
    return tuple(sorted(found, key=lambda guest: natural(guest.name)))


def measures(conn: Connection, only: Collection[str] = ()) -> dict[str, Measure] | None:
    """By UUID what running VMs have used, None when a QEMU that hangs keeps libvirt from an answer.

    One that somebody else asks at this moment is passed over, but the turn of those in ``only`` is waited for. The
    question stays open then, and the connection with it: libvirt 9.0 lets what is asked on it later wait, too, now
    and then. Asked again over another one, NOWAIT passes over the VM that somebody waits for already.
    """
    return Waiting(lambda: _ask(conn, only)).answer(_PATIENCE_S)


def _ask(conn: Connection, only: Collection[str]) -> dict[str, Measure]:
    what = libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_BALLOON
    flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
    with calling("ask what VMs use"):
        if only:
            active = conn.handle.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            wanted = [dom for dom in active if dom.UUIDString() in only]
            stats = conn.handle.domainListGetStats(wanted, what, 0) if wanted else []
        else:
            stats = conn.handle.getAllDomainStats(
                what, flags | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT if conn.qemu else flags
            )
    return {dom.UUIDString(): _measure(values) for dom, values in stats if "balloon.rss" in values}


def _measure(values: dict[str, Any]) -> Measure:
    return Measure(int(values.get("cpu.time", 0)), int(values["balloon.rss"]) // 1024)


def cpu_flags(conn: Connection) -> frozenset[str]:
    """What the host's processor has beyond its model, in libvirt's words."""
    with calling("read host capabilities"):
        root = ET.fromstring(conn.handle.getCapabilities())
    return frozenset(one.get("name", "") for one in root.iterfind("host/cpu/feature"))


def kvm_cpu_models(conn: Connection, arch: str) -> frozenset[str]:
    """The CPU models that a KVM guest can be given there; empty where libvirt does not tell."""
    try:
        root = ET.fromstring(conn.handle.getDomainCapabilities(None, arch, None, "kvm"))
    except libvirt.libvirtError:
        return frozenset()
    found = root.iterfind("cpu/mode[@name='custom']/model[@usable='yes']")
    return frozenset(one.text or "" for one in found)
