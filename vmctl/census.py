"""Hosts and their VMs at one moment, as values to decide on; nothing here asks anybody."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from vmctl.choices import Accel


class Cpu(NamedTuple):
    """What processor a guest needs. ``exact``: that very model with those flags (host-passthrough); "": any."""

    model: str = ""
    flags: frozenset[str] = frozenset()
    exact: bool = False


class HostSeen(NamedTuple):
    """A host. ``load``: processors busy; ``problem``: why it does not answer; an empty set is one not known."""

    name: str
    cpus: int = 0
    memory_mib: int = 0
    available_mib: int = 0
    load: float = 0.0
    arch: str = ""
    accels: frozenset[Accel] = frozenset()
    cpu_model: str = ""
    cpu_flags: frozenset[str] = frozenset()
    cpu_models: frozenset[str] = frozenset()
    machines: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()
    draining: bool = False
    problem: str = ""


class VmSeen(NamedTuple):
    """A VM; ``host`` "": not made yet. ``load``: processors it keeps busy; ``resident_mib``: memory its QEMU holds.

    No two of one group ``apart`` share a host; ``pinned`` is why it must stay where it is; a higher ``priority`` is
    served first and disturbed last. ``barred``: hosts that it was refused by, and why.
    """

    name: str
    host: str = ""
    vcpus: int = 1
    memory_mib: int = 0
    resident_mib: int = 0
    load: float = 0.0
    running: bool = True
    priority: int = 0
    apart: str = ""
    pinned: str = ""
    arch: str = ""
    accel: Accel | None = None
    machine: str = ""
    cpu: Cpu = Cpu()
    networks: frozenset[str] = frozenset()
    barred: tuple[tuple[str, str], ...] = ()


class Census(NamedTuple):
    """All hosts and the VMs that are known of them; a VM's host is one of these."""

    hosts: tuple[HostSeen, ...]
    vms: tuple[VmSeen, ...]


class By(StrEnum):
    """What a host is used by: memory given to VMs, vCPUs given to them, or processors that are busy."""

    MEMORY = "memory"
    VCPUS = "vcpus"
    CPU = "cpu"


class Limits(NamedTuple):
    """How full hosts may get, and what is worth a move; shares of 1.

    Memory is never given twice. Of each host's, ``reserve`` but at least ``reserve_mib`` stays its own, or what is
    used there beside VMs where that is more.
    """

    reserve: float = 0.05
    reserve_mib: int = 512
    vcpus_per_cpu: float = 4.0
    even: float = 0.1  # hosts this close together are balanced
    gain: float = 0.02  # a move that relieves its source by less is not made
    packed: float = 0.8  # consolidation fills no host beyond this
    by: frozenset[By] = frozenset(By)  # use is what there is most of, among these
