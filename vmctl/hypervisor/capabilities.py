"""What libvirt says its host and its QEMU can do. Advertisement, not proof: accel.py holds the proof."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import libvirt

from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The host as libvirt sees it. Memory in MiB; ``qemu_user`` None: QEMU runs as the connecting user.

    ``uuid`` is libvirt's of the host; ``machines`` are the types it has for guests of its own architecture, by all
    their names.
    """

    arch: str
    cpu_model: str
    cpus: int
    memory_mib: int
    emulator: Path
    domain_types: tuple[str, ...]
    qemu_user: str | None
    uuid: str
    machines: frozenset[str]


def _dac_user(root: ET.Element) -> str | None:
    """The user QEMU runs as, from the DAC security model's label for each domain type ("+64055:+108")."""
    for model in root.iterfind("host/secmodel"):
        if model.findtext("model") == "dac":
            for label in model.iterfind("baselabel"):
                return (label.text or "").split(":")[0].lstrip("+") or None
    return None


def _memory_mib(conn: Connection, fallback: int) -> int:
    """All memory of the host. getInfo counts what the NUMA nodes had at boot, not what was plugged in since."""
    try:
        return int(conn.handle.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS, 0)["total"]) // 1024
    except (libvirt.libvirtError, KeyError):
        return fallback


def offers_virtiofs(conn: Connection) -> bool:
    """Whether QEMU there has the device, and libvirt runs its daemon: before 10.0 for the system's guests only."""
    if conn.session and not conn.handle.getLibVersion() >= 10_000_000:
        return False
    with calling("read domain capabilities"):
        root = ET.fromstring(conn.handle.getDomainCapabilities(None, None, None, None))
    return any(v.text == "virtiofs" for v in root.iterfind("devices/filesystem/enum[@name='driverType']/value"))


def virtiofs_can_be_readonly(conn: Connection) -> bool:
    """Whether the host's side can refuse writing; a guest's own read-only mount binds nobody."""
    return bool(conn.handle.getLibVersion() >= 11_000_000)


def host_facts(conn: Connection) -> HostFacts:
    """Read the host's capabilities. The user is a number as libvirt gives it."""
    with calling("read host capabilities"):
        root = ET.fromstring(conn.handle.getCapabilities())
        info = conn.handle.getInfo()
        memory_mib = _memory_mib(conn, info[1])
    arch = root.findtext("host/cpu/arch") or str(info[0])
    emulator, types = "/usr/bin/qemu-system-x86_64", []
    for guest in root.iterfind("guest"):
        element = guest.find("arch")
        if guest.findtext("os_type") == "hvm" and element is not None and element.get("name") == arch:
            emulator = element.findtext("emulator") or emulator
            types = [domain.get("type", "") for domain in element.iterfind("domain")]
    return HostFacts(
        arch=arch,
        cpu_model=root.findtext("host/cpu/model") or "",
        cpus=int(info[2]),
        memory_mib=memory_mib,
        emulator=Path(emulator),
        domain_types=tuple(types),
        qemu_user=None if conn.session else _dac_user(root),
        uuid=root.findtext("host/uuid") or "",
        machines=_machines(root, arch),
    )


def _machines(root: ET.Element, arch: str) -> frozenset[str]:
    found = root.iterfind(f"guest/arch[@name='{arch}']//machine")
    return frozenset(name for one in found for name in (one.text or "", one.get("canonical", "")) if name)


def hostname(conn: Connection) -> str:
    """The host's own name, by whatever URI it was reached."""
    with calling("ask the host who it is"):
        return str(conn.handle.getHostname())


def text(conn: Connection) -> str:
    """libvirt's own words on the host: CPU with microcode, QEMU's machine types, users; and QEMU's version."""
    with calling("read host capabilities"):
        return f"{conn.handle.getCapabilities()}{conn.handle.getVersion()}"


def cpu_models(conn: Connection) -> frozenset[str]:
    """Names of the CPU models libvirt knows for x86-64."""
    with calling("ask for CPU models"):
        return frozenset(conn.handle.getCPUModelNames("x86_64", 0))


def disk_buses(conn: Connection, machine: str) -> frozenset[str]:
    """The buses libvirt can put a disk on, for a machine type; empty where it does not tell."""
    try:
        root = ET.fromstring(conn.handle.getDomainCapabilities(None, "x86_64", machine, None))
    except libvirt.libvirtError:
        return frozenset()  # the test driver, and a machine type of another QEMU
    return frozenset(value.text or "" for value in root.iterfind("devices/disk/enum[@name='bus']/value"))
