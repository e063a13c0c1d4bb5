"""Reads libvirt's domain XML into values. Pure; only what vmctl asks of a domain, however it was defined."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from vmctl import record
from vmctl.choices import Accel
from vmctl.domain_brief import ACCEL_OF_TYPE


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """One attached disk. ``source`` is a path, or POOL/VOLUME, or "" for an empty drive."""

    target: str
    source: str
    format: str
    device: str
    bus: str
    readonly: bool


@dataclass(frozen=True, slots=True)
class NicFacts:
    """One network card. ``source`` names the network or bridge, or is "user"."""

    mac: str
    source: str
    model: str
    device: str


@dataclass(frozen=True, slots=True)
class TpmFacts:
    """A TPM. ``backend`` is "emulator" (swtpm) or "passthrough"; ``version`` "" where libvirt does not tell."""

    version: str
    model: str
    backend: str


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """One domain as its XML tells it. Memory in MiB is what it was given at most."""

    name: str
    uuid: str
    accel: Accel | None
    vcpus: int
    memory_mib: int
    machine: str
    firmware: str
    cpu: str
    description: str
    disks: tuple[DiskFacts, ...]
    nics: tuple[NicFacts, ...]
    tpm: TpmFacts | None
    graphics: str
    agent: bool
    agent_connected: bool
    serial_log: str
    nvram: str
    kernel: str
    initrd: str
    record: record.Record | None


_KIB_PER = {"b": 1 / 1024, "bytes": 1 / 1024, "KiB": 1, "k": 1, "MiB": 1024, "M": 1024, "GiB": 1024**2, "G": 1024**2}


def _text(root: ET.Element, path: str) -> str:
    return (root.findtext(path) or "").strip()


def _attribute(root: ET.Element, path: str, name: str) -> str:
    found = root.find(path)
    return "" if found is None else found.get(name, "")


def _disk(disk: ET.Element) -> DiskFacts:
    source = disk.find("source")
    where = ""
    if source is not None:
        where = source.get("file") or source.get("dev") or source.get("name") or ""
        if source.get("volume"):
            where = f"{source.get('pool')}/{source.get('volume')}"
    return DiskFacts(
        target=_attribute(disk, "target", "dev"),
        source=where,
        format=_attribute(disk, "driver", "type"),
        device=disk.get("device", "disk"),
        bus=_attribute(disk, "target", "bus"),
        readonly=disk.find("readonly") is not None,
    )


def _nic(nic: ET.Element) -> NicFacts:
    source = nic.find("source")
    where = nic.get("type", "")
    if source is not None:
        where = source.get("network") or source.get("bridge") or source.get("dev") or where
    return NicFacts(
        mac=_attribute(nic, "mac", "address"),
        source=where,
        model=_attribute(nic, "model", "type"),
        device=_attribute(nic, "target", "dev"),
    )


def _tpm(root: ET.Element) -> TpmFacts | None:
    tpm = root.find("devices/tpm")
    if tpm is None:
        return None
    version = _attribute(tpm, "backend", "version")
    return TpmFacts("" if version == "default" else version, tpm.get("model", ""), _attribute(tpm, "backend", "type"))


def _cpu(root: ET.Element) -> str:
    cpu = root.find("cpu")
    if cpu is None:
        return ""
    return _text(cpu, "model") or cpu.get("mode", "")


def read(root: ET.Element) -> DomainFacts:
    """The facts of a parsed <domain>."""
    memory = root.find("memory")
    kib = 0.0 if memory is None else int(memory.text or 0) * _KIB_PER.get(memory.get("unit", "KiB"), 1)
    loader = root.find("os/loader")
    agent = root.find("devices/channel/target[@name='org.qemu.guest_agent.0']")
    uefi = _attribute(root, "os", "firmware") == "efi" or (loader is not None and loader.get("type") == "pflash")
    secure = loader is not None and loader.get("secure") == "yes"
    return DomainFacts(
        name=_text(root, "name"),
        uuid=_text(root, "uuid"),
        accel=ACCEL_OF_TYPE.get(root.get("type", "")),
        vcpus=int(_attribute(root, "vcpu", "current") or _text(root, "vcpu") or 1),
        memory_mib=int(kib / 1024),
        machine=_attribute(root, "os/type", "machine"),
        firmware=("uefi-secure" if secure else "uefi") if uefi else "bios",
        cpu=_cpu(root),
        description=root.findtext("description") or "",
        disks=tuple(_disk(disk) for disk in root.iterfind("devices/disk")),
        nics=tuple(_nic(nic) for nic in root.iterfind("devices/interface")),
        tpm=_tpm(root),
        graphics=_attribute(root, "devices/graphics", "type") or "none",
        agent=agent is not None,
        agent_connected=agent is not None and agent.get("state") == "connected",
        serial_log=_attribute(root, "devices/serial/log", "file"),
        nvram=_text(root, "os/nvram"),
        kernel=_text(root, "os/kernel"),
        initrd=_text(root, "os/initrd"),
        record=record.parse(root),
    )


def parse(text: str) -> DomainFacts:
    """The facts of a domain's XML."""
    return read(ET.fromstring(text))


def with_small_pages(text: str) -> str:
    """An emulated domain's XML, its memory a file without a name, whose pages the kernel gives one by one.

    QEMU asks for huge pages for any other. Who reads a memory into them clears and holds 2 MiB for each page in use:
    the whole of it, and half a second for 1 GiB. On KVM they are worth that: such XML stays as it is, as does one that
    says itself what its memory is.
    """
    emulated = re.search(r"<domain\b[^>]*\btype=['\"]qemu['\"]", text) is not None
    return with_shared_memory(text) if emulated and "<memoryBacking" not in text else text


def with_shared_memory(text: str) -> str:
    """A domain's XML, as libvirt writes it, with its memory open to daemons beside QEMU; as it is where it is so.

    All but <memoryBacking> stays to the letter: ElementTree would move the namespace of vmctl's record to the top,
    from where libvirt loses it.
    """
    begin = text.rfind("</metadata>") + 1
    there = re.compile(r"<memoryBacking\b[^>]*(?:/>|>.*?</memoryBacking>)", re.DOTALL).search(text, begin)
    backing = ET.Element("memoryBacking") if there is None else ET.fromstring(there[0])
    access = backing.find("access")
    if access is not None and access.get("mode") == "shared":
        return text
    for tag, attribute, value in (("source", "type", "memfd"), ("access", "mode", "shared")):
        child = backing.find(tag)
        (ET.SubElement(backing, tag) if child is None else child).set(attribute, value)
    if there is None:
        after = re.compile(r"</memory>(?:\s*<currentMemory\b.*?</currentMemory>)?", re.DOTALL).search(text, begin)
        if after is None:
            raise ValueError("no <memory> in the domain")
        start = end = after.end()
    else:
        start, end = there.span()
    return text[:start] + ET.tostring(backing, encoding="unicode") + text[end:]
