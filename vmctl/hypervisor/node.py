"""A host's processors and memory, and what its VMs take of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import libvirt

from vmctl.hypervisor import inventory
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.hypervisor.states import ACTIVE


class NodeLoad(NamedTuple):
    """One look at a host. Processor times in ns since its boot; memory in MiB; ``given_mib`` to running VMs."""

    cpus: int
    busy_ns: int
    all_ns: int
    memory_mib: int
    available_mib: int
    running: int
    vms: int
    vcpus: int
    given_mib: int


def _available(memory: Mapping[str, int]) -> int:
    return sum(memory.get(kind, 0) for kind in ("free", "buffers", "cached")) // 1024


def available_mib(conn: Connection) -> int:
    """How much memory guests can still be given."""
    with calling("ask for the memory of the host"):
        return _available(conn.handle.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS, 0))


def load(conn: Connection) -> NodeLoad:
    """Look. None of it is asked of a QEMU, which may hang."""
    with calling("ask for the load of the host"):
        info = conn.handle.getInfo()
        times, memory = {"kernel": 0, "user": 0, "idle": 1, "iowait": 0}, {"total": int(info[1]) * 1024, "free": 0}
        try:
            times = conn.handle.getCPUStats(libvirt.VIR_NODE_CPU_STATS_ALL_CPUS, 0)
            memory = conn.handle.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS, 0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:  # the test driver
                raise
    vms = inventory.list_domains(conn)
    active = [one for one in vms if one.state in ACTIVE]
    idle = times.get("idle", 0) + times.get("iowait", 0)
    return NodeLoad(
        cpus=int(info[2]),
        busy_ns=sum(times.values()) - idle - times.get("intr", 0),
        all_ns=sum(times.values()) - times.get("intr", 0),
        memory_mib=memory["total"] // 1024,
        available_mib=_available(memory),
        running=len(active),
        vms=len(vms),
        vcpus=sum(one.vcpus for one in active),
        given_mib=sum(one.memory_mib for one in active),
    )
