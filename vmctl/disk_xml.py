"""Reads the disks of libvirt's domain XML, with their tuning and backing chains, into values. Pure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from vmctl.disk_spec import Source, SourceKind

_LIMITS = (
    "total_iops_sec",
    "read_iops_sec",
    "write_iops_sec",
    "total_bytes_sec",
    "read_bytes_sec",
    "write_bytes_sec",
)
_NETWORK = {kind.value: kind for kind in (SourceKind.NBD, SourceKind.ISCSI, SourceKind.RBD)}


@dataclass(frozen=True, slots=True)
class DiskDevice:
    """One disk of a domain. ``source`` is as text: a path, an address, POOL/VOLUME, or "" for an empty drive.

    ``backing`` are the sources below it, as far as the XML tells; ``mirror`` is where a running job copies it to.
    """

    target: str
    bus: str
    serial: str
    source: str
    format: str
    device: str
    readonly: bool
    shareable: bool
    cache: str
    aio: str
    discard: str
    iothread: int | None
    limits: dict[str, int]
    backing: tuple[str, ...]
    mirror: str
    alias: str
    xml: str

    def named(self, name: str) -> bool:
        """Whether a user means this disk by ``name``: its target, serial or source."""
        return name in {self.target, self.serial, self.source} - {""}


def on_root_bus(xml: str) -> bool:
    """Whether a disk's XML puts it on its machine's first PCI bus, which on a q35 lets nothing be taken out."""
    address = ET.fromstring(xml).find("address[@type='pci']")
    return address is not None and int(address.get("bus", "0"), 0) == 0


def source_text(source: ET.Element | None) -> str:
    """What a <source> names, as a user would write it; "" for nothing."""
    if source is None:
        return ""
    if source.get("volume"):
        return f"{source.get('pool')}/{source.get('volume')}"
    kind = _NETWORK.get(source.get("protocol", ""))
    if kind is not None:
        return str(_network(kind, source))
    if source.get("protocol"):
        return f"{source.get('protocol')}:{source.get('name', '')}"
    return source.get("file") or source.get("dev") or source.get("dir") or ""


def _network(kind: SourceKind, source: ET.Element) -> Source:
    host, name = source.find("host"), source.get("name", "")
    if host is None:
        return Source(kind, name=name)
    if host.get("transport") == "unix":
        return Source(kind, name=name, socket=host.get("socket", ""))
    return Source(kind, name=name, host=host.get("name", ""), port=int(host.get("port") or 0))


def _backing(disk: ET.Element) -> tuple[str, ...]:
    found, at = [], disk.find("backingStore")
    while at is not None:
        if text := source_text(at.find("source")):
            found.append(text)
        at = at.find("backingStore")
    return tuple(found)


def _attribute(root: ET.Element, path: str, name: str) -> str:
    found = root.find(path)
    return "" if found is None else found.get(name, "")


def _read(disk: ET.Element) -> DiskDevice:
    driver = disk.find("driver")
    said = {} if driver is None else driver.attrib
    mirror = disk.find("mirror")
    return DiskDevice(
        target=_attribute(disk, "target", "dev"),
        bus=_attribute(disk, "target", "bus"),
        serial=(disk.findtext("serial") or "").strip(),
        source=source_text(disk.find("source")),
        format=said.get("type", ""),
        device=disk.get("device", "disk"),
        readonly=disk.find("readonly") is not None,
        shareable=disk.find("shareable") is not None,
        cache=said.get("cache", "default"),
        aio=said.get("io", "default"),
        discard=said.get("discard", "ignore"),
        iothread=int(said["iothread"]) if "iothread" in said else None,
        limits={one: int(text) for one in _LIMITS if (text := disk.findtext(f"iotune/{one}")) and int(text)},
        backing=_backing(disk),
        mirror="" if mirror is None else source_text(mirror.find("source")),
        alias=_attribute(disk, "alias", "name"),
        xml=ET.tostring(disk, encoding="unicode"),
    )


def read(text: str) -> tuple[DiskDevice, ...]:
    """The disks of a domain's XML, in its order."""
    return read_element(ET.fromstring(text))


def read_element(domain: ET.Element) -> tuple[DiskDevice, ...]:
    """The same of a parsed <domain>."""
    return tuple(_read(disk) for disk in domain.iterfind("devices/disk"))


def with_source(text: str, target: str, path: str, form: str) -> str:
    """A domain's XML whose disk ``target`` has its content in the file ``path`` of that format, on no backing file.

    All but the disk stays to the letter: ElementTree would move the namespace of vmctl's record to the top, from where
    libvirt loses it.
    """
    begin = text.index("<devices>", text.rfind("</metadata>") + 1)

    def changed(match: re.Match[str]) -> str:
        disk = ET.fromstring(match[0])
        return match[0] if _attribute(disk, "target", "dev") != target else _changed(disk, path, form)

    return text[:begin] + re.sub(r"<disk\b.*?</disk>", changed, text[begin:], flags=re.DOTALL)


def _changed(disk: ET.Element, path: str, form: str) -> str:
    for child in [one for one in disk if one.tag in {"source", "backingStore", "mirror"}]:
        disk.remove(child)
    disk.set("type", "file")
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    driver.set("type", form)
    disk.insert(1, ET.Element("source", {"file": path}))
    return ET.tostring(disk, encoding="unicode")


def has_any_scsi_controller(text: str) -> bool:
    """Whether the domain has a SCSI controller of any model."""
    return any(one.get("type") == "scsi" for one in ET.fromstring(text).iterfind("devices/controller"))


def without_free_port(text: str) -> bool:
    """Whether the domain has PCIe root ports, into which alone a running q35 takes a device, and each is in use."""
    devices = ET.fromstring(text).find("devices")
    if devices is None:
        return False
    ports = {one.get("index") for one in devices.iterfind("controller[@model='pcie-root-port']")}
    addresses = devices.iterfind("*/address[@type='pci']")
    return bool(ports) and ports <= {f"{int(one.get('bus', '0'), 0)}" for one in addresses}


def iothreads(text: str) -> frozenset[int]:
    """The numbers of the domain's I/O threads."""
    root = ET.fromstring(text)
    ids = {int(one.get("id", "0")) for one in root.iterfind("iothreadids/iothread")}
    return frozenset(ids or range(1, int(root.findtext("iothreads") or 0) + 1))


def only_user(text: str, target: str) -> int | None:
    """The I/O thread that nothing in the domain but its disk ``target`` names, no pinning either; None for none."""
    root = ET.fromstring(text)
    users = [
        (one.get("dev"), disk.find("driver"))
        for disk in root.iterfind("devices/disk")
        for one in disk.iterfind("target")
    ]
    users += [(None, one.find("driver")) for one in root.iterfind("devices/controller")]
    mine = [found.get("iothread") for name, found in users if name == target and found is not None]
    others = {found.get("iothread") for name, found in users if name != target and found is not None}
    others |= {one.get("iothread") for one in root.iterfind("cputune/iothreadpin")}
    listed = ",".join(one.get("iothreads", "") for one in root.iterfind("cputune/iothreadsched"))
    if not mine or mine[0] is None or mine[0] in others or listed:
        return None
    return int(mine[0])
